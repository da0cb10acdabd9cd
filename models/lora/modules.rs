//! Every module that a FLUX.1 adapter can name, under every naming, in one table of flattened names.
//!
//! Dotted, flattened and half flattened names become equal when every `.` is read as `_`, and no two modules collide.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::LazyLock;

use serde::Serialize;

use crate::weights::Component;
use crate::weights::names::transformer;

/// Blocks of FLUX.1, and layers of CLIP-L and T5-XXL. Smaller models have fewer; an adapter is held against its base later.
pub(super) const DOUBLE_BLOCKS: usize = 19;
pub(super) const SINGLE_BLOCKS: usize = 38;
/// FLUX.1's hidden width.
pub(super) const WIDTH: usize = 3072;
const CLIP_LAYERS: usize = 12;
const T5_LAYERS: usize = 24;

/// Which rows of a canonical tensor a module is: diffusers keeps apart what BFL fuses. In multiples of the hidden width, which
/// is the input width of the fused matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    Whole,
    Query,
    Key,
    Value,
    /// Query, key and value of a single block's `linear1`.
    Qkv,
    /// What follows query, key and value in a single block's `linear1`.
    Mlp,
    /// All rows, with the halves in the other order.
    SwappedHalves,
}

impl Place {
    /// The rows among `output`, for a hidden width of `d`.
    #[must_use]
    pub fn rows(self, output: usize, d: usize) -> Range<usize> {
        match self {
            Self::Whole | Self::SwappedHalves => 0..output,
            Self::Query => 0..d,
            Self::Key => d..2 * d,
            Self::Value => 2 * d..3 * d,
            Self::Qkv => 0..3 * d,
            Self::Mlp => 3 * d..output,
        }
    }

    /// Of a diffusers module in BFL's.
    pub(super) fn of(module: &transformer::Module) -> Self {
        match (is_fused(&module.bfl), module.swap_halves) {
            (true, _) => [Self::Query, Self::Key, Self::Value, Self::Mlp][module.place],
            (false, true) => Self::SwappedHalves,
            (false, false) => Self::Whole,
        }
    }
}

/// Whose names a module was found under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Naming {
    Bfl,
    Diffusers,
    Xlabs,
    Transformers,
}

/// A module of the model: `name` is canonical, without `weight` or `bias`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Module {
    pub component: Component,
    pub name: String,
    pub place: Place,
}

impl Module {
    /// Norms have one vector and are no matrices.
    #[must_use]
    pub fn is_norm(&self) -> bool {
        self.name.ends_with("_norm") || self.name.contains("layer_norm")
    }

    /// The canonical tensor that holds the module's weight.
    #[must_use]
    pub fn weight(&self) -> String {
        let scale = self.component == Component::Transformer && self.is_norm();
        format!("{}.{}", self.name, if scale { "scale" } else { "weight" })
    }

    #[must_use]
    pub fn bias(&self) -> String {
        format!("{}.bias", self.name)
    }
}

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Place::Whole | Place::SwappedHalves => f.write_str(&self.name),
            place => write!(f, "{} ({place:?})", self.name),
        }
    }
}

/// The module of a flattened name without prefix.
pub(super) fn find(flattened: &str) -> Option<&'static (Module, Naming)> {
    static TABLE: LazyLock<HashMap<String, (Module, Naming)>> = LazyLock::new(table);
    TABLE.get(flattened)
}

/// Whether diffusers has several modules where BFL has this one.
fn is_fused(bfl: &str) -> bool {
    bfl.ends_with("_attn.qkv") || bfl.ends_with(".linear1")
}

/// Every `.` as `_`.
pub(super) fn flatten(name: &str) -> String {
    name.replace('.', "_")
}

