//! Reads the standard OpenTelemetry variables that apply to tracing (`docs/tracing.md`).
//!
//! `--tracing` enables tracing. A variable for traces takes precedence over the one for all
//! signals.

use std::time::Duration;

use super::super::flag_table;
use super::super::{OtlpConfig, OtlpProtocol, TraceExporter, TracingConfig, units};
use super::reader::Reader;

/// Default service name, that of pd-sidecar.
const SERVICE_NAME: &str = "llm-d-disagg-sidecar";
/// Default number of traces recorded per million, as in pd-sidecar.
const RECORDED_PER_MILLION: u32 = 100_000;
/// Default time limit of one export, from the OpenTelemetry specification.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
const ALL_RECORDED: u32 = 1_000_000;

const EXPORTER: &str = "OTEL_TRACES_EXPORTER";
const SAMPLER: &str = "OTEL_TRACES_SAMPLER";
const SAMPLER_ARG: &str = "OTEL_TRACES_SAMPLER_ARG";
/// Name of the resource attribute that contains the service name.
const SERVICE_NAME_ATTRIBUTE: &str = "service.name";

impl Reader<'_> {
    /// Returns the tracing settings, or `None` if tracing is off: without `--tracing` (the other
    /// variables are not read then), or with `OTEL_TRACES_EXPORTER=none`.
    pub(in crate::config) fn tracing(&mut self) -> Option<TracingConfig> {
        if !self.switch(&flag_table::TRACING) {
            return None;
        }
        let exporter = match self.raw.variable(EXPORTER) {
            None | Some("console") => TraceExporter::Console,
            Some("otlp") => TraceExporter::Otlp(self.collector()),
            Some("none") => return None,
            Some(_) => {
                self.refuse_variable(EXPORTER, "console, otlp or none");
                TraceExporter::Console
            }
        };
        let mut resource = self.pairs("OTEL_RESOURCE_ATTRIBUTES");
        let at = resource
            .iter()
            .position(|(name, _)| name == SERVICE_NAME_ATTRIBUTE);
        let named = at.map(|at| resource.remove(at).1);
        let service_name = self.raw.variable("OTEL_SERVICE_NAME").map(str::to_owned);
        Some(TracingConfig {
            exporter,
            recorded_per_million: self.recorded_per_million(),
            service_name: service_name
                .or(named)
                .unwrap_or_else(|| SERVICE_NAME.to_owned()),
            resource,
        })
    }

    fn recorded_per_million(&mut self) -> u32 {
        let sampler = self.raw.variable(SAMPLER).unwrap_or_default();
        let root = match sampler {
            "" => "traceidratio",
            _ => sampler.strip_prefix("parentbased_").unwrap_or(sampler),
        };
        let recorded = match root {
            "always_on" => ALL_RECORDED,
            "always_off" => 0,
            "traceidratio" => self.ratio(),
            _ => {
                self.warnings.push(format!(
                    "{SAMPLER} is `{sampler}`, which is not a known sampler; using \
                     parentbased_traceidratio"
                ));
                return self.ratio();
            }
        };
        if !sampler.is_empty() && root == sampler {
            self.warnings.push(format!(
                "{SAMPLER} is `{sampler}`: the caller's sampling decision takes precedence, as with \
                 parentbased_{sampler}"
            ));
        }
        recorded
    }

    fn ratio(&mut self) -> u32 {
        let wanted = "a number from 0 to 1";
        self.variable(SAMPLER_ARG, RECORDED_PER_MILLION, wanted, per_million)
    }

    fn collector(&mut self) -> OtlpConfig {
        let (name, text) = self.signal("PROTOCOL");
        let protocol = match text.as_deref() {
            None | Some("grpc") => OtlpProtocol::Grpc,
            Some("http/protobuf") => OtlpProtocol::HttpProtobuf,
            Some(_) => {
                self.refuse_variable(&name, "grpc or http/protobuf");
                OtlpProtocol::Grpc
            }
        };
        let (certificate, file) = self.signal("CERTIFICATE");
        if file.is_some() {
            self.warnings.push(format!(
                "{certificate} is ignored: the collector's certificate is verified against the \
                 system's root certificates"
            ));
        }
        let (headers, _) = self.signal("HEADERS");
        let (timeout, _) = self.signal("TIMEOUT");
        OtlpConfig {
            protocol,
            endpoint: self.endpoint(protocol, file.is_some()),
            headers: self.pairs(&headers),
            timeout: self.variable(
                &timeout,
                EXPORT_TIMEOUT,
                "a number of milliseconds above 0",
                |text| {
                    let timeout = text.parse().ok().map(Duration::from_millis)?;
                    (!timeout.is_zero() && timeout <= units::DURATION_MAX).then_some(timeout)
                },
            ),
        }
    }

    /// Returns the URL of the collector, for `HttpProtobuf` with its path. The default host is
    /// localhost. It is reached over plain text, unless `OTEL_EXPORTER_OTLP_INSECURE` is false, or
    /// is unset and a CA certificate is configured (`certificate`). An endpoint without a scheme is
    /// reached over TLS, unless that variable is true.
    fn endpoint(&mut self, protocol: OtlpProtocol, certificate: bool) -> String {
        let (name, insecure) = self.signal("INSECURE");
        let insecure = insecure.and_then(|_| {
            let read = |text: &str| units::switch(&text.to_ascii_lowercase()).map(Some);
            self.variable(&name, None, "true or false", read)
        });
        let (name, written) = self.signal("ENDPOINT");
        let Some(written) = written else {
            let scheme = match insecure {
                Some(false) => "https",
                None if certificate => "https",
                Some(true) | None => "http",
            };
            return match protocol {
                OtlpProtocol::Grpc => format!("{scheme}://localhost:4317"),
                OtlpProtocol::HttpProtobuf => format!("{scheme}://localhost:4318/v1/traces"),
            };
        };
        let url = if written.contains("://") {
            written
        } else {
            let scheme = if insecure == Some(true) {
                "http"
            } else {
                "https"
            };
            format!("{scheme}://{written}")
        };
        let Some(path) = path(&url) else {
            self.refuse_variable(&name, "a URL such as http://collector:4317");
            return url;
        };
        match protocol {
            OtlpProtocol::HttpProtobuf if name == "OTEL_EXPORTER_OTLP_ENDPOINT" => {
                format!("{}/v1/traces", url.trim_end_matches('/'))
            }
            OtlpProtocol::HttpProtobuf if path.is_empty() => format!("{url}/"),
            OtlpProtocol::HttpProtobuf => url,
            OtlpProtocol::Grpc => url[..url.len() - path.len()].to_owned(),
        }
    }

    /// Returns the name and the value of `OTEL_EXPORTER_OTLP_TRACES_{what}` if it is set, otherwise
    /// of `OTEL_EXPORTER_OTLP_{what}`. The value is `None` if neither is set.
    fn signal(&self, what: &str) -> (String, Option<String>) {
        let traces = format!("OTEL_EXPORTER_OTLP_TRACES_{what}");
        let all = format!("OTEL_EXPORTER_OTLP_{what}");
        let name = match self.raw.variable(&traces) {
            Some(_) => traces,
            None => all,
        };
        let value = self.raw.variable(&name).map(str::to_owned);
        (name, value)
    }

    /// Parses the environment variable `name`, a list `name=value,name=value` with percent-encoded
    /// values. Malformed items are ignored with a warning. Warnings never contain a value, because
    /// values can be credentials.
    fn pairs(&mut self, name: &str) -> Vec<(String, String)> {
        let text = self.raw.variable(name).unwrap_or_default();
        let mut pairs = Vec::new();
        for (index, item) in text.split(',').enumerate() {
            if item.trim().is_empty() {
                continue;
            }
            match pair(item) {
                Some(pair) => pairs.push(pair),
                None => self.warnings.push(format!(
                    "{name}: item {} is not `name=value`; it is ignored",
                    index + 1
                )),
            }
        }
        pairs
    }
}

