//! How quiet cores are: as tables for a terminal, and as a page with the curves.

use std::collections::BTreeMap;

use comfy_table::{CellAlignment, Table, presets};

use crate::histogram::{time, time_or_dash};
use crate::quiet::jitter::Gap;
use crate::quiet::{CoreResult, PERCENTILES, Planned, Report, Test};

use super::chart::{Chart, Scale, Series, escape};
use super::html;

const COLORS: [&str; 8] =
    ["#1f6fd6", "#e08a1e", "#3a9d5d", "#b5473c", "#7a5bc2", "#8a8f98", "#139aa8", "#c25b9a"];

/// Interrupts that are named for each core; the rest is in the JSON.
const NAMED: usize = 4;

/// Everything for a terminal.
pub fn tables(report: &Report) -> String {
    let mut text = String::new();
    for &planned in &report.plan.tests {
        let test = planned.test;
        let results: Vec<&CoreResult> = of(report, test).collect();
        if results.is_empty() {
            continue;
        }
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header(head(test));
        results.iter().for_each(|r| {
            table.add_row(row(r));
        });
        table.column_iter_mut().for_each(|c| c.set_cell_alignment(CellAlignment::Right));
        text += &format!("{}\n\n{}\n\n", title(report, planned), table.trim_fmt());
        results.iter().for_each(|r| text += &format!("  {}\n", disturbed(report, r)));
        if let Some(lengths) = lengths(&results) {
            text += &format!("\n{lengths}\n");
        }
        text.push('\n');
    }
    notes(report).iter().for_each(|note| text += &format!("{note}\n"));
    text
}

/// The whole page.
pub fn page(report: &Report) -> String {
    let measured = report.plan.tests.iter().filter(|p| of(report, p.test).next().is_some());
    let gaps = of(report, Test::Jitter).any(|r| r.gaps.as_ref().is_some_and(|gaps| gaps.count > 0));
    let charts = measured.map(|p| chart(report, p.test)).chain(gaps.then(|| gap_chart(report)));
    let charts: String = charts.map(|chart| format!("<div>{}</div>", chart.svg())).collect();
    let sections: String = report.plan.tests.iter().map(|&planned| section(report, planned)).collect();
    let notes: String = notes(report).iter().map(|n| format!("<p>{}</p>", escape(n))).collect();
    let facts: String = report
        .machine
        .lines()
        .iter()
        .map(|(k, v)| format!("<tr><th>{}</th><td>{}</td></tr>", escape(k), escape(v)))
        .collect();
    let style = html::STYLE;
    let title = "Latency of cores";
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title>\
         <style>{style}</style></head><body><h1>{title}</h1><p class=\"subject\">{}</p>\
         <div class=\"charts\">{charts}</div>{sections}<div class=\"notes\">{notes}</div>\
         <h2>How it was measured</h2><table class=\"facts\">{facts}</table></body></html>\n",
        escape(&report.machine.cpu),
    )
}

fn of(report: &Report, test: Test) -> impl Iterator<Item = &CoreResult> {
    report.results.iter().filter(move |r| r.test == test)
}

fn title(report: &Report, planned: Planned) -> String {
    let plan = &report.plan;
    let threads = planned.priority.map_or("ordinary threads".to_owned(), |p| format!("SCHED_FIFO {p}"));
    match planned.test {
        Test::Wakeup => {
            format!(
                "How late a timer wakes a thread (every {}, {} s, {threads})",
                round(plan.interval_ns),
                plan.seconds
            )
        }
        Test::Jitter => format!("Passes of a busy loop ({} s, {threads})", plan.seconds),
    }
}

fn head(test: Test) -> Vec<&'static str> {
    let mut head = vec!["core", if test == Test::Wakeup { "wake-ups" } else { "passes" }, "min"];
    head.extend(PERCENTILES.map(|p| p.0));
    head.push("max");
    if test == Test::Jitter {
        head.extend(["gaps", "lost"]);
    }
    head
}

