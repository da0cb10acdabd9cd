//! The fetcher and the services that keep adapters: the hub, CivitAI, object stores.

use std::path::Path;
use std::sync::{Arc, Mutex};

use darkroom::config::Secret;
use darkroom::fetch::Credentials;
use models::lora::Adapter;
use serde_json::json;

use crate::fetch::{Bench, content, get, sha256};
use crate::fixtures::{self, archive, weights};
use crate::site::{Reply, Site};

fn hub_token(token: &str) -> Credentials {
    Credentials { hub: Some(Secret::new(token)), civitai: None }
}

/// A hub with one repository of these files, which needs the token if there is one.
fn hub(files: &'static [&'static str], token: Option<&'static str>) -> Site {
    Site::serve(move |request| {
        let sent = request.header("authorization").and_then(|value| value.strip_prefix("Bearer "));
        if token.is_some() && sent != token {
            return Reply::new("401 Unauthorized", &[("X-Error-Code", "GatedRepo")], b"");
        }
        if let Some(rest) = request.path.strip_prefix("/api/models/me/renamed/") {
            return Reply::new("307 Temporary Redirect", &[("Location", &format!("/api/models/me/mine/{rest}"))], b"");
        }
        if request.path == "/api/models/me/mine/revision/main?blobs=true" {
            let sibling =
                |name: &&str| json!({"rfilename": name, "size": weights().len(), "lfs": {"sha256": sha256(&weights())}});
            let siblings: Vec<_> = files.iter().map(sibling).collect();
            return Reply::json(&json!({"sha": "c0ffee", "siblings": siblings}));
        }
        match request.path.strip_prefix("/me/mine/resolve/c0ffee/") {
            Some(_) => Reply::new("200 OK", &[("ETag", "\"x\"")], &weights()),
            None => Reply::new("404 Not Found", &[], b""),
        }
    })
}

#[test]
fn repositories_of_the_hub() {
    let site = hub(&["README.md", "a b.safetensors"], None);
    let bench = Bench::with(|options| options.hub = site.address.clone());
    let fetched = bench.get("me/mine").unwrap();
    assert_eq!(content(&fetched), weights());
    // Pinned to the commit, so that one listing is enough the next time; and by other names the content is known.
    for reference in ["me/mine", "me/mine/a b.safetensors", "https://huggingface.co/me/mine/resolve/main/a%20b.safetensors"] {
        assert_eq!(bench.get(reference).unwrap().path(), fetched.path(), "{reference}");
    }
    assert_eq!(site.count("/me/mine/resolve/c0ffee/a%20b.safetensors"), 1);
    assert_eq!(bench.get("me/renamed").unwrap().path(), fetched.path(), "renamed repositories redirect");
    let refused = |reference: &str| bench.get(reference).unwrap_err().to_string();
    assert!(refused("me/mine/other.safetensors").contains("the repository holds: a b.safetensors"));
    assert!(refused("me/mine@v9").contains("revision (v9)"));
    assert!(refused("me/nobody").contains("check owner, name and revision"));

    let several = hub(&["b.safetensors", "a.safetensors"], None);
    let bench = Bench::with(|options| options.hub = several.address.clone());
    assert!(bench.refused("me/mine").contains("name one of them: a.safetensors, b.safetensors"));
    let none = hub(&["adapter.bin"], None);
    assert!(Bench::with(|options| options.hub = none.address.clone()).refused("me/mine").contains("no .safetensors"));
}

#[test]
fn a_fetched_adapter_is_read_once_whatever_its_scale() {
    let site = hub(&["a.safetensors"], None);
    let folder = tempfile::tempdir().unwrap();
    let mut config = darkroom::config::Config::from_environment();
    config.cache = Some(folder.path().into());
    config.hub.endpoint.clone_from(&site.address);
    config.hub.token = None;
    config.hub.offline = false;
    let sources = darkroom::ops::lora::Sources::new(&config);
    let open = |scale: &str| {
        let loras = darkroom::ops::lora::parse(&[format!("me/mine@{scale}")], None, None).unwrap();
        sources.open(&loras, &mut |_| std::ops::ControlFlow::Continue(())).unwrap().remove(0)
    };
    let first = open("0.5");
    // Whoever read the file again would read this.
    let blobs = folder.path().join("loras/blobs");
    let blob = std::fs::read_dir(blobs).unwrap().next().unwrap().unwrap().path();
    std::fs::write(&blob, b"nothing of use").unwrap();
    let second = open("1.2");
    assert!(Arc::ptr_eq(&first.adapter, &second.adapter) && second.scales.model == 1.2);
    assert_eq!(site.count("/me/mine/resolve/"), 1);
}

