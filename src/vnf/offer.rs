//! The function that offers frames: numbered, stamped with their time, filled with bytes that follow from the number.
//!
//! A frame that comes back is checked byte by byte. Each number is counted once: a frame that comes twice is not two.

use std::collections::VecDeque;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use hdrhistogram::Histogram;
use port::Offload;

use super::side::{Side, wait};
use super::{Clock, Tell, positive};
use crate::output;

/// The type of Ethernet frames for local experiments (IEEE 802).
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
/// Addresses and type; then number and time, eight bytes each.
const HEADER: usize = 14;
const LEAST: usize = HEADER + 16;
/// After this long a frame is lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// `cableway vnf offer`.
#[derive(Args)]
pub(crate) struct OfferArgs {
    /// The interface.
    interface: String,
    /// Address of the function that reflects.
    #[arg(long, value_name = "MAC", value_parser = mac)]
    to: [u8; 6],
    /// Frames a second.
    #[arg(long, default_value_t = 1_000.0, value_parser = clap::value_parser!(f64))]
    rate: f64,
    /// Bytes of a frame, without FCS.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(60..=1514))]
    size: u16,
    /// End after so many seconds [default: goes on]. Exit status 1 when nothing came back, or anything was lost or wrong.
    #[arg(long, value_parser = positive)]
    seconds: Option<f64>,
    #[command(flatten)]
    tell: Tell,
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| "an address like 52:54:00:00:00:01".to_owned())
}

/// What became of the frames.
struct Counts {
    sent: u64,
    back: u64,
    lost: u64,
    wrong: u64,
    again: u64,
    times: Histogram<u64>,
}

