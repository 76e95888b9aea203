//! Golden files in `tests/golden/<connector>/<case>.http`: the client's request, each leg as its
//! engine received it, each engine's response, and the response that the client received.
//!
//! Heads are printed as they were parsed, one line each. Bodies are exact except for chunked
//! framing and for values that differ between runs: ports, dates, IDs and rooms are replaced by
//! names. `RINGSIDE_GOLDEN=write` rewrites the files; review the difference before committing it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use mock_engine::{
    BlockBook, Engine, EngineConfig, EngineIds, KvContract, Meetings, Mooncake, Mori, Seen, Store,
};

use crate::apis::Api;
use crate::client::{Framing, Response, request};
use crate::harness::{PREFILLER, Pair};
use crate::kv::Setup;

/// A pair, its additional engines, and the name of its connector.
struct Stage {
    connector: &'static str,
    pair: Pair,
    /// Engines other than those of the pair, with the names that the golden files use for them.
    others: Vec<(&'static str, Engine)>,
    /// Whether the order of the legs is the same in every run. If so, the golden file lists them in
    /// that order; otherwise it lists them by engine.
    serial: bool,
    /// Header fields of the client's requests in addition to the routing header, the request ID and
    /// the authorization.
    headers: Vec<(&'static str, String)>,
}

impl Stage {
    fn start(connector: &'static str, args: &[&str], contract: KvContract, serial: bool) -> Self {
        let pair = Setup {
            args,
            contract,
            keep_response: true,
            ..Setup::default()
        }
        .start();
        Self {
            connector,
            pair,
            others: Vec::new(),
            serial,
            headers: Vec::new(),
        }
    }

    fn engines(&self) -> Vec<(&'static str, &Engine)> {
        let mut all: Vec<_> = self.others.iter().map(|(name, e)| (*name, e)).collect();
        all.push(("prefill", &self.pair.prefill));
        all.push(("decode", &self.pair.decode));
        all
    }

    /// Sends one request and compares the messages of the client and of all engines with the golden
    /// file `case` of this connector.
    #[track_caller]
    fn check(&self, case: &str, api: Api, body: &str, split: bool) {
        for (_, engine) in self.engines() {
            engine.clear();
        }
        let target = self.pair.prefill.host_port();
        let mut headers: Vec<(&str, &str)> = self
            .headers
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        headers.push(("x-request-id", "golden-1"));
        headers.push(("Authorization", "Bearer golden"));
        if split {
            headers.push((PREFILLER, &target));
        }
        let sent = request("POST", api.path(), &headers, body.as_bytes());
        let mut client = self.pair.sidecar.connect();
        client.send(&sent);
        let response = client.response().expect(200);
        let mut names = Names::new(self);
        let mut text = String::new();
        section(&mut text, "client: request", &names.request(&sent));
        for (name, seen) in self.seen() {
            section(&mut text, &format!("{name}: request"), &names.leg(&seen));
            let response = names.engine_response(seen.response.as_deref().unwrap_or_default());
            section(&mut text, &format!("{name}: answer"), &response);
        }
        section(
            &mut text,
            "client: answer",
            &names.client_response(&response),
        );
        compare(&file(self.connector, case), &text);
    }

    /// Waits until each engine has recorded its responses to all requests it received. Returns
    /// these requests, each with the name of its engine.
    #[track_caller]
    fn seen(&self) -> Vec<(String, Seen)> {
        let mut all = Vec::new();
        for (name, engine) in self.engines() {
            let kept = |log: &[Seen]| log.iter().all(|seen| seen.response.is_some());
            let log = engine.wait_for(crate::client::DEADLINE, kept).unwrap();
            let several = log.len() > 1;
            for (nth, seen) in log.into_iter().enumerate() {
                assert_ne!(seen.body_at, None);
                let name = match several {
                    true => format!("{name} {}", nth + 1),
                    false => name.to_owned(),
                };
                all.push((name, seen));
            }
        }
        if self.serial {
            all.sort_by_key(|(_, seen)| seen.at);
        }
        all
    }
}

fn section(text: &mut String, title: &str, content: &str) {
    let _ = write!(text, "=== {title}\n{content}");
    if !content.ends_with('\n') {
        text.push('\n');
    }
}

fn file(connector: &str, case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(connector)
        .join(format!("{case}.http"))
}

#[track_caller]
fn compare(path: &Path, have: &str) {
    if std::env::var("RINGSIDE_GOLDEN").is_ok_and(|mode| mode == "write") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, have).unwrap();
        return;
    }
    let name = path.display();
    let want = std::fs::read(path)
        .unwrap_or_else(|error| panic!("{name}: {error}; RINGSIDE_GOLDEN=write creates it"));
    let want = String::from_utf8(want).unwrap();
    if want != have {
        panic!(
            "{name} differs from the recorded messages; RINGSIDE_GOLDEN=write updates it\n{}",
            difference(&want, have)
        );
    }
}

