//! Guests of a few instructions on the machine's own KVM: every way in, every way out, and no register that a guest writes
//! harms the VMM.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic, too")]

mod guest;

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
    std::thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    remote.kill();
    let (ended, printed, _) = guest.end();
    assert_eq!((ended, printed.as_slice()), (Ended::Stopped, b"x".as_slice()));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
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
