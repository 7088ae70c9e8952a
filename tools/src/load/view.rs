//! The live view: rates, percentiles, errors and a heat map over time, drawn over itself on
//! standard error once an interval. Where nothing can be drawn over: a line now and then.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::Duration;

use super::options::Live;
use super::outcome::{Interval, Setup};
use super::output;
use super::recorder::Recorder;

/// Columns of the heat map, each an interval.
const COLUMNS_MAX: usize = 60;
/// Rows of the heat map.
const ROWS_MAX: usize = 14;
/// Columns beside a row of the map: its label.
const LABEL_COLUMNS: usize = 10;
const SHADES: [char; 5] = [' ', '░', '▒', '▓', '█'];
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Seconds between two lines where there is no picture.
const LINE_SECONDS: f64 = 10.0;

/// How a phase is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Picture,
    Lines,
    Silent,
}

/// Room for the picture. One that is higher than the terminal could not be drawn over itself.
#[derive(Clone, Copy)]
struct Room {
    rows: usize,
    columns: usize,
}

impl Room {
    /// The terminal's, or that of an ordinary one.
    fn now() -> Self {
        let size = rustix::termios::tcgetwinsize(std::io::stderr());
        let (rows, columns) = size.map_or((0, 0), |size| (size.ws_row, size.ws_col));
        let or = |size: u16, ordinary| {
            if size == 0 {
                ordinary
            } else {
                usize::from(size)
            }
        };
        Self {
            rows: or(rows, 40).saturating_sub(1),
            columns: or(columns, 100),
        }
    }
}

/// What the terminal shows of a phase.
pub struct View {
    way: Way,
    head: String,
    length_s: f64,
    intervals: VecDeque<Interval>,
    /// Columns of each line that stands there.
    drawn: Vec<usize>,
    /// When the last line was said, and what was done since then.
    said_at_s: f64,
    done: u64,
    failed: u64,
    wrong: u64,
    lost: u64,
}

impl View {
    /// A view of a phase of at most `length`, drawn below what stands there. It is on or off, or on
    /// when standard error is a terminal and else a line now and then.
    pub fn new(live: Live, setup: &Setup, length: Duration) -> Self {
        let way = match live {
            Live::On => Way::Picture,
            Live::Off => Way::Silent,
            Live::Auto if std::io::stderr().is_terminal() && !is_dumb() => Way::Picture,
            Live::Auto => Way::Lines,
        };
        Self {
            way,
            head: format!("{}\n{}\n{}", setup.target, setup.model, setup.workload),
            length_s: length.as_secs_f64(),
            intervals: VecDeque::new(),
            drawn: Vec::new(),
            said_at_s: 0.0,
            done: 0,
            failed: 0,
            wrong: 0,
            lost: 0,
        }
    }

    /// Draws the picture after another interval, or says how far it is.
    pub fn show(&mut self, interval: &Interval, recorder: &Recorder) {
        if self.way == Way::Silent {
            return;
        }
        self.failed += interval.failed;
        self.wrong += recorder.verdicts.wrong;
        self.lost += recorder.verdicts.lost;
        if self.way == Way::Lines {
            if let Some(line) = self.line(interval) {
                output::note(&line);
            }
            return;
        }
        if self.intervals.len() == COLUMNS_MAX {
            self.intervals.pop_front();
        }
        self.intervals.push_back(interval.clone());
        let room = Room::now();
        let picture = self.picture(room);
        let mut out = String::new();
        let above = self.rows_drawn(room);
        if above > 0 {
            write!(out, "\x1b[{above}A").expect("writing to a string");
        }
        for line in picture.lines() {
            writeln!(out, "{line}\x1b[K").expect("writing to a string");
        }
        out.push_str("\x1b[J");
        self.drawn = picture.lines().map(|line| line.chars().count()).collect();
        // A view that cannot be shown is no reason to stop measuring.
        std::io::stderr().write_all(out.as_bytes()).ok();
    }

    /// What to say after another interval, if it is time.
    fn line(&mut self, interval: &Interval) -> Option<String> {
        self.done += interval.done.values().sum::<u64>();
        let at_s = interval.at_s + interval.seconds;
        let seconds = at_s - self.said_at_s;
        if seconds < LINE_SECONDS {
            return None;
        }
        let done = std::mem::take(&mut self.done);
        self.said_at_s = at_s;
        Some(format!(
            "{at_s:.0} s: {:.0} operations/s; failed {}, wrong {}, lost {} so far",
            done as f64 / seconds,
            self.failed,
            self.wrong,
            self.lost,
        ))
    }

