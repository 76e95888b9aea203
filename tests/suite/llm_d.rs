//! The sidecar as a drop-in for llm-d's: its command lines, its metrics, and several sidecars on
//! one host.

use mock_engine::{Engine, EngineConfig};

use crate::certificates::{Authority, Folder, Offer, session};
use crate::client::{Client, Response, request};
use crate::harness::{CHAT, Launch, PREFILLER, Pair, Sidecar, only};

const BODY: &str = r#"{"messages":[{"role":"user","content":"hi"}],"max_tokens":2}"#;
const LONG: &str = "x-llm-d-prefiller-host-port";

/// A sidecar as a manifest or a guide starts it.
struct Manifest {
    /// Where the arguments are from.
    name: &'static str,
    program: &'static str,
    args: &'static [&'static str],
    env: &'static [(&'static str, &'static str)],
    /// Whether clients and probes use `https`.
    tls: bool,
    ranks: u16,
}

const PLAIN: Manifest = Manifest {
    name: "",
    program: "pd-sidecar",
    args: &[],
    env: &[],
    tls: false,
    ranks: 1,
};

/// The arguments that projects start the sidecar with. Only ports are replaced, and
/// `--model-server-port` is added where a manifest relies on its default.
const MANIFESTS: [Manifest; 18] = [
    Manifest {
        name: "llm-d-routing-sidecar's quick start",
        program: "llm-d-routing-sidecar",
        args: &["-port={port}", "-vllm-port={decoder}", "-connector=nixlv2"],
        ..PLAIN
    },
    Manifest {
        name: "its older quick start",
        program: "llm-d-routing-sidecar",
        args: &["-port={port}", "-vllm-port={decoder}", "-connector=nixl"],
        ..PLAIN
    },
    Manifest {
        name: "the same with https",
        program: "llm-d-routing-sidecar",
        args: &["-port={port}", "-vllm-port={decoder}", "-connector=nixlv2"],
        tls: true,
        ..PLAIN
    },
    Manifest {
        name: "klog's flags",
        program: "llm-d-routing-sidecar",
        args: &[
            "-port={port}",
            "-vllm-port={decoder}",
            "-connector=nixlv2",
            "-secure-proxy=false",
            "-v=5",
            "-logtostderr",
        ],
        ..PLAIN
    },
    Manifest {
        name: "the first modelservice chart",
        args: &[
            "--port={port}",
            "--vllm-port={decoder}",
            "--connector=nixlv2",
            "-v=5",
            "--secure-proxy=false",
            "--prefiller-use-tls=false",
        ],
        ..PLAIN
    },
    Manifest {
        name: "the modelservice chart with zap",
        args: &[
            "--port={port}",
            "--vllm-port={decoder}",
            "--kv-connector=nixlv2",
            "--zap-encoder=json",
            "--zap-log-level=debug",
            "--zap-stacktrace-level=error",
            "--zap-time-encoding=rfc3339",
            "--secure-proxy=false",
        ],
        ..PLAIN
    },
    Manifest {
        name: "KServe",
        args: &[
            "--port={port}",
            "--vllm-port={decoder}",
            "--connector=nixlv2",
            "--secure-proxy=false",
        ],
        env: &[("INFERENCE_POOL_NAMESPACE", "kserve")],
        ..PLAIN
    },
    Manifest {
        name: "KAITO",
        args: &[
            "--port={port}",
            "--vllm-port={decoder}",
            "--secure-proxy=false",
        ],
        ..PLAIN
    },
    Manifest {
        name: "llm-d-router's test pod",
        args: &["--port={port}", "--model-server-port={decoder}"],
        tls: true,
        ..PLAIN
    },
    Manifest {
        name: "llm-d-router's decode deployment",
        args: &[
            "--port={port}",
            "--model-server-port={decoder}",
            "--kv-connector=nixlv2",
            "--mooncake-bootstrap-port=8000",
            "--secure-proxy=false",
            "--data-parallel-size=1",
        ],
        env: &[("POD_IP", "10.0.0.1")],
        ..PLAIN
    },
    Manifest {
        name: "the same with today's names",
        args: &[
            "--port={port}",
            "--model-server-port={decoder}",
            "--kv-connector=nixlv2",
            "--secure-serving=false",
            "--metrics-port={metrics}",
            "--enable-speculative-prefill",
        ],
        env: &[("POD_IP", "10.0.0.1")],
        ..PLAIN
    },
    Manifest {
        name: "a pod with TLS and its settings",
        args: &[
            "--port={port}",
            "--model-server-port={decoder}",
            "--secure-serving",
            "--tls-min-version=VersionTLS13",
            "--tls-cipher-suites=TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
        ],
        tls: true,
        ..PLAIN
    },
    Manifest {
        name: "wide expert parallelism",
        args: &[
            "--port={port}",
            "--vllm-port={decoder}",
            "--kv-connector=nixlv2",
            "--data-parallel-size=2",
            "--secure-proxy=false",
        ],
        ranks: 2,
        ..PLAIN
    },
    Manifest {
        name: "prime-rl on SLURM",
        args: &[
            "--port",
            "{port}",
            "--vllm-port",
            "{decoder}",
            "--kv-connector",
            "nixlv2",
            "--secure-proxy=false",
            "--enable-ssrf-protection=false",
            "--inference-pool",
            "prime-rl",
            "--data-parallel-size",
            "2",
        ],
        ranks: 2,
        ..PLAIN
    },
    Manifest {
        name: "InferenceX and srtctl on SLURM",
        args: &[
            "--port",
            "{port}",
            "--vllm-port",
            "{decoder}",
            "--kv-connector=nixlv2",
            "--secure-proxy=false",
            "--enable-prefiller-sampling",
        ],
        ..PLAIN
    },
    Manifest {
        name: "verl",
        args: &[
            "--port={port}",
            "--vllm-port={decoder}",
            "--kv-connector=nixlv2",
            "--secure-proxy=false",
            "--zap-log-level=1",
        ],
        ..PLAIN
    },
    Manifest {
        name: "a start script",
        args: &[
            "--port",
            "{port}",
            "--model-server-port",
            "{decoder}",
            "--kv-connector",
            "nixlv2",
            "--secure-proxy=false",
            "--zap-log-level",
            "debug",
        ],
        ..PLAIN
    },
    Manifest {
        name: "a YAML document",
        args: &[
            "--configuration={port: {port}, model-server-port: {decoder}, secure-serving: false, \
             secure-proxy: true, kv-connector: nixlv2}",
        ],
        ..PLAIN
    },
];

