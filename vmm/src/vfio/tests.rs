//! A device that is none: it answers what it is told to, or anything, and notes what was done to it.

use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use host::memory::{Pages, SharedMemory};
use host::vfio::Interrupt;
use kvm_ioctls::{Kvm, VmFd};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::function::Passed;
use super::space::Space;
use super::{Extent, Hardware, Window, Windows};
use crate::config::IrqChip;
use crate::interrupts::Interrupts;
use crate::pci::Function;

/// Numbers that are the same in each run.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    pub(super) fn next(&mut self) -> u64 {
        // xorshift64*, Vigna 2016.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end.max(1)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// What was done to a device.
#[derive(Default)]
struct Done {
    config: Vec<u8>,
    config_writes: Vec<(u16, Vec<u8>)>,
    reads: Vec<(u32, u64, usize)>,
    writes: Vec<(u32, u64, Vec<u8>)>,
    /// Kind, first vector, how many events.
    signals: Vec<(Interrupt, u32, usize)>,
    must_go: bool,
}

#[derive(Clone)]
struct Fake {
    done: Arc<Mutex<Done>>,
    lengths: [u64; 6],
    line: bool,
    grows: bool,
    alarm: Arc<EventFd>,
}

impl Fake {
    fn new(config: Vec<u8>, lengths: [u64; 6]) -> Self {
        let done = Done { config, ..Done::default() };
        let alarm = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        Self { done: Arc::new(Mutex::new(done)), lengths, line: true, grows: true, alarm: Arc::new(alarm) }
    }

    fn done(&self) -> std::sync::MutexGuard<'_, Done> {
        self.done.lock().unwrap()
    }
}

impl Hardware for Fake {
    fn name(&self) -> String {
        "0000:01:00.0".to_owned()
    }
    fn config_len(&self) -> usize {
        self.done().config.len()
    }
    fn config_read(&self, at: u16, data: &mut [u8]) {
        let done = self.done();
        data.iter_mut().zip(done.config.iter().skip(at.into())).for_each(|(to, from)| *to = *from);
    }
    fn config_write(&self, at: u16, data: &[u8]) {
        let mut done = self.done();
        done.config.iter_mut().skip(at.into()).zip(data).for_each(|(to, from)| *to = *from);
        done.config_writes.push((at, data.to_vec()));
    }
    fn region(&self, index: u32) -> Extent {
        let len = self.lengths[index as usize];
        Extent { len, mappable: std::iter::once(0..len).filter(|all| !all.is_empty()).collect() }
    }
    fn map(&self, _: u32, part: Range<u64>) -> Option<Window> {
        let len = usize::try_from(part.end - part.start).ok().filter(|len| *len <= 1 << 20)?;
        let memory = SharedMemory::new(len, Pages::Ordinary, None).ok()?;
        Some(Window { start: memory.as_ptr() as u64, _owner: Box::new(memory) })
    }
    fn read(&self, index: u32, offset: u64, data: &mut [u8]) {
        assert!(offset + data.len() as u64 <= self.lengths[index as usize]);
        self.done().reads.push((index, offset, data.len()));
        data.fill(0x5a);
    }
    fn write(&self, index: u32, offset: u64, data: &[u8]) {
        assert!(offset + data.len() as u64 <= self.lengths[index as usize]);
        self.done().writes.push((index, offset, data.to_vec()));
    }
    fn has_line(&self) -> bool {
        self.line
    }
    fn interrupts_grow(&self, _: Interrupt) -> bool {
        self.grows
    }
    fn signal(&self, kind: Interrupt, first: u32, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.done().signals.push((kind, first, events.len()));
        Ok(())
    }
    fn unmask_by(&self, _: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }
    fn must_go(&self) -> Option<&'static str> {
        (self.done().must_go && self.alarm.read().is_ok()).then_some("the kernel asked for it")
    }
    fn alarms(&self) -> Vec<OwnedFd> {
        vec![std::os::fd::AsFd::as_fd(&*self.alarm).try_clone_to_owned().unwrap()]
    }
}

/// Where a card's capabilities are.
const POWER: usize = 0x40;
const MSI: usize = 0x50;
const MSIX: usize = 0x70;
const SLOT: usize = 0x90;
const EXPRESS: usize = 0xa0;

