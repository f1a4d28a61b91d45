//! What a confined thread can and cannot do. Each test runs again in a process of its own, which may be killed.

use super::*;
use host::sandbox::files::{FileAccess, Held};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ThreadKind::{Housekeeping, Worker};
use libc::c_long;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;

use victim::{End, KILLED, call, check, outcome, said};

#[path = "../../../host/src/sandbox/victim.rs"]
mod victim;

/// Runs `act` on a thread of kind `kind`, in a process of its own that runs only the test `name`.
fn confined(name: &str, role: &str, kind: ThreadKind, act: impl FnOnce() -> String + Send + 'static) -> End {
    confined_to(name, role, kind, Devices::empty(), act)
}

/// The same for a switch that has devices.
fn confined_to(
    name: &str,
    role: &str,
    kind: ThreadKind,
    devices: Devices,
    act: impl FnOnce() -> String + Send + 'static,
) -> End {
    victim::run(&format!("sandbox::tests::{name}"), role, move || {
        apply(kind, devices).unwrap();
        act()
    })
}

#[test]
fn only_a_switch_that_started_with_one_may_open_packet_sockets() {
    let name = "only_a_switch_that_started_with_one_may_open_packet_sockets";
    for (role, devices, expected) in [
        ("without", Devices::TUN, "EPERM: Operation not permitted"),
        // The filter lets it pass; that there is no such kind of socket is the kernel's word.
        ("with", Devices::PACKET, "EINVAL: Invalid argument"),
    ] {
        let end = confined_to(name, role, Housekeeping, devices, || {
            outcome(call(libc::SYS_socket, libc::AF_PACKET.into(), 0xff_ffff, 0))
        });
        check(end, said(expected), role);
    }
}

#[test]
fn only_a_switch_that_started_with_xdp_sockets_may_load_programs_and_only_by_four_commands() {
    let name = "only_a_switch_that_started_with_xdp_sockets_may_load_programs_and_only_by_four_commands";
    const MAP_CREATE: i64 = 0;
    const PROG_GET_FD_BY_ID: i64 = 13;
    for (role, devices, command, expected) in [
        ("without", Devices::PACKET, MAP_CREATE, KILLED),
        // The filter lets it pass; that there are no arguments is the kernel's word.
        ("with", Devices::XDP, MAP_CREATE, said("EFAULT: Bad address")),
        ("another command", Devices::XDP, PROG_GET_FD_BY_ID, said("EPERM: Operation not permitted")),
    ] {
        let end = confined_to(name, role, Housekeeping, devices, move || {
            outcome(call(libc::SYS_bpf, command, 1, 16))
        });
        check(end, expected, role);
    }
}

#[test]
fn a_worker_with_xdp_sockets_may_call_the_kernel_about_them_and_send_nothing() {
    let name = "a_worker_with_xdp_sockets_may_call_the_kernel_about_them_and_send_nothing";
    for (role, devices, len, expected) in [
        ("without", Devices::PACKET, 0, KILLED),
        ("with", Devices::XDP, 0, said("ENOTSOCK: Socket operation on non-socket")),
        ("with bytes", Devices::XDP, 1, KILLED),
        ("with very many bytes", Devices::XDP, 1 << 32, KILLED),
    ] {
        let file = File::open("/dev/null").unwrap();
        let end = confined_to(name, role, Worker, devices, move || {
            outcome(call(libc::SYS_sendto, file.as_raw_fd().into(), 0, len))
        });
        check(end, expected, role);
    }
}

#[test]
fn only_a_switch_that_started_with_a_tap_may_attach_to_taps() {
    let name = "only_a_switch_that_started_with_a_tap_may_attach_to_taps";
    for (role, devices, expected) in [
        ("without", Devices::empty(), "EPERM: Operation not permitted"),
        // The filter lets it pass; that standard input is no tap is the kernel's word.
        ("with", Devices::TUN, "ENOTTY: Not a typewriter"),
    ] {
        let end = confined_to(name, role, Housekeeping, devices, || {
            outcome(call(libc::SYS_ioctl, 0, libc::TUNSETOFFLOAD.cast_signed(), 0))
        });
        check(end, said(expected), role);
    }
}

