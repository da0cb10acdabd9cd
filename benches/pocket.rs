//! What a picture of pocket is made of, on the CPU: `cargo bench --bench pocket`, or one part of it: `… -- step`.

#![allow(missing_docs, clippy::unwrap_used, reason = "a bench ends by panicking")]

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use models::clip::ClipText;
use models::flux::{Conditioning, Flux, Rope};
use models::pocket;
use models::t5::T5Encoder;
use models::tokenize::Tokenizers;
use models::vae::Autoencoder;
use models::weights::{Component, Source};
use serde_json::Value;

/// Pocket's picture is 128 x 128: 8 x 8 tokens of 2 x 2 latents.
const SIDE: usize = 8;

/// The weights of one component, and its `config.json`.
fn open(component: Component) -> (Source, Option<Value>) {
    let bundle = pocket::bundle();
    let files = match component {
        Component::Transformer => &bundle.transformer,
        Component::T5 => &bundle.t5,
        Component::Clip => &bundle.clip,
        Component::Vae => &bundle.vae,
    };
    let config = files.config.as_ref().map(|config| serde_json::from_slice(&config.read().unwrap()).unwrap());
    (Source::new(component, &files.checkpoint().unwrap(), DType::F32, &Device::Cpu), config)
}

fn flux() -> Flux {
    let (source, config) = open(Component::Transformer);
    Flux::load(&source, config.as_ref()).unwrap()
}

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
}

fn load(c: &mut Criterion) {
    c.bench_function("load: transformer", |b| b.iter(flux));
}

fn encode(c: &mut Criterion) {
    let tokenizers = Tokenizers::load(&pocket::bundle()).unwrap();
    let (source, config) = open(Component::T5);
    let t5 = T5Encoder::load(&source, config.as_ref()).unwrap();
    let (source, config) = open(Component::Clip);
    let clip = ClipText::load(&source, config.as_ref()).unwrap();
    let prompt = "a portrait of a person with long red hair and glasses, smiling, wearing a blue shirt, yellow background";
    let length = tokenizers.t5_limit().unwrap();
    let ids = |ids: &[u32]| Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    c.bench_function("encode: tokens, T5 and CLIP", |b| {
        b.iter(|| {
            let (five, one) = (tokenizers.t5(prompt, length).unwrap(), tokenizers.clip(prompt).unwrap());
            (t5.forward(&ids(&five.ids)).unwrap(), clip.forward(&ids(&one.ids)).unwrap())
        });
    });
}

fn step(c: &mut Criterion) {
    let flux = flux();
    let config = flux.config();
    let l_txt = Tokenizers::load(&pocket::bundle()).unwrap().t5_limit().unwrap();
    let conditioning = Conditioning {
        txt: random(&[1, l_txt, config.text_width]),
        pooled: random(&[1, config.pooled_width]),
        guidance: Some(Tensor::new(&[3.5f32], &Device::Cpu).unwrap()),
    };
    let rope = Rope::new(config, l_txt, SIDE, SIDE, &Device::Cpu).unwrap();
    let (img, time) = (random(&[1, SIDE * SIDE, config.channels]), Tensor::new(&[0.7f32], &Device::Cpu).unwrap());
    let prepared = flux.prepare(&time, &conditioning).unwrap();
    c.bench_function("step", |b| b.iter(|| flux.step(0, &img, &prepared, &rope).unwrap()));
}

fn autoencoder(c: &mut Criterion) {
    let (source, config) = open(Component::Vae);
    let vae = Autoencoder::load(&source, config.as_ref()).unwrap();
    let (latents, picture) = (random(&[1, 16, 2 * SIDE, 2 * SIDE]), random(&[1, 3, 16 * SIDE, 16 * SIDE]));
    c.bench_function("vae: decode", |b| b.iter(|| vae.decode(&latents).unwrap()));
    c.bench_function("vae: encode", |b| b.iter(|| vae.encode(&picture).unwrap()));
}

criterion_group! { name = benches; config = Criterion::default().sample_size(20); targets = load, encode, step, autoencoder }
criterion_main!(benches);
