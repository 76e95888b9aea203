//! The report of `ringside check-config`, as text or JSON.

use super::Exit;
use super::personality;
use crate::config::{Checked, Config, Problem, RawConfig, Source};
use crate::json::Quoted;

/// A configuration to check. Its values are valid; the rest is checked like at a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckConfig {
    /// The configuration.
    pub config: Config,
    /// Whether checks that need the network are left out.
    pub is_offline: bool,
    form: Form,
    values: Vec<(&'static str, String, Source)>,
    warnings: Vec<String>,
}

/// The form of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    pub(super) is_json: bool,
    /// Whether values that are the defaults are left out.
    pub(super) is_diff: bool,
}

impl CheckConfig {
    pub(super) fn new(raw: &RawConfig, checked: Checked, form: Form, is_offline: bool) -> Self {
        let values = raw.effective().into_iter();
        let is_shown = |source: &Source| !form.is_diff || *source != Source::Default;
        Self {
            config: checked.config,
            is_offline,
            form,
            values: values.filter(|(.., source)| is_shown(source)).collect(),
            warnings: checked.warnings,
        }
    }

    /// Returns the report. Its exit code is that of the first problem.
    #[must_use]
    pub fn conclude(mut self, problems: &[Exit], warnings: Vec<String>) -> Exit {
        self.warnings.extend(warnings);
        let texts: Vec<_> = problems.iter().map(|exit| plain(&exit.message)).collect();
        let code = problems.first().map_or(Exit::OK, |exit| exit.code);
        if self.form.is_json {
            let values = self.values.iter().map(|(name, text, source)| {
                let source = source.to_string();
                let (name, text) = (Quoted(name), Quoted(text));
                format!(
                    r#"{{"key":{name},"value":{text},"source":{}}}"#,
                    Quoted(&source)
                )
            });
            return json(code, &texts, &self.warnings, values.collect());
        }
        let report = personality::report(&self.values, &self.config, &self.warnings, &texts);
        Exit {
            code,
            message: report,
            to_stdout: problems.is_empty(),
        }
    }
}

/// Returns the report of a configuration whose values are invalid, as JSON.
pub(super) fn refused(problems: &[Problem]) -> Exit {
    let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
    json(Exit::CONFIG, &texts, &[], Vec::new())
}

fn json(code: u8, problems: &[String], warnings: &[String], values: Vec<String>) -> Exit {
    let list = |texts: &[String]| {
        let texts: Vec<_> = texts.iter().map(|text| Quoted(text).to_string()).collect();
        texts.join(",")
    };
    Exit {
        code,
        message: format!(
            r#"{{"valid":{},"problems":[{}],"warnings":[{}],"values":[{}]}}"#,
            problems.is_empty(),
            list(problems),
            list(warnings),
            values.join(",")
        ),
        to_stdout: true,
    }
}

/// Returns a message without the name of the program.
fn plain(message: &str) -> String {
    let message = message.strip_prefix("ringside: ").unwrap_or(message);
    message.trim_end().to_owned()
}
