//! FLUX.1 and its encoders: tensors in, tensors out. No clock, network, SQL or environment, no threads but rayon's.
//!
//! Start at [`flux::Flux::prepare`] and [`flux::Flux::step`], which read like the paper. Around them: [`t5`] and [`clip`] read the prompt, [`vae`] turns
//! latents into pictures and back, [`sampler`] walks from noise to latents, [`weights`] reads any published layout, [`nn`]
//! holds the layers; [`judge`] looks at finished pictures. Letters in shapes, everywhere: `b` batch, `l` tokens (`l_img`, `l_txt`), `d` hidden width, `h` heads,
//! `e` head width, `c` channels, `y x` rows and columns.

pub mod bundle;
pub mod clip;
pub mod flux;
pub mod judge;
pub mod lora;
pub mod nn;
#[cfg(feature = "pocket")]
pub mod pocket;
pub mod sampler;
pub mod t5;
pub mod tokenize;
pub mod vae;
pub mod weights;

/// Tensor code fails with candle's error, loading code with [`weights::Error`].
pub(crate) type Result<T, E = candle_core::Error> = std::result::Result<T, E>;