fn row(r: &CoreResult) -> Vec<String> {
    let mut row = vec![r.core.to_string(), r.times.samples.to_string(), time_or_dash(r.times.min_ns)];
    row.extend(r.times.percentiles.iter().map(|p| time_or_dash(p.ns)));
    row.push(time_or_dash(r.times.max_ns));
    if let Some(gaps) = &r.gaps {
        row.extend([gaps.count.to_string(), format!("{:.0} ppm", gaps.lost_ppm)]);
    }
    row
}

/// How many gaps of each length a core had: a row for each length, a column for each core, and the longest.
fn lengths(results: &[&CoreResult]) -> Option<String> {
    let mut rows: BTreeMap<u64, (BTreeMap<u32, u64>, f64)> = BTreeMap::new();
    for (r, gaps) in results.iter().filter_map(|r| Some((r, r.gaps.as_ref()?))) {
        for length in &gaps.lengths {
            let row = rows.entry(length.from_ns).or_default();
            row.0.insert(r.core, length.count);
            row.1 = row.1.max(length.worst_ns);
        }
    }
    if rows.is_empty() {
        return None;
    }
    let mut table = Table::new();
    let cores = results.iter().map(|r| format!("core {}", r.core));
    table
        .load_preset(presets::NOTHING)
        .set_header(std::iter::once("gaps from".to_owned()).chain(cores).chain(["longest".to_owned()]));
    for (from, (counts, worst)) in rows {
        let counts = results.iter().map(|r| counts.get(&r.core).map_or("-".to_owned(), u64::to_string));
        table.add_row(std::iter::once(round(from)).chain(counts).chain([time(worst)]));
    }
    table.column_iter_mut().for_each(|c| c.set_cell_alignment(CellAlignment::Right));
    Some(table.trim_fmt())
}

/// The most frequent of what was counted, by name.
fn frequent(counts: &BTreeMap<String, u64>, others: &str) -> Vec<String> {
    let mut counts: Vec<_> = counts.iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let rest: u64 = counts.iter().skip(NAMED).map(|(_, count)| **count).sum();
    let named = counts.iter().take(NAMED).map(|(name, count)| format!("{count} x {name}"));
    named.chain((rest > 0).then(|| format!("{rest} {others}"))).collect()
}

/// What happened on the core meanwhile, the most frequent first.
fn disturbed(report: &Report, r: &CoreResult) -> String {
    let d = &r.disturbance;
    let mut what = frequent(&d.interrupts, "other interrupts");
    if d.smis.is_some_and(|smis| smis > 0) {
        what.push(format!("{} SMIs of the firmware", d.smis.unwrap_or(0)));
    }
    what.push(format!("taken away {} times", d.involuntary_switches));
    if d.stolen_ms > 0 {
        what.push(format!("{} ms stolen by this virtual machine's host", d.stolen_ms));
    }
    let mut text = format!("core {}: {}", r.core, what.join(", "));
    if !d.threads.is_empty() {
        text += &format!("\n          ran there: {}", frequent(&d.threads, "times others").join(", "));
    }
    if !d.softirqs.is_empty() {
        text += &format!("\n          softirqs: {}", frequent(&d.softirqs, "others").join(", "));
    }
    let worst = r.gaps.as_ref().map_or(&[][..], |gaps| &gaps.worst);
    let told = |g: &Gap| format!("{} at {:.3} s", time(g.ns), g.at_s);
    if worst.iter().any(|gap| !gap.by.is_empty()) {
        for gap in worst {
            text += &format!("\n          {}: {}", told(gap), gap.by.join(", "));
        }
    } else if !worst.is_empty() {
        let worst: Vec<String> = worst.iter().map(told).collect();
        text +=
            &format!("\n          longest gaps (from {}): {}", round(report.plan.gap_ns), worst.join(", "));
    }
    text
}

