//! Models that are made to fit: what `--dtype` and `--vram-limit` keep in fewer bits gives the same pictures, nearly; LoRAs have their
//! full effect on it; a job that finds no memory is tried again.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use darkroom::engine::{Error, Event, Job, LoraMode, Pipeline, Plan, Room, Scales, Selected, Sizes};
use models::bundle::Bundle;
use models::flux::{self, Flux};
use models::lora::Adapter;
use models::nn::{Home, Linear, Weight};
use models::pocket::people;
use models::pocket::probe::{ATTRIBUTES, Probe};
use models::weights::{Checkpoint, Component, Keep, OnHost, Source};

use crate::cli::Place;
use crate::fixtures::{self, Fixture, relative_l2};
use crate::layouts::velocity;

fn tiny() -> Bundle {
    fixtures::bundle("tiny-dev")
}

fn load(bundle: &Bundle, plan: impl Into<Plan>) -> Pipeline {
    Pipeline::load(bundle, &Device::Cpu, plan, &mut |_| {}).unwrap()
}

fn kept(transformer: Keep) -> Plan {
    Plan { transformer, ..DType::F32.into() }
}

fn job(side: usize, steps: usize, loras: Vec<Selected>) -> Job {
    Job { loras, ..fixtures::job("portrait of user1003, wearing a green shirt, red top hat", side, side, steps) }
}

fn latents(pipeline: &Pipeline, job: &Job) -> Tensor {
    pipeline.run(job, &mut |_| ControlFlow::Continue(())).unwrap().latents
}

fn adapter() -> Arc<Adapter> {
    Arc::new(Adapter::open(Path::new(&fixtures::lora("diffusers"))).unwrap())
}

#[test]
fn fewer_bits_move_the_latents_a_little_and_never_the_same_bits_twice() {
    let exact = latents(&load(&tiny(), DType::F32), &job(64, 2, vec![]));
    for (keep, most) in
        [(Keep::Fp8, 0.08), (Keep::Fp8Products, 0.1), (Keep::Gguf(GgmlDType::Q8_0), 0.02), (Keep::Gguf(GgmlDType::Q4_0), 0.3)]
    {
        let pipeline = load(&tiny(), kept(keep));
        let got = latents(&pipeline, &job(64, 2, vec![]));
        let error = relative_l2(&got, &exact);
        println!("{keep}: {error:.2e}");
        assert!(error > most / 100. && error < most, "{keep}: {error}");
        assert_eq!(relative_l2(&latents(&pipeline, &job(64, 2, vec![])), &got), 0.0, "{keep}: the same job again");
    }
}

#[test]
fn a_weak_lora_moves_a_quantised_base_as_far_as_a_dense_one() {
    // Its deltas are far below the steps of fp8 and of GGUF blocks: merged into them they would vanish.
    let adapter = adapter();
    let moved = |plan: Plan, scale: f64| {
        let pipeline = load(&tiny(), plan);
        let without = latents(&pipeline, &job(64, 2, vec![]));
        let on = Selected { adapter: adapter.clone(), scales: Scales::uniform(scale) };
        let with = latents(&pipeline, &job(64, 2, vec![on]));
        let back = latents(&pipeline, &job(64, 2, vec![]));
        assert_eq!(relative_l2(&back, &without), 0.0, "and off again, bit for bit");
        relative_l2(&with, &without)
    };
    for scale in [0.002, 0.9] {
        let dense = moved(DType::F32.into(), scale);
        assert!(dense > 1e-6, "{dense}");
        for keep in [Keep::Fp8, Keep::Gguf(GgmlDType::Q8_0), Keep::Gguf(GgmlDType::Q4_0)] {
            let ratio = moved(kept(keep), scale) / dense;
            println!("scale {scale}, {keep}: {ratio:.3} of {dense:.1e}");
            assert!((0.9..1.1).contains(&ratio), "scale {scale}, {keep}: moves {ratio} as far");
        }
    }
}

