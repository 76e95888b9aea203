//! Overwrites the transfer parameters in the `vllm_xargs` of a form while it streams.
//!
//! vLLM's audio paths take forms, and use the JSON object in the part `vllm_xargs` as `extra_args`,
//! as other paths do with that member. All other parts pass as they arrive.

use memchr::memmem;

use super::error::JsonError;
use super::mask::Mask;
use super::scan::{Level, Watch};
use crate::h1::{FormError, part_name};
use crate::limits::{FORM_PART_HEAD_BYTES_MAX, FORM_VALUE_BYTES_MAX};

/// The members of `vllm_xargs` that are overwritten.
const OWNED: Watch = &[
    (Level::Top, "kv_transfer_params"),
    (Level::Top, "ec_transfer_params"),
];

/// Name of the part that is inspected.
const XARGS: &[u8] = b"vllm_xargs";

/// Reason why a form must not be forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormMaskError {
    /// It is not a form that every parser reads in the same way.
    Form(FormError),
    /// Its `vllm_xargs` are not valid, or have a value that can neither be overwritten nor pass.
    Json(JsonError),
}

/// Overwrites values in the `vllm_xargs` of a form.
#[derive(Clone, Debug)]
pub struct FormMask {
    /// Line break, two hyphens and the boundary: the beginning of each delimiter.
    delimiter: Vec<u8>,
    state: State,
    /// Bytes that have been received and cannot be passed on yet.
    held: Vec<u8>,
    /// Number of bytes of `held` in which no delimiter begins.
    searched: usize,
    masked: u32,
    failed: Option<FormMaskError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first boundary.
    Start,
    /// After a boundary.
    AfterBoundary,
    PartHead,
    /// In a part that passes.
    Data,
    /// In the part `vllm_xargs`.
    Xargs,
    /// After the last boundary.
    End,
}

/// How to continue with the next bytes that are held.
enum Step {
    /// This many pass, and the state changes.
    Pass(usize, State),
    /// This many pass, and then more must arrive.
    Wait(usize),
}

impl FormMask {
    /// Creates a mask for a form with this boundary.
    #[must_use]
    pub fn new(boundary: &[u8]) -> Self {
        Self {
            delimiter: [b"\r\n--", boundary].concat(),
            state: State::Start,
            held: Vec::new(),
            searched: 0,
            masked: 0,
            failed: None,
        }
    }

    /// Reads `piece`, the next part of the body, and appends to `out` what can be passed on.
    ///
    /// # Errors
    /// The form is not valid, or a limit is exceeded. Every later call returns the same error.
    pub fn feed(&mut self, piece: &[u8], out: &mut Vec<u8>) -> Result<(), FormMaskError> {
        self.check()?;
        self.read(piece, out)
            .inspect_err(|&error| self.failed = Some(error))
    }

    /// Returns the error of an earlier [`FormMask::feed`], if one failed.
    ///
    /// # Errors
    /// As [`FormMask::feed`].
    pub fn check(&self) -> Result<(), FormMaskError> {
        self.failed.map_or(Ok(()), Err)
    }

    /// Checks that the form is complete. Must be called at the end of the body.
    ///
    /// # Errors
    /// It is not, or [`FormMask::feed`] failed earlier.
    pub fn finish(&self) -> Result<(), FormMaskError> {
        self.check()?;
        match self.state {
            State::End => Ok(()),
            _ => Err(FormMaskError::Form(FormError::Incomplete)),
        }
    }

    /// Returns the number of values overwritten.
    #[must_use]
    pub const fn masked(&self) -> u32 {
        self.masked
    }

    fn read(&mut self, piece: &[u8], out: &mut Vec<u8>) -> Result<(), FormMaskError> {
        self.held.extend_from_slice(piece);
        let mut at = 0;
        loop {
            let step = self.step(at)?;
            let (passed, state) = match step {
                Step::Pass(passed, state) => (passed, Some(state)),
                Step::Wait(passed) => (passed, None),
            };
            out.extend_from_slice(&self.held[at..at + passed]);
            at += passed;
            let Some(state) = state else {
                break;
            };
            self.state = state;
            self.searched = 0;
        }
        self.held.drain(..at);
        Ok(())
    }

