//! Line charts as inline SVG: axes with units, a grid, a legend. Knows nothing of what is drawn.

use std::fmt::Write;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 28.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 50.0;

/// A line.
pub(super) struct Series {
    pub(super) name: String,
    pub(super) color: &'static str,
    pub(super) dashed: bool,
    /// Positions: x from 0 to 1, y in the unit of the axis.
    pub(super) points: Vec<(f64, f64)>,
    /// Whether each point gets a dot.
    pub(super) dots: bool,
}

/// How y grows.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Scale {
    /// From zero.
    Linear,
    /// By factors of ten.
    Log,
}

/// A chart.
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) x_label: String,
    pub(super) y_label: String,
    /// Labels below the x axis: position from 0 to 1, text.
    pub(super) x_ticks: Vec<(f64, String)>,
    pub(super) y_scale: Scale,
    /// How a value on the y axis is written.
    pub(super) y_text: fn(f64) -> String,
    pub(super) series: Vec<Series>,
}

/// Text that is safe between tags and in attributes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

impl Chart {
    /// The chart as an `<svg>` element.
    pub(super) fn svg(&self) -> String {
        let mut s = String::new();
        let ticks = self.y_ticks();
        // Writing to a String cannot fail.
        let _ = write!(
            s,
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\
             <text x=\"{LEFT}\" y=\"16\" class=\"title\">{}</text>",
            escape(&self.title),
            escape(&self.title)
        );
        self.grid(&mut s, &ticks);
        for series in &self.series {
            self.line(&mut s, series, &ticks);
        }
        self.legend(&mut s);
        s.push_str("</svg>");
        s
    }

    fn x(&self, position: f64) -> f64 {
        LEFT + position.clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64, ticks: &[f64]) -> f64 {
        let (Some(&low), Some(&high)) = (ticks.first(), ticks.last()) else { return HEIGHT - BOTTOM };
        let place = match self.y_scale {
            Scale::Linear => (value - low) / (high - low),
            Scale::Log => (value.max(low) / low).ln() / (high / low).ln(),
        };
        HEIGHT - BOTTOM - place.clamp(0.0, 1.0) * (HEIGHT - TOP - BOTTOM)
    }

    /// Round values that enclose all points.
    fn y_ticks(&self) -> Vec<f64> {
        let values =
            || self.series.iter().flat_map(|s| s.points.iter().map(|p| p.1)).filter(|v| v.is_finite());
        let high = values().fold(0.0, f64::max);
        match self.y_scale {
            Scale::Linear => {
                let high = if high > 0.0 { high } else { 1.0 };
                let rough = high / 5.0;
                let power = 10f64.powf(rough.log10().floor());
                let factor = [1.0, 2.0, 2.5, 5.0].into_iter().find(|f| f * power >= rough * 0.999);
                let step = factor.unwrap_or(10.0) * power;
                let steps = (high / step * 0.999).ceil().max(1.0) as usize;
                (0..=steps).map(|i| i as f64 * step).collect()
            }
            Scale::Log => {
                let low = values().filter(|v| *v > 0.0).fold(f64::INFINITY, f64::min);
                let (low, high) = if low.is_finite() { (low, high) } else { (1.0, 10.0) };
                // 1, 2, 5, 10, 20, … around the points.
                let round: Vec<f64> =
                    (-3..12).flat_map(|e| [1.0, 2.0, 5.0].map(|f| f * 10f64.powi(e))).collect();
                let from = round.iter().rposition(|r| *r <= low).unwrap_or(0);
                let to =
                    round.iter().position(|r| *r >= high * 0.999).unwrap_or(round.len() - 1).max(from + 1);
                round.get(from..=to).unwrap_or(&[1.0, 10.0]).to_vec()
            }
        }
    }

