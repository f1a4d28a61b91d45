//! What a disk does in a second, either way: `cargo test --release -p cableway-vmm disk::speed -- --ignored --nocapture`.
//!
//! Owns a driver of sixteen requests in indirect tables, and the figures in docs/vm.md. A test on request only: it says what a
//! machine does, and nothing is wrong with one that is slow.

use std::time::{Duration, Instant};

use super::*;
use crate::config::Config;
use crate::test_driver::{DATA, Driver, SIZE};

const INDIRECT: u16 = 4;
/// How long each figure is measured, and how often.
const TIME: Duration = Duration::from_millis(500);
const ROUNDS: usize = 5;
/// Bytes of the image, of a request, and of the guest's memory for one.
const IMAGE: u64 = 256 << 20;
const BLOCK: u32 = 4096;
const PLACE: u64 = 0x2000;

/// Requests that were done in a second, with `flight` of them in flight at all times.
fn rate(image: &std::path::Path, aio: &str, direct: bool, writes: bool, flight: u16) -> f64 {
    let text = format!(
        "[vm]\nkernel = 'k'\n[[vm.disk]]\nformat = 'raw'\npath = {image:?}\naio = {aio:?}\ndirect = {direct}"
    );
    let config = Config::parse(&text, std::path::Path::new("vm.toml")).unwrap();
    let image = Arc::new(Image::open(&config.disk[0]).unwrap());
    let mut driver = Driver::new();
    let mut disk = Disk::new(&config.disk[0], image, &driver.for_rings()).unwrap();
    let agreed = features::VERSION_1 | features::RING_INDIRECT_DESC | FEATURE_FLUSH;
    disk.activate(driver.activation(&[0], agreed));
    let blocks = IMAGE / u64::from(BLOCK);
    let mut seed = 1_u64;
    let place = |n: u16| DATA + PLACE * u64::from(n);
    let mut offer = |driver: &mut Driver, n: u16| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut header = u32::from(writes).to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(((seed >> 33) % blocks * u64::from(BLOCK) / 512).to_le_bytes());
        driver.write(place(n) + 0x1000 + 64, &header);
        driver.offer(n);
    };
    for n in 0..flight {
        // The data is at the place's beginning, then the table, the header, the status.
        let (table, data_writable) = (place(n) + 0x1000, if writes { 0 } else { 2 });
        let mut entries = Vec::new();
        for (address, length, flags, next) in
            [(table + 64, 16, 1, 1_u16), (place(n), BLOCK, 1 | data_writable, 2), (table + 128, 1, 2, 0)]
        {
            entries.extend(address.to_le_bytes());
            entries.extend(u32::to_le_bytes(length));
            entries.extend(u16::to_le_bytes(flags));
            entries.extend(next.to_le_bytes());
        }
        driver.write(table, &entries);
        driver.descriptor(n, (table, 48, INDIRECT, 0));
        offer(&mut driver, n);
    }
    let (mut done, mut seen) = (0_u64, 0_u16);
    let begin = Instant::now();
    while begin.elapsed() < TIME {
        let fresh = driver.used().wrapping_sub(seen);
        for n in 0..fresh {
            let head = driver.used_head(seen.wrapping_add(n));
            offer(&mut driver, head as u16);
        }
        seen = seen.wrapping_add(fresh);
        done += u64::from(fresh);
        if fresh == 0 {
            std::thread::yield_now();
        }
    }
    let took = begin.elapsed().as_secs_f64();
    disk.reset();
    driver.until("let go", |_| disk.is_reset());
    done as f64 / took
}

#[test]
#[ignore = "measures, and judges nothing: cargo test --release -p cableway-vmm disk::speed -- --ignored --nocapture"]
fn requests_a_second_either_way() {
    let image = tempfile::NamedTempFile::new_in(".").unwrap();
    let bytes: Vec<u8> = (0..IMAGE).map(|n| (n >> 12) as u8).collect();
    std::fs::write(image.path(), bytes).unwrap();
    image.as_file().sync_all().unwrap();
    println!("requests of 4 KiB a second, median of {ROUNDS}       threads   io_uring");
    for direct in [true, false] {
        for writes in [false, true] {
            for flight in [1, 4, SIZE] {
                let mut rates = ["threads", "io_uring"].map(|_| Vec::new());
                for _ in 0..ROUNDS {
                    for (aio, rates) in ["threads", "io_uring"].iter().zip(&mut rates) {
                        rates.push(rate(image.path(), aio, direct, writes, flight));
                    }
                }
                let median = rates.map(|mut rates| {
                    rates.sort_by(f64::total_cmp);
                    rates[ROUNDS / 2]
                });
                let how = if direct { "O_DIRECT" } else { "page cache" };
                let what = if writes { "writes" } else { "reads" };
                println!("{how:<10} {what:<6} {flight:>2} in flight {:>14.0} {:>10.0}", median[0], median[1]);
            }
        }
    }
}
