//! What each dialect's clients send, and what they are answered: OpenAI, Cog, our own, Replicate's files, streams and webhooks.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::cli::Place;
use crate::fixtures;
use crate::service::{Answer, DEV_LORA, Service, bytes, long, until, user1001};
use crate::site::{Reply, Site};

fn decode(text: &Value) -> Vec<u8> {
    STANDARD.decode(text.as_str().unwrap()).unwrap()
}

/// The events of a stream: names and data.
fn events(answer: &Answer) -> Vec<(String, String)> {
    assert!(answer.headers["content-type"].to_str().unwrap().starts_with("text/event-stream"), "{:?}", answer.headers);
    let text = String::from_utf8(answer.body.clone()).unwrap();
    let field = |block: &str, name: &str| {
        let lines: Vec<_> = block.lines().filter_map(|line| line.strip_prefix(name)).map(|line| line.trim_start()).collect();
        lines.join("\n")
    };
    text.split("\n\n")
        .filter(|block| block.contains("data:"))
        .map(|block| (field(block, "event:"), field(block, "data:")))
        .collect()
}

pub(crate) fn png(side: u32) -> Vec<u8> {
    let picture = image::RgbImage::from_fn(side, side, |x, y| image::Rgb([(x * 5) as u8, (y * 3) as u8, 90]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

#[test]
fn go_fast_is_heeded_where_the_operator_allows_it() {
    let input = |fast: bool| json!({ "prompt": "a person", "seed": 7, "num_inference_steps": 2, "output_format": "png", "go_fast": fast });
    let drawn = |service: &Service, fast| {
        let made = service.picture(&input(fast));
        (made["metrics"]["dtype"].as_str().unwrap().to_owned(), bytes(&made["output"][0]))
    };
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let (dtype, base) = drawn(&service, true);
    assert_eq!((dtype.as_str(), drawn(&service, false).0.as_str()), ("f32", "f32"));
    drop(service);
    let place = Place::new();
    let service = Service::start(&place, &["--go-fast"]);
    let (dtype, fast) = drawn(&service, true);
    assert_eq!(dtype, "fp8-merged");
    let (dtype, slow) = drawn(&service, false);
    assert_eq!(dtype, "f32");
    let pixels = |png: &[u8]| image::load_from_memory(png).unwrap().into_rgb8().into_raw();
    assert!(pixels(&slow) == pixels(&base) && pixels(&fast) != pixels(&base));
    let apart = fixtures::apart(&pixels(&fast), &pixels(&base));
    assert!(apart < 4.0, "{apart} of 255");
}

#[test]
fn openais_images() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let generate = |body: &Value| service.post("/v1/images/generations", &[], body);
    let body = json!({ "model": "flux-dev-lora", "prompt": "a person", "n": 2, "size": "1024x1024", "seed": 7, "num_inference_steps": 2 });
    let answer = generate(&body);
    let made = answer.json();
    assert_eq!((answer.status, made["data"].as_array().unwrap().len()), (200, 2), "{made}");
    assert!(decode(&made["data"][0]["b64_json"]).starts_with(b"\x89PNG") && made["created"].as_u64() > Some(1_700_000_000));
    assert_eq!((made["size"].as_str(), made["darkroom"]["seed"].as_u64()), (Some("128x128"), Some(7)), "pocket's own size");
    assert_eq!(generate(&body).json()["data"], made["data"], "a seed is a seed");
    // The same picture as Replicate's clients get.
    let input = json!({ "prompt": "a person", "num_outputs": 2, "seed": 7, "num_inference_steps": 2, "output_format": "png" });
    let same = service.picture(&input);
    assert_eq!(image::load_from_memory(&bytes(&same["output"][1])).unwrap().into_rgb8(), {
        image::load_from_memory(&decode(&made["data"][1]["b64_json"])).unwrap().into_rgb8()
    });
    let lora = format!("data:application/octet-stream;base64,{}", STANDARD.encode(std::fs::read(user1001()).unwrap()));
    let mut with = body.clone();
    with["loras"] = json!([{ "weights": lora, "scale": 0.8 }]);
    with["response_format"] = json!("url");
    with["output_format"] = json!("webp");
    let with = generate(&with).json();
    assert!(with["darkroom"]["lora_used"] == true && with["darkroom"]["loras"][0]["scale"] == 0.8, "{with}");
    let file = service.get(with["data"][0]["url"].as_str().unwrap());
    assert_eq!((file.status, file.headers["content-type"].to_str().unwrap()), (200, "image/webp"));

    let wrong = |change: Value, field: &str| {
        let mut body = json!({ "prompt": "x" });
        change.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
        let answer = generate(&body);
        let error = &answer.json()["error"];
        assert_eq!((answer.status, error["param"].as_str().unwrap_or_default()), (400, field), "{error}");
        assert_eq!(error["type"], "invalid_request_error");
    };
    wrong(json!({ "prompt": null }), "prompt");
    wrong(json!({ "size": "1023x1024" }), "size");
    wrong(json!({ "n": 11 }), "n");
    wrong(json!({ "n": "2" }), "n");
    wrong(json!({ "model": "dall-e-3" }), "model");
    wrong(json!({ "background": "transparent" }), "background");
    wrong(json!({ "loras": [{ "scale": 1 }] }), "loras");
    wrong(json!({ "lora_weights": 3 }), "lora_weights");
    wrong(json!({ "on_lora_error": "ignore" }), "on_lora_error");
    wrong(json!({ "num_inference_steps": 101 }), "num_inference_steps");
    wrong(json!({ "lora_weights": "/etc/passwd" }), "input.lora_weights");
    let failed = generate(&json!({ "prompt": "x", "lora_weights": "data:application/octet-stream;base64,AAAA" }));
    assert_eq!(
        (failed.status, failed.json()["error"]["code"].as_str()),
        (400, Some("lora_not_safetensors")),
        "{}",
        failed.json()
    );
    assert_eq!(failed.headers["x-should-retry"], "false");

    let list = service.get("/v1/models").json();
    assert!(list["object"] == "list" && list["data"].as_array().unwrap().iter().any(|model| model["id"] == "flux-dev"));
    assert!(list["results"].is_array(), "Replicate's clients read the same address");
    assert_eq!(
        (service.get("/v1/models/flux-schnell").json()["object"].as_str(), service.get("/v1/models/x").status),
        (Some("model"), 404)
    );
}

#[test]
fn openais_edits_and_streams() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let edit = |form: Form| service.send(service.client.post(format!("{}/v1/images/edits", service.address)).multipart(form));
    let part = |bytes: Vec<u8>| Part::bytes(bytes).file_name("me.png").mime_str("application/octet-stream").unwrap();
    let form =
        || Form::new().text("prompt", "x").text("num_inference_steps", "4").text("seed", "1").text("prompt_strength", "0.4");
    let first = edit(form().part("image", part(png(64))));
    assert_eq!(first.status, 200, "{}", first.json());
    let picture = image::load_from_memory(&decode(&first.json()["data"][0]["b64_json"])).unwrap().into_rgb8();
    assert_eq!(picture.dimensions(), (64, 64), "the picture's own size");
    // LiteLLM's name of the field, and a mask: the kept half stays near what it was.
    let mask = image::GrayImage::from_fn(64, 64, |x, _| image::Luma([if x < 32 { 0 } else { 255 }]));
    let mut file = std::io::Cursor::new(Vec::new());
    mask.write_to(&mut file, image::ImageFormat::Png).unwrap();
    let masked = edit(form().part("image[]", part(png(64))).part("mask", part(file.into_inner())));
    assert_eq!(masked.status, 200, "{}", masked.json());
    let masked = image::load_from_memory(&decode(&masked.json()["data"][0]["b64_json"])).unwrap().into_rgb8();
    assert_ne!(masked, picture);
    // As OpenAI has it: painted where it is transparent.
    let clear = image::RgbaImage::from_fn(64, 64, |x, _| image::Rgba([9, 9, 9, if x < 32 { 255 } else { 0 }]));
    let mut file = std::io::Cursor::new(Vec::new());
    clear.write_to(&mut file, image::ImageFormat::Png).unwrap();
    let clear = edit(form().part("image", part(png(64))).part("mask", part(file.into_inner())));
    assert_eq!(image::load_from_memory(&decode(&clear.json()["data"][0]["b64_json"])).unwrap().into_rgb8(), masked);
    for (form, part) in [
        (Form::new().text("prompt", "x"), "image is required"),
        (form().part("image", part(b"<html>".to_vec())), "not a picture"),
        (form().part("image[]", part(png(64))).part("image[]", part(png(64))), "2 pictures"),
        (Form::new().part("image", part(png(64))), "prompt is required"),
        (form().part("mask", part(png(64))).part("mask", part(png(64))).part("image", part(png(64))), "a picture has one"),
    ] {
        let answer = edit(form);
        let error = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(answer.status == 400 && error.contains(part), "{error}");
    }

    let body =
        json!({ "prompt": "a person", "stream": true, "partial_images": 2, "num_inference_steps": 100, "n": 1, "seed": 3 });
    let streamed = events(&service.post("/v1/images/generations", &[], &body));
    let data: Vec<Value> = streamed.iter().map(|(_, data)| serde_json::from_str(data).unwrap()).collect();
    let (last, partial) = data.split_last().unwrap();
    // How many there is time for depends on the machine.
    assert!((1..=2).contains(&partial.len()) && last["type"] == "image_generation.completed", "{streamed:?}");
    for (i, (event, (name, _))) in partial.iter().zip(&streamed).enumerate() {
        assert_eq!((name.as_str(), &event["type"]), ("image_generation.partial_image", &json!(name)));
        assert_eq!(event["partial_image_index"], i);
    }
    let small = image::load_from_memory(&decode(&partial[0]["b64_json"])).unwrap().into_rgb8();
    let done = image::load_from_memory(&decode(&last["b64_json"])).unwrap().into_rgb8();
    assert_eq!((small.dimensions(), done.dimensions()), ((16, 16), (128, 128)));
}

#[test]
fn cogs_predictions() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    service.ready();
    let input = json!({ "input": { "prompt": "x", "num_inference_steps": 2, "seed": 4, "output_format": "png" } });
    let made = service.post("/predictions", &[], &input);
    let body = made.json();
    assert_eq!((made.status, body["status"].as_str()), (200, Some("succeeded")), "{body}");
    assert!(bytes(&body["output"][0]).starts_with(b"\x89PNG") && body["metrics"]["predict_time"].as_f64().unwrap() > 0.0);
    let put = |id: &str, headers: &[(&str, &str)], body: &Value| {
        let mut request =
            service.client.put(format!("{}/predictions/{id}", service.address)).header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        service.send(request.body(body.to_string()))
    };
    let first = put("mine-1", &[("prefer", "respond-async")], &json!({ "input": long(1) }));
    assert_eq!(
        (first.status, first.json()["id"].as_str(), first.json()["status"].as_str()),
        (202, Some("mine-1"), Some("starting"))
    );
    let again = put("mine-1", &[("prefer", "respond-async")], &json!({ "input": long(1) }));
    assert_eq!((again.status, again.json()["created_at"].clone()), (202, first.json()["created_at"].clone()), "the same one");
    assert_eq!(service.post("/predictions/mine-1/cancel", &[], &json!({})).status, 200);
    assert_eq!(put("mine-1", &[], &json!({ "id": "other", "input": {} })).status, 422);
    let wrong = service.post("/predictions", &[], &json!({ "input": { "num_outputs": 9 } }));
    assert_eq!((wrong.status, wrong.json()["detail"][0]["loc"].clone()), (422, json!(["body", "input"])), "{}", wrong.json());
    assert_eq!(wrong.json()["detail"][1]["loc"], json!(["body", "input", "num_outputs"]));
    let failed = service.post("/predictions", &[], &json!({ "input": { "prompt": "x", "lora_weights": "data:;base64,AAAA" } }));
    assert_eq!((failed.status, failed.json()["status"].as_str()), (200, Some("failed")), "a failure of the model is an answer");
    assert_eq!(service.get("/health-check").json()["status"], "READY");
    assert_eq!(service.get("/").json()["predictions_url"], "/predictions");
    assert!(service.get("/openapi.json").json()["components"]["schemas"]["Input"]["properties"]["lora_weights"].is_object());
    // With a version it is Replicate's, whatever the address.
    let mut theirs = input.clone();
    theirs["version"] = json!("black-forest-labs/flux-dev-lora");
    assert_eq!(service.post("/predictions", &[("prefer", "wait")], &theirs).status, 201);
}

