//! One stored key on its independent axes: prefix, module, and what the tensor is for the module.

use super::modules::{self, Module, Naming};

/// What a tensor is for its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Role {
    Down,
    Up,
    UpBias,
    Mid,
    Alpha,
    /// Multiplies the delta directly, before alpha (stable-diffusion.cpp).
    Multiplier,
    Magnitude,
    KroneckerLeft,
    KroneckerLeftUp,
    KroneckerLeftDown,
    KroneckerRight,
    KroneckerRightUp,
    KroneckerRightDown,
    HadamardFirstUp,
    HadamardFirstDown,
    HadamardSecondUp,
    HadamardSecondDown,
    /// Only convolutions have these.
    Tucker,
    Diff,
    DiffBias,
    SetWeight,
    SetBias,
    /// An algorithm that is recognised and not done.
    Unsupported(&'static str),
}

/// Suffixes with what they say, longest first where one ends another.
const SUFFIXES: &[(&str, Role)] = &[
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora_mid.weight", Role::Mid),
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_B.bias", Role::UpBias),
    (".lora_down", Role::Down),
    (".lora_up", Role::Up),
    (".lora_A", Role::Down),
    (".lora_B", Role::Up),
    (".down.weight", Role::Down),
    (".up.weight", Role::Up),
    (".alpha", Role::Alpha),
    (".dora_scale", Role::Magnitude),
    (".lora_magnitude_vector.weight", Role::Magnitude),
    (".lora_magnitude_vector", Role::Magnitude),
    (".magnitude", Role::Magnitude),
    (".lokr_w1_a", Role::KroneckerLeftUp),
    (".lokr_w1_b", Role::KroneckerLeftDown),
    (".lokr_w1", Role::KroneckerLeft),
    (".lokr_w2_a", Role::KroneckerRightUp),
    (".lokr_w2_b", Role::KroneckerRightDown),
    (".lokr_w2", Role::KroneckerRight),
    (".lokr_t1", Role::Tucker),
    (".lokr_t2", Role::Tucker),
    (".hada_w1_a", Role::HadamardFirstUp),
    (".hada_w1_b", Role::HadamardFirstDown),
    (".hada_w2_a", Role::HadamardSecondUp),
    (".hada_w2_b", Role::HadamardSecondDown),
    (".hada_t1", Role::Tucker),
    (".hada_t2", Role::Tucker),
    (".diff_b", Role::DiffBias),
    // ComfyUI calls a norm's change by the whole name of the tensor.
    (".scale.diff", Role::Diff),
    (".scale.set_weight", Role::SetWeight),
    (".diff", Role::Diff),
    (".w_norm", Role::Diff),
    (".b_norm", Role::DiffBias),
    (".set_weight", Role::SetWeight),
    (".a1.weight", Role::Unsupported("GLoRA")),
    (".a2.weight", Role::Unsupported("GLoRA")),
    (".b1.weight", Role::Unsupported("GLoRA")),
    (".b2.weight", Role::Unsupported("GLoRA")),
    (".bm.weight", Role::Unsupported("GLoRA")),
    (".oft_blocks", Role::Unsupported("OFT")),
    (".oft_R.weight", Role::Unsupported("OFT")),
    (".oft_R.scaled_oft", Role::Unsupported("OFT")),
    (".rescale", Role::Unsupported("OFT")),
    (".boft_R", Role::Unsupported("BOFT")),
    (".boft_s", Role::Unsupported("BOFT")),
    (".ia3_l", Role::Unsupported("IA3")),
    (".on_input", Role::Unsupported("IA3")),
    (".reshape_weight", Role::Unsupported("control LoRA (widened layers)")),
    (".bias_indices", Role::Unsupported("sparse bias")),
    (".bias_values", Role::Unsupported("sparse bias")),
    (".bias_size", Role::Unsupported("sparse bias")),
];

