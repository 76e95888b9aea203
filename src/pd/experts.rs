//! Routed experts: the experts of a mixture-of-experts model that computed each token, which
//! engines return for router replay (`docs/pd-sidecar.md#routed-experts`).
//!
//! The decoder returns a row for every token of the sequence, but did not compute the prompt: its
//! rows of the prompt are invalid. The prefiller's rows replace them. The size of the tensor does
//! not change, so only some characters of the decoder's response do.
//!
//! Two forms exist in `choices[].routed_experts`: an `.npy` file in base64 (vLLM), and an object
//! with `data` in base64, `shape`, `start` and `dtype` (prime-rl).

use std::fmt;

use crate::base64::{self, Text};
use crate::budget::Kept;
use crate::json::{elements, inner, member};
use crate::span::Span;

/// The rows of the prompt in a prefill response.
#[derive(Debug)]
pub struct PromptExperts {
    layout: Layout,
    rows: usize,
    /// Bytes of all rows.
    bytes: usize,
    header_bytes: usize,
    choices: Kept,
    /// The base64 text in `choices`.
    text: Span,
}

/// The progress of replacing rows in a decoder's response.
#[derive(Debug)]
pub struct Merging {
    /// For each choice whose rows are not all replaced, its base64 text and the bytes before its
    /// first row.
    places: Vec<(Span, usize)>,
    /// Bytes replaced in the last of them.
    done: usize,
}

/// Bytes of rows that are replaced in one step, which takes some 100 us.
const STEP_BYTES: usize = 3 * 16 * 1024;

/// The reason why the experts of two responses cannot be merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertsError {
    /// The decoder's response has none, although the prefill response has some.
    Missing,
    /// The prefiller's are larger than the limit of what is kept.
    TooLarge,
    /// A value has neither of the known forms, or its size is not that of its shape.
    Malformed,
    /// The responses have different forms, types or shapes, or the decoder returned fewer rows than
    /// the prompt has.
    Mismatch,
}

impl fmt::Display for ExpertsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "only the prefiller returned routed experts",
            Self::TooLarge => "the prefiller's are larger than --max-prefill-answer",
            Self::Malformed => "routed experts have an unknown form or a wrong size",
            Self::Mismatch => "the routed experts of prefiller and decoder do not match",
        })
    }
}

/// The properties that are equal in mergeable tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Layout {
    is_npy: bool,
    dtype: String,
    /// The lengths of the dimensions after the first.
    inner: Vec<usize>,
    /// Index of the token of the first row.
    start: usize,
}

/// A tensor in a response.
#[derive(Debug)]
struct Tensor<'a> {
    layout: Layout,
    text: Text<'a>,
    /// Bytes before the first row.
    header_bytes: usize,
    rows: usize,
    row_bytes: usize,
}

/// Longest header of an `.npy` file that is read. That of a tensor of three dimensions has 128
/// bytes.
const NPY_HEADER_BYTES_MAX: usize = 1024;
/// Most dimensions of a tensor: tokens, layers and experts per token, and one more.
const DIMENSIONS_MAX: usize = 4;

impl PromptExperts {
    /// Finds the rows in the `choices` of a prefill response, which must be valid JSON. Returns
    /// `None` if there are none.
    ///
    /// # Errors
    /// [`ExpertsError::Malformed`].
    pub fn read(choices: Kept) -> Result<Option<Self>, ExpertsError> {
        let value = elements(&choices)
            .next()
            .and_then(|choice| member(choice.value, "routed_experts"));
        let Some(value) = value.filter(|value| *value != b"null") else {
            return Ok(None);
        };
        let tensor = Tensor::read(value)?;
        Ok(Some(Self {
            text: Span::within(&choices, tensor.text.bytes()),
            bytes: tensor.rows * tensor.row_bytes,
            header_bytes: tensor.header_bytes,
            rows: tensor.rows,
            layout: tensor.layout,
            choices,
        }))
    }

    /// Begins to replace the rows of the prompt in each choice of a decoder's response, which must
    /// be valid JSON.
    ///
    /// # Errors
    /// The experts cannot be merged; the response is then unusable.
    pub fn begin_merge(&self, response: &[u8]) -> Result<Merging, ExpertsError> {
        let places = self.places(response)?;
        Ok(Merging { places, done: 0 })
    }