/// Returns the lines that differ between the golden file (`-`) and the recorded messages (`+`),
/// without the common lines at both ends.
fn difference(want: &str, have: &str) -> String {
    let (want, have): (Vec<&str>, Vec<&str>) = (want.lines().collect(), have.lines().collect());
    let pairs = || want.iter().zip(&have);
    let before = pairs().take_while(|(want, have)| want == have).count();
    let left = want.len().min(have.len()) - before;
    let after = want
        .iter()
        .rev()
        .zip(have.iter().rev())
        .take(left)
        .take_while(|(want, have)| want == have)
        .count();
    let mut text = format!("at line {}:\n", before + 1);
    for (sign, lines) in [('-', &want), ('+', &have)] {
        for line in &lines[before..lines.len() - after] {
            let _ = writeln!(text, "{sign}{line}");
        }
    }
    text
}

/// Replaces values that differ between runs by names.
struct Names {
    ports: Vec<(u16, String)>,
    /// UUIDs found so far, in order of their first occurrence, which determines their names.
    uuids: Vec<String>,
}

impl Names {
    fn new(stage: &Stage) -> Self {
        let mut ports = vec![(stage.pair.sidecar.port, "{sidecar}".to_owned())];
        for (name, engine) in stage.engines() {
            if engine.port() != 0 {
                ports.push((engine.port(), format!("{{{name}}}")));
            }
        }
        Self {
            ports,
            uuids: Vec::new(),
        }
    }

    fn request(&mut self, bytes: &[u8]) -> String {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        self.print(&head.replace("\r\n", "\n"), body)
    }

    fn leg(&mut self, seen: &Seen) -> String {
        let mut head = format!(
            "{} {} HTTP/1.{}",
            seen.method, seen.target, seen.minor_version
        );
        for (name, value) in &seen.headers {
            // The golden files are those of plain text.
            if name != "x-forwarded-proto" {
                let _ = write!(head, "\n{name}: {value}");
            }
        }
        let body = String::from_utf8_lossy(&seen.body);
        assert_eq!(body.len() as u64, seen.body_bytes);
        self.print(&head, &body)
    }

    fn engine_response(&mut self, bytes: &[u8]) -> String {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let chunked = head.contains("transfer-encoding: chunked");
        let body = match chunked {
            true => without_chunks(body),
            false => body.to_owned(),
        };
        self.print(&head.replace("\r\n", "\n"), &body)
    }

    fn client_response(&mut self, response: &Response) -> String {
        let mut head = format!("{} {}", response.version, response.status);
        for (name, value) in &response.headers {
            // A stream that has arrived completely before it is forwarded gets a `Content-Length`.
            match name.as_str() {
                "content-length" | "transfer-encoding" => head += "\n{length or chunks}",
                _ => drop(write!(head, "\n{name}: {value}")),
            }
        }
        if let Framing::Length(length) = response.framing {
            assert_eq!(length, response.body.len() as u64);
        }
        self.print(&head, &response.text())
    }

    /// Returns a head and a body as text, with names for the values that differ between runs. Fails
    /// if the `Content-Length` is not the length of the original body.
    fn print(&mut self, head: &str, body: &str) -> String {
        let mut text = String::new();
        for line in head.lines() {
            let (name, value) = line.split_once(": ").unwrap_or((line, ""));
            match name.to_ascii_lowercase().as_str() {
                "content-length" => {
                    assert_eq!(value, body.len().to_string(), "{head}");
                    let _ = writeln!(text, "{name}: {{body}}");
                }
                "date" => {
                    let _ = writeln!(text, "{name}: {{date}}");
                }
                _ => {
                    let _ = writeln!(text, "{}", self.named(line));
                }
            }
        }
        text.push('\n');
        text += &self.named(body);
        text
    }

    fn named(&mut self, text: &str) -> String {
        let text = self.name_uuids(text);
        let mut text = name_numbers(&text, "\"created\":", "{time}");
        for (before, name) in [
            ("\"created_at\":", "{time}"),
            ("\"bootstrap_room\":", "{room}"),
        ] {
            text = name_numbers(&text, before, name);
        }
        for (port, name) in &self.ports {
            for before in [':', '-'] {
                text = text.replace(&format!("{before}{port}"), &format!("{before}{name}"));
            }
        }
        name_handoffs(&text)
    }

    fn name_uuids(&mut self, text: &str) -> String {
        let mut named = String::new();
        let mut rest = text;
        while let Some(at) = uuid_at(rest) {
            let (before, from) = rest.split_at(at);
            let (uuid, after) = from.split_at(36);
            let known = self.uuids.iter().position(|known| known == uuid);
            let nth = known.unwrap_or_else(|| {
                self.uuids.push(uuid.to_owned());
                self.uuids.len() - 1
            });
            let _ = write!(named, "{before}{{uuid-{}}}", nth + 1);
            rest = after;
        }
        named + rest
    }
}

