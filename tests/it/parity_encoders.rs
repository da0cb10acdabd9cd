//! T5, CLIP and the autoencoder against transformers and diffusers, in f32 on tiny random weights.

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
