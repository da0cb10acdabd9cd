//! T5, CLIP and the autoencoder against transformers and diffusers, in f32 on tiny random weights.

use models::clip::ClipText;
use models::t5::T5Encoder;
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
