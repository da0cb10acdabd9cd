//! Sizes in pixels: the ratios that clients know, and what a width or height may be.

use std::fmt;
use std::str::FromStr;

use super::Error;

/// Both sides are multiples of this: the autoencoder shrinks by 8, the transformer reads 2 x 2 patches.
pub(crate) const SIDE_MULTIPLE: usize = 16;

/// Longest side in pixels; far beyond what a transformer can attend to.
const LONGEST_SIDE: usize = 65_536;

/// Area of the table's sizes, about, in pixels.
const MEGAPIXEL: usize = 1024 * 1024;

/// Width to height.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AspectRatio {
    pub name: &'static str,
    width: usize,
    height: usize,
    /// The exact size at one megapixel.
    megapixel: (usize, usize),
}

const fn ratio(name: &'static str, width: usize, height: usize, megapixel: (usize, usize)) -> AspectRatio {
    AspectRatio { name, width, height, megapixel }
}

impl AspectRatio {
    /// The ratios and sizes of the public FLUX.1 services.
    pub const ALL: [Self; 11] = [
        ratio("1:1", 1, 1, (1024, 1024)),
        ratio("16:9", 16, 9, (1344, 768)),
        ratio("21:9", 21, 9, (1536, 640)),
        ratio("3:2", 3, 2, (1216, 832)),
        ratio("2:3", 2, 3, (832, 1216)),
        ratio("4:5", 4, 5, (896, 1088)),
        ratio("5:4", 5, 4, (1088, 896)),
        ratio("3:4", 3, 4, (896, 1152)),
        ratio("4:3", 4, 3, (1152, 896)),
        ratio("9:16", 9, 16, (768, 1344)),
        ratio("9:21", 9, 21, (640, 1536)),
    ];

    /// Width and height. `native` is the model's own size in pixels: a model of one megapixel gets the sizes of the table, a
    /// smaller one sizes of its own area.
    pub(crate) fn size(self, megapixels: Megapixels, native: (usize, usize)) -> (usize, usize) {
        let area = native.0 * native.1;
        let (width, height) = if area == MEGAPIXEL { self.megapixel } else { self.of_area(area) };
        match megapixels {
            Megapixels::One => (width, height),
            Megapixels::Quarter if area == MEGAPIXEL => (width / 2, height / 2),
            Megapixels::Quarter => (multiple(width as f64 / 2.0), multiple(height as f64 / 2.0)),
        }
    }

    fn of_area(self, area: usize) -> (usize, usize) {
        of_area((self.width, self.height), area)
    }
}

/// About `area` pixels in the ratio of `width` to `height`.
fn of_area((width, height): (usize, usize), area: usize) -> (usize, usize) {
    let high = (area as f64 * height as f64 / width as f64).sqrt();
    (multiple(area as f64 / high), multiple(high))
}

/// A model's own area in the ratio of a size that is meant for another.
pub(crate) fn near(wanted: (usize, usize), native: (usize, usize)) -> (usize, usize) {
    of_area(wanted, native.0 * native.1)
}

impl fmt::Display for AspectRatio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl FromStr for AspectRatio {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<_> = Self::ALL.iter().map(|ratio| ratio.name).collect();
        let found = Self::ALL.into_iter().find(|ratio| ratio.name == text);
        found.ok_or_else(|| format!("must be one of {}", names.join(", ")))
    }
}

/// How many pixels an aspect ratio is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Megapixels {
    #[default]
    One,
    /// Half of each side.
    Quarter,
}

impl FromStr for Megapixels {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "1" => Ok(Self::One),
            "0.25" => Ok(Self::Quarter),
            _ => Err("must be 1 or 0.25".into()),
        }
    }
}

/// The nearest multiple of 16, at least 16.
fn multiple(side: f64) -> usize {
    ((side / SIDE_MULTIPLE as f64).round() as usize).max(1) * SIDE_MULTIPLE
}

/// A width or height as it may be.
pub(crate) fn side(field: &'static str, value: usize) -> Result<usize, Error> {
    let allowed = format!("a multiple of {SIDE_MULTIPLE} from {SIDE_MULTIPLE} to {LONGEST_SIDE}");
    if value > 0 && value <= LONGEST_SIDE && value.is_multiple_of(SIDE_MULTIPLE) {
        return Ok(value);
    }
    let below = (value / SIDE_MULTIPLE * SIDE_MULTIPLE).min(LONGEST_SIDE);
    let hint = match below {
        0 => format!("; the nearest is {SIDE_MULTIPLE}"),
        LONGEST_SIDE => format!("; the nearest is {LONGEST_SIDE}"),
        _ => {
            let above = below + SIDE_MULTIPLE;
            let (nearest, other) = if value - below <= above - value { (below, above) } else { (above, below) };
            format!("; the nearest is {nearest}, then {other}")
        }
    };
    Err(Error::Invalid { field, value: value.to_string(), allowed, hint })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLUX: (usize, usize) = (1024, 1024);

    #[test]
    fn flux_sizes_are_those_of_the_public_services() {
        let size = |name: &str, megapixels| name.parse::<AspectRatio>().unwrap().size(megapixels, FLUX);
        assert_eq!(size("16:9", Megapixels::One), (1344, 768));
        assert_eq!(size("16:9", Megapixels::Quarter), (672, 384));
        assert_eq!(size("9:21", Megapixels::One), (640, 1536));
        assert_eq!(size("3:2", Megapixels::Quarter), (608, 416));
        assert_eq!(size("5:4", Megapixels::Quarter), (544, 448));
        for ratio in AspectRatio::ALL {
            for megapixels in [Megapixels::One, Megapixels::Quarter] {
                let (width, height) = ratio.size(megapixels, FLUX);
                assert!(width % 16 == 0 && height % 16 == 0, "{ratio} {width} x {height}");
                let error = (width as f64 / height as f64) / (ratio.width as f64 / ratio.height as f64);
                assert!((0.95..1.06).contains(&error), "{ratio} {width} x {height}");
            }
        }
    }

    #[test]
    fn small_models_keep_their_own_area() {
        for ratio in AspectRatio::ALL {
            let (width, height) = ratio.size(Megapixels::One, (128, 128));
            assert!(width % 16 == 0 && height % 16 == 0, "{ratio}");
            let area = (width * height) as f64 / (128.0 * 128.0);
            assert!((0.85..1.2).contains(&area), "{ratio} {width} x {height}");
        }
        assert_eq!(AspectRatio::ALL[0].size(Megapixels::One, (128, 128)), (128, 128));
        assert_eq!(AspectRatio::ALL[0].size(Megapixels::Quarter, (128, 128)), (64, 64));
    }

    #[test]
    fn wrong_sides_name_the_nearest() {
        let message = |value| side("width", value).unwrap_err().to_string();
        assert!(message(100).contains("nearest is 96, then 112"), "{}", message(100));
        assert!(message(111).contains("nearest is 112, then 96"), "{}", message(111));
        assert!(message(0).contains("nearest is 16"), "{}", message(0));
        assert!(message(7).contains("nearest is 16"), "{}", message(7));
        assert!(message(1_000_000).contains("nearest is 65536"), "{}", message(1_000_000));
        assert_eq!(side("width", 1024).unwrap(), 1024);
    }
}
