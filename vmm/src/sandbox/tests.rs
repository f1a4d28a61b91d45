//! What a confined thread of a machine can and cannot do.

use std::os::unix::net::{UnixListener, UnixStream};

use ThreadKind::*;
use victim::{End, KILLED, call, check, outcome, said};

use super::*;

#[path = "../../../host/src/sandbox/victim.rs"]
mod victim;

fn config(keys: &str) -> Config {
    Config::parse(&format!("[vm]\nkernel = 'k'\n{keys}"), Path::new("/etc/vm.toml")).unwrap()
}

/// A call by a thread of `kind` of the machine that `keys` describe, in a process of its own that runs only the test `name`.
fn confined(
    name: &str,
    what: &str,
    kind: ThreadKind,
    keys: &str,
    (number, [a, b, c]): (c_long, [i64; 3]),
) -> End {
    let config = config(keys);
    victim::run(&format!("sandbox::tests::{name}"), &format!("{kind:?} {what}"), move || {
        prepare(&config).unwrap();
        // As in a machine: what a kind may do, its filter and the main thread's let pass.
        apply(Main).unwrap();
        apply(kind).unwrap();
        outcome(call(number, a, b, c))
    })
}

const FUNCTION: &str = "pci = [{ device = '0000:01:00.0' }]";
const SPLIT: &str = "irqchip = 'split'";
const IMAGE: &str = "disk = [{ format = 'raw', path = 'd' }]";
const INTERNET: (c_long, [i64; 3]) = (libc::SYS_socket, [libc::AF_INET as i64, libc::SOCK_STREAM as i64, 0]);
const PTRACE: (c_long, [i64; 3]) = (libc::SYS_ptrace, [-1, 0, 0]);
const ENOTTY: &str = "ENOTTY: Not a typewriter";

fn ioctl(request: u64) -> (c_long, [i64; 3]) {
    (libc::SYS_ioctl, [0, request.cast_signed(), 0])
}

#[test]
fn no_thread_of_any_kind_starts_programs_opens_connections_or_makes_memory_executable() {
    const NAME: &str = "no_thread_of_any_kind_starts_programs_opens_connections_or_makes_memory_executable";
    let execute = i64::from(libc::PROT_READ | libc::PROT_EXEC);
    for kind in ThreadKind::ALL {
        for (what, asked) in [
            ("execve", (libc::SYS_execve, [0, 0, 0])),
            ("ptrace", PTRACE),
            ("fork", (libc::SYS_fork, [0, 0, 0])),
            ("clone", (libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0])),
            ("internet", INTERNET),
            ("executable memory", (libc::SYS_mmap, [0, 4096, execute])),
            ("bpf", (libc::SYS_bpf, [0, 0, 0])),
            ("typing into the terminal", ioctl(libc::TIOCSTI)),
        ] {
            check(confined(NAME, what, kind, FUNCTION, asked), KILLED, &format!("{kind:?} {what}"));
        }
    }
}

#[test]
fn what_is_forbidden_is_done_where_it_is_only_logged_or_not_even_that() {
    const NAME: &str = "what_is_forbidden_is_done_where_it_is_only_logged_or_not_even_that";
    for (how, keys) in [("log", "seccomp = 'log'"), ("off", "seccomp = 'off'")] {
        for kind in ThreadKind::ALL {
            // The kernel's word, not a filter's.
            let end = confined(NAME, how, kind, keys, PTRACE);
            check(end, said("ESRCH: No such process"), &format!("{kind:?} {how}"));
        }
    }
}

#[test]
fn each_kind_asks_devices_for_what_its_machine_has_and_nothing_else() {
    const NAME: &str = "each_kind_asks_devices_for_what_its_machine_has_and_nothing_else";
    let (run, create) = (KVM | 0x80, KVM | 0x01);
    let [_, set_irqs] = vfio::INTERRUPT_REQUESTS;
    let other = vfio::REQUESTS[0];
    for (kind, what, keys, request, passes) in [
        (Vcpu, "runs", "", run, true),
        (Vcpu, "makes a machine", "", create, false),
        (Vcpu, "interrupts of none", "", set_irqs, false),
        (Vcpu, "moves memory of none", "", KVM | MOVE_MEMORY, false),
        (Vcpu, "moves memory", FUNCTION, KVM | MOVE_MEMORY, true),
        (Vcpu, "interrupts", FUNCTION, set_irqs, true),
        (Vcpu, "another of VFIO", FUNCTION, other, false),
        (Main, "makes a machine", "", create, true),
        (Main, "none of VFIO", "", other, false),
        (Main, "VFIO", FUNCTION, other, true),
        (Watch, "VFIO", FUNCTION, other, true),
        (Watch, "lets go", FUNCTION, KVM | FORGET, true),
        (Watch, "makes a machine", FUNCTION, create, false),
        (Vcpu, "lets go", FUNCTION, KVM | FORGET, false),
        (Tap, "offloads", "", libc::TUNSETOFFLOAD, true),
        (Tap, "another tap", "", libc::TUNSETIFF, false),
        (Disk, "runs a guest", "", run, false),
        (Queue, "offloads", "", libc::TUNSETOFFLOAD, false),
        // What is typed at the serial port, by the control socket or a terminal.
        (Control, "raises an interrupt", "", KVM | RAISE, true),
        (Console, "raises an interrupt", "", KVM | RAISE, true),
        (Control, "sends a message", "", KVM | SEND, false),
        (Control, "sends a message for its chip", SPLIT, KVM | SEND, true),
        (Console, "sends a message for its chip", SPLIT, KVM | SEND, true),
        (Vcpu, "sends a message for its chip", SPLIT, KVM | SEND, true),
        (Vcpu, "raises an interrupt of another chip", SPLIT, KVM | RAISE, false),
        (Control, "raises an interrupt of another chip", SPLIT, KVM | RAISE, false),
        (Disk, "sends a message for its chip", SPLIT, KVM | SEND, false),
        (Control, "makes a machine", "", create, false),
        (Console, "runs a guest", "", run, false),
    ] {
        let end = confined(NAME, what, kind, keys, ioctl(request));
        check(end, if passes { said(ENOTTY) } else { KILLED }, &format!("{kind:?} {what}"));
    }
}

