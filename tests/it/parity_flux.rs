//! The transformer against diffusers, module by module on equal inputs, then whole.

use candle_core::{DType, Device, Tensor};
use models::flux::{Conditioning, Config, DoubleBlock, Embedding, Flux, Rope, SingleBlock, sinusoid};
use models::weights::{Component, Source};

use crate::fixtures::{self, Fixture, MODULE, assert_close};

fn tiny() -> (Source, Config, Fixture) {
    let (source, json) = fixtures::component("tiny-dev", "transformer", Component::Transformer);
    let config = Config::read(&source, Some(&json)).unwrap();
    (source, config, Fixture::open("modules/modules.safetensors"))
}

/// The fixture's picture is not square; its last image token says how many rows and columns there are.
fn rope(config: &Config, fixture: &Fixture) -> Rope {
    let ids = fixture.get("flux.in.img_ids").to_vec2::<f32>().unwrap();
    let last = ids.last().unwrap();
    let l_txt = fixture.get("flux.in.txt_ids").dim(0).unwrap();
    Rope::new(config, l_txt, last[1] as usize + 1, last[2] as usize + 1, &Device::Cpu).unwrap()
}

#[test]
fn sizes_come_from_the_weights() {
    let (source, config, _) = tiny();
    let json = fixtures::json("tiny-dev/transformer/config.json");
    assert_eq!(config.heads as u64, json["num_attention_heads"].as_u64().unwrap());
    assert_eq!(config.double_blocks as u64, json["num_layers"].as_u64().unwrap());
    assert_eq!(config.single_blocks as u64, json["num_single_layers"].as_u64().unwrap());
    assert!(config.guidance);
    assert_eq!(Config::read(&source, None).unwrap(), config, "the same without config.json");
}

#[test]
fn time_embedding_and_rotary_tables() {
    let (_, config, fixture) = tiny();
    let time = sinusoid(&fixture.get("time.in.t")).unwrap();
    // One unit in the last place of a frequency, which is how far maths libraries differ, is 6e-5 rad at an angle of 1000.
    assert_close("sinusoid", &time, &fixture.get("time.out.sinusoid"), 6e-5);
    let rope = rope(&config, &fixture);
    // The reference repeats each angle for both members of its pair.
    let once = |key: &str| {
        let table = fixture.get(key);
        let (l, e) = table.dims2().unwrap();
        table.reshape((l, e / 2, 2)).unwrap().narrow(2, 0, 1).unwrap().squeeze(2).unwrap()
    };
    assert_close("cos", &rope.cos, &once("rope.out.cos"), 1e-7);
    assert_close("sin", &rope.sin, &once("rope.out.sin"), 1e-7);
}

#[test]
fn modulation_vector() {
    let (source, config, fixture) = tiny();
    let embedding = Embedding::load(&source, &config).unwrap();
    let (time, guidance, pooled) =
        (fixture.get("flux.in.timestep"), fixture.get("flux.in.guidance"), fixture.get("flux.in.pooled"));
    let vec = embedding.forward(&time, Some(&guidance), &pooled).unwrap();
    assert_close("vec", &vec, &fixture.get("temb.out.temb"), MODULE);
    assert!(embedding.forward(&time, None, &pooled).is_err(), "a distilled model needs guidance");
}

#[test]
fn double_block() {
    let (source, config, fixture) = tiny();
    let block = DoubleBlock::load(&source.at("double_blocks.1"), &config).unwrap();
    let vec = fixture.get("flux.block.in.temb").silu().unwrap();
    let (img, txt) = (fixture.get("flux.double.in.img"), fixture.get("flux.double.in.txt"));
    let [of_img, of_txt] = block.modulation(&vec).unwrap();
    let (img, txt) = block.forward(&img, &txt, [&of_img, &of_txt], &rope(&config, &fixture)).unwrap();
    assert_close("img", &img, &fixture.get("flux.double.out.img"), MODULE);
    assert_close("txt", &txt, &fixture.get("flux.double.out.txt"), MODULE);
}

#[test]
fn single_block() {
    let (source, config, fixture) = tiny();
    let block = SingleBlock::load(&source.at("single_blocks.1"), &config).unwrap();
    let vec = fixture.get("flux.block.in.temb").silu().unwrap();
    let modulation = block.modulation(&vec).unwrap();
    let x = block.forward(&fixture.get("flux.single.in.seq"), &modulation, &rope(&config, &fixture)).unwrap();
    assert_close("x", &x, &fixture.get("flux.single.out.seq"), MODULE);
}

#[test]
fn final_layer() {
    let (source, _, fixture) = tiny();
    let flux = Flux::load(&source, None).unwrap();
    let vec = fixture.get("flux.block.in.temb").silu().unwrap();
    let out = flux.final_layer(&fixture.get("flux.double.in.img"), &vec).unwrap();
    assert_close("final layer", &out, &fixture.get("flux.final.out"), MODULE);
}

