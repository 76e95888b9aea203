//! The `mock-engine` command: a real process, whose defaults are those of an engine.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::client::{Client, DEADLINE, Response, post};

/// A running `mock-engine`, killed when dropped.
pub(crate) struct Mock {
    child: Child,
    address: String,
}

impl Drop for Mock {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Mock {
    /// Starts the command with `--port 0`, without delays, and with `args`.
    pub(crate) fn start(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_mock-engine"))
            .args(["--port", "0", "--ttft", "0", "--itl", "0"])
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line.trim_end().rsplit(' ').next().unwrap().to_owned();
        Self { child, address }
    }

    pub(crate) fn client(&self) -> Client {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Client(stream)
    }

    /// Sends a request on a new connection. Returns `None` if the connection ends before the
    /// response is complete.
    pub(crate) fn try_ask(&self, request: &str) -> Option<Response> {
        let mut client = self.client();
        client.send(request);
        client.response()
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.try_ask(&format!("GET {path} HTTP/1.1\r\nhost: e\r\n\r\n"))
            .unwrap()
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        self.try_ask(&post(path, &body.to_string())).unwrap()
    }

    fn fault(&self, order: &Value) -> Response {
        self.post("/mock/fault", order)
    }
}

const COMPLETIONS: &str = "/v1/completions";

#[test]
fn unknown_paths_methods_and_models_get_the_errors_of_vllm() {
    let mock = Mock::start(&[]);
    let unknown = mock.get("/nothing");
    assert_eq!(unknown.status, 404);
    assert_eq!(unknown.json(), json!({"detail": "Not Found"}));
    assert_eq!(mock.get("/v1/models/mock-model").status, 404);
    for (method, path, allow) in [
        ("GET", "/v1/completions", "POST"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("PUT", "/ping", "GET"),
    ] {
        let response = mock
            .try_ask(&format!("{method} {path} HTTP/1.1\r\nhost: e\r\n\r\n"))
            .unwrap();
        assert_eq!(response.status, 405, "{method} {path}");
        assert_eq!(response.header("allow"), Some(allow), "{method} {path}");
        assert_eq!(response.json(), json!({"detail": "Method Not Allowed"}));
    }
    assert_eq!(mock.post("/ping", &json!({})).status, 200);
    assert_eq!(mock.get("/load").json(), json!({"server_load": 0}));
    let other = mock.post(COMPLETIONS, &json!({"model": "x", "prompt": "a"}));
    assert_eq!(other.status, 404);
    let message = "The model `x` does not exist. Valid aliases: mock-model.";
    assert_eq!(
        other.json(),
        json!({"error": {
            "message": message, "type": "NotFoundError", "param": "model", "code": 404,
        }})
    );
    let messages = json!({"model": "x", "max_tokens": 1, "messages": [{"role": "user"}]});
    assert_eq!(
        mock.post("/v1/messages", &messages).json(),
        json!({"type": "error", "error": {"type": "NotFoundError", "message": message}})
    );
    for body in [
        json!({"model": "mock-model", "prompt": "a"}),
        json!({"prompt": "a"}),
    ] {
        assert_eq!(mock.post(COMPLETIONS, &body).status, 200);
    }
}

#[test]
fn echo_and_any_model_are_options() {
    let mock = Mock::start(&["--echo", "--any-model"]);
    assert_eq!(mock.get("/nothing?x").json()["target"], "/nothing?x");
    let other = mock.post(COMPLETIONS, &json!({"model": "x", "prompt": "a"}));
    assert_eq!(other.status, 200);
}

#[test]
fn faults_work_as_the_help_says() {
    let mock = Mock::start(&[]);
    let body = json!({"prompt": "a"});
    let status = |code: u16| json!({"status": {"code": code}});
    // Twice, and only on this path.
    let order = json!({"fault": status(503), "times": 2, "path": COMPLETIONS});
    assert_eq!(mock.fault(&order).json(), json!({"ok": true, "pending": 1}));
    assert_eq!(mock.get("/v1/models").status, 200);
    let statuses = [0; 3].map(|_| mock.post(COMPLETIONS, &body).status);
    assert_eq!(statuses, [503, 503, 200]);
    // Once by default, and on any path.
    mock.fault(&json!({"fault": status(500)}));
    assert_eq!(mock.get("/health").status, 500);
    assert_eq!(mock.get("/health").status, 200);
    // Only for a body with this text.
    mock.fault(&json!({"fault": status(429), "contains": "needle"}));
    assert_eq!(mock.post(COMPLETIONS, &body).status, 200);
    let needle = json!({"prompt": "a needle"});
    assert_eq!(mock.post(COMPLETIONS, &needle).status, 429);
    // Clear, also together with a new fault.
    mock.fault(&json!({"fault": status(500), "times": u32::MAX}));
    assert_eq!(mock.post(COMPLETIONS, &body).status, 500);
    mock.fault(&json!({"clear": true, "fault": status(502)}));
    let statuses = [0; 2].map(|_| mock.post(COMPLETIONS, &body).status);
    assert_eq!(statuses, [502, 200]);
    mock.fault(&json!({"fault": "reset_before_head"}));
    assert!(mock.try_ask(&post(COMPLETIONS, "{}")).is_none());
}

#[test]
fn held_responses_wait_for_the_release() {
    let mock = Mock::start(&[]);
    let mut client = mock.client();
    for fault in [
        json!("hold"),
        json!({"held_status": {"code": 200, "body": "{}"}}),
    ] {
        mock.fault(&json!({"fault": fault, "path": COMPLETIONS}));
        client.send(&post(COMPLETIONS, r#"{"prompt":"a"}"#));
        let held = || {
            let log = mock.get("/mock/requests").json();
            let requests = log["requests"].as_array().unwrap();
            let last = requests.iter().rfind(|seen| seen["target"] == COMPLETIONS);
            last.is_some_and(|seen| seen["state"] == "answering")
        };
        while !held() {}
        assert_eq!(mock.fault(&json!({"release": true})).status, 200);
        assert_eq!(client.response().unwrap().status, 200);
    }
}

#[test]
fn unusable_fault_orders_are_refused() {
    let mock = Mock::start(&[]);
    for (order, part) in [
        (json!({}), "one of fault, clear and release"),
        (json!({"faults": "html"}), "unknown field `faults`"),
        (
            json!({"fault": "nope"}),
            "the faults are refuse, reset_before_head",
        ),
        (json!({"fault": "html", "times": 0}), "at least 1"),
        (json!({"fault": "html", "times": -1}), "invalid value"),
        (json!({"fault": "refuse", "path": "/x"}), "takes neither"),
        (
            json!({"fault": "html", "path": "/", "contains": "x"}),
            "exclude",
        ),
        (json!({"clear": true, "times": 2}), "need a fault"),
        (json!([1]), "expected"),
    ] {
        let response = mock.fault(&order);
        assert_eq!(response.status, 400, "{order}");
        let error = response.json()["error"].to_string();
        assert!(error.contains(part), "{order}: {error}");
    }
    assert_eq!(mock.get("/mock/fault").status, 405);
    assert_eq!(mock.get("/health").status, 200);
}
