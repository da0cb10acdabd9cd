//! What matrices are kept as in memory: as they are stored, or in fewer bits.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use kernels::Fp8Rows;
use rayon::prelude::*;
use std::sync::Arc;

use super::Component;
use crate::nn::Weight;

/// What a component's large matrices are kept as. Products are made in the type of computation all the same, where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keep {
    /// Dense ones in the type of computation; fp8 and GGUF as in their file.
    #[default]
    Stored,
    /// e4m3 with a scale for each row, widened for each product.
    Fp8,
    /// The same, and activations are e4m3 in the products as well, as a card's fp8 units have it.
    Fp8Products,
    /// Dense, and beside them what the last is, made anew with the LoRAs inside whenever these change: see `lora::Mode::Fp8`.
    Fp8Merged,
    /// GGUF blocks of this type.
    Gguf(GgmlDType),
}

/// Rows that one task quantises.
const ROWS: usize = 128;

impl Keep {
    /// Bytes of `values` values in rows of `columns`, as products take them; 16 bits each if dense ones are kept in the type of computation.
    #[must_use]
    pub fn bytes(self, values: u64, columns: usize) -> u64 {
        match self.fitting(columns) {
            Self::Stored => 2 * values,
            Self::Fp8 | Self::Fp8Products | Self::Fp8Merged => values,
            Self::Gguf(kind) => values / kind.block_size() as u64 * kind.type_size() as u64,
        }
    }

    /// Whether it is made of e4m3.
    #[must_use]
    pub fn is_fp8(self) -> bool {
        matches!(self, Self::Fp8 | Self::Fp8Products | Self::Fp8Merged)
    }

    /// Itself, or the nearest with blocks that fit into rows of `columns`.
    #[must_use]
    pub fn fitting(self, columns: usize) -> Self {
        let kind = match self {
            Self::Gguf(kind) => kind,
            // The kernels read sixteen at a time.
            fp8 if fp8.is_fp8() && !columns.is_multiple_of(16) => return Self::Stored,
            other => return other,
        };
        let smaller = match kind {
            GgmlDType::Q6K => GgmlDType::Q8_0,
            GgmlDType::Q5K => GgmlDType::Q5_0,
            GgmlDType::Q4K => GgmlDType::Q4_0,
            other => other,
        };
        if columns.is_multiple_of(kind.block_size()) {
            self
        } else if columns.is_multiple_of(smaller.block_size()) {
            Self::Gguf(smaller)
        } else {
            Self::Stored
        }
    }

    /// dense `(output, input)` as it is kept, on the same device.
    pub(crate) fn convert(self, dense: Tensor) -> Result<Weight> {
        let (output, input) = dense.dims2()?;
        Ok(match self.fitting(input) {
            Self::Stored | Self::Fp8Merged => Weight::Dense(dense),
            Self::Fp8 | Self::Fp8Products => {
                let Fp8Rows { data, scale } = kernels::quantise_fp8(&dense)?;
                Weight::Fp8 { data, scale: Some(scale), products: self == Self::Fp8Products }
            }
            Self::Gguf(kind) => {
                let device = dense.device().clone();
                let wide = dense.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
                let part = |row: usize| {
                    // A copy, because quantize reads a view from the start of its storage.
                    let rows = wide.narrow(0, row, ROWS.min(output - row))?.force_contiguous()?;
                    Ok(QTensor::quantize(&rows, kind)?.data()?.into_owned())
                };
                let parts = (0..output).into_par_iter().step_by(ROWS).map(part).collect::<Result<Vec<Vec<u8>>>>()?;
                let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
                Weight::Quantised(Arc::new(kernels::upload_blocks(&parts, kind, &[output, input], &device)?))
            }
        })
    }
}

/// What `--dtype` calls them.
impl std::fmt::Display for Keep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self {
            Self::Stored => "as stored",
            Self::Fp8 => "fp8",
            Self::Fp8Products => "fp8-products",
            Self::Fp8Merged => "fp8-merged",
            Self::Gguf(GgmlDType::Q8_0) => "q8_0",
            Self::Gguf(GgmlDType::Q6K) => "q6_k",
            Self::Gguf(GgmlDType::Q5K) => "q5_k",
            Self::Gguf(GgmlDType::Q5_0) => "q5_0",
            Self::Gguf(GgmlDType::Q4K) => "q4_k",
            Self::Gguf(GgmlDType::Q4_0) => "q4_0",
            Self::Gguf(other) => return write!(f, "{other:?}"),
        };
        f.write_str(name)
    }
}

/// Whether [`Keep`] is for this matrix: those of the blocks, which are most of a model. Embedders, the final layer and modulations,
/// through which everything passes, keep their precision.
pub(crate) fn is_large(component: Component, path: &str) -> bool {
    match component {
        Component::Transformer => path.contains("_blocks.") && !is_modulation(path),
        Component::T5 => path.starts_with("encoder.block."),
        Component::Clip | Component::Vae => false,
    }
}

fn is_modulation(path: &str) -> bool {
    path.contains("_mod.lin.") || path.contains("modulation.lin.")
}

/// Which matrices stay in main memory and are sent to the card whenever they are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnHost {
    /// T5's blocks: used for every new prompt.
    pub text: bool,
    /// Those that make the modulations: used once a picture.
    pub modulations: bool,
    /// Double and single blocks from these on: used in every step.
    pub blocks_from: [usize; 2],
}

