//! The tables on the terminal.

use comfy_table::{CellAlignment, Table, presets};

use crate::campaign::Throughput;
use crate::histogram::{Summary, time_or_dash};

use super::Report;

/// All tables of a report, with the notes that belong to them.
pub fn tables(report: &Report) -> String {
    let mut out = format!("{}\n", throughput(report));
    if report.results.iter().any(|r| !r.latency.is_empty()) {
        out += &format!("\n{}\n", latency(report));
    }
    for note in notes(report) {
        out += &format!("{note}\n");
    }
    out
}

/// What a reader must know to not misread the figures.
pub(super) fn notes(report: &Report) -> Vec<String> {
    let mut notes = vec![
        "Sizes are without FCS. Mpps count frames of both directions. Gbit/s are frame bytes; the wire's add 24 bytes of \
         preamble, FCS and gap a frame."
            .to_owned(),
    ];
    let limited: Vec<_> =
        report.results.iter().filter(|r| r.generator_limited()).map(|r| r.size.to_string()).collect();
    if !limited.is_empty() {
        notes.push(format!(
            "* The generator had no time to spare at {} B: the switch may do more than this.",
            limited.join(", ")
        ));
    }
    let corrupt: u64 = report.results.iter().map(|r| r.closed_loop.corrupt).sum();
    if corrupt > 0 {
        notes.push(format!("{corrupt} frames arrived DAMAGED."));
    }
    if report.machine.virtual_machine {
        notes.push(
            "This is a virtual machine: its host may take a core away at any time, which shows in the no-drop rate and the \
             high percentiles. Compare ratios within one run."
                .to_owned(),
        );
    }
    notes.extend(report.ended.iter().map(|why| format!("Ended early: {why}.")));
    notes
}

fn throughput(report: &Report) -> Table {
    let mut table = table(&[
        "size",
        "closed loop",
        "Gbit/s",
        "(wire)",
        "cycles",
        "lost",
        "no-drop",
        "Gbit/s",
        "0.5 % drop",
        "longest burst",
    ]);
    for r in &report.results {
        let c = &r.closed_loop;
        let star = if r.generator_limited() { " *" } else { "" };
        let searched =
            |t: &Option<Throughput>| t.as_ref().map_or("-".into(), |t| format!("{:.2} Mpps", t.rate.mpps));
        let burst = r
            .back_to_back
            .as_ref()
            .map_or("-".into(), |b| format!("{}{}", if b.at_limit { "≥ " } else { "" }, b.frames));
        table.add_row([
            format!("{} B", r.size),
            format!("{:.2} Mpps{star}", c.rate.mpps),
            format!("{:.2}", c.rate.gbit),
            format!("({:.2})", c.rate.gbit_wire),
            c.worker_cycles.map_or("-".into(), |w| format!("{w:.0}")),
            c.lost.to_string(),
            searched(&r.ndr),
            r.ndr.as_ref().map_or("-".into(), |t| format!("{:.2}", t.rate.gbit)),
            searched(&r.pdr),
            burst,
        ]);
    }
    align(table)
}

fn latency(report: &Report) -> Table {
    let mut table =
        table(&["size", "load", "Mpps", "lost", "p50", "p90", "p99", "p99.9", "p99.99", "max", "samples"]);
    for r in &report.results {
        for l in &r.latency {
            let what = [format!("{} B", r.size), format!("{} %", l.percent)];
            table.add_row(
                what.into_iter()
                    .chain([format!("{:.2}", l.rate.mpps), l.lost.to_string()])
                    .chain(times(&l.one_way)),
            );
        }
    }
    align(table)
}

/// Percentiles, maximum and number of samples.
fn times(summary: &Summary) -> impl Iterator<Item = String> {
    let percentiles = summary.percentiles.iter().map(|p| time_or_dash(p.ns));
    percentiles.chain([time_or_dash(summary.max_ns), summary.samples.to_string()])
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    table
}

fn align(mut table: Table) -> Table {
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
        column.set_padding((0, 2));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;

    #[test]
    fn the_tables_show_every_size_and_the_notes_say_what_limits_them() {
        let text = tables(&example());
        for size in ["64 B", "1518 B", "9000 B"] {
            assert!(text.contains(size), "{text}");
        }
        assert!(text.contains("The generator had no time to spare at 64"), "{text}");
        assert!(text.contains("without FCS"));
        println!("{text}");
    }

    #[test]
    fn what_was_not_measured_is_a_dash() {
        let mut report = example();
        for r in &mut report.results {
            (r.ndr, r.pdr, r.back_to_back, r.closed_loop.worker_cycles) = (None, None, None, None);
            r.latency.clear();
        }
        let text = tables(&report);
        let row = text.lines().find(|l| l.contains("128 B")).unwrap();
        assert_eq!(row.split_whitespace().filter(|w| *w == "-").count(), 5, "{row}");
        assert!(!text.contains("p99.9"));
    }
}