    /// Rows of the terminal that the last picture takes by now: one that has become narrower has
    /// wrapped its lines.
    fn rows_drawn(&self, room: Room) -> usize {
        let rows = self
            .drawn
            .iter()
            .map(|columns| columns.div_ceil(room.columns.max(1)).max(1));
        rows.sum::<usize>().min(room.rows)
    }

    fn picture(&self, room: Room) -> String {
        let whole = self.unbounded(room);
        let mut out = String::new();
        for line in whole.lines().take(room.rows) {
            out.extend(line.chars().take(room.columns));
            out.push('\n');
        }
        out
    }

    fn unbounded(&self, room: Room) -> String {
        let Some(last) = self.intervals.back() else {
            return String::new();
        };
        let mut out = self.head.clone();
        write!(
            out,
            "\n{:.0} of at most {:.0} s   failed {}   wrong {}   lost {}   client busy {:.0} %, lag \
             p99.9 {:.0} us\n\n{:<10}{:>12}{:>10}{:>10}{:>10}{:>10}{:>10}\n",
            (last.at_s + last.seconds).min(self.length_s),
            self.length_s,
            self.failed,
            self.wrong,
            self.lost,
            last.client_busy * 100.0,
            last.lag_us_p999,
            "us",
            "rate/s",
            "p50",
            "p90",
            "p99",
            "p99.9",
            "max"
        )
        .expect("writing to a string");
        for (name, percentiles) in &last.latency_us {
            let done = last.done.get(name).copied().unwrap_or(0);
            write!(out, "{name:<10}{done:>12}").expect("writing to a string");
            for percentile in ["p50", "p90", "p99", "p99.9", "max"] {
                let value = percentiles.get(percentile).copied().unwrap_or(0.0);
                write!(out, "{value:>10.0}").expect("writing to a string");
            }
            out.push('\n');
        }
        out.push('\n');
        let columns = room.columns.saturating_sub(LABEL_COLUMNS);
        let newest = self.intervals.len().saturating_sub(columns);
        self.rates(&mut out, newest);
        let rows = room.rows.saturating_sub(out.lines().count());
        self.heat(&mut out, newest, rows.clamp(1, ROWS_MAX));
        out
    }

    fn rates(&self, out: &mut String, newest: usize) {
        let rates: Vec<u64> = self
            .intervals
            .range(newest..)
            .map(|interval| interval.done.values().sum())
            .collect();
        let top = rates.iter().copied().max().unwrap_or(0).max(1);
        write!(out, "{:>9} ", "rate").expect("writing to a string");
        for rate in &rates {
            let level = usize::try_from(rate * 7 / top).unwrap_or(7);
            out.push(BARS[level.min(7)]);
        }
        writeln!(out, " {top}/s at most").expect("writing to a string");
    }

    fn heat(&self, out: &mut String, newest: usize, rows_max: usize) {
        let shown = || self.intervals.range(newest..);
        let rows = || shown().flat_map(|interval| &interval.heat);
        let (Some(low), Some(high)) = (
            rows().map(|(row, _)| *row).min(),
            rows().map(|(row, _)| *row).max(),
        ) else {
            return;
        };
        // Rows of the map are joined until they fit.
        let span = usize::try_from(high - low + 1).unwrap_or(1);
        let joined = i32::try_from(span.div_ceil(rows_max)).unwrap_or(1);
        let mut row = high;
        while row >= low {
            let bottom = row - joined + 1;
            let micros = 2.0_f64.powf(f64::from(bottom) / 4.0);
            write!(out, "{:>9} ", label(micros)).expect("writing to a string");
            for interval in shown() {
                let cells = interval.heat.iter();
                let count: u64 = cells
                    .filter(|(at, _)| (bottom..=row).contains(at))
                    .map(|(_, count)| count)
                    .sum();
                out.push(shade(
                    count,
                    interval.heat.iter().map(|(_, count)| count).sum(),
                ));
            }
            out.push('\n');
            row -= joined;
        }
    }
}

