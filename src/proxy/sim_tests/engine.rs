//! Scripted engines: a decoder and prefill engines, which can inject faults.

use std::cell::RefCell;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use serde_json::{Value, json};

use super::stage::{LegOrder, Received, Responded, Stage, ms};
use super::wire::{Broken, Message, Wire, chunked};
use crate::net::sim::{ConnectBehaviour, SimConn, SimListener};
use crate::net::{Conn, Net, would_block};
use crate::pd::Role;

/// A fault that a scripted engine injects into one response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InjectedFault {
    None,
    /// The engine sends nothing until the peer disconnects.
    Stall,
    /// The engine ends the connection at a random position in the response, by FIN or by RST.
    End {
        reset: bool,
    },
    /// The engine sends bytes that are not a valid response.
    Garbage,
    /// The engine sends a valid head, then a body that violates its framing.
    BadChunk,
    /// The engine sends further bytes after the response.
    Surplus,
}

/// Framing of a scripted response body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Length,
    Chunked,
    UntilClose,
}

/// Starts a scripted engine that serves `address` in the given role for the rest of the run.
pub(super) fn start(stage: &Rc<Stage>, role: Role, address: &str) {
    let listener = stage.net.listen(address.parse::<SocketAddr>().unwrap());
    let delay = if stage.net.once_in(2) { ms(0) } else { ms(3) };
    listener.on_connect(ConnectBehaviour::Accept, delay);
    if stage.plot.connects_fail {
        stage
            .net
            .spawn(vary_accepting(Rc::clone(stage), listener.clone()));
    }
    let stage = Rc::clone(stage);
    stage.net.clone().spawn(async move {
        loop {
            let conn = Rc::new(listener.accept().await);
            stage.net.spawn(serve(Rc::clone(&stage), conn, role));
        }
    });
}

/// Changes at random times whether new connects to the listener are accepted, are refused or hang.
async fn vary_accepting(stage: Rc<Stage>, listener: SimListener) {
    loop {
        let greeting = match stage.net.below(5) {
            0 => ConnectBehaviour::Refuse,
            1 => ConnectBehaviour::Hang,
            2 => ConnectBehaviour::Fail(std::io::ErrorKind::ConnectionRefused),
            _ => ConnectBehaviour::Accept,
        };
        listener.on_connect(greeting, ms(2));
        stage
            .net
            .sleep(stage.random_delay() + Duration::from_micros(50))
            .await;
    }
}

async fn serve(stage: Rc<Stage>, conn: Rc<SimConn>, role: Role) {
    let mut wire = Wire::new(Rc::clone(&conn));
    let mut served = 0;
    loop {
        if stage.plot.idle_ends && served > 0 && stage.net.once_in(2) && !idle(&stage, &wire).await
        {
            return;
        }
        let request = match wire.read(false).await {
            Ok(request) => request,
            Err(Broken::Nothing) => return,
            Err(Broken::Cut) => {
                record_handoffs(&stage, &wire.bytes);
                return;
            }
        };
        record_handoffs(&stage, &request.body);
        let id = request.id();
        // A concurrent prefill leg may continue after its client has disconnected, because the
        // decoder may need it.
        let may_go_on = role == Role::Prefill && stage.plot.wiring == LegOrder::Concurrent;
        let end_record = (!may_go_on).then(|| EndRecord::begin(&stage, id));
        stage.log.borrow_mut().received.push(Received {
            role,
            id: request.id(),
            body: request.body.clone(),
        });
        let keep = response(&stage, &wire, role, &request).await;
        drop(end_record);
        if !keep {
            return;
        }
        served += 1;
    }
}

/// Logs that an engine works on a request and, on drop, the time when it stopped, whether or not it
/// sent the whole response.
struct EndRecord<'a> {
    stage: &'a Stage,
    id: String,
}

impl<'a> EndRecord<'a> {
    fn begin(stage: &'a Stage, id: String) -> Self {
        stage.log.borrow_mut().engine_ended.insert(id.clone(), None);
        Self { stage, id }
    }
}

impl Drop for EndRecord<'_> {
    fn drop(&mut self) {
        let now = self.stage.net.now();
        let mut log = self.stage.log.borrow_mut();
        log.engine_ended.insert(self.id.clone(), Some(now));
    }
}

/// Waits for a random time on an idle connection of an engine. Unless a request arrives first, may
/// then close it, reset it or send a response on it. Returns `true` if the connection remains open.
async fn idle(stage: &Stage, wire: &Wire) -> bool {
    let wait = stage.random_delay();
    let until = stage.net.now().after(wait);
    let timer = RefCell::new(Box::pin(stage.net.sleep(wait)));
    poll_fn(|cx| {
        let slept = timer.borrow_mut().as_mut().poll(cx);
        if slept.is_ready() || wire.conn.poll_readable(cx).is_ready() {
            return Poll::Ready(());
        }
        Poll::Pending
    })
    .await;
    if stage.net.now() < until || !wire.bytes.is_empty() {
        return true;
    }
    match stage.net.below(4) {
        0 => return true,
        1 => wire.conn.reset(),
        2 => {
            let words = b"HTTP/1.1 408 Gone\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
            let _ = wire.conn.send(words).await;
        }
        _ => {}
    }
    false
}

