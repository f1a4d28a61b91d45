//! An initial file system: a newc archive (Linux, Documentation/driver-api/early-userspace/buffer-format.rst), in memory.

use std::collections::BTreeSet;

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive that grows.
#[derive(Default)]
pub(super) struct Cpio {
    out: Vec<u8>,
    inode: u32,
    folders: BTreeSet<String>,
}

impl Cpio {
    /// A folder and those above it, each once.
    pub(super) fn folder(&mut self, path: &str) {
        for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
            let folder = &path[..end];
            if !folder.is_empty() && self.folders.insert(folder.to_owned()) {
                self.entry(folder, FOLDER, (0, 0), &[]);
            }
        }
    }

    /// A file, in folders that are made if need be.
    pub(super) fn file(&mut self, path: &str, data: &[u8]) {
        self.within(path, FILE, data);
    }

    /// A file that may be started.
    pub(super) fn program(&mut self, path: &str, data: &[u8]) {
        self.within(path, PROGRAM, data);
    }

    /// A character device.
    pub(super) fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER_DEVICE, (major, minor), &[]);
    }

    /// The archive.
    pub(super) fn finished(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.out
    }

    fn within(&mut self, path: &str, mode: u32, data: &[u8]) {
        if let Some((folder, _)) = path.rsplit_once('/') {
            self.folder(folder);
        }
        self.entry(path, mode, (0, 0), data);
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.inode += 1;
        let (size, name) = (data.len() as u32, path.len() as u32 + 1);
        self.out.extend(b"070701");
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name, 0] {
            self.out.extend(format!("{field:08X}").bytes());
        }
        self.out.extend(path.bytes().chain([0]));
        self.align();
        self.out.extend(data);
        self.align();
    }

    fn align(&mut self) {
        self.out.resize(self.out.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn an_archive_is_what_cpio_reads() {
        let mut archive = Cpio::default();
        archive.program("bin/tool", b"12345");
        archive.file("bin/text", b"");
        archive.folder("bin");
        archive.device("bin/console", 5, 1);
        let bytes = archive.finished();
        // busybox, too, has one; without both nothing can be compared.
        let Ok(mut cpio) = Command::new("busybox")
            .args(["cpio", "-tv"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
        else {
            println!("SKIPPED no busybox: ./check install");
            return;
        };
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let listed = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        let first_and_last =
            |line: &str| Some((line.get(..10)?.to_owned(), line.split(' ').next_back()?.to_owned()));
        let found: Vec<_> = listed.lines().filter_map(first_and_last).collect();
        let wanted = [
            ("drwxr-xr-x", "bin"),
            ("-rwxr-xr-x", "bin/tool"),
            ("-rw-r--r--", "bin/text"),
            ("crw-------", "bin/console"),
        ];
        assert_eq!(found, wanted.map(|(mode, name)| (mode.to_owned(), name.to_owned())), "{listed}");
    }
}
