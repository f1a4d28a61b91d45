//! virtio-net with its rings served by DPDK's vhost library: testpmd sends each frame back. Takes dpdk-testpmd.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use pmd::dma::{Arena, ArenaOptions};
use pmd::nic::{Nic, Options, ReceiveQueue, TransmitQueue};
use pmd::qtest::{Function, Machine};
use pmd::virtio_net::VirtioNet;
use port::{BurstBuffer, Offload, RxQueue, Scratch, TagEdit, TxQueue};

use crate::frames::{LEAST, PATIENCE, Pattern, Source, gather, until};

const FRAMES: u64 = 100_000;
/// Longest frame of a card with an MTU of 1,500.
const LONGEST: usize = 1514;

struct Testpmd(Child);

impl Testpmd {
    /// One port that listens at `socket` and sends back what it receives; none where it is not installed.
    fn start(socket: &Path) -> Option<Self> {
        let device = format!("net_vhost0,iface={},queues=1", socket.display());
        let child = Command::new("dpdk-testpmd")
            .args([
                "--lcores",
                "0@0,1@1",
                "--no-pci",
                "--no-huge",
                "-m",
                "256",
                "--file-prefix",
                "nic",
                "--vdev",
                &device,
            ])
            .args(["--", "--auto-start", "--forward-mode=io", "--port-topology=loop", "--nb-cores=1"])
            .args(["--total-num-mbufs=8192", "--no-flush-rx"])
            // It runs until its input ends.
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        match child {
            Ok(child) => Some(Self(child)),
            Err(e) => {
                println!("skipped: dpdk-testpmd does not start ({e}): sudo ./check install");
                None
            }
        }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn frames_go_to_dpdk_and_come_back_bit_for_bit(model: &str) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("back.sock");
    let Some(mut testpmd) = Testpmd::start(&socket) else { return };
    until("testpmd listens", || {
        assert_eq!(testpmd.0.try_wait().unwrap(), None, "testpmd ended");
        socket.exists()
    });
    let machine = Machine::start_with_back_end(model, &socket).unwrap();
    let options = ArenaOptions { rings: 1 << 20, buffers: 4096, ..ArenaOptions::default() };
    let arena = Arena::new(options, machine.space()).unwrap();
    let mut opened = VirtioNet::<Function>::open(machine.function(), &arena, Options::default()).unwrap();
    opened.nic.wait_for_link(PATIENCE).unwrap();
    let (receive, transmit) = (&mut opened.receive[0], &mut opened.transmit[0]);

    let (pattern, mut wanted, mut bytes) = (Pattern::new(), Vec::new(), Vec::new());
    let write = |number: u64, frame: &mut Vec<u8>| {
        pattern.write(number, LEAST + number as usize % (LONGEST - LEAST + 1), frame);
    };
    let mut buffer = BurstBuffer::default();
    let (mut sent, mut came) = (0, 0);
    until("frames come back", || {
        // At most 32 are under way, so that nobody has to drop any.
        if sent < FRAMES && sent == came {
            let frames = (sent..FRAMES.min(sent + 32)).map(|number| {
                let mut frame = Vec::new();
                write(number, &mut frame);
                (frame, Offload::NONE)
            });
            let mut source = Source { frames: frames.collect() };
            sent += source.frames.len() as u64;
            let mut burst_buffer = BurstBuffer::default();
            let burst = source.poll(&mut burst_buffer);
            transmit.send(&burst, burst.all(), TagEdit::Keep, &mut Scratch::default());
            drop(burst);
            transmit.notify();
        }
        let burst = receive.poll(&mut buffer);
        for frame in burst.frames() {
            gather(&burst, frame, &mut bytes);
            write(came, &mut wanted);
            assert!(wanted == bytes, "frame {came} of {} bytes differs", wanted.len());
            came += 1;
        }
        came == FRAMES
    });
    assert_eq!((transmit.counters().sent.get(), transmit.counters().drops.sum()), (FRAMES, 0));
    assert_eq!(receive.counters().frames.get(), FRAMES);
}

#[test]
#[ignore = "needs QEMU and DPDK: ./check nic"]
fn frames_go_to_dpdk_and_come_back_bit_for_bit_split() {
    frames_go_to_dpdk_and_come_back_bit_for_bit("virtio-net-pci,disable-legacy=on");
}

#[test]
#[ignore = "needs QEMU and DPDK: ./check nic"]
fn frames_go_to_dpdk_and_come_back_bit_for_bit_packed() {
    frames_go_to_dpdk_and_come_back_bit_for_bit("virtio-net-pci,disable-legacy=on,packed=on");
}
