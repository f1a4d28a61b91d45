//! `cableway doctor`: what on this machine stands in the way, and how to repair it.
//!
//! Owns the arguments, the checks that need a virtual machine, and the report. The other checks are `host::doctor`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use host::doctor::{Finding, Host, Needs, Outcome, State};
use serde::Serialize;

use crate::output;

/// What on this machine stands in the way of fast packets, and how to repair it. Changes nothing.
///
/// Each check has a name, a state (ok, warning, error, n/a), what was found, and the fix. With a node's FILE (`cableway up`), only
/// what that node needs: its busy cores, cards and machines.
///
/// Exit status, by the worst state: 0 ok; 1 warnings; 3 errors. 2: the file is wrong.
#[derive(Args)]
pub(crate) struct DoctorArgs {
    /// A node's file (TOML).
    file: Option<PathBuf>,
    /// Also say why each check matters.
    #[arg(short, long)]
    verbose: bool,
    /// Print the findings as JSON.
    #[arg(long)]
    json: bool,
}

const WARNINGS: u8 = 1;
const ERRORS: u8 = 3;

/// Guests of an emulator run a few million instructions a second, those of a processor a thousand million.
const EMULATED: f64 = 5e7;

#[derive(Serialize)]
struct Report<'f> {
    worst: State,
    findings: &'f [Finding],
}

/// Checks and reports.
///
/// # Errors
/// The report cannot be written.
pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let (needs, unplanned) = match &args.file {
        None => (Needs::everything(), None),
        Some(file) => match crate::node::needs(file) {
            Ok(needs) => needs,
            Err(errors) => {
                eprintln!("{errors}");
                return Ok(ExitCode::from(output::REFUSED));
            }
        },
    };
    let mut findings = Host::new(Path::new("/"), needs.clone()).findings();
    if let Some(file) = &args.file {
        findings.insert(0, plan(file, &needs, unplanned.map(|errors| errors.to_string())));
    }
    if needs.machines {
        findings.push(kvm());
    }
    let worst = findings.iter().map(|finding| finding.state).max().unwrap_or(State::Ok);
    if args.json {
        let report = Report { worst, findings: &findings };
        output::print(&(serde_json::to_string_pretty(&report)? + "\n"))?;
    } else {
        output::print(&text(&findings, args.verbose))?;
    }
    Ok(match worst {
        State::Error => ExitCode::from(ERRORS),
        State::Warning => ExitCode::from(WARNINGS),
        State::Ok | State::NotApplicable => ExitCode::SUCCESS,
    })
}

/// Whether the file's cores can be had here; without them, all but the first count as busy in what follows.
fn plan(file: &Path, needs: &Needs, unplanned: Option<String>) -> Finding {
    let outcome = match unplanned.as_deref().map(|errors| errors.lines().find(|line| !line.trim().is_empty()))
    {
        None if needs.busy_cores.is_empty() => Outcome::not_applicable("the file names no cores"),
        None => Outcome::ok(format!("{} for workers and vCPUs", needs.busy_cores)),
        Some(first) => Outcome::error(
            first.unwrap_or_default().trim(),
            format!(
                "cableway up {} --plan names everything that is wrong: ask for fewer cores, or use a machine with more",
                file.display()
            ),
        ),
    };
    outcome.named(
        "core-plan",
        "a file's cores are chosen on this machine; where they are not to be had, nothing of it starts",
    )
}

/// Whether there is KVM, and whether a processor runs its guests.
fn kvm() -> Finding {
    let outcome = match vmm::preflight::kvm_is_there() {
        Err(error) => Outcome::error("no KVM", error.to_string()),
        Ok(()) => match vmm::probe::instructions_per_second() {
            Err(error) => Outcome::error(error.to_string(), "see dmesg for what KVM says"),
            Ok(speed) if speed < EMULATED => Outcome::warning(
                format!("emulated: a guest runs {:.1} million instructions a second", speed / 1e6),
                "use a machine whose processor runs guests itself; everything works here, a hundred times slower",
            ),
            Ok(speed) => {
                Outcome::ok(format!("a guest runs {:.1} thousand million instructions a second", speed / 1e9))
            }
        },
    };
    outcome.named("kvm", "virtual machines run on KVM, at the processor's speed if nothing emulates it")
}

/// A table, and under it what to do.
fn text(findings: &[Finding], verbose: bool) -> String {
    let mut table = output::table(&["check", "state", "found"], &[]);
    for finding in findings {
        table.add_row([finding.name, finding.state.word(), &finding.found]);
    }
    let mut text = format!("{}\n", table.trim_fmt());
    let mut bad: Vec<&Finding> = findings.iter().filter(|f| f.state >= State::Warning).collect();
    bad.sort_by_key(|finding| std::cmp::Reverse(finding.state));
    for finding in &bad {
        text += &format!("\n{} {}: {}\n", finding.state.word(), finding.name, finding.found);
        if verbose {
            text += &format!("  why: {}\n", finding.why);
        }
        if let Some(fix) = &finding.fix {
            text += &format!("  fix: {fix}\n");
        }
    }
    let count = |state| findings.iter().filter(|finding| finding.state == state).count();
    let (ok, warnings, errors) = (count(State::Ok), count(State::Warning), count(State::Error));
    text + &format!(
        "\n{ok} ok, {warnings} warnings, {errors} errors, {} not applicable\n",
        count(State::NotApplicable)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_comes_first_and_every_complaint_with_its_fix() {
        let findings = [
            Outcome::ok("fine").named("a", "because of a"),
            Outcome::warning("odd", "turn it").named("b", "because of b"),
            Outcome::error("broken", "mend it").named("c", "because of c"),
        ];
        let brief = text(&findings, false);
        let at = |words: &str| brief.find(words).unwrap_or_else(|| panic!("{words:?} is not in\n{brief}"));
        assert!(at("error c: broken\n  fix: mend it") < at("warning b: odd\n  fix: turn it"));
        assert!(brief.contains("1 ok, 1 warnings, 1 errors, 0 not applicable") && !brief.contains("because"));
        assert!(text(&findings, true).contains("why: because of c"));
    }
}