/// A network card as the 82576 is: registers, a small region, one of I/O ports, vectors in a 64-bit region; power management, MSI, MSI-X,
/// a capability that is nobody's business, PCI Express; errors, serial number, SR-IOV.
fn card() -> (Vec<u8>, [u64; 6]) {
    let mut config = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x86, 0x80, 0xc9, 0x10, 0x07, 0x05, 0x10, 0x00, 0x01, 0x00, 0x00, 0x02, 0x10, 0x00, 0x80]);
    put(0x10, &0xfeb0_0000_u32.to_le_bytes());
    put(0x14, &0xfeb2_0000_u32.to_le_bytes());
    put(0x18, &0x0000_c001_u32.to_le_bytes());
    put(0x1c, &[0x0c, 0x00, 0xb4, 0xfe, 0x01]);
    put(0x30, &0xfea0_0001_u32.to_le_bytes());
    put(0x34, &[POWER as u8]);
    put(0x3c, &[11, 1]);
    put(POWER, &[0x01, MSI as u8, 0x23, 0xc8, 0x08, 0x20]);
    put(MSI, &[0x05, MSIX as u8, 0x8a, 0x01]);
    put(MSIX, &[0x11, SLOT as u8, 0x09, 0x00, 0x03, 0, 0, 0, 0x03, 0x20, 0, 0]);
    put(SLOT, &[0x04, EXPRESS as u8, 0x77, 0x77]);
    put(EXPRESS, &[0x10, 0, 0x02, 0, 0xc2, 0x8c, 0, 0x10, 0x1f, 0x20, 0, 0, 0x41, 0x3c, 0x03, 0]);
    put(0x100, &(0x0001_u32 | 1 << 16 | 0x140_u32 << 20).to_le_bytes());
    put(0x140, &(0x0003_u32 | 1 << 16 | 0x160_u32 << 20).to_le_bytes());
    put(0x144, &[1, 2, 3, 4, 5, 6, 7, 8]);
    put(0x160, &(0x0010_u32 | 1 << 16).to_le_bytes());
    put(0x164, &[0xee; 0x40]);
    (config, [0x2_0000, 0x800, 0x20, 0x4000, 0, 0])
}

fn machine() -> Option<(Arc<VmFd>, Arc<Interrupts>)> {
    machine_with(IrqChip::Kernel)
}

