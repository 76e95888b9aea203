//! The inspection of bodies that are forwarded as they arrive: transfer parameters that the client
//! set are overwritten (`docs/engines.md#client-supplied-parameters`).

use super::exchange::Exchange;
use crate::fault::Fault;
use crate::h1::{self, FormError, Name};
use crate::json::{FormMask, FormMaskError, Mask};
use crate::net::Net;

/// How the body of a forwarded request is inspected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inspect {
    /// It is not.
    Nothing,
    /// It is a JSON object.
    Json,
    /// It is a form, if that is its Content-Type.
    Form,
}

/// Overwrites transfer parameters in the body while it passes.
pub(super) enum BodyMask {
    Json(Box<Mask>),
    Form(Box<FormMask>),
}

impl BodyMask {
    /// Returns the mask for the body of this request; `None` if it is not inspected.
    ///
    /// # Errors
    /// The request has a form that cannot be read.
    pub(super) fn new<N: Net>(
        exchange: &Exchange<'_, N>,
        inspect: Inspect,
    ) -> Result<Option<Self>, Fault> {
        let pd = &exchange.shard.config.pd;
        match inspect {
            _ if pd.trust_client_kv => Ok(None),
            Inspect::Nothing => Ok(None),
            Inspect::Json => {
                let mask = Mask::new(pd.owned());
                Ok(Some(Self::Json(Box::new(
                    match exchange.stats.logged.is_some() {
                        true => mask.reading_model(),
                        false => mask,
                    },
                ))))
            }
            Inspect::Form => {
                let mut types = exchange.request.values(Name::ContentType);
                let Some(kind) = types.next() else {
                    return Ok(None);
                };
                if types.next().is_some() {
                    return Err(Fault::Form(FormError::Boundary));
                }
                let Some(boundary) = h1::boundary(kind).map_err(Fault::Form)? else {
                    return Ok(None);
                };
                let head = &exchange.request.head;
                if h1::is_coded(&head.fields, &exchange.request.bytes) {
                    return Err(Fault::ContentCoding);
                }
                Ok(Some(Self::Form(Box::new(FormMask::new(boundary)))))
            }
        }
    }

    pub(super) fn masked(&self) -> u32 {
        match self {
            Self::Json(mask) => mask.masked(),
            Self::Form(mask) => mask.masked(),
        }
    }

    /// Returns the model that the body names, if it was read.
    pub(super) fn model(&self) -> Option<&[u8]> {
        match self {
            Self::Json(mask) => mask.model(),
            Self::Form(_) => None,
        }
    }

    /// Returns the error of the scan so far or, at the end of the body, whether it is complete.
    pub(super) fn check(&mut self, is_done: bool) -> Result<(), Fault> {
        match self {
            Self::Json(mask) if is_done => mask.finish().map_err(Fault::Json),
            Self::Json(mask) => mask.check().map_err(Fault::Json),
            Self::Form(mask) => {
                let checked = if is_done { mask.finish() } else { mask.check() };
                checked.map_err(|error| match error {
                    FormMaskError::Form(error) => Fault::Form(error),
                    FormMaskError::Json(error) => Fault::Json(error),
                })
            }
        }
    }

    /// Masks a piece of the body and appends to `out` what can be sent. Returns `None` if the scan
    /// has failed.
    pub(super) fn append(&mut self, piece: &mut [u8], out: &mut Vec<u8>) -> Option<()> {
        match self {
            Self::Json(mask) => {
                let masked = mask.feed(piece).ok()?;
                out.extend_from_slice(&masked.held);
                out.extend_from_slice(&piece[..masked.ready]);
            }
            Self::Form(mask) => mask.feed(piece, out).ok()?,
        }
        Some(())
    }
}
