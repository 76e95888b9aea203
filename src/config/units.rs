//! Parsing and formatting of durations, sizes, switches and CPU lists.
//!
//! Durations have the syntax of Go's `time.ParseDuration`, which pd-sidecar's flags use. A number
//! without a unit is refused (except `0`), because `30` could mean seconds or milliseconds.

use std::time::Duration;

/// Reason why a value could not be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitError {
    /// The value is empty.
    Empty,
    /// A number is missing or malformed.
    Number,
    /// The unit of a duration or size is unknown, or that of a duration is missing.
    Unit,
    /// The value is too large: a duration above [`DURATION_MAX`], a number in a list that is not
    /// below [`CPU_MAX`], or a number that overflows.
    TooLarge,
    /// A range in a CPU list ends before it starts.
    Range,
    /// A number is listed twice in a CPU list.
    Duplicate,
}

/// Longest accepted duration: one year. Adding it to a clock value cannot overflow.
pub const DURATION_MAX: Duration = Duration::from_secs(365 * 24 * 3600);
/// Number of CPUs in the kernel's `cpu_set_t`. CPU numbers must be lower.
pub const CPU_MAX: usize = 1024;

/// Duration units and their length in nanoseconds. The parser uses the longest match, so `ms` is
/// not read as `m`.
const DURATION_UNITS: [(&str, u64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("\u{b5}s", 1_000),
    ("\u{3bc}s", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Size units and their size in bytes. Kubernetes writes the binary units without the `B`; both
/// forms are accepted.
const SIZE_UNITS: [(&str, u64); 13] = [
    ("", 1),
    ("B", 1),
    ("KiB", 1 << 10),
    ("Ki", 1 << 10),
    ("KB", 1_000),
    ("kB", 1_000),
    ("MiB", 1 << 20),
    ("Mi", 1 << 20),
    ("MB", 1_000_000),
    ("GiB", 1 << 30),
    ("Gi", 1 << 30),
    ("GB", 1_000_000_000),
    ("TiB", 1 << 40),
];

/// Parses a duration such as `250ms`, `30s`, `1m30s`, `1.5h` or `0`.
///
/// # Errors
/// Returns the first problem.
pub fn duration(text: &str) -> Result<Duration, UnitError> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut nanos: u128 = 0;
    if rest.is_empty() {
        return Err(UnitError::Empty);
    }
    while !rest.is_empty() {
        let number = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let (whole, fraction, scale) = decimal(&rest[..number])?;
        let (unit, factor) = DURATION_UNITS
            .iter()
            .filter(|(unit, _)| rest[number..].starts_with(unit))
            .max_by_key(|(unit, _)| unit.len())
            .ok_or(UnitError::Unit)?;
        let factor = u128::from(*factor);
        nanos += u128::from(whole) * factor + u128::from(fraction) * factor / u128::from(scale);
        if nanos > DURATION_MAX.as_nanos() {
            return Err(UnitError::TooLarge);
        }
        rest = &rest[number + unit.len()..];
    }
    let nanos = u64::try_from(nanos).map_err(|_| UnitError::TooLarge)?;
    Ok(Duration::from_nanos(nanos))
}

/// Parses a size such as `65536`, `64KiB`, `512MiB`, `1MB` or `2Gi` and returns it in bytes.
///
/// # Errors
/// Returns the first problem.
pub fn size(text: &str) -> Result<u64, UnitError> {
    if text.is_empty() {
        return Err(UnitError::Empty);
    }
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (whole, fraction, scale) = decimal(&text[..digits])?;
    let unit = text[digits..].trim_start();
    // A part of a byte is a forgotten unit.
    if unit.is_empty() && text[..digits].contains('.') {
        return Err(UnitError::Unit);
    }
    let (_, factor) = SIZE_UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or(UnitError::Unit)?;
    let factor = u128::from(*factor);
    let bytes = u128::from(whole) * factor + u128::from(fraction) * factor / u128::from(scale);
    u64::try_from(bytes).map_err(|_| UnitError::TooLarge)
}

/// Parses a CPU list in the kernel's format, such as `1` or `0-3,8`. The order is kept.
///
/// # Errors
/// Returns the first problem.
pub fn cpu_list(text: &str) -> Result<Vec<usize>, UnitError> {
    if text.is_empty() {
        return Err(UnitError::Empty);
    }
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (cpu(first)?, cpu(last)?),
            None => (cpu(part)?, cpu(part)?),
        };
        if last < first {
            return Err(UnitError::Range);
        }
        for number in first..=last {
            if cpus.contains(&number) {
                return Err(UnitError::Duplicate);
            }
            cpus.push(number);
        }
    }
    Ok(cpus)
}

/// Parses a boolean like Go's `strconv.ParseBool`, which pflag uses. Returns `None` for any other
/// text.
#[must_use]
pub fn switch(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Formats a duration in the largest unit that divides it.
#[must_use]
pub fn format_duration(value: Duration) -> String {
    let nanos = value.as_nanos();
    if nanos == 0 {
        return "0s".to_owned();
    }
    let units: [(&str, u128); 6] = [
        ("h", 3_600_000_000_000),
        ("m", 60_000_000_000),
        ("s", 1_000_000_000),
        ("ms", 1_000_000),
        ("us", 1_000),
        ("ns", 1),
    ];
    for (unit, factor) in units {
        if nanos.is_multiple_of(factor) {
            return format!("{}{unit}", nanos / factor);
        }
    }
    format!("{nanos}ns")
}

/// Formats a size in the largest binary unit that divides it.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    for (unit, factor) in [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if bytes != 0 && bytes.is_multiple_of(factor) {
            return format!("{}{unit}", bytes / factor);
        }
    }
    format!("{bytes}B")
}

