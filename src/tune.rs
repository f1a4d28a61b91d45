//! `cableway tune`: the kernel's knobs, as a profile wants them, and back.
//!
//! Owns the arguments and the table. What is done is `host::tune`, what is set is data: `configs/profiles`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use host::topology::{self, CoreSet};
use host::tune::profile::{BUILT_IN, Profile};
use host::tune::{self, Division, Effect, Line};
use serde::Serialize;

use crate::output::{self, refuse};

/// Set the kernel's knobs for cores that poll, and put everything back.
#[derive(Subcommand)]
pub(crate) enum TuneCommand {
    /// Show each knob, what it holds and what it should; change nothing. Exit status 1 if any differs.
    Check(CheckArgs),
    /// Set what differs. What was there before is saved first, and given back by `restore`, also after a crash. Knobs that the
    /// kernel refuses are told.
    Apply(ApplyArgs),
    /// Put everything back as it was before the first `apply`. Exit status 1 if something could not be.
    Restore(RestoreArgs),
    /// Print what only the kernel's command line can set.
    Cmdline(ProfileArgs),
    /// Write that as a drop-in file of GRUB; `update-grub` and a restart make it work.
    Grub(GrubArgs),
    /// The profiles that there are, or one of them whole.
    Profile(ShowArgs),
}

#[derive(Args)]
pub(crate) struct ProfileArgs {
    /// `nfv`, `realtime`, or a file (TOML).
    #[arg(long, value_name = "NAME", default_value = "nfv")]
    profile: String,
    /// Cores that poll or run vCPUs, such as 2-7.
    #[arg(long, value_name = "CORES")]
    isolate: CoreSet,
}

#[derive(Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    profile: ProfileArgs,
    /// Print it as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(crate) struct ApplyArgs {
    #[command(flatten)]
    profile: ProfileArgs,
    #[command(flatten)]
    place: Place,
    /// Print it as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    place: Place,
    /// Print it as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(crate) struct GrubArgs {
    #[command(flatten)]
    profile: ProfileArgs,
    /// The file to write.
    #[arg(long, value_name = "FILE", default_value = "/etc/default/grub.d/90-cableway.cfg")]
    file: PathBuf,
}

#[derive(Args)]
pub(crate) struct ShowArgs {
    /// One of them; without it, a list.
    name: Option<String>,
}

/// Where it is saved what was there before.
#[derive(Args)]
struct Place {
    /// Directory of what was there before.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/cableway")]
    state_dir: PathBuf,
}

impl Place {
    fn file(&self) -> PathBuf {
        self.state_dir.join("tune.json")
    }
}

/// Runs the subcommand.
///
/// # Errors
/// What went wrong on the way. What is refused before anything was changed is said, and the status is 2.
pub(crate) fn run(command: &TuneCommand) -> Result<ExitCode> {
    let root = Path::new("/");
    match command {
        TuneCommand::Check(args) => match args.profile.load() {
            Ok((profile, division)) => show(&tune::check(root, &profile, &division), args.json, false),
            Err(error) => Ok(refuse(error)),
        },
        TuneCommand::Apply(args) => match args.profile.load() {
            Ok(_) if !nix::unistd::geteuid().is_root() => {
                Ok(refuse("the kernel's knobs are root's: run it as root"))
            }
            Ok((profile, division)) => {
                show(&tune::apply(root, &profile, &division, &args.place.file())?, args.json, false)
            }
            Err(error) => Ok(refuse(error)),
        },
        TuneCommand::Restore(args) => {
            let lines = tune::restore(root, &args.place.file())?;
            if lines.is_empty() && !args.json {
                output::print(&format!(
                    "nothing is saved in {}: nothing to put back\n",
                    args.place.file().display()
                ))?;
                return Ok(ExitCode::SUCCESS);
            }
            show(&lines, args.json, true)
        }
        TuneCommand::Cmdline(args) => match args.load() {
            Ok((profile, division)) => {
                output::print(&(words(&profile, &division) + "\n"))?;
                Ok(ExitCode::SUCCESS)
            }
            Err(error) => Ok(refuse(error)),
        },
        TuneCommand::Grub(args) => match args.profile.load() {
            Ok((profile, division)) => grub(&args.file, &words(&profile, &division)),
            Err(error) => Ok(refuse(error)),
        },
        TuneCommand::Profile(args) => profiles(args.name.as_deref()),
    }
}