/// Also names that look like ours, when they are stopped and when webhooks tell of them.
#[test]
fn cogs_clients_name_their_predictions() {
    let site = Site::serve(|_| Reply::ok(b""));
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let put = |id: &str| {
        let body = json!({ "input": long(1), "webhook": site.url("/told"), "webhook_events_filter": ["completed"] });
        let request = service.client.put(format!("{}/predictions/{id}", service.address));
        let request = request.header("content-type", "application/json").header("prefer", "respond-async");
        assert_eq!(service.send(request.body(body.to_string())).status, 202);
    };
    let cancel = |id: &str| service.post(&format!("/predictions/{id}/cancel"), &[], &json!({})).status;
    let names = ["0123456789abcdefghjkmnpqrs", "order-4711"];
    for name in names {
        put(name);
        assert_eq!(cancel(name), 200, "{name}");
    }
    assert_eq!((cancel("1123456789abcdefghjkmnpqrs"), cancel("order-4712")), (404, 404));
    until("both are told", 30, || site.count("/told") == 2);
    let told = site.requests().into_iter().map(|told| serde_json::from_slice::<Value>(&told.body).unwrap());
    let mut told: Vec<_> = told.map(|told| (told["id"].clone(), told["status"].clone())).collect();
    told.sort_by_key(|(id, _)| id.to_string());
    assert_eq!(told, names.map(|name| (json!(name), json!("canceled"))));
}