fn machine_with(chip: IrqChip) -> Option<(Arc<VmFd>, Arc<Interrupts>)> {
    let Ok(kvm) = Kvm::new() else {
        println!("SKIPPED /dev/kvm is not there: cargo test -p cableway-vmm, as a user of group kvm");
        return None;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    vm.set_identity_map_address(crate::layout::KVM_IDENTITY_MAP).unwrap();
    vm.set_tss_address(crate::layout::KVM_TSS).unwrap();
    Some((vm.clone(), Arc::new(Interrupts::new(vm, chip).unwrap())))
}

fn passed(fake: &Fake, interrupts: &Arc<Interrupts>) -> Passed {
    let mut windows = Windows::new(0xc010_0000..0xd000_0000, 1 << 32..1 << 36);
    Passed::new(Box::new(fake.clone()), &mut windows, &mut 0x100, 17, interrupts).unwrap()
}

fn config(function: &Passed, register: usize, len: usize) -> u32 {
    let mut data = vec![0; len];
    function.read_config(register, &mut data);
    data.iter().rev().fold(0, |all, byte| all << 8 | u32::from(*byte))
}

fn memory(function: &Passed, address: u64) -> Option<u32> {
    let mut data = [0; 4];
    function.read_memory(address, &mut data).then(|| u32::from_le_bytes(data))
}

/// The address in BAR `n`, and in the next one for 64 bits.
fn bar(function: &Passed, n: usize) -> u64 {
    let (low, high) = (config(function, 0x10 + 4 * n, 4), config(function, 0x14 + 4 * n, 4));
    let high = if low & 4 != 0 { u64::from(high) } else { 0 };
    high << 32 | u64::from(low & !0xf)
}

#[test]
fn a_guest_sees_listed_capabilities_memory_regions_and_nothing_else() {
    let (raw, lengths) = card();
    let device = Fake::new(raw.clone(), lengths);
    let space = Space::new(&raw, lengths, true);
    let read = |at: usize, len: usize| {
        let mut data = vec![0; len];
        space.read(at, &mut data, &device);
        data
    };
    assert_eq!(read(0, 4), [0x86, 0x80, 0xc9, 0x10]);
    assert_eq!(read(4, 2), [0, 0], "memory accesses and bus mastering are off");
    assert_eq!(read(0xe, 1), [0], "one function, whatever it is to the host");
    assert_eq!((read(0x18, 4), read(0x30, 4)), (vec![0; 4], vec![0; 4]), "no I/O ports, no ROM");
    assert_eq!(read(0x3d, 1), [1]);
    let mut chain = Vec::new();
    let mut at = read(0x34, 1)[0] as usize;
    while at != 0 {
        chain.push((at, read(at, 1)[0]));
        at = read(at + 1, 1)[0] as usize;
    }
    assert_eq!(chain, [(POWER, 1), (MSI, 5), (MSIX, 0x11), (EXPRESS, 0x10)]);
    assert_eq!(read(SLOT, 4), [0; 4], "what is not listed is not there");
    assert_eq!(read(POWER + 2, 2), [0x23, 0], "it wakes nobody");
    assert_eq!(read(MSI + 2, 2), [0x80, 0], "64 bits, one message, no masks");
    assert_eq!(read(EXPRESS + 2, 1), [0x92], "an endpoint on a root bus");
    assert_eq!(read(EXPRESS + 0xc, 4), [0; 4], "without a link");
    // Extended: errors are hidden, and so is SR-IOV.
    assert_eq!(read(0x100, 4), (0x140_u32 << 20).to_le_bytes());
    assert_eq!(read(0x140, 4), (0x0003_u32 | 1 << 16).to_le_bytes());
    assert_eq!(read(0x144, 4), [1, 2, 3, 4]);
    assert_eq!(read(0x164, 4), [0; 4]);
}

#[test]
fn regions_are_sized_and_moved_by_the_guest_and_the_devices_own_stay() {
    let Some((_, interrupts)) = machine() else { return };
    let (raw, lengths) = card();
    let fake = Fake::new(raw, lengths);
    let function = passed(&fake, &interrupts);
    let write = |at: usize, value: u32| function.write_config(at, &value.to_le_bytes());
    for (at, size) in
        [(0x10, 0xfffe_0000), (0x14, 0xffff_f800), (0x18, 0), (0x1c, 0xffff_c00c), (0x20, 0xffff_ffff)]
    {
        let before = config(&function, at, 4);
        write(at, u32::MAX);
        assert_eq!(config(&function, at, 4), size, "{at:#x}");
        write(at, before);
        assert_eq!(config(&function, at, 4), before);
    }
    assert!(bar(&function, 3) >= 1 << 32, "64-bit regions are above 4 GiB");
    let small = bar(&function, 1);
    assert_eq!(memory(&function, small), None, "memory is off");
    write(4, 2);
    assert_eq!(memory(&function, small), Some(0x5a5a_5a5a), "smaller than a page: trapped");
    write(0x14, 0xd123_4800);
    assert_eq!((memory(&function, small), memory(&function, 0xd123_4ffc)), (None, Some(0x5a5a_5a5a)));
    let mut across = [0; 8];
    assert!(function.read_memory(0xd123_4ffc, &mut across));
    assert_eq!(across, [0xff; 8], "it ends outside of the region");
    // Command and status.
    assert!(fake.done().config_writes.iter().all(|(at, bytes)| *at == 4 && bytes.len() <= 4));
}

#[test]
fn memory_slots_follow_the_regions_and_are_gone_while_the_device_does_not_answer() {
    let Some((vm, interrupts)) = machine() else { return };
    let (raw, lengths) = card();
    let fake = Fake::new(raw, lengths);
    let function = passed(&fake, &interrupts);
    // KVM refuses a second slot where one is: that shows where they are.
    let spare = SharedMemory::new(4096, Pages::Ordinary, None).unwrap();
    let is_free = |at: u64| {
        let region = |size| kvm_bindings::kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: at,
            memory_size: size,
            userspace_addr: spare.as_ptr() as u64,
        };
        // SAFETY: the memory stays while the slot is there.
        let free = unsafe { vm.set_user_memory_region(region(4096)) }.is_ok();
        // SAFETY: as above; this takes the slot away.
        let _ = free.then(|| unsafe { vm.set_user_memory_region(region(0)) });
        free
    };
    let (registers, vectors) = (bar(&function, 0), bar(&function, 3));
    assert!(is_free(registers) && is_free(vectors + 0x1000));
    function.write_config(4, &[2, 0]);
    assert!(!is_free(registers) && !is_free(registers + 0x1_f000));
    assert!(is_free(vectors), "the table is trapped");
    assert!(!is_free(vectors + 0x1000) && is_free(vectors + 0x2000) && !is_free(vectors + 0x3000));
    // Moved while on, as a guest does that sizes it.
    function.write_config(0x10, &0xd000_0000_u32.to_le_bytes());
    assert!(is_free(registers) && !is_free(0xd000_0000));
    // Asleep, and awake.
    function.write_config(POWER + 4, &[3, 0]);
    assert!(is_free(0xd000_0000));
    assert_eq!(memory(&function, 0xd000_0000), Some(u32::MAX));
    function.write_config(POWER + 4, &[0, 0]);
    assert!(!is_free(0xd000_0000));
    // Off.
    function.write_config(4, &[0, 0]);
    assert!(is_free(0xd000_0000) && is_free(vectors + 0x1000));
    assert_eq!(memory(&function, 0xd000_0000), None);
    function.write_config(4, &[6, 0]);
    // Where the other region is, and beyond everything: it is the guest's mistake, and heals.
    function.write_config(0x20, &u32::MAX.to_le_bytes());
    assert!(is_free(vectors + 0x1000));
    function.write_config(0x20, &((vectors >> 32) as u32).to_le_bytes());
    assert!(!is_free(vectors + 0x1000));
    drop(function);
    assert!(is_free(0xd000_0000) && is_free(vectors + 0x1000));
}

