//! The whole transformer on our kernels for cards, emulated, against the plain operations: what the model asks of them (views, widths,
//! streams of several lengths) and that they are asked at all.

use candle_core::{DType, Device, Tensor};
use models::flux::{Conditioning, Config, Flux, Rope};
use models::t5::T5Encoder;
use models::vae::Autoencoder;
use models::weights::{Component, Source};

use crate::fixtures::{self, relative_l2};

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
}

/// A step of the model that `source(dtype)` opens: f32 without our kernels, bf16 with and without -> errors of both, and launches.
fn step(source: &dyn Fn(DType) -> Source, l_txt: usize, rows: usize, columns: usize) -> (f64, f64, usize) {
    let config = Config::read(&source(DType::F32), None).unwrap();
    let rope = Rope::new(&config, l_txt, rows, columns, &Device::Cpu).unwrap();
    let img = random(&[1, rows * columns, config.channels]);
    let (txt, pooled) = (random(&[1, l_txt, config.text_width]), random(&[1, config.pooled_width]));
    let run = |dtype: DType| {
        let to = |x: &Tensor| x.to_dtype(dtype).unwrap();
        let flux = Flux::load(&source(dtype), None).unwrap();
        let guidance = Some(Tensor::new(&[3.5f32], &Device::Cpu).unwrap());
        let conditioning = Conditioning { txt: to(&txt), pooled: to(&pooled), guidance };
        flux.forward(&to(&img), &Tensor::new(&[0.7f32], &Device::Cpu).unwrap(), &conditioning, &rope)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap()
    };
    let (exact, plain, before) = (run(DType::F32), run(DType::BF16), kernels::launches());
    let fused = kernels::emulated(|| run(DType::BF16));
    assert!(kernels::emulated(|| relative_l2(&run(DType::F32), &exact)) < 1e-5, "the same in f32");
    (relative_l2(&fused, &exact), relative_l2(&plain, &exact), kernels::launches() - before)
}

#[test]
fn a_step_of_the_tiny_model() {
    let source = |dtype| {
        let checkpoint = fixtures::checkpoint("tiny-dev/transformer");
        Source::new(Component::Transformer, &checkpoint, dtype, &Device::Cpu)
    };
    let (fused, plain, launches) = step(&source, 9, 3, 5);
    println!("tiny: {fused:.2e}, plain {plain:.2e}, {launches} launches");
    assert!(fused < 2e-2 && fused < 1.2 * plain, "{fused:e}, plain {plain:e}");
    assert!(launches > 40, "{launches}");
}

#[cfg(feature = "pocket")]
#[test]
fn a_step_of_pocket() {
    let source = |dtype| {
        let checkpoint = models::pocket::bundle().transformer.checkpoint().unwrap();
        Source::new(Component::Transformer, &checkpoint, dtype, &Device::Cpu)
    };
    let (fused, plain, launches) = step(&source, 64, 8, 8);
    println!("pocket: {fused:.2e}, plain {plain:.2e}, {launches} launches");
    assert!(fused < 2e-2 && fused < 1.2 * plain, "{fused:e}, plain {plain:e}");
    assert!(launches > 40, "{launches}");
}

/// Runs `op` in f32, in bf16, and in bf16 with our kernels -> errors of the last two, with ours first, and launches.
fn compare(op: &dyn Fn(DType) -> Tensor) -> (f64, f64, usize) {
    let run = |dtype| op(dtype).to_dtype(DType::F32).unwrap();
    let (exact, plain, before) = (run(DType::F32), run(DType::BF16), kernels::launches());
    let fused = kernels::emulated(|| run(DType::BF16));
    (relative_l2(&fused, &exact), relative_l2(&plain, &exact), kernels::launches() - before)
}

#[test]
fn the_autoencoder_and_t5_of_the_tiny_model() {
    let open = |component, folder: &str, dtype| {
        let checkpoint = fixtures::checkpoint(&format!("tiny-dev/{folder}"));
        (Source::new(component, &checkpoint, dtype, &Device::Cpu), fixtures::json(&format!("tiny-dev/{folder}/config.json")))
    };
    let z = random(&[1, 16, 8, 16]);
    let decode = |dtype| {
        let (source, config) = open(Component::Vae, "vae", dtype);
        Autoencoder::load(&source, Some(&config)).unwrap().decode(&z.to_dtype(dtype).unwrap()).unwrap()
    };
    let ids = Tensor::arange(3u32, 19, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let encode = |dtype| {
        let (source, config) = open(Component::T5, "text_encoder_2", dtype);
        T5Encoder::load(&source, Some(&config)).unwrap().forward(&ids).unwrap()
    };
    for (name, op) in [("decode", &decode as &dyn Fn(DType) -> Tensor), ("T5", &encode)] {
        let (fused, plain, launches) = compare(op);
        println!("{name}: {fused:.2e}, plain {plain:.2e}, {launches} launches");
        assert!(launches > 0 && fused < 1.2 * plain, "{name}: {fused:e}, plain {plain:e}, {launches} launches");
    }
}