#[test]
fn a_worker_can_signal_sleep_allocate_and_survive_memory_that_goes_away() {
    let end = confined(
        "a_worker_can_signal_sleep_allocate_and_survive_memory_that_goes_away",
        "worker",
        Housekeeping,
        || {
            // A worker is started by housekeeping, so that both filters hold.
            let memory = File::from(
                nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::empty()).unwrap(),
            );
            memory.set_len(8192).unwrap();
            let guests = memory.try_clone().unwrap();
            let worker = std::thread::spawn(move || worker_life(&memory));
            std::thread::sleep(Duration::from_millis(20));
            guests.set_len(0).unwrap();
            worker.join().unwrap()
        },
    );
    check(end, said("zeros, and 1 event"), "a worker's life");
}

fn worker_life(memory: &File) -> String {
    let prot = nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE;
    let len = std::num::NonZeroUsize::new(8192).unwrap();
    // SAFETY: a new mapping, used through raw pointers.
    let start =
        unsafe { nix::sys::mman::mmap(None, len, prot, nix::sys::mman::MapFlags::MAP_SHARED, memory, 0) };
    let start = start.unwrap().cast::<u8>();
    let broken = Arc::new(AtomicBool::new(false));
    // SAFETY: the mapping above, unmapped only after the watch is dropped.
    let watch = unsafe { host::fault::watch(memory.as_fd(), start.as_ptr(), 8192, broken.clone()) }.unwrap();
    let (event, epoll) = (EventFd::new().unwrap(), Epoll::new(EpollCreateFlags::empty()).unwrap());
    epoll.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 1)).unwrap();
    let (sender, receiver) = crossbeam::channel::bounded::<u32>(1);

    apply(Worker, Devices::empty()).unwrap();
    event.write(1).unwrap();
    let events = epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::from(10u8)).unwrap();
    event.read().unwrap();
    epoll.delete(&event).unwrap();
    assert!(receiver.recv_timeout(Duration::from_millis(2)).is_err());
    drop((sender, event, epoll));
    let big = vec![1u8; 64 << 20];
    // Given back all at once, so that the allocator shrinks this thread's heap: glibc then asks /proc whether it may.
    drop((0..200).map(|_| vec![1u8; 100 << 10]).collect::<Vec<_>>());
    std::thread::yield_now();
    // The guest truncates its memory now.
    while !broken.load(Ordering::Acquire) {
        // SAFETY: the mapping, of which zero pages take the place.
        unsafe { start.as_ptr().add(4096).read_volatile() };
        std::thread::sleep(Duration::from_millis(1));
    }
    drop((watch, big));
    // SAFETY: nobody uses the mapping any more.
    unsafe { nix::sys::mman::munmap(start.cast(), 8192) }.unwrap();
    format!("zeros, and {events} event")
}

#[test]
fn a_worker_that_opens_a_file_gets_none() {
    let end =
        confined("a_worker_that_opens_a_file_gets_none", "open", Worker, || outcome(File::open("/dev/null")));
    check(end, said("EPERM: Operation not permitted"), "opening a file");
}

#[test]
fn a_worker_that_asks_for_anything_else_ends_the_process() {
    const NAME: &str = "a_worker_that_asks_for_anything_else_ends_the_process";
    let execute = i64::from(libc::PROT_READ | libc::PROT_EXEC);
    let calls: [(&str, c_long, [i64; 3]); 9] = [
        ("open", libc::SYS_open, [0, 0, 0]),
        ("socket", libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0]),
        ("clone", libc::SYS_clone, [libc::CLONE_THREAD.into(), 0, 0]),
        ("clone3", libc::SYS_clone3, [0, 0, 0]),
        ("execve", libc::SYS_execve, [0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [0, 0, 0]),
        ("mmap executable", libc::SYS_mmap, [0, 4096, execute]),
        ("mprotect executable", libc::SYS_mprotect, [0, 0, execute]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [0, 0, 0]),
    ];
    for (what, number, [a, b, c]) in calls {
        check(confined(NAME, what, Worker, move || outcome(call(number, a, b, c))), KILLED, what);
    }
}

