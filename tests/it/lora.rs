//! LoRAs on whole jobs: against diffusers and PEFT, and off again without a trace.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};

use candle_core::{DType, Device, Tensor};
use darkroom::engine::{Adapter, Event, Job, LoraMode, NoiseKind, Pipeline, Scales, Selected};
use models::lora::{Home, Kind, parse_blocks};
use models::weights::Component;
use serde::Deserialize;

use crate::fixtures::{self, Fixture, relative_l2};

/// Largest relative L2 error of the final latents.
const LATENTS: f64 = 1e-3;

/// A job of a fixture.
#[derive(Debug, Deserialize)]
pub(crate) struct Case {
    pub(crate) name: String,
    prompt: String,
    loras: Vec<Lora>,
    /// Every tensor that differs from the base's, as `component/name`, where the fixture says so.
    #[serde(default)]
    pub(crate) changed: BTreeSet<String>,
    width: usize,
    height: usize,
    steps: usize,
    seed: u64,
    guidance: f64,
}

#[derive(Debug, Deserialize)]
struct Lora {
    file: String,
    scale: f64,
    text_scale: Option<f64>,
    blocks: Option<String>,
}

impl Lora {
    fn selected(&self) -> Selected {
        let mut scales = Scales::uniform(self.scale);
        scales.text = self.text_scale.unwrap_or(self.scale);
        if let Some(blocks) = &self.blocks {
            scales.blocks = parse_blocks(blocks).unwrap();
        }
        Selected { adapter: adapter(&self.file), scales }
    }
}

impl Case {
    pub(crate) fn job(&self) -> Job {
        Job {
            prompt: self.prompt.clone(),
            negative_prompt: String::new(),
            width: self.width,
            height: self.height,
            steps: self.steps,
            guidance: self.guidance,
            true_cfg: 1.,
            seed: self.seed,
            outputs: 1,
            noise: NoiseKind::Cpu,
            start: None,
            loras: self.loras.iter().map(Lora::selected).collect(),
            lora_mode: LoraMode::Auto,
            previews: None,
        }
    }
}

fn adapter(file: &str) -> Arc<Adapter> {
    let path = fixtures::path("lora").join(file);
    Arc::new(Adapter::open(&path).unwrap_or_else(|error| panic!("{file}: {error}")))
}

fn cases() -> Vec<Case> {
    serde_json::from_value(fixtures::json("lora/cases.json")).unwrap()
}

fn load(dtype: DType) -> Pipeline {
    fixtures::pipeline("tiny-dev", dtype)
}

fn latents(pipeline: &Pipeline, job: &Job) -> Tensor {
    pipeline.run(job, &mut |_: Event| ControlFlow::Continue(())).unwrap().latents
}

