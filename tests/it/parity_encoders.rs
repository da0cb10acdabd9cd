//! T5, CLIP and the autoencoder against transformers and diffusers, in f32 on tiny random weights.

use candle_core::{Device, Tensor};
use models::clip::ClipText;
use models::t5::T5Encoder;
use models::vae::Autoencoder;
use models::weights::Component;

use crate::fixtures::{Fixture, MODULE, assert_close, component};

const MODULES: &str = "modules/modules.safetensors";

#[test]
fn t5_equals_transformers() {
    let (source, config) = component("tiny-dev", "text_encoder_2", Component::T5);
    let model = T5Encoder::load(&source, Some(&config)).unwrap();
    source.finish().unwrap();
    let fixture = Fixture::open(MODULES);
    let hidden = model.forward(&fixture.ids("t5.in.ids")).unwrap();
    assert_close("t5.out.hidden", &hidden, &fixture.get("t5.out.hidden"), MODULE);
}

#[test]
fn clip_equals_transformers() {
    let (source, config) = component("tiny-dev", "text_encoder", Component::Clip);
    let model = ClipText::load(&source, Some(&config)).unwrap();
    source.finish().unwrap();
    let fixture = Fixture::open(MODULES);
    let (hidden, pooled) = model.forward(&fixture.ids("clip.in.ids")).unwrap();
    assert_close("clip.out.hidden", &hidden, &fixture.get("clip.out.hidden"), MODULE);
    assert_close("clip.out.pooled", &pooled, &fixture.get("clip.out.pooled"), MODULE);
}

#[test]
fn the_autoencoder_equals_diffusers_both_ways() {
    let (source, config) = component("tiny-dev", "vae", Component::Vae);
    let model = Autoencoder::load(&source, Some(&config)).unwrap();
    source.finish().unwrap();
    let fixture = Fixture::open(MODULES);
    let posterior = model.encode(&fixture.get("vae.encode.in.image")).unwrap();
    assert_close("vae.encode.out.mean", &posterior.mean, &fixture.get("vae.encode.out.mean"), MODULE);
    assert_close("vae.encode.out.std", &posterior.std, &fixture.get("vae.encode.out.std"), MODULE);
    let latents = model.to_latents(&posterior.mean).unwrap();
    assert_close("vae.scaled.latent", &latents, &fixture.get("vae.scaled.latent"), MODULE);
    assert_close("from_latents", &model.from_latents(&latents).unwrap(), &posterior.mean, MODULE);
    let picture = model.decode(&fixture.get("vae.decode.in.latent")).unwrap();
    assert_close("vae.decode.out.image", &picture, &fixture.get("vae.decode.out.image"), MODULE);
}

/// Tiles are decoded with the norm statistics and the attention of one tile, so they cannot equal the whole; where they meet
/// there must be no edge.
#[test]
fn tiles_are_close_to_the_whole_and_meet_without_a_seam() {
    let (source, config) = component("tiny-dev", "vae", Component::Vae);
    let model = Autoencoder::load(&source, Some(&config)).unwrap();
    let z = Tensor::randn(0f32, 1.0, (1, 16, 56, 80), &Device::Cpu).unwrap();
    let whole = model.decode(&z).unwrap();
    assert!(model.decode_bytes(1, 56, 80, 4) > model.decode_bytes(1, 32, 32, 4));

    let enough = model.decode_within(&z, Some(model.decode_bytes(1, 56, 80, 4))).unwrap();
    assert_close("a picture that fits is decoded whole", &enough, &whole, 0.);
    let tiled = model.decode_within(&z, Some(model.decode_bytes(1, 40, 40, 4))).unwrap();
    assert_eq!(tiled.dims(), whole.dims());
    let apart = (&tiled - &whole).unwrap();
    let mean = |x: &Tensor| x.abs().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(mean(&apart) > 0., "it was tiled");
    assert!(mean(&apart) < 0.1 * mean(&whole), "{} of {}", mean(&apart), mean(&whole));

    // The step from one column to the next of what tiling changed: nowhere much above its average, as it would be at a seam.
    let step = (apart.narrow(3, 1, 639).unwrap() - apart.narrow(3, 0, 639).unwrap()).unwrap().abs().unwrap();
    let steps = step.mean((0, 1, 2)).unwrap().to_vec1::<f32>().unwrap();
    let average = steps.iter().sum::<f32>() / steps.len() as f32;
    assert!(steps.iter().all(|step| *step < 6. * average), "{:?} over {average}", steps.iter().copied().fold(0., f32::max));
}

#[test]
fn tiles_of_a_picture_give_nearly_the_same_latents() {
    let (source, config) = component("tiny-dev", "vae", Component::Vae);
    let model = Autoencoder::load(&source, Some(&config)).unwrap();
    let x = Tensor::rand(-1f32, 1., (1, 3, 448, 640), &Device::Cpu).unwrap();
    let whole = model.encode(&x).unwrap().mean;
    let tiled = model.encode_within(&x, Some(0)).unwrap().mean;
    let mean = |x: &Tensor| x.abs().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    let apart = mean(&(&tiled - &whole).unwrap());
    assert!(apart > 0. && apart < 0.1 * mean(&whole), "{apart} of {}", mean(&whole));
}

#[test]
fn a_configuration_that_contradicts_the_weights_is_an_error() {
    for (name, folder, part, wrong) in [
        (Component::T5, "text_encoder_2", "d_model", serde_json::json!(64)),
        (Component::Clip, "text_encoder", "hidden_size", serde_json::json!(64)),
        (Component::Vae, "vae", "block_out_channels", serde_json::json!([4, 8, 12, 32])),
    ] {
        let (source, mut config) = component("tiny-dev", folder, name);
        config[part] = wrong;
        let error = match name {
            Component::T5 => T5Encoder::load(&source, Some(&config)).map(drop),
            Component::Clip => ClipText::load(&source, Some(&config)).map(drop),
            _ => Autoencoder::load(&source, Some(&config)).map(drop),
        };
        assert!(error.unwrap_err().to_string().contains(part), "{name}");
    }
}
