//! The two text formats of an exposition, and the choice between them.
//!
//! The registry writes `OpenMetrics` 1.0. Clients that do not ask for it get the older text format
//! of Prometheus, version 0.0.4, which `promtool check metrics` and most other tools read: the same
//! samples, with other names in the lines about families.

use std::fmt::Write as _;

/// A text format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposition {
    /// `OpenMetrics` 1.0.
    OpenMetrics,
    /// The text format of Prometheus, version 0.0.4.
    Text,
}

impl Exposition {
    /// Returns the format that a client with this `Accept` field prefers. `OpenMetrics` must be
    /// asked for by its name, and at least as much as plain text (RFC 9110 12.5.1).
    #[must_use]
    pub fn accepted(accept: &str) -> Self {
        let weight = |media_type: &str| {
            let ranges = accept.split(',').map(str::trim);
            let mut ranges = ranges.filter_map(|range| {
                let (name, parameters) = range.split_once(';').unwrap_or((range, ""));
                name.trim()
                    .eq_ignore_ascii_case(media_type)
                    .then(|| weight_of(parameters))
            });
            ranges.next()
        };
        match (weight("application/openmetrics-text"), weight("text/plain")) {
            (Some(open), _) if open <= 0.0 => Self::Text,
            (Some(open), Some(plain)) if open < plain => Self::Text,
            (Some(_), _) => Self::OpenMetrics,
            (None, _) => Self::Text,
        }
    }

    /// Returns the media type.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// Returns an exposition in `OpenMetrics` in this format.
    #[must_use]
    pub fn of(self, open_metrics: String) -> String {
        match self {
            Self::OpenMetrics => open_metrics,
            Self::Text => text(&open_metrics),
        }
    }
}

/// Returns the weight in the parameters of a media range: 1 without one, or with an invalid one.
fn weight_of(parameters: &str) -> f32 {
    let mut weights = parameters.split(';').filter_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("q").then(|| value.trim())
    });
    weights.next().and_then(|q| q.parse().ok()).unwrap_or(1.0)
}

/// Converts `OpenMetrics` to the text format. In that, the family of a counter has the name of its
/// samples, a value of type `info` is a gauge, and there are neither units nor a mark of the end.
fn text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            // The name depends on the type, which is in the next line.
            help = rest.split_once(' ').map(|(_, help)| help);
        } else if let Some((name, kind)) = line
            .strip_prefix("# TYPE ")
            .and_then(|rest| rest.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            if let Some(help) = help.take() {
                // Quotes are not escaped here.
                let help = help.replace("\\\"", "\"");
                let _ = writeln!(text, "# HELP {name}{suffix} {help}");
            }
            let _ = writeln!(text, "# TYPE {name}{suffix} {kind}");
        } else if !line.starts_with('#') {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_metrics_must_be_asked_for() {
        use Exposition::{OpenMetrics, Text};
        // The third one is that of Prometheus 2.50.
        for (accept, want) in [
            ("", Text),
            ("*/*", Text),
            (
                "application/openmetrics-text;version=1.0.0,application/openmetrics-text;\
                 version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                OpenMetrics,
            ),
            ("text/plain;version=0.0.4", Text),
            ("application/openmetrics-text", OpenMetrics),
            (
                "Application/OpenMetrics-Text; q=0.3, text/plain; q=0.9",
                Text,
            ),
            ("text/plain, application/openmetrics-text", OpenMetrics),
            ("application/openmetrics-text;q=0", Text),
            ("application/json", Text),
        ] {
            assert_eq!(Exposition::accepted(accept), want, "{accept}");
        }
    }

    #[test]
    fn families_get_the_names_of_the_text_format() {
        let open_metrics = "# HELP a_b Things, \\\"quoted\\\" and \\\\.\n# TYPE a_b counter\n\
                            # UNIT a_b bytes\na_b_total{x=\"1\"} 2\n\
                            # HELP c Info.\n# TYPE c info\nc_info{v=\"# HELP\"} 1\n\
                            # TYPE d unknown\nd 1\n# HELP e Times.\n# TYPE e histogram\n\
                            e_bucket{le=\"+Inf\"} 1\n# EOF\n";
        let want = "# HELP a_b_total Things, \"quoted\" and \\\\.\n# TYPE a_b_total counter\n\
                    a_b_total{x=\"1\"} 2\n# HELP c_info Info.\n# TYPE c_info gauge\n\
                    c_info{v=\"# HELP\"} 1\n# TYPE d untyped\nd 1\n# HELP e Times.\n\
                    # TYPE e histogram\ne_bucket{le=\"+Inf\"} 1\n";
        assert_eq!(Exposition::Text.of(open_metrics.to_owned()), want);
        assert_eq!(
            Exposition::OpenMetrics.of(open_metrics.to_owned()),
            open_metrics
        );
    }
}