/// Formats a CPU list with ranges, such as `0-3,8`.
#[must_use]
pub fn format_cpus(cpus: &[usize]) -> String {
    let mut text = String::new();
    let mut index = 0;
    while index < cpus.len() {
        let first = cpus[index];
        let mut last = first;
        while index + 1 < cpus.len() && cpus[index + 1] == last + 1 {
            index += 1;
            last += 1;
        }
        index += 1;
        let comma = if text.is_empty() { "" } else { "," };
        if first == last {
            text.push_str(&format!("{comma}{first}"));
        } else {
            text.push_str(&format!("{comma}{first}-{last}"));
        }
    }
    text
}

/// Parses `12`, `1.5` or `.5` into the whole part, and the numerator and the denominator of the
/// fraction: `1.5` results in `(1, 5, 10)`. Digits of the fraction after the ninth are dropped.
fn decimal(text: &str) -> Result<(u64, u64, u64), UnitError> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err(UnitError::Number);
    }
    // Nine digits are enough for nanoseconds in seconds; more could overflow.
    let fraction = &fraction[..fraction.len().min(9)];
    let scale = 10_u64.pow(u32::try_from(fraction.len()).unwrap_or(0));
    let number = |digits: &str| match digits {
        "" => Ok(0),
        digits => digits.parse::<u64>().map_err(|_| UnitError::TooLarge),
    };
    Ok((number(whole)?, number(fraction)?, scale))
}

fn cpu(text: &str) -> Result<usize, UnitError> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(UnitError::Number);
    }
    match text.parse::<usize>() {
        Ok(number) if number < CPU_MAX => Ok(number),
        _ => Err(UnitError::TooLarge),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let millis = |n| Ok(Duration::from_millis(n));
        for (text, want) in [
            ("0", millis(0)),
            ("0s", millis(0)),
            ("250ms", millis(250)),
            ("30s", millis(30_000)),
            ("5m", millis(300_000)),
            ("1h", millis(3_600_000)),
            ("1m30s", millis(90_000)),
            ("1h0m0.5s", millis(3_600_500)),
            ("1.5h", millis(5_400_000)),
            (".5s", millis(500)),
            ("2us", Ok(Duration::from_micros(2))),
            ("2\u{b5}s", Ok(Duration::from_micros(2))),
            ("7ns", Ok(Duration::from_nanos(7))),
            ("0.12345678912345s", Ok(Duration::from_nanos(123_456_789))),
            ("", Err(UnitError::Empty)),
            ("30", Err(UnitError::Unit)),
            ("30 s", Err(UnitError::Unit)),
            ("1d", Err(UnitError::Unit)),
            ("s", Err(UnitError::Number)),
            (".", Err(UnitError::Number)),
            ("-1s", Err(UnitError::Number)),
            ("1..5s", Err(UnitError::Number)),
            ("99999999999999999999s", Err(UnitError::TooLarge)),
            ("9000h", Err(UnitError::TooLarge)),
        ] {
            assert_eq!(duration(text), want, "{text:?}");
        }
    }

    #[test]
    fn sizes() {
        for (text, want) in [
            ("0", Ok(0)),
            ("65536", Ok(65536)),
            ("64KiB", Ok(65536)),
            ("64Ki", Ok(65536)),
            ("512MiB", Ok(512 << 20)),
            ("1MB", Ok(1_000_000)),
            ("2GiB", Ok(2 << 30)),
            ("1.5GiB", Ok(3 << 29)),
            ("1.5", Err(UnitError::Unit)),
            ("1.", Err(UnitError::Unit)),
            ("10 MiB", Ok(10 << 20)),
            ("7B", Ok(7)),
            ("", Err(UnitError::Empty)),
            ("MiB", Err(UnitError::Number)),
            ("1mib", Err(UnitError::Unit)),
            ("1M", Err(UnitError::Unit)),
            ("-1", Err(UnitError::Number)),
            ("99999999TiB", Err(UnitError::TooLarge)),
        ] {
            assert_eq!(size(text), want, "{text:?}");
        }
    }

    #[test]
    fn cpu_lists() {
        for (text, want) in [
            ("1", Ok(vec![1])),
            ("0-3,8", Ok(vec![0, 1, 2, 3, 8])),
            ("8,0-1", Ok(vec![8, 0, 1])),
            ("", Err(UnitError::Empty)),
            ("3-1", Err(UnitError::Range)),
            ("1,1", Err(UnitError::Duplicate)),
            ("0-3,2", Err(UnitError::Duplicate)),
            ("1,", Err(UnitError::Number)),
            ("all", Err(UnitError::Number)),
            ("1024", Err(UnitError::TooLarge)),
            ("0-99999999999", Err(UnitError::TooLarge)),
        ] {
            assert_eq!(cpu_list(text), want, "{text:?}");
        }
        assert_eq!(format_cpus(&[0, 1, 2, 3, 8]), "0-3,8");
        assert_eq!(format_cpus(&[8, 0, 1]), "8,0-1");
    }

    #[test]
    fn formatted_values_parse_back() {
        for text in ["0s", "250ms", "90s", "5m", "1h", "7ns", "3us"] {
            let value = duration(text).unwrap();
            assert_eq!(duration(&format_duration(value)), Ok(value));
        }
        assert_eq!(format_duration(Duration::from_secs(60)), "1m");
        for text in ["512MiB", "2GiB", "64KiB", "1000B", "0B"] {
            assert_eq!(format_size(size(text).unwrap()), text);
        }
    }
}