impl Default for OnHost {
    /// None of them.
    fn default() -> Self {
        Self { text: false, modulations: false, blocks_from: [usize::MAX; 2] }
    }
}

impl OnHost {
    /// Whether this matrix, by its canonical name, is one of them.
    #[must_use]
    pub fn has(&self, component: Component, path: &str) -> bool {
        // Vectors are small, and stay.
        if !path.ends_with(".weight") || path.contains("norm") || path.contains("relative_attention_bias") {
            return false;
        }
        match component {
            Component::T5 => return self.text && is_large(component, path),
            Component::Transformer if is_modulation(path) => return self.modulations,
            Component::Transformer => {}
            Component::Clip | Component::Vae => return false,
        }
        let [double, single] = self.blocks_from;
        let number = |list: &str| path.strip_prefix(list)?.split('.').next()?.parse::<usize>().ok();
        number("double_blocks.").is_some_and(|i| i >= double) || number("single_blocks.").is_some_and(|i| i >= single)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// |a - b|₂ / |b|₂.
    fn relative(a: &Tensor, b: &Tensor) -> f64 {
        let norm = |x: &Tensor| f64::from(x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
        norm(&(a - b).unwrap()) / norm(b)
    }

    #[test]
    fn each_format_is_as_near_as_its_bits_allow() {
        let weight = (Tensor::randn(0f32, 1., (300, 512), &Device::Cpu).unwrap() * 0.02).unwrap();
        // Rows of very different sizes: a scale for each keeps the small ones.
        let sizes = Tensor::rand(-2f32, 2., (300, 1), &Device::Cpu).unwrap().exp().unwrap();
        let weight = weight.broadcast_mul(&sizes).unwrap();
        for (keep, most, bits) in [
            (Keep::Fp8, 0.03, 8.),
            (Keep::Gguf(GgmlDType::Q8_0), 0.006, 8.5),
            (Keep::Gguf(GgmlDType::Q6K), 0.02, 6.5625),
            (Keep::Gguf(GgmlDType::Q5K), 0.04, 5.5),
            (Keep::Gguf(GgmlDType::Q4K), 0.08, 4.5),
            (Keep::Gguf(GgmlDType::Q4_0), 0.11, 4.5),
        ] {
            let kept = keep.convert(weight.clone()).unwrap().dense(DType::F32).unwrap();
            let error = relative(&kept, &weight);
            assert!(error > most / 8. && error < most, "{keep:?}: {error}");
            let rows = |x: &Tensor| x.get(17).unwrap();
            assert!(relative(&rows(&kept), &rows(&weight)) < 1.6 * most, "{keep:?}: a row by itself");
            assert_eq!(keep.bytes(300 * 512, 512) as f64 * 8. / (300. * 512.), bits, "{keep:?}");
        }
    }

    #[test]
    fn odd_widths_take_smaller_blocks_and_zeros_stay() {
        let keep = Keep::Gguf(GgmlDType::Q5K);
        assert_eq!(keep.fitting(3072), keep);
        assert_eq!(keep.fitting(192), Keep::Gguf(GgmlDType::Q5_0));
        assert_eq!(keep.fitting(40), Keep::Stored);
        assert_eq!((Keep::Fp8.fitting(48), Keep::Fp8.fitting(40)), (Keep::Fp8, Keep::Stored));
        let zeros = Tensor::zeros((3, 16), DType::F32, &Device::Cpu).unwrap();
        let kept = Keep::Fp8.convert(zeros).unwrap().dense(DType::F32).unwrap();
        assert_eq!(kept.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0.0; 48]);
    }

    #[test]
    fn what_is_large_and_what_is_on_the_host() {
        let large = |path| is_large(Component::Transformer, path);
        assert!(large("double_blocks.3.img_attn.qkv.weight") && large("single_blocks.37.linear2.weight"));
        assert!(!large("double_blocks.3.txt_mod.lin.weight") && !large("single_blocks.0.modulation.lin.weight"));
        assert!(!large("img_in.weight") && !large("final_layer.adaLN_modulation.1.weight"));
        assert!(is_large(Component::T5, "encoder.block.0.layer.1.DenseReluDense.wo.weight") && !is_large(Component::Vae, "x"));
        let host = OnHost { text: false, modulations: true, blocks_from: [19, 30] };
        let has = |path| host.has(Component::Transformer, path);
        assert!(has("double_blocks.3.img_mod.lin.weight") && has("single_blocks.30.linear1.weight"));
        assert!(!has("single_blocks.29.linear1.weight") && !has("double_blocks.18.img_mlp.0.weight") && !has("img_in.weight"));
        assert!(!OnHost::default().has(Component::Transformer, "single_blocks.37.linear1.weight"));
        let t5 = "encoder.block.3.layer.0.SelfAttention.q.weight";
        let all = OnHost { text: true, modulations: true, blocks_from: [0, 0] };
        for vector in
            ["double_blocks.0.img_mod.lin.bias", "single_blocks.0.norm.query_norm.scale", "single_blocks.0.linear1.bias"]
        {
            assert!(!all.has(Component::Transformer, vector), "{vector}");
        }
        assert!(!all.has(Component::T5, "encoder.block.0.layer.0.layer_norm.weight"));
        assert!(!host.has(Component::T5, t5) && OnHost { text: true, ..host }.has(Component::T5, t5));
    }
}
