//! What is promised of shared memory.

use super::*;
use nix::sys::mman::mmap as map_file;

fn free_2m() -> u64 {
    count_huge(&topology::huge_pools(Path::new("/")), 2 << 20, None).1
}

/// Whether all of the mapping is in memory.
fn present(memory: &SharedMemory) -> bool {
    let mut map = vec![0u8; memory.len() / 4096];
    // SAFETY: the kernel writes a byte for each page of the range to `map`.
    let r = unsafe { libc::mincore(memory.as_ptr().cast(), memory.len(), map.as_mut_ptr()) };
    r == 0 && map.iter().all(|b| b & 1 == 1)
}

#[test]
fn ordinary_memory_is_rounded_up_present_and_shared_through_its_file() {
    let memory = SharedMemory::new(1_000_001, Pages::Ordinary, None).unwrap();
    assert_eq!((memory.len(), memory.pages()), (1_003_520, Pages::Ordinary));
    assert!(present(&memory));
    let len = NonZeroUsize::new(memory.len()).unwrap();
    // SAFETY: a new mapping, used below through raw pointers only.
    let peer = unsafe { map_file(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, memory.file(), 0) };
    let peer = peer.unwrap().cast::<u8>();
    // SAFETY: both mappings have `len` bytes.
    unsafe {
        memory.as_ptr().add(1_000_000).write_volatile(42);
        assert_eq!(peer.add(1_000_000).read_volatile(), 42);
        munmap(peer.cast(), len.get()).unwrap();
    }
}

#[test]
fn ordinary_memory_begins_where_its_pages_can_be_joined() {
    let memory = SharedMemory::new((5 << 20) + 1, Pages::Ordinary, None).unwrap();
    assert!(memory.as_ptr().addr().is_multiple_of(JOINED));
    assert!(present(&memory));
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let (start, end) = (memory.as_ptr() as usize, memory.as_ptr() as usize + memory.len());
    let line = maps
        .lines()
        .find(|l| l.starts_with(&format!("{start:x}-{end:x} rw-s")))
        .expect("listed, as long as it is");
    assert!(line.contains("memfd:cableway"), "{line}");
}

#[test]
fn a_peer_cannot_shrink_the_file_nor_seal_it_further() {
    let memory = SharedMemory::new(8192, Pages::Ordinary, None).unwrap();
    let peers = File::from(memory.file().try_clone_to_owned().unwrap());
    assert_eq!(peers.set_len(0).unwrap_err().raw_os_error(), Some(libc::EPERM));
    assert!(fcntl(&peers, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_FUTURE_WRITE)).is_err());
}

#[test]
fn memory_that_several_threads_fill_is_all_there_and_can_be_locked() {
    let memory = SharedMemory::new(2 * POPULATE_EACH + 4096, Pages::Ordinary, None).unwrap();
    assert!(present(&memory));
    let locked = || -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmLck:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    };
    match memory.lock() {
        Ok(()) => assert!(locked() >= memory.len() as u64),
        Err(error) => assert!(error.to_string().contains("ulimit -l"), "{error}"),
    }
}

#[test]
fn memory_on_node_0_lies_there() {
    let memory = SharedMemory::new(1 << 20, Pages::Ordinary, Some(0)).unwrap();
    let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
    let address = format!("{:x} ", memory.as_ptr() as usize);
    let line = maps.lines().find(|l| l.starts_with(&address)).expect("the mapping is listed");
    assert!(line.contains("bind:0") && line.contains("N0="), "{line}");
}

#[test]
fn a_node_that_does_not_exist_is_refused() {
    let text = SharedMemory::new(4096, Pages::Ordinary, Some(1023)).unwrap_err().to_string();
    assert!(text.contains("ls -d /sys/devices/system/node/node*"), "{text}");
    assert!(SharedMemory::new(4096, Pages::Ordinary, Some(u32::MAX)).is_err());
}

#[test]
fn auto_takes_huge_pages_where_there_are_free_ones() {
    let before = free_2m();
    let memory = SharedMemory::new(3 << 20, Pages::Auto, None).unwrap();
    if memory.pages() == Pages::Huge2M {
        assert_eq!(memory.len(), 4 << 20);
        let pages = count_huge(&topology::huge_pools(Path::new("/")), 2 << 20, None);
        assert!(pages.0 - pages.1 >= 2, "two are in use: {pages:?}");
    } else {
        assert!(before < 2, "{before} huge pages were free");
        assert_eq!(memory.len(), 3 << 20);
    }
}

#[test]
fn too_few_huge_pages_are_refused_with_figures_and_the_command() {
    let error = SharedMemory::new(1 << 50, Pages::Huge2M, None).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, MemoryError::HugePages { needed: 536_870_912, .. }), "{text}");
    assert_eq!(
        shortage(64, 2 << 20, Some(0), 20, 12),
        "64 huge pages of 2 MiB on node 0, 12 are free: echo 72 > \
         /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages"
    );
    let auto = SharedMemory::new(1 << 50, Pages::Auto, None).unwrap_err().to_string();
    assert!(auto.starts_with("needs 1073741824 MiB of memory, "), "{auto}");
}

#[test]
fn sizes_that_make_no_sense_are_refused() {
    assert!(matches!(SharedMemory::new(0, Pages::Auto, None), Err(MemoryError::Size(0))));
    assert!(matches!(SharedMemory::new(usize::MAX, Pages::Ordinary, None), Err(MemoryError::Size(_))));
}
