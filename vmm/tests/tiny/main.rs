//! Guests of a few instructions on the machine's own KVM: every way in, every way out, and no register that a guest writes
//! harms the VMM.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic, too")]

mod asked;
mod guest;
mod interrupt;
mod late;
mod poll;

use std::time::{Duration, Instant};

use guest::{Code, ECAM, Guest, PANIC, RESET, SERIAL, no_kvm};
use vmm::ExitReason;
use vmm::machine::Ended;

fn code() -> Code {
    Code::default()
}

#[test]
fn an_elf_is_entered_by_pvh_prints_finds_the_host_bridge_and_turns_off() {
    if no_kvm() {
        return;
    }
    let code = code()
        .print("ok ")
        .eax(0x8000_0000)
        .out_eax(0xcf8)
        .in_eax(0xcfc)
        .print_eax()
        .load(ECAM)
        .print_eax()
        .power_off();
    let (ended, printed, exits) = Guest::start(&code.elf(), "").end();
    assert_eq!(ended, Ended::PowerOff);
    assert_eq!(printed, b"ok \x86\x80\xc0\x29\x86\x80\xc0\x29");
    assert_eq!(exits.of(ExitReason::MmioRead), 1);
    assert_eq!(exits.of(ExitReason::PortRead), 1);
    assert_eq!(
        exits.of(ExitReason::PortWrite),
        3 + 1 + 8 + 1,
        "a byte of text, the address, eight bytes, off"
    );
}

#[test]
fn the_start_information_names_itself_and_where_the_tables_are() {
    if no_kvm() {
        return;
    }
    // mov eax, [ebx]: the magic number; mov eax, [ebx + 32]: the RSDP; mov eax, [eax]: its signature.
    let code =
        code().raw(&[0x8b, 0x03]).print_eax().raw(&[0x8b, 0x43, 32, 0x8b, 0x00]).print_eax().power_off();
    let (ended, printed, _) = Guest::start(&code.elf(), "").end();
    assert_eq!((ended, printed.as_slice()), (Ended::PowerOff, b"\x78\xc5\x6e\x33RSD ".as_slice()));
}

#[test]
fn a_bzimage_is_entered_in_64_bit_mode_with_its_command_line_and_initramfs() {
    if no_kvm() {
        return;
    }
    // mov eax, [rsi + 0x228]; mov eax, [rax]: the command line. mov eax, [rsi + 0x218]; mov eax, [rax]: the initramfs.
    let code = code()
        .raw(&[0x8b, 0x86, 0x28, 2, 0, 0, 0x8b, 0x00])
        .print_eax()
        .raw(&[0x8b, 0x86, 0x18, 2, 0, 0, 0x8b, 0x00])
        .print_eax()
        // Only in 64-bit mode is this one instruction, mov rax, imm64; in 32-bit mode its second half would be others.
        .raw(&[0x48, 0xb8, b'6', b'4', b'!', b'\n', 0, 0, 0, 0])
        .print_eax()
        .power_off();
    let initramfs = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(initramfs.path(), b"0707").unwrap();
    let keys = format!("memory = \"4 MiB\"\ncmdline = \"cons\"\ninitramfs = {:?}", initramfs.path());
    let (ended, printed, _) = Guest::start_with(&code.bzimage(), &keys).end();
    assert_eq!((ended, printed.as_slice()), (Ended::PowerOff, b"cons070764!\n".as_slice()));
}

#[test]
fn reset_panic_and_triple_fault_are_told_apart() {
    if no_kvm() {
        return;
    }
    let end = |code: Code| Guest::start(&code.elf(), "").end().0;
    assert_eq!(end(code().out(RESET, 1).spin()), Ended::Reset);
    assert_eq!(end(code().out(PANIC, 1).spin()), Ended::Panicked);
    // An undefined instruction, and no descriptor to handle it.
    assert_eq!(end(code().raw(&[0x0f, 0x01, 0x1d, 0, 0, 0, 0, 0x0f, 0x0b])), Ended::TripleFault { vcpu: 0 });
}

