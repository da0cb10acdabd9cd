//! What a model's parts weigh, and what a picture takes.

use models::bundle::{Bundle, Files};
use models::flux;
use models::weights::{Component, Kind};

use super::Error;

/// The picture that plans leave room for, in tokens of latents and of text.
pub(super) const TOKENS: u64 = 64 * 64 + 512;

/// Scores of attention that are alive at once: in f32, their softmax, and in 16 bits.
const SCORES: u64 = 3 * kernels::SCORES_BYTES as u64;

/// What files call T5's table of tokens.
const TABLES: [&str; 3] = ["shared.weight", "encoder.embed_tokens.weight", "token_embd.weight"];

/// What a model's parts weigh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    pub transformer: flux::Config,
    /// Values of each; of T5 without its table of tokens, which stays where it is used and as it is computed with.
    pub t5: u64,
    pub table: u64,
    pub clip: u64,
    pub vae: u64,
    /// Bytes of transformer and T5 whose file is quantised already: they stay as they are.
    pub quantised: [Option<u64>; 2],
    /// Whether the transformer's file is in e4m3, which can be multiplied as it is.
    pub fp8: bool,
}

impl Sizes {
    /// FLUX.1-dev's in bf16, with T5-XXL, CLIP-L and its autoencoder: for plans before the files are there.
    pub const FLUX1: Self = Self {
        transformer: flux::Config::DEV,
        t5: 4_630_714_368,
        table: 131_596_288,
        clip: 123_060_480,
        vae: 83_819_683,
        quantised: [None; 2],
        fp8: false,
    };

    /// Of the files of a model whose transformer has these sizes.
    pub fn of(bundle: &Bundle, transformer: &flux::Config) -> Result<Self, Error> {
        let mut fp8 = false;
        // Values, of them the table's, and bytes if it is quantised.
        let mut values = |component: Component, files: &Files| -> Result<(u64, u64, Option<u64>), Error> {
            // One file may hold all components.
            let checkpoint = files.checkpoint()?.of(component);
            let (mut values, mut table, mut bytes, mut quantised) = (0, 0, 0, false);
            for (key, stored) in checkpoint.keys().filter_map(|key| Some((key, checkpoint.get(key)?))) {
                let here = stored.shape.iter().product::<usize>() as u64;
                if TABLES.iter().any(|name| key.ends_with(name)) {
                    // Some files have it under two names; it is used once.
                    table = here;
                    continue;
                }
                values += here;
                bytes += checkpoint.bytes(stored).len() as u64;
                let e4m3 = stored.kind == Kind::Plain(safetensors::Dtype::F8_E4M3);
                fp8 |= e4m3 && component == Component::Transformer;
                quantised |= e4m3 || matches!(stored.kind, Kind::Gguf(kind) if kind.block_size() > 1);
            }
            Ok((values, table, quantised.then_some(bytes)))
        };
        let (_, _, transformer_quantised) = values(Component::Transformer, &bundle.transformer)?;
        let (t5, table, t5_quantised) = values(Component::T5, &bundle.t5)?;
        let (clip, vae) = (values(Component::Clip, &bundle.clip)?.0, values(Component::Vae, &bundle.vae)?.0);
        let quantised = [transformer_quantised, t5_quantised];
        Ok(Self { transformer: transformer.clone(), t5, table, clip, vae, quantised, fp8 })
    }

    /// Values of one double block's and one single block's large matrices.
    pub(super) fn blocks(&self) -> [u64; 2] {
        let (d, mlp) = (self.transformer.hidden as u64, self.transformer.mlp as u64);
        [2 * (4 * d * d + 2 * d * mlp), d * (3 * d + mlp) + d * (d + mlp)]
    }

    /// Values of the matrices that make the modulations of all blocks.
    pub(super) fn modulations(&self) -> u64 {
        let config = &self.transformer;
        let d = config.hidden as u64;
        d * d * (12 * config.double_blocks as u64 + 3 * config.single_blocks as u64)
    }

    /// Values of a LoRA of this rank on every large matrix of the blocks, with q, k, v and the MLP of fused ones apart, as most are.
    pub(super) fn factors(&self, rank: u64) -> u64 {
        let config = &self.transformer;
        let (d, mlp) = (config.hidden as u64, config.mlp as u64);
        let [double, single] = [2 * (10 * d + 2 * mlp), 9 * d + 2 * mlp];
        rank * (double * config.double_blocks as u64 + single * config.single_blocks as u64)
    }

    /// Values of what is outside the blocks.
    pub(super) fn ends(&self) -> u64 {
        let config = &self.transformer;
        let (d, embedders) = (config.hidden as u64, 1 + u64::from(config.guidance));
        let inputs = (2 * config.channels + config.text_width + config.pooled_width) as u64 + 3 * d;
        d * inputs + embedders * (256 * d + d * d)
    }

    /// Operations of a step of a picture: each value of a single block's matrices is used for every token, of a double block's for those of its
    /// stream, which are half of it; and attention's two products.
    pub(super) fn operations(&self) -> u64 {
        let config = &self.transformer;
        let ([double, single], d) = (self.blocks(), config.hidden as u64);
        let (doubles, singles) = (config.double_blocks as u64, config.single_blocks as u64);
        TOKENS * (doubles * double + 2 * singles * single) + 4 * TOKENS * TOKENS * d * (doubles + singles)
    }
}

/// Activations of a picture of so many tokens, text included: what a single block has at once, the scores, a widened matrix (through f32).
/// `value` are bytes of one.
pub(super) fn work(config: &flux::Config, tokens: u64, value: u64) -> u64 {
    let (d, mlp, heads) = (config.hidden as u64, config.mlp as u64, config.heads as u64);
    let scores = SCORES.min(3 * heads * tokens * tokens * 4);
    tokens * (10 * d + 3 * mlp) * value + scores + d * (3 * d + mlp) * (4 + value)
}
