//! The servers on the command line: the engine, and the proxies with their names.

use std::net::Ipv6Addr;

use clap::ArgMatches;

use super::wrong;
use crate::exit::Exit;
use crate::limits::{NAME_BYTES_MAX, PROXIES_MAX};

/// A server, as given on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Host name or IP address of the server; an IPv6 address has no brackets.
    pub host: String,
    /// TCP port of the server.
    pub port: u16,
    /// Whether the server uses TLS.
    pub tls: bool,
}

impl Target {
    /// Returns `host:port` as in a `host` header field, with brackets around an IPv6 address.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// A server with its name in reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// `direct` for the engine; no two servers of a run have the same name.
    pub name: String,
    /// Host, port and scheme.
    pub target: Target,
}

/// Name of the engine.
const DIRECT: &str = "direct";
/// Name of a proxy that is the only one and has no name on the command line.
const ONLY_PROXY: &str = "proxy";

impl Server {
    /// Returns the name as the object of a sentence: `the proxy` if it has no name.
    #[must_use]
    pub fn phrase(&self) -> &str {
        if self.name == ONLY_PROXY {
            "the proxy"
        } else {
            &self.name
        }
    }
}

/// Returns the engine of `--direct` and the proxies of all `--proxy`.
pub(super) fn servers(matches: &ArgMatches) -> Result<Vec<Server>, Exit> {
    let mut servers = vec![Server {
        name: DIRECT.to_owned(),
        target: target(matches, "direct")?,
    }];
    let texts: Vec<&String> = matches.get_many("proxy").into_iter().flatten().collect();
    if texts.len() > PROXIES_MAX {
        let want = format!("at most {PROXIES_MAX} proxies");
        return Err(wrong("--proxy", texts[PROXIES_MAX], &want));
    }
    for text in &texts {
        let server = proxy(text, texts.len() == 1)?;
        if servers.iter().any(|other| other.name == server.name) {
            let want = format!(
                "usable: the name `{}` is taken; give each proxy its own name, --proxy NAME=URL",
                server.name
            );
            return Err(wrong("--proxy", text, &want));
        }
        servers.push(server);
    }
    Ok(servers)
}

/// Parses `NAME=URL` or `URL`. A proxy without a name is called `proxy` if it is the only one, and
/// otherwise by its host and port.
fn proxy(text: &str, is_only: bool) -> Result<Server, Exit> {
    let is_url = text.starts_with("http://") || text.starts_with("https://");
    let Some((name, url)) = text.split_once('=').filter(|_| !is_url) else {
        let target = Target::of("--proxy", text)?;
        let name = if is_only {
            ONLY_PROXY.to_owned()
        } else {
            target.authority()
        };
        return Ok(Server { name, target });
    };
    let is_visible = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic());
    if !is_visible || name.len() > NAME_BYTES_MAX {
        let want = format!("NAME=URL with a name of 1 to {NAME_BYTES_MAX} visible characters");
        return Err(wrong("--proxy", text, &want));
    }
    Ok(Server {
        name: name.to_owned(),
        target: Target::of("--proxy", url)?,
    })
}

/// Returns the target of an option that is given once.
pub(super) fn target(matches: &ArgMatches, name: &str) -> Result<Target, Exit> {
    let text = matches.get_one::<String>(name);
    let text = text.map(String::as_str).unwrap_or_default();
    Target::of(&format!("--{name}"), text)
}