fn start(manifest: &Manifest, decoder_port: u16) -> Sidecar {
    Sidecar::launch(&Launch {
        args: manifest.args,
        env: manifest.env,
        decoder_port,
        ranks: manifest.ranks,
        tls: manifest.tls,
        program: Some(manifest.program),
        ..Launch::default()
    })
}

#[test]
fn the_command_lines_in_the_field_serve_split_requests() {
    for manifest in &MANIFESTS {
        let is_old = manifest.args.contains(&"-connector=nixl");
        let mut prefill = EngineConfig::prefill();
        let mut decode = EngineConfig::decode();
        if is_old {
            let contract = mock_engine::KvContract::NixlV1(mock_engine::BlockBook::new());
            prefill.contract = contract.clone();
            decode.contract = contract;
        }
        let prefill = Engine::start(prefill, 0).unwrap();
        let decode = crate::harness::start_ranks(&decode, manifest.ranks);
        let sidecar = start(manifest, decode[0].port());
        let target = prefill.host_port();
        for rank in 0..manifest.ranks {
            let mut client = sidecar.connect_to(rank);
            client.ask("GET", "/health", &[], b"").expect(200);
            for fields in [
                vec![(PREFILLER, &*target)],
                vec![(LONG, &*target)],
                vec![(PREFILLER, &*target), (LONG, &*target)],
            ] {
                prefill.clear();
                let engine = &decode[usize::from(rank)];
                engine.clear();
                let response = client.ask("POST", CHAT, &fields, BODY.as_bytes());
                assert_eq!(
                    response.status,
                    200,
                    "{}: {}",
                    manifest.name,
                    response.text()
                );
                let (prefill, decode) = (only(&prefill), only(engine));
                for leg in [&prefill, &decode] {
                    assert_eq!(leg.header(PREFILLER), None, "{}", manifest.name);
                    assert_eq!(leg.header(LONG), None, "{}", manifest.name);
                }
                let sent = crate::harness::json_of(&prefill);
                let is_asked = sent.get("do_remote_decode").is_some()
                    || sent["kv_transfer_params"]["do_remote_decode"] == true;
                assert!(is_asked, "{}: {sent}", manifest.name);
            }
        }
    }
}