/// Logs every handoff id in the bytes that an engine received, including those of an incomplete
/// request.
fn record_handoffs(stage: &Stage, bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for (at, _) in text.match_indices("\"handoff-") {
        let rest = &text[at + 1..];
        if let Some(end) = rest.find('"') {
            let mut log = stage.log.borrow_mut();
            log.handoffs_seen.push(rest[..end].to_owned());
        }
    }
}

fn mishap(stage: &Stage) -> InjectedFault {
    if !stage.plot.engines_fail || !stage.net.once_in(3) {
        return InjectedFault::None;
    }
    match stage.net.below(8) {
        0 => InjectedFault::Stall,
        1..=2 => InjectedFault::End { reset: true },
        3..=4 => InjectedFault::End { reset: false },
        5 => InjectedFault::Garbage,
        6 => InjectedFault::BadChunk,
        _ => InjectedFault::Surplus,
    }
}

/// Sends an engine's response to one request. Returns `true` if the connection can be used again.
async fn response(stage: &Rc<Stage>, wire: &Wire, role: Role, request: &Message) -> bool {
    let id = request.id();
    let mut mishap = mishap(stage);
    let (status, kind, body) = content(stage, role, request);
    let framing = match stage.net.below(8) {
        _ if status == 204 => Framing::Length,
        0 => Framing::UntilClose,
        1..=3 => Framing::Length,
        _ => Framing::Chunked,
    };
    if framing == Framing::UntilClose && mishap != InjectedFault::None {
        // A FIN during such a body looks the same as its end.
        mishap = InjectedFault::End { reset: true };
    }
    let closes = stage.net.once_in(6);
    let bytes = written(stage, status, kind, &body, framing, closes, mishap);
    let index = {
        let mut log = stage.log.borrow_mut();
        let responses = log.responded.entry(id.clone()).or_default();
        responses.push(Responded {
            role,
            status,
            body,
            complete: false,
        });
        responses.len() - 1
    };
    let sent = send(stage, wire, &bytes, mishap).await;
    let done = sent && matches!(mishap, InjectedFault::None | InjectedFault::Surplus);
    let mut log = stage.log.borrow_mut();
    log.responded.get_mut(&id).unwrap()[index].complete = done;
    done && mishap == InjectedFault::None && framing != Framing::UntilClose && !closes
}

/// Bytes that follow a response.
const SURPLUS: &[u8] = b"HTTP/1.1 200 Foreign\r\ncontent-length: 7\r\n\r\nforeign";

/// Sends a response in several parts, and stalls or ends the connection if `mishap` requires it.
/// Returns `false` if the response was not sent completely.
async fn send(stage: &Stage, wire: &Wire, bytes: &[u8], mishap: InjectedFault) -> bool {
    let net = &stage.net;
    let end = match mishap {
        InjectedFault::End { .. } => net.below(bytes.len() as u64) as usize,
        InjectedFault::Stall => 0,
        InjectedFault::None
        | InjectedFault::Garbage
        | InjectedFault::BadChunk
        | InjectedFault::Surplus => bytes.len(),
    };
    if net.once_in(5) {
        let interim = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n";
        if end > 0 && wire.conn.send(interim).await.is_err() {
            return false;
        }
    }
    let mut at = 0;
    while at < end {
        if net.once_in(3) && !pause(stage, wire, stage.random_delay()).await {
            return false;
        }
        let size = 1 + net.below(if net.once_in(3) { 20 } else { 2000 }) as usize;
        let next = (at + size).min(end);
        if mishap == InjectedFault::Surplus && next + SURPLUS.len() >= end {
            return send_end_with_surplus(wire, &bytes[at..]).await.is_ok();
        }
        if wire.conn.send(&bytes[at..next]).await.is_err() {
            return false;
        }
        at = next;
    }
    match mishap {
        InjectedFault::Stall => pause(stage, wire, ms(3_600_000)).await,
        InjectedFault::End { reset: true } => {
            wire.conn.reset();
            false
        }
        InjectedFault::End { reset: false } => false,
        InjectedFault::None
        | InjectedFault::Garbage
        | InjectedFault::BadChunk
        | InjectedFault::Surplus => true,
    }
}

