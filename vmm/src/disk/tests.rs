//! A disk and its driver, which may write anything.

use std::ops::{Deref, DerefMut};

use super::*;
use crate::config::Config;
use crate::test_driver::{DATA, DESCRIPTORS, Driver, SIZE};

/// Where things are in the guest.
const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x5000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

struct Guest {
    driver: Driver,
    disk: Disk,
    file: tempfile::NamedTempFile,
}

impl Guest {
    /// A guest with a started disk of 64 sectors, done `aio`'s way; `keys` are more of the disk's.
    fn with(aio: &str, keys: &str) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), (0..64 * 512).map(|i| (i / 512) as u8).collect::<Vec<_>>()).unwrap();
        let text = format!(
            "[vm]\nkernel = 'k'\n[[vm.disk]]\nformat = 'raw'\npath = {:?}\naio = {aio:?}\n{keys}",
            file.path()
        );
        let config = Config::parse(&text, std::path::Path::new("vm.toml")).unwrap();
        let image = Arc::new(Image::open(&config.disk[0]).unwrap());
        let driver = Driver::new();
        let disk = Disk::new(&config.disk[0], image, &driver.for_rings()).unwrap();
        let mut guest = Self { driver, disk, file };
        guest.start();
        guest
    }

    fn start(&mut self) {
        self.disk.activate(self.driver.activation(&[0], features::VERSION_1 | FEATURE_FLUSH));
    }

    /// Offers a chain and returns the length that it came back with, and its status.
    fn chain(&mut self, pieces: &[(u64, u32, bool)]) -> (u32, u8) {
        self.write(STATUS, &[0xee]);
        let written = self.driver.chain(pieces);
        (written, self.read(STATUS, 1)[0])
    }

    /// An ordinary request: header, data, status.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u32, u8) {
        self.header(kind, sector);
        let mut pieces = vec![(HEADER, 16, false)];
        pieces.extend(data);
        pieces.push((STATUS, 1, true));
        self.chain(&pieces)
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.write(HEADER, &header);
    }

    /// Discards or zeroes a range.
    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut range = sector.to_le_bytes().to_vec();
        range.extend(sectors.to_le_bytes());
        range.extend(flags.to_le_bytes());
        self.write(DATA, &range);
        self.request(kind, 0, &[(DATA, 16, false)]).1
    }

    fn until_disk(&mut self, what: &str, is: impl Fn(&Disk) -> bool) {
        self.driver.until(what, |_| is(&self.disk));
    }

    fn contents(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }
}

impl Deref for Guest {
    type Target = Driver;

