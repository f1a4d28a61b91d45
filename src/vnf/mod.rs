//! `cableway vnf`: small network functions on network interfaces of the kernel, for guests (`cableway image`) and for tests.
//!
//! Owns the subcommands and how they tell their counts. Frames are taken and sent by packet sockets (`pmd::kernel::packet`), so that a
//! function needs no driver of its own; nobody should judge a switch by how fast this is.

mod forward;
mod offer;
mod side;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Args, Subcommand};

/// A network function on interfaces of this machine, by packet sockets (CAP_NET_RAW): what guests of `cableway image` run.
///
/// Counts are printed whenever they changed, at most once each --interval. Ctrl-C ends it.
#[derive(Subcommand)]
pub(crate) enum VnfCommand {
    /// Every frame of either interface leaves by the other one, unchanged.
    Forward {
        /// One interface.
        one: String,
        /// The other one.
        other: String,
        #[command(flatten)]
        tell: Tell,
    },
    /// Every frame that comes in goes back to its sender: the two addresses change places. Frames to groups stay.
    Reflect {
        /// The interface.
        interface: String,
        #[command(flatten)]
        tell: Tell,
    },
    /// Numbered frames to a function that reflects; each that comes back is checked whole, and timed.
    Offer(offer::OfferArgs),
}

/// How counts are told.
#[derive(Args)]
pub(crate) struct Tell {
    /// Seconds between two reports.
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    interval: f64,
}

fn positive(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "a number".to_owned())?;
    if (0.001..=86_400.0).contains(&number) { Ok(number) } else { Err("from 0.001 to 86400".to_owned()) }
}

/// Runs the function until it is interrupted.
///
/// # Errors
/// An interface is not there, or goes away.
pub(crate) fn run(command: &VnfCommand) -> Result<ExitCode> {
    let stop = crate::interrupt::flag()?;
    match command {
        VnfCommand::Forward { one, other, tell } => forward::forward(one, other, tell, &stop)?,
        VnfCommand::Reflect { interface, tell } => forward::reflect(interface, tell, &stop)?,
        VnfCommand::Offer(args) => return offer::run(args, &stop),
    }
    Ok(ExitCode::SUCCESS)
}

/// When it is time to tell something.
struct Clock {
    interval: Duration,
    next: Instant,
}

impl Clock {
    fn new(tell: &Tell) -> Self {
        let interval = Duration::from_secs_f64(tell.interval);
        Self { interval, next: Instant::now() + interval }
    }

    /// Whether it is time, once each interval.
    fn strikes(&mut self) -> bool {
        let now = Instant::now();
        let time = now >= self.next;
        if time {
            self.next = now + self.interval;
        }
        time
    }
}