    /// Replaces more rows in the response that the merge was begun with. Returns whether all are
    /// replaced.
    ///
    /// # Errors
    /// As [`PromptExperts::begin_merge`].
    pub fn merge_more(
        &self,
        merging: &mut Merging,
        response: &mut [u8],
    ) -> Result<bool, ExpertsError> {
        let Some((place, header_bytes)) = merging.places.last() else {
            return Ok(true);
        };
        let step = STEP_BYTES.min(self.bytes - merging.done);
        let text = Text::new(self.text.of(&self.choices));
        let rows = text.and_then(|text| text.decode(self.header_bytes + merging.done, step));
        let replaced = rows.and_then(|rows| {
            let text = &mut response[place.start..place.end];
            base64::overwrite(text, header_bytes + merging.done, &rows)
        });
        replaced.ok_or(ExpertsError::Malformed)?;
        merging.done += step;
        if merging.done == self.bytes {
            merging.places.pop();
            merging.done = 0;
        }
        Ok(merging.places.is_empty())
    }

    /// Finds the base64 text of each choice in `response`, and the number of bytes before its first
    /// row.
    fn places(&self, response: &[u8]) -> Result<Vec<(Span, usize)>, ExpertsError> {
        let choices = member(response, "choices").ok_or(ExpertsError::Missing)?;
        let places = elements(choices).map(|choice| {
            let value = member(choice.value, "routed_experts");
            let value = value.filter(|value| *value != b"null");
            let tensor = Tensor::read(value.ok_or(ExpertsError::Missing)?)?;
            if tensor.layout != self.layout || tensor.rows < self.rows {
                return Err(ExpertsError::Mismatch);
            }
            Ok((
                Span::within(response, tensor.text.bytes()),
                tensor.header_bytes,
            ))
        });
        let places: Vec<_> = places.collect::<Result<_, _>>()?;
        if places.is_empty() {
            return Err(ExpertsError::Missing);
        }
        Ok(places)
    }
}

impl<'a> Tensor<'a> {
    fn read(value: &'a [u8]) -> Result<Self, ExpertsError> {
        let tensor = if value.first() == Some(&b'{') {
            Self::object(value)
        } else {
            Self::npy(value)
        };
        tensor
            .filter(Self::has_size_of_shape)
            .ok_or(ExpertsError::Malformed)
    }

    fn has_size_of_shape(&self) -> bool {
        let rows = self.rows.checked_mul(self.row_bytes);
        let want = rows.and_then(|bytes| bytes.checked_add(self.header_bytes));
        want == Some(self.text.decoded_len())
    }

    /// Reads the form of prime-rl. Without `dtype`, an index has one byte.
    fn object(value: &'a [u8]) -> Option<Self> {
        let text = Text::new(inner(member(value, "data")?)?)?;
        let shape: Option<Vec<usize>> = elements(member(value, "shape")?)
            .map(|length| number(length.value))
            .collect();
        let dtype = match member(value, "dtype") {
            Some(dtype) => std::str::from_utf8(inner(dtype)?).ok()?,
            None => "uint8",
        };
        let width = match dtype {
            "uint8" | "int8" => 1,
            "uint16" | "int16" => 2,
            "uint32" | "int32" => 4,
            _ => return None,
        };
        let start = match member(value, "start") {
            Some(start) => number(start)?,
            None => 0,
        };
        Self::new(text, false, dtype, width, &shape?, start, 0)
    }

    /// Reads the form of vLLM: an `.npy` file, versions 1 to 3 (numpy, `numpy.lib.format`).
    fn npy(value: &'a [u8]) -> Option<Self> {
        let text = Text::new(inner(value)?)?;
        let fixed = text.decode(0, 12)?;
        let (length, at) = match *fixed.as_slice() {
            [0x93, b'N', b'U', b'M', b'P', b'Y', 1, _, a, b, ..] => {
                (usize::from(u16::from_le_bytes([a, b])), 10)
            }
            [0x93, b'N', b'U', b'M', b'P', b'Y', 2 | 3, _, a, b, c, d] => {
                (u32::from_le_bytes([a, b, c, d]) as usize, 12)
            }
            _ => return None,
        };
        if length > NPY_HEADER_BYTES_MAX {
            return None;
        }
        let header = text.decode(at, length)?;
        let header = std::str::from_utf8(&header).ok()?;
        let after = |name: &str| Some(header.split_once(name)?.1.trim_start());
        if !after("'fortran_order':")?.starts_with("False") {
            return None;
        }
        let dtype = after("'descr':")?.strip_prefix('\'')?.split_once('\'')?.0;
        let width = dtype.get(2..)?.parse().ok()?;
        let shape = after("'shape':")?.strip_prefix('(')?.split_once(')')?.0;
        let shape: Option<Vec<usize>> = shape
            .split(',')
            .map(str::trim)
            .filter(|length| !length.is_empty())
            .map(|length| length.parse().ok())
            .collect();
        Self::new(text, true, dtype, width, &shape?, 0, at + length)
    }

