//! The configuration of the allowlist: which targets requests may name.

use std::fmt;
use std::path::PathBuf;

use crate::fleet::AllowRule;

/// The sources of the allowlist. A target is allowed if any of them allows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowlistConfig {
    /// Rules given on the command line or in the document.
    pub rules: Vec<AllowRule>,
    /// File with one rule per line, reloaded when it changes.
    pub rules_file: Option<PathBuf>,
    /// `InferencePool` whose pods are allowed.
    pub pool: Option<PoolRef>,
}

/// A reference to an `InferencePool` (Kubernetes Gateway API Inference Extension).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolRef {
    /// API group, which also determines the API version.
    pub group: PoolGroup,
    /// Namespace of the pool and of its pods.
    pub namespace: String,
    /// Name of the pool.
    pub name: String,
}

/// The API group of an `InferencePool`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolGroup {
    /// `inference.networking.k8s.io`, version `v1`.
    Stable,
    /// `inference.networking.x-k8s.io`, version `v1alpha2`.
    Experimental,
}

impl PoolGroup {
    /// Returns the name of the API group, which is part of the API paths.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stable => "inference.networking.k8s.io",
            Self::Experimental => "inference.networking.x-k8s.io",
        }
    }

    /// Returns the version of the API group with which the pool is read from the Kubernetes API.
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
