//! Queries an engine for its model.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::http::Reader;
use crate::limits::{CONNECT_MS_MAX, MODELS_BYTES_MAX, RECEIVE_BYTES};
use crate::response::shown;

/// Requests `/v1/models` from the engine at `addr` and returns the id of the first model. `host` is
/// the value of the `host` field, and `fields` are additional header fields.
///
/// # Errors
/// Returns a message for the user if the request fails or the response contains no model.
pub fn first_model(
    addr: SocketAddr,
    host: &str,
    fields: &[(String, String)],
) -> Result<String, String> {
    let mut head = format!("GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n");
    for (name, value) in fields {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let time_max = Duration::from_millis(CONNECT_MS_MAX);
    let (status, body) = fetch(addr, &head, time_max)
        .map_err(|error| format!("direct: cannot request /v1/models from {addr}: {error}"))?;
    let advice = "set the model with --model";
    if status != 200 {
        return Err(format!(
            "direct: /v1/models responded {status}: {}; {advice}",
            shown(&body)
        ));
    }
    let list: Option<Value> = serde_json::from_slice(&body).ok();
    let model = list
        .as_ref()
        .and_then(|list| list.pointer("/data/0/id")?.as_str());
    model.map(str::to_owned).ok_or_else(|| {
        format!(
            "direct: /v1/models contains no model: {}; {advice}",
            shown(&body)
        )
    })
}

fn fetch(addr: SocketAddr, request: &str, time_max: Duration) -> Result<(u16, Vec<u8>), String> {
    let said = |error: std::io::Error| error.to_string();
    let mut stream = TcpStream::connect_timeout(&addr, time_max).map_err(said)?;
    stream.set_read_timeout(Some(time_max)).map_err(said)?;
    stream.set_write_timeout(Some(time_max)).map_err(said)?;
    stream.write_all(request.as_bytes()).map_err(said)?;
    let (mut reader, mut body, begun) = (Reader::new(), Vec::new(), Instant::now());
    let mut buffer = vec![0; RECEIVE_BYTES];
    while !reader.is_done() {
        let len = stream.read(&mut buffer).map_err(said)?;
        let fed = match len {
            0 => reader.end(),
            len => reader.feed(&buffer[..len], &mut body),
        };
        fed.map_err(|error| error.to_string())?;
        if body.len() > MODELS_BYTES_MAX || begun.elapsed() > time_max {
            return Err("the response is too long or too slow".to_owned());
        }
    }
    Ok((reader.head().map_or(0, |head| head.status), body))
}
