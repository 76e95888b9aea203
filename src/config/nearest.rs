//! What was probably meant by a word that nobody knows.

/// Letters that a mistyped word may differ in.
pub(super) const TYPO_DISTANCE_MAX: usize = 2;

/// The known word nearest to `text`, if there is one near enough. A longer word may differ in more
/// letters: a third of them, as `pool-gruop-x` may from `pool-group`.
pub(super) fn nearest<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let text = text.to_ascii_lowercase().replace('_', "-");
    let distances = known.into_iter().map(|word| (distance(&text, word), word));
    let (distance, word) = distances.min_by_key(|(distance, _)| *distance)?;
    let near = TYPO_DISTANCE_MAX.max(word.len() / 3);
    (distance <= near && distance < word.len()).then_some(word)
}

/// "; did you mean `word`?", or nothing.
pub(super) fn did_you_mean<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    nearest(text, known).map_or_else(String::new, |word| format!("; did you mean `{word}`?"))
}

/// Letters to insert, drop or replace to get from one word to the other (Levenshtein).
pub(super) fn distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (from, to, want) in [
            ("", "", 0),
            ("", "auto", 4),
            ("auto", "", 4),
            ("near", "near", 0),
            ("naer", "near", 2),
            ("nea", "near", 1),
            ("nnear", "near", 1),
            ("numa", "near", 3),
        ] {
            assert_eq!(distance(from, to), want, "{from} {to}");
        }
    }

    #[test]
    fn what_was_meant() {
        let known = ["port", "model-server-port", "enable-tls", "host", "on"];
        for (text, want) in [
            ("prot", Some("port")),
            ("Port", Some("port")),
            ("model_server_port", Some("model-server-port")),
            ("modelServerPort", Some("model-server-port")),
            ("enable-ssl", Some("enable-tls")),
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
