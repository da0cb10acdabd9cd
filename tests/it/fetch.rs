//! The fetcher against sites that behave, misbehave and attack.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use darkroom::config::Secret;
use darkroom::fetch::{Credentials, Error, Fetched, Fetcher, Limits, Options, Reference};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::fixtures::{archive, lora, weights};
use crate::site::{Reply, Request, Site};

/// A fetcher with a cache of its own, and what a test may want to change of it.
pub(crate) struct Bench {
    pub(crate) fetcher: Fetcher,
    folder: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut Options)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { fetcher: Fetcher::new(options(folder.path(), change)).unwrap(), folder }
    }

    /// Another process with the same cache.
    pub(crate) fn again(&self, change: impl FnOnce(&mut Options)) -> Fetcher {
        Fetcher::new(options(self.folder.path(), change)).unwrap()
    }

    pub(crate) fn get(&self, reference: &str) -> Result<Fetched, Arc<Error>> {
        get(&self.fetcher, reference, &Credentials::default())
    }

    pub(crate) fn refused(&self, reference: &str) -> String {
        let error = self.get(reference).unwrap_err();
        // Nothing of it stays.
        assert_eq!(self.files("blobs"), 0, "{error}");
        format!("{}: {error}", error.code())
    }

    pub(crate) fn files(&self, part: &str) -> usize {
        let names = fs::read_dir(self.folder.path().join("loras").join(part)).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| !name.to_string_lossy().ends_with(".lock")).count()
    }
}

fn options(folder: &Path, change: impl FnOnce(&mut Options)) -> Options {
    let mut options = Options {
        cache: folder.join("loras"),
        cache_bytes: 1 << 30,
        hub: "http://127.0.0.1:9".into(),
        civitai: "http://127.0.0.1:9".into(),
        offline: false,
        private: true,
        store: Vec::new(),
        limits: Limits {
            bytes: 1 << 20,
            connect: Duration::from_secs(20),
            // Longer than a busy machine keeps a thread waiting.
            headers: Duration::from_secs(20),
            stall: Duration::from_secs(20),
            attempts: 3,
            pause: Duration::from_millis(5),
        },
    };
    change(&mut options);
    options
}

