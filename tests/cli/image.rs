//! `cableway image` as a user meets it; that its guests boot is for the lab (`lab/run demo`).

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::world::CABLEWAY;

/// A kernel, a module and a busybox that are none, but look so.
fn place() -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("modules")).unwrap();
    fs::write(place.path().join("vmlinux"), b"\x7fELF kernel").unwrap();
    fs::write(place.path().join("modules/virtio_net.ko"), b"\x7fELF\0depends=failover\0").unwrap();
    fs::write(place.path().join("modules/failover.ko"), b"\x7fELF\0depends=\0").unwrap();
    fs::write(place.path().join("busybox"), b"\x7fELF busybox").unwrap();
    place
}

fn image(place: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(CABLEWAY);
    command.current_dir(place).args(["image", "--output", "out", "--busybox", "busybox"]).args(more);
    command.output().unwrap()
}

const GIVEN: [&str; 4] = ["--kernel", "vmlinux", "--modules", "modules"];

#[test]
fn an_image_has_the_kernel_and_modules_that_were_given_and_this_program() {
    let place = place();
    let made = image(place.path(), &GIVEN);
    assert!(made.status.success(), "{made:?}");
    let out = place.path().join("out");
    assert_eq!(fs::read(out.join("kernel")).unwrap(), b"\x7fELF kernel");
    let initramfs = fs::read(out.join("initramfs.cpio")).unwrap();
    for wanted in ["init", "bin/busybox", "bin/cableway", "lib/modules/failover.ko", "TRAILER!!!"] {
        let found = initramfs.windows(wanted.len()).any(|window| window == wanted.as_bytes());
        assert!(found, "{wanted}");
    }
    assert!(initramfs.windows(20).any(|window| window == b"failover\nvirtio_net\n"), "order to load");
    // Nothing of the work is left.
    assert_eq!(fs::read_dir(out).unwrap().count(), 2);
}

#[test]
fn what_is_missing_is_said_with_the_way_out() {
    let place = place();
    fs::write(place.path().join("text"), "a text").unwrap();
    fs::create_dir(place.path().join("empty")).unwrap();
    for (given, wanted, status) in [
        (&["--kernel", "nowhere"][..], "nowhere: No such file", 2),
        (&["--kernel", "text", "--modules", "modules"], "text is no kernel", 2),
        (&["--kernel", "vmlinux"], "--modules DIR", 2),
        (&["--kernel", "vmlinux", "--modules", "empty"], "/lib/modules/VERSION", 1),
    ] {
        let refused = image(place.path(), given);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!((refused.status.code(), said.contains(wanted)), (Some(status), true), "{given:?}: {said}");
    }
    fs::write(place.path().join("busybox"), b"\x7fELF /lib64/ld-linux-x86-64.so.2").unwrap();
    let said = String::from_utf8(image(place.path(), &GIVEN).stderr).unwrap();
    assert!(said.contains("apt-get install busybox-static"), "{said}");
}