    /// Returns how to continue with the held bytes from `at` on.
    fn step(&mut self, at: usize) -> Result<Step, FormMaskError> {
        let held = &self.held[at..];
        match self.state {
            State::Start => self.start(at).map_err(FormMaskError::Form),
            State::AfterBoundary => match held {
                [b'\r', b'\n', ..] => Ok(Step::Pass(2, State::PartHead)),
                [b'-', b'-', ..] => Ok(Step::Pass(2, State::End)),
                [] | [b'\r' | b'-'] => Ok(Step::Wait(0)),
                _ => Err(FormMaskError::Form(FormError::AfterBoundary)),
            },
            State::PartHead => self.part_head(at).map_err(FormMaskError::Form),
            State::Data => Ok(match self.delimiter_at(at) {
                Found::Whole(len) => Step::Pass(len + self.delimiter.len(), State::AfterBoundary),
                Found::Perhaps(len) => Step::Wait(len),
            }),
            State::Xargs => {
                let (len, is_whole) = match self.delimiter_at(at) {
                    Found::Whole(len) => (len, true),
                    Found::Perhaps(len) => (len, false),
                };
                if len > FORM_VALUE_BYTES_MAX {
                    return Err(FormMaskError::Form(FormError::ValueTooLarge));
                }
                if !is_whole {
                    self.searched = len;
                    return Ok(Step::Wait(0));
                }
                self.mask(at, at + len)?;
                let passed = len + self.delimiter.len();
                Ok(Step::Pass(passed, State::AfterBoundary))
            }
            State::End => Ok(Step::Wait(held.len())),
        }
    }

    /// Reads up to the first boundary. Parsers skip line breaks before it.
    fn start(&self, at: usize) -> Result<Step, FormError> {
        let held = &self.held[at..];
        let blank = held.iter().take_while(|byte| matches!(byte, b'\r' | b'\n'));
        let blank = blank.count();
        let first = &self.delimiter[2..];
        let rest = &held[blank..];
        if rest.starts_with(first) {
            return Ok(Step::Pass(blank + first.len(), State::AfterBoundary));
        }
        if first.starts_with(rest) {
            return Ok(Step::Wait(blank));
        }
        Err(FormError::Start)
    }

    fn part_head(&mut self, at: usize) -> Result<Step, FormError> {
        const END: &[u8] = b"\r\n\r\n";
        let held = &self.held[at..];
        let from = self.searched.saturating_sub(END.len() - 1);
        let Some(end) = memmem::find(&held[from..], END) else {
            if held.len() > FORM_PART_HEAD_BYTES_MAX {
                return Err(FormError::PartHead);
            }
            self.searched = held.len();
            return Ok(Step::Wait(0));
        };
        let len = from + end + END.len();
        if len > FORM_PART_HEAD_BYTES_MAX {
            return Err(FormError::PartHead);
        }
        let state = if part_name(&held[..len])? == XARGS {
            State::Xargs
        } else {
            State::Data
        };
        Ok(Step::Pass(len, state))
    }

    /// Searches for the next delimiter from `at` on.
    fn delimiter_at(&self, at: usize) -> Found {
        let held = &self.held[at..];
        let from = self.searched.min(held.len());
        if let Some(found) = memmem::find(&held[from..], &self.delimiter) {
            return Found::Whole(from + found);
        }
        // Only the last bytes can be the beginning of a delimiter, which has one line break.
        let tail = held
            .len()
            .saturating_sub(self.delimiter.len() - 1)
            .max(from);
        let begins = |&start: &usize| self.delimiter.starts_with(&held[start..]);
        let candidates = memchr::memchr_iter(b'\r', &held[tail..]).map(|found| tail + found);
        Found::Perhaps(candidates.rev().find(begins).unwrap_or(held.len()))
    }

    /// Overwrites values in the held bytes from `start` to `end`, which are JSON.
    fn mask(&mut self, start: usize, end: usize) -> Result<(), FormMaskError> {
        let value = &mut self.held[start..end];
        // Not given.
        if value.trim_ascii().is_empty() || value.trim_ascii() == b"null" {
            return Ok(());
        }
        let mut mask = Mask::new(OWNED);
        mask.feed(value).map_err(FormMaskError::Json)?;
        mask.finish().map_err(FormMaskError::Json)?;
        self.masked = self.masked.saturating_add(mask.masked());
        Ok(())
    }
}

/// Result of the search for a delimiter.
enum Found {
    /// It begins after this many bytes.
    Whole(usize),
    /// If one begins, then not before this many bytes.
    Perhaps(usize),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::JsonReason;

