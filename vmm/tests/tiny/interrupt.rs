//! A key that is typed on the serial port arrives in the vCPU's local APIC by way of the I/O APIC, wherever that is.
//!
//! Owns a guest that never takes an interrupt: it looks for the vector among those that the local APIC was asked for. A KVM that
//! emulates delivers none to a guest without paging.

use control::client;
use vmm::control::report::TypedReport;
use vmm::machine::Ended;

use crate::asked;
use crate::guest::{Code, Guest, no_kvm};

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// Selects the low half of the serial port's redirection entry.
const ENTRY: u32 = 0x10 + 2 * 4;
const VECTOR: u32 = 0x41;
/// Its trigger mode, level; an interrupt is under way.
pub(crate) const LEVEL: u32 = 1 << 15;
pub(crate) const REMOTE_IRR: u32 = 1 << 14;

/// Waits for the interrupt, prints the redirection entry, ends the interrupt by the I/O APIC's EOI register, prints the entry.
fn guest(trigger: u32, keys: &str) -> Guest {
    // The local APIC on (spurious vector 0xff), the input unmasked, the port's interrupt for received bytes on.
    let code = Code::default().eax(0x1ff).store(LOCAL_APIC + 0xf0);
    let code = code.eax(ENTRY).store(IO_APIC).eax(VECTOR | trigger).store(IO_APIC + 0x10);
    // mov eax, [third word of the IRR]; test al, 1 << (VECTOR - 0x40); jz back.
    let wait = [0xa1, 0x20, 0x02, 0xe0, 0xfe, 0xa8, 1 << (VECTOR - 0x40), 0x74, 0xf7];
    let code = code.out(0x3f9, 1).print("?").raw(&wait).load(IO_APIC + 0x10).print_eax();
    let code = code.eax(VECTOR).store(IO_APIC + 0x40).load(IO_APIC + 0x10).print_eax();
    Guest::start(&code.power_off().elf(), keys)
}

/// Types a key to a guest that waits for an interrupt with this trigger mode: what its entry has besides the vector when it came, and
/// after it was ended.
pub(crate) fn key_arrives(trigger: u32, keys: &str) -> Option<[u32; 2]> {
    if no_kvm() {
        return None;
    }
    let run_dir = tempfile::tempdir().unwrap();
    let guest = guest(trigger, keys);
    let (door, _server) = asked::serve(&guest, run_dir.path());
    let waiting = std::thread::spawn(move || guest.end());
    asked::until("it waits for a key", || asked::printed(&door) > 0);
    let typed = client::post_bytes::<TypedReport>(&door, "/v1/console", b"k").unwrap().value;
    assert_eq!(typed.taken, 1);
    let (ended, printed, _) = waiting.join().unwrap();
    assert_eq!((ended, printed.len(), printed[0]), (Ended::PowerOff, 9, b'?'));
    let entry = |at: usize| u32::from_le_bytes(printed[at..at + 4].try_into().unwrap()) & !VECTOR;
    Some([entry(1), entry(5)])
}
