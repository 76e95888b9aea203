//! The guards that a configuration leaves open, as warnings for the start.

use super::Config;

impl Config {
    /// Returns a warning for each guard that is open: one sentence each, without the final full
    /// stop.
    #[must_use]
    pub fn open_guards(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.allowlist.is_none() {
            warnings.push(
                "requests may name any target: there is no allowlist (--enable-ssrf-protection, \
                 --allow-target)"
                    .to_owned(),
            );
        }
        if self.pd.trust_client_kv {
            warnings.push(
                "--trust-client-kv: transfer parameters in clients' bodies reach the engines; a \
                 client can make a decoder exit or read another request's KV cache"
                    .to_owned(),
            );
        }
        let tls = &self.tls;
        for (stage, one) in [
            ("prefiller", tls.prefiller),
            ("decoder", tls.decoder),
            ("encoder", tls.encoder),
        ] {
            if one.is_some_and(|one| !one.verify) {
                warnings.push(format!(
                    "--tls-insecure-skip-verify={stage}: the {stage}'s certificate is not checked, \
                     so prompts may be sent to any program that takes its place; --tls-ca-file \
                     makes a certificate of your own trusted"
                ));
            }
        }
        warnings
    }
}
