//! JSON surgery as pure bytes: finds members in a body and edits it without parsing or copying it.
//!
//! Four readers share one resumable lexer, and all take their bytes in pieces cut anywhere:
//! [`Scanner`] notes the members of a request body for splices over its bytes ([`Document::edit`]);
//! [`Mask`] overwrites values of a body in place without changing its length; [`PrefillResponse`]
//! keeps the handoff of a prefill engine's answer; [`UsageRewriter`] replaces the cached-token
//! count in a decode engine's answer. Nothing here knows HTTP, builds a tree or converts a number
//! of a body it passes on.
//!
//! All are exact on every valid text of RFC 8259 in UTF-8. An invalid one is refused where the
//! scan notices and passes as it is otherwise; it is never repaired.

mod block;
mod cursor;
mod edit;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod grammar;
mod lex;
mod mask;
#[cfg(any(test, feature = "fuzzing"))]
mod oracle;
mod quote;
mod response;
mod scan;
mod usage;
mod validate;

pub use cursor::{Item, Items, elements, inner, member, members, string_is};
pub use edit::{Edit, EditError, Splices};
pub use error::{JsonError, JsonReason};
pub use lex::Kind;
pub use mask::{HeldBytes, Mask, Masked};
pub use quote::{Quoted, QuotedList};
pub use response::{Handoff, Params, PrefillResponse};
pub use scan::{Document, Level, Member, Scanner, Watch};
pub use usage::{ResponseForm, UsageRewriter, UsageShape};
pub use validate::validate;
