//! diffusers names to BFL names for the FLUX.1 transformer.

use super::Target;

/// diffusers module inside `transformer_blocks.i.` → BFL module inside `double_blocks.i.`, place among the parts.
const DOUBLE: &[(&str, &str, usize)] = &[
    ("attn.to_q", "img_attn.qkv", 0),
    ("attn.to_k", "img_attn.qkv", 1),
    ("attn.to_v", "img_attn.qkv", 2),
    ("attn.to_out.0", "img_attn.proj", 0),
    ("attn.add_q_proj", "txt_attn.qkv", 0),
    ("attn.add_k_proj", "txt_attn.qkv", 1),
    ("attn.add_v_proj", "txt_attn.qkv", 2),
    ("attn.to_add_out", "txt_attn.proj", 0),
    ("norm1.linear", "img_mod.lin", 0),
    ("norm1_context.linear", "txt_mod.lin", 0),
    ("ff.net.0.proj", "img_mlp.0", 0),
    ("ff.net.2", "img_mlp.2", 0),
    ("ff_context.net.0.proj", "txt_mlp.0", 0),
    ("ff_context.net.2", "txt_mlp.2", 0),
    ("attn.norm_q", "img_attn.norm.query_norm", 0),
    ("attn.norm_k", "img_attn.norm.key_norm", 0),
    ("attn.norm_added_q", "txt_attn.norm.query_norm", 0),
    ("attn.norm_added_k", "txt_attn.norm.key_norm", 0),
];

/// The same for `single_transformer_blocks.i.` → `single_blocks.i.`.
const SINGLE: &[(&str, &str, usize)] = &[
    ("attn.to_q", "linear1", 0),
    ("attn.to_k", "linear1", 1),
    ("attn.to_v", "linear1", 2),
    ("proj_mlp", "linear1", 3),
    ("proj_out", "linear2", 0),
    ("norm.linear", "modulation.lin", 0),
    ("attn.norm_q", "norm.query_norm", 0),
    ("attn.norm_k", "norm.key_norm", 0),
];

const OUTSIDE: &[(&str, &str)] = &[
    ("x_embedder", "img_in"),
    ("context_embedder", "txt_in"),
    ("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
    ("norm_out.linear", "final_layer.adaLN_modulation.1"),
    ("proj_out", "final_layer.linear"),
];

/// One module under both namings.
pub(crate) struct Module {
    pub(crate) diffusers: String,
    pub(crate) bfl: String,
    /// Place of the diffusers module among the parts of BFL's.
    pub(crate) place: usize,
    pub(crate) swap_halves: bool,
}

/// Every module of a transformer of so many blocks that has weights.
pub(crate) fn modules(double: usize, single: usize) -> Vec<Module> {
    let block = |table: &'static [(&str, &str, usize)], theirs: &'static str, ours: &'static str, count: usize| {
        (0..count).flat_map(move |i| {
            table.iter().map(move |(from, to, place)| Module {
                diffusers: format!("{theirs}{i}.{from}"),
                bfl: format!("{ours}{i}.{to}"),
                place: *place,
                swap_halves: false,
            })
        })
    };
    let outside = OUTSIDE.iter().map(|(from, to)| Module {
        diffusers: (*from).into(),
        bfl: (*to).into(),
        place: 0,
        swap_halves: *from == SWAPPED,
    });
    block(DOUBLE, "transformer_blocks.", "double_blocks.", double)
        .chain(block(SINGLE, "single_transformer_blocks.", "single_blocks.", single))
        .chain(outside)
        .collect()
}

/// diffusers orders the final modulation (scale, shift), BFL (shift, scale).
const SWAPPED: &str = "norm_out.linear";

pub(super) fn target(key: &str) -> Target {
    let Some((module, suffix)) = key.rsplit_once('.') else { return Target::whole(key) };
    // RMS norms are called `scale` by BFL and `weight` by diffusers.
    let suffixed = |name: String| {
        let norm = name.ends_with("_norm");
        format!("{name}.{}", if norm && suffix == "weight" { "scale" } else { suffix })
    };
    for (theirs, ours, table) in
        [("transformer_blocks.", "double_blocks.", DOUBLE), ("single_transformer_blocks.", "single_blocks.", SINGLE)]
    {
        let Some((i, inner)) = module.strip_prefix(theirs).and_then(|rest| rest.split_once('.')) else { continue };
        if let Some((_, name, place)) = table.iter().find(|(from, ..)| *from == inner) {
            return Target { name: suffixed(format!("{ours}{i}.{name}")), place: *place, swap_halves: false };
        }
    }
    match OUTSIDE.iter().find(|(from, _)| *from == module) {
        Some((from, name)) => Target { name: suffixed((*name).into()), place: 0, swap_halves: *from == SWAPPED },
        None => Target::whole(suffixed(module.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_namings_meet() {
        let name = |key: &str| target(key).name;
        assert_eq!(name("transformer_blocks.3.attn.to_k.weight"), "double_blocks.3.img_attn.qkv.weight");
        assert_eq!(target("transformer_blocks.3.attn.to_k.weight").place, 1);
        assert_eq!(name("transformer_blocks.3.attn.norm_k.weight"), "double_blocks.3.img_attn.norm.key_norm.scale");
        assert_eq!(name("double_blocks.3.img_attn.norm.key_norm.scale"), "double_blocks.3.img_attn.norm.key_norm.scale");
        assert_eq!(name("single_transformer_blocks.9.proj_out.bias"), "single_blocks.9.linear2.bias");
        assert_eq!(name("proj_out.bias"), "final_layer.linear.bias");
        assert!(target("norm_out.linear.weight").swap_halves);
        assert!(!target("final_layer.adaLN_modulation.1.weight").swap_halves);
    }
}
