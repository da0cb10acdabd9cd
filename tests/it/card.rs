//! The CUDA build on a card made of software (`tests/card`): what it draws, what LoRAs leave, how much memory plans take, what happens
//! when there is none left.
//!
//! `tests/card/run` builds the card and the program and runs these tests; `tests/card/run all` leaves nothing out.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::cli::Place;
use crate::fixtures::{self, apart};
use crate::service::{DEV_LORA, Service, bytes};

const PROMPT: &str = "portrait of user1003, wearing a green shirt, red top hat";

#[expect(clippy::disallowed_methods, reason = "tests may read the environment")]
fn given(name: &str) -> PathBuf {
    std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: use tests/card/run")).into()
}

/// Whether to take the time for everything.
#[expect(clippy::disallowed_methods, reason = "tests may read the environment")]
fn all() -> bool {
    std::env::var_os("DARKROOM_CARD_ALL").is_some()
}

/// A place where the CUDA build runs on this card. The log is what the card has seen, once the program has ended.
fn place(card: &[(&'static str, &str)]) -> Place {
    let mut environment = vec![("LD_LIBRARY_PATH", given("DARKROOM_CARD")), ("CARD_LOG", "card.json".into())];
    environment.extend(card.iter().map(|(name, value)| (*name, PathBuf::from(value))));
    Place::of(given("DARKROOM_CARD_PROGRAM"), environment)
}

fn log(place: &Place) -> Value {
    serde_json::from_slice(&std::fs::read(place.path("card.json")).unwrap()).unwrap()
}

/// A finished prediction, however long this card takes.
fn drawn(service: &Service, input: &Value) -> Value {
    let made = service.post(DEV_LORA, &[], &json!({ "input": input })).json();
    service.wait(made["id"].as_str().unwrap())
}

fn pixels(path: &Path) -> Vec<u8> {
    image::open(path).unwrap().to_rgb8().into_raw()
}

fn draw(place: &Place, file: &str, more: &[&str]) -> Vec<u8> {
    let all = ["generate", PROMPT, "--lora", "user1003@0.9", "--seed", "3", "--steps", "2", "--quiet", "--output", file];
    place.run(&[&all, more].concat()).succeeds();
    pixels(&place.path(file))
}

#[test]
#[ignore = "needs the card made of software: tests/card/run"]
fn pictures_are_the_processors_in_every_format() {
    for kernels in ["plain", "fused"] {
        let place = place(&[("DARKROOM_KERNELS", kernels)]);
        let exact = draw(&place, "exact.png", &["--device", "cpu"]);
        let formats = [
            ("bf16", 1.0),
            ("f16", 0.2),
            ("f32", 0.1),
            ("fp8", 2.5),
            ("fp8-products", 2.5),
            ("q8_0", 1.0),
            ("q4_k", 5.0),
            ("fp8-merged", 2.5),
        ];
        for (i, (dtype, most)) in formats.into_iter().enumerate() {
            // bf16 by both, the others by one of them.
            if i > 0 && (i % 2 == 0) == (kernels == "plain") && !all() {
                continue;
            }
            let here = draw(&place, &format!("{dtype}-here.png"), &["--device", "cpu", "--dtype", dtype]);
            let there = draw(&place, &format!("{dtype}.png"), &["--device", "cuda", "--dtype", dtype]);
            let log = log(&place);
            // cuBLASLt's workspace, where it was used, is there to the end.
            assert!(log["left_bytes"].as_u64().unwrap() <= 32 << 20, "{log}");
            let launches = log["launches"].clone();
            let (from_exact, from_here) = (apart(&there, &exact), apart(&there, &here));
            println!("{kernels} {dtype}: {from_exact:.3} of 255 from f32, {from_here:.3} from the processor in the same format");
            assert!(from_exact < most && from_here < most, "{kernels} {dtype}");
            let ours = launches.as_object().unwrap().keys().any(|name| name.starts_with("norm_"));
            assert_eq!(ours, kernels == "fused", "{launches}");
        }
        let again = draw(&place, "again.png", &["--device", "cuda"]);
        assert!(again == pixels(&place.path("bf16.png")), "{kernels}: the same job gives other values");
    }
}

/// The base's picture, after a person's, is what it was before, byte for byte.
#[test]
#[ignore = "needs the card made of software: tests/card/run"]
fn people_leave_nothing_behind() {
    for kernels in ["plain", "fused"] {
        let place = place(&[("DARKROOM_KERNELS", kernels)]);
        let service = Service::start(&place, &["--device", "cuda"]);
        service.ready();
        let picture = |lora: Option<&str>| {
            let mut input = json!({ "prompt": PROMPT, "seed": 3, "num_inference_steps": 2, "output_format": "png" });
            if let Some(lora) = lora {
                input["lora_weights"] = lora.into();
            }
            let done = drawn(&service, &input);
            assert_eq!(done["status"], "succeeded", "{done}");
            bytes(&done["output"][0])
        };
        let (base, first, second) = (picture(None), picture(Some("user1003")), picture(Some("user1001")));
        assert!(base != first && first != second);
        assert!(picture(Some("user1003")) == first && picture(None) == base, "{kernels}");
    }
}

/// Weights that wait in main memory and are sent for each product give the picture that they give on the card, byte for byte. (With our
/// kernels they are sent ahead, on a stream of their own: what is not in order this card refuses.)
#[test]
#[ignore = "needs the card made of software: tests/card/run"]
fn what_is_sent_for_each_product_draws_the_same() {
    // The files are bf16, which is widened on the card for f16; GGUF's blocks are widened there, too.
    for (kernels, dtype) in [("plain", "bf16"), ("fused", "bf16"), ("fused", "f16"), ("fused", "fp8"), ("fused", "q8_0")] {
        let place = place(&[("DARKROOM_KERNELS", kernels)]);
        let draw = |file: &str, steps: &str, limit: &[&str]| {
            let all = ["generate", PROMPT, "--device", "cuda", "--dtype", dtype, "--seed", "3", "--steps", steps, "-o", file];
            place.run(&[&all, limit].concat()).succeeds();
            (pixels(&place.path(file)), log(&place)["sent_bytes"].as_u64().unwrap())
        };
        let (here, _) = draw("here.png", "2", &[]);
        let limit = if dtype.ends_with("16") { "1505MB" } else { "1498MB" };
        let (away, two) = draw("away.png", "2", &["--vram-limit", limit]);
        let (_, three) = draw("longer.png", "3", &["--vram-limit", limit]);
        assert!(here == away && three > two + (1 << 20), "{kernels}, {dtype}: {two} bytes sent for two steps, {three} for three");
    }
}

/// A job in fp8 between two others changes neither; its weights are made from theirs on the card.
#[test]
#[ignore = "needs the card made of software: tests/card/run"]
fn a_fast_job_leaves_nothing_behind() {
    let place = place(&[("DARKROOM_KERNELS", "fused")]);
    let service = Service::start(&place, &["--device", "cuda", "--go-fast"]);
    service.ready();
    let picture = |fast: bool| {
        let input = json!({ "prompt": PROMPT, "seed": 3, "num_inference_steps": 2, "output_format": "png", "lora_weights": "user1003",
            "go_fast": fast });
        let done = drawn(&service, &input);
        assert_eq!(done["metrics"]["dtype"], if fast { "fp8-merged" } else { "bf16" }, "{done}");
        let png = bytes(&done["output"][0]);
        image::load_from_memory(&png).unwrap().into_rgb8().into_raw()
    };
    let (slow, fast) = (picture(false), picture(true));
    let difference = apart(&slow, &fast);
    assert!(difference > 0.0 && difference < 3.0, "{difference} of 255");
    assert!(picture(false) == slow && picture(true) == fast);
}

/// Adapters that were used lately are on the card still: going back and forth between two people sends nothing but prompts and numbers.
#[test]
#[ignore = "needs the card made of software: tests/card/run"]
fn coming_back_to_a_person_sends_nothing() {
    let sent = |people: &[&str]| {
        let place = place(&[("DARKROOM_KERNELS", "fused")]);
        let mut service = Service::start(&place, &["--device", "cuda"]);
        service.ready();
        for lora in people {
            let input = json!({ "prompt": PROMPT, "seed": 3, "num_inference_steps": 1, "lora_weights": lora });
            assert_eq!(drawn(&service, &input)["status"], "succeeded");
        }
        assert_eq!(service.kill("-TERM"), Some(0));
        log(&place)["sent_bytes"].as_u64().unwrap()
    };
    let adapter = std::fs::metadata(fixtures::path("../../models/pocket/people/user1003.safetensors")).unwrap().len();
    let (one, two, many) =
        (sent(&["user1003"]), sent(&["user1003", "user1001"]), sent(&["user1003", "user1001", "user1003", "user1001"]));
    println!("{one} bytes for one person, {two} for two, {many} for two in turns; an adapter's file has {adapter}");
    // With the second person another picture comes, and with two more turns two: noise, tokens and times, about 40 kB each. Factors
    // are sent as they are stored, in 16 bits.
    assert!(two - one > adapter * 9 / 10 && two - one < adapter * 3 / 2 && many - two < adapter / 2);
}

/// An allocation that the driver refuses: the job is tried again, refused twice or three times with less on the card, at last with a quarter of
/// its blocks in main memory; refused four times, it fails by name; the next job's picture is right.
#[test]
#[ignore = "needs the card made of software: tests/card/run"]
fn a_full_card_fails_a_job_at_most() {
    let input = json!({ "prompt": PROMPT, "seed": 3, "num_inference_steps": 2, "output_format": "png" });
    let mut pictures = Vec::new();
    // Nothing that is loaded is so large; unfolding the autoencoder's last pictures is.
    for refused in ["9000000 0", "9000000 1", "9000000 2", "9000000 3", "9000000 4"] {
        let place = place(&[("CARD_REFUSE", refused), ("DARKROOM_KERNELS", "plain")]);
        let service = Service::start(&place, &["--device", "cuda"]);
        service.ready();
        let first = drawn(&service, &input);
        println!("{refused}: {} {}", first["status"], first["error"]);
        if refused == "9000000 4" {
            assert_eq!(first["status"], "failed");
            assert!(first["error"].as_str().unwrap().contains("memory"), "{first}");
        } else {
            pictures.push(bytes(&first["output"][0]));
        }
        assert_eq!(service.said().contains("no memory is left"), refused != "9000000 0");
        let next = drawn(&service, &input);
        pictures.push(bytes(&next["output"][0]));
    }
    assert!(pictures.iter().all(|picture| *picture == pictures[0]));
}

/// The same in the middle of putting a person on the weights: whoever comes next gets the picture that they would have got.
#[test]
#[ignore = "needs the card made of software: tests/card/run"]
fn a_full_card_in_a_switch_leaves_no_half_of_a_person() {
    let input = |lora: Option<&str>| {
        let mut input = json!({ "prompt": PROMPT, "seed": 3, "num_inference_steps": 1, "output_format": "png" });
        if let Some(lora) = lora {
            input["lora_weights"] = lora.into();
        }
        input
    };
    let mut bases = Vec::new();
    for refused in ["100000 0 merge_bf16", "100000 1 merge_bf16", "100000 4 merge_bf16"] {
        let place = place(&[("CARD_REFUSE", refused), ("DARKROOM_KERNELS", "fused")]);
        let service = Service::start(&place, &["--device", "cuda"]);
        service.ready();
        bases.push(bytes(&drawn(&service, &input(None))["output"][0]));
        let person = drawn(&service, &input(Some("user1003")));
        println!("{refused}: {} {}", person["status"], person["error"]);
        assert_eq!(service.said().contains("no memory is left"), !refused.starts_with("100000 0"), "{}", service.said());
        assert_eq!(person["status"], if refused.starts_with("100000 4") { "failed" } else { "succeeded" });
        bases.push(bytes(&drawn(&service, &input(None))["output"][0]));
    }
    assert!(bases.iter().all(|base| *base == bases[0]));
}

/// Cards before RTX 40 have no units for e4m3: what would take very long is refused, and fp8 weights are widened there as anywhere. On
/// others but Hopper's the product comes before its scales.
#[test]
#[ignore = "needs the card made of software: tests/card/run"]
fn fp8_units_are_used_as_far_as_they_go() {
    let card = |capability| place(&[("CARD_CAPABILITY", capability), ("DARKROOM_KERNELS", "fused")]);
    let old = card("8.6");
    old.generate(&["--device", "cuda", "--dtype", "fp8-products"]).fails(2, &["dtype", "fp8-products", "8.9"]);
    draw(&old, "fp8.png", &["--device", "cuda", "--dtype", "fp8"]);
    let exact = draw(&old, "exact.png", &["--device", "cpu"]);
    for (capability, scaled_after) in [("8.9", true), ("9.0", false), ("12.0", true)] {
        let place = card(capability);
        let picture = draw(&place, "products.png", &["--device", "cuda", "--dtype", "fp8-products"]);
        let launches = log(&place)["launches"].clone();
        assert_eq!(launches.get("scale_products_bf16").is_some(), scaled_after, "{capability}: {launches}");
        assert!(apart(&picture, &exact) < 2.5, "{capability}");
    }
}

/// Where nobody says what to compute with, a process of its own tries our kernels on the card, once. They are used if they are right;
/// candle's operations if one writes nothing, breaks what the process has on the card, or ends it.
#[test]
#[ignore = "needs the card made of software: tests/card/run"]
fn kernels_are_tried_before_they_are_used() {
    let plain = draw(&place(&[("DARKROOM_KERNELS", "plain")]), "plain.png", &["--device", "cuda"]);
    let right = "darkroom's own, which are right on this card";
    for (fault, found) in [
        ("", right),
        ("skip merge_bf16", "weight with two LoRAs in bf16"),
        ("break attention_128_f16", "not tried to the end: DriverError(CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("die gelu_beside_fp8_bf16", "SIGABRT"),
    ] {
        // Too small for a trial at FLUX.1's sizes, which would take hours here.
        let place = place(&[("CARD_MEMORY", "5000000000"), ("CARD_FAULT", fault)]);
        // What dies may have done so for another reason, and has another chance.
        let dies = fault.starts_with("die");
        let tries = if dies { 2 } else { 1 };
        for start in 0..3 {
            let (tried, wrong) = (start < tries, !fault.is_empty() && start + 1 >= tries);
            let all = ["generate", PROMPT, "--lora", "user1003@0.9", "--seed", "3", "--steps", "2", "--device", "cuda"];
            let said = place.run(&[&all[..], &["--output", "a.png", "--force"]].concat()).succeeds().err();
            assert_eq!(said.contains("are tried on this card"), tried, "{fault}: {said}");
            assert_eq!(said.contains("are wrong on this card"), wrong, "{fault}: {said}");
            let ours = log(&place)["launches"].as_object().unwrap().keys().any(|name| name.starts_with("norm_"));
            assert_eq!(ours, fault.is_empty(), "{fault}");
            assert!(ours || pixels(&place.path("a.png")) == plain, "{fault}");
        }
        let doctor = place.run(&["doctor", "--device", "cuda"]).out();
        assert!(doctor.contains(found), "{fault}: {doctor}");
        if !dies {
            let tried = place.run(&["doctor", "--kernels", "--device", "cuda", "--json"]);
            let trials: Vec<Value> = serde_json::from_value(tried.json()).unwrap();
            assert!(fault.starts_with("break") || trials.len() > 90, "{}", trials.len());
            assert_eq!(
                (tried.is_success(), trials.iter().all(|trial| trial["verdict"] == "good")),
                (found == right, found == right)
            );
        }
    }
}

/// Also where there are no units for e4m3, and where their products are scaled afterwards.
#[test]
#[ignore = "needs the card made of software: tests/card/run"]
fn kernels_are_right_on_other_cards() {
    for capability in ["8.6", "8.9", "12.0"] {
        let place = place(&[("CARD_MEMORY", "5000000000"), ("CARD_CAPABILITY", capability)]);
        place.run(&["doctor", "--kernels", "--device", "cuda"]).succeeds();
    }
}

/// At FLUX.1's sizes a trial launches what a driver takes, in the memory that is asked for before it. (All of it computes nothing here.)
#[test]
#[ignore = "needs the card made of software: tests/card/run"]
fn a_trial_at_real_sizes_fits_the_card() {
    let place = place(&[("CARD_DRY", "1")]);
    let trials: Vec<Value> =
        serde_json::from_value(place.run(&["doctor", "--kernels", "--device", "cuda", "--json"]).json()).unwrap();
    let real = trials.iter().filter(|trial| trial["item"].as_str().unwrap().ends_with("at FLUX.1's sizes"));
    assert!(real.count() > 20 && trials.iter().all(|trial| trial["verdict"] == "bad"));
    let log = log(&place);
    assert!(log["most_bytes"].as_u64().unwrap() < 6 << 30);
    // Every kernel is tried, but for what scales products on cards whose units do not.
    let blocks = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"];
    let of_blocks = blocks.iter().flat_map(|kind| [format!("widen_{kind}"), format!("merge_{kind}")]);
    let heads = [16, 32, 64, 128].map(|width| format!("attention_{width}"));
    let others = "norm rms heads gelu_beside gelu_beside_fp8 quantise_fp8 widen_fp8 merge merge_e4m3 group_norm_parts group_norm_apply \
                  convolve convolve_few convolve_halve";
    for kernel in of_blocks.chain(heads).chain(others.split_whitespace().map(String::from)) {
        for dtype in ["f16", "bf16"] {
            assert!(log["launches"].get(format!("{kernel}_{dtype}")).is_some(), "{kernel} in {dtype} is not tried");
        }
    }
}

#[test]
#[ignore = "needs the card made of software: tests/card/run"]
fn an_old_card_is_refused_by_name() {
    let place = place(&[("CARD_CAPABILITY", "7.5"), ("CARD_NAME", "Tesla T4")]);
    place.generate(&["--device", "cuda"]).fails(1, &["Tesla T4", "7.5", "8.0"]);
    assert_eq!(log(&place)["launches"], json!({}));
    let place = self::place(&[("CARD_DRIVER", "12080")]);
    place.generate(&["--device", "cuda"]).fails(1, &["CUDA 12.8", "13.0", "driver"]);
    // Left to choose, the program takes the processor, and says why it does.
    let drawn = place.generate(&["--steps", "1"]);
    assert!(drawn.is_success() && drawn.err().contains("the NVIDIA driver is for CUDA 12.8"), "{}", drawn.err());
}

/// FLUX.1-dev's folder at its real size, all zeros, in files that take no room; and a LoRA of rank 16 on every matrix of its blocks.
fn real_sizes(place: &Place) -> (PathBuf, PathBuf) {
    let of: Value = serde_json::from_slice(&std::fs::read(fixtures::path("flux1-dev.json")).unwrap()).unwrap();
    let model = place.path("flux1-dev");
    let mut lora = Vec::new();
    for (folder, part) in of.as_object().unwrap() {
        let mut tensors = Vec::new();
        for (name, shape) in part["tensors"].as_object().unwrap() {
            let shape: Vec<usize> = serde_json::from_value(shape.clone()).unwrap();
            match name.split_once('{').and_then(|(before, rest)| Some((before, rest.split_once('}')?))) {
                None => tensors.push((name.clone(), shape)),
                Some((before, (count, after))) => {
                    let blocks = 0..count.parse::<usize>().unwrap();
                    tensors.extend(blocks.map(|i| (format!("{before}{i}{after}"), shape.clone())));
                }
            }
        }
        for (name, shape) in &tensors {
            if let (true, Some(base), [out, input]) = (name.contains("blocks."), name.strip_suffix(".weight"), &shape[..]) {
                lora.push((format!("transformer.{base}.lora_A.weight"), vec![16, *input]));
                lora.push((format!("transformer.{base}.lora_B.weight"), vec![*out, 16]));
            }
        }
        std::fs::create_dir_all(model.join(folder)).unwrap();
        std::fs::write(model.join(folder).join("config.json"), part["config"].to_string()).unwrap();
        write_zeros(&model.join(folder).join(part["file"].as_str().unwrap()), &tensors);
    }
    std::fs::copy(fixtures::path("tiny-dev/model_index.json"), model.join("model_index.json")).unwrap();
    fixtures::copy_folders("tiny-dev", &["scheduler", "tokenizer", "tokenizer_2"], &model);
    let path = place.path("lora.safetensors");
    let (begin, end) = write_zeros(&path, &lora);
    // A LoRA of zeros changes nothing, and is known to.
    let mut file = std::fs::File::options().write(true).open(&path).unwrap();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(begin)).unwrap();
    let small = [0x01u8, 0x3c].repeat(1 << 20);
    let mut left = (end - begin) as usize;
    while left > 0 {
        let n = left.min(small.len());
        file.write_all(&small[..n]).unwrap();
        left -= n;
    }
    (model, path)
}

/// Where the data begins and ends.
fn write_zeros(path: &Path, tensors: &[(String, Vec<usize>)]) -> (u64, u64) {
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let end = at + 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({ "dtype": "BF16", "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let mut header = Value::from(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let begin = 8 + header.len() as u64;
    file.set_len(begin + at as u64).unwrap();
    (begin, begin + at as u64)
}

/// What is allocated at most at the real model's sizes, for a picture of 1024 x 1024 with a LoRA on every matrix, is within what the plan
/// was made for, and leaves the driver its part. (The card counts; it computes nothing.)
#[test]
#[ignore = "needs the card made of software: tests/card/run"]
fn plans_keep_their_promise_at_real_sizes() {
    let files = Place::new();
    let (model, lora) = real_sizes(&files);
    let (model, lora) = (model.to_str().unwrap(), lora.to_str().unwrap());
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    let available: u64 = available.trim().trim_end_matches(" kB").parse().unwrap();
    let cards =
        [(80u64, "plain"), (48, "fused"), (32, "plain"), (24, "fused"), (16, "plain"), (12, "fused"), (8, "fused"), (5, "plain")];
    for (gibibytes, kernels) in cards {
        if ![80, 12, 5].contains(&gibibytes) && !all() {
            continue;
        }
        // What waits for the card in main memory takes up to 17 GB there.
        if available < 18_000_000 && gibibytes != 80 {
            println!("{gibibytes} GiB: not shown here, with {available} kB of main memory");
            continue;
        }
        let memory = gibibytes << 30;
        let place = place(&[("CARD_DRY", "1"), ("CARD_MEMORY", &memory.to_string()), ("DARKROOM_KERNELS", kernels)]);
        let said = place.run(&["doctor", "--device", "cuda", "--model", model]).out();
        let line = said.lines().find(|line| line.contains("model:")).unwrap();
        // "…: 11.7 GB of 12.3 GB; a step of …"
        let (plan, _) = line.split_once("; a step of").unwrap();
        let have = plan.split(' ').rev().nth(1).unwrap().parse::<f64>().unwrap();
        // Enough of them to say how long one takes.
        let steps = if gibibytes == 80 { "6" } else { "2" };
        let steps = ["--steps", steps, "--width", "1024", "--height", "1024"];
        let all = [&["generate", "a house", "--model", model, "--device", "cuda", "--lora", lora, "-o", "house.png"][..], &steps];
        place.run(&all.concat()).succeeds();
        let log = log(&place);
        let most = log["most_bytes"].as_f64().unwrap() / 1e9;
        println!("{gibibytes} GiB, {kernels}: {most:.2} GB at most; {line}");
        assert_eq!(log["refused"], 0, "an allocation did not fit");
        let timed = place.run(&["doctor", "--device", "cuda", "--model", model]).out();
        assert_eq!(timed.contains("; the last ones that were measured took "), gibibytes == 80, "{timed}");
        assert!(most <= have, "{most} GB at most after {} of {}", log["kernel_before_most"], log["allocations_then"]);
    }
}
