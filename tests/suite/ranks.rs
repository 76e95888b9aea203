//! Data-parallel ranks: one port per rank, and the older header field that selects a rank
//! (`docs/pd-sidecar.md#data-parallel-ranks`). Conformance row L1.

use mock_engine::{Engine, EngineConfig};

use crate::harness::{CHAT, Launch, PREFILLER, Sidecar, start_ranks};

const RANK: &str = "x-data-parallel-host-port";
const BODY: &str = r#"{"messages":[],"max_tokens":2}"#;

struct Ranks {
    engines: Vec<Engine>,
    sidecar: Sidecar,
}

impl Ranks {
    fn start(env: &[(&str, &str)]) -> Self {
        let engines = start_ranks(&EngineConfig::decode(), 2);
        let sidecar = Sidecar::launch(&Launch {
            args: &["--data-parallel-size=2"],
            env,
            decoder_port: engines[0].port(),
            ranks: 2,
            ..Launch::default()
        });
        Self { engines, sidecar }
    }

    /// Returns the number of requests that the engine of each rank has received, and clears the
    /// engines' logs.
    fn take(&self) -> [usize; 2] {
        let counts = [0, 1].map(|rank: usize| self.engines[rank].requests().len());
        self.engines.iter().for_each(Engine::clear);
        counts
    }

    fn port(&self, rank: u16) -> u16 {
        self.sidecar.port + rank
    }

    fn post(&self, listener: u16, headers: &[(&str, &str)]) -> crate::client::Response {
        let mut client = self.sidecar.connect_to(listener);
        client.ask("POST", CHAT, headers, BODY.as_bytes())
    }
}

#[test]
fn l1_each_rank_has_a_separate_port() {
    let ranks = Ranks::start(&[]);
    ranks.post(0, &[]).expect(200);
    assert_eq!(ranks.take(), [1, 0]);
    ranks.post(1, &[]).expect(200);
    assert_eq!(ranks.take(), [0, 1]);
    let mut client = ranks.sidecar.connect_to(1);
    client.ask("GET", "/health", &[], b"").expect(200);
    client.ask("GET", "/v1/models", &[], b"").expect(200);
    assert_eq!(ranks.take(), [0, 1]);
}

#[test]
fn l1_the_field_selects_the_rank_of_a_request() {
    for pod_ip in [None, Some("10.1.2.3")] {
        let env: Vec<_> = pod_ip.map(|ip| ("POD_IP", ip)).into_iter().collect();
        let ranks = Ranks::start(&env);
        let key = |rank| format!("{}:{}", pod_ip.unwrap_or_default(), ranks.port(rank));
        for rank in [0, 1] {
            ranks.post(0, &[(RANK, &key(rank))]).expect(200);
            let mut want = [0, 0];
            want[usize::from(rank)] = 1;
            assert_eq!(ranks.take(), want, "{pod_ip:?}");
        }
        // The field also applies to pass-through paths. The listeners of other ranks ignore it.
        let mut client = ranks.sidecar.connect_to(0);
        client
            .ask("GET", "/v1/models", &[(RANK, &key(1))], b"")
            .expect(200);
        assert_eq!(ranks.take(), [0, 1]);
        ranks.post(1, &[(RANK, &key(0))]).expect(200);
        assert_eq!(ranks.take(), [0, 1]);
    }
}

#[test]
fn l1_the_field_selects_the_rank_of_the_decode_leg() {
    let ranks = Ranks::start(&[]);
    let prefill = Engine::start(EngineConfig::prefill(), 0).unwrap();
    let (target, key) = (prefill.host_port(), format!(":{}", ranks.port(1)));
    ranks
        .post(0, &[(PREFILLER, &target), (RANK, &key)])
        .expect(200);
    assert_eq!(prefill.requests().len(), 1);
    let seen = &ranks.engines[1].requests()[0];
    assert_eq!(seen.header(RANK), None);
    assert_eq!(prefill.requests()[0].header(RANK), None);
    assert_eq!(ranks.take(), [0, 1]);
    // Without the field, the listener determines the rank.
    ranks.post(1, &[(PREFILLER, &target)]).expect(200);
    assert_eq!(ranks.take(), [0, 1]);
}

#[test]
fn l1_an_unknown_rank_is_400_without_a_body() {
    let ranks = Ranks::start(&[("POD_IP", "10.1.2.3")]);
    let own = ranks.port(0);
    for key in [
        format!("10.1.2.3:{}", own + 2),
        format!(":{own}"),
        format!("10.1.2.4:{own}"),
        "10.1.2.3".to_owned(),
    ] {
        let response = ranks.post(0, &[(RANK, &key)]).expect(400);
        assert!(response.body.is_empty(), "{key}");
        assert_eq!(response.header("content-length"), Some("0"));
        assert_eq!(response.header("x-ringside-error"), Some("unknown_rank"));
    }
    assert_eq!(ranks.take(), [0, 0]);
}

#[test]
fn an_empty_rank_is_none_and_an_unknown_one_matters_for_generation_only() {
    let ranks = Ranks::start(&[("POD_IP", "10.0.0.1")]);
    ranks.post(0, &[(RANK, "")]).expect(200);
    ranks.post(0, &[(RANK, " ")]).expect(200);
    assert_eq!(ranks.take(), [2, 0]);
    let other = format!("10.0.0.1:{}", ranks.port(1));
    for (field, want) in [("elsewhere:1", [1, 0]), ("", [1, 0]), (&*other, [0, 1])] {
        let mut client = ranks.sidecar.connect_to(0);
        client
            .ask("GET", "/v1/models", &[(RANK, field)], b"")
            .expect(200);
        assert_eq!(ranks.take(), want, "{field}");
    }
    let response = ranks.post(0, &[(RANK, "elsewhere:1")]);
    assert_eq!(response.status, 400);
    assert_eq!(ranks.take(), [0, 0]);
}

#[test]
fn a_health_check_needs_no_rank() {
    let ranks = Ranks::start(&[("POD_IP", "10.1.2.3")]);
    let unknown = [(RANK, "10.1.2.3:1")];
    ranks.sidecar.get("/health", &unknown).expect(200);
    assert_eq!(ranks.take(), [0, 0]);
    ranks.sidecar.get("/v1/models", &unknown).expect(200);
    assert_eq!(ranks.take(), [1, 0]);
}