fn conditioning(fixture: &Fixture) -> Conditioning {
    Conditioning {
        txt: fixture.get("flux.in.txt"),
        pooled: fixture.get("flux.in.pooled"),
        guidance: Some(fixture.get("flux.in.guidance")),
    }
}

#[test]
fn whole_transformer_dev() {
    let (source, config, fixture) = tiny();
    let flux = Flux::load(&source, None).unwrap();
    let report = source.finish().unwrap();
    assert!(report.complete() && report.applied > 50, "{report}");
    let (img, time) = (fixture.get("flux.in.img"), fixture.get("flux.in.timestep"));
    let out = flux.forward(&img, &time, &conditioning(&fixture), &rope(&config, &fixture)).unwrap();
    assert_close("velocity", &out, &fixture.get("flux.out.img"), MODULE);
}

#[test]
fn whole_transformer_schnell_in_two_shards() {
    let (_, dev, fixture) = tiny();
    let (source, json) = fixtures::component("tiny-schnell", "transformer", Component::Transformer);
    let flux = Flux::load(&source, Some(&json)).unwrap();
    source.finish().unwrap();
    assert!(!flux.config().guidance);
    let (img, time) = (fixture.get("flux.in.img"), fixture.get("flux.in.timestep"));
    let out = flux.forward(&img, &time, &conditioning(&fixture), &rope(&dev, &fixture)).unwrap();
    assert_close("velocity", &out, &fixture.get("flux.schnell.out.img"), MODULE);
}

#[test]
fn a_batch_item_equals_the_item_alone() {
    let (source, config, fixture) = tiny();
    let flux = Flux::load(&source, None).unwrap();
    let rope = rope(&config, &fixture);
    let (img, time, all) = (fixture.get("flux.in.img"), fixture.get("flux.in.timestep"), conditioning(&fixture));
    let batch = flux.forward(&img, &time, &all, &rope).unwrap();
    for i in 0..2 {
        let at = |x: &Tensor| x.narrow(0, i, 1).unwrap();
        let one = Conditioning { txt: at(&all.txt), pooled: at(&all.pooled), guidance: all.guidance.as_ref().map(at) };
        let alone = flux.forward(&at(&img), &at(&time), &one, &rope).unwrap();
        assert_close("item", &alone, &at(&batch), 1e-6);
    }
}

#[test]
fn steps_prepared_together_equal_steps_alone() {
    let (source, config, fixture) = tiny();
    let flux = Flux::load(&source, None).unwrap();
    let rope = rope(&config, &fixture);
    let all = conditioning(&fixture);
    let first = |x: &Tensor| x.narrow(0, 0, 1).unwrap();
    let one = Conditioning { txt: first(&all.txt), pooled: first(&all.pooled), guidance: all.guidance.as_ref().map(first) };
    let times = [1f32, 0.83, 0.4, 0.07];
    let prepared = flux.prepare(&Tensor::new(&times, &Device::Cpu).unwrap(), &one).unwrap();
    let img = first(&fixture.get("flux.in.img"));
    for (i, time) in times.iter().enumerate() {
        let alone = flux.forward(&img, &Tensor::new(&[*time], &Device::Cpu).unwrap(), &one, &rope).unwrap();
        assert_close("step", &flux.step(i, &img, &prepared, &rope).unwrap(), &alone, 1e-6);
    }
    assert!(flux.step(times.len(), &img, &prepared, &rope).is_err(), "there is no such time");
}

#[test]
fn sixteen_bit_weights_stay_near() {
    let (_, config, fixture) = tiny();
    let exact = fixture.get("flux.out.img");
    let files = [fixtures::path("tiny-dev/transformer/diffusion_pytorch_model.safetensors")];
    let checkpoint = models::weights::Checkpoint::open(&files).unwrap();
    for dtype in [DType::BF16, DType::F16] {
        let source = Source::new(Component::Transformer, &checkpoint, dtype, &Device::Cpu);
        let flux = Flux::load(&source, None).unwrap();
        let as_dtype = |x: Tensor| x.to_dtype(dtype).unwrap();
        let all = conditioning(&fixture);
        let conditioning = Conditioning { txt: as_dtype(all.txt), pooled: as_dtype(all.pooled), guidance: all.guidance };
        let img = as_dtype(fixture.get("flux.in.img"));
        let out = flux.forward(&img, &fixture.get("flux.in.timestep"), &conditioning, &rope(&config, &fixture)).unwrap();
        assert_eq!(out.dtype(), dtype);
        let error = fixtures::relative_l2(&out.to_dtype(DType::F32).unwrap(), &exact);
        assert!(error < 0.03, "{dtype:?}: {error}");
    }
}
