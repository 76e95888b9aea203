//! The paths that an engine knows, and the methods that each of them has.

use crate::api;
use crate::config::EngineConfig;
use crate::extra::extra;

/// Pages that every engine has, each with the methods it accepts.
const PAGES: [(&str, &str); 6] = [
    ("/health", "GET"),
    ("/metrics", "GET"),
    ("/v1/models", "GET"),
    ("/version", "GET"),
    ("/mock/requests", "GET"),
    ("/mock/fault", "POST"),
];

/// Returns the methods of `path` as a value of `allow`, or `None` if the path is unknown. A real
/// engine names the method of one route only, so this is one method, too.
///
/// With `echo`, only the pages above have a method: the paths of the APIs then accept every method.
pub(crate) fn allow(path: &str, config: &EngineConfig) -> Option<&'static str> {
    let page = PAGES.iter().find(|(known, _)| *known == path);
    if let Some((_, methods)) = page {
        return Some(methods);
    }
    match path {
        _ if config.echo => None,
        "/ping" | "/load" => Some("GET"),
        "/query" if config.bootstrap.is_some() => Some("GET"),
        _ if extra(path, config).is_some() => Some("POST"),
        _ => api::route(path).map(|_| "POST"),
    }
}

/// Paths that the metrics of HTTP requests list, in addition to the APIs. Like vLLM, they leave out
/// the pages that are polled.
const LISTED: [&str; 1] = ["/v1/models"];
/// The paths of all APIs.
const APIS: [&str; 15] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/inference/v1/generate",
    "/invocations",
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
];

/// Returns the `handler` label of a request to `path`: the path if it is known, otherwise `none`.
/// Returns `None` for a path that is not measured.
pub(crate) fn handler(path: &str, config: &EngineConfig) -> Option<&'static str> {
    let listed = APIS.iter().chain(&LISTED).find(|known| **known == path);
    match listed {
        Some(known) => Some(known),
        None if allow(path, config).is_some() => None,
        None => Some("none"),
    }
}

/// Returns the `method` label of a request: a standard method, or `OTHER`.
pub(crate) fn method(method: &str) -> &'static str {
    const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
    let known = METHODS.iter().find(|known| **known == method);
    known.copied().unwrap_or("OTHER")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_api_has_a_handler() {
        let config = EngineConfig {
            look_alike: true,
            ..EngineConfig::default()
        };
        for path in APIS {
            let known = api::route(path).is_some() || extra(path, &config).is_some();
            assert!(known, "{path}");
            assert_eq!(handler(path, &config), Some(path));
        }
        assert_eq!(handler("/nothing", &config), Some("none"));
        assert_eq!(handler("/metrics", &config), None);
        assert_eq!((method("GET"), method("BREW")), ("GET", "OTHER"));
    }

    #[test]
    fn each_path_has_its_method() {
        let echo = EngineConfig::default();
        let strict = EngineConfig {
            echo: false,
            ..EngineConfig::default()
        };
        for (path, of_echo, of_strict) in [
            ("/health", Some("GET"), Some("GET")),
            ("/ping", None, Some("GET")),
            ("/v1/chat/completions", None, Some("POST")),
            ("/query", None, None),
            ("/nothing", None, None),
        ] {
            assert_eq!(allow(path, &echo), of_echo, "{path}");
            assert_eq!(allow(path, &strict), of_strict, "{path}");
        }
    }
}
