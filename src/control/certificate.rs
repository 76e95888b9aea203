//! The certificate presented to clients: read from files or self-signed, and reloaded at run time.
//!
//! A reload happens only if the contents of the files differ from those last read. A pair of files
//! that cannot be used leaves the current certificate in use.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::watch::DirWatch;
use crate::limits::CERTIFICATE_FILE_BYTES_MAX;
use crate::metrics::Reloads;
use crate::net::tls::Certificate;
use crate::sys::{self, ReadError};

/// A certificate chain, leaf first, and the key of the leaf.
pub(super) type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// A self-signed certificate's validity starts this many days in the past, since clocks differ.
const MADE_DAYS_BEFORE: u32 = 1;
/// Validity of a self-signed certificate in days. Each start generates a new one.
const MADE_DAYS: u32 = 3650;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A certificate or key file that cannot be used, and the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileError {
    path: PathBuf,
    why: String,
}

impl FileError {
    fn new(path: &Path, why: impl fmt::Display) -> Self {
        Self {
            path: path.to_owned(),
            why: why.to_string(),
        }
    }
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.why)
    }
}

/// The paths and contents of a certificate file and its key file, both PEM.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Pem {
    certificate_file: PathBuf,
    certificate: Vec<u8>,
    key_file: PathBuf,
    key: Vec<u8>,
}

impl Pem {
    /// Reads a certificate file and its key file without parsing them.
    pub(super) fn read(certificate_file: &Path, key_file: &Path) -> Result<Self, FileError> {
        Ok(Self {
            certificate_file: certificate_file.to_owned(),
            certificate: read(certificate_file)?,
            key_file: key_file.to_owned(),
            key: read(key_file)?,
        })
    }

    fn read_in(folder: &Path) -> Result<Self, FileError> {
        Self::read(&folder.join("tls.crt"), &folder.join("tls.key"))
    }

    /// Parses the certificate chain and the private key.
    pub(super) fn identity(&self) -> Result<Identity, FileError> {
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|error| FileError::new(&self.key_file, format!("not a PEM key: {error}")))?;
        Ok((chain(&self.certificate_file, &self.certificate)?, key))
    }

    fn mismatch(&self, error: &rustls::Error) -> FileError {
        let key = self.key_file.display();
        FileError::new(
            &self.certificate_file,
            format!("the certificate cannot be used with {key}: {error}"),
        )
    }
}

/// Reads the certificates of a PEM file. Fails if it contains none.
pub(super) fn read_chain(file: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    chain(file, &read(file)?)
}

fn chain(file: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match chain {
        Ok(chain) if chain.is_empty() => Err(FileError::new(
            file,
            "no certificate found; the file must be PEM (-----BEGIN CERTIFICATE-----)",
        )),
        Ok(chain) => Ok(chain),
        Err(error) => Err(FileError::new(file, format!("not valid PEM: {error}"))),
    }
}

/// Reads a certificate or key file. Fails if it is larger than [`CERTIFICATE_FILE_BYTES_MAX`].
fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    sys::read_regular(path, CERTIFICATE_FILE_BYTES_MAX).map_err(|error| {
        let why = match error {
            ReadError::NotRegular => "not a regular file".to_owned(),
            ReadError::TooLarge => format!(
                "larger than {CERTIFICATE_FILE_BYTES_MAX} bytes, too large for a certificate or key"
            ),
            ReadError::Io(error) => error.to_string(),
        };
        FileError::new(path, why)
    })
}

/// Loads the certificate and key (`tls.crt`, `tls.key`) of a directory. Returns the certificate and
/// the [`Renewal`] that keeps it up to date. Must be called inside the control plane's runtime.
pub(super) fn load(folder: &Path) -> Result<(Arc<Certificate>, Renewal), FileError> {
    // Start watching before the first read, so that no change in between is missed.
    let watch = DirWatch::new(folder);
    let pem = Pem::read_in(folder)?;
    let (chain, key) = pem.identity()?;
    let certificate = Certificate::new(chain, key).map_err(|error| pem.mismatch(&error))?;
    let certificate = Arc::new(certificate);
    let renewal = Renewal {
        folder: folder.to_owned(),
        certificate: Arc::clone(&certificate),
        watch,
        seen: Ok(pem),
    };
    Ok((certificate, renewal))
}

/// Generates a self-signed certificate that is valid for `names`: DNS names and IP addresses. Skips
/// strings that are neither.
pub(super) fn make(names: &[String]) -> Result<Arc<Certificate>, String> {
    let failed = |error: rcgen::Error| error.to_string();
    let is_name = |name: &&String| {
        name.parse::<IpAddr>().is_ok()
            || rustls::pki_types::DnsName::try_from(name.as_str()).is_ok()
    };
    let names: Vec<_> = names.iter().filter(is_name).cloned().collect();
    let mut params = rcgen::CertificateParams::new(names).map_err(failed)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(rcgen::DnType::OrganizationName, "ringside");
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let begin = rcgen::date_time_ymd(1970, 1, 1) + now.saturating_sub(DAY * MADE_DAYS_BEFORE);
    params.not_before = begin;
    params.not_after = begin + DAY * MADE_DAYS;
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let made = params.self_signed(&key).map_err(failed)?;
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    Certificate::new(vec![made.der().clone()], key.into())
        .map(Arc::new)
        .map_err(|error| error.to_string())
}

/// Reloads the certificate presented to clients when the files in its directory change.
pub(super) struct Renewal {
    folder: PathBuf,
    certificate: Arc<Certificate>,
    watch: DirWatch,
    /// The files as last read, or the error of that read. A reload is attempted only if a later
    /// read differs.
    seen: Result<Pem, FileError>,
}

impl Renewal {
    /// Reads the certificate and key again whenever their directory may have changed, and counts
    /// successful and failed reloads in `reloads`. Never returns.
    pub(super) async fn run(mut self, reloads: Arc<Reloads>) {
        loop {
            self.watch.changed().await;
            let folder = self.folder.clone();
            // The directory may be on a mount that hangs.
            let reading = tokio::task::spawn_blocking(move || Pem::read_in(&folder));
            let now = reading.await;
            self.take(
                now.unwrap_or_else(|error| Err(FileError::new(&self.folder, error))),
                &reloads,
            );
        }
    }

    /// Uses what has been read, if it differs from what was read before.
    fn take(&mut self, now: Result<Pem, FileError>, reloads: &Reloads) {
        if now == self.seen {
            return;
        }
        let used = now.as_ref().map_err(Clone::clone).and_then(|pem| {
            let (chain, key) = pem.identity()?;
            let replaced = self.certificate.replace(chain, key);
            replaced.map_err(|error| pem.mismatch(&error))
        });
        match used {
            Ok(()) => {
                reloads.record(true);
                tracing::info!(
                    "{}: certificate reloaded; used for new connections",
                    self.folder.display()
                );
            }
            Err(error) => {
                reloads.record(false);
                tracing::warn!("certificate not reloaded: {error}; keeping the current one");
            }
        }
        self.seen = now;
    }
}