#[test]
fn jobs_with_their_place_and_progress() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let create = |steps: u64, n: u64| {
        let body = json!({ "prompt": "x", "num_inference_steps": steps, "n": n, "stream": true, "partial_images": 3 });
        let answer = service.post("/darkroom/jobs", &[], &body);
        assert_eq!(answer.status, 202, "{}", answer.json());
        answer.json()["id"].as_str().unwrap().to_owned()
    };
    let (first, second) = (create(50, 4), create(1, 1));
    service.until(&first, |now| now["status"] == "processing");
    let third = create(1, 1);
    assert_eq!(service.get(&format!("/darkroom/jobs/{third}")).json()["ahead"], 1);
    assert_eq!(service.get("/darkroom/queue").json()["queued"], 2);
    // What is shown comes after what is told.
    service.until(&first, |now| {
        let shown = service.get(&format!("/darkroom/jobs/{first}/preview")).status == 200;
        shown || now["status"] != "processing"
    });
    let preview = service.get(&format!("/darkroom/jobs/{first}/preview"));
    assert_eq!((preview.status, preview.headers["content-type"].to_str().unwrap()), (200, "image/webp"));
    let seen = events(&service.get(&format!("/darkroom/jobs/{first}/events")));
    let last: Value = serde_json::from_str(&seen.last().unwrap().1).unwrap();
    assert!(seen.len() > 3 && seen.last().unwrap().0 == "done" && last["status"] == "succeeded");
    let is_drawn = |now: &Value| now["progress"]["step"].as_u64() > Some(0) && now["progress"]["previews"].as_u64() > Some(0);
    assert!(seen.iter().any(|(_, now)| is_drawn(&serde_json::from_str(now).unwrap())), "{seen:?}");
    assert_eq!(last["pictures"].as_array().unwrap().len(), 4);
    assert_eq!(
        (service.wait(&second)["status"].clone(), service.wait(&third)["status"].clone()),
        (json!("succeeded"), json!("succeeded"))
    );
}