/// Sends the end of a response and as much of the surplus after it as the connection accepts
/// together with the last byte. Surplus that arrives later could not be distinguished from the
/// response to the next request on the connection.
async fn send_end_with_surplus(wire: &Wire, bytes: &[u8]) -> std::io::Result<()> {
    let mut at = 0;
    while at + SURPLUS.len() < bytes.len() {
        match wire.conn.try_send(&bytes[at..]) {
            Ok(n) => at += n,
            Err(error) if would_block(&error) => {
                poll_fn(|cx| wire.conn.poll_writable(cx)).await;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Waits for `wait`, like an engine that computes. Returns `false` if the peer disconnects
/// meanwhile.
async fn pause(stage: &Stage, wire: &Wire, wait: Duration) -> bool {
    let mut slept = Box::pin(stage.net.sleep(wait));
    poll_fn(|cx| {
        if wire.conn.poll_hangup(cx).is_ready() {
            return Poll::Ready(false);
        }
        slept.as_mut().poll(cx).map(|()| true)
    })
    .await
}

/// Generates the status, media type and body of an engine's response to `request`.
fn content(stage: &Stage, role: Role, request: &Message) -> (u16, &'static str, Vec<u8>) {
    let (net, id) = (&stage.net, request.id());
    let text = stage.text(&id);
    let json = |value: Value| serde_json::to_vec(&value).unwrap();
    let fails = stage.plot.engines_fail && net.once_in(8);
    if fails {
        let status = [500, 503, 429, 404][net.below(4) as usize];
        return (status, "application/json", json(json!({"error": text})));
    }
    if role == Role::Prefill {
        return (200, "application/json", json(prefilled(stage, &id, &text)));
    }
    if !request.line.starts_with("POST /v1/") {
        let status = if net.once_in(8) { 204 } else { 200 };
        let body = if status == 204 {
            Vec::new()
        } else {
            text.into_bytes()
        };
        return (status, "text/plain", body);
    }
    let usage = json!({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 70_007}});
    let is_tried = stage.plot.wiring == LegOrder::Store && has_cache_hit_threshold(&request.body);
    if is_tried && net.once_in(2) {
        return cache_threshold(net.once_in(2));
    }
    if net.once_in(2) {
        let body = json!({"id": id, "choices": [{"text": text}], "usage": usage});
        return (200, "application/json", json(body));
    }
    let mut stream = String::new();
    for token in text.split(' ') {
        stream.push_str(&format!(
            "data: {}\n\n",
            json!({"choices": [{"text": token}]})
        ));
    }
    stream.push_str(&format!(
        "data: {}\n\n",
        json!({"choices": [], "usage": usage})
    ));
    stream.push_str("data: [DONE]\n\n");
    (200, "text/event-stream", stream.into_bytes())
}

/// Returns whether a request body has a cache hit threshold above 0, which the decoder must check.
fn has_cache_hit_threshold(body: &[u8]) -> bool {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    body["cache_hit_threshold"].as_f64().unwrap_or(0.0) > 0.0
}

/// Returns the status, media type and body of the response of a decoder whose store has too little
/// of the prompt.
fn cache_threshold(streams: bool) -> (u16, &'static str, Vec<u8>) {
    let choice = json!({"choices": [{"text": "", "finish_reason": "cache_threshold"}]});
    if streams {
        let stream = format!("data: {choice}\n\ndata: [DONE]\n\n");
        (200, "text/event-stream", stream.into_bytes())
    } else {
        (
            200,
            "application/json",
            serde_json::to_vec(&choice).unwrap(),
        )
    }
}

fn prefilled(stage: &Stage, id: &str, text: &str) -> Value {
    let net = &stage.net;
    let cached = net.below(5000);
    stage.log.borrow_mut().cached.insert(id.to_owned(), cached);
    let handoff = json!({
        "do_remote_prefill": true,
        "do_remote_decode": false,
        "remote_engine_id": format!("handoff-{id}-{:x}", net.random()),
        "remote_block_ids": [[1, 2, 3]],
        "remote_host": "192.0.2.20",
        "remote_port": 5600,
    });
    let params = if net.once_in(6) { Value::Null } else { handoff };
    json!({
        "id": id,
        "choices": [{"text": text}],
        "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": cached}},
        "kv_transfer_params": params,
    })
}

/// Serializes a response, including the injected fault if it affects the bytes.
fn written(
    stage: &Stage,
    status: u16,
    kind: &str,
    body: &[u8],
    framing: Framing,
    closes: bool,
    mishap: InjectedFault,
) -> Vec<u8> {
    if mishap == InjectedFault::Garbage {
        let texts: [&[u8]; 3] = [
            b"\x16\x03\x01 not http",
            b"HTTP/1.1 2000 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        ];
        return texts[stage.net.below(3) as usize].to_vec();
    }
    let mut out = format!("HTTP/1.1 {status} Said\r\ncontent-type: {kind}\r\n").into_bytes();
    if closes {
        out.extend_from_slice(b"connection: close\r\n");
    }
    match framing {
        _ if status == 204 => out.extend_from_slice(b"\r\n"),
        _ if mishap == InjectedFault::BadChunk => {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n\r\n5\r\nhelloXX\r\n0\r\n\r\n");
        }
        Framing::Length => {
            out.extend_from_slice(format!("content-length: {}\r\n\r\n", body.len()).as_bytes());
            out.extend_from_slice(body);
        }
        Framing::Chunked => {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n\r\n");
            out.extend_from_slice(&chunked(&stage.net, body));
        }
        Framing::UntilClose => {
            out.extend_from_slice(b"\r\n");
            out.extend_from_slice(body);
        }
    }
    if mishap == InjectedFault::Surplus {
        out.extend_from_slice(SURPLUS);
    }
    out
}
