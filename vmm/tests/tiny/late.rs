//! Back ends that answer late, wrongly or never: no vCPU waits for one, every answer has a time-out, and the next connection is
//! as good as if nothing had happened.
//!
//! Owns a back end that is odd once, at a message of the test's choice, and knows only as much of the protocol as that takes.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use control::client;
use vmm::control::report::{MachineInfo, TypedReport};
use vmm::machine::Ended;

use crate::asked;
use crate::guest::{Code, Guest, no_kvm};
use crate::poll::{keys, transmit_ring};
use crate::{BAR, enable};

/// Messages (vhost-user, "Front-end message types").
const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_VRING_ENABLE: u32 = 18;
/// Of a header: this is an answer; one is wanted.
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const REPLY_ACK: u64 = 1 << 3;

/// What is silent is waited for at least so long (docs/vm-threat-model.md says how long).
const PATIENT: Duration = Duration::from_secs(4);
/// Late, and not too late.
const LATE: Duration = Duration::from_secs(2);

/// What the back end does instead of answering, once.
#[derive(Clone, Copy, Debug)]
enum Odd {
    /// Nothing, until the other end has enough.
    Never,
    /// A little, and no more.
    Half,
    /// The answer, so much later.
    Late(Duration),
    /// These bytes.
    Wrong(&'static [u8]),
}

impl Odd {
    /// How soon after the message it may be over.
    fn due(self) -> Duration {
        match self {
            Odd::Never | Odd::Half => PATIENT,
            Odd::Late(time) => time,
            Odd::Wrong(_) => Duration::MAX,
        }
    }
}

/// What the back end saw.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// The message that it is odd at.
    Asked(Instant),
    /// The end of that connection.
    GivenUp(Instant),
    /// The queue was started.
    Started,
}

/// Serves one connection after the other; odd at `message`, the first time.
fn serve(listener: &UnixListener, message: u32, odd: Odd, seen: &Sender<Seen>) {
    let mut odd = Some(odd);
    while let Ok((mut stream, _)) = listener.accept() {
        let mut was_odd = false;
        while let Some((code, flags, payload)) = receive(&mut stream) {
            let word =
                |at: usize| payload.get(at..at + 4).map_or(0, |b| u32::from_ne_bytes(b.try_into().unwrap()));
            let value = match code {
                GET_FEATURES => Some(VERSION_1 | PROTOCOL_FEATURES),
                GET_PROTOCOL_FEATURES => Some(REPLY_ACK),
                // The ring's number, and that it is where it began.
                GET_VRING_BASE => Some(word(0).into()),
                _ => (flags & NEED_REPLY != 0).then_some(0),
            };
            if code == SET_VRING_KICK {
                let _ = seen.send(Seen::Started);
            }
            let Some(value) = value else { continue };
            let mut answer = Vec::new();
            for word in [code, 1 | REPLY, 8] {
                answer.extend(word.to_ne_bytes());
            }
            answer.extend(value.to_ne_bytes());
            if code == message
                && let Some(odd) = odd.take()
            {
                was_odd = true;
                let _ = seen.send(Seen::Asked(Instant::now()));
                match odd {
                    Odd::Never => answer.clear(),
                    Odd::Half => answer.truncate(9),
                    Odd::Late(time) => std::thread::sleep(time),
                    Odd::Wrong(bytes) => answer = bytes.to_vec(),
                }
            }
            if stream.write_all(&answer).is_err() {
                break;
            }
        }
        if was_odd {
            let _ = seen.send(Seen::GivenUp(Instant::now()));
        }
    }
}

/// A message: what it is, its flags, its payload. `None`: the other end is gone.
fn receive(stream: &mut UnixStream) -> Option<(u32, u32, Vec<u8>)> {
    let mut header = [0; 12];
    stream.read_exact(&mut header).ok()?;
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut payload = vec![0; word(8) as usize];
    stream.read_exact(&mut payload).ok()?;
    Some((word(0), word(4), payload))
}

/// What it sees next.
fn next(seen: &Receiver<Seen>) -> Seen {
    seen.recv_timeout(Duration::from_secs(60)).unwrap()
}

