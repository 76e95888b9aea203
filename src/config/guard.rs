//! Which engines requests may name.

use std::path::PathBuf;

use crate::fleet::AllowRule;

/// The allowlist of targets. All its sources add up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuardConfig {
    /// Always allowed.
    pub rules: Vec<AllowRule>,
    /// A file with one rule per line, read again when it changes.
    pub rules_file: Option<PathBuf>,
    /// The pods of this `InferencePool`.
    pub pool: Option<PoolRef>,
}

/// An `InferencePool` (Kubernetes gateway API inference extension).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolRef {
    /// API group, which also decides the version.
    pub group: PoolGroup,
    /// Its namespace, and that of its pods.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// API group of `InferencePool`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolGroup {
    /// `inference.networking.k8s.io`, version `v1`.
    Stable,
    /// `inference.networking.x-k8s.io`, version `v1alpha2`.
    Experimental,
}
