//! The HTTP APIs of engines: which requests the proxy inspects, and the shapes of their bodies.
//!
//! Pure. A personality has one table of routes.

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
    /// `/v1/chat/completions/batch` and `/cohere/v2/chat`: generation requests that are never
    /// split. They are intercepted because engines accept transfer parameters from clients on these
    /// paths as well.
    Unsplit,
}

/// The handling of a request, by its method and path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `GET` or `HEAD` of `/health`, to which the proxy itself responds.
    Health,
    /// A generation request, whose body is inspected.
    Intercepted(Api),
    /// Any other request, which is forwarded to the decoder without inspecting its body.
    Other,
}

/// The routes of a personality.
#[derive(Debug, PartialEq, Eq)]
pub struct Routes {
    /// The paths of generation requests (POST), each with its API.
    pub intercepted: &'static [(&'static str, Api)],
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
        ("/v1/chat/completions/batch", Api::Unsplit),
        ("/cohere/v2/chat", Api::Unsplit),
    ],
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
            Method::Post => {
                let mut intercepted = self.intercepted.iter();
                intercepted
                    .find(|(path, _)| h1::path_is(target, path))
                    .map_or(Route::Other, |(_, api)| Route::Intercepted(*api))
            }
            Method::Get | Method::Head if h1::path_is(target, self.health) => Route::Health,
            Method::Connect
            | Method::Delete
            | Method::Get
            | Method::Head
            | Method::Options
            | Method::Patch
            | Method::Put
            | Method::Trace
            | Method::Other => Route::Other,
        }
    }
}

impl Api {
    /// Returns the location of the cached-token count in a response of this API, or `None` if the
    /// proxy does not correct it. Anthropic's shape is unchanged because its
    /// `cache_read_input_tokens` determines the price and is not a statistic.
    #[must_use]
    pub const fn usage_shape(self) -> Option<UsageShape> {
        match self {
            Self::Chat | Self::Completions | Self::Generate | Self::Invocations => {
                Some(UsageShape::Chat)
            }
            Self::Responses => Some(UsageShape::Responses),
            Self::Messages | Self::Unsplit => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_match_the_decoded_path_exactly() {
        let unsplit = Route::Intercepted(Api::Unsplit);
        let cases: [(Method, &str, Route); 20] = [
            (
                Method::Post,
                "/v1/chat/completions",
                Route::Intercepted(Api::Chat),
            ),
            (
                Method::Post,
                "/v1/completions",
                Route::Intercepted(Api::Completions),
            ),
            (
                Method::Post,
                "/v1/messages",
                Route::Intercepted(Api::Messages),
            ),
            (
                Method::Post,
                "/v1/responses",
                Route::Intercepted(Api::Responses),
            ),
            (
                Method::Post,
                "/inference/v1/generate",
                Route::Intercepted(Api::Generate),
            ),
            (
                Method::Post,
                "/invocations",
                Route::Intercepted(Api::Invocations),
            ),
            (Method::Post, "/v1/chat/completions/batch", unsplit),
            (Method::Post, "/cohere/v2/chat", unsplit),
            (
                Method::Post,
                "/v1/completions?x=/health",
                Route::Intercepted(Api::Completions),
            ),
            (
                Method::Post,
                "/v1/complet%69ons",
                Route::Intercepted(Api::Completions),
            ),
            (
                Method::Post,
                "/v1%2Fcompletions",
                Route::Intercepted(Api::Completions),
            ),
            (Method::Post, "/v1/completions/", Route::Other),
            (Method::Post, "/v1//completions", Route::Other),
            (Method::Post, "/V1/completions", Route::Other),
            (Method::Get, "/v1/completions", Route::Other),
            (Method::Get, "/health", Route::Health),
            (Method::Head, "/health?verbose", Route::Health),
            (Method::Post, "/health", Route::Other),
            (Method::Options, "*", Route::Other),
            (
                Method::Post,
                "http://any/v1/completions",
                Route::Intercepted(Api::Completions),
            ),
        ];
        for (method, target, want) in cases {
            assert_eq!(
                PD_SIDECAR.of(method, target.as_bytes()),
                want,
                "{method:?} {target}"
            );
        }
    }
}
