//! A switch that is killed under load: its successor goes on with the same rings, and nothing is lost. (What a crash leaves
//! at each point of a publish is in `virtio/src/device/inflight.rs`.)

use std::time::{Duration, Instant};

use host::memory::Pages;
use nix::sys::signal::{Signal, kill};
use pmd::virtio_user::{Options, Reconnected, VirtioUser};
use virtio::device::Layout;

use crate::world::{Place, Running, port};

/// Frames that are on their way.
const WINDOW: u64 = 100;

/// Frames of the largest burst: what a switch sent, and died before it told the sender.
const REPEATED: u64 = 64;

/// Numbered frames from one device to another.
struct Stream {
    sent: u64,
    /// The number that comes next.
    expected: u64,
    repeated: u64,
}

impl Stream {
    /// Sends and receives until `until` says that it is over, but for a minute at most.
    fn run(
        &mut self,
        from: &mut VirtioUser,
        to: &mut VirtioUser,
        until: impl Fn(&Self, &VirtioUser) -> bool,
    ) {
        let end = Instant::now() + Duration::from_secs(60);
        let (mut waiting, mut got) = (Vec::new(), Vec::new());
        while !until(self, from) {
            assert!(Instant::now() < end, "frame {} does not come; {} were sent", self.expected, self.sent);
            let out = &mut from.queue_pairs()[0];
            while self.sent - self.expected < WINDOW {
                let Some(mut buffer) = out.allocate() else { break };
                out.set_len(&mut buffer, 64);
                out.write(&mut buffer, 0, &frame(self.sent));
                waiting.push(buffer);
                self.sent += 1;
            }
            out.transmit(&mut waiting);
            let into = &mut to.queue_pairs()[0];
            into.receive(&mut got, 64);
            for buffer in got.drain(..) {
                let mut bytes = [0; 64];
                into.read(&buffer, 0, &mut bytes);
                into.free(buffer);
                let mut number = [0; 8];
                number.copy_from_slice(&bytes[14..22]);
                let number = u64::from_be_bytes(number);
                assert_eq!(bytes, frame(number));
                assert!(number <= self.expected, "frame {} was lost, {number} came", self.expected);
                assert!(
                    number + REPEATED >= self.expected,
                    "frame {number} came again after {}",
                    self.expected
                );
                self.repeated += u64::from(number < self.expected);
                self.expected += u64::from(number == self.expected);
            }
        }
        for buffer in waiting {
            from.queue_pairs()[0].free(buffer);
            self.sent -= 1;
        }
    }
}

fn frame(number: u64) -> [u8; 64] {
    let mut frame: [u8; 64] = std::array::from_fn(|i| (number as u8).wrapping_mul(17).wrapping_add(i as u8));
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 0xb, 2, 0, 0, 0, 0, 0xa, 0x88, 0xb5]);
    frame[14..22].copy_from_slice(&number.to_be_bytes());
    frame
}

#[test]
fn rings_of_a_switch_that_is_killed_under_load_go_on_without_loss() {
    for layout in [Layout::Split, Layout::Packed] {
        let place = Place::new();
        place.write(&(port("a") + &port("b")));
        let mut switch = Running::start(&place);
        let open = |name: &str, last: u8| {
            let (mac, timeout) = ([2, 0, 0, 0, 0, last], Duration::from_secs(60));
            let options =
                Options { mac, layout, buffers: 1024, pages: Pages::Ordinary, timeout, ..Options::default() };
            VirtioUser::open(&place.socket(name), options).unwrap()
        };
        let (mut to, mut from) = (open("b", 0xb), open("a", 0xa));
        let mut stream = Stream { sent: 0, expected: 0, repeated: 0 };
        for round in 0..25u64 {
            let enough = stream.expected + 2_000;
            stream.run(&mut from, &mut to, |s, _| s.expected >= enough);
            let pid = nix::unistd::Pid::from_raw(switch.process.id().try_into().unwrap());
            let killer = std::thread::spawn(move || {
                // Not always at the same point of a burst.
                std::thread::sleep(Duration::from_micros(500 + 137 * round));
                kill(pid, Signal::SIGKILL).unwrap();
            });
            stream.run(&mut from, &mut to, |_, from| !from.connected());
            killer.join().unwrap();
            switch.end();
            switch = Running::start(&place);
            // The receiver first: the successor has nowhere else to send to.
            assert_eq!(to.reconnect().unwrap(), Reconnected::Resumed);
            assert_eq!(from.reconnect().unwrap(), Reconnected::Resumed);
        }
        let all = stream.sent;
        stream.run(&mut from, &mut to, |s, _| s.expected >= all);
        println!("{layout:?}: {all} frames, {} of them twice", stream.repeated);
    }
}