#[test]
fn one_tenants_token_opens_nothing_to_another() {
    let site = hub(&["a.safetensors"], Some("hf_right"));
    let bench = Bench::with(|options| options.hub = site.address.clone());
    let as_ = |credentials: &Credentials| {
        get(&bench.fetcher, "me/mine", credentials).map_err(|error| format!("{}: {error}", error.code()))
    };
    let without = as_(&Credentials::default()).unwrap_err();
    assert!(without.starts_with("unauthorized") && without.contains("HF_TOKEN") && without.contains("me/mine"), "{without}");
    assert!(as_(&hub_token("hf_right")).is_ok());
    // It is in the cache now, and still not theirs.
    assert!(as_(&Credentials::default()).is_err());
    let wrong = as_(&hub_token("hf_wrong")).unwrap_err();
    assert!(wrong.contains("does not reach it") && !wrong.contains("hf_wrong"), "{wrong}");
    assert!(as_(&hub_token("broken\nheader")).is_err());
}

/// The hub lists gated repositories to everybody: what is in the cache is for those who could fetch it.
#[test]
fn a_gated_repository_is_asked_for_its_file_every_time() {
    let site = Site::serve(|request| {
        if request.path.starts_with("/api/models/") {
            let sibling = json!({"rfilename": "a.safetensors", "lfs": {"sha256": sha256(&weights())}});
            return Reply::json(&json!({"sha": "c0ffee", "gated": "auto", "siblings": [sibling]}));
        }
        match request.header("authorization") {
            Some("Bearer hf_right") => Reply::new("200 OK", &[("ETag", "\"x\"")], &weights()),
            _ => Reply::new("403 Forbidden", &[("X-Error-Code", "GatedRepo")], b""),
        }
    });
    let bench = Bench::with(|options| options.hub = site.address.clone());
    let as_ = |credentials: &Credentials| get(&bench.fetcher, "me/mine", credentials);
    assert!(as_(&Credentials::default()).is_err());
    let path = as_(&hub_token("hf_right")).unwrap().path().to_owned();
    for other in [Credentials::default(), hub_token("hf_wrong")] {
        assert_eq!(as_(&other).map(|held| held.path().to_owned()).unwrap_err().code(), "unauthorized");
    }
    assert_eq!(as_(&hub_token("hf_right")).unwrap().path(), path);
}

/// PEFT's settings come along, from a repository and from an archive: the adapter is what it is in its folder.
#[test]
fn settings_beside_an_adapter_come_with_it() {
    let folder = fixtures::path("lora/writers/peft");
    let [weights, config] =
        ["adapter_model.safetensors", "adapter_config.json"].map(|name| std::fs::read(folder.join(name)).unwrap());
    let factors = |path: &Path| {
        let updates = Adapter::open(path).unwrap().updates;
        updates.into_iter().map(|update| (update.tensor(), update.change.factor)).collect::<Vec<_>>()
    };
    let wanted = factors(&folder.join("adapter_model.safetensors"));
    // Edited on Windows.
    let config = [&b"\xef\xbb\xbf"[..], &config].concat();
    let archive = archive(&[
        ("out/adapter_model.safetensors", &weights),
        ("out/adapter_config.json", &config),
        ("adapter_config.json", b"{}"),
    ]);
    let site = Site::serve(move |request| match request.path.as_str() {
        "/trained_model.tar" => Reply::new("200 OK", &[("ETag", "\"t\"")], &archive),
        "/api/models/me/mine/revision/main?blobs=true" => {
            let sibling =
                |name: &str, bytes: &[u8]| json!({"rfilename": name, "size": bytes.len(), "lfs": {"sha256": sha256(bytes)}});
            let siblings = [sibling("adapter_model.safetensors", &weights), sibling("adapter_config.json", &config)];
            Reply::json(&json!({"sha": "c0ffee", "gated": false, "siblings": siblings}))
        }
        "/me/mine/resolve/c0ffee/adapter_model.safetensors" => Reply::new("200 OK", &[("ETag", "\"x\"")], &weights),
        "/me/mine/resolve/c0ffee/adapter_config.json" => Reply::new("200 OK", &[("ETag", "\"c\"")], &config),
        _ => Reply::new("404 Not Found", &[], b""),
    });
    let bench = Bench::with(|options| options.hub = site.address.clone());
    for reference in ["me/mine".to_owned(), site.url("/trained_model.tar")] {
        for _ in 0..2 {
            let held = bench.get(&reference).unwrap();
            assert_eq!(factors(held.path()), wanted, "{reference}");
            assert_eq!(Adapter::inspect(held.path()).warnings, [""; 0]);
        }
    }
    assert_eq!(site.count("/me/mine/resolve/c0ffee/adapter_model.safetensors"), 1);
    assert_eq!(bench.files("partial"), 0);
}

#[test]
fn an_outage_or_no_network_at_all_leaves_what_is_cached() {
    let down = Arc::new(Mutex::new(false));
    let state = down.clone();
    let site = Site::serve(move |_| match *state.lock().unwrap() {
        true => Reply::new("503 Service Unavailable", &[], b""),
        false => Reply::new("200 OK", &[("ETag", "\"a\"")], &weights()),
    });
    let bench = Bench::new();
    let link = site.url("/a.safetensors");
    let path = bench.get(&link).unwrap().path().to_owned();
    *down.lock().unwrap() = true;
    assert_eq!(bench.get(&link).unwrap().path(), path);
    let asked = site.requests().len();
    let offline = bench.again(|options| options.offline = true);
    assert_eq!(get(&offline, &link, &Credentials::default()).unwrap().path(), path);
    let error = get(&offline, &site.url("/b.safetensors"), &Credentials::default()).unwrap_err();
    assert_eq!((error.code(), site.requests().len()), ("offline", asked));
}

