//! Connections that come, go, stall and push in.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use host::memory::Pages;
use pmd::virtio_user::{Options, VirtioUser};
use virtio::device::Layout;

use vhost::vhost_user::message::FrontendReq as M;

use crate::guest::*;
use crate::raw::*;
use crate::world::World;

#[test]
fn a_second_client_on_a_socket_in_use_is_closed_and_the_first_undisturbed() {
    let mut world = World::new();
    let mut guest = Guest::up(&world.socket("h0"), FEATURES);
    for _ in 0..500 {
        let mut second = Raw::new(UnixStream::connect(world.socket("h0")).unwrap());
        second.send(M::GET_FEATURES, 1, &[], &[]);
        assert!(second.answer(M::GET_FEATURES).is_none());
    }
    guest.send(&frame(100));
    drop(guest);
    // Nor is anybody of the pair.
    for port in ["g0", "g1"] {
        let mut second = Raw::new(UnixStream::connect(world.socket(port)).unwrap());
        assert!(second.is_closed());
    }
    world.wait_for_state("g0", "up");
    world.unharmed();
}

#[test]
fn storms_of_connections_and_half_messages_cost_nothing() {
    let mut world = World::new();
    let socket = world.socket("h0");
    let message = Raw::bytes(M::SET_VRING_CALL.into(), 1, &wide(&[0]));
    let event = event();
    let storm = |times: usize| {
        for length in (0..message.len()).cycle().take(times) {
            drop(UnixStream::connect(&socket).unwrap());
            let mut raw = Raw::new(UnixStream::connect(&socket).unwrap());
            raw.send_bytes(&message[..length], &[event.as_fd()]);
        }
    };
    storm(500);
    world.warmed_up();
    storm(5_000);
    drop(connected(&socket));
    world.unharmed();
}

#[test]
fn a_front_end_that_writes_byte_by_byte_or_stops_halfway_delays_only_itself() {
    let mut world = World::new();
    let mut slow = connected(&world.socket("h0"));
    let mut stuck = connected(&world.socket("h1"));
    stuck.stream.write_all(&[1, 0, 0, 0, 1]).unwrap();
    for byte in Raw::bytes(M::GET_FEATURES.into(), 1, &[]) {
        slow.stream.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(slow.answer(M::GET_FEATURES).is_some());
    // Control answers meanwhile, and other sessions begin and end.
    world.wait_for_state("h1", "connected");
    stuck.stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert!(stuck.is_closed(), "half a message is not waited for for ever");
    world.wait_for_reason("h1", "unfinished");
    drop((slow, stuck));
    world.unharmed();
}

#[test]
fn a_front_end_that_reads_no_answers_holds_up_only_itself() {
    let mut world = World::new();
    let mut raw = connected(&world.socket("h0"));
    let ask = Raw::bytes(M::GET_FEATURES.into(), 1, &[]);
    raw.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    while raw.stream.write_all(&ask).is_ok() {}
    world.wait_for_state("h0", "connected");
    let mut other = Guest::up(&world.socket("h1"), FEATURES);
    other.send(&frame(100));
    drop((raw, other));
    world.wait_for_state("h0", "listening");
    world.unharmed();
}

#[test]
fn a_front_end_that_vanishes_in_the_middle_of_a_burst_costs_only_its_own_frames() {
    let mut world = World::new();
    let attack = |world: &World| {
        for layout in LAYOUTS {
            let mut guest = Guest::up(&world.socket("h0"), layout);
            let mut sender = Guest::up(&world.socket("h1"), layout);
            guest.post(64, 2048);
            for _ in 0..64 {
                let desc = sender.place_frame(&frame(1_000));
                sender.offer(1, &[desc]);
                let desc = guest.place_frame(&frame(1_000));
                guest.offer(1, &[desc]);
            }
            // Memory goes with the process: emptied as by the kernel, the connections cut.
            nix::unistd::ftruncate(&guest.memory.file, 0).unwrap();
        }
    };
    attack(&world);
    world.wait_for_state("h0", "listening");
    world.warmed_up();
    (0..50).for_each(|_| attack(&world));
    world.unharmed();
}

/// Names the directory of the sockets, in a process that is there to be killed.
const VICTIM: &str = "CABLEWAY_TEST_VICTIM";

/// Such a process; dropping it is `kill -9`.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).unwrap();
    }
}

/// Sends from `h0` to `h1` as fast as it goes, until it is killed.
fn send_for_ever(directory: &Path, layout: Layout) {
    let open = |port: &str| {
        let options = Options { layout, pages: Pages::Ordinary, ..Options::default() };
        VirtioUser::open(&directory.join(port), options).unwrap()
    };
    let (mut sender, mut receiver) = (open("h0.sock"), open("h1.sock"));
    let (out, into) = (&mut sender.queue_pairs()[0], &mut receiver.queue_pairs()[0]);
    let (mut waiting, mut got) = (Vec::new(), Vec::new());
    loop {
        while let Some(mut buffer) = out.allocate() {
            out.set_len(&mut buffer, 1_000);
            out.write(&mut buffer, 0, &frame(1_000));
            waiting.push(buffer);
        }
        out.transmit(&mut waiting);
        into.receive(&mut got, 64);
        got.drain(..).for_each(|buffer| into.free(buffer));
    }
}

#[test]
fn a_front_end_process_killed_while_it_sends_and_receives_costs_only_its_own_frames() {
    const NAME: &str =
        "sessions::a_front_end_process_killed_while_it_sends_and_receives_costs_only_its_own_frames";
    if let Some(directory) = std::env::var_os(VICTIM) {
        let packed = std::env::var_os("CABLEWAY_TEST_PACKED").is_some();
        return send_for_ever(Path::new(&directory), if packed { Layout::Packed } else { Layout::Split });
    }
    let mut world = World::new();
    for round in 0..10 {
        let mut victim = Command::new(std::env::current_exe().unwrap());
        victim.args(["--exact", NAME, "--nocapture"]).env(VICTIM, world.socket("h0").parent().unwrap());
        if round % 2 == 1 {
            victim.env("CABLEWAY_TEST_PACKED", "1");
        }
        let before = world.received("h0");
        let victim = Victim(victim.stdout(Stdio::null()).spawn().unwrap());
        world.wait("frames fly", |w| w.received("h0") > before + 10_000);
        drop(victim);
        world.wait_for_state("h0", "listening");
        world.wait_for_state("h1", "listening");
        if round == 1 {
            world.warmed_up();
        }
    }
    world.unharmed();
}

#[test]
fn what_is_no_vhost_user_message_ends_the_session_with_a_reason() {
    let mut world = World::new();
    for bytes in [&b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..], &[0; 64], &[0xff; 64]] {
        let mut raw = connected(&world.socket("h0"));
        raw.send_bytes(bytes, &[]);
        assert!(raw.is_closed());
        world.wait_for_reason("h0", "no vhost-user message");
    }
    world.unharmed();
}
