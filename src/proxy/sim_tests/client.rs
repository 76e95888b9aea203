//! Scripted clients: requests of every kind, sequential or pipelined.

use std::rc::Rc;
use std::task::Poll;

use serde_json::{Map, Value, json};

use super::stage::{LegOrder, PREFILLERS, SentRequest, Stage};
use super::wire::{Broken, Message, Wire, chunked};
use crate::net::Conn;
use crate::net::Net;
use crate::net::sim::SimConn;
use crate::pd::Role;

/// A scripted request: its id, its bytes, and whether it is the last on its connection.
struct Request {
    id: String,
    bytes: Vec<u8>,
    closes: bool,
}

/// Runs the scripted client number `index`: sends one to four requests on one connection and checks
/// every response.
pub(super) async fn run_client(stage: Rc<Stage>, index: usize) {
    let (near, far) = stage.net.pair();
    let near = Rc::new(near);
    crate::proxy::session::begin(stage.admit(), far, 0);
    let count = 1 + stage.net.below(4) as usize;
    let old = stage.net.once_in(8);
    let requests: Vec<Request> = (0..count)
        .map(|n| request(&stage, &format!("c{index}r{n}"), old || n + 1 == count, old))
        .take(if old { 1 } else { count })
        .collect();
    let ids: Vec<String> = requests.iter().map(|request| request.id.clone()).collect();
    if stage.plot.clients_disconnect && stage.net.once_in(2) {
        stage
            .net
            .spawn(leave(Rc::clone(&stage), Rc::clone(&near), ids));
    }
    let mut wire = Wire::new(Rc::clone(&near));
    if stage.net.once_in(3) {
        let all: Vec<u8> = requests.iter().flat_map(|r| r.bytes.clone()).collect();
        stage
            .net
            .spawn(upload(Rc::clone(&stage), Rc::clone(&near), all));
        for request in &requests {
            if !receive(&stage, &mut wire, request).await {
                break;
            }
        }
    } else {
        for request in &requests {
            let (stage_, conn) = (Rc::clone(&stage), Rc::clone(&near));
            stage.net.spawn(upload(stage_, conn, request.bytes.clone()));
            if !receive(&stage, &mut wire, request).await {
                break;
            }
            stage.net.sleep(stage.random_delay()).await;
        }
    }
    // Uploads of requests without a response hold the connection too.
    near.abort();
    stage.clients_left.set(stage.clients_left.get() - 1);
}

async fn upload(stage: Rc<Stage>, conn: Rc<SimConn>, bytes: Vec<u8>) {
    let mut at = 0;
    while at < bytes.len() {
        let size = 1 + stage
            .net
            .below(if stage.net.once_in(3) { 30 } else { 4000 }) as usize;
        let next = (at + size).min(bytes.len());
        if conn.send(&bytes[at..next]).await.is_err() {
            return;
        }
        if stage.net.once_in(4) {
            stage.net.sleep(stage.random_delay()).await;
        }
        at = next;
    }
}

/// Disconnects a client at a random time, by FIN or by RST, and logs that time for the requests
/// `ids`.
async fn leave(stage: Rc<Stage>, conn: Rc<SimConn>, ids: Vec<String>) {
    stage.net.sleep(stage.random_delay()).await;
    let now = stage.net.now();
    let mut log = stage.log.borrow_mut();
    log.left.extend(ids.into_iter().map(|id| (id, now)));
    drop(log);
    if stage.net.once_in(2) {
        conn.reset();
    } else {
        conn.abort();
    }
}

/// Receives the response to `request` and checks it. Returns `false` if no further response follows
/// on the connection.
async fn receive(stage: &Stage, wire: &mut Wire, request: &Request) -> bool {
    let response = loop {
        match wire.read(true).await {
            Ok(message) if message.status() == 100 => {}
            other => break other,
        }
    };
    let has_disconnected = stage.log.borrow().left.contains_key(&request.id);
    match response {
        // After its disconnect a client sees an end of stream, which may look like the end of this
        // body.
        Ok(message) if has_disconnected && message.is_open_ended() => false,
        Ok(message) => {
            judge(stage, request, &message);
            message.field("connection") != Some("close") && !request.closes
        }
        Err(broken) => {
            let drained = stage.drain_begun.get() && broken == Broken::Nothing;
            let excused =
                has_disconnected || drained || stage.plot.may_fail() || stage.plot.idle_ends;
            stage.check(excused, format!("{}: {broken:?}", request.id));
            stage.log.borrow_mut().cut += 1;
            false
        }
    }
}