fn table() -> HashMap<String, (Module, Naming)> {
    let mut table = HashMap::new();
    let mut add = |name: &str, component, canonical: &str, place, naming| {
        let module = Module { component, name: canonical.into(), place };
        let before = table.insert(flatten(name), (module.clone(), naming));
        debug_assert!(before.is_none_or(|(other, _)| other == module), "two modules are called {name}");
    };
    for module in transformer::modules(DOUBLE_BLOCKS, SINGLE_BLOCKS) {
        let bfl = module.bfl.as_str();
        let (fused, place) = (is_fused(bfl), Place::of(&module));
        add(&module.diffusers, Component::Transformer, bfl, place, Naming::Diffusers);
        add(bfl, Component::Transformer, bfl, Place::Whole, Naming::Bfl);
        if fused {
            // OneTrainer numbers the parts of a fused matrix.
            add(&format!("{bfl}.{}", module.place), Component::Transformer, bfl, place, Naming::Bfl);
        }
        if bfl.ends_with(".linear1") {
            // ComfyUI's name for the upper part.
            add(&format!("{bfl}_qkv"), Component::Transformer, bfl, Place::Qkv, Naming::Bfl);
        }
    }
    for i in 0..DOUBLE_BLOCKS {
        for (number, stream) in [(1, "img"), (2, "txt")] {
            for part in ["qkv", "proj"] {
                let (xlabs, bfl) = (
                    format!("double_blocks.{i}.processor.{part}_lora{number}"),
                    format!("double_blocks.{i}.{stream}_attn.{part}"),
                );
                add(&xlabs, Component::Transformer, &bfl, Place::Whole, Naming::Xlabs);
            }
        }
    }
    for i in 0..SINGLE_BLOCKS {
        let xlabs = |part: &str| format!("single_blocks.{i}.processor.{part}_lora");
        add(&xlabs("qkv"), Component::Transformer, &format!("single_blocks.{i}.linear1"), Place::Qkv, Naming::Xlabs);
        add(&xlabs("proj"), Component::Transformer, &format!("single_blocks.{i}.linear2"), Place::Whole, Naming::Xlabs);
    }
    let clip_layers = (0..CLIP_LAYERS).flat_map(|i| {
        const PARTS: [&str; 8] = [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
            "layer_norm1",
            "layer_norm2",
        ];
        PARTS.map(|part| format!("encoder.layers.{i}.{part}"))
    });
    for name in clip_layers.chain(["final_layer_norm".into()]) {
        add(&format!("text_model.{name}"), Component::Clip, &name, Place::Whole, Naming::Transformers);
        if name.starts_with("encoder") {
            add(&name, Component::Clip, &name, Place::Whole, Naming::Transformers);
        }
    }
    for i in 0..T5_LAYERS {
        const PARTS: [&str; 9] = [
            "0.SelfAttention.q",
            "0.SelfAttention.k",
            "0.SelfAttention.v",
            "0.SelfAttention.o",
            "0.layer_norm",
            "1.DenseReluDense.wi_0",
            "1.DenseReluDense.wi_1",
            "1.DenseReluDense.wo",
            "1.layer_norm",
        ];
        for part in PARTS {
            let name = format!("encoder.block.{i}.layer.{part}");
            add(&name, Component::T5, &name, Place::Whole, Naming::Transformers);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(flattened: &str) -> (String, Place) {
        let (module, _) = find(flattened).unwrap();
        (module.weight(), module.place)
    }

    #[test]
    fn every_naming_meets_in_one_module() {
        let qkv = "double_blocks.7.img_attn.qkv.weight".to_string();
        assert_eq!(name("double_blocks_7_img_attn_qkv"), (qkv.clone(), Place::Whole));
        assert_eq!(name("double_blocks_7_processor_qkv_lora1"), (qkv.clone(), Place::Whole));
        assert_eq!(name("transformer_blocks_7_attn_to_k"), (qkv.clone(), Place::Key));
        assert_eq!(name("double_blocks_7_img_attn_qkv_2"), (qkv, Place::Value));
        assert_eq!(name("single_transformer_blocks_37_proj_mlp"), ("single_blocks.37.linear1.weight".into(), Place::Mlp));
        assert_eq!(name("single_blocks_0_linear1_qkv"), ("single_blocks.0.linear1.weight".into(), Place::Qkv));
        assert_eq!(name("norm_out_linear"), ("final_layer.adaLN_modulation.1.weight".into(), Place::SwappedHalves));
        assert_eq!(name("final_layer_adaLN_modulation_1"), ("final_layer.adaLN_modulation.1.weight".into(), Place::Whole));
        assert_eq!(
            name("transformer_blocks_0_attn_norm_added_q"),
            ("double_blocks.0.txt_attn.norm.query_norm.scale".into(), Place::Whole)
        );
        assert_eq!(name("text_model_encoder_layers_3_mlp_fc1"), ("encoder.layers.3.mlp.fc1.weight".into(), Place::Whole));
        assert_eq!(
            name("encoder_block_3_layer_1_DenseReluDense_wi_0"),
            ("encoder.block.3.layer.1.DenseReluDense.wi_0.weight".into(), Place::Whole)
        );
        assert!(find("double_blocks_19_img_attn_qkv").is_none());
        assert!(find("transformer_blocks_7_attn_to_kk").is_none());
    }

    #[test]
    fn the_table_has_no_collisions() {
        // 19 x (14 linears + 4 norms) and 38 x (6 + 2) diffusers names, 10 outside, each also under BFL's names, …
        let transformer = table().values().filter(|(module, _)| module.component == Component::Transformer).count();
        let diffusers = 19 * 18 + 38 * 8 + 10;
        let bfl = 19 * (10 + 4) + 38 * (3 + 2) + 10;
        let (numbered, alias, xlabs) = (19 * 6 + 38 * 4, 38, 19 * 4 + 38 * 2);
        assert_eq!(transformer, diffusers + bfl + numbered + alias + xlabs);
    }

    #[test]
    fn rows_of_members() {
        assert_eq!(Place::Value.rows(9216, 3072), 6144..9216);
        assert_eq!(Place::Mlp.rows(21504, 3072), 9216..21504);
        assert_eq!(Place::Qkv.rows(21504, 3072), 0..9216);
    }
}