    fn grid(&self, s: &mut String, ticks: &[f64]) {
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for &tick in ticks {
            let y = self.y(tick, ticks);
            let text = escape(&(self.y_text)(tick));
            let _ = write!(
                s,
                "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" class=\"grid\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" class=\"tick\" text-anchor=\"end\">{text}</text>",
                LEFT - 7.0,
                y + 4.0
            );
        }
        for (position, text) in &self.x_ticks {
            let x = self.x(*position);
            let _ = write!(
                s,
                "<line x1=\"{x:.1}\" y1=\"{bottom}\" x2=\"{x:.1}\" y2=\"{:.1}\" class=\"axis\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" class=\"tick\" text-anchor=\"middle\">{}</text>",
                bottom + 4.0,
                bottom + 17.0,
                escape(text)
            );
        }
        let middle = (LEFT + right) / 2.0;
        let _ = write!(
            s,
            "<line x1=\"{LEFT}\" y1=\"{bottom}\" x2=\"{right}\" y2=\"{bottom}\" class=\"axis\"/>\
             <text x=\"{middle:.1}\" y=\"{:.1}\" class=\"label\" text-anchor=\"middle\">{}</text>\
             <text transform=\"translate(13 {:.1}) rotate(-90)\" class=\"label\" text-anchor=\"middle\">{}</text>",
            HEIGHT - 12.0,
            escape(&self.x_label),
            (TOP + bottom) / 2.0,
            escape(&self.y_label)
        );
    }

    fn line(&self, s: &mut String, series: &Series, ticks: &[f64]) {
        let dash = if series.dashed { " stroke-dasharray=\"5 4\"" } else { "" };
        let place = |p: &(f64, f64)| (self.x(p.0), self.y(p.1, ticks));
        let points: Vec<_> = series.points.iter().filter(|p| p.1.is_finite()).collect();
        let _ = write!(
            s,
            "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"2\"{dash} points=\"",
            series.color
        );
        for p in &points {
            let (x, y) = place(p);
            let _ = write!(s, "{x:.1},{y:.1} ");
        }
        s.push_str("\"/>");
        for p in points.iter().filter(|_| series.dots) {
            let (x, y) = place(p);
            let text = escape(&format!("{}: {}", series.name, (self.y_text)(p.1)));
            let _ = write!(
                s,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{}\"><title>{text}</title></circle>",
                series.color
            );
        }
    }

    fn legend(&self, s: &mut String) {
        let mut x = LEFT;
        for series in &self.series {
            let dash = if series.dashed { " stroke-dasharray=\"5 4\"" } else { "" };
            let _ = write!(
                s,
                "<line x1=\"{x:.1}\" y1=\"30\" x2=\"{:.1}\" y2=\"30\" stroke=\"{}\" stroke-width=\"2.5\"{dash}/>\
                 <text x=\"{:.1}\" y=\"34\" class=\"legend\">{}</text>",
                x + 20.0,
                series.color,
                x + 26.0,
                escape(&series.name)
            );
            x += 44.0 + 6.6 * series.name.chars().count() as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(scale: Scale, values: &[f64]) -> Chart {
        let points = values.iter().enumerate().map(|(i, v)| (i as f64 / 10.0, *v)).collect();
        Chart {
            title: "<b> & co".into(),
            x_label: String::new(),
            y_label: String::new(),
            x_ticks: vec![(0.0, "\"0\"".into())],
            y_scale: scale,
            y_text: |v| v.to_string(),
            series: vec![Series { name: "a'b".into(), color: "#123", dashed: false, points, dots: true }],
        }
    }

    #[test]
    fn ticks_are_round_and_enclose_the_values() {
        assert_eq!(chart(Scale::Linear, &[3.0, 21.5]).y_ticks(), [0.0, 5.0, 10.0, 15.0, 20.0, 25.0]);
        assert_eq!(chart(Scale::Linear, &[0.0]).y_ticks().len(), 6);
        assert_eq!(chart(Scale::Log, &[320.0, 4_100.0]).y_ticks(), [200.0, 500.0, 1e3, 2e3, 5e3]);
        assert!(chart(Scale::Log, &[]).y_ticks().len() >= 2);
    }

    #[test]
    fn everything_is_escaped() {
        let svg = chart(Scale::Linear, &[1.0, f64::NAN]).svg();
        assert!(
            svg.contains("&lt;b&gt; &amp; co") && svg.contains("a&#39;b") && svg.contains("&quot;0&quot;")
        );
        assert!(!svg.contains("<b>") && !svg.contains("NaN"));
    }
}