/// Returns the path of a URL, possibly empty, or `None` if the URL is not valid for a collector:
/// not `http` or `https`, without a host, or with user information, a query or a fragment.
fn path(url: &str) -> Option<&str> {
    let rest = url
        .strip_prefix("http://")
        .or_else(|| url.strip_prefix("https://"))?;
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let plain = url.bytes().all(|byte| byte.is_ascii_graphic());
    let host = !authority.is_empty() && !authority.starts_with(':');
    let clean = !url.contains(['@', '?', '#']);
    (plain && host && clean).then_some(path)
}

fn per_million(text: &str) -> Option<u32> {
    let ratio = text.parse::<f64>().ok()?;
    // The ratio is from 0 to 1, so the conversion cannot overflow.
    (0.0..=1.0)
        .contains(&ratio)
        .then(|| (ratio * f64::from(ALL_RECORDED)).round() as u32)
}

fn pair(item: &str) -> Option<(String, String)> {
    let (name, value) = item.split_once('=')?;
    let name = name.trim();
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic());
    let value = unescaped(value.trim())?;
    let is_value = !value.contains(|c: char| c.is_control());
    (is_name && is_value).then(|| (name.to_owned(), value))
}

/// Decodes percent-encoded text. Returns `None` if an escape is malformed or the result is not
/// UTF-8.
fn unescaped(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, others @ ..] = rest {
        rest = others;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digit = |index: usize| char::from(*others.get(index)?).to_digit(16);
        let value = digit(0)? * 16 + digit(1)?;
        bytes.push(u8::try_from(value).ok()?);
        rest = &others[2..];
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check::tests::{checked_in, problems_in};

    const ON: (&super::super::super::Key, &str) = (&flag_table::TRACING, "true");

    fn tracing(environment: &[(&str, &str)]) -> (TracingConfig, usize) {
        let checked = checked_in(environment, &[ON]);
        (checked.config.tracing.unwrap(), checked.warnings.len())
    }

    fn collector(environment: &[(&str, &str)]) -> OtlpConfig {
        let mut all = vec![("OTEL_TRACES_EXPORTER", "otlp")];
        all.extend_from_slice(environment);
        match tracing(&all).0.exporter {
            TraceExporter::Otlp(collector) => collector,
            TraceExporter::Console => panic!("no collector"),
        }
    }

    #[test]
    fn off_by_default() {
        let otlp = [("OTEL_TRACES_EXPORTER", "otlp")];
        assert_eq!(checked_in(&otlp, &[]).config.tracing, None);
        let none = [("OTEL_TRACES_EXPORTER", "none")];
        assert_eq!(checked_in(&none, &[ON]).config.tracing, None);
        let (config, warnings) = tracing(&[]);
        let want = TracingConfig {
            exporter: TraceExporter::Console,
            recorded_per_million: 100_000,
            service_name: "llm-d-disagg-sidecar".to_owned(),
            resource: Vec::new(),
        };
        assert_eq!((config, warnings), (want, 0));
    }

    #[test]
    fn samplers() {
        for (sampler, ratio, want, warnings) in [
            ("", "0.5", 500_000, 0),
            ("parentbased_traceidratio", "", 100_000, 0),
            ("parentbased_traceidratio", "1", 1_000_000, 0),
            ("parentbased_traceidratio", "0.000001", 1, 0),
            ("parentbased_traceidratio", "1.5", 100_000, 1),
            ("parentbased_traceidratio", "NaN", 100_000, 1),
            ("parentbased_traceidratio", "-0.1", 100_000, 1),
            ("parentbased_always_on", "x", 1_000_000, 0),
            ("parentbased_always_off", "", 0, 0),
            ("traceidratio", "0.25", 250_000, 1),
            ("always_on", "", 1_000_000, 1),
            ("always_off", "", 0, 1),
            ("jaeger_remote", "0.2", 200_000, 1),
        ] {
            let (config, warned) = tracing(&[(SAMPLER, sampler), (SAMPLER_ARG, ratio)]);
            let got = (config.recorded_per_million, warned);
            assert_eq!(got, (want, warnings), "{sampler} {ratio}");
        }
    }

    #[test]
    fn names_and_attributes() {
        let resource = (
            "OTEL_RESOURCE_ATTRIBUTES",
            "a=1, service.name=x%20y ,b=,=c,d,e=%zz,,f=%2",
        );
        let (config, warnings) = tracing(&[resource]);
        assert_eq!(config.service_name, "x y");
        let want = [("a", "1"), ("b", "")].map(|(name, value)| (name.into(), value.into()));
        assert_eq!(config.resource, want);
        assert_eq!(warnings, 4);
        let (config, _) = tracing(&[resource, ("OTEL_SERVICE_NAME", "z")]);
        assert_eq!(
            (config.service_name.as_str(), config.resource.len()),
            ("z", 2)
        );
    }

    #[test]
    fn endpoints() {
        const ALL: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
        const TRACES: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
        const HTTP: (&str, &str) = ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
        const GRPC: (&str, &str) = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc");
        const PLAIN: (&str, &str) = ("OTEL_EXPORTER_OTLP_INSECURE", "true");
        const SECURE: (&str, &str) = ("OTEL_EXPORTER_OTLP_TRACES_INSECURE", "false");
        let table: &[(&[(&str, &str)], &str)] = &[
            (&[], "http://localhost:4317"),
            (&[HTTP], "http://localhost:4318/v1/traces"),
            (&[HTTP, GRPC], "http://localhost:4317"),
            (&[SECURE], "https://localhost:4317"),
            (&[PLAIN], "http://localhost:4317"),
            (
                &[("OTEL_EXPORTER_OTLP_CERTIFICATE", "ca.pem")],
                "https://localhost:4317",
            ),
            (&[(ALL, "http://c:4317")], "http://c:4317"),
            (&[(ALL, "http://c:4317/")], "http://c:4317"),
            (&[(ALL, "c:4317")], "https://c:4317"),
            (&[(ALL, "c:4317"), PLAIN], "http://c:4317"),
            (&[(ALL, "http://c:4317"), SECURE], "http://c:4317"),
            (&[(ALL, "http://a"), (TRACES, "https://b")], "https://b"),
            (&[HTTP, (ALL, "http://c:4318")], "http://c:4318/v1/traces"),
            (
                &[HTTP, (ALL, "http://c:4318/otlp/")],
                "http://c:4318/otlp/v1/traces",
            ),
            (&[HTTP, (TRACES, "http://c:4318")], "http://c:4318/"),
            (&[HTTP, (TRACES, "http://c:4318/x")], "http://c:4318/x"),
        ];
        for (environment, want) in table {
            assert_eq!(collector(environment).endpoint, *want, "{environment:?}");
        }
        for url in [
            "ftp://c",
            "http://",
            "http:///x",
            "http://u:p@c",
            "http://c d",
            "http://c?x=1",
        ] {
            let environment = [("OTEL_TRACES_EXPORTER", "otlp"), (ALL, url)];
            let got = problems_in(&environment, &[ON]);
            assert_eq!(got.len(), 1, "{url}: {got:?}");
            assert!(got[0].contains("give a URL such as"), "{got:?}");
        }
    }

    #[test]
    fn exports() {
        let config = collector(&[
            ("OTEL_EXPORTER_OTLP_HEADERS", "x=1"),
            (
                "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
                "authorization=Bearer%20t",
            ),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "2500"),
        ]);
        let header = ("authorization".to_owned(), "Bearer t".to_owned());
        assert_eq!(config.headers, [header]);
        assert_eq!(config.timeout, Duration::from_millis(2500));
        assert_eq!(collector(&[]).timeout, EXPORT_TIMEOUT);
        let (_, warnings) = tracing(&[
            ("OTEL_TRACES_EXPORTER", "otlp"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
            ("OTEL_EXPORTER_OTLP_INSECURE", "maybe"),
        ]);
        assert_eq!(warnings, 2);
        for (name, value) in [
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ] {
            let environment = [("OTEL_TRACES_EXPORTER", "otlp"), (name, value)];
            // `checked_in` uses the first entry of a name.
            let environment: Vec<_> = environment.into_iter().rev().collect();
            let got = problems_in(&environment, &[ON]);
            assert!(got[0].starts_with(&format!("{name}: `{value}`")), "{got:?}");
        }
    }

    #[test]
    fn secrets_are_never_printed() {
        let environment = [
            ("OTEL_TRACES_EXPORTER", "otlp"),
            (
                "OTEL_EXPORTER_OTLP_HEADERS",
                "hunter2,authorization=hunter2%",
            ),
        ];
        let checked = checked_in(&environment, &[ON]);
        assert_eq!(checked.warnings.len(), 2);
        let effective = crate::config::check::tests::draft_in(&environment, &[ON]).effective();
        let described = checked.config.describe();
        let said = format!("{:?} {effective:?} {described:?}", checked.warnings);
        assert!(!said.contains("hunter2"), "{said}");
    }
}