/// Whether the terminal can do no more than print lines, so that nothing can be drawn over itself.
fn is_dumb() -> bool {
    std::env::var_os("TERM").is_some_and(|name| name == "dumb")
}

/// A latency in microseconds for people.
fn label(micros: f64) -> String {
    if micros >= 1e6 {
        format!("{:.1} s", micros / 1e6)
    } else if micros >= 1e3 {
        format!("{:.1} ms", micros / 1e3)
    } else {
        format!("{micros:.0} us")
    }
}

/// Dark for many; a single operation is seen.
fn shade(count: u64, all: u64) -> char {
    let share = count as f64 / all.max(1) as f64;
    match count {
        0 => SHADES[0],
        _ if share < 0.001 => SHADES[1],
        _ if share < 0.03 => SHADES[2],
        _ if share < 0.2 => SHADES[3],
        _ => SHADES[4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDINARY: Room = Room {
        rows: 39,
        columns: 100,
    };

    fn view_of(intervals: std::ops::Range<u8>) -> View {
        let mut view = View::new(Live::Off, &Setup::default(), Duration::from_secs(100));
        for at in intervals {
            let mut interval = Interval {
                at_s: f64::from(at),
                seconds: 1.0,
                ..Interval::default()
            };
            interval.done.insert("read".into(), 100);
            interval
                .latency_us
                .insert("read".into(), [("p50".into(), 90.0)].into());
            interval.heat = (-8..80).map(|row| (row, 1)).collect();
            view.intervals.push_back(interval);
        }
        view
    }

    #[test]
    fn where_nothing_can_be_drawn_over_a_line_says_how_far_it_is_every_ten_seconds() {
        let mut view = view_of(0..0);
        view.failed = 3;
        let mut said = Vec::new();
        for interval in view_of(0..21).intervals {
            let line = view.line(&interval);
            said.extend(line.map(|line| (interval.at_s, line)));
        }
        let words =
            |at: &str| format!("{at} s: 100 operations/s; failed 3, wrong 0, lost 0 so far");
        assert_eq!(said, [(9.0, words("10")), (19.0, words("20"))]);
    }

    #[test]
    fn the_picture_has_rates_percentiles_and_a_heat_map_of_bounded_size() {
        let picture = view_of(10..70).picture(ORDINARY);
        assert!(
            picture.contains("read") && picture.contains("100/s at most"),
            "{picture}"
        );
        assert!(picture.lines().count() < 28, "{picture}");
        assert!(
            picture.lines().all(|line| line.chars().count() < 100),
            "{picture}"
        );
    }

    #[test]
    fn the_picture_fits_a_tiny_terminal_and_shows_the_newest_there() {
        let mut view = view_of(0..60);
        view.intervals[59].heat = [(79, 1)].into();
        for (rows, columns) in [(23, 80), (15, 40), (9, 20), (1, 3), (0, 0)] {
            let picture = view.picture(Room { rows, columns });
            assert!(picture.lines().count() <= rows, "{rows}: {picture}");
            assert!(
                picture.lines().all(|line| line.chars().count() <= columns),
                "{columns}: {picture}"
            );
        }
        let room = Room {
            rows: 15,
            columns: 40,
        };
        let picture = view.picture(room);
        assert!(
            picture
                .lines()
                .any(|line| line.ends_with('█') && line.chars().count() == 40),
            "{picture}"
        );
    }

    #[test]
    fn lines_that_a_narrower_terminal_has_wrapped_are_drawn_over_too() {
        let mut view = view_of(0..1);
        assert_eq!(view.rows_drawn(ORDINARY), 0, "nothing stands there");
        view.drawn = vec![90, 0, 50];
        assert_eq!(view.rows_drawn(ORDINARY), 3);
        let narrow = Room {
            columns: 45,
            ..ORDINARY
        };
        assert_eq!(view.rows_drawn(narrow), 5);
        let low = Room { rows: 4, ..narrow };
        assert_eq!(view.rows_drawn(low), 4, "what is above cannot be reached");
    }

    #[test]
    fn labels_have_a_fitting_unit() {
        assert_eq!(label(90.0), "90 us");
        assert_eq!(label(1500.0), "1.5 ms");
        assert_eq!(label(2.5e6), "2.5 s");
    }
}