/// Prefixes, flattened. They may be stacked. Text encoders' come first: their names begin like the others'.
const PREFIXES: &[&str] = &[
    "text_encoders_clip_l_transformer_",
    "text_encoders_t5xxl_transformer_",
    "text_encoders_clip_l_",
    "text_encoders_t5xxl_",
    "text_encoder_2_",
    "text_encoder_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "lora_te_",
    "base_model_model_",
    "model_diffusion_model_",
    "diffusion_model_",
    "lora_unet_",
    "oft_unet_",
    "lora_transformer_",
    "lycoris_",
    "transformer_",
    "unet_",
];

/// Bookkeeping that some trainers store and nobody applies.
const IGNORED: &[&str] = &["_aux.", "bundle_emb.", "lora_te1_logit_scale", "lora_te1_text_projection"];

/// A key taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    /// As stored, one after the other; empty if there is none.
    pub(super) prefix: String,
    /// The module as it is called, flattened and without prefix.
    pub(super) body: String,
    pub(super) module: Module,
    pub(super) naming: Naming,
    pub(super) role: Role,
    /// Module and prefix are written with dots.
    pub(super) dotted: bool,
}

/// What a key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Parsed {
    Known(Key),
    Ignored,
    Unknown,
}

/// The module of FLUX.1 that a stored key belongs to, under any of the published namings.
#[must_use]
pub fn module_of(key: &str) -> Option<Module> {
    match parse(key) {
        Parsed::Known(found) => Some(found.module),
        Parsed::Ignored | Parsed::Unknown => None,
    }
}

/// Takes a key apart.
pub(super) fn parse(key: &str) -> Parsed {
    if key.contains("._aux.") || IGNORED.iter().any(|ignored| key.starts_with(ignored)) {
        return Parsed::Ignored;
    }
    let Some((stem, role)) = split_role(key) else { return Parsed::Unknown };
    let flattened = modules::flatten(stem);
    let Some((stripped, body, (module, naming))) = find(flattened.trim_end_matches('_')) else { return Parsed::Unknown };
    let prefix = stem[..stripped].to_string();
    if prefix.contains("lora_te2") && module.component == crate::weights::Component::Clip {
        return Parsed::Unknown;
    }
    let dotted = stem.contains('.');
    Parsed::Known(Key { prefix, body: body.into(), module: module.clone(), naming: *naming, role, dotted })
}

/// The length of the prefixes of a flattened name, the rest of it, and the module that this is.
fn find(flattened: &str) -> Option<(usize, &str, &'static (Module, Naming))> {
    let mut body = flattened;
    loop {
        // Before each prefix: `transformer_` is also how the module `transformer_blocks_0_...` begins.
        if let Some(found) = modules::find(body) {
            return Some((flattened.len() - body.len(), body, found));
        }
        body = PREFIXES.iter().find_map(|prefix| body.strip_prefix(*prefix))?;
    }
}

/// The whole weight or bias of a module of FLUX.1, which is what PEFT stores for its `modules_to_save`.
pub(super) fn is_whole(key: &str) -> bool {
    let stem = key.strip_suffix(".weight").or_else(|| key.strip_suffix(".bias"));
    let module = |stem: &str| stem.split(".modules_to_save").next().is_some_and(|stem| find(&modules::flatten(stem)).is_some());
    stem.is_some_and(module)
}

/// The module's name with its prefix, and what the tensor is for it.
pub(super) fn split_role(key: &str) -> Option<(&str, Role)> {
    for (suffix, role) in SUFFIXES {
        if let Some(stem) = key.strip_suffix(suffix) {
            // XLabs' modules themselves end in `_lora`.
            let stem = if suffix.starts_with('_') && stem.contains(".processor.") { &key[..stem.len() + 5] } else { stem };
            return Some((stem, *role));
        }
    }
    // PEFT with the adapter's name in the middle: `.lora_A.default.weight`. OFT of sd-scripts numbers the parts of a fused module.
    const MIDDLES: [(&str, Role); 4] = [
        (".lora_A.", Role::Down),
        (".lora_B.", Role::Up),
        (".lora_magnitude_vector.", Role::Magnitude),
        (".oft_blocks.", Role::Unsupported("OFT")),
    ];
    for (middle, role) in MIDDLES {
        if let Some((stem, name)) = key.split_once(middle) {
            let name = name.strip_suffix(".weight").unwrap_or(name);
            return (!name.contains('.')).then_some((stem, role));
        }
    }
    // A norm's scale itself takes the place of the base's.
    for (end, keep) in [("_norm.scale", 6), ("norm_q.weight", 7), ("norm_k.weight", 7)] {
        if key.ends_with(end) {
            return Some((&key[..key.len() - keep], Role::SetWeight));
        }
    }
    key.strip_suffix(".scale").map(|stem| (stem, Role::Multiplier))
}