/// Returns the offset of the first UUID in `text`, or `None` if there is none.
fn uuid_at(text: &str) -> Option<usize> {
    text.as_bytes().windows(36).position(|window| {
        window.iter().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => *byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
    })
}

/// Returns `text` with the digits after each occurrence of `before` replaced by `name`.
fn name_numbers(text: &str, before: &str, name: &str) -> String {
    let mut pieces = text.split(before);
    let mut named = pieces.next().unwrap().to_owned();
    for piece in pieces {
        let digits = piece.bytes().take_while(u8::is_ascii_digit).count();
        let _ = write!(named, "{before}{name}{}", &piece[digits..]);
    }
    named
}

/// Returns `text` with the number in each handoff's `remote_request_id` replaced by a name, because
/// the mock engines count handoffs over all tests of a process.
fn name_handoffs(text: &str) -> String {
    let before = "\"remote_request_id\":\"mock-prefill-{prefill}-";
    let mut pieces = text.split(before);
    let mut named = pieces.next().unwrap().to_owned();
    for piece in pieces {
        let digits = piece.bytes().take_while(u8::is_ascii_hexdigit).count();
        let _ = write!(named, "{before}{{handoff}}{}", &piece[digits..]);
    }
    named
}

/// Removes the framing of a chunked body.
fn without_chunks(mut text: &str) -> String {
    let mut body = String::new();
    loop {
        let (size, rest) = text.split_once("\r\n").unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            assert_eq!(rest, "\r\n");
            return body;
        }
        body += &rest[..size];
        text = rest[size..].strip_prefix("\r\n").unwrap();
    }
}

/// Checks three split requests against their golden files: a streamed and an unstreamed chat
/// completion with additional members, and a generate request.
#[track_caller]
fn check_usual(stage: &Stage) {
    let usage = r#","stream_options":{"include_usage":true}, "temperature" : 0.50"#;
    let chat = Api::Chat.ask_about("golden question", 4, true, usage);
    stage.check("chat-stream", Api::Chat, &chat.body, true);
    let more = r#","min_tokens":2,"max_completion_tokens":4,"seed":9007199254740993"#;
    let chat = Api::Chat.ask_about("golden question", 4, false, more);
    stage.check("chat", Api::Chat, &chat.body, true);
    let generate = Api::Generate.ask_about("golden", 4, false, "");
    stage.check("generate", Api::Generate, &generate.body, true);
}

/// Returns whether the golden tests are skipped because decoders use Unix sockets
/// (`RINGSIDE_SUITE_UNIX`). These have no ports to replace by names, and the golden files were
/// recorded with TCP.
fn on_unix() -> bool {
    let unix = std::env::var_os("RINGSIDE_SUITE_UNIX").is_some();
    if unix {
        eprintln!("skipped: the golden files were recorded with decoders on TCP");
    }
    unix
}

#[test]
fn nixlv2_matches_its_golden_files() {
    if on_unix() {
        return;
    }
    let stage = Stage::start("nixlv2", &[], KvContract::Nixlv2, true);
    check_usual(&stage);
    for api in [Api::Completions, Api::Messages, Api::Responses] {
        for stream in [false, true] {
            let question = api.ask_about("golden question", 4, stream, "");
            let name = format!("{api:?}").to_lowercase();
            let case = match stream {
                true => format!("{name}-stream"),
                false => name,
            };
            stage.check(&case, api, &question.body, true);
        }
    }
    let chat = Api::Chat.ask_about("golden question", 4, true, "");
    stage.check("decode-only", Api::Chat, &chat.body, false);
    let generate = Api::Generate.ask_about("golden", 4, true, "");
    stage.check("generate-stream", Api::Generate, &generate.body, true);
}

#[test]
fn shared_storage_matches_its_golden_files() {
    if on_unix() {
        return;
    }
    let contract = KvContract::SharedStorage(Store::new());
    let args = ["--kv-connector=shared-storage"];
    let stage = Stage::start("shared-storage", &args, contract, true);
    check_usual(&stage);
    let more = r#","cache_hit_threshold":0.8"#;
    let chat = Api::Chat.ask_about("golden, decode first", 4, true, more);
    stage.check("decode-first-miss", Api::Chat, &chat.body, true);
    stage.check("decode-first-hit", Api::Chat, &chat.body, true);
}

#[test]
fn sglang_matches_its_golden_files() {
    if on_unix() {
        return;
    }
    let contract = KvContract::Sglang(Meetings::new());
    let args = ["--kv-connector=sglang"];
    check_usual(&Stage::start("sglang", &args, contract, false));
}

