//! vLLM's offloading connector with its P2P tier (`--kv-connector offloading`; reference 6.5): both
//! legs at once; the engines know the transfer by a request id, the decoder also where to ask.

use super::material::{Caps, Material};
use super::peer::Peer;
use super::plan::{Leg, Take};
use crate::json::EditError;
use crate::json::Quoted;

/// Both legs.
///
/// # Errors
/// When the body needs more edits than allowed.
pub fn pair(material: &Material<'_>, peer: &Peer) -> Result<[Leg; 2], EditError> {
    let uuid = material.uuid;
    let source = match &peer.source {
        Some(source) => format!(r#","remote_kv_source":{}"#, source.object()),
        None => String::new(),
    };
    let prefill = format!(r#"{{"remote_decoder":{{"kv_request_id":"{uuid}"}}{source}}}"#);
    let (host, port) = (Quoted(&peer.host), peer.p2p_port);
    let decode = format!(
        r#"{{"remote_prefiller":{{"kv_request_id":"{uuid}","remote_host":{host},"remote_port":{port}}}}}"#
    );
    Ok([
        material.prefill_leg(prefill.as_bytes(), Caps::Sent, Take::Nothing)?,
        material.decode_leg(decode.as_bytes(), Take::Answer(None))?,
    ])
}