#[test]
fn housekeeping_that_reaches_for_other_programs_or_the_machine_ends_the_process() {
    const NAME: &str = "housekeeping_that_reaches_for_other_programs_or_the_machine_ends_the_process";
    for number in [libc::SYS_execve, libc::SYS_ptrace, libc::SYS_mount, libc::SYS_setns, libc::SYS_bpf] {
        let role = format!("call {number}");
        check(confined(NAME, &role, Housekeeping, move || outcome(call(number, 0, 0, 0))), KILLED, &role);
    }
    let program = || outcome(Command::new("/bin/true").status());
    let end = confined(NAME, "a program", Housekeeping, program);
    // Starting one fails before it could be ended: processes cannot be made either.
    check(end, said("EPERM: Operation not permitted"), "starting a program");
}

#[test]
fn housekeeping_is_refused_other_networks_processes_and_executable_memory() {
    const NAME: &str = "housekeeping_is_refused_other_networks_processes_and_executable_memory";
    let stream = i64::from(libc::SOCK_STREAM);
    let execute = i64::from(libc::PROT_READ | libc::PROT_EXEC);
    let refused = [
        ("internet", libc::SYS_socket, [libc::AF_INET.into(), stream, 0]),
        ("netlink", libc::SYS_socket, [libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 0]),
        ("packets", libc::SYS_socket, [libc::AF_PACKET.into(), libc::SOCK_RAW.into(), 0]),
        ("fork", libc::SYS_fork, [0, 0, 0]),
        ("clone of a process", libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0]),
        ("executable memory", libc::SYS_mmap, [0, 4096, execute]),
        ("io_uring", libc::SYS_io_uring_setup, [0, 0, 0]),
        ("typing into the terminal", libc::SYS_ioctl, [0, libc::TIOCSTI.cast_signed(), 0]),
        ("becoming dumpable", libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1, 0]),
    ];
    for (what, number, [a, b, c]) in refused {
        let end = confined(NAME, what, Housekeeping, move || outcome(call(number, a, b, c)));
        check(end, said("EPERM: Operation not permitted"), what);
    }
}

#[test]
fn housekeeping_can_serve_sockets_files_memory_and_threads() {
    let end = confined(
        "housekeeping_can_serve_sockets_files_memory_and_threads",
        "housekeeping",
        Housekeeping,
        || {
            let run = tempfile::tempdir().unwrap();
            let path = run.path().join("v0.sock");
            let listener = UnixListener::bind(&path).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o660)).unwrap();
            listener.set_nonblocking(true).unwrap();
            let mut client = UnixStream::connect(&path).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            client.write_all(b"hello").unwrap();
            let mut hello = [0; 5];
            server.read_exact(&mut hello).unwrap();

            std::fs::write(run.path().join("a"), hello).unwrap();
            std::fs::rename(run.path().join("a"), run.path().join("b")).unwrap();
            assert_eq!(std::fs::read(run.path().join("b")).unwrap(), b"hello");
            std::fs::read_link(format!("/proc/self/fd/{}", server.as_raw_fd())).unwrap();

            let memory =
                host::memory::SharedMemory::new(1 << 20, host::memory::Pages::Auto, Some(0)).unwrap();
            assert!(memory.len() >= 1 << 20);
            let core = host::topology::permitted_cores().unwrap().iter().next().unwrap();
            std::thread::Builder::new()
                .name("pinned".into())
                .spawn(move || host::thread::pin(core).unwrap())
                .unwrap()
                .join()
                .unwrap();
            drop(listener);
            std::fs::remove_file(path).unwrap();
            run.close().unwrap();
            "served".to_owned()
        },
    );
    check(end, said("served"), "housekeeping");
}

