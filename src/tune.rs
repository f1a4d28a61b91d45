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
    /// The profiles that there are; or one of them whole, with its reasons.
    #[command(subcommand_required = false)]
    Profile(ProfileCommand),
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
    /// Also say what each knob that differs is good for.
    #[arg(short, long, conflicts_with = "json")]
    verbose: bool,
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
pub(crate) struct ProfileCommand {
    #[command(subcommand)]
    what: Option<ProfileWhat>,
}

#[derive(Subcommand)]
enum ProfileWhat {
    /// The profiles that there are.
    List,
    /// One of them: each knob with its value, why, and who says so.
    Show(ShowArgs),
}

#[derive(Args)]
struct ShowArgs {
    /// `nfv`, `realtime`, or a file (TOML).
    name: String,
    /// Print a built-in profile as it is written, to make one of your own from it.
    #[arg(long)]
    toml: bool,
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
            Ok((profile, division)) => {
                let lines = tune::check(root, &profile, &division);
                let status = show(&lines, args.json, false)?;
                if args.verbose {
                    output::print(&reasons(&profile, &lines))?;
                }
                Ok(status)
            }
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
        TuneCommand::Profile(ProfileCommand { what: None | Some(ProfileWhat::List) }) => profiles(),
        TuneCommand::Profile(ProfileCommand { what: Some(ProfileWhat::Show(args)) }) => profile(args),
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

/// A row for all places of a knob that are alike.
fn table(lines: &[Line]) -> String {
    let mut rows: Vec<([&str; 3], String, Vec<&Line>)> = Vec::new();
    for line in lines {
        let effect = match &line.effect {
            Effect::AsWanted => "as wanted".to_owned(),
            Effect::Differs => "differs".to_owned(),
            Effect::Set => "set".to_owned(),
            Effect::GivenBack => "given back".to_owned(),
            Effect::InUse => "left to others who use it".to_owned(),
            Effect::Refused(_) => "refused".to_owned(),
            Effect::Missing => "not on this machine".to_owned(),
        };
        let head = [line.knob.as_str(), &line.now, &line.wanted];
        match rows.iter_mut().find(|row| row.0 == head && row.1 == effect) {
            Some(row) => row.2.push(line),
            None => rows.push((head, effect, vec![line])),
        }
    }
    // Places of one knob that are not alike come together.
    let mut knobs: Vec<&str> = Vec::new();
    lines.iter().for_each(|line| {
        if !knobs.contains(&line.knob.as_str()) {
            knobs.push(&line.knob);
        }
    });
    rows.sort_by_key(|row| knobs.iter().position(|knob| *knob == row.0[0]));
    let mut table = output::table(&["knob", "now", "wanted", "effect", "where"], &[]);
    let mut reasons: Vec<String> = Vec::new();
    for ([knob, now, wanted], effect, places) in rows {
        for line in &places {
            if let Effect::Refused(why) = &line.effect {
                let reason = format!("{knob} refused: {why}");
                reasons.extend((!reasons.contains(&reason)).then_some(reason));
            }
        }
        let place = places.first().map_or_else(String::new, |line| match &line.thread {
            Some(thread) => format!("{} ({thread})", line.file.display()),
            None => line.file.display().to_string(),
        });
        let more = if places.len() > 1 { format!(" and {} more", places.len() - 1) } else { String::new() };
        table.add_row([knob, now, wanted, &effect, &(place + &more)]);
    }
    let mut text = format!("{}\n", table.trim_fmt());
    reasons.iter().for_each(|reason| text += &format!("\n{reason}\n"));
    text
}

/// What each knob that differs is good for.
fn reasons(profile: &Profile, lines: &[Line]) -> String {
    let differs = |name: &str| lines.iter().any(|line| line.knob == name && line.effect == Effect::Differs);
    let knobs = profile.knobs.iter().filter(|knob| differs(&knob.name));
    knobs.map(|knob| format!("\n{}: {}\n  says {}\n", knob.name, knob.why, knob.source)).collect()
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

fn profiles() -> Result<ExitCode> {
    let mut table = output::table(&["profile", "knobs", "for"], &[1]);
    for (name, _) in BUILT_IN {
        let profile = Profile::load(name)?;
        table.add_row([(*name).to_owned(), profile.knobs.len().to_string(), profile.about]);
    }
    output::print(&format!("{}\n", table.trim_fmt()))?;
    Ok(ExitCode::SUCCESS)
}

/// A profile whole, with what it extends.
fn profile(args: &ShowArgs) -> Result<ExitCode> {
    let profile = match Profile::load(&args.name) {
        Ok(profile) => profile,
        Err(error) => return Ok(refuse(error)),
    };
    if args.toml {
        let Some((_, text)) = BUILT_IN.iter().find(|(built_in, _)| *built_in == args.name) else {
            return Ok(refuse(format!("{} is a file: read it", args.name)));
        };
        output::print(text)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text =
        format!("{}: {}\n\ncommand line: {}\n", args.name, profile.about, profile.cmdline.join(" "));
    for knob in &profile.knobs {
        let (name, value, place, why, source) =
            (&knob.name, knob.value(), knob.place(), &knob.why, &knob.source);
        text += &format!("\n{name} = {value}\n  where: {place}\n  why: {why}\n  source: {source}\n");
    }
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_that_are_alike_share_a_row_and_threads_have_a_name() {
        let line = |knob: &str, file: &str, thread: Option<&str>, now: &str| Line {
            knob: knob.to_owned(),
            file: file.into(),
            thread: thread.map(str::to_owned),
            now: now.to_owned(),
            wanted: "0-1".to_owned(),
            effect: Effect::Differs,
        };
        let text = table(&[
            line("irq", "/proc/irq/1/x", None, "0-3"),
            line("irq", "/proc/irq/2/x", None, "3"),
            line("threads", "/proc/30", Some("kswapd0"), "0-3"),
            line("irq", "/proc/irq/3/x", None, "0-3"),
        ]);
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["irq", "0-3", "0-1", "differs", "/proc/irq/1/x", "and", "1", "more"]);
        assert_eq!(rows[2], ["irq", "3", "0-1", "differs", "/proc/irq/2/x"]);
        assert_eq!(rows[3], ["threads", "0-3", "0-1", "differs", "/proc/30", "(kswapd0)"]);
        assert_eq!(rows.len(), 4);
        let profile = "about = \"\"\n[[knob]]\nname = \"irq\"\npartition = \"\"\nwhy = \"quiet\"\nsource = \"us\"\n\
                       [[knob]]\nname = \"other\"\npartition = \"\"\nwhy = \"w\"\nsource = \"s\"\n";
        let profile = Profile::parse("x", profile).unwrap();
        let differ = [line("irq", "/proc/irq/1/x", None, "0-3")];
        assert_eq!(reasons(&profile, &differ), "\nirq: quiet\n  says us\n");
        let refused =
            Line { effect: Effect::Refused("managed".to_owned()), ..line("irq", "/proc/irq/9/x", None, "3") };
        let text = table(&[refused.clone(), refused]);
        assert!(text.ends_with("\n\nirq refused: managed\n"), "{text}");
    }
}