impl ProfileArgs {
    fn load(&self) -> Result<(Profile, Division)> {
        let online = topology::online_cores(Path::new("/"))?;
        Ok((Profile::load(&self.profile)?, Division::new(self.isolate.clone(), &online)?))
    }
}

/// Shows what there is or was done. The status is 1 if something is not as it should be and could be.
fn show(lines: &[Line], json: bool, giving_back: bool) -> Result<ExitCode> {
    #[derive(Serialize)]
    struct Report<'l> {
        knobs: &'l [Line],
    }
    if json {
        output::print(&(serde_json::to_string_pretty(&Report { knobs: lines })? + "\n"))?;
    } else {
        output::print(&table(lines))?;
    }
    let bad = |line: &Line| match line.effect {
        Effect::Differs => true,
        // What the kernel did not take was not changed; what it does not take back was.
        Effect::Refused(_) => giving_back,
        _ => false,
    };
    Ok(if lines.iter().any(bad) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn table(lines: &[Line]) -> String {
    let mut table = output::table(&["knob", "now", "wanted", "effect", "file"], &[]);
    for line in lines {
        let effect = match &line.effect {
            Effect::AsWanted => "as wanted".to_owned(),
            Effect::Differs => "differs".to_owned(),
            Effect::Set => "set".to_owned(),
            Effect::GivenBack => "given back".to_owned(),
            Effect::Refused(why) => format!("refused: {why}"),
            Effect::Missing => "not on this machine".to_owned(),
        };
        let file = line.file.display().to_string();
        table.add_row([&line.knob, &line.now, &line.wanted, &effect, &file]);
    }
    format!("{}\n", table.trim_fmt())
}

fn words(profile: &Profile, division: &Division) -> String {
    profile.cmdline.iter().map(|word| division.fill(word)).collect::<Vec<_>>().join(" ")
}

/// GRUB's configuration is a shell script that reads these files in order (Debian, /etc/default/grub.d).
fn grub(file: &Path, words: &str) -> Result<ExitCode> {
    let folder = file.parent().filter(|folder| folder.is_dir());
    if folder.is_none() {
        let hint = "this machine has no GRUB that reads drop-in files; put the words of `cableway tune cmdline` where its boot loader wants them";
        return Ok(refuse(format!("{}: {hint}", file.display())));
    }
    let text = format!(
        "# Written by `cableway tune grub`; remove it and run update-grub to undo it.\nGRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {words}\"\n"
    );
    std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))?;
    output::print(&format!("{}: now update-grub, and restart the machine\n", file.display()))?;
    Ok(ExitCode::SUCCESS)
}

fn profiles(name: Option<&str>) -> Result<ExitCode> {
    let Some(name) = name else {
        let mut table = output::table(&["profile", "knobs", "for"], &[1]);
        for (name, _) in BUILT_IN {
            let profile = Profile::load(name)?;
            table.add_row([(*name).to_owned(), profile.knobs.len().to_string(), profile.about]);
        }
        output::print(&format!("{}\n", table.trim_fmt()))?;
        return Ok(ExitCode::SUCCESS);
    };
    match BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
        Some((_, text)) => {
            // As it is written: with its reasons, and what it extends by name.
            output::print(text)?;
            Ok(ExitCode::SUCCESS)
        }
        None => Ok(refuse(match Profile::load(name) {
            Err(error) => error.to_string(),
            Ok(_) => format!("{name} is a file: read it"),
        })),
    }
}