    fn part(name: &str, value: &str) -> String {
        format!("--X-1\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
    }

    fn masked(form: &str, size: usize) -> Result<(String, u32), FormMaskError> {
        let mut mask = FormMask::new(b"X-1");
        let mut out = Vec::new();
        for piece in form.as_bytes().chunks(size) {
            mask.feed(piece, &mut out)?;
        }
        mask.finish()?;
        Ok((String::from_utf8(out).unwrap(), mask.masked()))
    }

    #[test]
    fn transfer_parameters_are_overwritten_for_every_cut() {
        let audio = "RIFF\r\n--X-\r\n--X\r\r\n-\n--X-1 \0 vllm_xargs {\"kv_transfer_params\":1}";
        let cases = [
            (
                r#"{"kv_transfer_params":"xyz"}"#,
                r#"{"kv_transfer_params":null }"#,
                1,
            ),
            (
                r#" {"a":[1],"kv_transfer_par\u0061ms":{"x":[2]},"ec_transfer_params":1234}"#,
                r#" {"a":[1],"kv_transfer_par\u0061ms":null     ,"ec_transfer_params":null}"#,
                2,
            ),
            (
                r#"{"x":{"kv_transfer_params":"abcd"}}"#,
                r#"{"x":{"kv_transfer_params":"abcd"}}"#,
                0,
            ),
            (
                "{\r\n\"kv_transfer_params\":\r\n[1,\r\n-2]}",
                "{\r\n\"kv_transfer_params\":\r\nnull    }",
                1,
            ),
            ("", "", 0),
            ("null", "null", 0),
        ];
        for (value, want, count) in cases {
            let form = |value: &str| {
                let parts = [
                    part("model", "m"),
                    part("file", audio),
                    part("vllm_xargs", value),
                    part("vllm_xargs", "{}"),
                ];
                format!("\r\n{}--X-1--\r\nepilogue", parts.concat())
            };
            for size in 1..=form(value).len() {
                assert_eq!(
                    masked(&form(value), size),
                    Ok((form(want), count)),
                    "{value} {size}"
                );
            }
        }
    }

    #[test]
    fn what_parsers_read_differently_is_refused() {
        let good = part("a", "b");
        let form = |error| Err(FormMaskError::Form(error));
        for (text, want) in [
            (format!("x{good}--X-1--"), form(FormError::Start)),
            (format!("preamble\r\n{good}--X-1--"), form(FormError::Start)),
            (good.clone(), form(FormError::Incomplete)),
            (format!("{good}--X-1-"), form(FormError::Incomplete)),
            (format!("{good}--X-1 \r\n"), form(FormError::AfterBoundary)),
            (format!("{good}--X-12"), form(FormError::AfterBoundary)),
            (
                good.replace("--X-1\r\n", "--X-1\n"),
                form(FormError::AfterBoundary),
            ),
            (
                good.replace(": form-data", "\r\n: form-data"),
                form(FormError::PartHead),
            ),
            (good.replace("name=", "nome="), form(FormError::PartName)),
            (
                format!("--X-1\r\nA: {}", "b".repeat(FORM_PART_HEAD_BYTES_MAX)),
                form(FormError::PartHead),
            ),
            (
                part("vllm_xargs", &" ".repeat(FORM_VALUE_BYTES_MAX + 1)),
                form(FormError::ValueTooLarge),
            ),
        ] {
            for size in [1, 7, text.len()] {
                assert_eq!(masked(&text, size), want, "{text:.60} {size}");
            }
        }
        for (value, reason) in [
            ("7", JsonReason::NotAnObject),
            (r#"{"kv_transfer_params":7}"#, JsonReason::NotClients),
        ] {
            let text = format!("{}--X-1--", part("vllm_xargs", value));
            let error = masked(&text, 9).unwrap_err();
            assert!(
                matches!(error, FormMaskError::Json(error) if error.reason == reason),
                "{error:?}"
            );
        }
    }

    #[test]
    fn the_largest_value_passes() {
        let value = format!("{{\"a\":\"{}\"}}", "x".repeat(FORM_VALUE_BYTES_MAX - 8));
        let text = format!("{}--X-1--", part("vllm_xargs", &value));
        assert_eq!(masked(&text, 1), Ok((text.clone(), 0)));
    }
}