    fn new(
        text: Text<'a>,
        is_npy: bool,
        dtype: &str,
        width: usize,
        shape: &[usize],
        start: usize,
        header_bytes: usize,
    ) -> Option<Self> {
        let (&rows, inner) = shape.split_first()?;
        if shape.len() > DIMENSIONS_MAX || width == 0 {
            return None;
        }
        let row_bytes = inner
            .iter()
            .try_fold(width, |bytes, length| bytes.checked_mul(*length))?;
        Some(Self {
            layout: Layout {
                is_npy,
                dtype: dtype.to_owned(),
                inner: inner.to_vec(),
                start,
            },
            text,
            header_bytes,
            rows,
            row_bytes,
        })
    }
}

fn number(text: &[u8]) -> Option<usize> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base64::encode;
    use serde_json::{Value, json};

    fn npy(version: u8, dtype: &str, shape: &str, data: &[u8]) -> String {
        let dict = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}");
        let fixed = if version == 1 { 10 } else { 12 };
        let padded = (fixed + dict.len() + 1).next_multiple_of(64) - fixed;
        let mut file = b"\x93NUMPY".to_vec();
        file.extend([version, 0]);
        if version == 1 {
            file.extend((padded as u16).to_le_bytes());
        } else {
            file.extend((padded as u32).to_le_bytes());
        }
        file.extend(format!("{dict:<width$}\n", width = padded - 1).as_bytes());
        file.extend(data);
        encode(&file)
    }

    fn rows(first: u8, count: usize, row: usize) -> Vec<u8> {
        (0..count * row)
            .map(|at| first.wrapping_add(at as u8))
            .collect()
    }

    fn merge_all(prompt: &PromptExperts, response: &mut [u8]) -> Result<(), ExpertsError> {
        let mut merging = prompt.begin_merge(response)?;
        while !prompt.merge_more(&mut merging, response)? {}
        Ok(())
    }

    fn merged(prefill: &Value, decode: &Value) -> Result<Value, ExpertsError> {
        let choices = json!([{"index": 0, "routed_experts": prefill}]).to_string();
        let prompt = PromptExperts::read(Kept::unlimited(&choices))?.unwrap();
        let mut response =
            json!({"id": "x", "choices": [{"routed_experts": decode, "index": 0}], "usage": {}})
                .to_string()
                .into_bytes();
        let before = response.len();
        merge_all(&prompt, &mut response)?;
        assert_eq!(response.len(), before);
        let mut response: Value = serde_json::from_slice(&response).unwrap();
        assert_eq!(
            (&response["id"], &response["usage"]),
            (&json!("x"), &json!({}))
        );
        Ok(response["choices"][0]["routed_experts"].take())
    }

    #[test]
    fn many_rows_are_replaced_in_several_steps() {
        let (prompt, all, row) = (STEP_BYTES / 10, STEP_BYTES / 4, 25);
        let (ours, theirs) = (rows(7, prompt, row), rows(200, all, row));
        let file = |rows: usize, data: &[u8]| npy(1, "|u1", &format!("({rows}, 5, 5)"), data);
        let choices = json!([{"routed_experts": file(prompt, &ours)}]).to_string();
        let prompt_experts = PromptExperts::read(Kept::unlimited(&choices));
        let prompt_experts = prompt_experts.unwrap().unwrap();
        assert_ne!(prompt_experts.header_bytes % 3, 0, "not aligned");
        let choice = json!({"routed_experts": file(all, &theirs)});
        let mut response = json!({"choices": [choice, choice]})
            .to_string()
            .into_bytes();
        let mut merging = prompt_experts.begin_merge(&response).unwrap();
        let mut steps = 1;
        while !prompt_experts
            .merge_more(&mut merging, &mut response)
            .unwrap()
        {
            steps += 1;
        }
        assert_eq!(steps, 2 * (prompt * row).div_ceil(STEP_BYTES));
        let want = [&ours[..], &theirs[prompt * row..]].concat();
        let choice = json!({"routed_experts": file(all, &want)});
        let want = json!({"choices": [choice, choice]});
        assert_eq!(serde_json::from_slice::<Value>(&response).unwrap(), want);
    }

    /// Every remainder of the lengths modulo 3 occurs, for both forms and several types.
    #[test]
    fn the_prefillers_rows_replace_those_of_the_prompt() {
        for prompt in 0..7 {
            for output in 0..4 {
                for (layers, experts, width) in [(1, 1, 1), (2, 3, 1), (3, 2, 2), (1, 5, 4)] {
                    let row = layers * experts * width;
                    let (ours, theirs) = (rows(7, prompt, row), rows(200, prompt + output, row));
                    let want = [&ours[..], &theirs[prompt * row..]].concat();
                    let all = prompt + output;
                    let dtype = ["|u1", "<u2", "", "<i4"][width - 1];
                    let shape = |rows| format!("({rows}, {layers}, {experts})");
                    for version in [1, 2] {
                        let file =
                            |rows, data: &[u8]| json!(npy(version, dtype, &shape(rows), data));
                        let got = merged(&file(prompt, &ours), &file(all, &theirs));
                        assert_eq!(got, Ok(file(all, &want)));
                    }
                    let dtype = ["uint8", "uint16", "", "int32"][width - 1];
                    let object = |rows: usize, data: &[u8]| {
                        json!({"data": encode(data), "shape": [rows, layers, experts],
                            "start": 3, "dtype": dtype})
                    };
                    let got = merged(&object(prompt, &ours), &object(all, &theirs));
                    assert_eq!(got, Ok(object(all, &want)));
                }
            }
        }
    }

    #[test]
    fn experts_that_do_not_match_are_refused() {
        let data = rows(1, 2, 6);
        let file = |dtype: &str, shape: &str, data: &[u8]| json!(npy(1, dtype, shape, data));
        let good = file("|u1", "(2, 2, 3)", &data);
        let object = json!({"data": encode(&data), "shape": [2, 2, 3], "start": 0});
        for (prefill, decode, want) in [
            (&good, Value::Null, ExpertsError::Missing),
            (&good, json!("AAAA"), ExpertsError::Malformed),
            (&good, json!(7), ExpertsError::Malformed),
            (
                &good,
                file("|u1", "(3, 2, 3)", &data),
                ExpertsError::Malformed,
            ),
            (
                &good,
                file("|u1", "(1, 2, 3)", &data[..6]),
                ExpertsError::Mismatch,
            ),
            (
                &good,
                file("|u1", "(2, 3, 2)", &data),
                ExpertsError::Mismatch,
            ),
            (
                &good,
                file("<u2", "(2, 1, 3)", &data),
                ExpertsError::Mismatch,
            ),
            (&good, object.clone(), ExpertsError::Mismatch),
            (&object, good.clone(), ExpertsError::Mismatch),
            (
                &object,
                json!({"data": encode(&data), "shape": [2, 2, 3], "start": 1}),
                ExpertsError::Mismatch,
            ),
            (&json!("x"), good.clone(), ExpertsError::Malformed),
            (
                &json!({"data": encode(&data), "shape": [2, 2, 3], "dtype": "float"}),
                good.clone(),
                ExpertsError::Malformed,
            ),
            (
                &json!({"data": encode(&data), "shape": [2, usize::MAX, 3]}),
                good.clone(),
                ExpertsError::Malformed,
            ),
        ] {
            assert_eq!(merged(prefill, &decode), Err(want), "{prefill} {decode}");
        }
        let prompt = format!(r#"[{{"routed_experts":{good}}}]"#);
        let prompt = PromptExperts::read(Kept::unlimited(&prompt));
        let prompt = prompt.unwrap().unwrap();
        for response in [r#"{"choices":[]}"#, r#"{"error":{}}"#] {
            let got = merge_all(&prompt, &mut response.as_bytes().to_vec());
            assert_eq!(got, Err(ExpertsError::Missing));
        }
    }

    #[test]
    fn responses_without_experts_have_none() {
        for choices in ["[]", "[{}]", r#"[{"routed_experts":null}]"#, "null"] {
            let read = PromptExperts::read(Kept::unlimited(choices));
            assert!(read.unwrap().is_none(), "{choices}");
        }
    }
}
