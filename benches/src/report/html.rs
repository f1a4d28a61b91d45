//! The page: one file, nothing loaded from elsewhere, readable without scripts.

use crate::campaign::{SizeResult, Throughput};
use crate::histogram::{time, time_or_dash};

use super::Report;
use super::chart::{Chart, Scale, Series, escape};
use super::table::notes;

const CLOSED: &str = "#8a8f98";
const PARTIAL: &str = "#e08a1e";
const NO_DROP: &str = "#1f6fd6";
const LOADS: [&str; 3] = ["#7fb8e6", "#2f7fd1", "#123f7a"];

/// How every page looks.
pub(super) const STYLE: &str = "\
:root{color-scheme:light}\
body{font:15px/1.5 system-ui,sans-serif;color:#1c2024;background:#fff;max-width:1360px;margin:2rem auto;padding:0 1.5rem}\
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}\
.subject{color:#555b63;margin:.2rem 0 1.4rem}code{font-family:ui-monospace,monospace;font-size:.93em}\
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:1rem 1.6rem}\
svg{width:100%;height:auto;font-family:system-ui,sans-serif}\
.title{font-size:14px;font-weight:600;fill:#1c2024}.label{font-size:12px;fill:#555b63}\
.tick,.legend{font-size:11.5px;fill:#3a4047}.grid{stroke:#e6e8eb}.axis{stroke:#8a8f98}\
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.93rem}\
th,td{text-align:right;padding:.28rem .8rem;border-bottom:1px solid #e6e8eb;white-space:nowrap}\
th{font-weight:600;color:#3a4047;border-bottom:2px solid #c9cdd2}.facts th,.facts td{text-align:left;white-space:normal}\
.facts th{border-bottom:1px solid #e6e8eb}.scroll{overflow-x:auto}\
.notes{color:#555b63;max-width:60rem}";

/// The whole page.
pub fn page(report: &Report) -> String {
    let title = "Switch measurement";
    let mut charts = vec![throughput_chart(report, "Throughput", "million frames a second", |t| t.mpps)];
    charts.push(throughput_chart(report, "Throughput in bits", "Gbit/s of frame bytes", |t| t.gbit));
    charts.extend(report.results.iter().filter(|r| !r.latency.is_empty()).map(latency_chart));
    let charts: String = charts.iter().map(|c| format!("<div>{}</div>", c.svg())).collect();
    let notes: String = notes(report).iter().map(|n| format!("<p>{}</p>", escape(n))).collect();
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title}: {subject}</title>\
         <style>{STYLE}</style></head><body><h1>{title}</h1><p class=\"subject\"><code>{subject}</code></p>\
         <div class=\"charts\">{charts}</div>\
         <h2>Throughput</h2><div class=\"scroll\">{}</div>\
         {}<div class=\"notes\">{notes}</div>\
         <h2>How it was measured</h2>{}</body></html>\n",
        throughput_table(report),
        latency_table(report),
        facts(report),
        subject = escape(&report.subject),
    )
}

fn throughput_chart(
    report: &Report,
    title: &str,
    y_label: &str,
    value: fn(&crate::campaign::Rate) -> f64,
) -> Chart {
    let n = report.results.len();
    // A category for each size, half a step from the edges.
    let place = |i: usize| (i as f64 + 0.5) / n.max(1) as f64;
    let series = |name: &str, color, dashed, of: &dyn Fn(&SizeResult) -> Option<f64>| Series {
        name: name.into(),
        color,
        dashed,
        points: report.results.iter().enumerate().filter_map(|(i, r)| Some((place(i), of(r)?))).collect(),
        dots: true,
    };
    let searched = |t: &Option<Throughput>| t.as_ref().map(|t| value(&t.rate));
    let all = [
        series("closed loop", CLOSED, true, &|r| Some(value(&r.closed_loop.rate))),
        series("0.5 % drop", PARTIAL, false, &|r| searched(&r.pdr)),
        series("no drop", NO_DROP, false, &|r| searched(&r.ndr)),
    ];
    Chart {
        title: title.into(),
        x_label: "frame size, bytes without FCS".into(),
        y_label: y_label.into(),
        x_ticks: report.results.iter().enumerate().map(|(i, r)| (place(i), r.size.to_string())).collect(),
        y_scale: Scale::Linear,
        y_text: |v| if v.fract().abs() < 1e-9 { format!("{v:.0}") } else { format!("{v:.1}") },
        series: all.into_iter().filter(|s| !s.points.is_empty()).collect(),
    }
}

