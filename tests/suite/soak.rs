//! Soak tests: thousands of requests from 64 concurrent clients, about half of them with a fault on
//! a leg or a client disconnect. There are about 10,000 requests for the default configuration and
//! about 2,000 for each other one. Every response is checked for bytes that were generated for
//! another request. At the end, all engines must serve and no connection may be left open.
//!
//! A marker in the body of a request selects its fault in the engines. Each response is therefore
//! judged by the fault of its request.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mock_engine::{Engine, EngineConfig, Fault};

use crate::apis::{Api, Question};
use crate::client::{Client, End, Response, request};
use crate::harness::{PREFILLER, Pair, sha256};
use crate::harness_more::{descriptors, expect_drained, nonzero_metrics, wait_descriptors};
use crate::kv::{Setup, each_connector, responded};

const REQUESTS: u64 = 10_000;
/// Number of requests for each configuration other than the default one.
const REQUESTS_EACH: u64 = 2_000;
const CLIENTS: u64 = 64;
/// Number of file descriptors that the sidecar may have open at the end of a run in addition to
/// those at its start, such as those of pipes and pooled connections.
const DESCRIPTORS_MORE: usize = 8;

/// Limits the duration of a prefill leg. With concurrent legs, it continues after its client has
/// disconnected, and some engines here never respond.
const LATEST: &str = "--prefill-timeout=5s";
/// Closes idle upstream connections after one second, so that a connection left open at the end is
/// a leak.
const IDLE: &str = "--upstream-idle-timeout=1s";
const ENCODERS: &str = "x-encoder-hosts-ports";

/// An xorshift64* random number generator, one per client.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    fn below(&mut self, count: usize) -> usize {
        (self.next() % count as u64) as usize
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.next().is_multiple_of(count)
    }
}

/// The effect of a fault on the engine's response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// The engine sends no generated content, and the client receives an error.
    Fails,
    /// The engine sends a 200 response with unrelated content.
    Nonsense,
    /// The engine truncates its response.
    Cut,
    /// The engine stalls forever: the client must disconnect.
    Silent,
    /// The engine sends a complete response in an unusual form.
    Odd,
}

fn status(code: u16) -> Fault {
    Fault::Status {
        code,
        body: format!("{{\"error\":{{\"message\":\"engine says {code}\"}}}}"),
        content_type: "application/json".to_owned(),
    }
}

fn troubles() -> Vec<(Trouble, Fault)> {
    vec![
        (Trouble::Fails, Fault::ResetBeforeHead),
        (Trouble::Fails, Fault::CloseBeforeHead),
        (Trouble::Fails, Fault::Garbage),
        (Trouble::Fails, status(500)),
        (Trouble::Fails, status(503)),
        (Trouble::Nonsense, Fault::Gzip),
        (Trouble::Nonsense, Fault::Html),
        (Trouble::Nonsense, Fault::HalfJson),
        (Trouble::Cut, Fault::ResetMidBody { after_events: 1 }),
        (Trouble::Cut, Fault::TruncateMidBody { after_events: 1 }),
        (Trouble::Cut, Fault::TruncateMidBody { after_events: 0 }),
        (Trouble::Silent, Fault::StallBeforeHead),
        (Trouble::Silent, Fault::StallAfterHead),
        (Trouble::Silent, Fault::StallMidStream { after_events: 1 }),
        (Trouble::Odd, Fault::CloseIdle),
        (Trouble::Odd, Fault::NoFraming),
        (Trouble::Odd, Fault::Interim { count: 2 }),
        (
            Trouble::Odd,
            Fault::Slow {
                chunk_bytes: 200,
                delay: Duration::ZERO,
            },
        ),
    ]
}

/// The randomly chosen faults and client disconnect, if any, of one request.
#[derive(Clone, Copy, Debug, Default)]
struct Fate {
    prefill: Option<(usize, Trouble)>,
    decode: Option<(usize, Trouble)>,
    encode: Option<(usize, Trouble)>,
    /// Whether the request is decode-first.
    decodes_first: bool,
    /// Whether the request names a prefill engine that refuses connections.
    refused: bool,
    split: bool,
    /// Phase in which the client disconnects: 0 is directly after the request, 1 after the response
    /// head, 2 during the response body. `None` if it does not, or only because an engine is
    /// silent.
    leaves: Option<u64>,
}