#[test]
fn vectors_are_tied_one_by_one_when_the_guest_unmasks_them_and_kinds_replace_each_other() {
    let Some((_, interrupts)) = machine() else { return };
    for grows in [true, false] {
        let (raw, lengths) = card();
        let fake = Fake { grows, ..Fake::new(raw, lengths) };
        let function = passed(&fake, &interrupts);
        let signals = || std::mem::take(&mut fake.done().signals);
        assert_eq!(signals(), [(Interrupt::Line, 0, 1)]);
        function.write_config(4, &[6, 4]);
        let table = bar(&function, 3);
        // Linux: on with all masked, the entries, then all unmasked.
        function.write_config(MSIX + 2, &0xc000_u16.to_le_bytes());
        assert_eq!(signals(), [(Interrupt::Line, 0, 0), (Interrupt::Msix, 0, 1)]);
        for vector in [2_u64, 5] {
            let entry = table + 16 * vector;
            assert!(function.write_memory(entry, &0xfee0_0000_u32.to_le_bytes()));
            assert!(function.write_memory(entry + 8, &(0x40 + vector as u32).to_le_bytes()));
            assert!(function.write_memory(entry + 12, &[0; 4]));
            assert_eq!(memory(&function, entry + 8), Some(0x40 + vector as u32));
        }
        assert!(signals().is_empty(), "all are masked still");
        function.write_config(MSIX + 2, &0x8000_u16.to_le_bytes());
        let tied = signals();
        match grows {
            true => assert_eq!(tied, [(Interrupt::Msix, 2, 1), (Interrupt::Msix, 5, 1)]),
            false => assert_eq!(tied, [(Interrupt::Msix, 0, 0), (Interrupt::Msix, 0, 10)]),
        }
        function.write_config(MSIX + 2, &[0, 0]);
        assert_eq!(signals(), [(Interrupt::Msix, 0, 0), (Interrupt::Line, 0, 1)]);
        // MSI: address, data, on.
        function.write_config(MSI + 4, &0xfee0_0000_u32.to_le_bytes());
        function.write_config(MSI + 12, &0x51_u16.to_le_bytes());
        function.write_config(MSI + 2, &[1, 0]);
        assert_eq!(signals(), [(Interrupt::Line, 0, 0), (Interrupt::Msi, 0, 1)]);
    }
}