/// Time by percentile: each step to the right is one in ten of the frames to the left.
fn latency_chart(r: &SizeResult) -> Chart {
    let decades = 4.0;
    let place = |percent: f64| (-(1.0 - percent / 100.0).log10() / decades).clamp(0.0, 1.0);
    let ticks = [(0.0, "0"), (50.0, "p50"), (90.0, "p90"), (99.0, "p99"), (99.9, "p99.9"), (99.99, "p99.99")];
    let series = r.latency.iter().zip(LOADS).map(|(l, color)| Series {
        name: format!("{} % load ({:.2} Mpps)", l.percent, l.rate.mpps),
        color,
        dashed: false,
        points: l.curve.iter().filter(|p| p.0 <= 99.991).map(|p| (place(p.0), p.1)).collect(),
        dots: false,
    });
    Chart {
        title: format!("Latency at {} bytes, one way", r.size),
        x_label: "percentile of frames".into(),
        y_label: "from due to received".into(),
        x_ticks: ticks.map(|(p, text)| (place(p), text.to_owned())).into(),
        y_scale: Scale::Log,
        y_text: round_time,
        series: series.collect(),
    }
}

/// A time without the digits that a round one does not need.
pub(super) fn round_time(ns: f64) -> String {
    let text = time(ns);
    match text.split_once(' ') {
        Some((value, unit)) if value.contains('.') => {
            format!("{} {unit}", value.trim_end_matches('0').trim_end_matches('.'))
        }
        _ => text,
    }
}

fn throughput_table(report: &Report) -> String {
    let head = [
        "Size",
        "Closed loop, Mpps",
        "Gbit/s",
        "Gbit/s on a wire",
        "Cycles a frame",
        "Lost",
        "No drop, Mpps",
        "Gbit/s",
        "0.5 % drop, Mpps",
        "Longest burst",
    ];
    let rows = report.results.iter().map(|r| {
        let c = &r.closed_loop;
        let star = if r.generator_limited() { " *" } else { "" };
        let number = |v: Option<f64>, digits: usize| v.map_or("-".into(), |v| format!("{v:.digits$}"));
        vec![
            format!("{} B", r.size),
            format!("{:.2}{star}", c.rate.mpps),
            format!("{:.2}", c.rate.gbit),
            format!("{:.2}", c.rate.gbit_wire),
            number(c.worker_cycles, 0),
            c.lost.to_string(),
            number(r.ndr.as_ref().map(|t| t.rate.mpps), 2),
            number(r.ndr.as_ref().map(|t| t.rate.gbit), 2),
            number(r.pdr.as_ref().map(|t| t.rate.mpps), 2),
            r.back_to_back
                .as_ref()
                .map_or("-".into(), |b| format!("{}{}", if b.at_limit { "≥ " } else { "" }, b.frames)),
        ]
    });
    table(&head, rows)
}

fn latency_table(report: &Report) -> String {
    if report.results.iter().all(|r| r.latency.is_empty()) {
        return String::new();
    }
    let head = ["Size", "Load", "Mpps", "Lost", "p50", "p90", "p99", "p99.9", "p99.99", "Max", "Samples"];
    let rows = report.results.iter().flat_map(|r| {
        r.latency.iter().map(|l| {
            let mut row = vec![
                format!("{} B", r.size),
                format!("{} %", l.percent),
                format!("{:.2}", l.rate.mpps),
                l.lost.to_string(),
            ];
            row.extend(l.one_way.percentiles.iter().map(|p| time_or_dash(p.ns)));
            row.extend([time_or_dash(l.one_way.max_ns), l.one_way.samples.to_string()]);
            row
        })
    });
    format!("<h2>Latency, one way</h2><div class=\"scroll\">{}</div>", table(&head, rows))
}

fn facts(report: &Report) -> String {
    let plan = &report.plan;
    let mut facts = report.ports.clone();
    facts.push(("Trials", format!("{} s each, {} addresses behind each port", plan.seconds, plan.addresses)));
    facts.push(("Closed loop", format!("{} frames in flight", plan.in_flight)));
    facts.extend(report.machine.lines());
    let row = |(k, v): &(&str, String)| format!("<tr><th>{}</th><td>{}</td></tr>", escape(k), escape(v));
    format!("<table class=\"facts\">{}</table>", facts.iter().map(row).collect::<String>())
}

/// A table: its head and its rows.
pub(super) fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let cells = |tag: &str, cells: &mut dyn Iterator<Item = &str>| {
        cells.map(|c| format!("<{tag}>{}</{tag}>", escape(c))).collect::<String>()
    };
    let head = cells("th", &mut head.iter().copied());
    let rows: String =
        rows.map(|r| format!("<tr>{}</tr>", cells("td", &mut r.iter().map(String::as_str)))).collect();
    format!("<table><tr>{head}</tr>{rows}</table>")
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;

    #[test]
    fn the_page_stands_alone_and_escapes_what_it_was_given() {
        let page = page(&example());
        assert!(page.contains("configs/&lt;vv&gt; &amp; &quot;co&quot;.toml"));
        assert!(!page.contains("<vv>"));
        for outside in ["http://", "https://", "<script", "<link", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert_eq!(page.matches("<svg").count(), 2 + 8);
        // CABLEWAY_PAGE=FILE keeps the page, to look at it.
        if let Ok(path) = std::env::var("CABLEWAY_PAGE") {
            std::fs::write(path, page).unwrap();
        }
    }

    #[test]
    fn a_report_without_searches_or_results_is_still_a_page() {
        let mut report = example();
        report.results.clear();
        assert!(page(&report).ends_with("</html>\n"));
    }
}