impl Fate {
    fn draw(chance: &mut Chance, troubles: &[(Trouble, Fault)], kind: Kind) -> Self {
        let mut fate = Self {
            split: !chance.one_in(8),
            ..Self::default()
        };
        // Only split requests are decode-first: without a prefiller, the client would receive the
        // decoder's response to a cache miss.
        fate.decodes_first = kind == Kind::DecodeFirst && fate.split && chance.one_in(2);
        if chance.one_in(2) {
            return fate;
        }
        let nth = chance.below(troubles.len());
        let trouble = Some((nth, troubles[nth].0));
        match chance.below(8) {
            0..=2 if kind == Kind::Encoded && chance.one_in(2) => fate.encode = trouble,
            0..=2 => fate.prefill = trouble,
            3..=5 => fate.decode = trouble,
            6 => fate.refused = true,
            _ => fate.leaves = Some(chance.next() % 3),
        }
        if !fate.split {
            fate.prefill = None;
            fate.refused = false;
        }
        fate
    }

    fn is_plain(self) -> bool {
        let legs = [self.prefill, self.decode, self.encode];
        legs == [None; 3] && !self.refused && self.leaves.is_none()
    }

    fn marker(self) -> String {
        let name = |leg, trouble: Option<(usize, Trouble)>| {
            trouble.map_or_else(String::new, |(nth, _)| format!(" {leg}{nth}."))
        };
        let (prefill, decode) = (name("prefill", self.prefill), name("decode", self.decode));
        let encode = name("encode", self.encode);
        let first = match self.decodes_first {
            true => r#","cache_hit_threshold":0.8"#,
            false => "",
        };
        format!(r#","user":"fate:{prefill}{decode}{encode}"{first}"#)
    }

    /// Returns whether only a client disconnect ends the request: an engine is silent, or the
    /// prefill engine responds without taking part in a concurrent transfer.
    fn hangs(self, concurrent: bool) -> bool {
        let is = |leg: Option<(usize, Trouble)>, what| leg.is_some_and(|(_, own)| own == what);
        is(self.prefill, Trouble::Silent)
            || is(self.encode, Trouble::Silent)
            || is(self.decode, Trouble::Silent)
            || (concurrent && is(self.prefill, Trouble::Nonsense))
    }
}

/// Kind of the requests of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The legs run one after the other.
    Serial,
    /// As `Serial`, and about half of the split requests have a `cache_hit_threshold`. They are
    /// sent to the decoder first, and a prefill leg follows only if too little of the prompt is
    /// cached.
    DecodeFirst,
    /// As `Serial`, with one image per request.
    Encoded,
    /// The legs are concurrent, and a client disconnect closes the decode leg.
    AtOnce,
    /// The legs are concurrent, and after a client disconnect the decode leg continues until its
    /// first response byte.
    Kept,
}

/// A run: a pair, a prefill engine that refuses connections, an encoder, and the counts of
/// outcomes.
struct Run {
    pair: Pair,
    down: Engine,
    encoder: Engine,
    kind: Kind,
    requests: u64,
    troubles: Vec<(Trouble, Fault)>,
    whole: AtomicU64,
    failed: AtomicU64,
    cut: AtomicU64,
    left: AtomicU64,
}

impl Run {
    fn start(setup: &Setup<'_>, kind: Kind, requests: u64) -> Self {
        let pair = setup.start();
        let down = Engine::start(EngineConfig::prefill(), 0).unwrap();
        down.refuse(true);
        let encoder = Engine::start(EngineConfig::encoder(), 0).unwrap();
        let troubles = troubles();
        for (nth, (_, fault)) in troubles.iter().enumerate() {
            let at_decode = match fault {
                // A decode leg without a first byte is kept for 30 seconds after a disconnect. With
                // `Hold`, the engine responds once the run releases it.
                Fault::StallBeforeHead | Fault::StallAfterHead if kind == Kind::Kept => Fault::Hold,
                other => other.clone(),
            };
            for (name, engine, fault) in [
                ("prefill", &pair.prefill, fault.clone()),
                ("decode", &pair.decode, at_decode),
                ("encode", &encoder, fault.clone()),
            ] {
                engine.fault_with(&format!(" {name}{nth}."), fault, u32::MAX);
            }
        }
        Self {
            pair,
            down,
            encoder,
            kind,
            requests,
            troubles,
            whole: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            cut: AtomicU64::new(0),
            left: AtomicU64::new(0),
        }
    }

