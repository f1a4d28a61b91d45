//! Guests of a few instructions, in kernel files of both formats.
//!
//! Owns the machine code and the file formats around it; runs a guest and tells how it ended. The code is our own and short:
//! a KVM that emulates gets through it at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use vmm::ExitReason;
use vmm::config::Config;
use vmm::life::Life;
use vmm::machine::{Ended, Machine, Remote};
use vmm::preflight::Preflight;

/// Where the code lies: the start of high memory.
const LOAD: u32 = 0x10_0000;
/// The first serial port, sleep control, reset and panic ports (vmm/src/layout.rs, and the DSDT).
pub(crate) const SERIAL: u16 = 0x3f8;
pub(crate) const SLEEP_CONTROL: u16 = 0x600;
pub(crate) const RESET: u16 = 0x602;
pub(crate) const PANIC: u16 = 0x505;
/// Memory-mapped configuration space.
pub(crate) const ECAM: u32 = 0xe000_0000;

/// Instructions that mean the same in 32-bit and 64-bit mode, unless said otherwise.
#[derive(Default)]
pub(crate) struct Code(pub(crate) Vec<u8>);

impl Code {
    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Any instruction, as bytes.
    pub(crate) fn raw(self, bytes: &[u8]) -> Self {
        self.bytes(bytes)
    }

    fn port(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high]) // mov dx, port
    }

    /// Writes a byte to a port.
    pub(crate) fn out(self, port: u16, value: u8) -> Self {
        self.port(port).bytes(&[0xb0, value, 0xee]) // mov al, value; out dx, al
    }

    /// Writes EAX to a port.
    pub(crate) fn out_eax(self, port: u16) -> Self {
        self.port(port).bytes(&[0xef])
    }

    /// Reads EAX from a port.
    pub(crate) fn in_eax(self, port: u16) -> Self {
        self.port(port).bytes(&[0xed])
    }

    /// Sets EAX.
    pub(crate) fn eax(self, value: u32) -> Self {
        self.bytes(&[0xb8]).bytes(&value.to_le_bytes())
    }

    /// Prints a text on the serial port.
    pub(crate) fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(SERIAL, byte))
    }

    /// Prints the four bytes of EAX, lowest first; clobbers it and EDX.
    pub(crate) fn print_eax(self) -> Self {
        let code = self.port(SERIAL);
        (0..4).fold(code, |code, _| code.bytes(&[0xee, 0xc1, 0xe8, 8])) // out dx, al; shr eax, 8
    }

    /// Reads EAX from memory (32-bit mode).
    pub(crate) fn load(self, address: u32) -> Self {
        self.bytes(&[0xa1]).bytes(&address.to_le_bytes())
    }

    /// Writes EAX to memory (32-bit mode).
    pub(crate) fn store(self, address: u32) -> Self {
        self.bytes(&[0xa3]).bytes(&address.to_le_bytes())
    }

    /// Writes a byte to memory (32-bit mode).
    pub(crate) fn store_byte(self, address: u32, value: u8) -> Self {
        self.bytes(&[0xb0, value, 0xa2]).bytes(&address.to_le_bytes())
    }

    /// Writes two bytes to memory (32-bit mode).
    pub(crate) fn store_word(self, address: u32, value: u16) -> Self {
        self.eax(value.into()).bytes(&[0x66, 0xa3]).bytes(&address.to_le_bytes())
    }

    /// Turns the machine off by ACPI.
    pub(crate) fn power_off(self) -> Self {
        self.out(SLEEP_CONTROL, 1 << 5 | 5 << 2).spin()
    }

    /// Goes on for ever without leaving the guest.
    pub(crate) fn spin(self) -> Self {
        self.bytes(&[0xeb, 0xfe])
    }

    /// An ELF with a PVH entry at the first instruction.
    pub(crate) fn elf(&self) -> Vec<u8> {
        let mut file = Vec::new();
        file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version
        file.extend(u64::from(LOAD).to_le_bytes()); // entry
        file.extend(64_u64.to_le_bytes()); // program headers
        file.extend([0; 12]); // section headers, flags
        file.extend([64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]); // sizes and counts
        let mut program = |kind: u32, offset: u64, address: u64, size: u64| {
            file.extend(kind.to_le_bytes());
            file.extend(7_u32.to_le_bytes());
            [offset, address, address, size, size, 4].into_iter().for_each(|n| file.extend(n.to_le_bytes()));
        };
        let note_at = 64 + 2 * 56;
        let code_at = note_at + 20;
        program(4, note_at, 0, 20); // PT_NOTE
        program(1, code_at, LOAD.into(), self.0.len() as u64); // PT_LOAD
        // XEN_ELFNOTE_PHYS32_ENTRY: name and descriptor sizes, type, name, entry.
        [4, 4, 18].into_iter().for_each(|n: u32| file.extend(n.to_le_bytes()));
        file.extend(b"Xen\0");
        file.extend(LOAD.to_le_bytes());
        file.extend(&self.0);
        file
    }

    /// A bzImage whose 64-bit entry is the first instruction.
    pub(crate) fn bzimage(&self) -> Vec<u8> {
        let mut file = vec![0; 1024];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]); // one sector of set-up code
        put(0x1fe, &[0x55, 0xaa]);
        put(0x202, b"HdrS");
        put(0x206, &0x020c_u16.to_le_bytes());
        put(0x211, &[1]); // loaded high
        put(0x214, &LOAD.to_le_bytes());
        put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
        put(0x236, &1_u16.to_le_bytes()); // a 64-bit entry
        put(0x258, &u64::from(LOAD).to_le_bytes()); // pref_address
        put(0x260, &0x10_0000_u32.to_le_bytes()); // init_size
        file.extend([0xf4; 0x200]); // the 32-bit entry, which nobody uses
        file.extend(&self.0);
        file
    }
}