/// Runs it.
///
/// # Errors
/// The interface is not there, or goes away.
pub(super) fn run(args: &OfferArgs, stop: &AtomicBool) -> Result<ExitCode> {
    let mut side = Side::open(&args.interface)?;
    let address = Path::new("/sys/class/net").join(&args.interface).join("address");
    let from = std::fs::read_to_string(&address).with_context(|| format!("reading {}", address.display()))?;
    let from = mac(from.trim()).map_err(|_| anyhow::anyhow!("{} has no Ethernet address", args.interface))?;
    let rate = args.rate.clamp(0.001, 1e7);
    output::print(&format!(
        "vnf: offers {rate} frames a second of {} bytes at {}\n",
        args.size, args.interface
    ))?;

    let begin = Instant::now();
    let end = args.seconds.map(|seconds| begin + Duration::from_secs_f64(seconds));
    let mut clock = Clock::new(&args.tell);
    let mut counts = Counts {
        sent: 0,
        back: 0,
        lost: 0,
        wrong: 0,
        again: 0,
        times: Histogram::new_with_bounds(1, 60_000_000_000, 3)?,
    };
    // When each frame was sent that is still out, from number `counts.sent - out.len()` on; `None`: it is back.
    let mut out: VecDeque<Option<Instant>> = VecDeque::new();
    let mut frame = vec![0; usize::from(args.size)];
    let mut told = counts.totals();
    loop {
        let over = stop.load(Ordering::Relaxed) || end.is_some_and(|end| Instant::now() >= end);
        let due = (begin.elapsed().as_secs_f64() * rate) as u64;
        // What a pause of this machine kept back goes out in small parts.
        let mut part = 32;
        while !over && counts.sent < due && part > 0 {
            build(&mut frame, args.to, from, counts.sent);
            side.out.send(Offload::NONE, &[&frame]);
            out.push_back(Some(Instant::now()));
            counts.sent += 1;
            part -= 1;
        }
        let first = counts.sent - out.len() as u64;
        let came = side.take(|bytes, _, _| {
            let Some(number) = number_of(bytes, from) else { return };
            let place = number.checked_sub(first).and_then(|place| out.get_mut(usize::try_from(place).ok()?));
            match place {
                Some(sent) if is_whole(bytes, number, args.size) => match sent.take() {
                    Some(sent) => {
                        counts.back += 1;
                        let took = u64::try_from(sent.elapsed().as_nanos()).unwrap_or(u64::MAX);
                        counts.times.saturating_record(took.max(1));
                    }
                    None => counts.again += 1,
                },
                Some(_) => counts.wrong += 1,
                // One that was given up, or a number that was never sent.
                None if number < counts.sent => counts.again += 1,
                None => counts.wrong += 1,
            }
        })?;
        while let Some(oldest) = out.front() {
            match oldest {
                Some(sent) if sent.elapsed() < PATIENCE => break,
                Some(_) => counts.lost += 1,
                None => {}
            }
            out.pop_front();
        }
        if clock.strikes() && counts.totals() != told {
            counts.tell()?;
            told = counts.totals();
        }
        if over && out.is_empty() {
            break;
        }
        if came == 0 {
            let next =
                Duration::from_secs_f64((counts.sent + 1) as f64 / rate).saturating_sub(begin.elapsed());
            wait(&[&side], next.min(Duration::from_millis(10)));
        }
    }
    counts.tell()?;
    let well = counts.back > 0 && counts.lost + counts.wrong + counts.again == 0;
    Ok(if well || end.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Counts {
    fn totals(&self) -> [u64; 5] {
        [self.sent, self.back, self.lost, self.wrong, self.again]
    }

    /// The counts since the start, the times since they were told last.
    fn tell(&mut self) -> Result<()> {
        let [sent, back, lost, wrong, again] = self.totals();
        let at = |quantile| self.times.value_at_quantile(quantile) as f64 / 1e3;
        output::print(&format!(
            "vnf: sent {sent} back {back} lost {lost} wrong {wrong} twice {again}; round trip p50 {:.0} µs, p99 {:.0} µs\n",
            at(0.5),
            at(0.99)
        ))?;
        self.times.reset();
        Ok(())
    }
}

/// The frame of this number.
fn build(frame: &mut [u8], to: [u8; 6], from: [u8; 6], number: u64) {
    let header = [&to[..], &from, &ETHERTYPE, b"cableway", &number.to_be_bytes()].concat();
    let (head, filling) = frame.split_at_mut(LEAST);
    head.copy_from_slice(&header);
    for (i, byte) in filling.iter_mut().enumerate() {
        *byte = fill(number, i);
    }
}

fn fill(number: u64, i: usize) -> u8 {
    (number as u8).wrapping_mul(31).wrapping_add(i as u8)
}

/// The number of a frame of ours that came back to us.
fn number_of(frame: &[u8], us: [u8; 6]) -> Option<u64> {
    let ours = frame.get(..6)? == us && frame.get(12..14)? == ETHERTYPE && frame.get(14..22)? == b"cableway";
    Some(u64::from_be_bytes(frame.get(22..LEAST)?.try_into().ok()?)).filter(|_| ours)
}

/// Whether it is what was sent under this number.
fn is_whole(frame: &[u8], number: u64, size: u16) -> bool {
    let filling = frame.get(LEAST..).unwrap_or_default();
    frame.len() == usize::from(size) && filling.iter().enumerate().all(|(i, byte)| *byte == fill(number, i))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_known_again_and_any_other_byte_is_noticed() {
        let (us, other) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let mut frame = vec![0; 100];
        // As it comes back: to us.
        build(&mut frame, us, other, 77);
        assert_eq!(number_of(&frame, us), Some(77));
        assert_eq!(number_of(&frame, other), None);
        assert!(is_whole(&frame, 77, 100));
        assert!(!is_whole(&frame, 77, 101));
        for i in LEAST..100 {
            frame[i] ^= 1;
            assert!(!is_whole(&frame, 77, 100), "byte {i}");
            frame[i] ^= 1;
        }
        for length in 0..LEAST {
            assert_eq!(number_of(&frame[..length], us), None);
        }
    }
}
