//! Tests on a card: what the kernel really answers, by whichever way it has.

use std::path::Path;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

use super::{Container, Interrupt, VfioError, Way};
use crate::pci::{Bdf, find};

#[test]
#[ignore = "needs a card with vfio-pci that nobody uses: CARD=0000:01:00.0 cargo test -p cableway-host -- --ignored on_a_card"]
fn on_a_card_memory_is_mapped_over_its_closing_and_nobody_else_has_it_meanwhile() {
    let bdf: Bdf = std::env::var("CARD").unwrap().parse().unwrap();
    let way = Way::of(Path::new("/"), &find(Path::new("/"), bdf).unwrap()).unwrap();
    println!("{way}");
    let len = 4 << 20;
    let (protection, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
    // SAFETY: a new mapping, which stays until the process ends.
    let memory = unsafe { mmap_anonymous(None, len.try_into().unwrap(), protection, flags) }.unwrap();
    let memory: NonNull<u8> = memory.cast();

    let container = Container::new().unwrap();
    // SAFETY: as above.
    assert!(matches!(unsafe { container.map(memory, len) }, Err(VfioError::Empty)));
    let device = container.open(bdf, None).unwrap();
    assert_eq!(device.itself().is_some(), matches!(way, Way::Device(_)));
    assert_eq!(container.groups().is_empty(), device.itself().is_some());
    let busy = Container::new().unwrap().open(bdf, None).err().unwrap();
    assert!(matches!(busy, VfioError::Busy { .. }), "{busy}");
    println!("{busy}");
    assert!(matches!(super::try_open(Path::new("/"), bdf), Err(VfioError::Busy { .. })));

    // SAFETY: as above; nobody refers to it.
    let (first, second) =
        unsafe { (container.map(memory, len).unwrap(), container.map(memory, len).unwrap()) };
    assert!(first >= 1 << 32 && second > first, "{first:#x} {second:#x}");
    // SAFETY: as above. What is mapped already is not mapped again.
    unsafe { container.map_at(memory, len, first) }.unwrap_err();
    container.unmap(second);
    assert_ne!(device.config_read(0), u32::MAX);
    assert!(device.map(0).is_ok() && device.interrupts(Interrupt::Msix) > 0 && device.resets());

    drop(device);
    super::try_open(Path::new("/"), bdf).unwrap();
    let device = container.open(bdf, None).unwrap();
    // SAFETY: as above. It is there still.
    unsafe { container.map_at(memory, len, first) }.unwrap_err();
    drop(device);
    container.unmap(first);
    let device = container.open(bdf, None).unwrap();
    // SAFETY: as above.
    unsafe { container.map_at(memory, len, first) }.unwrap();
    assert_eq!(device.must_go(), None);
}
