//! Names of the text encoders: transformers' own, with or without their prefix, and llama.cpp's for T5.

use super::Target;

const T5_BLOCK: &[(&str, &str)] = &[
    ("attn_q", "layer.0.SelfAttention.q"),
    ("attn_k", "layer.0.SelfAttention.k"),
    ("attn_v", "layer.0.SelfAttention.v"),
    ("attn_o", "layer.0.SelfAttention.o"),
    ("attn_rel_b", "layer.0.SelfAttention.relative_attention_bias"),
    ("attn_norm", "layer.0.layer_norm"),
    ("ffn_gate", "layer.1.DenseReluDense.wi_0"),
    ("ffn_up", "layer.1.DenseReluDense.wi_1"),
    ("ffn_down", "layer.1.DenseReluDense.wo"),
    ("ffn_norm", "layer.1.layer_norm"),
];

pub(super) fn t5(key: &str) -> Target {
    match key {
        "token_embd.weight" => return Target::whole("shared.weight"),
        "enc.output_norm.weight" => return Target::whole("encoder.final_layer_norm.weight"),
        _ => {}
    }
    let block = key.strip_prefix("enc.blk.").and_then(|rest| rest.split_once('.'));
    let Some((i, (module, suffix))) = block.and_then(|(i, rest)| Some((i, rest.rsplit_once('.')?))) else {
        return Target::whole(key);
    };
    match T5_BLOCK.iter().find(|(from, _)| *from == module) {
        Some((_, name)) => Target::whole(format!("encoder.block.{i}.{name}.{suffix}")),
        None => Target::whole(key),
    }
}

pub(super) fn clip(key: &str) -> Target {
    Target::whole(key.strip_prefix("text_model.").unwrap_or(key))
}