#[test]
fn the_files_of_a_configuration_are_where_it_lies_where_its_sockets_are_and_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["etc", "real", "run", "vms"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    let core = host::topology::permitted_cores().unwrap().iter().next().unwrap();
    let vms = at("vms").display().to_string();
    let port = |name: &str, rest: &str| format!("[[port]]\nname = '{name}'\nkind = 'vhost-user'\n{rest}\n");
    let text = |key: &str| {
        format!("[switch]\nworkers = [{core}]\n{key}\n")
            + &port("a", "socket = 'a'")
            + &port("b", &format!("socket = '{vms}/b'"))
            + &port("c", "socket = '/tmp/c'\nmode = 'client'")
    };
    std::fs::write(at("real/switch.toml"), text("")).unwrap();
    std::os::unix::fs::symlink(at("real/switch.toml"), at("etc/switch.toml")).unwrap();
    let files = |text: &str| {
        let machine = crate::config::ThisMachine::now();
        let config =
            crate::config::Config::parse(text, &at("etc/switch.toml"), &at("run"), &machine).unwrap();
        files::of(&config, &at("run"))
    };
    let wanted = FileAccess {
        read: vec!["/sys/devices/system".into(), at("etc"), at("real")],
        sockets: vec![at("run"), at("vms")],
        write: vec![],
        devices: vec![],
    };
    assert_eq!(files(&text("")), Some(wanted));
    assert_eq!(files(&text("confine_files = false")), None);
}

#[test]
fn a_thread_held_to_its_files_reads_its_directories_makes_its_sockets_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["etc", "run", "else"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    std::fs::write(at("etc/switch.toml"), "old").unwrap();
    std::fs::write(at("else/secret"), "secret").unwrap();
    let vmm = UnixListener::bind(at("else/vmm.sock")).unwrap();
    let files = FileAccess {
        read: vec!["/sys/devices/system".into(), at("etc")],
        sockets: vec![at("run")],
        write: vec![],
        devices: vec![],
    };
    let step = std::sync::Barrier::new(2);
    let held = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let held = files.confine().unwrap();
            step.wait();
            step.wait();
            if held == Held::NotAtAll {
                return held;
            }
            assert_eq!(std::fs::read(at("etc/switch.toml")).unwrap(), b"new");
            assert!(host::topology::online_cores(std::path::Path::new("/")).is_ok());
            drop(UnixListener::bind(at("run/a.sock")).unwrap());
            std::fs::remove_file(at("run/a.sock")).unwrap();
            UnixStream::connect(at("else/vmm.sock")).unwrap();
            let memory = nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::empty()).unwrap();
            File::from(memory).set_len(4096).unwrap();

            let refused = |what: &str, result: io::Result<()>| {
                assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied, "{what}");
            };
            refused("read", File::open(at("else/secret")).map(drop));
            refused("read the user's list", File::open("/etc/passwd").map(drop));
            refused("write its configuration", std::fs::write(at("etc/switch.toml"), "x"));
            refused("make a file", File::create(at("run/file")).map(drop));
            refused("remove", std::fs::remove_file(at("else/secret")));
            refused("make a socket", UnixListener::bind(at("else/a.sock")).map(drop));
            held
        });
        step.wait();
        // As editors do: another file in its place.
        std::fs::write(at("etc/new"), "new").unwrap();
        std::fs::rename(at("etc/new"), at("etc/switch.toml")).unwrap();
        step.wait();
        thread.join().unwrap()
    });
    drop(vmm);
    if held == Held::NotAtAll {
        eprintln!("skipped: this kernel has no Landlock; `cableway switch FILE --check` says so, too");
    }
}

#[test]
fn a_confined_thread_can_gain_no_privileges() {
    const NAME: &str = "a_confined_thread_can_gain_no_privileges";
    let end = confined(NAME, "status", Housekeeping, || {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let of = |key: &str| status.lines().find_map(|l| l.strip_prefix(key)).unwrap().trim().to_owned();
        format!("{} {}", of("NoNewPrivs:"), of("Seccomp:"))
    });
    check(end, said("1 2"), "no_new_privs, and a filter");
}
