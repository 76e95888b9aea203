//! Checks the TLS settings. Certificate and key files are not read here.

use std::path::PathBuf;

use super::super::flag_table::{self, Key};
use super::super::{CIPHER_SUITES, Identity, ListenerTls, TlsConfig, TlsVersion, UpstreamTls};
use super::reader::Reader;

/// The default of `--secure-serving` with which clients may send TLS or plain text. It cannot be
/// given: it is the default under the name of the first llm-d sidecar, whose quick start names no
/// TLS flag and sends plain text.
pub(in crate::config) const TLS_OR_PLAIN_TEXT: &str = "either";

/// The cipher suites of TLS 1.3, which cannot be disabled, as in Go.
const TLS13_CIPHER_SUITES: [&str; 3] = [
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
];

/// The values of `--enable-tls`: the kinds of engines.
const STAGES: [&str; 3] = ["prefiller", "decoder", "encoder"];

impl Reader<'_> {
    pub(in crate::config) fn tls(&mut self) -> TlsConfig {
        let listener = self.listener_tls();
        let (enabled, unverified) = (
            self.stages(&flag_table::ENABLE_TLS),
            self.stages(&flag_table::TLS_INSECURE_SKIP_VERIFY),
        );
        for stage in &unverified {
            if !enabled.contains(stage) {
                self.warnings.push(format!(
                    "--tls-insecure-skip-verify={stage} has no effect without --enable-tls={stage}"
                ));
            }
        }
        let stage = |stage: &str| {
            enabled.contains(&stage).then(|| UpstreamTls {
                verify: !unverified.contains(&stage),
            })
        };
        let [prefiller, decoder, encoder] = STAGES.map(stage);
        let ca_file = self.path(&flag_table::TLS_CA_FILE);
        let client_identity = self.client_identity();
        for (key, given) in [
            (&flag_table::TLS_CA_FILE, ca_file.is_some()),
            (&flag_table::TLS_CLIENT_CERT, client_identity.is_some()),
        ] {
            if given && enabled.is_empty() {
                let text = format!("--{} has no effect without --enable-tls", key.name);
                self.warnings.push(text);
            }
        }
        TlsConfig {
            listener,
            prefiller,
            decoder,
            encoder,
            ca_file,
            client_identity,
        }
    }

    fn listener_tls(&mut self) -> Option<ListenerTls> {
        let cert_dir = self.path(&flag_table::CERT_PATH);
        let key = self.raw.secure_serving();
        let is_either = self.text(key) == TLS_OR_PLAIN_TEXT && !self.is_given(key);
        let is_on = is_either || self.switch(key);
        let tls = ListenerTls {
            min_version: self.choice(
                &flag_table::TLS_MIN_VERSION,
                &[
                    ("VersionTLS12", TlsVersion::Tls12),
                    ("VersionTLS13", TlsVersion::Tls13),
                ],
            ),
            cipher_suites: self.cipher_suites(),
            accepts_plain_text: is_either && cert_dir.is_none(),
            cert_dir,
        };
        if !is_on {
            let keys = [
                &flag_table::CERT_PATH,
                &flag_table::TLS_MIN_VERSION,
                &flag_table::TLS_CIPHER_SUITES,
            ];
            for given in keys.iter().filter(|key| self.raw.given(key).is_some()) {
                let text = format!(
                    "--{} has no effect with --{}=false (plain text)",
                    given.name, key.name
                );
                self.warnings.push(text);
            }
            return None;
        }
        self.warn_of_cipher_suites(&tls);
        if tls.accepts_plain_text {
            self.warnings.push(
                "TLS and plain text are accepted on the same port, because neither -secure-proxy \
                 nor -cert-path is given; set -secure-proxy to true or false to accept only one"
                    .to_owned(),
            );
        }
        Some(tls)
    }

    fn cipher_suites(&mut self) -> Vec<&'static str> {
        let key = &flag_table::TLS_CIPHER_SUITES;
        let mut suites = Vec::new();
        for item in self.list(key) {
            // Go also accepts the names of two suites without the hash.
            let has_name = |suite: &&&str| {
                **suite == item || (item.ends_with("_POLY1305") && suite.starts_with(item))
            };
            match CIPHER_SUITES.iter().find(has_name) {
                Some(suite) => suites.push(*suite),
                None if TLS13_CIPHER_SUITES.contains(&item) => {}
                None => self.unknown(key, item, &CIPHER_SUITES),
            }
        }
        suites
    }

    fn warn_of_cipher_suites(&mut self, tls: &ListenerTls) {
        let (suites, mut warn) = (&tls.cipher_suites, |text: &str| {
            self.warnings.push(format!("--tls-cipher-suites {text}"));
        });
        if suites.is_empty() {
            return;
        }
        if tls.min_version == TlsVersion::Tls13 {
            warn("has no effect with --tls-min-version=VersionTLS13");
        } else if tls.cert_dir.is_none() && !suites.iter().any(|suite| suite.contains("_ECDSA_")) {
            warn("has no ECDSA suite, which TLS 1.2 clients need for the self-signed certificate");
        }
    }

    fn stages(&mut self, key: &Key) -> Vec<&'static str> {
        let mut stages = Vec::new();
        for item in self.list(key) {
            match STAGES.iter().find(|stage| **stage == item) {
                Some(stage) => stages.push(*stage),
                None => self.unknown(key, item, &STAGES),
            }
        }
        stages
    }

    fn client_identity(&mut self) -> Option<Identity> {
        let (cert, key) = (&flag_table::TLS_CLIENT_CERT, &flag_table::TLS_CLIENT_KEY);
        match (self.path(cert), self.path(key)) {
            (Some(cert_file), Some(key_file)) => Some(Identity {
                cert_file,
                key_file,
            }),
            (None, None) => None,
            (Some(_), None) => {
                self.problem(cert, "requires --tls-client-key, the file with the key");
                None
            }
            (None, Some(_)) => {
                self.problem(
                    key,
                    "requires --tls-client-cert, the file with the certificates",
                );
                None
            }
        }
    }

    pub(super) fn path(&self, key: &Key) -> Option<PathBuf> {
        Some(self.text(key))
            .filter(|path| !path.is_empty())
            .map(PathBuf::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check::tests::{Given, checked, problems};

    /// Returns the TLS state of prefillers, decoders and encoders with these flags: `None` (off),
    /// `Some(true)` (certificates verified) or `Some(false)` (not verified).
    fn stages(given: Given<'_>) -> [Option<bool>; 3] {
        let tls = checked(given).config.tls;
        [tls.prefiller, tls.decoder, tls.encoder].map(|stage| stage.map(|tls| tls.verify))
    }

    #[test]
    fn g4_stages() {
        let (on, skip) = (
            &flag_table::ENABLE_TLS,
            &flag_table::TLS_INSECURE_SKIP_VERIFY,
        );
        let table: &[(Given<'_>, [Option<bool>; 3])] = &[
            (&[], [None, None, None]),
            (&[(on, "")], [None, None, None]),
            (&[(on, "prefiller")], [Some(true), None, None]),
            (&[(on, "decoder")], [None, Some(true), None]),
            (&[(on, "encoder")], [None, None, Some(true)]),
            (
                &[(on, "encoder, prefiller,decoder,encoder")],
                [Some(true), Some(true), Some(true)],
            ),
            (
                &[(on, "prefiller,decoder"), (skip, "decoder")],
                [Some(true), Some(false), None],
            ),
            // `--tls-insecure-skip-verify` alone does not enable TLS.
            (&[(skip, "prefiller,encoder")], [None, None, None]),
        ];
        for (given, want) in table {
            assert_eq!(stages(given), *want, "{given:?}");
        }
        for (text, nearest) in [
            (
                "prefil",
                "`prefil` is not valid; did you mean `prefiller`? Give prefiller, decoder or",
            ),
            (
                "decoder,x",
                "`x` is not valid; give prefiller, decoder or encoder",
            ),
            ("decoder,", "`` is not valid"),
            ("Decoder", "`Decoder` is not valid; did you mean `decoder`?"),
        ] {
            for key in [on, skip] {
                let got = problems(&[(key, text)]);
                assert_eq!(got.len(), 1, "{got:?}");
                let want = format!("--{}: {nearest}", key.name);
                assert!(got[0].starts_with(&want), "{got:?}");
            }
        }
    }

    #[test]
    fn listener() {
        let dir = |given: Given<'_>| checked(given).config.tls.listener.map(|tls| tls.cert_dir);
        let on = (&flag_table::SECURE_PROXY, "true");
        assert_eq!(dir(&[]), None);
        assert_eq!(dir(&[on]), Some(None));
        let path = Some(PathBuf::from("/certs"));
        assert_eq!(dir(&[on, (&flag_table::CERT_PATH, "/certs")]), Some(path));
    }

    #[test]
    fn g2_a_certificate_requires_its_key() {
        let (cert, key) = (
            (&flag_table::TLS_CLIENT_CERT, "c"),
            (&flag_table::TLS_CLIENT_KEY, "k"),
        );
        assert!(problems(&[cert])[0].starts_with("--tls-client-cert: requires --tls-client-key"));
        assert!(problems(&[key])[0].starts_with("--tls-client-key: requires --tls-client-cert"));
        let on = (&flag_table::ENABLE_TLS, "decoder");
        let identity = checked(&[cert, key, on])
            .config
            .tls
            .client_identity
            .unwrap();
        assert_eq!(identity.cert_file, PathBuf::from("c"));
        assert_eq!(identity.key_file, PathBuf::from("k"));
    }

    #[test]
    fn settings_without_effect_cause_warnings() {
        let table: &[(Given<'_>, &str)] = &[
            (
                &[(&flag_table::CERT_PATH, "/certs")],
                "--cert-path has no effect",
            ),
            (
                &[(&flag_table::TLS_INSECURE_SKIP_VERIFY, "encoder")],
                "--tls-insecure-skip-verify=encoder has no effect",
            ),
            (
                &[(&flag_table::TLS_CA_FILE, "ca")],
                "--tls-ca-file has no effect",
            ),
            (
                &[
                    (&flag_table::TLS_CLIENT_CERT, "c"),
                    (&flag_table::TLS_CLIENT_KEY, "k"),
                ],
                "--tls-client-cert has no effect",
            ),
        ];
        for (given, want) in table {
            let warnings = checked(given).warnings;
            assert_eq!(warnings.len(), 1, "{warnings:?}");
            assert!(warnings[0].starts_with(want), "{warnings:?}");
        }
    }
}