#[test]
fn only_threads_that_need_it_open_files_connect_or_write_at_places() {
    const NAME: &str = "only_threads_that_need_it_open_files_connect_or_write_at_places";
    let unix = (libc::SYS_socket, [libc::AF_UNIX.into(), -1, 0]);
    let write = (libc::SYS_pwrite64, [-1, 0, 0]);
    let flush = (libc::SYS_fdatasync, [-1, 0, 0]);
    let open = (libc::SYS_openat, [-1, 0, 0]);
    let ring = (libc::SYS_io_uring_setup, [1, 0, 0]);
    let (passes, bad) = ("EINVAL: Invalid argument", said("EBADF: Bad file number"));
    for (kind, what, asked, expected) in [
        (BackEnd, "socket", unix, said(passes)),
        (Vcpu, "socket", unix, KILLED),
        (Disk, "socket", unix, KILLED),
        (Control, "socket", unix, KILLED),
        (Disk, "write", write, said("EBADF: Bad file number")),
        (Vcpu, "write", write, KILLED),
        (Queue, "write", write, KILLED),
        (Disk, "flush", flush, bad),
        (Disk, "ring", ring, KILLED),
        (Main, "ring", ring, said("EFAULT: Bad address")),
        (Disk, "enter", (libc::SYS_io_uring_enter, [-1, 0, 0]), said(passes)),
        (Disk, "read to pieces", (libc::SYS_preadv, [-1, 0, 0]), said("EBADF: Bad file number")),
        (Disk, "write of pieces", (libc::SYS_pwritev, [-1, 0, 0]), said("EBADF: Bad file number")),
        (Disk, "hole", (libc::SYS_fallocate, [-1, 0, 0]), said("EBADF: Bad file number")),
        (Disk, "lock", (libc::SYS_flock, [-1, 8, 0]), said("EBADF: Bad file number")),
        (Tap, "frame", (libc::SYS_readv, [-1, 0, 0]), said("EBADF: Bad file number")),
        (BackEnd, "message", (libc::SYS_recvmsg, [-1, 0, 0]), said("EBADF: Bad file number")),
        (Control, "connection", (libc::SYS_accept4, [-1, 0, 0]), said("EBADF: Bad file number")),
        (Tap, "flush", flush, KILLED),
        // The C library asks for it now and then, and can do without.
        (Vcpu, "open", open, said("EPERM: Operation not permitted")),
        (Main, "open", open, said("EFAULT: Bad address")),
        (Control, "open", open, said("EFAULT: Bad address")),
    ] {
        check(confined(NAME, what, kind, IMAGE, asked), expected, &format!("{kind:?} {what}"));
    }
    // A machine without disks makes no rings.
    check(confined(NAME, "ring without a disk", Main, "", ring), KILLED, "ring without a disk");
}

#[test]
fn a_thread_that_is_confined_leaves_signals_to_the_main_thread_and_says_so_in_proc() {
    const NAME: &str = "a_thread_that_is_confined_leaves_signals_to_the_main_thread_and_says_so_in_proc";
    for kind in ThreadKind::ALL {
        let end = victim::run(&format!("sandbox::tests::{NAME}"), &format!("{kind:?}"), move || {
            prepare(&config("")).unwrap();
            // Opened before: most kinds open nothing afterwards.
            let mut status = File::open("/proc/thread-self/status").unwrap();
            apply(kind).unwrap();
            let mut text = [0; 4096];
            let length = io::Read::read(&mut status, &mut text).unwrap();
            let text = String::from_utf8_lossy(&text[..length]).into_owned();
            let of =
                |key: &str| text.lines().find_map(|l| l.strip_prefix(key)).unwrap_or("?").trim().to_owned();
            let blocked = u64::from_str_radix(&of("SigBlk:"), 16).unwrap();
            let term = blocked >> (libc::SIGTERM - 1) & 1;
            format!("{} {} {term}", of("NoNewPrivs:"), of("Seccomp:"))
        });
        let blocks = i32::from(kind != Main);
        check(end, said(&format!("1 2 {blocks}")), &format!("{kind:?}"));
    }
}

