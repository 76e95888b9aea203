//! Suggestions for misspelled words.

use strsim::levenshtein;

/// Levenshtein distance, in characters, up to which a word counts as a misspelling.
pub(super) const TYPO_DISTANCE_MAX: usize = 2;

/// Returns the known word nearest to `text`, if one is near enough.
///
/// The distance may be [`TYPO_DISTANCE_MAX`] or a third of the known word's length, whichever is
/// more: `pool-gruop-x` is near enough to `pool-group`.
pub(super) fn nearest<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let text = text.to_ascii_lowercase().replace('_', "-");
    let distances = known
        .into_iter()
        .map(|word| (levenshtein(&text, word), word));
    let (distance, word) = distances.min_by_key(|(distance, _)| *distance)?;
    let near = TYPO_DISTANCE_MAX.max(word.len() / 3);
    (distance <= near && distance < word.len()).then_some(word)
}

/// Returns the text `; did you mean WORD?` with the known word nearest to `text`, or an empty text
/// if none is near enough.
pub(super) fn did_you_mean<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    nearest(text, known).map_or_else(String::new, |word| format!("; did you mean `{word}`?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggestions() {
        let known = ["port", "model-server-port", "enable-tls", "host", "on"];
        for (text, want) in [
            ("prot", Some("port")),
            ("Port", Some("port")),
            ("model_server_port", Some("model-server-port")),
            ("modelServerPort", Some("model-server-port")),
            ("enable-ssl", Some("enable-tls")),
            // A character of several bytes counts once.
            ("mødel-sërver-pört", Some("model-server-port")),
            ("xy", None),
            ("frobnicate", None),
            ("", None),
        ] {
            assert_eq!(nearest(text, known), want, "{text}");
        }
        assert_eq!(did_you_mean("hots", known), "; did you mean `host`?");
        assert_eq!(did_you_mean("", []), "");
    }
}