#[test]
fn a_guest_that_never_leaves_is_ended_at_once() {
    if no_kvm() {
        return;
    }
    let guest = Guest::start(&code().print("x").spin().elf(), "vcpus = 2");
    let remote = guest.remote();
    asked::until("it prints", || guest.printed() == b"x");
    let start = Instant::now();
    remote.kill();
    let (ended, printed, _) = guest.end();
    assert_eq!((ended, printed.as_slice()), (Ended::Stopped, b"x".as_slice()));
    // Whoever waits for a guest of these tests ends it after five minutes.
    assert!(start.elapsed() < Duration::from_secs(50), "{:?}", start.elapsed());
}

#[test]
fn a_guest_that_ignores_the_power_button_is_ended_after_its_time() {
    if no_kvm() {
        return;
    }
    let guest = Guest::start(&code().spin().elf(), "shutdown_timeout = 1");
    let start = Instant::now();
    guest.remote().shutdown();
    assert_eq!(guest.end().0, Ended::Stopped);
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[test]
fn what_is_typed_interrupts_the_guest_through_either_io_apic() {
    use interrupt::{LEVEL, REMOTE_IRR, key_arrives};
    let under_way = LEVEL | REMOTE_IRR;
    for (chip, trigger, expected) in [
        ("kernel", 0, [0, 0]),
        ("split", 0, [0, 0]),
        // KVM's I/O APIC has no EOI register.
        ("kernel", LEVEL, [under_way, under_way]),
        ("split", LEVEL, [under_way, LEVEL]),
    ] {
        let Some(seen) = key_arrives(trigger, &format!("irqchip = '{chip}'")) else { return };
        assert_eq!(seen, expected, "{chip}, trigger {trigger:#x}");
    }
}

#[test]
fn whatever_a_guest_writes_anywhere_the_machine_goes_on() {
    if no_kvm() {
        return;
    }
    let mut code = code();
    // Every register of every device, with values of every kind; the ports that end the machine get what does not.
    for value in [0, 0x5555_5555, 0xffff_ffff] {
        for port in (SERIAL..SERIAL + 8).chain(0xcf8..0xd00).chain([0, 0x70, 0x80, PANIC + 1, 0x601, 0xffff])
        {
            code = code.eax(value).out_eax(port).in_eax(port);
        }
        for register in (0..0x44).chain([0xffd, 0xffe, 0xfff, 0x1000, 0x000f_fffc, 0x0010_0000]) {
            code = code.eax(value).store(ECAM + register).load(ECAM + register);
        }
        // Where nothing is: the interrupt controllers' neighbourhood, the BAR windows, beyond memory.
        for address in [0xc000_0000, 0xfec0_0000, 0xfed0_0000, 0xfff0_0000, 0x20_0000] {
            code = code.eax(value).store(address).load(address);
        }
    }
    // The serial port's divisor latch may be left open: close it, or nothing is printed.
    let code = code.out(SERIAL + 3, 3).out(SERIAL + 4, 0).print("alive").power_off();
    let (ended, printed, _) = Guest::start(&code.elf(), "").end();
    assert_eq!(ended, Ended::PowerOff);
    assert!(printed.ends_with(b"alive"), "{printed:?}");
}

/// A card whose back end never comes.
const CARD: &str = "[[vm.net]]\nkind = 'vhost-user'\nsocket = '/nonexistent/socket'\nwait = false";
/// Its configuration space, and its BAR, which is switched on by `enable`.
const CARD_CONFIG: u32 = ECAM + 0x8000;
const BAR: u32 = 0xc000_0000;

fn enable(code: Code) -> Code {
    code.store_word(CARD_CONFIG + 4, 0b110)
}

#[test]
fn a_guest_finds_a_network_card_its_structures_and_its_address() {
    if no_kvm() {
        return;
    }
    let code = enable(code().load(CARD_CONFIG).print_eax())
        // The first capability is MSI-X with four vectors; the device structure begins with the address and the link, which is
        // down: its back end was never there.
        .load(CARD_CONFIG + 0x40)
        .print_eax()
        .load(BAR + 0x2000)
        .print_eax()
        .load(BAR + 0x2004)
        .print_eax()
        .power_off();
    let (ended, printed, _) = Guest::start(&code.elf(), CARD).end();
    assert_eq!(ended, Ended::PowerOff);
    let expected = [0xf4, 0x1a, 0x41, 0x10, 0x11, 0x4c, 3, 0, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0];
    assert_eq!(printed, expected);
}

#[test]
fn queues_outside_of_memory_are_refused_and_the_device_wants_a_reset() {
    if no_kvm() {
        return;
    }
    for (address, status) in
        [(0x10_8000, 1 | 2 | 4 | 8), (0x20_0000, 1 | 2 | 4 | 8 | 64), (0xffff_fff0, 1 | 2 | 4 | 8 | 64)]
    {
        // Accepts VERSION_1, the lowest bit of the second half.
        let mut code = enable(code()).store_byte(BAR + 0x14, 3).eax(1).store(BAR + 8).eax(1).store(BAR + 12);
        code = code.store_byte(BAR + 0x14, 11);
        for queue in 0..2 {
            code = code.store_word(BAR + 0x16, queue);
            for register in [0x20, 0x28, 0x30] {
                code = code.eax(address).store(BAR + register);
            }
            code = code.store_word(BAR + 0x1c, 1);
        }
        // Then the reset, which ends whatever there was.
        let code =
            code.store_byte(BAR + 0x14, 15).raw(&[0xa0, 0x14, 0, 0, 0xc0, 0x0f, 0xb6, 0xc0]).print_eax();
        let wait = [0xa0, 0x14, 0, 0, 0xc0, 0x84, 0xc0, 0x75, 0xf7]; // mov al, [status]; test al, al; jnz back
        let code = code.store_byte(BAR + 0x14, 0).raw(&wait).print("0").power_off();
        let (ended, printed, _) = Guest::start(&code.elf(), CARD).end();
        assert_eq!(ended, Ended::PowerOff, "{address:#x}");
        assert_eq!(printed, [status, 0, 0, 0, b'0'], "{address:#x}");
    }
}

#[test]
fn whatever_a_guest_writes_to_a_card_the_machine_goes_on() {
    if no_kvm() {
        return;
    }
    let mut code = enable(code());
    for value in [0xffff_ffff, 0x5555_5555, 0xfee0_0000, 0] {
        // Identity, command, BARs, capabilities, MSI-X control; then every structure, at every alignment of a double word.
        for register in (4..0x100_u32).chain([0xffc]) {
            code = code.eax(value).store(CARD_CONFIG + register).load(CARD_CONFIG + register);
        }
        code = enable(code.eax(BAR).store(CARD_CONFIG + 0x10));
        for page in (0..0x8000).step_by(0x1000) {
            for register in 0..0x60 {
                code = code.eax(value).store(BAR + page + register).load(BAR + page + register);
            }
            code = code.eax(value).store(BAR + page + 0xffd).load(BAR + page + 0xffd);
        }
        for register in 0..0x40 {
            code = code.store_byte(BAR + register, value as u8).store_word(BAR + register, value as u16);
        }
    }
    let (ended, printed, _) = Guest::start(&code.print("alive").power_off().elf(), CARD).end();
    assert_eq!((ended, printed.as_slice()), (Ended::PowerOff, b"alive".as_slice()));
}

#[test]
fn a_vcpu_is_pinned_and_its_thread_named() {
    if no_kvm() {
        return;
    }
    let core = host::topology::permitted_cores().unwrap().iter().next().unwrap();
    let guest = Guest::start(&code().spin().elf(), &format!("vcpu_cores = [{core}]\nname = \"pinned\""));
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let allowed: Vec<String> = tasks
        .filter(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm == "vcpu0\n"))
        .filter_map(|task| {
            let status = std::fs::read_to_string(task.path().join("status")).ok()?;
            status.lines().find_map(|line| Some(line.strip_prefix("Cpus_allowed_list:")?.trim().to_owned()))
        })
        .collect();
    assert!(allowed.contains(&core.to_string()), "{allowed:?}");
    guest.remote().kill();
    assert_eq!(guest.end().0, Ended::Stopped);
}