#[test]
fn files_in_three_dialects_and_pictures_from_links() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let upload = |form: Form| service.send(service.client.post(format!("{}/v1/files", service.address)).multipart(form));
    let content = |kind: &str| Part::bytes(png(64)).file_name("upload").mime_str(kind).unwrap();
    // Python 1, Python 2, JavaScript.
    let one = upload(Form::new().part("content", content("image/png")).text("metadata", "{\"a\": \"1\"}"));
    let two = upload(
        Form::new()
            .part("content", content("application/octet-stream"))
            .text("filename", "me.png")
            .text("type", "image/png")
            .text("metadata[a]", "1"),
    );
    let blob = Part::bytes(b"{\"a\":\"1\"}".to_vec()).file_name("blob").mime_str("application/json").unwrap();
    let three = upload(Form::new().part("content", content("image/png")).part("metadata", blob));
    for answer in [&one, &two, &three] {
        let file = answer.json();
        assert_eq!(
            (answer.status, file["content_type"].as_str(), &file["metadata"]),
            (201, Some("image/png"), &json!({ "a": "1" })),
            "{file}"
        );
        assert!(file["size"].as_u64() == Some(png(64).len() as u64) && file["checksums"]["sha256"].as_str().unwrap().len() == 64);
    }
    assert_eq!((one.json()["name"].as_str(), two.json()["name"].as_str()), (Some("upload"), Some("me.png")));
    let link = one.json()["urls"]["get"].as_str().unwrap().to_owned();
    assert_eq!(service.get(&link).json()["id"], one.json()["id"], "the address that is sent as input gives the description");
    let download = one.json()["urls"]["download"].as_str().unwrap().to_owned();
    assert_eq!(service.get(&download).body, png(64));
    assert_eq!(service.get(&download.replace("owner=local", "owner=other")).status, 404);
    assert_eq!(upload(Form::new().text("filename", "x")).status, 422);
    assert_eq!(upload(Form::new().part("content", content("image/png")).text("metadata", "[1]")).status, 422);

    let site = Site::serve(|request| match request.path.as_str() {
        "/me.png" => Reply::new("200 OK", &[("Content-Type", "image/png")], &png(64)),
        "/page" => Reply::ok(b"<!doctype html>"),
        _ => Reply::new("404 Not Found", &[], b""),
    });
    let from = |image: &str| {
        let input = json!({ "prompt": "x", "seed": 3, "image": image, "prompt_strength": 0.5, "num_inference_steps": 4, "output_format": "png" });
        service.picture(&input)
    };
    let data = format!("data:image/png;base64,{}", STANDARD.encode(png(64)));
    let (uploaded, linked, inside) = (from(&link), from(&site.url("/me.png")), from(&data));
    assert_eq!(uploaded["status"], "succeeded", "{uploaded}");
    assert!(uploaded["output"] == linked["output"] && linked["output"] == inside["output"], "the same picture from three places");
    assert_eq!(image::load_from_memory(&bytes(&linked["output"][0])).unwrap().width(), 64);
    for (path, code) in [("/gone.png", "image_not_found"), ("/page", "invalid_input")] {
        let failed = from(&site.url(path));
        assert_eq!((failed["status"].as_str(), failed["error_code"].as_str()), (Some("failed"), Some(code)), "{failed}");
    }
    let delete = service.client.delete(&link).header("content-type", "application/json");
    assert_eq!((service.send(delete).status, service.get(&link).status), (204, 404));
    // Long texts are not kept with the job, but shown as a link to the file.
    let noise = image::RgbImage::from_fn(256, 256, |x, y| image::Rgb([(x * y) as u8, (x * 7 + y * y) as u8, (x ^ y) as u8]));
    let mut file = std::io::Cursor::new(Vec::new());
    noise.write_to(&mut file, image::ImageFormat::Png).unwrap();
    let shown = from(&format!("data:image/png;base64,{}", STANDARD.encode(file.into_inner())))["input"]["image"].clone();
    assert!(shown.as_str().unwrap().contains("/v1/files/"), "{shown:.100}");
}