    fn deref(&self) -> &Driver {
        &self.driver
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Driver {
        &mut self.driver
    }
}

/// Each test for either way.
macro_rules! both_ways {
    ($($test:ident)+) => {
        mod io_uring {
            $(#[test] fn $test() { super::$test("io_uring") })+
        }
        mod threads {
            $(#[test] fn $test() { super::$test("threads") })+
        }
    };
}

both_ways! {
    what_is_written_in_pieces_is_in_the_file_and_is_read_again_in_other_pieces
    a_disk_beside_the_page_cache_takes_memory_that_is_not_aligned_and_says_what_its_blocks_are
    what_is_not_on_the_disk_or_not_whole_sectors_fails_and_changes_nothing
    a_disk_that_is_only_read_is_not_written
    what_is_discarded_or_zeroed_reads_as_zeros_and_nothing_else_does
    chains_that_are_no_request_come_back_and_the_next_one_is_served
    a_ring_that_makes_no_sense_stops_the_disk_until_its_driver_resets_it
    a_file_that_becomes_shorter_is_an_error_of_the_request
    two_machines_do_not_share_a_disk_that_one_of_them_writes
    many_requests_at_once_are_each_answered_once
    what_is_under_way_is_done_before_the_disk_rests_or_lets_go
}

fn what_is_written_in_pieces_is_in_the_file_and_is_read_again_in_other_pieces(aio: &str) {
    let mut guest = Guest::with(aio, "serial = 'a disk'");
    let data: Vec<u8> = (0..1024_u32).map(|i| (i * 7) as u8).collect();
    guest.write(DATA, &data);
    let pieces = [(DATA, 100, false), (DATA + 100, 500, false), (DATA + 600, 424, false)];
    assert_eq!(guest.request(1, 3, &pieces), (1, 0));
    assert_eq!(guest.request(4, 0, &[]), (1, 0));
    assert_eq!(guest.contents()[3 * 512..5 * 512], data);
    let to = DATA + 0x1000;
    assert_eq!(guest.request(0, 2, &[(to, 1000, true), (to + 1000, 536, true)]), (1537, 0));
    assert_eq!(guest.read(to, 1536), [vec![2; 512], data].concat());
    assert_eq!(guest.request(8, 0, &[(to, 20, true)]), (21, 0));
    assert_eq!(guest.read(to, 20), b"a disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

fn a_disk_beside_the_page_cache_takes_memory_that_is_not_aligned_and_says_what_its_blocks_are(aio: &str) {
    let mut guest = Guest::with(aio, "direct = true");
    let block = u32::from_le_bytes(guest.disk.config()[20..24].try_into().unwrap());
    assert!(block.is_power_of_two() && (512..=4096).contains(&block), "{block}");
    let data: Vec<u8> = (0..8192_u32).map(|i| (i * 7) as u8).collect();
    guest.write(DATA, &data);
    // Two blocks of 4 KiB: aligned, and in pieces that no disk takes.
    assert_eq!(guest.request(1, 8, &[(DATA, 4096, false)]), (1, 0));
    let pieces = [(DATA + 4096, 100, false), (DATA + 4196, 3001, false), (DATA + 7197, 995, false)];
    assert_eq!(guest.request(1, 16, &pieces), (1, 0));
    assert!(guest.contents()[4096..12_288] == data);
    let to = DATA + 0x4001;
    assert_eq!(guest.request(0, 8, &[(to, 1, true), (to + 1, 8191, true)]), (8193, 0));
    assert!(guest.read(to, 8192) == data);
    assert_eq!((guest.range(11, 0, 8, 0), guest.range(13, 8, 8, 0)), (0, 0));
    assert!(guest.contents()[..8192].iter().all(|byte| *byte == 0));
}

fn what_is_not_on_the_disk_or_not_whole_sectors_fails_and_changes_nothing(aio: &str) {
    let mut guest = Guest::with(aio, "");
    let before = guest.contents();
    for (sector, len) in
        [(64, 512), (63, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (1 << 55, 512), (0, 511), (0, 1)]
    {
        assert_eq!(guest.request(0, sector, &[(DATA, len, true)]), (0, 1), "read {len} at {sector}");
        assert_eq!(guest.request(1, sector, &[(DATA, len, false)]), (1, 1), "write {len} at {sector}");
    }
    for (sector, sectors) in [(64, 1), (63, 2), (0, 65), (u64::MAX, 1), (u64::MAX / 512, 2), (1 << 55, 1)] {
        assert_eq!(
            (guest.range(11, sector, sectors, 0), guest.range(13, sector, sectors, 0)),
            (1, 1),
            "{sectors} from {sector}"
        );
    }
    assert!(guest.contents() == before);
    assert_eq!(guest.request(99, 0, &[]).1, 2, "no such kind");
}

fn a_disk_that_is_only_read_is_not_written(aio: &str) {
    let mut guest = Guest::with(aio, "read_only = true");
    assert_eq!(guest.disk.features() & (FEATURE_READ_ONLY | FEATURE_DISCARD), FEATURE_READ_ONLY);
    let before = guest.contents();
    assert_eq!(guest.request(1, 0, &[(DATA, 512, false)]), (1, 1));
    assert_eq!((guest.range(11, 0, 8, 0), guest.range(13, 0, 8, 0)), (1, 1));
    assert_eq!(guest.request(0, 5, &[(DATA, 512, true)]), (513, 0));
    assert!((guest.read(DATA, 512), guest.contents()) == (vec![5; 512], before));
}

fn what_is_discarded_or_zeroed_reads_as_zeros_and_nothing_else_does(aio: &str) {
    let mut guest = Guest::with(aio, "");
    assert_eq!(guest.range(11, 8, 8, 0), 0);
    assert_eq!(guest.range(13, 32, 3, 0), 0);
    assert_eq!(guest.range(13, 40, 3, 1), 0);
    let contents = guest.contents();
    for sector in 0..64_usize {
        let zero = (8..16).contains(&sector) || (32..35).contains(&sector) || (40..43).contains(&sector);
        let want = if zero { 0 } else { sector as u8 };
        assert!(contents[sector * 512..][..512].iter().all(|byte| *byte == want), "sector {sector}");
    }
    assert_eq!((guest.range(11, 0, 8, 1), guest.range(13, 0, 8, 2)), (2, 2), "flags that there are not");
    assert_eq!(guest.range(13, 0, 65_537, 0), 1, "more than a range may have");
    let mut guest = Guest::with(aio, "discard = false");
    assert_eq!(guest.range(11, 8, 8, 0), 2);
}

fn chains_that_are_no_request_come_back_and_the_next_one_is_served(aio: &str) {
    let mut guest = Guest::with(aio, "");
    let before = guest.contents();
    guest.header(1, 0);
    let header = (HEADER, 16, false);
    let (data, status) = ((DATA, 512, false), (STATUS, 1, true));
    for (pieces, answer) in [
        (&[header, data][..], (0, 0xee)),
        (&[(HEADER, 15, false), status], (1, 1)),
        (&[status], (1, 1)),
        (&[status, header, data], (0, 0xee)),
        (&[header, status, data], (0, 0xee)),
        (&[(HEADER, 16, true), (DATA, 512, true), status], (0, 1)),
        (&[(HEADER, 0, false), (STATUS, 0, true)], (0, 0xee)),
    ] {
        assert_eq!(guest.chain(pieces), answer, "{pieces:x?}");
        guest.header(1, 0);
    }
    assert!(guest.contents() == before);
    assert_eq!(guest.request(0, 7, &[(DATA, 512, true)]), (513, 0));
    assert_eq!(guest.read(DATA, 512), [7; 512]);
}

fn a_ring_that_makes_no_sense_stops_the_disk_until_its_driver_resets_it(aio: &str) {
    let mut guest = Guest::with(aio, "");
    let looping = (HEADER, 16, NEXT, 0);
    for (what, head, descriptor) in [
        ("a chain that loops", 0, looping),
        ("a chain that leaves the table", 0, (HEADER, 16, NEXT, SIZE)),
        ("a descriptor that there is not", SIZE, looping),
        ("memory that there is not", 0, (4 << 20, 16, 0, 0)),
        ("memory that ends", 0, ((4 << 20) - 8, 16, 0, 0)),
        ("an address that wraps", 0, (u64::MAX - 8, 16, 0, 0)),
        ("an indirect table of no entries", 0, (DATA, 0, INDIRECT, 0)),
        ("an indirect table that loops", 0, (DESCRIPTORS + 16, 16, INDIRECT, 0)),
        ("an indirect table in nowhere", 0, (8 << 20, 64, INDIRECT, 0)),
    ] {
        guest.descriptor(0, descriptor);
        guest.descriptor(1, looping);
        guest.offer(head);
        guest.until_disk(what, |disk| disk.is_broken());
        assert!(!guest.disk.is_reset());
        guest.disk.reset();
        guest.until_disk("let go", |disk| disk.is_reset());
        assert!(!guest.disk.is_broken(), "{what}");
        guest.start();
        assert_eq!(guest.request(0, 9, &[(DATA, 512, true)]), (513, 0), "after {what}");
    }
    guest.skip(SIZE);
    guest.offer(0);
    guest.until_disk("an index too far ahead", |disk| disk.is_broken());
}

fn a_file_that_becomes_shorter_is_an_error_of_the_request(aio: &str) {
    let mut guest = Guest::with(aio, "");
    guest.file.as_file().set_len(512).unwrap();
    assert_eq!(guest.request(0, 0, &[(DATA, 1024, true)]), (0, 1));
    assert_eq!(guest.request(0, 0, &[(DATA, 512, true)]), (513, 0));
}

fn two_machines_do_not_share_a_disk_that_one_of_them_writes(aio: &str) {
    let guest = Guest::with(aio, "");
    let disk = |path: &std::path::Path, keys: &str| {
        let text = format!("[vm]\nkernel = 'k'\n[[vm.disk]]\nformat = 'raw'\npath = {path:?}\n{keys}");
        Image::open(&Config::parse(&text, std::path::Path::new("vm.toml")).unwrap().disk[0])
    };
    for keys in ["", "read_only = true"] {
        assert!(matches!(disk(guest.file.path(), keys), Err(DiskError::InUse(_))));
    }
    let path = guest.file.path().to_owned();
    let Guest { file: _file, disk: first, .. } = guest;
    drop(first);
    disk(&path, "").unwrap();
    let shared = Guest::with(aio, "read_only = true");
    disk(shared.file.path(), "read_only = true").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("small");
    std::fs::write(&file, [0; 511]).unwrap();
    assert!(matches!(disk(&file, ""), Err(DiskError::Empty { .. })));
    assert!(matches!(disk(folder.path(), "read_only = true"), Err(DiskError::Kind(_))));
    assert!(disk(&folder.path().join("none"), "").unwrap_err().to_string().contains("truncate -s 8G"));
}

/// Offers five requests at once, which read sectors 10 to 14 to places of their own.
fn five(guest: &mut Guest) {
    for n in 0..5_u16 {
        let at = DATA + 0x2000 * u64::from(n);
        let mut header = vec![0; 8];
        header.extend((10 + u64::from(n)).to_le_bytes());
        guest.write(at, &header);
        guest.write(at + 16, &[0xee; 513]);
        guest.descriptor(3 * n, (at, 16, NEXT, 3 * n + 1));
        guest.descriptor(3 * n + 1, (at + 16, 512, NEXT | WRITE, 3 * n + 2));
        guest.descriptor(3 * n + 2, (at + 528, 1, WRITE, 0));
    }
    (0..5).for_each(|n| guest.offer(3 * n));
}

/// What came of them.
fn five_were_read(guest: &Guest) {
    for n in 0..5 {
        let read = guest.read(DATA + 0x2000 * n + 16, 513);
        assert!(read[..512].iter().all(|byte| u64::from(*byte) == 10 + n) && read[512] == 0, "request {n}");
    }
}

fn many_requests_at_once_are_each_answered_once(aio: &str) {
    let mut guest = Guest::with(aio, "");
    for round in 1..=100 {
        five(&mut guest);
        guest.until("all are used", |driver| driver.used() == 5 * round);
        five_were_read(&guest);
        let mut heads: Vec<u32> = (5 * (round - 1)..5 * round).map(|n| guest.used_head(n)).collect();
        heads.sort_unstable();
        assert_eq!(heads, [0, 3, 6, 9, 12], "round {round}");
    }
    let report = &guest.disk.queue_reports()[0];
    assert_eq!((report.requests, report.errors), (500, 0));
}

fn what_is_under_way_is_done_before_the_disk_rests_or_lets_go(aio: &str) {
    let mut guest = Guest::with(aio, "direct = true");
    for round in 1..=20 {
        five(&mut guest);
        guest.disk.lifecycle().pause();
        guest.until_disk("it rests", |disk| disk.lifecycle().is_paused());
        let (used, bytes) = (guest.used(), guest.read(DATA, 0xb000));
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(guest.used() == used && guest.read(DATA, 0xb000) == bytes, "it worked while it rested");
        guest.disk.lifecycle().resume();
        guest.until("all are used", |driver| driver.used() == 5 * round);
    }
    five(&mut guest);
    guest.disk.reset();
    guest.until_disk("let go", |disk| disk.is_reset());
    let bytes = guest.read(DATA, 0xb000);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(guest.read(DATA, 0xb000) == bytes, "it worked after it let go");
    guest.start();
    assert_eq!(guest.request(0, 8, &[(DATA, 4096, true)]), (4097, 0));
}

#[test]
fn a_ring_of_the_kernels_does_what_a_disk_needs_and_nothing_else() {
    let guest = Guest::with("threads", "read_only = true");
    let text = format!(
        "[vm]\nkernel = 'k'\n[[vm.disk]]\nformat = 'raw'\nread_only = true\npath = {:?}",
        guest.file.path()
    );
    let config = Config::parse(&text, std::path::Path::new("vm.toml")).unwrap();
    let image = Arc::new(Image::open(&config.disk[0]).unwrap());
    match UnderWay::new(&image, &guest.for_rings(), 16) {
        Ok(mut ring) => assert_eq!(ring.forbidden(), Some(libc::EACCES)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)) => {
            println!("SKIPPED no io_uring on this machine ({error}): sysctl kernel.io_uring_disabled=0");
        }
        Err(error) => panic!("{error}"),
    }
}