    /// Returns a question for an API that this run uses, with the marker of its faults.
    fn question(&self, chance: &mut Chance, fate: Fate) -> Question {
        let api = [Api::Chat, Api::Completions, Api::Generate][chance.below(3)];
        let stream = chance.one_in(2);
        let tokens = 2 + chance.below(8) as u32;
        let more = fate.marker();
        if self.kind != Kind::Encoded {
            return api.ask_with(tokens, stream, &more);
        }
        let nth = chance.next();
        let prompt = format!(
            r#"[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"http://img/{nth}"}}}},{{"type":"text","text":"question {nth}"}}]}}]"#
        );
        let body = format!(
            r#"{{"model":"mock-model","messages":{prompt},"max_tokens":{tokens},"stream":{stream}{more}}}"#
        );
        Question {
            api: Api::Chat,
            prompt,
            body,
            tokens,
        }
    }

    /// Sends one client's share of the requests.
    fn run_client(&self, seed: u64) {
        let mut chance = Chance(seed);
        let mut kept: Option<Client> = None;
        let concurrent = matches!(self.kind, Kind::AtOnce | Kind::Kept);
        for _ in 0..self.requests.div_ceil(CLIENTS) {
            let fate = Fate::draw(&mut chance, &self.troubles, self.kind);
            let question = self.question(&mut chance, fate);
            let mut client = kept.take().unwrap_or_else(|| self.pair.sidecar.connect());
            let engine = match fate.refused {
                true => &self.down,
                false => &self.pair.prefill,
            };
            let (target, encoder) = (engine.host_port(), self.encoder.host_port());
            let mut headers = Vec::new();
            if fate.split {
                headers.push((PREFILLER, target.as_str()));
            }
            if self.kind == Kind::Encoded {
                headers.push((ENCODERS, &encoder));
            }
            client.send(request(
                "POST",
                question.api.path(),
                &headers,
                question.body.as_bytes(),
            ));
            kept = match fate.leaves {
                Some(phase) => self.leave(client, phase),
                None if fate.hangs(concurrent) => {
                    self.disconnect_from_silent_engine(client, &mut chance)
                }
                None => self.judge(client, &question, fate, seed),
            };
        }
    }

    fn leave(&self, mut client: Client, phase: u64) -> Option<Client> {
        self.left.fetch_add(1, Ordering::Relaxed);
        if phase > 0 {
            let _ = client.try_head();
        }
        if phase > 1 {
            let _ = client.raw(1);
        }
        client.reset();
        None
    }

    /// Disconnects after a random time of less than 8 ms, because an engine is silent. Returns
    /// `None`, because the connection cannot be reused.
    fn disconnect_from_silent_engine(&self, client: Client, chance: &mut Chance) -> Option<Client> {
        self.left.fetch_add(1, Ordering::Relaxed);
        std::thread::park_timeout(Duration::from_micros(chance.next() % 8_000));
        match chance.one_in(2) {
            true => client.reset(),
            false => drop(client),
        }
        None
    }

    /// Reads the response and checks it against the question. Returns the connection, or `None` if
    /// it cannot be reused.
    fn judge(
        &self,
        mut client: Client,
        question: &Question,
        fate: Fate,
        seed: u64,
    ) -> Option<Client> {
        let Ok(head) = client.try_head() else {
            panic!("no response, seed {seed}: {fate:?} {}", question.body);
        };
        let framing = head.framing("POST");
        let (body, end) = client.body(framing);
        let response = Response {
            head,
            framing,
            body,
            end,
        };
        expect_own(&response, question, fate);
        let nonsense = fate
            .decode
            .is_some_and(|(_, trouble)| trouble == Trouble::Nonsense);
        let whole = response.status == 200 && response.end == End::Complete;
        if fate.is_plain() {
            assert!(whole, "seed {seed}: {fate:?} {response:?}");
        }
        let counted = match (whole, response.end) {
            (true, _) => &self.whole,
            (false, End::Complete) => &self.failed,
            (false, _) => &self.cut,
        };
        counted.fetch_add(1, Ordering::Relaxed);
        if whole && !nonsense {
            question.expect(&response);
        }
        assert!(
            response.status == 200 || response.status >= 500,
            "seed {seed}: {fate:?} {response:?}"
        );
        let stays = response.end == End::Complete && response.header("connection") != Some("close");
        stays.then_some(client)
    }
}

