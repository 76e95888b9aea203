//! The `ringside demo` command: a split request on embedded mock engines, without any set-up.
//!
//! A prefill mock engine, a decode mock engine and a real sidecar run in this process. A streaming
//! chat completion request passes through both legs over TCP sockets.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use mock_engine::{Engine, EngineConfig};

use super::startup;
use crate::cli::{self, Command, DemoOptions, Exit};
use crate::config::Config;

/// Time that the mock prefill engine takes to respond. This delay and those of the decode engine
/// are long enough for a person to watch the tokens appear.
const PREFILL: Duration = Duration::from_millis(120);
const FIRST_TOKEN: Duration = Duration::from_millis(20);
const TOKEN: Duration = Duration::from_millis(30);
const TOKENS: u32 = 24;
/// Read timeout of the demo's client; no part of the demo takes this long.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// Runs the demo: starts the mock engines and a sidecar, sends one request, and prints the response
/// and the measured times. Without `--once`, it then keeps serving until Ctrl-C.
///
/// # Errors
/// Returns an error if the demo cannot start, or if the response is incomplete or wrong.
pub fn run(options: DemoOptions) -> Result<(), Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| Exit::runtime(error.to_string()))?;
    runtime.block_on(show(options))
}

async fn show(options: DemoOptions) -> Result<(), Exit> {
    let failed = |error: std::io::Error| Exit::runtime(format!("demo: {error}"));
    let prefill = EngineConfig {
        ttft: PREFILL,
        echo: false,
        look_alike: true,
        check_model: true,
        ..EngineConfig::prefill()
    };
    let decode = EngineConfig {
        ttft: FIRST_TOKEN,
        itl: TOKEN,
        tokens: TOKENS,
        echo: false,
        look_alike: true,
        check_model: true,
        ..EngineConfig::decode()
    };
    let prefill = Engine::start(prefill, 0).map_err(failed)?;
    let decode = Engine::start(decode, 0).map_err(failed)?;
    // With `--once` no other client connects, so any free port will do.
    let port = if options.once {
        free_port().map_err(failed)?
    } else {
        options.port
    };
    let mut running = startup::start(config(port, decode.port())?).await?;
    say(&format!(
        "prefill engine  127.0.0.1:{}\ndecode engine   127.0.0.1:{}\nringside        127.0.0.1:{port}\n\n",
        prefill.port(),
        decode.port()
    ));
    let prefiller = prefill.host_port();
    let body = body(options.prompt_tokens);
    let asked = tokio::task::spawn_blocking(move || ask(port, &prefiller, &body));
    let seen = asked
        .await
        .map_err(|_| Exit::runtime("demo: the client failed"))?
        .map_err(failed)?;
    check(&seen, &prefill, &decode)?;
    say(&report(&seen, &running.metrics()));
    if !options.once {
        say(&format!(
            "\nStill serving. Try it (press Ctrl-C to stop):\n\n  curl -N http://127.0.0.1:{port}/v1/chat/completions \\\n    \
             -H 'content-type: application/json' -H 'x-prefiller-host-port: {}' \\\n    \
             -d '{{\"messages\":[{{\"role\":\"user\",\"content\":\"hello\"}}],\"stream\":true}}'\n",
            prefill.host_port()
        ));
        tokio::signal::ctrl_c().await.map_err(failed)?;
    }
    running
        .drain(Duration::ZERO, Some(Duration::from_secs(1)))
        .await;
    Ok(())
}

/// Builds the sidecar's configuration by parsing a command line, as `ringside sidecar` does.
fn config(port: u16, decode_port: u16) -> Result<Config, Exit> {
    let args = [
        "ringside".to_owned(),
        "sidecar".to_owned(),
        "--host=127.0.0.1".to_owned(),
        format!("--port={port}"),
        "--model-server-host=127.0.0.1".to_owned(),
        format!("--model-server-port={decode_port}"),
        "--secure-proxy=false".to_owned(),
        "--admin-address=off".to_owned(),
    ];
    match cli::parse_with(args.map(Into::into), &|_| None)? {
        Command::Proxy(config, _) => Ok(*config),
        Command::Check(_) | Command::Mock(_) | Command::Demo(_) => Err(Exit::runtime(
            "demo: the command line did not select the sidecar",
        )),
    }
}

fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn body(prompt_tokens: u32) -> String {
    let prompt: String = (0..prompt_tokens)
        .map(|i| format!("word{} ", i % 97))
        .collect();
    format!(
        r#"{{"model":"mock-model","messages":[{{"role":"user","content":"{prompt}"}}],"stream":true}}"#
    )
}

/// The response as the demo's client observed it.
struct Seen {
    first_token: Duration,
    total: Duration,
    tokens: u32,
    is_complete: bool,
}

/// Sends the chat completion request `body` to the sidecar on `port` with `prefiller` as its
/// prefill target, prints each token as it arrives, and returns the measurements. A status other
/// than 200 is an error.
fn ask(port: u16, prefiller: &str, body: &str) -> std::io::Result<Seen> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    let begun = Instant::now();
    write!(
        stream,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: demo\r\ncontent-type: application/json\r\n\
         x-prefiller-host-port: {prefiller}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    lines.read_line(&mut line)?;
    if !line.starts_with("HTTP/1.1 200") {
        let mut rest = String::new();
        lines.read_to_string(&mut rest)?;
        return Err(std::io::Error::other(format!("{}{rest}", line)));
    }
    let mut seen = Seen {
        first_token: Duration::ZERO,
        total: Duration::ZERO,
        tokens: 0,
        is_complete: false,
    };
    loop {
        line.clear();
        if lines.read_line(&mut line)? == 0 {
            break;
        }
        let Some(event) = line.strip_prefix("data: ") else {
            continue;
        };
        if event.starts_with("[DONE]") {
            seen.is_complete = true;
        } else if let Some(token) = token_of(event) {
            if seen.tokens == 0 {
                seen.first_token = begun.elapsed();
            }
            seen.tokens += 1;
            say(token);
        }
    }
    seen.total = begun.elapsed();
    say("\n\n");
    Ok(seen)
}

/// Returns the text of a chat completion event, or `None` if it has none. Does not decode JSON
/// escapes: the mock engine's tokens contain none.
fn token_of(event: &str) -> Option<&str> {
    let text = event.split_once(r#""content":""#)?.1.split_once('"')?.0;
    (!text.is_empty()).then_some(text)
}

fn check(seen: &Seen, prefill: &Engine, decode: &Engine) -> Result<(), Exit> {
    let legs = (prefill.requests().len(), decode.requests().len());
    if seen.is_complete && seen.tokens == TOKENS && legs == (1, 1) {
        return Ok(());
    }
    Err(Exit::runtime(format!(
        "demo: unexpected response ({} tokens, complete: {}, legs: {legs:?})",
        seen.tokens, seen.is_complete
    )))
}

fn report(seen: &Seen, metrics: &str) -> String {
    let mean_us = |name: &str, label: &str| mean(metrics, name, label) * 1e6;
    let leg = "ringside_leg_duration_seconds";
    let overhead = "ringside_proxy_overhead_seconds";
    let part = |direction| mean_us(overhead, &format!("direction=\"{direction}\""));
    format!(
        "{} tokens, first after {:.1} ms, last after {:.1} ms\n\
         prefill leg     {:>8.1} ms\n\
         decode leg      {:>8.1} ms to its first byte\n\
         ringside added  {:>8.0} us before the prefill leg, {:.0} us to the first byte, {:.0} us per chunk\n",
        seen.tokens,
        seen.first_token.as_secs_f64() * 1e3,
        seen.total.as_secs_f64() * 1e3,
        mean_us(leg, "leg=\"prefill\"") / 1e3,
        mean_us(leg, "leg=\"decode\"") / 1e3,
        part("request"),
        part("first_byte"),
        part("chunk"),
    )
}

/// Returns the mean, in seconds, of the histogram `name` with the label pair `label`, computed from
/// the exposition text `metrics`; 0 if it has no observations.
fn mean(metrics: &str, name: &str, label: &str) -> f64 {
    let value = |suffix: &str| {
        let start = format!("{name}{suffix}{{{label}}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&start));
        line.and_then(|text| text.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    let count = value("_count");
    if count > 0.0 {
        value("_sum") / count
    } else {
        0.0
    }
}

/// Prints and flushes, so that tokens also appear immediately in a pipe. Ignores write errors: the
/// reader of the pipe may have closed it.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}