#[cfg(test)]
mod tests {
    use super::super::modules::Place;
    use super::*;
    use crate::weights::Component;

    fn known(key: &str) -> Key {
        match parse(key) {
            Parsed::Known(key) => key,
            other => panic!("{key}: {other:?}"),
        }
    }

    #[test]
    fn keys_of_every_writer() {
        let cases = [
            (
                "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
                "lora_unet_",
                "double_blocks.0.img_attn.qkv",
                Place::Whole,
                Role::Down,
            ),
            (
                "lora_unet_single_blocks_0_modulation_lin.alpha",
                "lora_unet_",
                "single_blocks.0.modulation.lin",
                Place::Whole,
                Role::Alpha,
            ),
            (
                "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight",
                "transformer.",
                "double_blocks.0.txt_attn.qkv",
                Place::Query,
                Role::Down,
            ),
            (
                "transformer.single_transformer_blocks.7.proj_out.alpha",
                "transformer.",
                "single_blocks.7.linear2",
                Place::Whole,
                Role::Alpha,
            ),
            (
                "transformer.single_transformer_blocks.0.attn.to_q.lora.down.weight",
                "transformer.",
                "single_blocks.0.linear1",
                Place::Query,
                Role::Down,
            ),
            (
                "transformer.single_transformer_blocks.0.attn.to_q_lora.up.weight",
                "transformer.",
                "single_blocks.0.linear1",
                Place::Query,
                Role::Up,
            ),
            (
                "base_model.model.transformer_blocks.0.ff_context.net.0.proj.lora_A.weight",
                "base_model.model.",
                "double_blocks.0.txt_mlp.0",
                Place::Whole,
                Role::Down,
            ),
            ("base_model.model.proj_out.lora_A.weight", "base_model.model.", "final_layer.linear", Place::Whole, Role::Down),
            (
                "transformer.base_model.model.single_transformer_blocks.0.attn.to_k.lora_A.weight",
                "transformer.base_model.model.",
                "single_blocks.0.linear1",
                Place::Key,
                Role::Down,
            ),
            (
                "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
                "diffusion_model.",
                "double_blocks.0.img_attn.qkv",
                Place::Whole,
                Role::Down,
            ),
            (
                "diffusion_model.single_blocks.3.linear1_qkv.lora_up.weight",
                "diffusion_model.",
                "single_blocks.3.linear1",
                Place::Qkv,
                Role::Up,
            ),
            (
                "diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight",
                "diffusion_model.",
                "double_blocks.0.img_attn.qkv",
                Place::Query,
                Role::Down,
            ),
            (
                "lora_transformer_transformer_blocks_14_attn_to_out_0.lora_up.weight",
                "lora_transformer_",
                "double_blocks.14.img_attn.proj",
                Place::Whole,
                Role::Up,
            ),
            (
                "transformer.single_blocks.0.linear1.3.lora_up.weight",
                "transformer.",
                "single_blocks.0.linear1",
                Place::Mlp,
                Role::Up,
            ),
            ("double_blocks.0.processor.qkv_lora1.down.weight", "", "double_blocks.0.img_attn.qkv", Place::Whole, Role::Down),
            ("single_blocks.0.processor.qkv_lora.up.weight", "", "single_blocks.0.linear1", Place::Qkv, Role::Up),
            (
                "diffusion_model.single_blocks.0.processor.proj_lora.down.weight",
                "diffusion_model.",
                "single_blocks.0.linear2",
                Place::Whole,
                Role::Down,
            ),
            (
                "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
                "lycoris_",
                "double_blocks.0.img_attn.qkv",
                Place::Query,
                Role::KroneckerLeft,
            ),
            (
                "lora_unet_single_transformer_blocks_0_attn_to_k_.lora_down.weight",
                "lora_unet_",
                "single_blocks.0.linear1",
                Place::Key,
                Role::Down,
            ),
            (
                "lora_unet_norm_out_linear_.lora_up.weight",
                "lora_unet_",
                "final_layer.adaLN_modulation.1",
                Place::SwappedHalves,
                Role::Up,
            ),
            ("diffusion_model.img_in.diff_b", "diffusion_model.", "img_in", Place::Whole, Role::DiffBias),
            (
                "diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight",
                "diffusion_model.",
                "double_blocks.0.img_attn.qkv",
                Place::Whole,
                Role::Down,
            ),
            (
                "transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight",
                "transformer.",
                "double_blocks.0.img_attn.qkv",
                Place::Query,
                Role::Down,
            ),
            (
                "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector",
                "transformer.",
                "double_blocks.0.img_attn.qkv",
                Place::Query,
                Role::Magnitude,
            ),
            (
                "double_blocks.0.img_attn.norm.key_norm.scale",
                "",
                "double_blocks.0.img_attn.norm.key_norm",
                Place::Whole,
                Role::SetWeight,
            ),
        ];
        for (key, prefix, name, place, role) in cases {
            let found = known(key);
            assert_eq!(
                (found.prefix.as_str(), found.module.name.as_str(), found.module.place, found.role),
                (prefix, name, place, role),
                "{key}"
            );
            assert_eq!(found.module.component, Component::Transformer);
        }
    }

