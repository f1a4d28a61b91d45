//! What the driver costs: cycles for each frame that is received and transmitted again, over one or more sockets.
//!
//! ```text
//! cycles [--packed] [--listen] [--macs] [--size BYTES] [--in-flight N] [--rings N] [--seconds S] SOCKET...
//! ```
//! Put a back end behind the sockets that hands on what comes in (DPDK: `testpmd --forward-mode=io` with two `net_vhost`
//! ports, or a switch that learns addresses with `--macs`, which turns each frame around). N frames circulate from each port;
//! counted are the cycles of polls that moved a frame.

use std::arch::x86_64::_rdtsc;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pmd::virtio_user::{Buffer, Options, SocketMode, VirtioUser};
use virtio::device::Layout;

const BURST: usize = 32;

struct Arguments {
    options: Options,
    macs: bool,
    size: usize,
    in_flight: usize,
    seconds: u64,
    sockets: Vec<PathBuf>,
}

fn arguments() -> Option<Arguments> {
    let mut a = Arguments {
        options: Options::default(),
        macs: false,
        size: 64, // at least 14
        in_flight: 128,
        seconds: 3,
        sockets: Vec::new(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next()?.parse::<u64>().ok();
        match word.as_str() {
            "--packed" => a.options.layout = Layout::Packed,
            "--listen" => a.options.mode = SocketMode::Listen,
            "--macs" => a.macs = true,
            "--size" => a.size = number()? as usize,
            "--in-flight" => a.in_flight = number()? as usize,
            "--rings" => a.options.queue_size = number()?.try_into().ok()?,
            "--seconds" => a.seconds = number()?,
            option if option.starts_with('-') => return None,
            socket => a.sockets.push(socket.into()),
        }
    }
    (!a.sockets.is_empty()).then_some(a)
}

fn cycles() -> u64 {
    // SAFETY: reading the time stamp counter has no other effect.
    unsafe { _rdtsc() }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some(a) = arguments() else {
        return Err(
            "cycles [--packed] [--listen] [--macs] [--size BYTES] [--in-flight N] [--rings N] [--seconds S] SOCKET..."
                .into(),
        );
    };
    let mut devices = Vec::new();
    for socket in &a.sockets {
        devices.push(VirtioUser::open(socket, a.options.clone())?);
    }
    eprintln!("features {:#x}, {}", devices[0].features(), devices[0].pages());
    let mut held: Vec<Vec<Buffer>> = Vec::new();
    for (i, device) in (0u8..).zip(&mut devices) {
        let pair = &mut device.queue_pairs()[0];
        let mut frame = vec![0; a.size.max(14)];
        frame[..13].copy_from_slice(&[2, 0, 0, 0, 0, i ^ 1, 2, 0, 0, 0, 0, i, 8]);
        let mut frames = Vec::with_capacity(4096);
        for _ in 0..a.in_flight {
            let mut b = pair.allocate().ok_or("too few buffers")?;
            pair.write(&mut b, 0, &frame);
            pair.set_len(&mut b, frame.len());
            frames.push(b);
        }
        pair.transmit(&mut frames);
        held.push(frames);
    }

    let (mut busy, mut frames, mut polls) = (0u64, 0u64, 0u64);
    let begin = Instant::now();
    let first = cycles();
    let mut last = first;
    while begin.elapsed() < Duration::from_secs(a.seconds) {
        for _ in 0..1000 {
            for (device, held) in devices.iter_mut().zip(&mut held) {
                let pair = &mut device.queue_pairs()[0];
                let n = pair.receive(held, BURST);
                if a.macs {
                    held.iter_mut().for_each(|b| pair.swap_macs(b));
                }
                if !held.is_empty() {
                    pair.transmit(held);
                }
                let now = cycles();
                if n > 0 {
                    busy += now - last;
                    frames += n as u64;
                    polls += 1;
                }
                last = now;
            }
        }
    }
    let all = last - first;
    println!(
        "{:.2} Mpps, {:.1} cycles/frame, busy {:.0} %, {:.1} frames a poll",
        frames as f64 / begin.elapsed().as_secs_f64() / 1e6,
        busy as f64 / frames as f64,
        100.0 * busy as f64 / all as f64,
        frames as f64 / polls as f64,
    );
    for device in &mut devices {
        println!("{:?}", device.queue_pairs()[0].counters());
    }
    Ok(())
}
