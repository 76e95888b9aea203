//! Parsing and formatting of times and dates.

use std::time::Duration;

/// Longest time accepted on the command line: one day.
const TIME_MAX: Duration = Duration::from_secs(24 * 3600);

/// Parses a time like `200us`, `1.5ms`, `30s`, `2m`, `1h` or `250ns`. Returns `None` if it is
/// malformed or longer than a day, or if it has no unit and is not `0`, because the unit would be a
/// guess.
#[must_use]
pub fn time(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(digits);
    let scale = match unit {
        "ns" => 1e-9,
        "us" | "\u{b5}s" | "\u{3bc}s" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    let time = Duration::try_from_secs_f64(number.parse::<f64>().ok()? * scale).ok()?;
    (time <= TIME_MAX).then_some(time)
}

/// Formats nanoseconds with three significant digits: `850 ns`, `12.3 us`, `1.25 ms`, `30.0 s`.
#[must_use]
pub fn show_ns(ns: f64) -> String {
    let size = ns.abs();
    let (value, unit) = match size {
        _ if size < 999.5 => return format!("{ns:.0} ns"),
        _ if size < 999.5e3 => (ns / 1e3, "us"),
        _ if size < 999.5e6 => (ns / 1e6, "ms"),
        _ => (ns / 1e9, "s"),
    };
    let decimals = match value.abs() {
        size if size < 9.995 => 2,
        size if size < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {unit}")
}

/// Like [`show_ns`], always with a sign.
#[must_use]
pub fn show_signed_ns(ns: f64) -> String {
    let sign = if ns < 0.0 { "-" } else { "+" };
    format!("{sign}{}", show_ns(ns.abs()))
}

/// Formats seconds since 1970 as `2026-11-20T12:00:00Z`.
#[must_use]
pub fn date(unix_secs: u64) -> String {
    let (days, secs) = (unix_secs / 86_400, unix_secs % 86_400);
    // Count in eras of 400 years from 1 March of year 0, so that a leap day is the last day of its
    // year.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = era * 400 + year + carry;
    let (hour, minute, second) = (secs / 3600, secs / 60 % 60, secs % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, want) in [
            ("0", Some(Duration::ZERO)),
            ("200us", Some(Duration::from_micros(200))),
            ("\u{b5}s", None),
            ("1.5ms", Some(Duration::from_micros(1_500))),
            ("30s", Some(Duration::from_secs(30))),
            ("2m", Some(Duration::from_secs(120))),
            ("1h", Some(Duration::from_secs(3_600))),
            ("7ns", Some(Duration::from_nanos(7))),
            ("30", None),
            ("", None),
            ("s", None),
            ("-1s", None),
            ("1..5s", None),
            ("1d", None),
            ("25h", None),
        ] {
            assert_eq!(time(text), want, "{text:?}");
        }
    }

    #[test]
    fn shown_times_have_three_digits() {
        for (ns, want) in [
            (0.0, "0 ns"),
            (12.4, "12 ns"),
            (999.6, "1.00 us"),
            (1_234.0, "1.23 us"),
            (12_345.0, "12.3 us"),
            (-123_456.0, "-123 us"),
            (999_600.0, "1.00 ms"),
            (9.996e6, "10.0 ms"),
            (30e9, "30.0 s"),
        ] {
            assert_eq!(show_ns(ns), want, "{ns}");
        }
        assert_eq!(show_signed_ns(-1_500.0), "-1.50 us");
        assert_eq!(show_signed_ns(0.0), "+0 ns");
    }

    #[test]
    fn dates() {
        for (secs, want) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_799, "2000-02-29T23:59:59Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (1_795_180_245, "2026-11-20T13:10:45Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(date(secs), want);
        }
    }
}