pub(crate) fn get(fetcher: &Fetcher, reference: &str, credentials: &Credentials) -> Result<Fetched, Arc<Error>> {
    fetcher.get_blocking(&Reference::parse(reference).unwrap(), credentials, |_| ControlFlow::Continue(()))
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn content(fetched: &Fetched) -> Vec<u8> {
    fs::read(fetched.path()).unwrap()
}

#[test]
fn a_link_is_fetched_once_and_asked_about_again() {
    let state = Arc::new(Mutex::new((weights(), "\"one\"")));
    let served = state.clone();
    let site = Site::serve(move |request| {
        let (body, etag) = served.lock().unwrap().clone();
        match request.header("if-none-match") {
            Some(known) if known == etag => Reply::new("304 Not Modified", &[("ETag", etag)], b""),
            _ => Reply::new("200 OK", &[("ETag", etag)], &body),
        }
    });
    let bench = Bench::new();
    let link = site.url("/me.safetensors?signature=abc");
    let first = bench.get(&link).unwrap();
    assert_eq!(content(&first), weights());
    assert!(first.path().ends_with(format!("blobs/{}.safetensors", sha256(&weights()))));
    assert_eq!(bench.get(&link).unwrap().path(), first.path());
    assert_eq!(site.requests()[1].header("if-none-match"), Some("\"one\""));
    // Retrained, at the same place.
    let retrained = fs::read(lora("kohya")).unwrap();
    *state.lock().unwrap() = (retrained.clone(), "\"two\"");
    assert_eq!(content(&bench.get(&link).unwrap()), retrained);
    // The same bytes from elsewhere are kept once.
    assert_eq!(bench.get(&site.url("/copy.safetensors")).unwrap().path(), bench.get(&link).unwrap().path());
    assert_eq!((bench.files("blobs"), bench.files("partial")), (2, 0));
    let first = &site.requests()[0];
    assert_eq!(first.header("accept-encoding"), Some("identity"));
    assert!(first.header("user-agent").unwrap().starts_with("darkroom/"));
}

#[test]
fn many_wait_for_one_download_and_may_leave() {
    let site = Site::serve(|_| Reply::ok(&weights()).slowly(weights().len() / 20, Duration::from_millis(50)));
    let bench = Bench::new();
    let reference = Reference::parse(&site.url("/me.safetensors")).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let paths = runtime.block_on(async {
        let wait = |leaves: bool| {
            let (fetcher, reference) = (bench.fetcher.clone(), reference.clone());
            tokio::spawn(async move {
                let told = |_| if leaves { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
                fetcher.get(&reference, &Credentials::default(), told).await
            })
        };
        let stay = [(); 4].map(|()| wait(false));
        // If all had left before, the next one would begin another.
        while site.requests().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for waiter in [(); 4].map(|()| wait(true)) {
            assert_eq!(waiter.await.unwrap().unwrap_err().code(), "cancelled");
        }
        let mut paths = Vec::new();
        for waiter in stay {
            paths.push(waiter.await.unwrap().unwrap());
        }
        paths
    });
    assert!(paths.iter().all(|fetched| content(fetched) == weights()));
    assert_eq!(site.requests().len(), 1);
    assert_eq!(bench.files("partial"), 0);
}

/// Answers a range as a server does that can.
pub(crate) fn ranged(request: &Request, body: &[u8], etag: &str) -> Reply {
    let start = request.header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    match start.filter(|_| request.header("if-range") == Some(etag)) {
        Some(start) if start >= body.len() => {
            Reply::new("416 Range Not Satisfiable", &[("Content-Range", &format!("bytes */{}", body.len()))], b"")
        }
        Some(start) => {
            let range = format!("bytes {start}-{}/{}", body.len() - 1, body.len());
            Reply::new("206 Partial Content", &[("Content-Range", &range), ("ETag", etag)], &body[start..])
        }
        None => Reply::new("200 OK", &[("ETag", etag)], body),
    }
}

#[test]
fn a_broken_download_goes_on_where_it_broke() {
    let count = AtomicUsize::new(0);
    let site = Site::serve(move |request| {
        let reply = ranged(request, &weights(), "\"a\"");
        let n = count.fetch_add(1, Ordering::SeqCst);
        if n < 5 { reply.cut(weights().len() >> (n + 1)) } else { reply }
    });
    let bench = Bench::new();
    // Each attempt brings something, so more than three are made.
    assert_eq!(content(&bench.get(&site.url("/me.safetensors")).unwrap()), weights());
    let starts: Vec<_> = site.requests().iter().map(|request| request.header("range").map(str::to_owned)).collect();
    assert!(starts[0].is_none() && starts[1..].iter().all(Option::is_some), "{starts:?}");
    assert_eq!(site.requests()[1].header("if-range"), Some("\"a\""));
}

#[test]
fn what_cannot_be_gone_on_with_is_begun_anew() {
    // Ranges ignored; another version; the same from a server that heeds Range and not If-Range; a server that claims another start; the
    // whole already here.
    for fault in ["ignored", "changed", "spliced", "shifted", "complete"] {
        let count = AtomicUsize::new(0);
        let site = Site::serve(move |request| {
            let n = count.fetch_add(1, Ordering::SeqCst);
            let half = weights().len() / 2;
            match (n, fault) {
                (0, "complete") => {
                    Reply::new("200 OK", &[("ETag", "\"a\""), ("Content-Length", &(weights().len() + 9).to_string())], &weights())
                }
                (0, _) => Reply::new("200 OK", &[("ETag", "\"a\"")], &weights()).cut(half),
                (1, "ignored") => Reply::new("200 OK", &[("ETag", "\"a\"")], &weights()),
                (1, "shifted") => {
                    Reply::new("206 Partial Content", &[("Content-Range", "bytes 0-9/10"), ("ETag", "\"a\"")], &weights())
                }
                (_, "changed") => ranged(request, &weights(), "\"b\""),
                (1, "spliced") => {
                    let range = format!("bytes {half}-{}/{}", weights().len() - 1, weights().len());
                    let other: Vec<u8> = weights()[half..].iter().map(|byte| !byte).collect();
                    Reply::new("206 Partial Content", &[("Content-Range", &range), ("ETag", "\"b\"")], &other)
                }
                _ => ranged(request, &weights(), "\"a\""),
            }
        });
        let bench = Bench::new();
        assert_eq!(content(&bench.get(&site.url("/me.safetensors")).unwrap()), weights(), "{fault}");
        assert_eq!(bench.files("partial"), 0, "{fault}");
    }
}

#[test]
fn what_is_no_adapter_is_told_as_what_it_is_and_not_kept() {
    let page = "<!DOCTYPE html><title>Log in</title>";
    let body = |body: &'static [u8]| move |_: &Request| Reply::ok(body);
    let bench = Bench::new();
    let refused = |site: &Site| bench.refused(&site.url("/me.safetensors"));
    for (bytes, part) in [
        (&b""[..], "not_safetensors: it is empty"),
        (b"1234567", "not_safetensors: it is a text"),
        (page.as_bytes(), "a web page"),
        (b"{\"error\":\"expired\"}", "a JSON text"),
        (b"PK\x03\x04archive/data.pkl", "pickle"),
        (b"\x80\x02}q\x01", "pickle"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{}", "unknown kind"),
        (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code>", "an XML text"),
    ] {
        let text = refused(&Site::serve(body(bytes)));
        assert!(text.contains(part), "{text}");
    }
    // By its type, before the body is read.
    let site = Site::serve(move |_| Reply::new("200 OK", &[("Content-Type", "text/html; charset=utf-8")], page.as_bytes()));
    assert!(refused(&site).contains("not_safetensors: 127.0.0.1 gives a web page"), "{}", refused(&site));
    let site = Site::serve(|_| Reply::new("200 OK", &[("Content-Encoding", "gzip")], &weights()));
    assert!(refused(&site).starts_with("bad_answer"), "{}", refused(&site));
    // A whole checkpoint is refused by its announced size, and without one at the limit.
    let site = Site::serve(|_| Reply::new("200 OK", &[("Content-Length", "5000000000")], b"").hang(0));
    assert!(refused(&site).starts_with("too_large"));
    let site = Site::serve(|_| Reply::new("200 OK", &[("Transfer-Encoding", "chunked")], &chunked(&vec![1; 2 << 20])));
    assert!(refused(&site).starts_with("too_large"));
    assert_eq!(bench.files("partial"), 0);
}

fn chunked(body: &[u8]) -> Vec<u8> {
    let mut all = format!("{:x}\r\n", body.len()).into_bytes();
    all.extend(body);
    all.extend(b"\r\n0\r\n\r\n");
    all
}

#[test]
fn lengths_are_not_believed() {
    let whole = weights();
    // Too short for what is announced, every time.
    let site = Site::serve(|_| Reply::new("200 OK", &[("Content-Length", &(weights().len() + 1).to_string())], &weights()));
    assert!(Bench::new().refused(&site.url("/a.safetensors")).contains("broke off"));
    // More than what is announced: only that is read, and it is not whole.
    let site = Site::serve(|_| Reply::new("200 OK", &[("Content-Length", "10")], &weights()));
    let bench = Bench::new();
    let fetched = bench.get(&site.url("/a.safetensors")).unwrap();
    assert_eq!(content(&fetched), whole[..10], "whether it is whole is for the reader to find");
    fetched.forget();
    assert_eq!(bench.files("blobs"), 0);
    // Not a number.
    let site = Site::serve(|_| Reply::new("200 OK", &[("Content-Length", "-1")], &weights()));
    assert!(Bench::new().refused(&site.url("/a.safetensors")).starts_with("unreachable"));
    // None, and then it is whole.
    let site = Site::serve(|_| Reply::new("200 OK", &[("Transfer-Encoding", "chunked")], &chunked(&weights())));
    assert_eq!(content(&Bench::new().get(&site.url("/a.safetensors")).unwrap()), whole);
}

#[test]
fn statuses_are_explained_and_only_passing_ones_tried_again() {
    for (status, code, requests) in [
        ("401 Unauthorized", "unauthorized", 1),
        ("403 Forbidden", "unauthorized", 1),
        ("404 Not Found", "not_found", 1),
        ("410 Gone", "not_found", 1),
        ("418 I'm a teapot", "bad_answer", 1),
        ("204 No Content", "bad_answer", 1),
        ("429 Too Many Requests", "unreachable", 3),
        ("500 Internal Server Error", "unreachable", 3),
        ("503 Service Unavailable", "unreachable", 3),
    ] {
        let site = Site::serve(move |_| Reply::new(status, &[], b"secret inner text"));
        let text = Bench::new().refused(&site.url("/a.safetensors?token=secret"));
        assert!(text.starts_with(code) && !text.contains("secret"), "{status}: {text}");
        // Passing failures are tried again by the download too.
        assert!(
            site.requests().len() >= requests && (requests > 1 || site.requests().len() == 1),
            "{status}: {}",
            site.requests().len()
        );
    }
    let count = AtomicUsize::new(0);
    let site = Site::serve(move |_| match count.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::new("429 Too Many Requests", &[("Retry-After", "0")], b""),
        1 => Reply::new("502 Bad Gateway", &[], b""),
        _ => Reply::ok(&weights()),
    });
    assert_eq!(content(&Bench::new().get(&site.url("/a.safetensors")).unwrap()), weights());
    let text = Bench::new().refused("http://127.0.0.1:9/a.safetensors");
    assert!(text.contains("cannot be reached"), "{text}");
    let text = Bench::new().refused("https://no-such-name.invalid/a.safetensors");
    assert!(text.contains("no-such-name.invalid cannot be reached"), "{text}");
}

#[test]
fn a_silent_server_is_given_up() {
    let impatient = || {
        Bench::with(|options| {
            options.limits.headers = Duration::from_millis(300);
            options.limits.stall = Duration::from_millis(300);
        })
    };
    let site = Site::serve(|_| Reply::silence());
    assert!(impatient().refused(&site.url("/a.safetensors")).contains("sent nothing for"));
    let site = Site::serve(|_| Reply::ok(&weights()).hang(100));
    assert!(impatient().refused(&site.url("/a.safetensors")).contains("sent nothing for"));
}

#[test]
fn redirects_carry_no_secrets_and_end() {
    let cdn = Site::serve(|_| Reply::ok(&weights()));
    let to = cdn.url("/blob?signature=1");
    let site = Site::serve(move |_| Reply::redirect(&to));
    let bench = Bench::with(|options| options.civitai = site.address.clone());
    let credentials = Credentials { hub: None, civitai: Some(Secret::new("canary-token")) };
    let fetched = get(&bench.fetcher, &site.url("/api/download/models/1?type=Model"), &credentials).unwrap();
    assert_eq!(content(&fetched), weights());
    assert_eq!(site.requests()[0].header("authorization"), Some("Bearer canary-token"));
    let all = format!("{:?}", cdn.requests());
    assert!(
        !all.contains("canary") && !all.contains("referer") && !all.contains("cookie") && !all.contains("type=Model"),
        "{all}"
    );
    // To another site no token goes at all.
    let link = get(&bench.fetcher, &cdn.url("/direct.safetensors"), &credentials).unwrap();
    assert_eq!((content(&link), cdn.requests().last().unwrap().header("authorization")), (weights(), None));

    let endless = Site::serve(|_| Reply::redirect("/again"));
    assert!(Bench::new().refused(&endless.url("/a")).starts_with("too_many_redirects"));
    assert_eq!(endless.requests().len(), 6);
    for to in ["file:///etc/passwd", "ftp://x.example/a", "https://user:pw@x.example/"] {
        let site = Site::serve(move |_| Reply::redirect(to));
        assert!(Bench::new().refused(&site.url("/a")).starts_with("url_not_allowed"), "{to}");
    }
    let site = Site::serve(|_| Reply::new("302 Found", &[], b""));
    assert!(Bench::new().refused(&site.url("/a")).starts_with("bad_answer"));
}

#[test]
fn private_places_are_not_reached_directly_nor_by_a_redirect() {
    let inner = Site::serve(|_| Reply::ok(&weights()));
    let guarded = |change: &dyn Fn(&mut Options)| {
        Bench::with(|options| {
            options.private = false;
            change(options);
        })
    };
    let port = inner.address.rsplit(':').next().unwrap().to_owned();
    for link in [
        inner.url("/a"),
        format!("http://localhost:{port}/a"),
        format!("http://2130706433:{port}/a"),
        format!("http://[::ffff:127.0.0.1]:{port}/"),
        format!("https://127.0.0.1:{port}/a"),
        "https://localhost/a".into(),
        "https://169.254.169.254/latest".into(),
        "https://[::1]/".into(),
    ] {
        let text = guarded(&|_| {}).refused(&link);
        assert!(text.starts_with("url_not_allowed"), "{link}: {text}");
        assert!(!text.contains("169.254.169.254 ") && !text.contains("::1 "), "{text}");
    }
    // The operator's own hub may be in their network; what it redirects to may not.
    let to = inner.url("/a");
    let hub = Site::serve(move |request| match request.path.starts_with("/api/") {
        true => Reply::json(&json!({"sha": "c1", "siblings": [{"rfilename": "a.safetensors"}]})),
        false => Reply::redirect(&to),
    });
    let bench = guarded(&|options| options.hub = hub.address.clone());
    assert!(bench.refused("me/mine").starts_with("url_not_allowed"));
    assert_eq!(hub.requests().len(), 2);
    assert!(inner.requests().is_empty(), "no packet was sent");
}

#[test]
fn archives_and_data_uris() {
    let tar = archive(&[("output/flux_train_replicate/lora.safetensors", &weights())]);
    let served = tar.clone();
    let site = Site::serve(move |_| Reply::ok(&served));
    let bench = Bench::new();
    let fetched = bench.get(&site.url("/trained_model.tar")).unwrap();
    assert_eq!(content(&fetched), weights());
    let base64 = |bytes: &[u8]| base64::Engine::encode(&base64::engine::general_purpose::STANDARD, bytes);
    let from_data = bench.get(&format!("data:application/x-tar;base64,{}", base64(&tar))).unwrap();
    assert_eq!(from_data.path(), fetched.path());
    let plain = bench.get(&format!("data:application/octet-stream;base64,{}", base64(&weights()))).unwrap();
    assert_eq!(plain.path(), fetched.path());
    assert_eq!((bench.files("blobs"), bench.files("partial")), (1, 0));

    for (bytes, code) in [
        (archive(&[("a.safetensors", b"no weights")]), "not_safetensors"),
        (
            archive(&[("a.safetensors", &archive(&[("b.safetensors", &weights())]))]),
            "not_safetensors: it is an archive in an archive",
        ),
        (archive(&[("readme.md", b"x")]), "archive_invalid"),
        (tar[..tar.len() / 2].to_vec(), "archive_invalid"),
        (tarball_with_a_link(), "archive_unsafe"),
        (vec![0x1f, 0x8b, 8, 0, 1, 2, 3, 4], "archive_invalid"),
    ] {
        let bench = Bench::new();
        let served = bytes.clone();
        let site = Site::serve(move |_| Reply::ok(&served));
        let text = bench.refused(&site.url("/trained_model.tar"));
        assert!(text.starts_with(code), "{text}");
        assert!(bench.refused(&format!("data:;base64,{}", base64(&bytes))).starts_with(code));
        assert_eq!(bench.files("partial"), 0);
    }
    assert!(Bench::new().refused("data:text/html;base64,AAAA").starts_with("bad_data_uri"));
}

fn tarball_with_a_link() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "lora.safetensors", "/etc/passwd").unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn the_disk_is_asked_first() {
    let site = Site::serve(|_| Reply::new("200 OK", &[("Content-Length", "4000000000000000")], b"").hang(0));
    let bench = Bench::with(|options| options.limits.bytes = u64::MAX);
    assert!(bench.refused(&site.url("/a.safetensors")).starts_with("storage_full"));
}
