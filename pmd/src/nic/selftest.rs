//! What a card can find out about itself, as `ethtool -t` asks it: a line for each test.
//!
//! Owns the order of the tests and what each of them sends; what a card does for them is a [`SelfTest`]. Nothing leaves by the
//! wire of a card that can send its frames back to itself. Every wait is bounded, and what goes wrong is a line, not an end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use port::{BurstBuffer, DropReason, Offload, RxQueue, Segment, Sink};
use virtio::memory::copy::copy;

use super::{DeviceError, Mac, Nic, Opened, Options, ReceiveQueue, Single, TransmitQueue};
use crate::dma::Arena;

/// Frames that are sent, and so many of them at a time.
const FRAMES: usize = 64;
const AT_A_TIME: usize = 16;

/// How long they may be on their way, an interrupt too.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long a link may take to come: the partners negotiate for two to three seconds.
const LINK: Duration = Duration::from_secs(5);

/// Type of the frames: for experiments (IEEE 802, local experimental EtherType 1).
const TYPE: [u8; 2] = [0x88, 0xb5];

/// What came of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Well, and what was seen.
    Ok(String),
    /// Not well, and why.
    Failed(String),
    /// The card has nothing of that kind.
    NotSupported,
}

/// A test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What was tried.
    pub name: &'static str,
    /// What came of it.
    pub outcome: Outcome,
}

/// What was seen; none: the card has nothing of that kind.
pub type Found = Result<Option<String>, DeviceError>;

/// What a driver does for a self-test beyond what it does for everybody.
pub trait SelfTest: Nic {
    /// Writes patterns to registers that may hold anything, and reads them back. The device is stopped, and reset first.
    ///
    /// # Errors
    /// One does not hold them, or the device cannot be reset.
    fn try_registers(device: &Self::Device) -> Found;

    /// Sums up the settings in its EEPROM.
    ///
    /// # Errors
    /// They are damaged, or cannot be read.
    fn try_settings(&self) -> Found {
        Ok(None)
    }

    /// Makes it raise the vector of its first queue. False: it cannot.
    fn raise(&self) -> bool {
        false
    }

    /// Whether it reads memory and writes it, where no frame can tell.
    ///
    /// # Errors
    /// It does not.
    fn try_memory(&mut self) -> Found {
        Ok(None)
    }

    /// Lets it send frames to itself, or ends that. False: it cannot.
    ///
    /// # Errors
    /// It does not do as told.
    fn loop_back(&mut self, _on: bool) -> Result<bool, DeviceError> {
        Ok(false)
    }
}