#[test]
fn streams_go_on_where_they_were() {
    let place = Place::new();
    let service = Service::start(&place, &["--files", "links"]);
    let made = service.post(DEV_LORA, &[], &json!({ "input": { "prompt": "x", "num_inference_steps": 3, "seed": 1 } })).json();
    let stream = made["urls"]["stream"].as_str().unwrap();
    assert!(stream.contains("/v1/files/"), "JavaScript wraps only what comes from there as files");
    let seen = events(&service.get(stream));
    let names: Vec<_> = seen.iter().map(|(name, _)| name.as_str()).collect();
    assert!(
        names[..names.len() - 2].iter().all(|name| *name == "logs") && names[names.len() - 2..] == ["output", "done"],
        "{names:?}"
    );
    let logs: String = seen.iter().filter(|(name, _)| name == "logs").map(|(_, data)| format!("{data}\n")).collect();
    assert!(logs.contains("Using seed: 1") && logs.contains("3/3"));
    assert_eq!(service.get(&seen[seen.len() - 2].1).status, 200);
    assert_eq!(seen.last().unwrap().1, "{}");
    let again = service.client.get(stream).header("last-event-id", made["logs"].as_str().unwrap().len().max(14).to_string());
    let again = events(&service.send(again));
    let logs: String = again.iter().filter(|(name, _)| name == "logs").map(|(_, data)| data.clone()).collect();
    assert!(!logs.contains("Using seed") && again.last().unwrap().0 == "done", "{again:?}");
    let failed = service.post(DEV_LORA, &[], &json!({ "input": { "prompt": "x", "lora_weights": "data:;base64,AAAA" } })).json();
    let seen = events(&service.get(failed["urls"]["stream"].as_str().unwrap()));
    let ends: Vec<_> = seen[seen.len() - 2..].iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!((ends, seen.last().unwrap().1.as_str()), (vec!["error", "done"], "{\"reason\":\"error\"}"));
    let unsigned = stream.split('?').next().unwrap();
    assert_eq!(service.get(unsigned).status, 404);
}

