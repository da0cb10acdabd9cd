//! T5, CLIP and the autoencoder against transformers and diffusers, in f32 on tiny random weights.

use models::clip::ClipText;
use models::t5::T5Encoder;
use models::weights::Component;

use crate::fixtures::{Tensors, assert_same, component};

const MODULES: &str = "modules/modules.safetensors";

#[test]
fn t5_equals_transformers() {
    let (source, config) = component(Component::T5, "tiny-dev/text_encoder_2");
    let model = T5Encoder::load(&source, Some(&config)).unwrap();
    source.finish().unwrap();
    let expected = Tensors::open(MODULES);
    let hidden = model.forward(&expected.get("t5.in.ids")).unwrap();
    assert_same("t5.out.hidden", &hidden, &expected.get("t5.out.hidden"));
}

#[test]
fn clip_equals_transformers() {
    let (source, config) = component(Component::Clip, "tiny-dev/text_encoder");
    let model = ClipText::load(&source, Some(&config)).unwrap();
    source.finish().unwrap();
    let expected = Tensors::open(MODULES);
    let encoded = model.forward(&expected.get("clip.in.ids")).unwrap();
    assert_same("clip.out.hidden", &encoded.hidden, &expected.get("clip.out.hidden"));
    assert_same("clip.out.pooled", &encoded.pooled, &expected.get("clip.out.pooled"));
}
