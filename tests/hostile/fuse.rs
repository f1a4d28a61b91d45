//! Files whose server never answers: a front end that is allowed to mount FUSE decides how long whoever asks its file
//! anything, or so much as closes it, has to wait.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Config, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner, MountOption,
    ReplyAttr, ReplyEmpty, ReplyEntry, ReplyStatfs, Request,
};
use vhost::vhost_user::message::FrontendReq as M;

use crate::guest::*;
use crate::raw::*;
use crate::world::World;

/// One file, `memory`, whose questions from one process are answered late, or never.
struct Silent {
    process: Arc<AtomicU32>,
    /// Closing the file is asking, too; these wait for [`Withheld::answer`].
    withheld: Arc<Withheld>,
}

#[derive(Default)]
struct Withheld {
    closing: Mutex<Vec<ReplyEmpty>>,
    /// Whether closings are.
    on: AtomicBool,
}

impl Withheld {
    fn count(&self) -> usize {
        self.closing.lock().unwrap().len()
    }

    fn answer(&self) {
        self.on.store(false, Ordering::Relaxed);
        self.closing.lock().unwrap().drain(..).for_each(ReplyEmpty::ok);
    }
}

impl Silent {
    /// Whether a thread of that process asks.
    fn ignores(&self, request: &Request) -> bool {
        let process = self.process.load(Ordering::Relaxed);
        Path::new(&format!("/proc/{process}/task/{}", request.pid())).exists()
    }
}

impl Filesystem for Silent {
    fn lookup(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.entry(&Duration::ZERO, &attributes(INodeNo(2)), Generation(0));
    }

    fn getattr(&self, request: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if self.ignores(request) {
            return std::mem::forget(reply);
        }
        reply.attr(&Duration::ZERO, &attributes(node));
    }

    fn statfs(&self, request: &Request, _: INodeNo, reply: ReplyStatfs) {
        if self.ignores(request) {
            return std::mem::forget(reply);
        }
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
    }

    fn flush(&self, request: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        if self.withheld.on.load(Ordering::Relaxed) && self.ignores(request) {
            return self.withheld.closing.lock().unwrap().push(reply);
        }
        reply.ok();
    }
}

fn attributes(ino: INodeNo) -> FileAttr {
    FileAttr {
        ino,
        size: 1 << 20,
        blocks: 2048,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if ino == INodeNo::ROOT { FileType::Directory } else { FileType::RegularFile },
        perm: 0o777,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

#[test]
fn a_file_whose_server_never_answers_is_no_memory_and_holds_up_its_own_port_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (process, withheld) = (Arc::new(AtomicU32::new(0)), Arc::new(Withheld::default()));
    let files = Silent { process: process.clone(), withheld: withheld.clone() };
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("silent".into())];
    let mounted = match fuser::spawn_mount(files, dir.path(), &config) {
        Ok(mounted) => mounted,
        Err(e) => {
            return println!("SKIPPED a_file_whose_server_never_answers: FUSE cannot be mounted here: {e}");
        }
    };
    let file = File::options().read(true).write(true).open(dir.path().join("memory")).unwrap();
    let mut world = World::new();
    process.store(world.process(), Ordering::Relaxed);
    let table = [words(&[1, 0]), wide(&[0, 4096, USER, 0])].concat();

    let mut raw = connected(&world.socket("h0"));
    raw.negotiate(FEATURES);
    assert_eq!(raw.ask(M::SET_MEM_TABLE, &table, &[file.as_fd()]), Some(1));
    world.wait_for_reason("h0", "only memory will do");

    // To let go of it takes its server, too.
    withheld.on.store(true, Ordering::Relaxed);
    raw.send(M::SET_MEM_TABLE, 1, &table, &[file.as_fd()]);
    world.wait("the switch closes the file", |_| withheld.count() > 0);
    let mut guest = Guest::up(&world.socket("h1"), FEATURES);
    guest.send(&frame(60));
    let forwarded = world.forwarded();
    world.wait("the pair goes on", |w| w.forwarded() > forwarded + 100);
    withheld.answer();
    drop((raw, guest, file));
    world.unharmed();
    drop(mounted);
}