/// A guest that was started.
pub(crate) struct Guest {
    dir: TempDir,
    machine: Machine,
    pub(crate) life: Arc<Life>,
}

impl Guest {
    /// Starts a kernel with 2 MiB of memory; `keys` are more keys of `[vm]`.
    pub(crate) fn start(kernel: &[u8], keys: &str) -> Self {
        Self::start_with(kernel, &format!("memory = \"2 MiB\"\n{keys}"))
    }

    /// Starts a kernel; `keys` are the keys of `[vm]` besides the kernel and the console.
    pub(crate) fn start_with(kernel: &[u8], keys: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("kernel"), kernel).unwrap();
        let text = format!("[vm]\nkernel = \"kernel\"\nserial = \"file:console\"\n{keys}");
        let config = Config::parse(&text, &dir.path().join("vm.toml")).unwrap();
        let preflight = Preflight::new(&config).unwrap_or_else(|error| panic!("{error}"));
        let life = Life::new(&config).unwrap();
        // Every thread of it has the filter of its kind, as in `cableway vm`; this one, which runs tests, has none.
        vmm::sandbox::prepare(&config).unwrap();
        let machine = Machine::start(&config, &preflight, &life).unwrap_or_else(|error| panic!("{error}"));
        Self { dir, machine, life }
    }

    pub(crate) fn remote(&self) -> Remote {
        self.machine.remote()
    }

    /// What it printed so far.
    pub(crate) fn printed(&self) -> Vec<u8> {
        printed(self.dir.path())
    }

    /// Waits for the end: how it ended, what it printed, how often it left the guest.
    pub(crate) fn end(mut self) -> (Ended, Vec<u8>, Exits) {
        // A guest that does not end would hold the test for ever. One that shares a core with its back end and others takes a minute.
        let (remote, (done, is_done)) = (self.remote(), std::sync::mpsc::channel::<()>());
        std::thread::spawn(move || {
            if is_done.recv_timeout(Duration::from_secs(300))
                == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                remote.kill();
            }
        });
        let ended = self.machine.wait();
        drop(done);
        let exits = Exits(self.machine.exits());
        drop(self.machine);
        (ended, printed(self.dir.path()), exits)
    }
}

/// How often a guest left, by reason.
pub(crate) struct Exits(Vec<(ExitReason, u64)>);

impl Exits {
    pub(crate) fn of(&self, reason: ExitReason) -> u64 {
        self.0.iter().find(|(r, _)| *r == reason).map_or(0, |(_, count)| *count)
    }
}

fn printed(dir: &Path) -> Vec<u8> {
    let path: PathBuf = dir.join("console");
    std::fs::read(path).unwrap()
}

/// Whether KVM can be used; says so if not.
pub(crate) fn no_kvm() -> bool {
    let missing = std::fs::File::options().read(true).write(true).open("/dev/kvm").err();
    if let Some(error) = &missing {
        println!(
            "SKIPPED /dev/kvm: {error}; as a user of group kvm on a machine with KVM: cargo test -p cableway-vmm"
        );
    }
    missing.is_some()
}
