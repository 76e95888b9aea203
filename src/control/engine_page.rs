//! Requests of the control plane to engines.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, CONNECTION, HOST, HeaderValue};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use crate::fleet::{Address, Target};

/// Bytes of a page that are read; the rest is ignored.
const PAGE_BYTES_MAX: usize = 64 << 10;

/// Why an engine has not responded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoPage {
    /// It does not accept a connection.
    Unreachable,
    /// It accepted a connection but did not respond, or not in time.
    Silent,
}

/// Requests a page from an engine on a new connection, over TLS if `tls` is given. Returns its
/// status and its first `PAGE_BYTES_MAX` bytes.
///
/// # Errors
/// The engine has not responded within `wait`, or with something other than HTTP.
pub(super) async fn get(
    target: &Target,
    path: &'static str,
    tls: Option<&Arc<ClientConfig>>,
    wait: Duration,
) -> Result<(StatusCode, Vec<u8>), NoPage> {
    let page = async {
        if let Some(Address::Unix(socket)) = target.address() {
            let name = socket.sun_path();
            let stream = UnixStream::connect(OsStr::from_bytes(&name)).await;
            let stream = stream.map_err(|_| NoPage::Unreachable)?;
            return secure(stream, target, path, tls).await;
        }
        // By name: its addresses may have changed since the start, or it may not have resolved
        // then.
        let stream = TcpStream::connect(target.to_string()).await;
        let stream = stream.map_err(|_| NoPage::Unreachable)?;
        secure(stream, target, path, tls).await
    };
    let page = tokio::time::timeout(wait, page).await;
    page.unwrap_or(Err(NoPage::Silent))
}

async fn secure(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    target: &Target,
    path: &'static str,
    tls: Option<&Arc<ClientConfig>>,
) -> Result<(StatusCode, Vec<u8>), NoPage> {
    let page = match tls {
        None => exchange(stream, target, path).await,
        Some(tls) => {
            let name = ServerName::try_from(super::tls::host(target));
            let name = name.map_err(|_| NoPage::Silent)?;
            let connector = TlsConnector::from(Arc::clone(tls));
            let stream = connector.connect(name, stream).await;
            exchange(stream.map_err(|_| NoPage::Silent)?, target, path).await
        }
    };
    page.map_err(|_| NoPage::Silent)
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    target: &Target,
    path: &'static str,
) -> Result<(StatusCode, Vec<u8>), hyper::Error> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Dropping the set ends the task, and so closes the connection.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = hyper::Uri::from_static(path);
    let headers = request.headers_mut();
    // Each character of an authority may be in a field value.
    if let Ok(host) = HeaderValue::try_from(target.authority()) {
        headers.insert(HOST, host);
    }
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    let mut response = sender.send_request(request).await?;
    let mut page = Vec::new();
    while page.len() < PAGE_BYTES_MAX
        && let Some(frame) = response.frame().await
    {
        let Ok(frame) = frame else { break };
        page.extend(frame.into_data().unwrap_or_default());
    }
    page.truncate(PAGE_BYTES_MAX);
    Ok((response.status(), page))
}