#[test]
fn the_files_of_a_machine_are_what_it_opens_when_its_guest_reboots() {
    let of = |keys: &str, run_dir: Option<&str>| files(&config(keys), run_dir.map(Path::new));
    let paths = |paths: &[&str]| paths.iter().map(PathBuf::from).collect::<Vec<_>>();
    let bare = FileAccess { read: paths(&[CORES, OWN, MEMORY]), ..FileAccess::default() };
    assert_eq!(of("", None), Some(bare.clone()));
    assert_eq!(of("confine_files = false", Some("/run/cableway")), None);
    let keys = "[[vm.net]]\nkind = 'vhost-user'\nsocket = '/vms/a'\nmode = 'server'
        [[vm.net]]\nkind = 'vhost-user'\nsocket = '/elsewhere/b'
        [[vm.net]]\nkind = 'tap'\ndevice = 'tap0'
        [[vm.disk]]\nformat = 'raw'\npath = '/images/a'
        [[vm.pci]]\ndevice = '0000:01:00.0'";
    let all = FileAccess {
        read: [bare.read, paths(&FUNCTIONS)].concat(),
        sockets: paths(&["/run/cableway", "/vms"]),
        write: Vec::new(),
        devices: paths(&[TUN, "/dev/vfio", "/dev/iommu"]),
    };
    assert_eq!(of(keys, Some("/run/cableway")), Some(all));
}

#[test]
fn a_process_that_is_held_to_its_files_opens_no_others() {
    const NAME: &str = "a_process_that_is_held_to_its_files_opens_no_others";
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["run", "else"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    std::fs::write(at("else/disk"), "another machine's").unwrap();
    let _back_end = UnixListener::bind(at("else/s")).unwrap();
    let (run_dir, elsewhere) = (at("run"), at("else"));
    let end = victim::run(&format!("sandbox::tests::{NAME}"), "held", move || {
        let confined = begin(&config("seccomp = 'off'"), Some(&run_dir)).unwrap();
        if confined.files == Held::NotAtAll {
            return "no Landlock".to_owned();
        }
        assert!(host::topology::online_cores(Path::new("/")).is_ok());
        let of_thread = format!("/proc/self/task/{}/schedstat", nix::unistd::gettid());
        for path in ["/proc/meminfo", "/proc/self/maps", &of_thread] {
            assert!(File::open(path).is_ok(), "{path}");
        }
        UnixStream::connect(elsewhere.join("s")).unwrap();
        drop(UnixListener::bind(run_dir.join("a.sock")).unwrap());
        std::fs::remove_file(run_dir.join("a.sock")).unwrap();
        let refused = |what: &str, result: io::Result<()>| {
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied, "{what}");
        };
        refused("another's disk", File::open(elsewhere.join("disk")).map(drop));
        refused("a device", File::open("/dev/null").map(drop));
        refused("the kernel's version", File::open("/proc/version").map(drop));
        refused("another process", File::open("/proc/1/cmdline").map(drop));
        refused("a file", File::create(run_dir.join("file")).map(drop));
        refused("a socket", UnixListener::bind(elsewhere.join("a.sock")).map(drop));
        if confined.files == Held::Fully {
            refused("the internet", std::net::TcpStream::connect("127.0.0.1:9").map(drop));
        }
        "held".to_owned()
    });
    if end == said("no Landlock") {
        println!("SKIPPED: this kernel has no Landlock; `cableway vm FILE` says so, too");
        return;
    }
    check(end, said("held"), "a process with files of its own");
}

#[test]
#[ignore = "a measurement: cargo test --release -p cableway-vmm what_filters_cost -- --ignored --nocapture"]
fn what_filters_cost() {
    const NAME: &str = "what_filters_cost";
    for keys in ["seccomp = 'off'", "seccomp = 'kill'"] {
        let end = victim::run(&format!("sandbox::tests::{NAME}"), keys, move || {
            prepare(&config(keys)).unwrap();
            apply(Main).unwrap();
            apply(Vcpu).unwrap();
            // Nothing but the way into the kernel and out again.
            let (number, [_, b, c]) = ioctl(KVM | 0x80);
            let start = std::time::Instant::now();
            (0..1_000_000).for_each(|_| drop(call(number, -1, b, c)));
            format!("{} ns a request to KVM", start.elapsed().as_nanos() / 1_000_000)
        });
        println!("{keys}: {end:?}");
    }
}