fn signature(secret: &str, id: &str, time: &str, body: &[u8]) -> String {
    let key = STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
    mac.update(format!("{id}.{time}.").as_bytes());
    mac.update(body);
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

#[test]
fn webhooks_are_told_signed_and_told_again() {
    let refusals = Arc::new(AtomicUsize::new(0));
    let count = refusals.clone();
    let site = Site::serve(move |request| match request.path.as_str() {
        // Refuses the first end.
        "/flaky"
            if String::from_utf8_lossy(&request.body).contains("\"succeeded\"") && count.fetch_add(1, Ordering::SeqCst) == 0 =>
        {
            Reply::new("500 Internal Server Error", &[], b"")
        }
        "/gone" => Reply::new("410 Gone", &[], b""),
        "/moved" => Reply::redirect("/elsewhere"),
        _ => Reply::ok(b""),
    });
    let place = Place::new();
    let mut service = Service::start(&place, &[]);
    let secret = service.get("/v1/webhooks/default/secret").json()["key"].as_str().unwrap().to_owned();
    assert!(!secret.contains('-') && secret.matches('_').count() == 1, "standard base64: clients split at the underscore");
    let create = |service: &Service, path: &str, events: Value| {
        let input = json!({ "prompt": "x", "num_inference_steps": 2 });
        let body = json!({ "input": input, "webhook": site.url(path), "webhook_events_filter": events });
        let made = service.post(DEV_LORA, &[], &body).json();
        assert_eq!(made["webhook"], site.url(path), "{made}");
        made["id"].as_str().unwrap().to_owned()
    };
    let asked = |path: &str, n: usize| until(&format!("{path} is asked {n} times"), 30, || site.count(path) >= n);
    let id = create(&service, "/all", json!(["start", "output", "logs", "completed"]));
    asked("/all", 4);
    let told: Vec<_> = site.requests().into_iter().filter(|request| request.path == "/all").collect();
    let statuses: Vec<_> =
        told.iter().map(|request| serde_json::from_slice::<Value>(&request.body).unwrap()["status"].clone()).collect();
    assert!(statuses.contains(&json!("succeeded")), "{statuses:?}");
    for request in &told {
        let header = |name: &str| request.header(name).unwrap();
        assert!(header("webhook-id").starts_with(&format!("msg_{id}_")) && header("content-type") == "application/json");
        let (id, time) = (header("webhook-id"), header("webhook-timestamp"));
        assert_eq!(header("webhook-signature"), signature(&secret, id, time, &request.body));
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        assert!(!body.to_string().contains("base64,"), "links, not pictures");
        if let Some(picture) = body["output"][0].as_str() {
            assert_eq!(service.get(picture).status, 200);
        }
    }
    create(&service, "/one", json!(["completed"]));
    create(&service, "/gone", json!(["completed"]));
    create(&service, "/moved", json!(["completed"]));
    asked("/gone", 1);
    asked("/moved", 1);
    create(&service, "/flaky", json!(["completed"]));
    asked("/flaky", 1);
    // What was not told is told by whoever starts next.
    service.kill("-9");
    let service = Service::start(&place, &[]);
    asked("/flaky", 2);
    let [first, second] = &site.requests().into_iter().filter(|request| request.path == "/flaky").collect::<Vec<_>>()[..] else {
        panic!("twice");
    };
    assert_eq!(first.header("webhook-id"), second.header("webhook-id"));
    assert_eq!((site.count("/one"), site.count("/gone"), site.count("/elsewhere")), (1, 1, 0));
    let refused = service.post(DEV_LORA, &[], &json!({ "input": { "prompt": "x" }, "webhook": "https://u:p@example.com/" }));
    assert_eq!(refused.status, 422);
    assert_eq!(service.post(DEV_LORA, &[], &json!({ "input": { "prompt": "x" }, "webhook": "file:///x" })).status, 422);
}

#[test]
fn webhooks_do_not_reach_into_the_network() {
    let site = Site::serve(|_| Reply::ok(b""));
    let place = Place::new();
    let service = Service::start_with(&place, &[], &[("DARKROOM_PRIVATE_URLS", "")]);
    let port = site.address.rsplit(':').next().unwrap();
    for link in
        [site.url("/x"), format!("https://localhost:{port}/x"), "https://169.254.169.254/latest".into(), "https://[::1]/".into()]
    {
        let answer = service.post(DEV_LORA, &[], &json!({ "input": { "prompt": "x" }, "webhook": link }));
        assert_eq!(answer.status, 422, "{link}: {}", answer.json());
        let image = service.post(DEV_LORA, &[], &json!({ "input": { "prompt": "x", "image": link } }));
        assert_eq!(image.status, 422, "{link}");
    }
    // PostgreSQL could not store it.
    let nul = json!({ "input": { "prompt": "x" }, "webhook": "https://example.com/\0x" });
    assert_eq!(service.post(DEV_LORA, &[], &nul).status, 422);
    // A name is resolved only when it is asked.
    let named = json!({ "input": { "prompt": "x", "num_inference_steps": 1 }, "webhook": "https://localhost/x" });
    let id = service.post(DEV_LORA, &[], &named).json()["id"].as_str().unwrap().to_owned();
    assert_eq!(service.wait(&id)["status"], "succeeded", "a webhook that cannot be told is no failure of the job");
    assert_eq!(site.requests().len(), 0);
}
