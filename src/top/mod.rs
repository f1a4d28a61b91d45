//! `cableway top`: what a node does at the moment, in a terminal.
//!
//! Owns the arguments, the terminal and the rhythm. Looks and changes nothing: whoever may read /proc and ask the switch's control socket
//! may use it.

mod sample;
mod screen;
mod view;

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use crate::output::{self, refuse};
use sample::Sample;
use screen::Screen;
use view::View;

/// Show what a node does: cores, workers, ports with rates and drops, virtual machines with steal and exits.
///
/// Keys as in htop: F6 sorts, arrows scroll, space pauses, ? helps, q ends. Works with a switch, machines, both or none of them; what is not
/// there is said.
#[derive(Args)]
pub(crate) struct TopArgs {
    /// Where the switch runs [default: /run/cableway, or $XDG_RUNTIME_DIR/cableway when not root].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Seconds between two looks.
    #[arg(long, short = 'd', default_value_t = 1.0, value_parser = seconds)]
    interval: f64,
    /// Print one plain table, of what happened during one interval.
    #[arg(long)]
    once: bool,
    /// Print it as JSON.
    #[arg(long, requires = "once")]
    json: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "a number of seconds".to_owned())?;
    if (0.1..=3_600.0).contains(&number) { Ok(number) } else { Err("from 0.1 to 3600".to_owned()) }
}

/// Shows it until the user has seen enough.
///
/// # Errors
/// The terminal cannot be used.
pub(crate) fn run(args: &TopArgs) -> Result<ExitCode> {
    let run_dir = match control::run_dir_of_client(args.run_dir.as_deref()) {
        Ok(run_dir) => run_dir,
        Err(error) => return Ok(refuse(error)),
    };
    let interval = Duration::from_secs_f64(args.interval);
    let mut before = Sample::take(&run_dir);
    if args.once {
        std::thread::sleep(interval);
        let view = View::between(&before, &Sample::take(&run_dir));
        let json = || serde_json::to_string_pretty(&view).map(|json| json + "\n");
        output::print(&if args.json { json()? } else { view.text() })?;
        return Ok(ExitCode::SUCCESS);
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Ok(refuse("this is no terminal: cableway top --once prints a plain table"));
    }
    // The terminal is given back as it was, also when a panic or an error ends this.
    let mut terminal = ratatui::try_init().context("using this terminal")?;
    let mut shown = || -> Result<()> {
        let mut screen = Screen::new();
        let mut view = View::between(&before, &before);
        let mut next = Instant::now() + interval.min(Duration::from_millis(300));
        loop {
            terminal.draw(|frame| screen.draw(frame, &view))?;
            if event::poll(next.saturating_duration_since(Instant::now()))?
                && let Event::Key(key) = event::read()?
                && key.kind == KeyEventKind::Press
            {
                let interrupted =
                    key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                if interrupted || screen.key(key.code) {
                    return Ok(());
                }
            }
            if Instant::now() >= next {
                next = Instant::now() + interval;
                let now = Sample::take(&run_dir);
                if !screen.paused {
                    view = View::between(&before, &now);
                    screen.remember(&view);
                }
                before = now;
            }
        }
    };
    let done = shown();
    ratatui::restore();
    done.map(|()| ExitCode::SUCCESS)
}