#[test]
fn the_first_sidecars_quick_start_takes_tls_and_plain_text_on_one_port() {
    let decode = Engine::start(EngineConfig::decode(), 0).unwrap();
    let start = |args: &[&str]| {
        let own = [
            "-port={port}",
            "-vllm-port={decoder}",
            "-log_file_max_size=1",
        ];
        Sidecar::launch(&Launch {
            args: &[&own, args].concat(),
            decoder_port: decode.port(),
            program: Some("llm-d-routing-sidecar"),
            ..Launch::default()
        })
    };
    let plain = |sidecar: &Sidecar| {
        let mut client = Client::connect(sidecar.port);
        client.ask("POST", CHAT, &[], BODY.as_bytes())
    };
    let secure = |sidecar: &Sidecar| {
        let mut client = Client::secure(sidecar.port, session(&Offer::default()));
        client.ask("POST", CHAT, &[], BODY.as_bytes())
    };
    let sidecar = start(&[]);
    sidecar.wait_stderr("TLS and plain text are accepted on the same port");
    for nth in 0..2 {
        decode.clear();
        plain(&sidecar).expect(200);
        assert_eq!(only(&decode).header("x-forwarded-proto"), None, "{nth}");
        decode.clear();
        secure(&sidecar).expect(200);
        assert_eq!(only(&decode).header("x-forwarded-proto"), Some("https"));
    }
    // Several requests on one connection, a large body, and bytes that are neither.
    let mut client = Client::connect(sidecar.port);
    let large = format!(r#"{{"messages":[],"pad":"{}"}}"#, "x".repeat(3 << 20));
    for body in [BODY, &*large, BODY] {
        client.ask("POST", CHAT, &[], body.as_bytes()).expect(200);
        client
            .ask("POST", "/echo", &[], body.as_bytes())
            .expect(200);
    }
    let mut client = Client::connect(sidecar.port);
    client.send(b"\x01\x02");
    client.response().expect_error(400, "bad_head");
    assert!(!sidecar.stderr().contains("plain HTTP was sent"));
    // A flag that is given decides.
    let sidecar = start(&["-secure-proxy=true"]);
    plain(&sidecar).expect_error(400, "plain_text");
    secure(&sidecar).expect(200);
    let sidecar = start(&["-secure-proxy=false"]);
    plain(&sidecar).expect(200);
    let folder = Folder::new();
    folder.write_pair(&Authority::new("test").sign(&["localhost"]));
    let sidecar = start(&["-cert-path", &folder.text()]);
    plain(&sidecar).expect_error(400, "plain_text");
    secure(&sidecar).expect(200);
}

#[test]
fn the_lowest_tls_version_and_the_cipher_suites_are_configurable() {
    let decode = Engine::start(EngineConfig::decode(), 0).unwrap();
    let start = |args: &[&str]| {
        Sidecar::launch(&Launch {
            args,
            decoder_port: decode.port(),
            tls: true,
            ..Launch::default()
        })
    };
    let old = Offer {
        versions: &[&rustls::version::TLS12],
        ..Offer::default()
    };
    let shake = |sidecar: &Sidecar, offer: &Offer<'_>| {
        let mut client = Client::secure(sidecar.port, session(offer));
        client.shake_hands().is_ok()
    };
    let sidecar = start(&["--tls-min-version=VersionTLS13"]);
    assert!(shake(&sidecar, &Offer::default()));
    assert!(!shake(&sidecar, &old));
    // The self-signed certificate has an ECDSA key.
    let sidecar = start(&["--tls-cipher-suites=TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"]);
    sidecar.wait_stderr("has no ECDSA suite");
    assert!(!shake(&sidecar, &old));
    assert!(shake(&sidecar, &Offer::default()));
    let sidecar = start(&["--tls-cipher-suites=TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305"]);
    assert!(shake(&sidecar, &old));
}