/// Checks that a complete response belongs to `request`: it is either an error that the proxy may
/// generate in this scenario, or a response that an engine sent for this request id.
fn judge(stage: &Stage, request: &Request, message: &Message) {
    let id = &request.id;
    let mut log = stage.log.borrow_mut();
    if let Some(error) = message.field("x-ringside-error") {
        let excused = stage.plot.may_fail() || (stage.plot.idle_ends && message.status() == 502);
        stage.check(excused, format!("{id}: {error}"));
        stage.check(message.status() >= 400, format!("{id}: {message:?}"));
        log.refused += 1;
        return;
    }
    if stage.plot.idle_ends && message.status() == 408 {
        // The engine sent this on an idle connection while the proxy was sending a request on it.
        // The proxy cannot distinguish this from a response to the request.
        return;
    }
    let own = message.field("x-request-id");
    stage.check(
        own == Some(id),
        format!("{id}: the response is for {own:?}"),
    );
    let asked = &log.asked[id];
    let cached = log.cached.get(id).copied().unwrap_or(0);
    let matches = log.responded.get(id).is_some_and(|responses| {
        responses.iter().any(|response| {
            let is_serial = stage.plot.wiring == LegOrder::Serial;
            let is_response = response.role == Role::Decode || response.status >= 400;
            let rewritten = is_serial && asked.is_split && response.status == 200;
            let body = if rewritten {
                with_cached(&response.body, cached)
            } else {
                response.body.clone()
            };
            is_response && response.status == message.status() && body == message.body
        })
    });
    let text = String::from_utf8_lossy(&message.body);
    stage.check(
        matches,
        format!(
            "{id}: no engine sent {} {text}; they sent {:?}",
            message.line,
            log.responded.get(id)
        ),
    );
    log.complete += 1;
}

fn with_cached(body: &[u8], cached: u64) -> Vec<u8> {
    let text = String::from_utf8(body.to_vec()).unwrap();
    let new = format!("\"cached_tokens\":{cached}");
    text.replace("\"cached_tokens\":70007", &new).into_bytes()
}

fn request(stage: &Stage, id: &str, closes: bool, old: bool) -> Request {
    let net = &stage.net;
    let kind = net.below(8);
    let (line, body, asked, prefillers) = match kind {
        0 => ("GET /v1/models", None, plain(Vec::new()), false),
        1 => {
            let body = stage.text(id).into_bytes();
            ("POST /tokenize", Some(body.clone()), plain(body), false)
        }
        2..=3 => {
            let (body, json) = masked_body(stage, id);
            let asked = SentRequest {
                body: body.clone(),
                json: Some(json),
                is_split: false,
            };
            ("POST /v1/completions", Some(body), asked, false)
        }
        _ => {
            let body = split_body(stage, id);
            let is_split = body.get("n").is_none();
            let bytes = serde_json::to_vec(&body).unwrap();
            let asked = SentRequest {
                body: bytes.clone(),
                json: Some(body),
                is_split,
            };
            ("POST /v1/chat/completions", Some(bytes), asked, true)
        }
    };
    stage.log.borrow_mut().asked.insert(id.to_owned(), asked);
    let version = if old { "1.0" } else { "1.1" };
    let mut out = format!("{line} HTTP/{version}\r\nhost: sim\r\nx-request-id: {id}\r\n");
    if prefillers {
        out.push_str(&format!(
            "x-prefiller-host-port: {}\r\n",
            PREFILLERS.join(",")
        ));
    }
    if closes && net.once_in(2) {
        out.push_str("connection: close\r\n");
    }
    let chunks = !old && net.once_in(3);
    let mut bytes = out.into_bytes();
    match body {
        None => bytes.extend_from_slice(b"\r\n"),
        Some(body) if chunks => {
            bytes.extend_from_slice(b"transfer-encoding: chunked\r\n\r\n");
            bytes.extend_from_slice(&chunked(net, &body));
        }
        Some(body) => {
            bytes.extend_from_slice(format!("content-length: {}\r\n\r\n", body.len()).as_bytes());
            bytes.extend_from_slice(&body);
        }
    }
    Request {
        id: id.to_owned(),
        bytes,
        closes,
    }
}

