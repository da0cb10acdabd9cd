//! Latents as pictures and as tokens: every 2 x 2 patch of the latent picture is one token.
//!
//! Follows diffusers 0.42.1 `pipelines/flux/pipeline_flux.py`.

use candle_core::{Result, Tensor, bail};

/// Latents `(b, c, y, x)` -> tokens `(b, (y/2)(x/2), 4c)`, row by row; a token holds each channel's 2 x 2 patch in turn.
///
/// Errors where `y` or `x` is odd.
pub fn pack(latents: &Tensor) -> Result<Tensor> {
    let (b, c, y, x) = latents.dims4()?;
    if y % 2 != 0 || x % 2 != 0 {
        bail!("latents of {y} x {x} cannot be cut into patches of 2 x 2: the picture's width and height must be multiples of 16");
    }
    latents
        .reshape(&[b, c, y / 2, 2, x / 2, 2])?
        .permute([0, 2, 4, 1, 3, 5])? // (b, y/2, x/2, c, 2, 2)
        .reshape((b, (y / 2) * (x / 2), c * 4))
}

/// Tokens `(b, rows * columns, 4c)` -> latents `(b, c, 2 rows, 2 columns)`: undoes [`pack`].
///
/// Errors where the number of tokens is not `rows * columns`.
pub fn unpack(tokens: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
    let (b, l, width) = tokens.dims3()?;
    if l != rows * columns || width % 4 != 0 {
        bail!("{l} tokens of {width} numbers are not {rows} rows of {columns} patches");
    }
    let c = width / 4;
    tokens
        .reshape(&[b, rows, columns, c, 2, 2])?
        .permute([0, 3, 1, 4, 2, 5])? // (b, c, rows, 2, columns, 2)
        .reshape((b, c, 2 * rows, 2 * columns))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn a_token_is_a_patch_of_each_channel() {
        // Channel 0 counts 0..8 and channel 1 goes on: two rows of four make two patches.
        let latents = Tensor::arange(0f32, 16.0, &Device::Cpu).unwrap().reshape((1, 2, 2, 4)).unwrap();
        let tokens = pack(&latents).unwrap();
        assert_eq!(
            tokens.to_vec3::<f32>().unwrap(),
            [[[0., 1., 4., 5., 8., 9., 12., 13.], [2., 3., 6., 7., 10., 11., 14., 15.]]]
        );
        let back = unpack(&tokens, 1, 2).unwrap();
        assert_eq!(
            back.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            latents.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        );
    }

    #[test]
    fn packing_is_diffusers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/modules/modules.safetensors");
        let fixture = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let (latents, tokens) = (&fixture["pack.in.latent"], &fixture["pack.out.packed"]);
        let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(&pack(latents).unwrap()), flat(tokens));
        assert_eq!(flat(&unpack(tokens, latents.dim(2).unwrap() / 2, latents.dim(3).unwrap() / 2).unwrap()), flat(latents));
    }

    #[test]
    fn odd_sizes_are_refused() {
        let latents = Tensor::zeros((1, 16, 3, 4), DType::F32, &Device::Cpu).unwrap();
        assert!(pack(&latents).unwrap_err().to_string().contains("multiples of 16"));
        let tokens = Tensor::zeros((1, 5, 64), DType::F32, &Device::Cpu).unwrap();
        assert!(unpack(&tokens, 2, 2).is_err());
    }
}
