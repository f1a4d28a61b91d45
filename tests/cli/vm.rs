//! `cableway vm` as a user meets it: what it refuses and how, what `--check` says, how it ends.

use std::path::Path;
use std::process::{Command, Output};

use crate::world::{CABLEWAY, keeps_within};

fn vm(arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(CABLEWAY).arg("vm").args(arguments).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// A bzImage without any code in it, which can be checked, not run.
fn kernel(dir: &Path) -> String {
    let mut file = vec![0; 2048];
    file[0x202..0x206].copy_from_slice(b"HdrS");
    let path = dir.join("vmlinuz");
    std::fs::write(&path, file).unwrap();
    path.display().to_string()
}

#[test]
fn every_mistake_of_a_machine_is_one_message_with_the_fix_and_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = kernel(dir.path());
    let text = dir.path().join("text");
    std::fs::write(&text, "not a kernel").unwrap();
    let text = text.display().to_string();
    for (arguments, message) in [
        (&["--kernel", "/nonexistent/vmlinux"][..], "the kernel /nonexistent/vmlinux: No such file"),
        (&["--kernel", &text], "is neither an x86-64 ELF nor a bzImage"),
        (&["--kernel", &kernel, "--initramfs", "/nonexistent"], "the initramfs /nonexistent: No such file"),
        (&["--firmware", "OVMF.fd"], "`firmware`: not supported yet; a machine starts a Linux by `kernel`"),
        (&["--kernel", &kernel, "--vcpus", "0"], "`vcpus`: integer `0`: wanted a whole number from 1 to 254"),
        (&["--kernel", &kernel, "--vcpu-cores", "4000"], "`vcpu_cores`: core 4000 does not exist"),
        (&["--kernel", &kernel, "--node", "1000"], "there is no memory node 1000"),
        (&["--kernel", &kernel, "--pages", "1G", "--memory", "8 TiB"], "8192 huge pages of 1024 MiB"),
        (&["--kernel", &kernel, "--memory", "8 TiB"], "8388608 MiB of memory"),
        (
            &["--kernel", &kernel, "--disk", "qcow2,path=a"],
            "`format`: \"qcow2\" is unknown; there is only `raw`",
        ),
        (&["--kernel", &kernel, "--disk", "raw,path=/nonexistent"], "/nonexistent: No such file"),
    ] {
        for check in [&["--check"][..], &[]] {
            let (status, printed, said) = vm(&[arguments, check].concat());
            assert_eq!((status, printed.as_str()), (Some(2), ""), "{arguments:?}: {said}");
            assert!(said.contains(message) && said.lines().count() == 1, "{arguments:?}: {said}");
        }
    }
    let (status, _, said) = vm(&["/nonexistent.toml"]);
    assert_eq!((status, said.as_str()), (Some(2), "/nonexistent.toml: there is no such file\n"));
}

#[test]
fn a_check_says_what_would_be_done() {
    if !Path::new("/dev/kvm").exists() {
        println!("SKIPPED /dev/kvm is not there");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("fw.toml");
    kernel(dir.path());
    let keys =
        "[vm]\nkernel = 'vmlinuz'\nmemory = '64 MiB'\nvcpus = 2\ntopology = { threads = 2 }\nserial = 'off'
        [[vm.disk]]\nformat = 'raw'\npath = 'disk.raw'\nqueues = 2\nread_only = true\n";
    std::fs::write(&file, keys).unwrap();
    std::fs::write(dir.path().join("disk.raw"), [0; 2048]).unwrap();
    let (status, printed, said) = vm(&[file.to_str().unwrap(), "--check"]);
    assert_eq!((status, said.as_str()), (Some(0), ""));
    for line in [
        "fw is valid. It would",
        "(a bzImage, by its 64-bit entry)",
        "take 64 MiB of memory in 4 KiB pages",
        "run 2 vCPU(s): 1 socket(s) of 1 core(s) of 2 thread(s)",
        "disk.raw (2 KiB): disk disk0, 2 queue(s)",
        "connect the serial console to nowhere",
    ] {
        assert!(printed.contains(line), "{line}: {printed}");
    }
}

/// An ELF with a PVH entry at the first byte of `code`, which lies at 1 MiB.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    const LOAD: u64 = 0x10_0000;
    const NOTE: u64 = 64 + 2 * 56;
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let halves = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let program = |kind, at, address, size| {
        [halves(&[kind, 7]), words(&[at, address, address, size, size, 4])].concat()
    };
    [
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec(),
        words(&[LOAD, 64, 0]),
        halves(&[0]),
        [64_u16, 56, 2, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()).collect(),
        program(4, NOTE, 0, 20),
        program(1, NOTE + 20, LOAD, code.len() as u64),
        // XEN_ELFNOTE_PHYS32_ENTRY.
        halves(&[4, 4, 18]),
        b"Xen\0".to_vec(),
        halves(&[LOAD as u32]),
        code.to_vec(),
    ]
    .concat()
}

/// docs/vm.md promises 50 ms.
#[test]
fn a_guests_first_instruction_comes_soon_after_its_process_began() {
    use std::io::Read;
    if !Path::new("/dev/kvm").exists() {
        println!("SKIPPED /dev/kvm is not there");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    // mov dx, 0x3f8; mov al, '!'; out dx, al; then off: mov dx, 0x600; mov al, 0x34; out dx, al; and for ever.
    let code = [0x66, 0xba, 0xf8, 3, 0xb0, b'!', 0xee, 0x66, 0xba, 0, 6, 0xb0, 0x34, 0xee, 0xeb, 0xfe];
    std::fs::write(&kernel, elf(&code)).unwrap();
    keeps_within(std::time::Duration::from_millis(50), || {
        let began = std::time::Instant::now();
        let mut child = Command::new(CABLEWAY)
            .args(["vm", "--memory", "256MiB", "--kernel"])
            .arg(&kernel)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut first = [0];
        child.stdout.take().unwrap().read_exact(&mut first).unwrap();
        let took = began.elapsed();
        assert_eq!((first[0], child.wait().unwrap().code()), (b'!', Some(0)));
        took
    });
}

#[test]
fn a_machine_that_is_not_there_is_said_plainly() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().to_str().unwrap();
    for what in ["info", "pause", "resume", "reboot", "shutdown", "kill", "console", "events"] {
        let (status, printed, said) = vm(&[what, "fw1", "--run-dir", run_dir]);
        assert_eq!((status, printed.as_str()), (Some(1), ""), "{what}: {said}");
        assert!(said.contains("no machine `fw1` is running in"), "{what}: {said}");
    }
    let (status, printed, _) = vm(&["list", "--run-dir", run_dir]);
    assert_eq!((status, printed), (Some(0), format!("no machine is running in {run_dir}\n")));
    let (status, printed, _) = vm(&["list", "--run-dir", run_dir, "--json"]);
    assert_eq!((status, printed.as_str()), (Some(0), "[]\n"));
}