/// With kernels for cards, what stands beside a matrix that is widened is added on the way: one matrix, one product, GELU in it.
#[test]
fn with_kernels_for_cards_a_lora_is_added_while_its_weight_is_widened() {
    let random = |n: usize| Tensor::randn(0f32, 1., (3, n), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    let values = |x: &Tensor| x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for keep in [Keep::Fp8, Keep::Gguf(GgmlDType::Q8_0)] {
        let pipeline = load(&tiny(), Plan { transformer: keep, ..DType::BF16.into() });
        let set = [Selected { adapter: adapter(), scales: Scales::uniform(0.9) }];
        let mut patches = pipeline.patches();
        patches.apply(&set, LoraMode::Auto).unwrap();
        for name in ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"] {
            let parameter = patches.parameter(Component::Transformer, name).unwrap();
            let (weight, addends) = parameter.current().unwrap();
            assert!(!addends.is_empty(), "{name} stays as it is, with something beside it");
            let linear = Linear::new(parameter.clone(), None);
            let x = random(parameter.shape()[1]);
            let beside = linear.forward_gelu(&x).unwrap();
            let (added, expected) = kernels::emulated(|| {
                let merged = match &weight {
                    Weight::Fp8 { data, scale, .. } => kernels::widen_fp8(data, scale.as_ref(), DType::BF16, &addends),
                    Weight::Quantised(blocks) => kernels::widen_blocks(blocks, DType::BF16, &addends),
                    other => panic!("{name} is {other:?}"),
                };
                (linear.forward_gelu(&x).unwrap(), kernels::linear_gelu(&x, &merged.unwrap(), None).unwrap())
            });
            assert_eq!(values(&added), values(&expected), "{keep} {name}");
            let apart = relative_l2(&beside.to_dtype(DType::F32).unwrap(), &added.to_dtype(DType::F32).unwrap());
            assert!(apart > 0. && apart < 2e-2, "{keep} {name}: {apart} from a product of its own");
        }
    }
}

/// A job may ask for e4m3 products of a model that is kept dense: LoRAs are merged first, and nothing of it stays.
#[test]
fn a_job_in_fp8_is_what_an_fp8_model_draws_and_leaves_nothing() {
    let (dense, fp8) = (load(&tiny(), DType::F32), load(&tiny(), kept(Keep::Fp8Products)));
    let set = |scale| vec![Selected { adapter: adapter(), scales: Scales::uniform(scale) }];
    let plain = |loras| job(64, 2, loras);
    let fast = |loras| Job { lora_mode: LoraMode::Fp8, ..job(64, 2, loras) };
    let run = |pipeline: &Pipeline, job: &Job| pipeline.run(job, &mut |_| ControlFlow::Continue(())).unwrap();
    let (base, with) = (latents(&dense, &plain(vec![])), latents(&dense, &plain(set(0.9))));
    let at_once = run(&dense, &fast(vec![]));
    assert_eq!((at_once.dtype.as_str(), run(&dense, &plain(vec![])).dtype.as_str()), ("fp8-merged", "f32"));
    assert_eq!(relative_l2(&at_once.latents, &latents(&fp8, &plain(vec![]))), 0.0, "the same weights as those of a load in fp8");
    let error = relative_l2(&at_once.latents, &base);
    assert!(error > 1e-4 && error < 0.1, "{error}");
    // The LoRA moves it as far, and as a branch beside fp8 weights would within what rounding the weights costs.
    let merged = latents(&dense, &fast(set(0.9)));
    let (moved, exact) = (relative_l2(&merged, &at_once.latents), relative_l2(&with, &base));
    let branch = relative_l2(&merged, &latents(&fp8, &plain(set(0.9))));
    println!("moved {moved:.3}, dense {exact:.3}; {branch:.3} from the branch, {error:.3} for fp8 itself");
    assert!((0.9..1.1).contains(&(moved / exact)) && branch < 2. * error, "{moved} of {exact}, {branch} from the branch");
    // From one to the other and back in any order, bit for bit; an fp8 model is not made fp8 once more.
    for (job, want) in
        [(plain(set(0.9)), &with), (fast(set(0.9)), &merged), (fast(vec![]), &at_once.latents), (plain(vec![]), &base)]
    {
        assert_eq!(relative_l2(&latents(&dense, &job), want), 0.0, "{:?}", job.lora_mode);
    }
    assert_eq!(run(&fp8, &fast(vec![])).dtype, "fp8-products");
    let pristine = latents(&fp8, &plain(vec![]));
    assert_eq!(relative_l2(&latents(&fp8, &fast(set(0.9))), &latents(&fp8, &plain(set(0.9)))), 0.0);
    assert_eq!(relative_l2(&latents(&fp8, &plain(vec![])), &pristine), 0.0);
    // Where pristine weights do not stay beside changed ones, it would cost more than it saves.
    let sparing = load(&tiny(), Plan { home: Some(Home::Host), ..DType::F32.into() });
    let finished = run(&sparing, &fast(vec![]));
    assert_eq!((finished.dtype.as_str(), relative_l2(&finished.latents, &base)), ("f32", 0.0));
}