#[test]
fn what_arrives_must_be_what_was_announced() {
    let site = Site::serve(|request| match request.path.starts_with("/api/") {
        true => Reply::json(
            &json!({"sha": "c1", "siblings": [{"rfilename": "a.safetensors", "size": 9, "lfs": {"sha256": "ab".repeat(32)}}]}),
        ),
        false => Reply::ok(&weights()),
    });
    let bench = Bench::with(|options| options.hub = site.address.clone());
    assert!(bench.refused("me/mine").starts_with("bad_answer"));
    assert_eq!(site.count("/me/mine/"), 2, "tried once more");
    assert_eq!(bench.files("partial"), 0);
    for answer in ["[]", "{}", "no json", "{\"sha\":1}"] {
        let site = Site::serve(move |_| Reply::ok(answer.as_bytes()));
        assert!(Bench::with(|options| options.hub = site.address.clone()).refused("me/mine").starts_with("bad_answer"));
    }
}

#[test]
fn civitai_by_page_version_and_name() {
    let site = Site::serve(|request| match request.path.as_str() {
        "/api/v1/models/618692" => {
            Reply::json(&json!({"modelVersions": [{"id": 5, "baseModel": "SDXL 1.0"}, {"id": 4, "baseModel": "Flux.1 D"}]}))
        }
        "/api/download/models/4" if request.header("authorization") == Some("Bearer right") => Reply::ok(&weights()),
        "/api/download/models/4" => Reply::new("401 Unauthorized", &[], b""),
        _ => Reply::new("404 Not Found", &[], b""),
    });
    let bench = Bench::with(|options| options.civitai = site.address.clone());
    let credentials = Credentials { hub: Some(Secret::new("hf_other")), civitai: Some(Secret::new("right")) };
    let as_ = |reference: &str| {
        get(&bench.fetcher, reference, &credentials).map(|fetched| content(&fetched)).map_err(|e| e.to_string())
    };
    for reference in [
        "https://civitai.com/models/618692/flux-realism",
        "https://civitai.com/models/1?modelVersionId=4",
        "civitai:4",
        "urn:air:flux1:lora:civitai:618692@4",
    ] {
        assert_eq!(as_(reference).unwrap(), weights(), "{reference}");
    }
    assert!(as_("civitai:9").unwrap_err().contains("the number must be that of the version"));
    assert!(as_("https://civitai.com/models/7").unwrap_err().contains("no model has this number"));
    assert!(bench.get("civitai:4").unwrap_err().to_string().contains("CIVITAI_API_TOKEN"));
    assert!(!format!("{:?}", site.requests()).contains("hf_other"));
}

#[test]
fn buckets_with_the_operators_credentials() {
    let site = Site::serve(|request| {
        let signed =
            request.header("authorization").is_some_and(|value| value.starts_with("AWS4-HMAC-SHA256 Credential=key-id/"));
        let etag = [("ETag", "\"e1\""), ("Last-Modified", "Sat, 21 Nov 2026 07:00:00 GMT")];
        match (signed, request.path.as_str(), request.header("if-none-match")) {
            (false, ..) => Reply::new("403 Forbidden", &[], b"<Error><Code>AccessDenied</Code></Error>"),
            (_, "/loras/me/a.safetensors", Some("\"e1\"")) => Reply::new("304 Not Modified", &etag, b""),
            (_, "/loras/me/a.safetensors", _) => Reply::new("200 OK", &etag, &weights()),
            _ => Reply::new("404 Not Found", &[], b"<Error><Code>NoSuchKey</Code></Error>"),
        }
    });
    let address = site.address.clone();
    let store = move |id: &str| {
        let pairs = [
            ("AWS_ACCESS_KEY_ID", id),
            ("AWS_SECRET_ACCESS_KEY", "canary"),
            ("AWS_REGION", "auto"),
            ("AWS_ENDPOINT_URL", &address),
            ("AWS_ALLOW_HTTP", "true"),
        ];
        pairs.iter().map(|(name, value)| ((*name).to_owned(), Secret::new(*value))).collect::<Vec<_>>()
    };
    let bench = Bench::with(|options| options.store = store("key-id"));
    let fetched = bench.get("s3://loras/me/a.safetensors").unwrap();
    assert_eq!(content(&fetched), weights());
    assert_eq!(bench.get("s3://loras/me/a.safetensors").unwrap().path(), fetched.path());
    assert_eq!(site.requests().last().unwrap().header("if-none-match"), Some("\"e1\""));
    assert_eq!(bench.get("s3://loras/me/b.safetensors").unwrap_err().code(), "not_found");
    let bench = Bench::with(|options| options.store = store("other"));
    let text = bench.refused("s3://loras/me/a.safetensors");
    assert!(text.starts_with("unauthorized") && !text.contains("canary") && !text.contains("Signature"), "{text}");
}