/// Starts the card's queue; waits for a key, looking for it again and again; lets go of the queue, and waits until the card says that
/// it did. All of it twice, then off.
fn guest(socket: &Path) -> Guest {
    // mov dx, 0x3fd; in al, dx; test al, 1; jz back to the in; mov dl, 0xf8; in al, dx.
    let key = [0x66, 0xba, 0xfd, 3, 0xec, 0xa8, 1, 0x74, 0xfb, 0xb2, 0xf8, 0xec];
    let wait = [0xa0, 0x14, 0, 0, 0xc0, 0x84, 0xc0, 0x75, 0xf7]; // mov al, [status]; test al, al; jnz back
    let once =
        |code: Code| transmit_ring(code, BAR).raw(&key).store_byte(BAR + 0x14, 0).raw(&wait).print("let go ");
    Guest::start_with(&once(once(enable(Code::default()))).power_off().elf(), &keys(socket))
}

/// Runs a guest on a back end that is odd at `message`, after it was started. Returns how long it was waited for, if that ended the
/// connection. Where this machine stood still until it was over, the try said nothing about the vCPU, and there is another.
fn run(message: u32, odd: Odd) -> Option<Duration> {
    let said = (0..5).find_map(|_| attempt(message, odd));
    said.unwrap_or_else(|| panic!("{message} {odd:?}: the vCPU never went on before it was over"))
}

fn attempt(message: u32, odd: Odd) -> Option<Option<Duration>> {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let (sender, seen) = channel();
    std::thread::spawn(move || serve(&listener, message, odd, &sender));
    let guest = guest(&socket);
    let (door, _server) = asked::serve(&guest, dir.path());
    let press =
        || assert_eq!(client::post_bytes::<TypedReport>(&door, "/v1/console", b"k").unwrap().value.taken, 1);
    let exits = || client::get::<MachineInfo>(&door, "/v1/vm").unwrap().value.vcpus[0].exits_total;
    let remote = guest.remote();
    let waiting = std::thread::spawn(move || guest.end());
    // A driver that resets its card before the card's thread heard of it is no business of the back end's.
    if message != SET_MEM_TABLE {
        assert_eq!(next(&seen), Seen::Started);
    }
    if message == GET_VRING_BASE {
        press();
    }
    let Seen::Asked(asked) = next(&seen) else { panic!("{message} {odd:?}: at another message") };
    let before = exits();
    asked::until("the vCPU goes on", || exits() > before + 20);
    // As long as the connection is there, it is waited for: the vCPU goes on all the same.
    let early = seen.try_recv();
    let give_up = || {
        remote.kill();
        None
    };
    if asked.elapsed() > odd.due() {
        return give_up();
    }
    assert!(early.is_err() || matches!(odd, Odd::Wrong(_)), "{message} {odd:?}: {early:?}");
    if message != GET_VRING_BASE {
        press();
    }
    let waited = match odd {
        Odd::Late(_) => None,
        _ => match early.unwrap_or_else(|_| next(&seen)) {
            Seen::GivenUp(at) => Some(at - asked),
            other => panic!("{message} {odd:?}: {other:?}"),
        },
    };
    match (next(&seen), odd) {
        (Seen::Started, _) => press(),
        // It was later than it wanted to be.
        (Seen::GivenUp(at), Odd::Late(_)) if at - asked > PATIENT => return give_up(),
        (other, _) => panic!("{message} {odd:?}: {other:?}, and not again"),
    }
    let (ended, printed, _) = waiting.join().unwrap();
    assert_eq!(
        (ended, printed.as_slice()),
        (Ended::PowerOff, b"let go let go ".as_slice()),
        "{message} {odd:?}"
    );
    Some(waited)
}

fn is_patient(waited: Option<Duration>) {
    let waited = waited.unwrap();
    assert!((PATIENT..Duration::from_secs(55)).contains(&waited), "{waited:?}");
}

#[test]
fn a_back_end_that_never_takes_the_memory_or_talks_nonsense_about_it_holds_no_vcpu() {
    if no_kvm() {
        return;
    }
    is_patient(run(SET_MEM_TABLE, Odd::Never));
    run(SET_MEM_TABLE, Odd::Wrong(&[0xff; 20]));
}

#[test]
fn a_back_end_that_answers_half_late_or_for_another_message_holds_no_vcpu() {
    if no_kvm() {
        return;
    }
    is_patient(run(SET_VRING_ENABLE, Odd::Half));
    assert_eq!(run(SET_VRING_ENABLE, Odd::Late(LATE)), None);
    run(SET_VRING_ENABLE, Odd::Wrong(&[1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
}

#[test]
fn a_back_end_that_keeps_its_rings_holds_no_vcpu_and_loses_them() {
    if no_kvm() {
        return;
    }
    is_patient(run(GET_VRING_BASE, Odd::Never));
    assert_eq!(run(GET_VRING_BASE, Odd::Late(LATE)), None);
}
