//! An HTTPS server on the loopback that plays the Kubernetes API: it answers what a test tells it to, also nothing, or half of it.

use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::server::TlsStream;

/// The credentials of the kubeconfig that [`Server::kubeconfig`] writes.
pub const TOKEN: &str = "token-of-the-test";

/// What a request asks for.
#[derive(Clone, Debug)]
pub struct Request {
    pub path: String,
    /// Decoded as far as the API's parameters need it.
    pub query: String,
    pub token: String,
}

impl Request {
    /// A parameter of the query.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.query
            .split('&')
            .find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name))
            .map(|(_, value)| value)
    }

    pub fn is_watch(&self) -> bool {
        matches!(self.parameter("watch"), Some("true" | "1"))
    }
}

/// What the server does then.
pub enum Reply {
    Json(u16, Value),
    Text(String),
    /// Says nothing and keeps the connection.
    Silence,
    /// Hangs up.
    Hangup,
    /// Promises more than it sends, and hangs up.
    Half(Value),
    /// Lines as they come, until the sender is dropped.
    Lines(UnboundedReceiver<String>),
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

/// The server; its thread ends with it.
pub struct Server {
    address: SocketAddr,
    ca: String,
    folder: TempDir,
    seen: Arc<Mutex<Vec<Request>>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Server {
    pub fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let key = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        let private = PrivateKeyDer::Pkcs8(key.signing_key.serialize_der().into());
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![key.cert.der().clone()], private)
            .unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        runtime.spawn(serve(listener, TlsAcceptor::from(Arc::new(config)), Arc::new(handler), seen.clone()));
        Self { address, ca: key.cert.pem(), folder: tempfile::tempdir().unwrap(), seen, runtime: Some(runtime) }
    }

    /// A kubeconfig for it, with our token.
    pub fn kubeconfig(&self) -> PathBuf {
        let folder = self.folder.path();
        std::fs::write(folder.join("ca.crt"), &self.ca).unwrap();
        write_kubeconfig(folder, &format!("https://{}", self.address), Some(&folder.join("ca.crt")))
    }

    /// One that trusts somebody else.
    pub fn kubeconfig_with_another_ca(&self) -> PathBuf {
        let folder = self.folder.path();
        let other = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        std::fs::write(folder.join("ca.crt"), other.cert.pem()).unwrap();
        write_kubeconfig(folder, &format!("https://{}", self.address), Some(&folder.join("ca.crt")))
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }
}

/// Writes a kubeconfig into a folder (JSON is YAML).
pub fn write_kubeconfig(folder: &Path, server: &str, ca: Option<&Path>) -> PathBuf {
    let path = folder.join("kubeconfig");
    let mut cluster = json!({"server": server});
    if let Some(ca) = ca {
        cluster["certificate-authority"] = json!(ca);
    }
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": {"token": TOKEN}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    });
    std::fs::write(&path, config.to_string()).unwrap();
    path
}

impl Drop for Server {
    fn drop(&mut self) {
        // A test may be asynchronous itself, and must not wait here.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn serve(
    listener: std::net::TcpListener,
    tls: TlsAcceptor,
    handler: Arc<Handler>,
    seen: Arc<Mutex<Vec<Request>>>,
) {
    let listener = TcpListener::from_std(listener).unwrap();
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, handler, seen) = (tls.clone(), handler.clone(), seen.clone());
        tokio::spawn(async move {
            // A client that trusts nobody hangs up during the handshake.
            if let Ok(stream) = tls.accept(stream).await {
                // So does one that has given up waiting.
                let _ = connection(stream, &*handler, &seen).await;
            }
        });
    }
}

async fn connection(
    mut stream: TlsStream<TcpStream>,
    handler: &Handler,
    seen: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = buffer.windows(4).position(|part| part == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
        buffer.drain(..end);
        let request = parse(&head);
        seen.lock().unwrap().push(request.clone());
        match handler(&request) {
            Reply::Json(code, value) => answer(&mut stream, code, &value.to_string()).await?,
            Reply::Text(text) => answer(&mut stream, 200, &text).await?,
            Reply::Silence => std::future::pending().await,
            Reply::Hangup => return Ok(()),
            Reply::Half(value) => {
                let text = value.to_string();
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", text.len());
                stream.write_all(head.as_bytes()).await?;
                stream.write_all(&text.as_bytes()[..text.len() / 2]).await?;
                return stream.shutdown().await;
            }
            Reply::Lines(mut lines) => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
                stream.flush().await?;
                while let Some(line) = lines.recv().await {
                    stream.write_all(format!("{:x}\r\n{line}\n\r\n", line.len() + 1).as_bytes()).await?;
                    stream.flush().await?;
                }
                stream.write_all(b"0\r\n\r\n").await?;
            }
        }
        stream.flush().await?;
    }
}

async fn answer(stream: &mut TlsStream<TcpStream>, code: u16, body: &str) -> std::io::Result<()> {
    let head =
        format!("HTTP/1.1 {code} Any\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await
}

fn parse(head: &str) -> Request {
    let target = head.split(' ').nth(1).unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let token = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("authorization").then(|| value.trim().trim_start_matches("Bearer ").to_owned())
    });
    Request {
        path: path.to_owned(),
        query: query.replace("%3D", "=").replace("%3d", "="),
        token: token.unwrap_or_default(),
    }
}
