//! Our front end against a back end that we did not write: DPDK's `net_vhost`, in testpmd.

#![allow(clippy::unwrap_used)]

use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_user::ProtocolFeatures;
use vhost_user::frontend::{FrontEnd, FrontEndError, MemoryRegion, QueueConfig};
use virtio::features;

struct Testpmd(Child);

impl Testpmd {
    /// Serves `socket`; `None` (and why, and how to have it) where testpmd is not installed.
    fn start(socket: &Path) -> Option<Self> {
        let device = format!("net_vhost0,iface={},queues=2", socket.display());
        let mut command = Command::new("dpdk-testpmd");
        command.args(["--lcores", "0@0,1@1", "--no-pci", "--no-shconf", "--no-huge", "-m", "128"]);
        command.args(["--no-telemetry", "--vdev", &device, "--"]);
        command.args([
            "--total-num-mbufs=2048",
            "--rxq=2",
            "--txq=2",
            "--forward-mode=rxonly",
            "--auto-start",
        ]);
        // It runs until it is killed, or its input ends.
        let log = tempfile::tempfile().unwrap();
        let child = command.stdin(Stdio::piped()).stdout(log.try_clone().unwrap()).stderr(log).spawn();
        match child {
            Ok(child) => Some(Self(child)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                eprintln!(
                    "skipped: dpdk-testpmd is not installed; ./check installs it (apt-get install dpdk)"
                );
                None
            }
            Err(e) => panic!("cannot start dpdk-testpmd: {e}"),
        }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Connects as soon as the back end listens.
fn connect(path: &Path, testpmd: &mut Testpmd) -> FrontEnd {
    let start = Instant::now();
    loop {
        match FrontEnd::connect(path, Duration::from_secs(5)) {
            Ok(front) => return front,
            Err(e @ FrontEndError::Connect { .. }) => {
                assert_eq!(testpmd.0.try_wait().unwrap(), None, "testpmd ended");
                assert!(start.elapsed() < Duration::from_secs(30), "{e}");
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(e) => panic!("{e}"),
        }
    }
}

#[test]
fn dpdk_runs_rings_of_both_layouts_for_our_front_end() {
    const SIZE: u64 = 1 << 20;
    const USER: u64 = 0x7f00_0000_0000;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vhost.sock");
    let Some(mut testpmd) = Testpmd::start(&path) else { return };

    for (wanted, base) in
        [(features::VERSION_1, 0), (features::VERSION_1 | features::RING_PACKED, 0x8000_8000)]
    {
        let mut front = connect(&path, &mut testpmd);
        let want = ProtocolFeatures::MQ | ProtocolFeatures::REPLY_ACK;
        let agreed = front.negotiate(wanted | features::NET_MQ, want).unwrap();
        assert_eq!((agreed.features, agreed.protocol), (wanted | features::NET_MQ, want));
        assert!(front.queue_pairs().unwrap() >= 2);

        let memory = memfd_create(c"memory", MFdFlags::empty()).unwrap();
        nix::unistd::ftruncate(&memory, SIZE as i64).unwrap();
        let region = MemoryRegion { file: memory.as_fd(), size: SIZE, guest: 0, user: USER, offset: 0 };
        front.set_memory(&[region]).unwrap();

        let kick = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        for index in 0..4_u16 {
            let at = USER + u64::from(index) * 0x8000;
            let queue = QueueConfig {
                size: 256,
                descriptors: at,
                driver: at + 0x1000,
                device: at + 0x2000,
                base: Some(base),
                log: None,
                call: None,
                kick: Some(kick.as_fd()),
                err: None,
            };
            front.start_queue(index, &queue).unwrap();
            front.enable_queue(index, true).unwrap();
        }
        for index in 0..4 {
            // DPDK tells the avail half of a packed ring's position alone.
            assert_eq!(front.stop_queue(index).unwrap(), base & 0xffff, "{wanted:#x}");
        }
        assert!(!front.is_closed());
    }
}
