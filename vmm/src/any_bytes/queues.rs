//! A device of ours whose driver writes any bytes: mostly entries in the right places with any fields, now and then anything
//! anywhere.
//!
//! Asserts that a turn of the queue comes to an end, that nothing is under way of a queue at rest, that a disk keeps its size and,
//! if it is only read, its bytes; panics and accesses outside of memory show by themselves. A ring may break at any time; then
//! the driver starts anew.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio::features;

use super::Input;
use crate::config::Config;
use crate::console::Console;
use crate::disk::Disk;
use crate::disk::image::Image;
use crate::net::any_control;
use crate::rng::Rng;
use crate::test_driver::{DATA, DESCRIPTORS, Driver, SIZE};
use crate::virtio_console::VirtioConsole;
use crate::worker::Serve;
use crate::worker::queue::Queue;

/// Bytes of the disk, and of the memory that buffers usually are in.
const DISK: u64 = 64 * 512;
const BUFFERS: u64 = 0x8000;
/// Turns until a queue has nothing to do: a request each, and some that find nothing.
const TURNS: usize = 4 * SIZE as usize;

thread_local! {
    /// Memory of a guest, which is long to make.
    static DRIVER: RefCell<Driver> = RefCell::new(Driver::new());
}

/// One queue of a device that the first byte chooses.
pub fn queues(bytes: &[u8]) {
    DRIVER.with_borrow_mut(|driver| {
        driver.write(0, &[0; 0x8000]);
        driver.write(DATA, &[0; 2 * BUFFERS as usize]);
        let mut input = Input(bytes);
        match input.byte() % 8 {
            0 => run(driver, &mut input, Rng::server()),
            1 => run(driver, &mut input, any_control()),
            2 | 3 => {
                let (console, output) = Console::open_nowhere();
                let (servers, typed) = VirtioConsole::servers(output).unwrap();
                typed.receive(b"What somebody typed before the driver was there.");
                let server = servers.into_iter().nth(usize::from(input.byte() % 2)).unwrap();
                run(driver, &mut input, server);
                drop(typed);
                console.close();
            }
            kind => disk(driver, &mut input, kind),
        }
    });
}

/// A disk; bits of `kind` say whether it is only read, and whether the kernel does requests by itself.
fn disk(driver: &mut Driver, input: &mut Input<'_>, kind: u8) {
    let (read_only, aio) = (kind & 1 == 1, if kind & 2 == 0 { "threads" } else { "io_uring" });
    let image = File::from(memfd_create("image", MFdFlags::MFD_CLOEXEC).unwrap());
    let before: Vec<u8> = (0..DISK).map(|at| (at / 512) as u8).collect();
    image.write_all_at(&before, 0).unwrap();
    let text = format!(
        "[vm]\nkernel = 'k'\n[[vm.disk]]\nformat = 'raw'\npath = '/proc/self/fd/{}'\nread_only = {read_only}\naio = '{aio}'",
        image.as_raw_fd()
    );
    let config = Config::parse(&text, Path::new("vm.toml")).unwrap();
    let config = config.disk.first().unwrap();
    let opened = Arc::new(Image::open(config).unwrap());
    let server = Disk::servers(config, &opened, &driver.for_rings()).into_iter().next().unwrap();
    run(driver, input, server);
    assert_eq!(image.metadata().unwrap().len(), DISK, "the image has another size");
    if read_only {
        let mut after = vec![0; DISK as usize];
        image.read_exact_at(&mut after, 0).unwrap();
        assert!(after == before, "a disk that is only read was written");
    }
}

fn run(driver: &mut Driver, input: &mut Input<'_>, server: impl Serve) {
    let mut queue = Queue::new("any".to_owned(), server);
    let memory = driver.for_rings();
    let bits = input.byte();
    let mut agreed = features::VERSION_1 | features::RING_INDIRECT_DESC | features::NET_MQ;
    for (bit, feature) in [
        (1, features::RING_EVENT_IDX),
        (2, features::NET_CTRL_RX | features::NET_CTRL_MAC_ADDR | features::NET_GUEST_ANNOUNCE),
        (4, 1 << 9), // flushes of a disk
    ] {
        agreed |= if bits & bit != 0 { feature } else { 0 };
    }
    let mut running = false;
    while !input.is_empty() {
        if !running {
            let setup = driver.activation(&[0], agreed).queues.remove(0);
            running = queue.start(agreed, setup, &memory).is_ok();
        }
        for _ in 0..input.byte() % 4 {
            chain(driver, input);
        }
        // Now and then anything in the ring, or an index of any distance.
        match input.byte() {
            248.. => driver.write(DESCRIPTORS + u64::from(input.word() % 0x2200), input.bytes(16)),
            240.. => driver.skip(u16::from(input.byte() % 4)),
            _ => {}
        }
        let mut turns = 0;
        loop {
            match queue.turn() {
                Ok(false) => break,
                Ok(true) => turns += 1,
                Err(_) => {
                    queue.give_up();
                    queue.stop();
                    running = false;
                    break;
                }
            }
            assert!(turns <= TURNS, "it does not come to an end");
        }
        match input.byte() % 8 {
            0..4 => queue.rest(),
            4 => {
                queue.stop();
                running = false;
            }
            _ => continue,
        }
        assert!(!queue.serve.is_under_way(), "something is under way of a queue at rest");
    }
    queue.stop();
    assert!(!queue.serve.is_under_way());
}

/// Writes a chain of a few descriptors and makes it available: usually a header, buffers, and room for an answer.
fn chain(driver: &mut Driver, input: &mut Input<'_>) {
    let (shape, head) = (input.byte(), u16::from(input.byte()) % SIZE);
    let pieces = u16::from(shape % 4) + 1;
    let indirect = shape >= 224;
    let table = DATA + BUFFERS;
    for n in 0..pieces {
        let choice = input.byte();
        let address = match choice {
            250.. => u64::from(input.long()) << (choice % 2 * 32),
            _ => DATA + u64::from(input.word()) % BUFFERS,
        };
        let length = match choice % 8 {
            0 => u32::from(input.byte()),
            1 => input.long() >> (choice / 8),
            2 => 16,
            3 => 1,
            more => 512 * (u32::from(more) - 3),
        };
        // Kinds of requests are small numbers, and so are sectors.
        if n == 0 {
            driver.write(DATA + u64::from(input.word()) % BUFFERS, input.bytes(16));
            driver.write(address.clamp(DATA, DATA + BUFFERS), &[input.byte() % 16, input.byte() % 4, 0, 0]);
            driver.write(address.clamp(DATA, DATA + BUFFERS) + 4, &[0, 0, 0, 0, input.byte() % 80, 0, 0, 0]);
        }
        let last = n + 1 == pieces;
        let mut flags = u16::from(!last) | if n > 0 && (last || choice & 16 != 0) { 2 } else { 0 };
        if choice == 249 {
            flags = u16::from(input.byte()) & 7;
        }
        let place = (head + n) % SIZE;
        if indirect {
            let mut entry = address.to_le_bytes().to_vec();
            entry.extend(length.to_le_bytes());
            entry.extend(flags.to_le_bytes());
            entry.extend((n + 1).to_le_bytes());
            driver.write(table + 16 * u64::from(n), &entry);
        } else {
            driver.descriptor(place, (address, length, flags, (place + 1) % SIZE));
        }
    }
    if indirect {
        driver.descriptor(head, (table, 16 * u32::from(pieces), 4, 0));
    }
    driver.offer(head);
}
