//! A web site on 127.0.0.1 that answers each request as a test says, and remembers what it was asked.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

#[derive(Debug, Clone, Default)]
pub struct Request {
    /// With its query.
    pub path: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// The bytes of an answer, and what comes after them.
#[derive(Debug, Clone)]
pub struct Reply {
    bytes: Vec<u8>,
    then: Then,
}

#[derive(Debug, Clone, Copy)]
enum Then {
    Close,
    Hang,
    /// The body is written in pieces with a pause between them.
    Slowly(usize, Duration),
}

impl Reply {
    /// With a `Content-Length` unless one is given.
    pub fn new(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let mut head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        if !headers.iter().any(|(name, _)| matches!(*name, "Content-Length" | "Transfer-Encoding")) {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        let mut bytes = (head + "\r\n").into_bytes();
        bytes.extend(body);
        Self { bytes, then: Then::Close }
    }

    pub fn ok(body: &[u8]) -> Self {
        Self::new("200 OK", &[], body)
    }

    pub fn json(value: &serde_json::Value) -> Self {
        Self::new("200 OK", &[("Content-Type", "application/json")], value.to_string().as_bytes())
    }

    pub fn redirect(to: &str) -> Self {
        Self::new("302 Found", &[("Location", to)], b"")
    }

    /// The last `bytes` are not sent; the connection ends.
    pub fn cut(mut self, bytes: usize) -> Self {
        self.bytes.truncate(self.bytes.len() - bytes);
        self
    }

    /// Not even a status.
    pub fn silence() -> Self {
        Self { bytes: Vec::new(), then: Then::Hang }
    }

    /// The last `bytes` are not sent; the connection stays.
    pub fn hang(self, bytes: usize) -> Self {
        Self { then: Then::Hang, ..self.cut(bytes) }
    }

    pub fn slowly(self, piece: usize, pause: Duration) -> Self {
        Self { then: Then::Slowly(piece, pause), ..self }
    }
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

pub struct Site {
    pub address: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Site {
    pub fn serve(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (log, handler): (Arc<Mutex<Vec<Request>>>, Arc<Handler>) = (Arc::default(), Arc::new(handler));
        let seen = log.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, handler) = (seen.clone(), handler.clone());
                // A client that leaves early is its own business.
                thread::spawn(move || drop(answer(stream, &seen, &*handler)));
            }
        });
        Self { address, log }
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.address)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    pub fn count(&self, path: &str) -> usize {
        self.requests().iter().filter(|request| request.path.starts_with(path)).count()
    }
}

fn answer(mut stream: TcpStream, log: &Mutex<Vec<Request>>, handler: &Handler) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut request = Request { path: line.split_whitespace().nth(1).unwrap_or_default().into(), ..Request::default() };
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        request.headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    request.body = vec![0; length];
    reader.read_exact(&mut request.body)?;
    log.lock().unwrap().push(request.clone());
    let Reply { bytes, then } = handler(&request);
    match then {
        Then::Close => stream.write_all(&bytes),
        Then::Hang => {
            stream.write_all(&bytes)?;
            thread::sleep(Duration::from_secs(30));
            Ok(())
        }
        Then::Slowly(piece, pause) => bytes.chunks(piece).try_for_each(|piece| {
            stream.write_all(piece)?;
            thread::sleep(pause);
            Ok(())
        }),
    }
}
