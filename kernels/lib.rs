//! Operations that FLUX.1 spends its time in, behind one plain function each.
//!
//! | op | what it does | reference |
//! |---|---|---|
//! | [`add_gated`] | x + gate * update in one pass | composed candle ops, in tests |
//! | [`add_gated_then_norm`] | that and the modulated norm of it in one pass | the two, in tests |
//! | [`attention`] | softmax(scale q kᵀ + bias) v in chunks of queries | the same in one piece, in tests |
//! | [`attention_beside`], [`linear_beside`] | \[attention, gelu\], each written where the next layer reads it | [`attention`], [`linear`], [`gelu_beside`] |
//! | [`convolve`] | convolution, with doubling before it and a residual after it | candle's `conv2d`, in tests |
//! | [`gelu`] | the tanh form | candle's, in tests |
//! | [`gelu_beside`] | \[attended, gelu\] without a concatenation | composed candle ops, in tests |
//! | [`group_norm`] | group norm, affine, SiLU in one pass | composed candle ops, in tests |
//! | [`linear_fp8`] | x Wᵀ + b with both in e4m3, a scale for each row; cuBLASLt's on CUDA | its module |
//! | [`quantise_fp8`], [`widen_fp8`] | to e4m3 and back (with LoRAs or without), in one pass | composed candle ops, in tests |
//! | [`modulated_norm_fp8`], [`add_gated_then_norm_fp8`], [`gelu_beside_fp8`] | these to e4m3 in the same pass | one after the other, in tests |
//! | [`joint_heads`] | q, k, v of all streams from their projections: split, norm, rotate, join | composed ops, in its module |
//! | [`layer_norm`] | layer norm without weights, f32 statistics | composed candle ops, in tests |
//! | [`linear`], [`linear_gelu`] | x Wᵀ + b, added onto the bias on the CPU; cuBLASLt's epilogues on CUDA | composed candle ops, in tests |
//! | [`linear_blocks`] | x Wᵀ + b of GGUF's blocks | [`widen_blocks`] and [`linear`] |
//! | [`merge`] | W + Σ B A, one pass over W | composed ops, in its module |
//! | [`modulated_norm`] | layer norm, scale and shift in one pass | composed candle ops, in tests |
//! | [`widen_blocks`] | GGUF's blocks to the type of computation in one pass, with LoRAs or without | candle's and [`merge`], in tests |
//! | [`rms_norm`] | root-mean-square norm with scale, f32 statistics | composed candle ops, in tests |
//! | [`rotate`] | rotary embedding of interleaved pairs | composed candle ops, in tests |
//!
//! The model never asks which device it runs on: a faster kernel for one device replaces the inside of its function here. Kernels for
//! CUDA are in `cuda/`, named as the files of `ops/` are; `launch.rs` runs them, and [`use_fused`] turns them on where [`prove`] found
//! them right. Before that they have been compiled for cards and run, emulated, against the references above. [`settle_attention`] and
//! [`settle_convolution`] have cuDNN in the place of our kernels, where it is installed and faster.

#[cfg(feature = "cuda")]
mod blas;
mod card;
#[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "only cuBLASLt has algorithms"))]
mod choices;
mod cudnn;
mod launch;
#[cfg(feature = "cuda")]
mod lt;
mod memory;
mod ops;
mod proof;
mod settle;
mod transfer;
mod whose;

pub use card::{arithmetic_rate, free_memory, gather_memory, has_fp8_products, keep_at_most, machine, open_cuda};
pub use choices::{Keeper, keep_choices, recall, remember};
pub use cudnn::{cudnn_status, forget_plans, has_cudnn};
#[cfg(feature = "emulator")]
pub use launch::emulated;
pub use launch::{digest, fused, launches, use_fused};
pub use memory::zeros;
pub use ops::activation::{gelu, gelu_beside, gelu_beside_fp8};
pub use ops::attention::{SCORES_BYTES, attention, attention_in_chunks};
pub use ops::beside::{Beside, attention_beside, attention_beside_fp8, linear_beside, places_beside};
pub use ops::blocks::{linear_blocks, visit_blocks, widen_blocks};
pub use ops::convolve::{Window, convolve};
pub use ops::fp8::{Fp8Rows, linear_fp8, quantise_fp8, widen_fp8};
pub use ops::group_norm::{After, group_norm};
pub use ops::heads::{Heads, Projection, joint_heads};
pub use ops::linear::{linear, linear_gelu};
pub use ops::merge::{Addend, Delta, joined, merge, merges_while_widening};
pub use ops::norm::{
    add_gated, add_gated_then_norm, add_gated_then_norm_fp8, layer_norm, modulated_norm, modulated_norm_fp8, rms_norm,
};
pub use ops::rotary::rotate;
pub use proof::{Proof, prove};
pub use settle::{settle_attention, settle_convolution};
pub use transfer::{PLACES, forget_places, to_device, upload, upload_blocks, visit, visit_bytes};
pub use whose::{Whose, Work, choose, chosen};
