//! The W3C trace context (<https://www.w3.org/TR/trace-context-2/>) and the sampling decision.
//!
//! Only `traceparent` is parsed. `tracestate` and `baggage` pass through unmodified, except that a
//! `tracestate` without a valid `traceparent` is removed (section 3.3).

/// Length in bytes of the value of a `traceparent` field of version 00.
pub const TRACEPARENT_BYTES: usize = 55;

const SAMPLED: u8 = 1;
/// The flags that version 00 defines: sampled and random. All others must be sent as zero.
const KNOWN_FLAGS: u8 = 3;
const VERSION_FORBIDDEN: u8 = 0xff;

/// The contents of a `traceparent`: the ids of a trace and of one of its spans, and the flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// Id of the trace; never zero.
    pub trace_id: u128,
    /// Id of the span; never zero.
    pub span_id: u64,
    /// The `trace-flags`. Only the flags sampled (1) and random (2) can be set.
    pub flags: u8,
}

impl TraceContext {
    /// Creates the context of a new trace, which is not sampled. `random` becomes the trace id. A
    /// zero id is replaced by 1.
    #[must_use]
    pub const fn new(random: [u64; 2], span_id: u64) -> Self {
        let trace_id = (random[0] as u128) << 64 | random[1] as u128;
        Self {
            trace_id: if trace_id == 0 { 1 } else { trace_id },
            span_id: nonzero(span_id),
            flags: 0,
        }
    }

    /// Parses the values of all `traceparent` fields of a head. Returns `None` if there is not
    /// exactly one (section 3.2.1) or if it is invalid; the caller then starts a new trace.
    #[must_use]
    pub fn read<'a>(mut values: impl Iterator<Item = &'a [u8]>) -> Option<Self> {
        let value = values.next()?;
        if values.next().is_some() {
            return None;
        }
        Self::parse(value.trim_ascii())
    }

    /// Parses the value of a `traceparent` field (section 3.2.2). Returns `None` if it is invalid.
    #[must_use]
    pub fn parse(value: &[u8]) -> Option<Self> {
        let (known, rest) = value.split_at_checked(TRACEPARENT_BYTES)?;
        let hyphens = [2, 35, 52].iter().all(|at| known[*at] == b'-');
        let version = hex(&known[..2])?;
        let ends_well = match version {
            0 => rest.is_empty(),
            // Later versions may append further data after a hyphen.
            _ => rest.first().is_none_or(|byte| *byte == b'-'),
        };
        let trace_id = hex(&known[3..35])?;
        let span_id = u64::try_from(hex(&known[36..52])?).ok()?;
        let flags = u8::try_from(hex(&known[53..])?).ok()?;
        let is_valid = hyphens
            && ends_well
            && version != u128::from(VERSION_FORBIDDEN)
            && trace_id != 0
            && span_id != 0;
        is_valid.then_some(Self {
            trace_id,
            span_id,
            flags: flags & KNOWN_FLAGS,
        })
    }

    /// Returns the value of the `traceparent` field, in version 00.
    #[must_use]
    pub fn traceparent(&self) -> [u8; TRACEPARENT_BYTES] {
        let mut out = *b"00-00000000000000000000000000000000-0000000000000000-00";
        put_hex(&mut out[3..35], self.trace_id);
        put_hex(&mut out[36..52], u128::from(self.span_id));
        put_hex(&mut out[53..], u128::from(self.flags));
        out
    }

    /// Returns whether the trace is recorded, as decided by the client or by the sampler.
    #[must_use]
    pub const fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// Returns the same context with the sampled flag set.
    #[must_use]
    pub const fn sampled(self) -> Self {
        Self {
            flags: self.flags | SAMPLED,
            ..self
        }
    }

    /// Returns the context of another span, `span_id`, of the same trace. A zero id is replaced by
    /// 1.
    #[must_use]
    pub const fn child(self, span_id: u64) -> Self {
        Self {
            span_id: nonzero(span_id),
            ..self
        }
    }
}

/// Replaces zero by one, since zero is not a valid id.
const fn nonzero(id: u64) -> u64 {
    if id == 0 { 1 } else { id }
}

/// Parses at most 32 lower-case hexadecimal digits. Returns `None` if there is any other byte;
/// upper case is invalid in `traceparent`.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |value, digit| {
        let nibble = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(value << 4 | u128::from(nibble))
    })
}

/// Fills `out` with the lowest hexadecimal digits of `value`, in lower case, one digit per byte of
/// `out`.
pub(super) fn put_hex(out: &mut [u8], mut value: u128) {
    for digit in out.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(value & 15) as usize];
        value >>= 4;
    }
}

/// Decides which new traces are recorded. It implements OpenTelemetry's `TraceIdRatioBased`, so
/// that all programs with the same ratio record the same traces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampler {
    /// A trace is recorded if bits 1 to 63 of its id, read as a number, are less than this limit.
    /// Bit 0 is the lowest bit of the id.
    below: u64,
}