#[test]
fn a_device_that_is_taken_away_reads_all_ones_and_takes_nothing() {
    let Some((_, interrupts)) = machine() else { return };
    let (raw, lengths) = card();
    let fake = Fake::new(raw, lengths);
    let function = passed(&fake, &interrupts);
    function.write_config(4, &[2, 0]);
    let small = bar(&function, 1);
    assert_eq!(config(&function, 0, 4), 0x10c9_8086);
    fake.done().must_go = true;
    fake.alarm.write(1).unwrap();
    let gone = (0..6_000).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        config(&function, 0, 4) == u32::MAX
    });
    assert!(gone);
    assert_eq!(memory(&function, small), Some(u32::MAX));
    let written = || {
        let done = fake.done();
        (done.writes.len(), done.config_writes.len())
    };
    let before = written();
    function.write_memory(small, &[1, 2, 3, 4]);
    function.write_config(4, &[7, 0]);
    assert_eq!(written(), before);
    assert_eq!(Arc::strong_count(&fake.done), 1, "it is closed");
}

#[test]
fn whatever_a_guest_writes_only_listed_registers_of_the_device_change() {
    let Some((_, interrupts)) = machine_with(IrqChip::Split) else { return };
    let (raw, lengths) = card();
    let fake = Fake::new(raw, lengths);
    let function = passed(&fake, &interrupts);
    let mut random = Random::new();
    for n in 0..30_000 {
        let len = [1, 2, 4][random.below(3) as usize];
        // As the bus lets them through: within a double word.
        let at = random.below(0x420) as usize * 4 % 4096;
        let register = at + [0, 1, 2, 3][random.below(5 - len) as usize];
        let data = random.bytes(len as usize);
        match random.below(4) {
            0 => function.read_config(register, &mut vec![0; len as usize]),
            1 | 2 => function.write_config(register, &data),
            _ => {
                // Somewhere in and around the regions, with any length.
                let bar = [0, 1, 3][random.below(3) as usize];
                let base = self::bar(&function, bar);
                let address = base.wrapping_add(random.below(lengths[bar] + 16));
                let len = 1 + random.below(8) as usize;
                let mut data = random.bytes(len);
                function.write_memory(address, &data);
                function.read_memory(address, &mut data);
            }
        }
        if n % 64 == 0 {
            function.write_config(4, &[6, 0]);
            function.write_config(POWER + 4, &[0, 0]);
        }
    }
    let command = 0x0546_u16.to_le_bytes();
    let done = fake.done();
    assert!(done.reads.len() > 100 && done.writes.len() > 100);
    for (at, bytes) in &done.config_writes {
        for (at, byte) in (usize::from(*at)..).zip(bytes) {
            let permitted = match at {
                0x04 => command[0],
                0x05 => command[1],
                0x06 | 0x07 => 0xff,
                at if at == POWER + 4 => 3,
                at if (EXPRESS + 8..EXPRESS + 12).contains(&at) => 0xff,
                _ => 0,
            };
            assert_eq!(byte & !permitted, 0, "{byte:#x} was written to {at:#x}");
        }
    }
    drop(done);
    assert_eq!(config(&function, 0, 4), 0x10c9_8086);
}

#[test]
fn whatever_a_device_says_of_itself_a_machine_survives_it() {
    let Some((_, interrupts)) = machine() else { return };
    let mut random = Random::new();
    for n in 0..300 {
        let len = [256, 4096, 64, 0][n % 4];
        let mut raw = random.bytes(len);
        // A list of capabilities that is one, more often than chance would have it.
        if n % 3 != 0 && len >= 256 {
            raw[0x34] = 0x40;
            let mut at = 0x40;
            while at < 0xe0 {
                raw[at] = [1, 5, 9, 0x10, 0x11, 0x13][random.below(6) as usize];
                let next = at + 4 + 4 * random.below(12) as usize;
                raw[at + 1] = next as u8;
                at = next;
            }
        }
        let lengths = std::array::from_fn(|_| match random.below(4) {
            0 => 0,
            1 => random.below(1 << 20),
            _ => 1 << random.below(34),
        });
        let fake = Fake { line: n % 2 == 0, ..Fake::new(raw, lengths) };
        let mut windows = Windows::new(0xc010_0000..0xe000_0000, 1 << 32..1 << 40);
        let made = Passed::new(Box::new(fake), &mut windows, &mut 0x100, 17, &interrupts);
        let Ok(function) = made else { continue };
        for _ in 0..50 {
            let register = random.below(1024) as usize * 4;
            function.write_config(register, &random.bytes(4));
            function.write_config(4, &[7, 0]);
            let address = bar(&function, random.below(6) as usize) + random.below(1 << 14);
            function.write_memory(address, &random.bytes(4));
            function.read_memory(address, &mut [0; 8]);
        }
    }
}
