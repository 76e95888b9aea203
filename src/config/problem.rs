//! A problem in the configuration.

use std::fmt;

/// A problem in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Source of the invalid value: a flag with its dashes, a position in a document, or the name
    /// of an environment variable.
    pub key: String,
    /// The problem and the values that are valid, without the final full stop.
    pub text: String,
    /// The line of the document with a marker below it; empty if the problem has no position.
    pub excerpt: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", Shown(&self.key), Shown(&self.text))?;
        match self.excerpt.as_str() {
            "" => Ok(()),
            excerpt => write!(f, "\n{}", Shown(excerpt)),
        }
    }
}

/// Longest part of a message, in characters.
const SHOWN_MAX: usize = 600;

/// A part of a message, which may contain text from outside: control characters are escaped, since
/// a terminal would act on them, and a long text is shortened in the middle.
struct Shown<'a>(&'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.chars().count();
        for (nth, character) in self.0.chars().enumerate() {
            if count > SHOWN_MAX && nth >= SHOWN_MAX / 2 && nth < count - SHOWN_MAX / 2 {
                if nth == SHOWN_MAX / 2 {
                    write!(f, " ... {} characters ... ", count - SHOWN_MAX)?;
                }
                continue;
            }
            match character {
                '\n' | '\t' => write!(f, "{character}")?,
                character if character.is_control() => write!(f, "{}", character.escape_default())?,
                character => write!(f, "{character}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_outside_is_escaped_and_shortened() {
        let problem = |text: &str| {
            let problem = Problem {
                key: "--key".to_owned(),
                text: text.to_owned(),
                excerpt: String::new(),
            };
            problem.to_string()
        };
        assert_eq!(
            problem("`a\x1b[31m\r\u{9b}`"),
            "--key: `a\\u{1b}[31m\\r\\u{9b}`"
        );
        assert_eq!(problem("two\nlines, \u{e9}"), "--key: two\nlines, \u{e9}");
        let long = problem(&format!("`{}` is wrong; give a number", "x".repeat(5000)));
        assert!(long.chars().count() < 700, "{long}");
        assert!(long.contains(" characters ... "), "{long}");
        assert!(long.ends_with("is wrong; give a number"), "{long}");
    }
}
