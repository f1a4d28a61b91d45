//! `cableway vm` as a user meets it: what it refuses and how, what `--check` says, how it ends.

use std::path::Path;
use std::process::{Command, Output};

use crate::world::CABLEWAY;

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
