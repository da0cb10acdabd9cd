//! The sizes of a FLUX.1 transformer, read from its weights.

use serde_json::Value;

use crate::weights::{Error, Source};

/// FLUX.1 splits each head's width 1 : 3.5 : 3.5 between text order, rows and columns: 128 = 16 + 56 + 56.
const AXES_OF_16: [usize; 3] = [2, 7, 7];

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Width of a token inside the transformer (3072).
    pub hidden: usize,
    pub heads: usize,
    /// Width of a head (128).
    pub head_width: usize,
    /// Width of the MLP's inner layer (12288).
    pub mlp: usize,
    /// Channels of a packed latent token (64 = 16 channels of 2 x 2).
    pub channels: usize,
    /// Width of T5's output (4096).
    pub text_width: usize,
    /// Width of CLIP's pooled output (768).
    pub pooled_width: usize,
    pub double_blocks: usize,
    pub single_blocks: usize,
    /// dev has a guidance embedding, schnell has none.
    pub guidance: bool,
    /// Rotary channels for (text order, row, column); their sum is `head_width`.
    pub axes: [usize; 3],
}

impl Config {
    /// FLUX.1-dev's sizes: for benches without its weights.
    pub const DEV: Self = Self {
        hidden: 3072,
        heads: 24,
        head_width: 128,
        mlp: 12288,
        channels: 64,
        text_width: 4096,
        pooled_width: 768,
        double_blocks: 19,
        single_blocks: 38,
        guidance: true,
        axes: [16, 56, 56],
    };

    /// `json` is the component's `config.json`, of which only what shapes cannot tell is used.
    pub fn read(source: &Source, json: Option<&Value>) -> Result<Self, Error> {
        let matrix = |name: &str| match source.shape(format_args!("{name}.weight")).as_deref() {
            Some([output, input]) => Ok((*output, *input)),
            _ => Err(source.unsupported(&format!("{name}.weight is not there, so this is no FLUX.1 transformer"))),
        };
        let (hidden, channels) = matrix("img_in")?;
        let (_, text_width) = matrix("txt_in")?;
        let (_, pooled_width) = matrix("vector_in.in_layer")?;
        let (mlp, _) = matrix("double_blocks.0.img_mlp.0")?;
        let scale = source.shape("double_blocks.0.img_attn.norm.query_norm.scale");
        let Some([head_width]) = scale.as_deref() else {
            return Err(source.unsupported("double_blocks.0.img_attn.norm.query_norm.scale is not there"));
        };
        if hidden % head_width != 0 || head_width % 16 != 0 {
            return Err(source.unsupported(&format!("heads of width {head_width} do not divide a hidden width of {hidden}")));
        }
        let axes = match json.and_then(|json| json.get("axes_dims_rope")) {
            None => AXES_OF_16.map(|part| part * head_width / 16),
            Some(value) => {
                serde_json::from_value(value.clone()).map_err(|_| source.unsupported("axes_dims_rope is not three numbers"))?
            }
        };
        if axes.iter().sum::<usize>() != *head_width || axes.iter().any(|axis| axis % 2 != 0) {
            return Err(
                source.unsupported(&format!("axes_dims_rope {axes:?} are not three even widths with the sum {head_width}"))
            );
        }
        Ok(Self {
            hidden,
            heads: hidden / head_width,
            head_width: *head_width,
            mlp,
            channels,
            text_width,
            pooled_width,
            double_blocks: source.count("double_blocks"),
            single_blocks: source.count("single_blocks"),
            guidance: source.contains("guidance_in.in_layer.weight"),
            axes,
        })
    }
}
