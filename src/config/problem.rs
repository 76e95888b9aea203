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
        write!(f, "{}: {}", self.key, self.text)?;
        match self.excerpt.as_str() {
            "" => Ok(()),
            excerpt => write!(f, "\n{excerpt}"),
        }
    }
}