fn notes(report: &Report) -> Vec<String> {
    let mut notes: Vec<String> = report.without.clone();
    if report.machine.virtual_machine {
        notes.push(
            "A virtual machine: its host may pause a core at any time, and counts no interrupt for it here."
                .into(),
        );
    }
    // A gap that no interrupt and no switch can explain was made below the kernel.
    for r in of(report, Test::Jitter) {
        let gaps = r.gaps.as_ref().map_or(0, |g| g.count);
        let known: u64 = r.disturbance.interrupts.values().sum::<u64>() + r.disturbance.involuntary_switches;
        if gaps > known {
            let below = match r.disturbance.smis {
                Some(0) => {
                    "a hypervisor, or the other thread of the core; the processor counted no SMI".to_owned()
                }
                Some(smis) => {
                    format!("{smis} SMIs of the firmware, a hypervisor, or the other thread of the core")
                }
                None => "a hypervisor, firmware's SMIs, or the other thread of the core".to_owned(),
            };
            notes.push(format!(
                "core {}: {gaps} gaps but only {known} interrupts and switches: the others came from below the kernel ({below}).",
                r.core
            ));
        }
    }
    if report.interrupted {
        notes.push("Interrupted: this is what there was until then.".into());
    }
    if let Some(limit) = report.plan.limit_ns {
        let beyond: Vec<String> = report
            .beyond_limit()
            .map(|r| {
                let what = if r.test == Test::Wakeup { "wake-up" } else { "gap" };
                format!("core {} ({what} {})", r.core, time_or_dash(r.times.max_ns))
            })
            .collect();
        notes.push(match beyond.is_empty() {
            true => format!("Limit {}: kept.", round(limit)),
            false => format!("Limit {}: EXCEEDED by {}.", round(limit), beyond.join(", ")),
        });
    }
    notes
}

fn section(report: &Report, planned: Planned) -> String {
    let test = planned.test;
    if of(report, test).next().is_none() {
        return String::new();
    }
    let rows = of(report, test).map(row);
    let disturbed: String = of(report, test)
        .map(|r| format!("<p>{}</p>", escape(&disturbed(report, r)).replace('\n', "<br>")))
        .collect();
    format!(
        "<h2>{}</h2><div class=\"scroll\">{}</div><div class=\"notes\">{disturbed}</div>",
        escape(&title(report, planned)),
        html::table(&head(test), rows)
    )
}

/// Time by percentile: each step to the right is one in ten of what is to the left.
fn chart(report: &Report, test: Test) -> Chart {
    let decades = 5.0;
    let place = |percent: f64| (-(1.0 - percent / 100.0).log10() / decades).clamp(0.0, 1.0);
    let ticks = std::iter::once((0.0, "0")).chain(PERCENTILES.map(|(name, percent)| (place(percent), name)));
    let series = of(report, test).zip(COLORS.iter().cycle()).map(|(r, color)| Series {
        name: format!("core {}", r.core),
        color,
        dashed: false,
        points: r.curve.iter().filter(|p| p.0 <= 99.9991).map(|p| (place(p.0), p.1.max(1.0))).collect(),
        dots: false,
    });
    Chart {
        title: if test == Test::Wakeup { "Timer wake-ups" } else { "Busy loop" }.into(),
        x_label: "percentile".into(),
        y_label: if test == Test::Wakeup { "late by" } else { "time of a pass" }.into(),
        x_ticks: ticks.map(|(at, name)| (at, name.to_owned())).collect(),
        y_scale: Scale::Log,
        y_text: html::round_time,
        series: series.collect(),
    }
}

/// How many gaps of each length: as many as the busy loop had, in the places of its lengths.
fn gap_chart(report: &Report) -> Chart {
    let decades = 6.0;
    // From 1 µs to 1 s.
    let place = |ns: f64| ((ns.max(1.0) / 1e3).log10() / decades).clamp(0.0, 1.0);
    let series = of(report, Test::Jitter).zip(COLORS.iter().cycle()).map(|(r, color)| Series {
        name: format!("core {}", r.core),
        color,
        dashed: false,
        points: r
            .gaps
            .iter()
            .flat_map(|g| &g.lengths)
            .map(|l| (place(l.from_ns as f64), l.count as f64))
            .collect(),
        dots: true,
    });
    let ticks = (0..=6).map(|decade| 1e3 * 10f64.powi(decade));
    Chart {
        title: "Gaps".into(),
        x_label: "at least so long".into(),
        y_label: "how many".into(),
        x_ticks: ticks.map(|ns| (place(ns), html::round_time(ns))).collect(),
        y_scale: Scale::Log,
        y_text: |count| format!("{count:.0}"),
        series: series.collect(),
    }
}

