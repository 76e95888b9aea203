//! Streaming JSON processing on byte buffers: finds members of a body and edits it without building
//! a tree and without copying the body.
//!
//! Four readers share one resumable lexer. All of them accept their input in parts that may be
//! split at any byte:
//!
//! - [`Scanner`] records the positions of members in a request body, from which [`Document::edit`]
//!   builds an edited body as splices.
//! - [`Mask`] overwrites values of a body in place without changing its length.
//! - [`PrefillResponse`] extracts the handoff from a prefill engine's response.
//! - [`Transforms`](transform::Transforms) edits a response, for example its cached-token count.
//!
//! This module does not depend on HTTP, and it never converts a number in a body that it forwards.
//!
//! The readers interpret every valid RFC 8259 text in UTF-8 exactly. Invalid text is refused if the
//! lexer detects the error, and passes through unmodified otherwise. It is never repaired.

mod block;
mod cursor;
mod edit;
mod error;
mod form;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod grammar;
mod handoff_shape;
mod lex;
mod mask;
#[cfg(any(test, feature = "fuzzing"))]
mod oracle;
mod quote;
mod response;
mod scan;
pub mod transform;
mod validate;

pub use cursor::{Item, Items, elements, inner, member, members, string_is};
pub use edit::{Edit, EditError, Splices};
pub use error::{JsonError, JsonReason};
pub use form::{FormMask, FormMaskError};
pub use handoff_shape::Blocks;
pub use lex::Kind;
pub use mask::{HeldBytes, Mask, Masked};
pub use quote::{Quoted, QuotedList};
pub use response::{Choices, End, Handoff, Params, PrefillResponse, has_experts};
pub use scan::{Document, Level, Member, Scanner, Watch};
pub(crate) use validate::Validator;
pub use validate::validate;
