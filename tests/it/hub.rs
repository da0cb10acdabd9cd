//! A model hub on 127.0.0.1: one repository, and faults on demand.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// 401 without this token.
    NeedsToken(&'static str),
    Forbidden,
    /// The body of a weight file ends too early.
    CutOff,
    /// One byte of a weight file is another.
    Altered,
    /// Instead of a weight file an error page, after a good HEAD.
    ErrorPage,
}

pub(crate) struct Hub {
    address: String,
    shared: Arc<Shared>,
}

struct Shared {
    repo: String,
    files: BTreeMap<String, Vec<u8>>,
    fault: Mutex<Fault>,
    requests: AtomicUsize,
}

impl Hub {
    pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    /// Serves the files of a folder until the test ends.
    pub(crate) fn serve(repo: &str, folder: &Path) -> Self {
        let mut files = BTreeMap::new();
        for part in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
            for file in std::fs::read_dir(&part).unwrap().map(|entry| entry.unwrap().path()) {
                let name = file.strip_prefix(folder).unwrap().to_str().unwrap().replace('\\', "/");
                files.insert(name, std::fs::read(file).unwrap());
            }
        }
        let shared = Shared { repo: repo.into(), files, fault: Mutex::new(Fault::None), requests: AtomicUsize::new(0) };
        let shared = Arc::new(shared);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let serving = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = serving.clone();
                // A client that leaves early is its own business.
                std::thread::spawn(move || drop(shared.answer(stream)));
            }
        });
        Self { address, shared }
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn fault(&self, fault: Fault) {
        *self.shared.fault.lock().unwrap() = fault;
    }

    pub(crate) fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::SeqCst)
    }
}

impl Shared {
    fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let mut words = line.split_whitespace();
        let (method, path) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim().split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let mut body = vec![0; headers.get("content-length").map_or(0, |length| length.parse().unwrap())];
        reader.read_exact(&mut body)?;
        self.requests.fetch_add(1, Ordering::SeqCst);
        let fault = *self.fault.lock().unwrap();
        let token = headers.get("authorization").and_then(|value| value.strip_prefix("Bearer "));
        if path == format!("/api/models/{}/paths-info/main", self.repo) {
            return self.paths_info(&mut stream, &body);
        }
        let Some(file) = path.strip_prefix(&format!("/{}/resolve/main/", self.repo)) else {
            return refuse(&mut stream, "404 Not Found");
        };
        match fault {
            // The hub lists the files of a gated repository to everyone, and guards their content.
            Fault::NeedsToken(right) if token != Some(right) => return refuse(&mut stream, "401 Unauthorized"),
            Fault::Forbidden => return refuse(&mut stream, "403 Forbidden"),
            _ => {}
        }
        let Some(bytes) = self.files.get(file) else { return refuse(&mut stream, "404 Not Found") };
        self.resolve(&mut stream, method == "HEAD", bytes, file.ends_with(".safetensors"), fault)
    }

    fn paths_info(&self, stream: &mut TcpStream, body: &[u8]) -> std::io::Result<()> {
        let wanted: Value = serde_json::from_slice(body).unwrap();
        let entry = |path: &Value| {
            let bytes = self.files.get(path.as_str()?)?;
            Some(json!({ "type": "file", "oid": "0".repeat(40), "size": bytes.len(), "path": path }))
        };
        let entries: Vec<Value> = wanted["paths"].as_array().unwrap().iter().filter_map(entry).collect();
        let body = serde_json::to_vec(&entries)?;
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")?;
        write!(stream, "Content-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
        stream.write_all(&body)
    }

    fn resolve(&self, stream: &mut TcpStream, head: bool, bytes: &[u8], large: bool, fault: Fault) -> std::io::Result<()> {
        if fault == Fault::ErrorPage && large && !head {
            return refuse(stream, "410 Gone");
        }
        // Large files are named by their SHA-256, texts by their git hash.
        let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let etag = if large { &digest } else { &digest[..40] };
        write!(stream, "HTTP/1.1 200 OK\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {}\r\n", Hub::COMMIT)?;
        write!(stream, "Content-Length: {}\r\nConnection: close\r\n\r\n", bytes.len())?;
        if head {
            return Ok(());
        }
        match fault {
            Fault::CutOff if large => stream.write_all(&bytes[..bytes.len() / 2]),
            Fault::Altered if large => {
                let mut altered = bytes.to_vec();
                altered[bytes.len() / 2] ^= 1;
                stream.write_all(&altered)
            }
            _ => stream.write_all(bytes),
        }
    }
}

fn refuse(stream: &mut TcpStream, status: &str) -> std::io::Result<()> {
    let body = format!("{{\"error\": \"{status}\"}}");
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}