impl Sampler {
    /// Creates a sampler that records `recorded` of a million traces. A value of a million or more
    /// records all traces.
    #[must_use]
    pub fn per_million(recorded: u32) -> Self {
        let below = (1_u128 << 63) * u128::from(recorded.min(1_000_000)) / 1_000_000;
        Self {
            // The value is at most 2^63.
            below: u64::try_from(below).unwrap_or(u64::MAX),
        }
    }

    /// Returns whether a new trace with this id is recorded.
    #[must_use]
    pub const fn takes(self, trace_id: u128) -> bool {
        // Uses bytes 8 to 15 of the id, as OpenTelemetry's SDKs do.
        (trace_id as u64) >> 1 < self.below
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: u128 = 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c;
    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn traceparents() {
        let sampled = TraceContext {
            trace_id: ID,
            span_id: 0xb7ad_6b71_6920_3331,
            flags: 1,
        };
        let with = |flags| Some(TraceContext { flags, ..sampled });
        let version = |version: &str, behind: &str| format!("{version}{}{behind}", &GOOD[2..]);
        let flags = |flags: &str| format!("{}{flags}", &GOOD[..53]);
        let cases = [
            (GOOD.to_owned(), with(1)),
            (flags("00"), with(0)),
            (flags("02"), with(2)),
            (flags("03"), with(3)),
            // Undefined flags are not passed on.
            (flags("ff"), with(3)),
            (flags("0"), None),
            (flags("0g"), None),
            (flags("0A"), None),
            (flags("001"), None),
            (version("00", "-"), None),
            (version("00", "-what"), None),
            (version("01", ""), with(1)),
            (version("cc", "-what-the-future-says"), with(1)),
            (version("cc", "."), None),
            (version("ff", ""), None),
            (version("FF", ""), None),
            (version("0", ""), None),
            (version(".0", ""), None),
            (String::new(), None),
            ("-".to_owned(), None),
            (GOOD.to_uppercase(), None),
            (GOOD.replace("0af7", "0AF7"), None),
            (
                GOOD.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
                None,
            ),
            (GOOD.replace("b7ad6b7169203331", &"0".repeat(16)), None),
            (GOOD.replace("b7ad", "b7a"), None),
            (GOOD.replace("319c-", "319c_"), None),
            (GOOD.replace("331-", "331 "), None),
            (GOOD.replacen("00-", "00 ", 1), None),
            (GOOD.replace("9c", "9."), None),
        ];
        for (text, want) in cases {
            assert_eq!(TraceContext::parse(text.as_bytes()), want, "{text}");
        }
    }

    #[test]
    fn exactly_one_field_is_accepted() {
        let good = TraceContext::parse(GOOD.as_bytes());
        let read = |values: &[&str]| TraceContext::read(values.iter().map(|v| v.as_bytes()));
        assert!(good.is_some());
        assert_eq!(read(&[GOOD]), good);
        assert_eq!(read(&[&format!("\t{GOOD} ")]), good);
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[""]), None);
        assert_eq!(read(&[GOOD, GOOD]), None);
        assert_eq!(read(&[&format!("{GOOD},{GOOD}")]), None);
    }

    #[test]
    fn a_parsed_context_is_written_unchanged() {
        let context = TraceContext::parse(GOOD.as_bytes()).unwrap();
        assert_eq!(context.traceparent(), GOOD.as_bytes());
        let child = context.child(0xff);
        let want = "00-0af7651916cd43dd8448eb211c80319c-00000000000000ff-01";
        assert_eq!(child.traceparent(), want.as_bytes());
    }

    #[test]
    fn new_ids_are_never_zero() {
        let context = TraceContext::new([0, 0], 0);
        assert_eq!(TraceContext::parse(&context.traceparent()), Some(context));
        assert!(!context.is_sampled() && context.sampled().is_sampled());
        assert_ne!(context.child(0).span_id, 0);
        assert_eq!(TraceContext::new([1, 2], 3).trace_id, (1 << 64) | 2);
    }

    #[test]
    fn ratios() {
        // Compare with the same rule in floating point, as in OpenTelemetry's Go SDK.
        for per_million in [0, 1, 1_000, 100_000, 500_000, 999_999, 1_000_000, 2_000_000] {
            let sampler = Sampler::per_million(per_million);
            let ratio = f64::from(per_million.min(1_000_000)) / 1e6;
            for low in [
                0_u64,
                1,
                2,
                1 << 40,
                1 << 60,
                1 << 63,
                u64::MAX - 1,
                u64::MAX,
            ] {
                let share = (low >> 1) as f64 / 2_f64.powi(63);
                let takes = sampler.takes(u128::from(low) | 7 << 64);
                // A share just below one is rounded to one.
                let want = ratio >= 1.0 || share < ratio;
                assert_eq!(takes, want, "{per_million} of {low:x}");
            }
        }
    }
}