    #[test]
    fn keys_of_the_text_encoders() {
        for key in [
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_down.weight",
            "lora_te1.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        ] {
            let found = known(key);
            assert_eq!(
                (found.module.component, found.module.name.as_str()),
                (Component::Clip, "encoder.layers.0.mlp.fc1"),
                "{key}"
            );
        }
        for key in [
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
            "lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_up.weight",
        ] {
            let found = known(key);
            assert_eq!(
                (found.module.component, found.module.name.as_str()),
                (Component::T5, "encoder.block.0.layer.0.SelfAttention.q"),
                "{key}"
            );
        }
        // SDXL's second encoder.
        assert_eq!(parse("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"), Parsed::Unknown);
    }

    #[test]
    fn what_is_no_adapter_of_flux() {
        for key in [
            "",
            ".",
            "lora_unet_",
            "x.lora_A.weight",
            "lora_unet_down_blocks_0_attentions_0.lora_down.weight",
            "img_in.weight",
            "é.lora_A.a.b.weight",
        ] {
            assert_eq!(parse(key), Parsed::Unknown, "{key}");
        }
        assert_eq!(parse("_aux.slider"), Parsed::Ignored);
        assert_eq!(parse("bundle_emb.me.clip_l"), Parsed::Ignored);
        for (key, whole) in [
            ("base_model.model.proj_out.weight", true),
            ("base_model.model.proj_out.modules_to_save.default.bias", true),
            ("base_model.model.proj_in.weight", false),
            ("transformer.proj_out.lora_A.weight", false),
        ] {
            assert_eq!(is_whole(key), whole, "{key}");
        }
    }

    #[test]
    fn no_key_makes_the_parser_fail() {
        let pieces = [
            "lora_unet_",
            "transformer.",
            "_",
            ".",
            "double_blocks",
            "0",
            "é",
            "_lora.up.weight",
            ".processor.",
            ".lora_A.",
            "img_attn",
            ".weight",
            "norm_q.weight",
            ".scale",
        ];
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..20_000 {
            let mut key = String::new();
            for _ in 0..random.usize(..16) {
                key += pieces[random.usize(..pieces.len())];
            }
            parse(&key);
        }
    }
}