/// The bits of everything that is computed with.
fn weights(pipeline: &Pipeline) -> BTreeMap<(Component, String), Vec<u32>> {
    let patches = pipeline.patches();
    let bits = |component, name: &str| {
        let (weight, branch) = patches.parameter(component, name).unwrap().current().unwrap();
        assert!(branch.is_empty());
        let values = weight.dense(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    patches.names().map(|(component, name)| ((component, name.to_owned()), bits(component, name))).collect()
}

static TINY: LazyLock<Pipeline> = LazyLock::new(|| load(DType::F32));

#[test]
fn every_format_gives_what_diffusers_and_peft_give() {
    let expected = Fixture::open("lora/expected.safetensors");
    let mut failures = Vec::new();
    for mode in [LoraMode::Auto, LoraMode::Branch] {
        for case in cases() {
            let job = Job { lora_mode: mode, ..case.job() };
            let error = relative_l2(&latents(&TINY, &job), &expected.get(&case.name));
            if error.is_nan() || error > LATENTS {
                failures.push(format!("{} {mode:?}: {error:.1e}", case.name));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(cases().len() >= 19);
}

#[test]
fn two_hundred_alternations_leave_nothing_behind() {
    for (dtype, home) in
        [(DType::F32, Home::Device), (DType::BF16, Home::Device), (DType::BF16, Home::Host), (DType::F16, Home::File)]
    {
        let pipeline = load(dtype);
        pipeline.patches().home = home;
        let fresh = weights(&load(dtype));
        let files = ["diffusers", "kohya", "lokr", "loha", "dora_out", "dora_in", "diff", "text_encoders", "xlabs"];
        let sets: Vec<Vec<Selected>> = files
            .iter()
            .enumerate()
            .map(|(i, file)| {
                vec![Selected { adapter: adapter(&format!("{file}.safetensors")), scales: Scales::uniform(0.3 * i as f64 - 1.) }]
            })
            .chain([vec![
                Selected { adapter: adapter("diffusers.safetensors"), scales: Scales::uniform(0.4) },
                Selected { adapter: adapter("dora_in.safetensors"), scales: Scales::uniform(1.1) },
            ]])
            .collect();
        let first: Vec<_> = sets
            .iter()
            .map(|set| {
                let alone = load(dtype);
                alone.patches().apply(set, LoraMode::Auto).unwrap();
                weights(&alone)
            })
            .collect();
        let mut random = fastrand::Rng::with_seed(17);
        for i in 0..200 {
            let which = random.usize(..sets.len());
            pipeline.patches().apply(&sets[which], LoraMode::Auto).unwrap();
            if i % 20 == 0 {
                assert!(weights(&pipeline) == first[which], "{dtype:?} {home:?}: set {which} after {i} switches");
            }
            pipeline.patches().apply(&[], LoraMode::Auto).unwrap();
            if i % 20 == 10 {
                assert!(weights(&pipeline) == fresh, "{dtype:?} {home:?}: the base after {i} switches");
            }
        }
        assert!(weights(&pipeline) == fresh);
    }
}

#[test]
fn pictures_alternate_between_a_user_and_nobody() {
    let all = cases();
    let job = |name: &str| all.iter().find(|case| case.name == name).unwrap().job();
    let bits = |job: &Job| -> Vec<u32> {
        latents(&TINY, job).flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    };
    let (nobody, user) = (bits(&job("base")), bits(&job("kohya")));
    assert_ne!(nobody, user);
    for _ in 0..10 {
        assert_eq!(bits(&job("base")), nobody);
        assert_eq!(bits(&job("kohya")), user);
        bits(&job("differences"));
    }
}

#[test]
fn a_switch_touches_no_more_than_it_must() {
    let pipeline = load(DType::F32);
    let mut patches = pipeline.patches();
    let one = [Selected { adapter: adapter("norm_out.safetensors"), scales: Scales::uniform(1.) }];
    let two = [Selected { adapter: adapter("peft.safetensors"), scales: Scales::uniform(1.) }];
    let switch = patches.apply(&one, LoraMode::Auto).unwrap();
    assert_eq!((switch.changed, switch.restored), (1, 0));
    let same = patches.apply(&one, LoraMode::Auto).unwrap();
    assert_eq!((same.changed, same.restored), (0, 0));
    let switch = patches.apply(&two, LoraMode::Auto).unwrap();
    assert_eq!((switch.changed, switch.restored), (two[0].adapter.updates.len(), 1));
    // A scale of 0 is no adapter at all.
    let none = [Selected { adapter: two[0].adapter.clone(), scales: Scales::uniform(0.) }];
    assert_eq!(patches.apply(&none, LoraMode::Auto).unwrap().changed, 0);
    drop(patches);
    assert!(weights(&pipeline) == weights(&TINY_FRESH));
}

static TINY_FRESH: LazyLock<Pipeline> = LazyLock::new(|| load(DType::F32));

#[test]
fn an_adapter_of_another_size_changes_nothing() {
    let bundle = models::pocket::bundle();
    let pocket = Pipeline::load(&bundle, &Device::Cpu, DType::F32, &mut |_| {}).unwrap();
    let before = weights(&pocket);
    let set = [Selected { adapter: adapter("diffusers.safetensors"), scales: Scales::uniform(1.) }];
    let error = pocket.patches().apply(&set, LoraMode::Auto).unwrap_err();
    assert_eq!(error.code(), "misfit");
    assert!(error.to_string().contains("double_blocks.0.img_attn.qkv"), "{error}");
    assert!(pocket.patches().live().is_empty());
    assert!(weights(&pocket) == before);
}

#[test]
fn a_switch_that_fails_in_the_middle_leaves_the_set_before() {
    for home in [Home::Device, Home::Host, Home::File] {
        let pipeline = load(DType::F32);
        let base = weights(&pipeline);
        let mut patches = pipeline.patches();
        patches.home = home;
        let good = [Selected { adapter: adapter("diffusers.safetensors"), scales: Scales::uniform(0.7) }];
        patches.apply(&good, LoraMode::Merge).unwrap();
        drop(patches);
        let with_good = weights(&pipeline);
        // The factors of its last change do not fit each other: seen only once that tensor is made, as a lack of memory would be.
        let mut broken = Adapter::clone(&adapter("kohya.safetensors"));
        let last = broken.updates.last_mut().unwrap();
        let Kind::LowRank { up, .. } = &mut last.change.kind else { unreachable!("kohya's changes are low-rank") };
        *up = Tensor::cat(&[&*up, &*up], 1).unwrap();
        broken.report.digest = "broken".into();
        let set = [Selected { adapter: Arc::new(broken), scales: Scales::uniform(1.) }];
        let mut patches = pipeline.patches();
        assert!(patches.apply(&set, LoraMode::Merge).is_err());
        assert_eq!(patches.live().len(), 1);
        assert_eq!(patches.live()[0].adapter.digest(), good[0].adapter.digest());
        drop(patches);
        assert!(weights(&pipeline) == with_good, "{home}");
        pipeline.patches().apply(&[], LoraMode::Merge).unwrap();
        assert!(weights(&pipeline) == base, "{home}");
    }
}