const fn plain(body: Vec<u8>) -> SentRequest {
    SentRequest {
        body,
        json: None,
        is_split: false,
    }
}

/// Returns the body of a decode-only request with random transfer parameters, and the JSON that
/// must reach the engine: the same with those parameters null.
fn masked_body(stage: &Stage, id: &str) -> (Vec<u8>, Value) {
    let mut body = json!({"model": "m", "prompt": stage.text(id), "max_tokens": 9});
    let foreign = json!({"remote_block_ids": [[4, 5]], "remote_engine_id": "stolen"});
    let names = ["kv_transfer_params", "ec_transfer_params"];
    for name in names.into_iter().filter(|_| stage.net.once_in(2)) {
        body[name] = foreign.clone();
    }
    let bytes = serde_json::to_vec(&body).unwrap();
    for name in names {
        if body.get(name).is_some() {
            body[name] = Value::Null;
        }
    }
    (bytes, body)
}

fn split_body(stage: &Stage, id: &str) -> Value {
    let net = &stage.net;
    let content = stage.text(id);
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": content}]});
    if net.once_in(2) {
        body["max_tokens"] = json!(100);
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
    }
    if net.once_in(3) {
        body["kv_transfer_params"] = json!({"remote_engine_id": "stolen"});
        body["ec_transfer_params"] = json!({"remote_engine_id": "stolen"});
    }
    if stage.plot.wiring == LegOrder::Serial && net.once_in(8) {
        body["n"] = json!(2);
    }
    if stage.plot.wiring == LegOrder::Store && net.once_in(2) {
        body["cache_hit_threshold"] = json!(0.8);
    }
    body
}

/// Returns the body that the prefill leg of the serial order must have if the client sent `body`.
pub(super) fn prefill_view(body: &Value) -> Value {
    let mut view = body.clone();
    for name in ["max_tokens", "max_completion_tokens", "min_tokens"] {
        view[name] = json!(1);
    }
    view["stream"] = json!(false);
    view["kv_transfer_params"] = json!({
        "do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
        "remote_block_ids": null, "remote_host": null, "remote_port": null,
    });
    without(view, &["stream_options", "ec_transfer_params"])
}

/// Returns the body that both legs of the concurrent order must have, apart from the bootstrap room
/// and host, if the client sent `body`.
pub(super) fn room_view(body: &Value) -> Value {
    let mut view = without(body.clone(), &["kv_transfer_params", "ec_transfer_params"]);
    view["bootstrap_port"] = json!(8998);
    view
}

/// Returns the body that a leg must have with the connector shared-storage if the client sent
/// `body`.
pub(super) fn store_view(body: &Value, role: Role) -> Value {
    let mut view = without(body.clone(), &["kv_transfer_params", "ec_transfer_params"]);
    view["cache_hit_threshold"] = json!(0);
    if role == Role::Prefill {
        view["max_tokens"] = json!(1);
        view["max_completion_tokens"] = json!(1);
    }
    view
}

/// Returns a JSON object without the members `names`.
pub(super) fn without(mut view: Value, names: &[&str]) -> Value {
    let members: &mut Map<String, Value> = view.as_object_mut().unwrap();
    for name in names {
        members.shift_remove(*name);
    }
    view
}

/// Waits until `work` has finished, for at most `wait`. Returns `false` if it took longer.
pub(super) async fn within(
    stage: &Stage,
    wait: std::time::Duration,
    work: impl Future<Output = ()>,
) -> bool {
    let mut slept = Box::pin(stage.net.sleep(wait));
    let mut work = Box::pin(work);
    std::future::poll_fn(|cx| {
        if work.as_mut().poll(cx).is_ready() {
            return Poll::Ready(true);
        }
        slept.as_mut().poll(cx).map(|()| false)
    })
    .await
}
