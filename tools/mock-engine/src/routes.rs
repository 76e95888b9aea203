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

#[cfg(test)]
mod tests {
    use super::*;

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
