//! Pictures to tensors and back, as diffusers' image processor does it.

use candle_core::{DType, Device, Tensor};
use image::{GrayImage, RgbImage};
use rayon::prelude::*;

use super::{Error, resize};

/// -> `(1, 3, height, width)` f32 in -1..=1; scaled with Lanczos if the size differs.
pub(super) fn from_image(image: &RgbImage, width: usize, height: usize, device: &Device) -> Result<Tensor, Error> {
    let from = (image.width() as usize, image.height() as usize);
    let bytes = resize::lanczos(image.as_raw(), 3, from, (width, height));
    let pixels = Tensor::from_vec(bytes, (1, height, width, 3), device)?.permute((0, 3, 1, 2))?;
    // In this order the values round as the reference's do: to 0..=1 first, then to -1..=1.
    Ok(((pixels.to_dtype(DType::F32)? / 255.)? * 2.)?.affine(1., -1.)?.contiguous()?)
}

/// -> `(1, 1, height / 8, width / 8)` f32 of 0 and 1: grey of 128 and more is painted anew. One value in eight is read.
pub(super) fn latent_mask(mask: &GrayImage, width: usize, height: usize, device: &Device) -> Result<Tensor, Error> {
    let from = (mask.width() as usize, mask.height() as usize);
    let bytes = resize::lanczos(mask.as_raw(), 1, from, (width, height));
    let (columns, rows) = (width / 8, height / 8);
    let at = |y: usize, x: usize| f32::from(bytes[8 * y * width + 8 * x] >= 128);
    let values = (0..rows).flat_map(|y| (0..columns).map(move |x| (y, x))).map(|(y, x)| at(y, x)).collect();
    Ok(Tensor::from_vec(values, (1, 1, rows, columns), device)?)
}

/// pixels `(1, 3, y, x)` in -1..=1, any float dtype -> picture. Values out of range are clamped; NaN is an error, never black.
pub(super) fn to_image(pixels: &Tensor) -> Result<RgbImage, Error> {
    let (_, _, height, width) = pixels.dims4()?;
    let values: Vec<f32> = pixels.to_dtype(DType::F32)?.permute((0, 2, 3, 1))?.flatten_all()?.to_vec1()?;
    let count = values.par_iter().filter(|value| !value.is_finite()).count();
    if count > 0 {
        return Err(Error::NotANumber { count });
    }
    let byte = |value: f32| ((value / 2. + 0.5).clamp(0., 1.) * 255.).round_ties_even() as u8;
    let bytes = values.into_par_iter().map(byte).collect();
    Ok(RgbImage::from_raw(width as u32, height as u32, bytes).expect("three bytes for each pixel"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_become_bytes_as_the_reference_rounds_them_and_nan_is_no_black() {
        // 127.5 and 2.5 lie in the middle of two and go to the even one.
        let values = [-2., -1., 0., 1., 7., 2.5 / 255. * 2. - 1.];
        let pixels = |values: &[f32]| Tensor::from_slice(values, (1, 3, 1, 2), &Device::Cpu).unwrap();
        let picture = to_image(&pixels(&values)).unwrap();
        // Channels come one after another, pixels three bytes at a time.
        assert_eq!(picture.into_raw(), [0, 128, 255, 0, 255, 2]);
        let mut broken = values;
        (broken[1], broken[4]) = (f32::NAN, f32::INFINITY);
        assert!(matches!(to_image(&pixels(&broken)), Err(Error::NotANumber { count: 2 })));
    }
}
