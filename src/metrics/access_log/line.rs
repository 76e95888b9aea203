//! Formats one access-log record as a line of JSON.
//!
//! Does not use a JSON library: the fields are few and fixed, and the writer must keep up with the
//! shards. It builds no tree and does not allocate per line.

use std::io::Write;

use super::record::{EndedAt, EndedBy, Record};
use crate::pd::Outcome;

/// Upper bound of a line's length: 336 bytes of untrusted text at up to six bytes each, and the
/// fixed rest.
pub(super) const BYTES_MAX: usize = 3072;

/// Appends the record as one line of JSON, including the line feed, to `out`.
pub(super) fn write(record: &Record, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"ts\":\"");
    timestamp(record.unix_micros, out);
    out.extend_from_slice(b"\",\"id\":");
    text(record.id.as_bytes(), out);
    plain(out, ",\"route\":\"", record.route.label());
    out.extend_from_slice(b"\",\"method\":");
    text(record.method.as_bytes(), out);
    number(out, ",\"status\":", u64::from(record.status));
    out.extend_from_slice(b",\"end\":\"");
    out.extend_from_slice(&[who(record.ended_by), when(record.ended_at)]);
    out.extend_from_slice(b"\",\"client\":");
    match record.client {
        // Writing to a vector cannot fail.
        Some(client) => {
            let ip = client.ip().to_canonical();
            drop(write!(out, "\"{ip}\",\"client_port\":{}", client.port()));
        }
        None => out.extend_from_slice(b"null,\"client_port\":null"),
    }
    optional(out, ",\"agent\":", record.agent.as_bytes());
    optional(out, ",\"model\":", record.model.as_bytes());
    plain(
        out,
        ",\"stream\":",
        if record.is_stream { "true" } else { "false" },
    );
    optional(out, ",\"upstream\":", record.upstream.as_bytes());
    match record.rank {
        Some(rank) => number(out, ",\"rank\":", u64::from(rank)),
        None => out.extend_from_slice(b",\"rank\":null"),
    }
    optional(out, ",\"prefill\":", record.prefill.as_bytes());
    plain(
        out,
        ",\"pd\":\"",
        record.outcome.map_or("none", Outcome::label),
    );
    plain(out, "\",\"reason\":\"", record.reason.label());
    match record.error {
        Some(code) => plain(out, "\",\"error\":\"", code),
        None => out.extend_from_slice(b"\",\"error\":null"),
    }
    if record.error.is_some() {
        out.push(b'"');
    }
    match record.trace_id {
        Some(id) => drop(write!(out, ",\"trace_id\":\"{id:032x}\"")),
        None => out.extend_from_slice(b",\"trace_id\":null"),
    }
    number(out, ",\"attempts\":", u64::from(record.attempts));
    number(out, ",\"bytes_in\":", record.bytes_in);
    number(out, ",\"bytes_out\":", record.bytes_out);
    millis(out, ",\"t_prefill\":", record.prefill_micros);
    millis(out, ",\"t_ttft\":", record.ttft_micros);
    millis(out, ",\"t_total\":", Some(record.total_micros));
    millis(out, ",\"t_proxy\":", Some(record.proxy_micros));
    out.extend_from_slice(b"}\n");
}

const fn who(ended_by: EndedBy) -> u8 {
    match ended_by {
        EndedBy::None => b'-',
        EndedBy::Client => b'C',
        EndedBy::Upstream => b'U',
        EndedBy::Prefill => b'P',
        EndedBy::Ringside => b'R',
        EndedBy::Drain => b'D',
    }
}

const fn when(ended_at: EndedAt) -> u8 {
    match ended_at {
        EndedAt::Complete => b'-',
        EndedAt::Request => b'R',
        EndedAt::Queue => b'Q',
        EndedAt::Connect => b'C',
        EndedAt::FirstByte => b'H',
        EndedAt::Streaming => b'S',
    }
}

/// Appends `before`, and then untrusted text as a JSON string, or `null` if it is empty.
fn optional(out: &mut Vec<u8>, before: &str, bytes: &[u8]) {
    out.extend_from_slice(before.as_bytes());
    match bytes {
        b"" => out.extend_from_slice(b"null"),
        bytes => text(bytes, out),
    }
}

/// Appends `before` and `text`, neither of which needs escaping.
fn plain(out: &mut Vec<u8>, before: &str, text: &str) {
    out.extend_from_slice(before.as_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn number(out: &mut Vec<u8>, before: &str, value: u64) {
    drop(write!(out, "{before}{value}"));
}

/// Appends `before`, and then `micros` in milliseconds with three decimals, or `null` for `None`.
fn millis(out: &mut Vec<u8>, before: &str, micros: Option<u64>) {
    out.extend_from_slice(before.as_bytes());
    match micros {
        Some(micros) => drop(write!(out, "{}.{:03}", micros / 1000, micros % 1000)),
        None => out.extend_from_slice(b"null"),
    }
}

/// Appends untrusted text as a JSON string. Invalid UTF-8, including a character truncated at the
/// end, is replaced by U+FFFD. Control characters (C1 too) and Unicode line separators are escaped,
/// so that the text cannot forge a line or control a terminal.
pub(crate) fn text(bytes: &[u8], out: &mut Vec<u8>) {
    out.push(b'"');
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '"' => out.extend_from_slice(b"\\\""),
                '\\' => out.extend_from_slice(b"\\\\"),
                c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') => {
                    drop(write!(out, "\\u{:04x}", u32::from(c)));
                }
                c => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        if !chunk.invalid().is_empty() {
            out.extend_from_slice("\u{fffd}".as_bytes());
        }
    }
    out.push(b'"');
}

/// Appends a timestamp in UTC, in the format of RFC 3339 with microseconds.
fn timestamp(unix_micros: u64, out: &mut Vec<u8>) {
    let seconds = unix_micros / 1_000_000;
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    drop(write!(
        out,
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:06}Z",
        unix_micros % 1_000_000
    ));
}

/// Returns the year, month and day of a day counted from 1970-01-01. This is Howard Hinnant's
/// `civil_from_days`, in which years start in March so that the leap day is the last day of the
/// year.
const fn date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + era * 400 + (month <= 2) as u64;
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps() {
        for (micros, want) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399_999_999, "2000-02-28T23:59:59.999999Z"),
            (951_782_400_000_000, "2000-02-29T00:00:00.000000Z"),
            (1_709_164_800_000_001, "2024-02-29T00:00:00.000001Z"),
            (1_735_689_599_500_000, "2024-12-31T23:59:59.500000Z"),
            (4_107_542_400_000_000, "2100-03-01T00:00:00.000000Z"),
        ] {
            let mut out = Vec::new();
            timestamp(micros, &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), want);
        }
    }

    #[test]
    fn untrusted_text_is_escaped() {
        for (bytes, want) in [
            (&b"req-1"[..], "\"req-1\""),
            (b"a\"b\\c\nd", "\"a\\\"b\\\\c\\u000ad\""),
            (b"\xc3\xa9\xc2\x85", "\"\u{e9}\\u0085\""),
            (b"x\xff\xc3", "\"x\u{fffd}\u{fffd}\""),
        ] {
            let mut out = Vec::new();
            text(bytes, &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), want);
        }
    }
}