#[test]
fn mooncake_matches_its_golden_files() {
    if on_unix() {
        return;
    }
    let terms = Mooncake {
        engines: EngineIds::new(&["engine-0"]),
        ..Mooncake::default()
    };
    let config = EngineConfig {
        bootstrap: Some(terms.engines.clone()),
        keep_response: true,
        ..EngineConfig::default()
    };
    let bootstrap = Engine::start(config, 0).unwrap();
    let port = format!("--mooncake-bootstrap-port={}", bootstrap.port());
    let args = ["--kv-connector=mooncake", &port];
    let mut stage = Stage::start("mooncake", &args, KvContract::Mooncake(terms), false);
    stage.others.push(("bootstrap", bootstrap));
    check_usual(&stage);
}

#[test]
fn offloading_matches_its_golden_files() {
    if on_unix() {
        return;
    }
    let contract = KvContract::Offloading(Meetings::new());
    let args = ["--kv-connector=offloading"];
    let mut stage = Stage::start("offloading", &args, contract, false);
    check_usual(&stage);
    let source = "10.4.0.9:8000".to_owned();
    stage.headers.push(("x-kv-cache-source-host-port", source));
    let chat = Api::Chat.ask_about("golden question", 4, true, "");
    stage.check("source", Api::Chat, &chat.body, true);
    stage.check("source-decode-only", Api::Chat, &chat.body, false);
}

#[test]
fn mori_matches_its_golden_files() {
    if on_unix() {
        return;
    }
    for parallel in [false, true] {
        let terms = Mori {
            parallel,
            decode_host: "10.0.0.1".to_owned(),
            decode_ports: (61005, 6301),
            prefill_ports: (61005, 6301),
            ..Mori::default()
        };
        let mut args = vec!["--moriio-write-mode", "--moriio-local-pod-ip=10.0.0.1"];
        let name = match parallel {
            true => "mori-parallel",
            false => "mori-serial",
        };
        args.extend(parallel.then_some("--moriio-parallel-dispatch"));
        let stage = Stage::start(name, &args, KvContract::Mori(terms), !parallel);
        check_usual(&stage);
    }
}

#[test]
fn old_connectors_match_their_golden_files() {
    if on_unix() {
        return;
    }
    let contract = KvContract::NixlV1(BlockBook::new());
    check_usual(&Stage::start(
        "nixl",
        &["--kv-connector=nixl"],
        contract,
        true,
    ));
    let args = ["--kv-connector=lmcache"];
    check_usual(&Stage::start("lmcache", &args, KvContract::Lmcache, true));
}

#[test]
fn encoders_match_their_golden_files() {
    if on_unix() {
        return;
    }
    let config = EngineConfig {
        keep_response: true,
        ..EngineConfig::encoder()
    };
    let encoder = Engine::start(config, 0).unwrap();
    let args = ["--ec-connector=ec-nixl"];
    let mut stage = Stage::start("encoder", &args, KvContract::Nixlv2, true);
    let line = encoder.host_port();
    stage.headers.push(("x-encoder-hosts-ports", line));
    stage.others.push(("encoder", encoder));
    let body = r#"{"model":"mock-model","max_tokens":4,"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://img/1"}},{"type":"text","text":"what?"}]}],"stream":true}"#;
    stage.check("split", Api::Chat, body, true);
    stage.check("decode-only", Api::Chat, body, false);
}

#[test]
fn chunked_decode_matches_its_golden_files() {
    if on_unix() {
        return;
    }
    let args = ["--decode-chunk-size=3"];
    let stage = Stage::start("chunked", &args, KvContract::Nixlv2, true);
    let usage = r#","stream_options":{"include_usage":true}"#;
    let chat = Api::Chat.ask_about("golden question", 5, true, usage);
    stage.check("chat-stream", Api::Chat, &chat.body, true);
    let chat = Api::Chat.ask_about("golden question", 5, false, "");
    stage.check("chat", Api::Chat, &chat.body, true);
}

#[test]
fn values_that_vary_are_replaced_by_names() {
    let mut names = Names {
        ports: vec![(4711, "{prefill}".to_owned())],
        uuids: Vec::new(),
    };
    let uuid = "6ba7b810-9dad-41d1-80b4-00c04fd430c8";
    let text = format!("a:4711 [4711] {uuid} x-{uuid} \"created\":17,\"bootstrap_room\":99}}");
    assert_eq!(
        names.named(&text),
        "a:{prefill} [4711] {uuid-1} x-{uuid-1} \"created\":{time},\"bootstrap_room\":{room}}"
    );
    assert_eq!(without_chunks("2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"), "abc");
    assert_eq!(difference("a\nb\nc\n", "a\nx\nc\n"), "at line 2:\n-b\n+x\n");
}