/// A time that somebody chose, without digits that it does not need.
fn round(ns: u64) -> String {
    html::round_time(ns as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::histogram::Latencies;
    use crate::machine::Machine;
    use crate::quiet::Plan;
    use crate::quiet::disturbance::Disturbance;
    use crate::quiet::jitter::{Gaps, Lengths};

    fn result(test: Test, core: u32) -> CoreResult {
        let clock = Clock { hz: 1e9 };
        let mut times = Latencies::default();
        (0..2_000_000u64).for_each(|i| times.record(50 + i % 7));
        times.record(12_000);
        CoreResult {
            test,
            core,
            times: times.summary_of(&PERCENTILES, &clock),
            curve: times.curve(&clock),
            gaps: (test == Test::Jitter).then(|| Gaps {
                count: 7,
                lost_ppm: 6.2,
                worst: vec![Gap { at_s: 1.5, ns: 12_000.0, ..Gap::default() }],
                lengths: vec![
                    Lengths { from_ns: 1_000, count: 6, worst_ns: 1_900.0 },
                    Lengths { from_ns: 10_000, count: 1, worst_ns: 12_000.0 },
                ],
            }),
            disturbance: Disturbance {
                interrupts: [("LOC: Local <timer>".to_owned(), 3), ("RES: Rescheduling".to_owned(), 1)]
                    .into(),
                softirqs: [("TIMER".to_owned(), 2)].into(),
                threads: [("kworker/2:1".to_owned(), 4)].into(),
                smis: None,
                involuntary_switches: 2,
                stolen_ms: 30,
                ..Default::default()
            },
        }
    }

    #[test]
    fn a_traced_gap_is_told_with_its_cause_and_counted_smis_are_named() {
        let mut report = example();
        for r in &mut report.results {
            r.disturbance.smis = Some(3);
            r.gaps
                .iter_mut()
                .flat_map(|gaps| &mut gaps.worst)
                .for_each(|gap| gap.by = vec!["timer".into(), "thread x".into()]);
        }
        let text = tables(&report);
        assert!(
            text.contains("\n          12.0 µs at 1.500 s: timer, thread x\n")
                && !text.contains("longest gaps"),
            "{text}"
        );
        assert!(
            text.contains("3 SMIs of the firmware, taken away 2")
                && text.contains("(3 SMIs of the firmware,"),
            "{text}"
        );
    }

    fn example() -> Report {
        let tests = [Test::Wakeup, Test::Jitter];
        Report {
            plan: Plan {
                cores: vec![2, 3],
                seconds: 10.0,
                tests: tests.map(|test| Planned { test, priority: Some(95) }).into(),
                interval_ns: 200_000,
                gap_ns: 1_000,
                limit_ns: Some(10_000),
                trace: false,
            },
            machine: Machine::read(std::path::Path::new("/")),
            without: vec![],
            results: tests.into_iter().flat_map(|t| [result(t, 2), result(t, 3)]).collect(),
            interrupted: false,
        }
    }

    #[test]
    fn the_tables_name_the_worst_the_disturber_and_the_verdict() {
        let text = tables(&example());
        for part in [
            "every 200 µs, 10 s, SCHED_FIFO 95",
            "p99.999",
            "12.0 µs",
            "3 x LOC: Local <timer>, 1 x RES",
            "taken away 2 times, 30 ms stolen",
            "longest gaps (from 1 µs): 12.0 µs at 1.500 s",
            "ran there: 4 x kworker/2:1",
            "softirqs: 2 x TIMER",
            "gaps from  core 2  core 3  longest",
            "10 µs       1       1  12.0 µs",
            "core 2: 7 gaps but only 6 interrupts and switches",
            "Limit 10 µs: EXCEEDED by core 2 (wake-up 12.0 µs), core 3",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        let kept = Report { plan: Plan { limit_ns: Some(20_000), ..example().plan }, ..example() };
        assert!(tables(&kept).contains("Limit 20 µs: kept."));
    }

    #[test]
    fn the_page_stands_alone_with_a_chart_for_each_test() {
        let page = page(&example());
        // And one of the gaps.
        assert_eq!(page.matches("<svg").count(), 3);
        assert!(page.contains("Local &lt;timer&gt;") && !page.contains("<timer>"));
        for outside in ["http://", "https://", "<script", "<link", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
    }
}
