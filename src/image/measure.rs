//! Figures of pictures, from their pixels alone. All of them are checked against scikit-image and SciPy.

use image::{Rgb, RgbImage};

/// Side of the window in which structures are compared, in pixels.
const WINDOW: usize = 7;

/// What SSIM adds to its quotients, for values from 0 to 255: (0.01 * 255)^2 and (0.03 * 255)^2.
const STABLE: [f64; 2] = [6.5025, 58.5225];

/// The structural similarity of two pictures of one size, both sides at least 7: 1 for equal ones, about 0 for unrelated ones.
///
/// As Wang et al. 2004 in the form that scikit-image computes by default: the mean over the three channels and all windows of 7 x 7
/// pixels with equal weights and the sample covariance. `None` where the sizes do not fit.
#[must_use]
pub fn ssim(a: &RgbImage, b: &RgbImage) -> Option<f64> {
    let (width, height) = (a.width() as usize, a.height() as usize);
    if a.dimensions() != b.dimensions() || width < WINDOW || height < WINDOW {
        return None;
    }
    let of_channel = |channel| {
        let values = |picture: &RgbImage| picture.pixels().map(|pixel| f64::from(pixel[channel])).collect::<Vec<_>>();
        let (x, y) = (values(a), values(b));
        let sums = |f: &dyn Fn(usize) -> f64| window_sums(width, height, f);
        let [sx, sy] = [sums(&|i| x[i]), sums(&|i| y[i])];
        let [sxx, syy, sxy] = [sums(&|i| x[i] * x[i]), sums(&|i| y[i] * y[i]), sums(&|i| x[i] * y[i])];
        let n = (WINDOW * WINDOW) as f64;
        let similarity = |i: usize| {
            let (mx, my) = (sx[i] / n, sy[i] / n);
            let covariance = |sum: f64, p: f64, q: f64| (sum - n * p * q) / (n - 1.);
            let (vx, vy, vxy) = (covariance(sxx[i], mx, mx), covariance(syy[i], my, my), covariance(sxy[i], mx, my));
            (2. * mx * my + STABLE[0]) * (2. * vxy + STABLE[1]) / ((mx * mx + my * my + STABLE[0]) * (vx + vy + STABLE[1]))
        };
        (0..sx.len()).map(similarity).sum::<f64>() / sx.len() as f64
    };
    Some((0..3).map(of_channel).sum::<f64>() / 3.)
}

/// The sums of `value` over every window that lies inside, by row.
fn window_sums(width: usize, height: usize, value: &dyn Fn(usize) -> f64) -> Vec<f64> {
    // Sums over all that is above and left of a point.
    let stride = width + 1;
    let mut table = vec![0.; stride * (height + 1)];
    for y in 0..height {
        let mut row = 0.;
        for x in 0..width {
            row += value(y * width + x);
            table[(y + 1) * stride + x + 1] = table[y * stride + x + 1] + row;
        }
    }
    let at = |x: usize, y: usize| table[y * stride + x];
    let windows = (0..=height - WINDOW).flat_map(|y| (0..=width - WINDOW).map(move |x| (x, y)));
    windows.map(|(x, y)| at(x + WINDOW, y + WINDOW) - at(x, y + WINDOW) - at(x + WINDOW, y) + at(x, y)).collect()
}

/// The root of the mean squared difference of all channels, 0 to 1. `None` where the sizes differ.
#[must_use]
pub fn distance(a: &RgbImage, b: &RgbImage) -> Option<f64> {
    let squares = a.iter().zip(b.iter()).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2));
    (a.dimensions() == b.dimensions()).then(|| (squares.sum::<f64>() / a.len() as f64).sqrt() / 255.)
}

/// The variance of the Laplacian of the luma (Rec. 601, 0 to 255): high for crisp edges and for noise, low for blur.
#[must_use]
pub fn sharpness(picture: &RgbImage) -> f64 {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    if width < 3 || height < 3 {
        return 0.;
    }
    let luma = |Rgb([r, g, b]): &Rgb<u8>| 0.299 * f64::from(*r) + 0.587 * f64::from(*g) + 0.114 * f64::from(*b);
    let y: Vec<f64> = picture.pixels().map(luma).collect();
    let inside = (1..height - 1).flat_map(|row| (1..width - 1).map(move |column| row * width + column));
    let edges: Vec<f64> = inside.map(|i| y[i - 1] + y[i + 1] + y[i - width] + y[i + width] - 4. * y[i]).collect();
    let mean = edges.iter().sum::<f64>() / edges.len() as f64;
    edges.iter().map(|edge| (edge - mean).powi(2)).sum::<f64>() / edges.len() as f64
}

/// The mean saturation of HSV, 0 (grey) to 1.
#[must_use]
pub fn saturation(picture: &RgbImage) -> f64 {
    let of = |pixel: &Rgb<u8>| {
        let (least, most) = (pixel.0.into_iter().min().unwrap_or(0), pixel.0.into_iter().max().unwrap_or(0));
        if most == 0 { 0. } else { f64::from(most - least) / f64::from(most) }
    };
    picture.pixels().map(of).sum::<f64>() / picture.pixels().len().max(1) as f64
}

/// The share of pixels with a channel at 0 or 255: where light or shadow may have been cut off.
#[must_use]
pub fn clipped(picture: &RgbImage) -> f64 {
    let cut = picture.pixels().filter(|pixel| pixel.0.iter().any(|value| matches!(value, 0 | 255))).count();
    cut as f64 / picture.pixels().len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Limits, decode_picture};

    #[test]
    fn figures_are_those_of_scikit_image_and_scipy() {
        let read = |bytes| decode_picture(bytes, Limits::default()).unwrap();
        let pictures = [
            read(include_bytes!("../../tests/fixtures/sweep/a.png").as_slice()),
            read(include_bytes!("../../tests/fixtures/sweep/b.png").as_slice()),
        ];
        let expected: serde_json::Value = serde_json::from_str(include_str!("../../tests/fixtures/sweep/measure.json")).unwrap();
        let close = |name: &str, value: f64, expected: &serde_json::Value| {
            let expected = expected.as_f64().unwrap();
            assert!((value - expected).abs() <= 1e-9 * expected.abs().max(1.), "{name}: {value}, not {expected}");
        };
        let [a, b] = &pictures;
        close("ssim", ssim(a, b).unwrap(), &expected["ssim"]);
        close("distance", distance(a, b).unwrap(), &expected["distance"]);
        for (i, picture) in pictures.iter().enumerate() {
            close("sharpness", sharpness(picture), &expected["sharpness"][i]);
            close("saturation", saturation(picture), &expected["saturation"][i]);
            close("clipped", clipped(picture), &expected["clipped"][i]);
        }
    }

    #[test]
    fn what_cannot_be_compared_is_not() {
        let (a, b) = (RgbImage::new(16, 16), RgbImage::new(16, 32));
        assert_eq!((ssim(&a, &b), distance(&a, &b)), (None, None));
        assert_eq!(ssim(&RgbImage::new(6, 16), &RgbImage::new(6, 16)), None);
        assert_eq!((ssim(&a, &a), distance(&a, &a)), (Some(1.), Some(0.)));
        assert_eq!((sharpness(&RgbImage::new(2, 2)), saturation(&a), clipped(&a)), (0., 0., 1.));
    }
}
