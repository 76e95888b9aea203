//! The HTTP APIs of engines: which requests the proxy inspects, and the shapes of their bodies.
//!
//! Pure. A personality has one table of routes.

mod error_event;

pub use error_event::has_error_event;

use crate::h1::{self, Method};
use crate::json::transform::UsageShape;

/// The API of an intercepted path, which determines the shape of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/v1/messages` (Anthropic's shape)
    Messages,
    /// `/v1/responses`
    Responses,
    /// `/inference/v1/generate` (tokens in, tokens out)
    Generate,
    /// `/invocations`: the engine dispatches the request by the shape of its body.
    Invocations,
    /// Generation requests that are never split ([`Routes::unsplit`]), such as
    /// `/v1/chat/completions/batch`. They are intercepted because engines accept transfer
    /// parameters from clients on these paths as well.
    Unsplit,
}

/// The handling of a request, by its method and path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `GET` or `HEAD` of `/health`, to which the proxy itself responds.
    Health,
    /// A generation request, whose body is inspected.
    Intercepted(Api),
    /// A request with a form, which is inspected while it is forwarded to the decoder.
    Form,
    /// Any other request, which is forwarded to the decoder without inspecting its body.
    Other,
}

/// The routes of a personality.
#[derive(Debug, PartialEq, Eq)]
pub struct Routes {
    /// The paths of generation requests (POST), each with its API.
    pub intercepted: &'static [(&'static str, Api)],
    /// Paths of requests (POST, and PUT, which SGLang accepts) whose bodies are inspected but never
    /// split: engines accept transfer parameters there, too. They also count below a prefix (an
    /// engine's `--root-path`).
    pub unsplit: &'static [&'static str],
    /// Paths of requests (POST) that have forms, in which engines accept transfer parameters, too.
    /// They also count below a prefix.
    pub forms: &'static [&'static str],
    /// The path to which the proxy itself responds (GET or HEAD).
    pub health: &'static str,
}

/// The routes of pd-sidecar.
pub const PD_SIDECAR: Routes = Routes {
    intercepted: &[
        ("/v1/chat/completions", Api::Chat),
        ("/v1/completions", Api::Completions),
        ("/v1/messages", Api::Messages),
        ("/v1/responses", Api::Responses),
        ("/inference/v1/generate", Api::Generate),
        ("/invocations", Api::Invocations),
    ],
    unsplit: &[
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
        "/inference/v1/generate",
        "/invocations",
        "/v1/chat/completions/batch",
        "/cohere/v2/chat",
        // SGLang's own API.
        "/generate",
        "/vertex_generate",
    ],
    forms: &["/v1/audio/transcriptions", "/v1/audio/translations"],
    health: "/health",
};

impl Routes {
    /// Returns the route of a request.
    ///
    /// The path is percent-decoded but not normalised otherwise. `/v1//completions` is not
    /// `/v1/completions`, but `/v1/complet%69ons` is: the engine decodes it as well, and an encoded
    /// spelling must not bypass the interception.
    #[must_use]
    pub fn of(&self, method: Method, target: &[u8]) -> Route {
        let target = h1::origin_form(target).unwrap_or(target);
        match method {
            Method::Post | Method::Put => {
                let mut intercepted = self.intercepted.iter();
                let found = intercepted
                    .find(|(path, _)| method == Method::Post && h1::path_is(target, path));
                let is_one_of =
                    |paths: &[&str]| paths.iter().any(|path| h1::path_ends_with(target, path));
                match found {
                    Some((_, api)) => Route::Intercepted(*api),
                    None if is_one_of(self.unsplit) => Route::Intercepted(Api::Unsplit),
                    None if is_one_of(self.forms) => Route::Form,
                    None => Route::Other,
                }
            }
            Method::Get | Method::Head if h1::path_is(target, self.health) => Route::Health,
            Method::Connect
            | Method::Delete
            | Method::Get
            | Method::Head
            | Method::Options
            | Method::Patch
            | Method::Trace
            | Method::Other => Route::Other,
        }
    }
}

impl Api {
    /// Returns the location of the counts of cached tokens in a response of this API, or `None` if
    /// it has none.
    #[must_use]
    pub const fn usage_shape(self) -> Option<UsageShape> {
        match self {
            Self::Chat | Self::Completions | Self::Generate | Self::Invocations => {
                Some(UsageShape::Chat)
            }
            Self::Responses => Some(UsageShape::Responses),
            Self::Messages => Some(UsageShape::Messages),
            Self::Unsplit => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNSPLIT: Route = Route::Intercepted(Api::Unsplit);

    #[rustfmt::skip]
    const ROUTES: &[(Method, &str, Route)] = &[
        (Method::Post, "/v1/chat/completions", Route::Intercepted(Api::Chat)),
        (Method::Post, "/v1/completions", Route::Intercepted(Api::Completions)),
        (Method::Post, "/v1/messages", Route::Intercepted(Api::Messages)),
        (Method::Post, "/v1/responses", Route::Intercepted(Api::Responses)),
        (Method::Post, "/inference/v1/generate", Route::Intercepted(Api::Generate)),
        (Method::Post, "/invocations", Route::Intercepted(Api::Invocations)),
        (Method::Post, "/v1/chat/completions/batch", UNSPLIT),
        (Method::Post, "/cohere/v2/chat", UNSPLIT),
        (Method::Post, "/v1/completions?x=/health", Route::Intercepted(Api::Completions)),
        (Method::Post, "/v1/complet%69ons", Route::Intercepted(Api::Completions)),
        (Method::Post, "/v1%2Fcompletions", Route::Intercepted(Api::Completions)),
        (Method::Post, "/v1/completions/", Route::Other),
        (Method::Post, "/v1//completions", Route::Other),
        (Method::Post, "//v1/completions", UNSPLIT),
        (Method::Post, "/prefix/v1/chat/complet%69ons", UNSPLIT),
        (Method::Post, "/generate", UNSPLIT),
        (Method::Put, "/generate", UNSPLIT),
        (Method::Put, "/v1/completions", UNSPLIT),
        (Method::Get, "/generate", Route::Other),
        (Method::Post, "/vertex_generate", UNSPLIT),
        (Method::Post, "/v1/audio/transcriptions", Route::Form),
        (Method::Post, "/prefix/v1/audio/trans%6cations?x=1", Route::Form),
        (Method::Post, "/v1/audio/speech", Route::Other),
        (Method::Post, "/V1/completions", Route::Other),
        (Method::Get, "/v1/completions", Route::Other),
        (Method::Get, "/health", Route::Health),
        (Method::Head, "/health?verbose", Route::Health),
        (Method::Post, "/health", Route::Other),
        (Method::Options, "*", Route::Other),
        (Method::Post, "http://any/v1/completions", Route::Intercepted(Api::Completions)),
    ];

    #[test]
    fn routes_match_the_decoded_path() {
        for (method, target, want) in ROUTES {
            let route = PD_SIDECAR.of(*method, target.as_bytes());
            assert_eq!(route, *want, "{method:?} {target}");
        }
    }
}
