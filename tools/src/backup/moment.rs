//! Moments as people write them: civil time with its zone, or a stamp of the hybrid clock.

use std::fmt;
use std::str::FromStr;

const SECOND_US: i64 = 1_000_000;
const DAY_S: i64 = 86_400;

/// A moment of the hybrid clock, in microseconds since 1970. Shown as civil time, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

/// What `--at` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// This moment.
    Moment(Moment),
    /// As late as the archive reaches.
    Latest,
}

impl FromStr for Until {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "latest" {
            return Ok(Until::Latest);
        }
        let stamp = text.bytes().all(|byte| byte.is_ascii_digit());
        let moment = if stamp && text.len() == 16 {
            text.parse().ok().map(Moment)
        } else {
            civil(text)
        };
        moment.map(Until::Moment).ok_or_else(|| {
            format!(
                "{text:?} is no moment: give civil time with its zone (2026-03-29T14:05:00Z, \
                 2026-03-29T16:05:00.250+02:00), a stamp of 16 digits (microseconds since 1970), or `latest`"
            )
        })
    }
}

/// Reads `YYYY-MM-DDTHH:MM:SS[.fraction](Z|±HH:MM)`; a blank may stand for the `T`.
fn civil(text: &str) -> Option<Moment> {
    let date = fields(text.get(..10)?, '-', [4, 2, 2])?;
    text.get(10..11)
        .filter(|between| ["T", " "].contains(between))?;
    let time = fields(text.get(11..19)?, ':', [2, 2, 2])?;
    let rest = text.get(19..)?;
    let (fraction_us, zone) = fraction(rest)?;
    let [year, month, day] = date;
    let [hour, minute, second] = time;
    let is_date = (1..=12).contains(&month) && (1..=days_of(year, month)).contains(&day);
    if !is_date || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let seconds = days_since_1970(year, month, day) * DAY_S + hour * 3600 + minute * 60 + second;
    let seconds = seconds - offset_s(zone)?;
    u64::try_from(seconds * SECOND_US + fraction_us)
        .ok()
        .map(Moment)
}

fn fields(text: &str, between: char, lens: [usize; 3]) -> Option<[i64; 3]> {
    let mut parts = text.split(between);
    let mut numbers = [0; 3];
    for (number, len) in numbers.iter_mut().zip(lens) {
        let part = parts.next().filter(|part| part.len() == len)?;
        *number = digits(part)?;
    }
    parts.next().is_none().then_some(numbers)
}

fn digits(text: &str) -> Option<i64> {
    let are_digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| are_digits)
}

/// The fraction of a second in microseconds, and what is behind it.
fn fraction(text: &str) -> Option<(i64, &str)> {
    let Some(rest) = text.strip_prefix('.') else {
        return Some((0, text));
    };
    let end = rest.find(|c: char| !c.is_ascii_digit())?;
    let (shown, zone) = rest.split_at(end);
    if !(1..=6).contains(&shown.len()) {
        return None;
    }
    Some((digits(&format!("{shown:0<6}"))?, zone))
}

fn offset_s(zone: &str) -> Option<i64> {
    if zone == "Z" {
        return Some(0);
    }
    let sign = match zone.get(..1)? {
        "+" => 1,
        "-" => -1,
        _ => return None,
    };
    let (hours, minutes) = zone.get(1..)?.split_once(':')?;
    let (hours, minutes) = (digits(hours)?, digits(minutes)?);
    (hours < 24 && minutes < 60).then_some(sign * (hours * 3600 + minutes * 60))
}

fn days_of(year: i64, month: i64) -> i64 {
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 if is_leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let before = year - 1;
    let leaps = before / 4 - before / 100 + before / 400;
    let years = before * 365 + leaps - 719_162;
    let months: i64 = (1..month).map(|month| days_of(year, month)).sum();
    years + months + day - 1
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = i64::try_from(self.0).unwrap_or(i64::MAX);
        let (seconds, fraction) = (us / SECOND_US, us % SECOND_US);
        let mut days = seconds / DAY_S;
        let mut year = 1970;
        loop {
            let in_year = days_since_1970(year + 1, 1, 1) - days_since_1970(year, 1, 1);
            if days < in_year || year == 9999 {
                break;
            }
            days -= in_year;
            year += 1;
        }
        let mut month = 1;
        while month < 12 && days >= days_of(year, month) {
            days -= days_of(year, month);
            month += 1;
        }
        let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        let day = days + 1;
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{fraction:06}Z"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Option<u64> {
        match text.parse() {
            Ok(Until::Moment(moment)) => Some(moment.0),
            _ => None,
        }
    }

    #[test]
    fn civil_time_and_stamps_are_read() {
        assert_eq!(at("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(at("2000-02-29T12:30:15Z"), Some(951_827_415_000_000));
        assert_eq!(at("2026-11-28T20:15:00.25Z"), Some(1_795_896_900_250_000));
        assert_eq!(
            at("2026-11-28 22:15:00.25+02:00"),
            at("2026-11-28T20:15:00.25Z")
        );
        assert_eq!(
            at("2026-11-28T10:45:00.25-09:30"),
            at("2026-11-28T20:15:00.25Z")
        );
        assert_eq!(at("1795896900250000"), Some(1_795_896_900_250_000));
        assert_eq!("latest".parse(), Ok(Until::Latest));
    }

    #[test]
    fn what_is_ambiguous_or_impossible_is_refused() {
        for text in [
            "2026-11-28T20:15:00",
            "2026-11-28",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-11-28T24:00:00Z",
            "2026-11-28T20:15:00.Z",
            "2026-11-28T20:15:00.1234567Z",
            "2026-11-28T20:15:00+2",
            "1969-12-31T23:59:59Z",
            "1795896900",
            "now",
            "",
            "2026-11-28T20:15:0é",
        ] {
            let refused: Result<Until, String> = text.parse();
            assert!(refused.is_err(), "{text}: {refused:?}");
        }
    }

    #[test]
    fn a_moment_is_shown_as_it_is_read() {
        for us in [
            0,
            1,
            951_827_415_000_000,
            1_795_896_900_250_000,
            4_102_444_799_999_999,
            1_709_251_199_000_000,
        ] {
            let shown = Moment(us).to_string();
            assert_eq!(at(&shown), Some(us), "{shown}");
        }
    }
}
