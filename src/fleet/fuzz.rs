//! Properties of target parsing that must hold for any input: the body of a fuzz target, which
//! `cargo test` also runs over the committed corpus.

use std::net::IpAddr;

use super::{Address, SOCKET_PATH_BYTES_MAX, SocketPath, Target};

/// Parses `data` as a target and checks the result.
///
/// Parsing must not panic. An accepted target must be unchanged after formatting and parsing it
/// again, and its host must not be text that a resolver could interpret as a different host. A
/// target named by a client must never be a Unix socket.
pub fn fuzz_target(data: &[u8]) {
    check_operator_form(data);
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(target) = Target::new(text, 1)
    {
        check(&target);
    }
    let target = match Target::parse(data) {
        Ok(target) => target,
        Err(error) => return assert!(!error.text().is_empty()),
    };
    check(&target);
    assert_ne!(port_of(&target), 0);
    // One leading scheme makes no difference; two are refused.
    let more = Target::parse(&[b"http://", data].concat());
    assert_eq!(more.is_ok(), !data.starts_with(b"http://"));
    assert!(more.is_err() || more.as_ref() == Ok(&target));
    if !data.contains(&b':') {
        assert_eq!(Target::parse(&[data, b":80"].concat()), Ok(target));
    }
}

/// Checks that [`Target::parse_local`] accepts exactly the targets that [`Target::parse`] accepts,
/// and Unix sockets. A Unix socket, formatted as text, must result in `data` again.
fn check_operator_form(data: &[u8]) {
    let local = Target::parse_local(data);
    let Some(path) = data.strip_prefix(b"unix:") else {
        return assert_eq!(local, Target::parse(data));
    };
    assert!(Target::parse(data).is_err() || !path.starts_with(b"/") && !path.starts_with(b"@"));
    let Ok(target) = local else { return };
    let text = target.to_string();
    assert_eq!(text.as_bytes(), data);
    assert_eq!(target.name(), None);
    let Some(Address::Unix(socket)) = target.address() else {
        unreachable!("{text} is not a Unix socket")
    };
    assert_eq!(SocketPath::parse(&socket.to_string()).as_ref(), Ok(socket));
    assert_eq!(socket.path().is_none(), socket.abstract_name().is_some());
    let sun_path = socket.sun_path();
    let nul = usize::from(socket.abstract_name().is_some());
    assert!((1..=SOCKET_PATH_BYTES_MAX).contains(&(sun_path.len() - nul)));
    assert!(!sun_path[nul..].contains(&0), "{text}");
}

fn port_of(target: &Target) -> u16 {
    match (target.address(), target.name()) {
        (Some(Address::Tcp(address)), None) => address.port(),
        (None, Some((_, port))) => port,
        both => unreachable!("must be either an address or a name: {both:?}"),
    }
}

fn check(target: &Target) {
    let text = target.to_string();
    assert_eq!(Target::parse(text.as_bytes()).as_ref(), Ok(target));
    let port = port_of(target);
    match (target.address(), target.name()) {
        (Some(Address::Tcp(address)), None) => {
            assert_eq!(address.to_string(), text);
            let host = address.ip().to_string();
            assert_eq!(Target::new(&host, port).as_ref(), Ok(target));
            // An IPv4 address must have a single form, so that allowlist rules match it.
            assert_eq!(address.ip(), address.ip().to_canonical());
        }
        (None, Some((name, _))) => {
            assert_eq!(text, format!("{name}:{port}"));
            assert_eq!(Target::new(name, port).as_ref(), Ok(target));
            check_name(name);
        }
        both => unreachable!("must be either an address or a name: {both:?}"),
    }
}

fn check_name(name: &str) {
    assert!((1..=253).contains(&name.len()), "{name}");
    let plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.');
    assert!(name.bytes().all(plain), "{name}");
    assert!(name.parse::<IpAddr>().is_err(), "{name}");
    // `inet_aton`, which some resolvers try first, accepts one to four C integer literals.
    let labels = name.strip_suffix('.').unwrap_or(name).split('.');
    let number = |label: &str| match label.strip_prefix("0x") {
        Some(digits) => digits.bytes().all(|byte| byte.is_ascii_hexdigit()),
        None => label.bytes().all(|byte| byte.is_ascii_digit()),
    };
    assert!(!labels.clone().all(number), "{name}");
    assert!(labels.clone().all(|label| !label.is_empty()), "{name}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_corpus() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/target");
        let mut files = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let data = std::fs::read(entry.unwrap().path()).unwrap();
            fuzz_target(&data);
            // Near misses: each byte removed or replaced by a significant one, and all prefixes.
            for at in 0..data.len() {
                for byte in *b"\0 \t%:@/[].-_0xA\x80" {
                    let mut near = data.clone();
                    near[at] = byte;
                    fuzz_target(&near);
                }
                let mut near = data.clone();
                near.remove(at);
                fuzz_target(&near);
                fuzz_target(&data[..at]);
            }
            files += 1;
        }
        assert!(files >= 10, "{folder} has {files} files");
    }
}