fn outcome(found: Found) -> Outcome {
    match found {
        Ok(Some(seen)) => Outcome::Ok(seen),
        Ok(None) => Outcome::NotSupported,
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

/// How it is used: one small ring each way, every frame taken.
pub fn options() -> Options {
    Options { receive_ring: 64, transmit_ring: 64, spare: 64, ..Options::default() }
}

/// Tests the card that `device` is, which nobody uses; with memory in `arena`. `raised`: whether a vector was raised since it was
/// asked of it last.
pub fn run<N: SelfTest>(
    device: &Arc<N::Device>,
    arena: &Arc<Arena>,
    raised: &mut dyn FnMut(u16) -> bool,
) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut tell = |name, outcome| lines.push(Line { name, outcome });
    tell("registers", outcome(N::try_registers(device)));
    let mut opened = match N::open(device.clone(), arena, options()) {
        Ok(opened) => opened,
        Err(error) => {
            tell("start", Outcome::Failed(error.to_string()));
            for name in ["eeprom", "interrupt", "dma", "loopback", "link"] {
                tell(name, Outcome::Failed("not tried, as it did not start".to_owned()));
            }
            return lines;
        }
    };
    tell("start", Outcome::Ok("reset, rings, both directions on".to_owned()));
    tell("eeprom", outcome(opened.nic.try_settings()));
    tell("interrupt", interrupt(&mut opened, raised));
    let [dma, loopback] = frames(&mut opened);
    tell("dma", dma);
    tell("loopback", loopback);
    let link = match opened.nic.wait_for_link(LINK) {
        Ok(link) if link.speed > 0 => {
            let duplex = if link.full_duplex { "full" } else { "half" };
            Outcome::Ok(format!("{} Mbit/s, {duplex} duplex", link.speed))
        }
        Ok(_) => Outcome::Ok("up".to_owned()),
        Err(error) => Outcome::Failed(format!("{error}; is a cable plugged in?")),
    };
    tell("link", link);
    lines
}

/// The vector of the first queue comes when its cause does.
fn interrupt<N: SelfTest>(opened: &mut Opened<N>, raised: &mut dyn FnMut(u16) -> bool) -> Outcome {
    let Some(queue) = opened.receive.first_mut() else { return Outcome::NotSupported };
    let Some(vector) = queue.vector() else { return Outcome::NotSupported };
    // What it is armed for may be there already.
    let _ = queue.arm();
    raised(vector);
    if !opened.nic.raise() {
        queue.disarm();
        return Outcome::NotSupported;
    }
    let came = within(PATIENCE, || raised(vector));
    queue.disarm();
    if came {
        Outcome::Ok(format!("vector {vector} was raised"))
    } else {
        Outcome::Failed(format!("vector {vector} was not raised within {PATIENCE:?}"))
    }
}

/// Memory and the way back.
fn frames<N: SelfTest>(opened: &mut Opened<N>) -> [Outcome; 2] {
    match opened.nic.loop_back(true) {
        Ok(true) => {}
        Ok(false) => return [memory(opened), Outcome::NotSupported],
        Err(error) => {
            let why = error.to_string();
            return [Outcome::Failed(format!("not tried: {why}")), Outcome::Failed(why)];
        }
    }
    let linked = opened.nic.wait_for_link(PATIENCE);
    let came = linked.map_err(|error| error.to_string()).and_then(|_| exchange(opened));
    let came = came.map_err(|why| format!("{why}{}", counted(opened)));
    let ended = opened.nic.loop_back(false);
    let dma = match &came {
        Ok(_) => Outcome::Ok(format!("{FRAMES} frames were read, and written")),
        Err(why) => Outcome::Failed(why.clone()),
    };
    let loopback = match (came, ended) {
        (Ok(bytes), Ok(_)) => {
            Outcome::Ok(format!("{FRAMES} frames, {bytes} bytes, bit for bit and in order"))
        }
        (Err(why), _) => Outcome::Failed(why),
        (_, Err(error)) => Outcome::Failed(format!("it cannot be ended: {error}")),
    };
    [dma, loopback]
}

/// What was counted meanwhile that may say why a frame is not there.
fn counted<N: Nic>(opened: &mut Opened<N>) -> String {
    let mut counts: Vec<(String, u64)> = Vec::new();
    for queue in &opened.receive {
        let counters = queue.counters();
        counts.push(("received".to_owned(), counters.frames.get()));
        for reason in DropReason::ALL {
            counts.push((format!("dropped as {}", reason.key()), counters.drops.get(*reason)));
        }
    }
    let hardware = opened.nic.statistics();
    counts.extend(hardware.into_iter().map(|(name, count)| (format!("hardware: {name}"), count)));
    let counts = counts.into_iter().filter(|(_, count)| *count > 0);
    counts.map(|(name, count)| format!("; {name} {count}")).collect()
}

/// Whether the device reads memory, of one whose frames do not come back: it counts a frame to itself as sent.
fn memory<N: SelfTest>(opened: &mut Opened<N>) -> Outcome {
    match opened.nic.try_memory() {
        Ok(None) => {}
        other => return outcome(other),
    }
    let sent =
        |nic: &mut N| nic.statistics().iter().find(|(name, _)| *name == "sent").map(|(_, count)| *count);
    let Some(before) = sent(&mut opened.nic) else { return Outcome::NotSupported };
    let frame = frame(opened.nic.mac(), 0);
    if let Err(why) = send(opened, std::slice::from_ref(&frame)) {
        return Outcome::Failed(why);
    }
    if within(PATIENCE, || sent(&mut opened.nic).is_some_and(|now| now > before)) {
        Outcome::Ok("a frame was read (written to memory was none)".to_owned())
    } else {
        Outcome::Failed(format!("no frame was read from memory within {PATIENCE:?}"))
    }
}

/// Sends frames and takes them back; how many bytes that were.
fn exchange<N: Nic>(opened: &mut Opened<N>) -> Result<usize, String> {
    let mac = opened.nic.mac();
    let all: Vec<Vec<u8>> = (0..FRAMES).map(|number| frame(mac, number)).collect();
    let (mut buffer, mut bytes) = (BurstBuffer::default(), Vec::new());
    let mut came = 0;
    for some in all.chunks(AT_A_TIME) {
        send(opened, some)?;
        let until = came + some.len();
        let mut wrong = None;
        within(PATIENCE, || {
            let Some(queue) = opened.receive.first_mut() else { return true };
            let burst = queue.poll(&mut buffer);
            for lent in burst.frames() {
                bytes.clear();
                let first = Segment { ptr: lent.ptr, len: lent.first_len };
                for piece in std::iter::once(&first).chain(burst.more(lent)) {
                    let at = bytes.len();
                    bytes.resize(at + piece.len as usize, 0);
                    if let Some(room) = bytes.get_mut(at..) {
                        // SAFETY: the burst lends `len` bytes at `ptr`, and the room has as many.
                        unsafe { copy(room.as_mut_ptr(), piece.ptr, piece.len as usize) };
                    }
                }
                // A model does not keep the wire's frames out meanwhile; they are of other types.
                if bytes.get(12..14) != Some(&TYPE) {
                    continue;
                }
                if all.get(came) != Some(&bytes) {
                    wrong = Some(difference(&all, came, &bytes));
                }
                came += 1;
            }
            came >= until || wrong.is_some()
        });
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        if came < until {
            return Err(format!("{came} of {until} frames came back within {PATIENCE:?}"));
        }
    }
    Ok(all.iter().map(Vec::len).sum())
}

/// How what came in place of frame `number` differs from it.
fn difference(all: &[Vec<u8>], number: usize, came: &[u8]) -> String {
    if let Some(other) = all.iter().position(|frame| frame == came) {
        return format!("frame {other} came back in place of frame {number}");
    }
    let sent = all.get(number).map(Vec::as_slice).unwrap_or_default();
    let same = sent.iter().zip(came).take_while(|(a, b)| a == b).count();
    format!(
        "frame {number} of {} bytes came back with {}, other ones from byte {same} on",
        sent.len(),
        came.len()
    )
}

/// Frame `number`: to the card itself, of a length and bytes that follow from the number.
fn frame(mac: Mac, number: usize) -> Vec<u8> {
    let len = 60 + number * 1454 / (FRAMES - 1);
    let mut frame: Vec<u8> = mac.into_iter().chain(mac).chain(TYPE).collect();
    let mut state = 0x9e37_79b9_u32.wrapping_mul(number as u32 + 1);
    frame.resize_with(len, || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    });
    frame
}

fn send<N: Nic>(opened: &mut Opened<N>, frames: &[Vec<u8>]) -> Result<(), String> {
    let queue = opened.transmit.pop().ok_or("the card has no queue to send by")?;
    let counters = queue.counters();
    let mut single = Single::new(queue, counters);
    let sent = frames.iter().try_for_each(|frame| {
        let piece = Segment { ptr: frame.as_ptr(), len: frame.len() as u32 };
        single.put(Offload::NONE, frame.len(), std::iter::once(piece))
    });
    let flushed = single.flush();
    opened.transmit.push(single.queue);
    sent.map_err(|error| format!("a frame was not taken: {error:?}"))?;
    flushed.map_err(|error| format!("the device cannot be told of a frame: {error}"))
}

/// Whether `done` becomes true in time.
fn within(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    while !done() {
        if begin.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    true
}
