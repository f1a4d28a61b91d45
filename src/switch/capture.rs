//! `cableway switch capture`: the frames of one port of a running switch, into a file that Wireshark reads.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use control::client::{self, ClientError};
use switch::control::report::CaptureReport;

use super::Place;
use super::ask::seconds;
use crate::output;

/// How often frames are fetched: the switch keeps 4 MiB for us until then.
const FETCH: Duration = Duration::from_millis(50);

const FILTER_HELP: &str = "Only these frames: tcp, udp, icmp, icmp6, arp, ip, ip6, vlan [ID], [src|dst] host IP, [src|dst] port \
    N, ether src|dst|host MAC, broadcast, multicast, joined with `and`, `or`, `not` and parentheses. Looks at the first 64 bytes of \
    a frame";

#[derive(Args)]
pub(super) struct CaptureArgs {
    /// The port.
    port: String,
    /// The file to write (pcapng); `-`: standard output, as for `| wireshark -k -i -`.
    #[arg(short, long, value_name = "FILE")]
    write: PathBuf,
    // Not a comment of documentation: rustdoc takes the brackets for links.
    #[arg(long, value_name = "EXPRESSION", default_value = "", hide_default_value = true, help = FILTER_HELP)]
    filter: String,
    /// Keep at most so many bytes of each frame.
    #[arg(long, value_name = "BYTES", default_value_t = 65_557, value_parser = clap::value_parser!(u32).range(14..=65_557))]
    snaplen: u32,
    /// End after so many seconds [default: at Ctrl-C].
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    seconds: Option<Duration>,
    #[command(flatten)]
    place: Place,
}

/// Captures until Ctrl-C, or until the time is up.
///
/// # Errors
/// There is no such switch or port, the filter is not understood, or the file cannot be written.
pub(super) fn run(args: &CaptureArgs) -> Result<()> {
    let run_dir = control::run_dir_of_client(args.place.run_dir.as_deref())?;
    let stop = crate::interrupt::flag()?;
    let query = format!(
        "/v1/captures?port={}&longest={}&filter={}",
        control::encoded(&args.port),
        args.snaplen,
        control::encoded(&args.filter)
    );
    let mut out: Box<dyn Write> = if args.write.as_os_str() == "-" {
        if io::stdout().is_terminal() {
            bail!("frames are no text: give a file to --write, or pipe the output into a program");
        }
        Box::new(io::stdout())
    } else {
        // Not before the switch has agreed: a mistake must not empty a file.
        Box::new(io::sink())
    };
    let begun = client::post::<CaptureReport>(&switch::control::door(&run_dir), &query)?.value;
    let path = format!("/v1/captures/{}", begun.id);
    let written = (|| {
        if args.write.as_os_str() != "-" {
            out = Box::new(File::create(&args.write)?);
        }
        let start = Instant::now();
        loop {
            let ending =
                stop.load(Ordering::Relaxed) || args.seconds.is_some_and(|most| start.elapsed() >= most);
            match client::get_bytes(&switch::control::door(&run_dir), &path) {
                Ok(blocks) => out.write_all(&blocks)?,
                Err(error) => break Ok(Some(error)),
            }
            out.flush()?;
            if ending {
                break Ok(None);
            }
            std::thread::sleep(FETCH);
        }
    })();
    let ended = client::delete::<CaptureReport>(&switch::control::door(&run_dir), &path);
    match written {
        // Whoever read what we wrote has seen enough.
        Err(error) if io::Error::kind(&error) == io::ErrorKind::BrokenPipe => {}
        Err(error) => return Err(error).with_context(|| format!("writing {}", args.write.display())),
        Ok(Some(ClientError::NotRunning(_))) => {
            bail!("the switch ended; what came until then is in {}", args.write.display())
        }
        Ok(Some(error)) => return Err(error.into()),
        Ok(None) => {}
    }
    let report = ended?.value;
    let (captured, missed) = (output::grouped(report.captured), output::grouped(report.missed));
    eprintln!("{captured} frames of port {} captured, {missed} beyond the budget not", report.port);
    Ok(())
}
