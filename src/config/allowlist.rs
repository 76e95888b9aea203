//! Which engines requests may name.

use std::fmt;
use std::path::PathBuf;

use crate::fleet::AllowRule;

/// The allowlist of targets. All its sources add up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowlistConfig {
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

impl PoolGroup {
    /// The group as API paths have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stable => "inference.networking.k8s.io",
            Self::Experimental => "inference.networking.x-k8s.io",
        }
    }

    /// The version that is read.
    #[must_use]
    pub const fn version(self) -> &'static str {
        match self {
            Self::Stable => "v1",
            Self::Experimental => "v1alpha2",
        }
    }
}

impl fmt::Display for PoolRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
