//! The seconds as a plot: rate, p99 of reads, runs on level 0.

use std::fmt::Write as _;

use super::series::{Second, Series};

const WIDTH: f64 = 900.0;
const LEFT: f64 = 90.0;
const HEIGHT: f64 = 150.0;
const GAP: f64 = 50.0;

/// One of the curves.
struct Panel {
    name: &'static str,
    of: fn(&Second) -> f64,
    is_log: bool,
}

const PANELS: [Panel; 3] = [
    Panel {
        name: "updates a second (dashed: the mean, and 80 % of it)",
        of: |second| second.written as f64,
        is_log: false,
    },
    Panel {
        name: "p99 of reads in the second, us (logarithmic)",
        of: |second| second.read_p99_us,
        is_log: true,
    },
    Panel {
        name: "runs on level 0",
        of: |second| second.level0_runs as f64,
        is_log: false,
    },
];

/// An SVG file: `series` in blue, in front of an earlier one in grey.
pub fn draw(series: &Series, beside: Option<&Series>) -> String {
    let mut curves = String::new();
    let mut top = 40.0;
    for panel in &PANELS {
        let all = [Some(series), beside];
        let values = all.iter().flatten().flat_map(|one| &one.seconds);
        let most = values.map(panel.of).fold(1.0, f64::max);
        let y = |value: f64| {
            let share = if panel.is_log {
                value.max(1.0).ln() / most.ln().max(1.0)
            } else {
                value / most
            };
            top + HEIGHT * (1.0 - share)
        };
        let bottom = top + HEIGHT;
        write!(
            curves,
            r##"<text x="{LEFT}" y="{}">{}</text>
<text x="8" y="{}">{most:.0}</text><text x="8" y="{bottom}">{}</text>
<path d="M{LEFT} {top}V{bottom}H{}" stroke="#999" fill="none"/>
"##,
            top - 8.0,
            panel.name,
            top + 10.0,
            if panel.is_log { 1 } else { 0 },
            LEFT + WIDTH,
        )
        .expect("memory");
        for (one, colour) in [(beside, "#bbb"), (Some(series), "#1f77b4")] {
            let Some(one) = one else { continue };
            let step = WIDTH / one.seconds.len().max(1) as f64;
            let mut points = String::new();
            for (index, second) in one.seconds.iter().enumerate() {
                let x = LEFT + index as f64 * step;
                write!(points, "{x:.1},{:.1} ", y((panel.of)(second))).expect("memory");
            }
            writeln!(
                curves,
                r#"<polyline points="{points}" fill="none" stroke="{colour}"/>"#
            )
            .expect("memory");
        }
        if top < 50.0 {
            for value in [series.mean(), series.mean() * 0.8] {
                writeln!(
                    curves,
                    r##"<path d="M{LEFT} {:.1}h{WIDTH}" stroke="#d62728" stroke-dasharray="4 4"/>"##,
                    y(value)
                )
                .expect("memory");
            }
        }
        top += HEIGHT + GAP;
    }
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="1010" height="{top:.0}" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="#fff"/>
<text x="{LEFT}" y="14">{} seconds of overwrites; blue: this run{}</text>
{curves}</svg>
"##,
        series.seconds.len(),
        if beside.is_some() {
            ", grey: the run before"
        } else {
            ""
        }
    )
}