/// Fails if the response, complete or truncated, contains tokens that were generated for another
/// question.
#[track_caller]
fn expect_own(response: &Response, question: &Question, fate: Fate) {
    let text = response.text();
    let own = &sha256(question.prompt.as_bytes())[..8];
    for (at, _) in text.match_indices('-') {
        // A token consists of `t`, digits, a hyphen, eight hash digits, and a space.
        let before = text[..at].trim_end_matches(|c: char| c.is_ascii_digit());
        let tag = text
            .get(at + 1..at + 10)
            .and_then(|tag| tag.strip_suffix(' '));
        if before.len() < at && before.ends_with('t') && tag.is_some() {
            assert_eq!(tag, Some(own), "{fate:?} {}: {text}", question.body);
        }
    }
}

fn soak(setup: &Setup<'_>, kind: Kind, requests: u64) {
    let run = Run::start(setup, kind, requests);
    let before = descriptors(&run.pair.sidecar);
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let run = &run;
            let seed = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(client + 1);
            scope.spawn(move || run.run_client(seed));
        }
    });
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    eprintln!(
        "soak {:?}: {} complete, {} failed, {} truncated, {} disconnected",
        setup.args,
        count(&run.whole),
        count(&run.failed),
        count(&run.cut),
        count(&run.left)
    );
    assert!(count(&run.whole) > requests / 3);
    let engines = [&run.pair.prefill, &run.pair.decode, &run.encoder];
    for engine in engines {
        engine.clear_faults();
        engine.release();
    }
    for api in Api::ALL {
        for stream in [true, false] {
            responded(&run.pair, &api.ask(4, stream));
        }
    }
    expect_drained(&run.pair.sidecar);
    run.pair.sidecar.expect_sound();
    for engine in engines {
        let counters = engine.counters();
        let bad = counters.contract_broken
            + counters.malformed
            + counters.handoff_altered
            + counters.handoff_foreign
            + counters.handoff_reused
            + counters.handoff_unknown
            + counters.poisoned;
        assert_eq!(
            bad,
            0,
            "{counters:?}\n{}",
            nonzero_metrics(&run.pair.sidecar)
        );
    }
    assert_eq!(kind == Kind::Encoded, !run.encoder.requests().is_empty());
    wait_descriptors(&run.pair.sidecar, before + DESCRIPTORS_MORE);
}

#[test]
fn nixlv2_survives_faults_and_disconnects() {
    soak(&Setup::default(), Kind::Serial, REQUESTS);
}

#[test]
fn serial_connectors_survive_faults_and_disconnects() {
    each_connector(&[LATEST, IDLE], |mode, setup| match mode.name {
        "nixlv2" => {}
        "shared-storage" => soak(setup, Kind::DecodeFirst, REQUESTS_EACH),
        _ if mode.is_concurrent => {}
        _ => soak(setup, Kind::Serial, REQUESTS_EACH),
    });
}

/// The runs of the connectors are concurrent, because most of their time is spent waiting: a decode
/// leg whose transfer never arrives is kept for 30 seconds.
#[test]
fn concurrent_connectors_survive_faults_and_disconnects() {
    let names = ["sglang", "mooncake", "offloading", "mori-parallel"];
    std::thread::scope(|scope| {
        for name in names {
            scope.spawn(move || {
                each_connector(&[LATEST, IDLE], |mode, setup| match mode.name {
                    "sglang" if name == "sglang" => soak(setup, Kind::AtOnce, REQUESTS_EACH),
                    own if own == name => soak(setup, Kind::Kept, REQUESTS_EACH),
                    _ => {}
                });
            });
        }
    });
}

/// The encoder stage, followed by plain or chunked decode, and chunked decode without encoders.
#[test]
fn encoders_and_chunked_decode_survive_faults_and_disconnects() {
    let encoder = "--ec-connector=ec-nixl";
    let chunks = "--decode-chunk-size=3";
    for (args, kind) in [
        (&[IDLE, encoder][..], Kind::Encoded),
        (&[IDLE, encoder, "--kv-connector=lmcache"], Kind::Encoded),
        (&[IDLE, encoder, chunks], Kind::Encoded),
        (&[IDLE, chunks], Kind::Serial),
    ] {
        let mut setup = Setup {
            args,
            ..Setup::default()
        };
        if args.contains(&"--kv-connector=lmcache") {
            setup.contract = mock_engine::KvContract::Lmcache;
        }
        soak(&setup, kind, REQUESTS_EACH);
    }
}