/// `--dtype fp8-merged` is that for every job; a lack of memory does not make another picture of it.
#[test]
fn a_model_in_fp8_merged_merges_before_it_rounds() {
    let merged = load(&tiny(), kept(Keep::Fp8Merged));
    assert_eq!(merged.patches().mode(), LoraMode::Fp8, "before the first job");
    let (dense, fp8) = (load(&tiny(), DType::F32), load(&tiny(), kept(Keep::Fp8Products)));
    let set = || vec![Selected { adapter: adapter(), scales: Scales::uniform(0.9) }];
    let fast = |loras| Job { lora_mode: LoraMode::Fp8, ..job(64, 2, loras) };
    for (i, loras) in [vec![], set(), vec![], set()].into_iter().enumerate() {
        merged.pretend_full(if i == 3 { 2 } else { 0 });
        let got = merged.run(&job(64, 2, loras.clone()), &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!((got.dtype.as_str(), relative_l2(&got.latents, &latents(&dense, &fast(loras)))), ("fp8-merged", 0.0), "{i}");
    }
    assert_eq!(relative_l2(&latents(&merged, &job(64, 2, vec![])), &latents(&fp8, &job(64, 2, vec![]))), 0.0);
    // What a very weak LoRA moves is what rounding activations moves, not more than e4m3 itself does.
    let weak = || vec![Selected { adapter: adapter(), scales: Scales::uniform(0.002) }];
    let base = |pipeline: &Pipeline| latents(pipeline, &job(64, 2, vec![]));
    let moved = |pipeline: &Pipeline| relative_l2(&latents(pipeline, &job(64, 2, weak())), &base(pipeline));
    let error = relative_l2(&base(&merged), &base(&dense));
    let all = [&dense, &merged, &fp8].map(moved);
    println!(
        "at 0.002: {:.4} dense, {:.4} merged before rounding, {:.4} beside it; e4m3 itself {error:.4}",
        all[0], all[1], all[2]
    );
    assert!(all[1] < 1.5 * error && all[2] < 1.5 * error, "{all:?}, {error}");
}

/// Bytes that a component's weights take, by where they are.
fn bytes(pipeline: &Pipeline, of: Component, on_host: OnHost) -> [u64; 2] {
    let patches = pipeline.patches();
    let mut bytes = [0; 2];
    for (component, name) in patches.names().filter(|(component, _)| *component == of) {
        let size = match patches.parameter(component, name).unwrap().current().unwrap().0 {
            Weight::Dense(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Weight::Fp8 { data, scale, .. } => data.elem_count() + scale.map_or(0, |scale| 4 * scale.elem_count()),
            Weight::Quantised(blocks) => blocks.storage_size_in_bytes(),
            Weight::Mapped(_) => unreachable!("only for cards"),
        };
        bytes[usize::from(on_host.has(component, name))] += size as u64;
    }
    bytes
}

#[test]
fn a_plan_takes_what_it_says() {
    let bundle = models::pocket::bundle();
    let source =
        models::weights::Source::new(Component::Transformer, &bundle.transformer.checkpoint().unwrap(), DType::F32, &Device::Cpu);
    let sizes = Sizes::of(&bundle, &flux::Config::read(&source, None).unwrap()).unwrap();
    let roomy = Plan::fitting(DType::F32, &sizes, Room::Card(u64::MAX), None).unwrap();
    // Room for a picture's work, and a part of what all weights would take.
    let (all, work) = (roomy.need.unwrap().all(), roomy.need.unwrap().work);
    let mut seen = Vec::new();
    for percent in [100, 60, 45, 40, 30, 25, 20, 16, 12, 10] {
        let have = work + (all - work) * percent / 100;
        let Ok(plan) = Plan::fitting(DType::F32, &sizes, Room::Card(have), None) else { continue };
        let need = plan.need.unwrap();
        assert!(need.all() <= have);
        if seen.contains(&(plan.transformer, plan.on_host)) {
            continue;
        }
        seen.push((plan.transformer, plan.on_host));
        let pipeline = load(&bundle, plan.clone());
        let [here, away] = bytes(&pipeline, Component::Transformer, plan.on_host);
        let sent = need.sent[0] + need.sent[1];
        println!("{percent} %: {plan}; {here} here, {away} away");
        // Biases and head norms, which plans leave out, are more of a small model than of FLUX.1.
        assert!((0.97..1.06).contains(&(here as f64 / need.transformer as f64)), "{plan}: {here}");
        // T5 without its table, which is no parameter.
        let [_, text_away] = bytes(&pipeline, Component::T5, plan.on_host);
        assert!(
            text_away == need.sent[2] || (0.97..1.06).contains(&(text_away as f64 / need.sent[2] as f64)),
            "{plan}: {text_away}"
        );
        let patches = pipeline.patches();
        for (component, name) in patches.names() {
            let matrix = patches.parameter(component, name).unwrap().shape().len() == 2;
            assert!(!plan.on_host.has(component, name) || matrix, "{name} is a vector and stays");
        }
        assert!(away == sent || (0.97..1.06).contains(&(away as f64 / sent as f64)), "{plan}: {away} of {sent}");
    }
    assert!(seen.len() >= 4, "{seen:?}");
}

/// Files in e4m3 as they are published, with scales and without: multiplied as they are if that is asked for, their embedders and the like
/// widened.
#[test]
fn published_fp8_files_are_multiplied_as_they_are() {
    let layouts = Fixture::open("layouts/layouts.safetensors");
    for name in ["flux1-mini-fp8-scaled.safetensors", "flux1-mini-prefixed-fp8.safetensors"] {
        let file = Checkpoint::open(&[fixtures::path(&format!("layouts/{name}"))]).unwrap();
        let source = Source::new(Component::Transformer, &file, DType::F32, &Device::Cpu);
        let source = source.kept(Keep::Fp8Products, OnHost::default());
        let flux = Flux::load(&source, None).unwrap();
        let mut multiplied = 0;
        for (name, parameter) in source.parameters() {
            let Weight::Fp8 { products, scale, .. } = parameter.current().unwrap().0 else { continue };
            let large = name.contains("blocks") && !name.contains("mod");
            assert_eq!(products, large, "{name}");
            assert!(!products || scale.unwrap().dims() == [parameter.shape()[0], 1], "{name}");
            multiplied += usize::from(products);
        }
        assert!(multiplied >= 8, "{name}: {multiplied}");
        source.finish().unwrap();
        let error = relative_l2(&velocity(&flux, &layouts, "mini.in"), &layouts.get(&format!("{name}.out")));
        println!("{name}: {error:.4} from its values widened");
        assert!((1e-4..0.08).contains(&error), "{name}: {error}");
    }
}

#[test]
fn people_are_themselves_in_fewer_bits() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pocket/people/user1003.safetensors");
    let (adapter, probe) = (Arc::new(Adapter::open(&path).unwrap()), Probe::load().unwrap());
    for keep in [Keep::Fp8, Keep::Gguf(GgmlDType::Q8_0)] {
        let pipeline = load(&models::pocket::bundle(), kept(keep));
        for seed in 1..=3 {
            let on = Selected { adapter: adapter.clone(), scales: Scales::uniform(1.0) };
            let job = Job { seed, ..job(models::pocket::SIDE, 12, vec![on]) };
            let finished = pipeline.run(&job, &mut |_| ControlFlow::Continue(())).unwrap();
            let found = people::recognise(&probe.look(finished.pictures[0].as_raw()).unwrap().face);
            assert_eq!(found, Some("user1003"), "{keep}, seed {seed}");
        }
    }
}

#[test]
fn a_job_without_memory_is_tried_again_and_the_next_one_is_right() {
    let pipeline = load(&tiny(), DType::F32);
    let want = latents(&pipeline, &job(64, 2, vec![]));
    let mut encodings;
    for attempts in [1, 2, 3] {
        pipeline.pretend_full(attempts);
        encodings = 0;
        let again = pipeline.run(&job(64, 2, vec![]), &mut |event| {
            encodings += usize::from(matches!(event, Event::Encoding));
            ControlFlow::Continue(())
        });
        assert_eq!((encodings, relative_l2(&again.unwrap().latents, &want)), (attempts + 1, 0.0));
    }
    pipeline.pretend_full(4);
    let failed = pipeline.run(&job(64, 2, vec![]), &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(failed, Error::OutOfMemory { .. }) && failed.to_string().contains("takes about"), "{failed}");
    // With LoRAs too. On a processor nothing has moved; what has moved must give the same on a card, where this has not run.
    let on = vec![Selected { adapter: adapter(), scales: Scales::uniform(0.9) }];
    let fresh = latents(&load(&tiny(), DType::F32), &job(64, 2, on.clone()));
    assert_eq!(relative_l2(&latents(&pipeline, &job(64, 2, on)), &fresh), 0.0);
    assert_eq!(relative_l2(&latents(&pipeline, &job(64, 2, vec![])), &want), 0.0);
}

#[test]
fn limits_and_formats_on_the_command_line() {
    let place = Place::new();
    place.generate(&["--dtype", "q3"]).fails(2, &["f32", "fp8", "q4_0"]);
    place.generate(&["--vram-limit", "12 parsecs"]).fails(2, &["12GiB"]);
    place.generate(&["--vram-limit", "1KiB"]).fails(2, &["12GiB"]);
    place.generate(&["--vram-limit", "12"]).fails(2, &["12GiB", "at least"]);
    place.generate(&["--vram-limit", "5MB"]).fails(1, &["at least", "--device cpu"]);
    let report = place.generate(&["--vram-limit", "4GiB", "--dtype", "fp8", "--json"]).json();
    assert_eq!(report["dtype"], "fp8");
    // The doctor says what the plan of such a card is, also of a model that is not here yet.
    let asked = ["doctor", "--device", "cpu", "--data", "d", "--listen", "127.0.0.1:0", "--json", "--vram-limit"];
    for (model, limit, said) in [
        ("pocket", "4GB", ["transformer as stored or in bf16", "of 3.4 GB"]),
        (
            "flux1-dev",
            "16GB",
            ["darkroom models pull", "would have transformer fp8 (8.7 GB), its modulations sent once a picture"],
        ),
        ("flux1-dev", "2GB", ["darkroom models pull", "GB of a card that has 1.4 GB for it"]),
    ] {
        let findings = place.run(&[&asked[..], &[limit, "--model", model]].concat()).json();
        let found = findings.as_array().unwrap().iter().find(|finding| finding["item"] == "model").unwrap();
        let text = found["text"].as_str().unwrap();
        assert!(said.iter().all(|said| text.contains(said)), "{model}, {limit}: {text}");
    }
}

/// Attributes that the probe finds as asked for, attributes that were asked for, and pictures with all of them right.
fn attributes(pipeline: &Pipeline, probe: &Probe, prompts: &[serde_json::Value]) -> [usize; 3] {
    let mut counts = [0; 3];
    for row in prompts {
        let (prompt, seed) = (row["prompt"].as_str().unwrap().to_owned(), row["seed"].as_u64().unwrap());
        let job = Job { prompt, seed, ..job(models::pocket::SIDE, 12, vec![]) };
        let finished = pipeline.run(&job, &mut |_| ControlFlow::Continue(())).unwrap();
        let seen = probe.look(finished.pictures[0].as_raw()).unwrap().attributes;
        let wanted = ATTRIBUTES.iter().zip(seen).filter_map(|((name, _), seen)| Some(row["attributes"][name].as_str()? == seen));
        let right: Vec<bool> = wanted.collect();
        counts[0] += right.iter().filter(|right| **right).count();
        counts[1] += right.len();
        counts[2] += usize::from(right.iter().all(|right| *right));
    }
    counts
}

#[test]
#[ignore = "200 pictures in each of four formats take ten minutes"]
fn prompts_are_followed_as_well_in_fewer_bits() {
    let text = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pocket/probe.json")).unwrap();
    let known: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let (probe, prompts) = (Probe::load().unwrap(), known["prompts"].as_array().unwrap());
    let mut base = None;
    for (name, keep) in
        [("f32", Keep::Stored), ("fp8", Keep::Fp8), ("fp8-products", Keep::Fp8Products), ("q8_0", Keep::Gguf(GgmlDType::Q8_0))]
    {
        let [right, asked, whole] = attributes(&load(&models::pocket::bundle(), kept(keep)), &probe, prompts);
        let percent = 100. * right as f64 / asked as f64;
        println!("{name}: {right} of {asked} attributes, {percent:.2} %; all of a picture's in {whole} of {}", prompts.len());
        assert!((percent - *base.get_or_insert(percent)).abs() <= 1., "{name}: more than 1 % from f32");
    }
}