impl Target {
    /// Parses a URL. `option` is named in the error.
    fn of(option: &str, text: &str) -> Result<Self, Exit> {
        let want = "http://HOST:PORT or https://HOST:PORT";
        let tls = text.starts_with("https://");
        let authority = text
            .strip_prefix("http://")
            .or_else(|| text.strip_prefix("https://"))
            .map(|rest| rest.strip_suffix('/').unwrap_or(rest))
            .ok_or_else(|| wrong(option, text, want))?;
        let (host, port) = authority
            .rsplit_once(':')
            .ok_or_else(|| wrong(option, text, want))?;
        let bare = match host.strip_prefix('[') {
            Some(rest) => rest
                .strip_suffix(']')
                .filter(|host| host.parse::<Ipv6Addr>().is_ok()),
            None => Some(host),
        };
        let is_name = |host: &&str| {
            !host.is_empty()
                && (host.bytes()).all(|b| b.is_ascii_alphanumeric() || b"-._:".contains(&b))
        };
        let named = bare
            .filter(is_name)
            .filter(|bare| host.starts_with('[') || !bare.contains(':'));
        let port = port.parse::<u16>().ok().filter(|port| *port != 0);
        match (named, port) {
            (Some(host), Some(port)) => Ok(Self {
                host: host.to_owned(),
                port,
                tls,
            }),
            _ => Err(wrong(option, text, want)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::cli::{Task, parse};

    fn line(more: &[&str]) -> Result<Vec<Server>, Exit> {
        let base = ["ringside-bench", "overhead"];
        match parse(base.iter().chain(more).map(OsString::from))? {
            Task::Overhead(options) => Ok(options.servers),
            Task::Soak(_) | Task::Neighbours(_) => Err(Exit::usage("another command")),
        }
    }

    #[test]
    fn invalid_urls_are_rejected() {
        for url in [
            "a:1",
            "http://a",
            "http://a:0",
            "http://a:99999",
            "http://:1",
            "http://a:1/v1",
            "http://u@a:1",
            "http://::1:2",
            "http://[x]:2",
        ] {
            for (more, option) in [
                (&["--direct", url, "--proxy", "http://a:1"][..], "--direct"),
                (&["--direct", "http://a:1", "--proxy", url], "--proxy"),
                (
                    &["--direct=http://a:1", &format!("--proxy=x={url}")],
                    "--proxy",
                ),
            ] {
                let exit = line(more).unwrap_err();
                assert_eq!(exit.code, Exit::USAGE, "{url}: {exit}");
                assert!(exit.message.contains(option), "{exit}");
            }
        }
    }

    #[test]
    fn proxies_have_names() {
        for (proxies, want) in [
            (&["http://p:1"][..], &["proxy"][..]),
            (&["ours=http://p:1"], &["ours"]),
            (&["http://p:1", "https://[::1]:2"], &["p:1", "[::1]:2"]),
            (&["a=http://p:1", "http://p:1"], &["a", "p:1"]),
            (&["a=http://p:1", "b=https://p:1/"], &["a", "b"]),
        ] {
            let options: Vec<String> = proxies.iter().map(|it| format!("--proxy={it}")).collect();
            let mut args = vec!["--direct=http://e:1"];
            args.extend(options.iter().map(String::as_str));
            let servers = line(&args).unwrap();
            let names: Vec<&str> = servers.iter().map(|it| it.name.as_str()).collect();
            assert_eq!(names[0], DIRECT);
            assert_eq!(names[1..], *want);
        }
    }

    #[test]
    fn unusable_names_and_too_many_proxies_are_rejected() {
        let long = format!("{}=http://p:1", "n".repeat(NAME_BYTES_MAX + 1));
        for (proxies, part) in [
            (&["=http://p:1"][..], "with a name of 1 to"),
            (&["a b=http://p:1"], "with a name of 1 to"),
            (&[long.as_str()], "with a name of 1 to"),
            (&["direct=http://p:1"], "the name `direct` is taken"),
            (&["a=http://p:1", "a=http://p:2"], "the name `a` is taken"),
            (&["http://p:1", "http://p:1"], "the name `p:1` is taken"),
            (&["a=p:1"], "http://HOST:PORT"),
            (&["http://p:1"; PROXIES_MAX + 1], "at most 8 proxies"),
        ] {
            let options: Vec<String> = proxies.iter().map(|it| format!("--proxy={it}")).collect();
            let mut args = vec!["--direct=http://e:1"];
            args.extend(options.iter().map(String::as_str));
            let exit = line(&args).unwrap_err();
            assert_eq!(exit.code, Exit::USAGE, "{exit}");
            assert!(exit.message.contains(part), "{exit}");
        }
    }
}