fn metrics(port: u16, tls: bool) -> Response {
    let mut client = if tls {
        Client::secure(port, session(&Offer::default()))
    } else {
        Client::connect(port)
    };
    client.send(request("GET", "/metrics", &[("connection", "close")], b""));
    client.response()
}

/// Returns the sum of the samples on a metrics page that begin with `start`.
fn sum(page: &str, start: &str) -> f64 {
    let lines = page.lines().filter(|line| line.starts_with(start));
    lines
        .map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap())
        .sum()
}

#[test]
fn the_metrics_port_shows_pd_sidecars_names_beside_ours() {
    let port = crate::harness::free_ports(1);
    let flag = format!("--metrics-port={port}");
    let pair = Pair::start(&[&flag]);
    let wait = |start: &str, want: f64| {
        crate::harness::wait_for(start, || {
            let page = metrics(port, false).expect(200).text();
            (sum(&page, start) == want).then_some(page)
        })
    };
    pair.post(CHAT, BODY).expect(200);
    pair.post("/v1/completions", r#"{"prompt":"x"}"#)
        .expect(200);
    pair.post("/v1/responses", r#"{"input":"x"}"#).expect(200);
    pair.sidecar.post(CHAT, BODY, &[]).expect(200);
    pair.prefill.fault(crate::kv::engine_error(500), 1);
    assert_eq!(pair.post(CHAT, BODY).status, 500);
    let of = |name: &str, labels: &str| format!("llm_d_disagg_sidecar_{name}{labels}");
    wait(
        &of("requests_total", "{api_type=\"chat_completions\"}"),
        4.0,
    );
    wait(&of("requests_total", "{api_type=\"responses\"}"), 1.0);
    wait(&of("requests_total", "{api_type=\"generate\"}"), 0.0);
    let connector = "{connector=\"nixlv2\"";
    let kind = format!("{connector},disagg_type=\"p/d\"}}");
    wait(&of("disagg_requests_total", &kind), 4.0);
    wait(&of("prefill_duration_seconds_count", connector), 4.0);
    wait(&of("decode_duration_seconds_count", connector), 3.0);
    let failed = format!("{connector},stage=\"prefill\"}}");
    let page = wait(&of("request_errors_total", &failed), 1.0);
    assert!(sum(&page, "ringside_requests_total") >= 5.0);
    assert!(!page.contains("# EOF"));
    // The admin server has only our names, and this port only this page.
    let admin = pair.sidecar.admin("/metrics").unwrap().text();
    assert!(!admin.contains("llm_d_"));
    let mut client = Client::connect(port);
    assert_eq!(client.ask("GET", "/readyz", &[], b"").status, 404);
}

#[test]
fn the_metrics_port_has_a_certificate_of_its_own() {
    let decode = Engine::start(EngineConfig::decode(), 0).unwrap();
    let folder = Folder::new();
    let authority = Authority::new("metrics");
    folder.write_pair(&authority.sign(&["localhost"]));
    let port = crate::harness::free_ports(1);
    let (flag, certificate) = (format!("--metrics-port={port}"), folder.text());
    let sidecar = Sidecar::start(&[&flag, "--metrics-cert-dir", &certificate], decode.port());
    // A silent client does not block the others.
    let _silent = Client::connect(port);
    let page = metrics(port, true).expect(200).text();
    assert!(page.contains("ringside_build_info"));
    let mut plain = Client::connect(port);
    plain.send(request("GET", "/metrics", &[], b""));
    let (bytes, _) = plain.rest();
    assert!(!bytes.starts_with(b"HTTP"), "{bytes:?}");
    drop(sidecar);
    let error = crate::harness::run_to_exit(&[
        "sidecar",
        "--secure-serving=false",
        "--metrics-port=1",
        "--metrics-cert-dir=/no/such/folder",
    ]);
    assert_eq!(error.0, 3, "{}", error.1);
    assert!(error.1.contains("--metrics-cert-dir"), "{}", error.1);
}

#[test]
fn sidecars_on_one_host_share_the_default_admin_port_and_no_cpu() {
    let decode = Engine::start(EngineConfig::decode(), 0).unwrap();
    let start = |args: &[&str]| {
        let own = [
            "--port={port}",
            "--model-server-port={decoder}",
            "--secure-serving=false",
        ];
        Sidecar::launch(&Launch {
            args: &[&own, args].concat(),
            decoder_port: decode.port(),
            program: Some("pd-sidecar"),
            ..Launch::default()
        })
    };
    // The port may be in use by a test that runs at the same time.
    let first = start(&[]);
    let second = start(&[]);
    let log = second.stderr();
    let moved = "the default admin address 127.0.0.1:9890 is in use; the admin server listens on ";
    let address = log.split_once(moved).unwrap().1.split(' ').next().unwrap();
    let port: u16 = address.rsplit_once(':').unwrap().1.parse().unwrap();
    let mut client = Client::connect(port);
    client.ask("GET", "/livez", &[], b"").expect(200);
    // An address that was chosen is not replaced.
    let (code, text) = crate::harness::run_to_exit(&[
        "sidecar",
        "--port=1",
        "--secure-serving=false",
        &format!("--admin-address=127.0.0.1:{port}"),
    ]);
    assert_eq!(code, 4, "{text}");
    let cpu = |sidecar: &Sidecar| {
        let log = sidecar.stderr();
        let (_, rest) = log.split_once("shard 0: ").unwrap();
        rest.lines().next().unwrap().to_owned()
    };
    let (first, second) = (cpu(&first), cpu(&second));
    assert!(first != second || first == "unpinned", "{first} {second}");
}

#[test]
fn the_log_is_also_written_to_a_file_that_is_rotated() {
    let decode = Engine::start(EngineConfig::decode(), 0).unwrap();
    let folder = Folder::new();
    let text = folder.text();
    let sidecar = Sidecar::launch(&Launch {
        args: &[
            "-port={port}",
            "-vllm-port={decoder}",
            "-secure-proxy=false",
            "-log_dir",
            &text,
            "-log_file_max_size=1",
        ],
        decoder_port: decode.port(),
        program: Some("llm-d-routing-sidecar"),
        ..Launch::default()
    });
    let path = folder.path().join(format!("ringside-{}.log", sidecar.port));
    // Each output has a thread, so one of them may lack lines that the other has.
    let written = crate::harness::wait_for("the file to hold the line of readiness", || {
        let written = std::fs::read_to_string(&path).ok()?;
        written.contains(" is ready").then_some(written)
    });
    crate::harness::wait_for("the same lines on stderr", || {
        let stderr = sidecar.stderr();
        written
            .lines()
            .all(|line| stderr.contains(line))
            .then_some(())
    });
    let (code, text) = crate::harness::run_to_exit(&[
        "sidecar",
        "--secure-serving=false",
        "--log-file=/no/such/folder/x.log",
    ]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("/no/such/folder/x.log"), "{text}");
}
