//! Picture files that people send, to pixels.

use std::io::Cursor;

use image::{DynamicImage, GrayImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Rgb, RgbImage};

use super::Error;

/// What a picture may cost to read. A file of a few kilobytes can state a size of gigapixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest side in pixels.
    pub side: u32,
    /// Memory for the decoded pixels, in bytes.
    pub bytes: u64,
}

impl Limits {
    /// For pictures that come over the network.
    pub const STRANGERS: Self = Self { side: 8192, bytes: 256 << 20 };
}

impl Default for Limits {
    fn default() -> Self {
        Self { side: 16_384, bytes: 1 << 30 }
    }
}

/// A PNG, JPEG or WebP file as it is meant to be seen: turned as its EXIF says, transparent parts on white.
pub fn decode_picture(bytes: &[u8], limits: Limits) -> Result<RgbImage, Error> {
    let picture = decode(bytes, limits)?;
    Ok(if picture.color().has_alpha() { over(&picture, 255) } else { picture.into_rgb8() })
}

/// A mask: white and black stay what they are, colours become their brightness, transparent parts count as black.
pub fn decode_mask(bytes: &[u8], limits: Limits) -> Result<GrayImage, Error> {
    let mask = decode(bytes, limits)?;
    let mask = if mask.color().has_alpha() { DynamicImage::ImageRgb8(over(&mask, 0)) } else { mask };
    Ok(mask.into_luma8())
}

/// A mask as some services have it, painted where it is transparent, as one of ours: a PNG that is white there. `None` if it has no
/// transparency, and so is one of ours already.
pub fn mask_of_alpha(bytes: &[u8], limits: Limits) -> Result<Option<Vec<u8>>, Error> {
    let mask = decode(bytes, limits)?;
    if !mask.color().has_alpha() {
        return Ok(None);
    }
    let mask = mask.to_rgba8();
    let painted = GrayImage::from_fn(mask.width(), mask.height(), |x, y| image::Luma([255 - mask.get_pixel(x, y).0[3]]));
    let mut file = Cursor::new(Vec::new());
    let failed = |e: ImageError| Error::Encode { format: super::Format::Png, reason: e.to_string() };
    painted.write_to(&mut file, ImageFormat::Png).map_err(failed)?;
    Ok(Some(file.into_inner()))
}

fn decode(bytes: &[u8], limits: Limits) -> Result<DynamicImage, Error> {
    let format = match image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) => format,
        _ => return Err(Error::NotAPicture { looks_like: describe(bytes).into() }),
    };
    let name = match format {
        ImageFormat::Png => "PNG",
        ImageFormat::Jpeg => "JPEG",
        _ => "WebP",
    };
    let damaged = |e: ImageError| Error::Damaged { format: name, reason: e.to_string() };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut bounds = image::Limits::default();
    bounds.max_alloc = Some(limits.bytes);
    reader.limits(bounds);
    let mut decoder = reader.into_decoder().map_err(damaged)?;
    let (width, height) = decoder.dimensions();
    if width.max(height) > limits.side || decoder.total_bytes() > limits.bytes {
        return Err(Error::TooLarge { width, height, limits });
    }
    let orientation = decoder.orientation().map_err(damaged)?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(damaged)?;
    picture.apply_orientation(orientation);
    Ok(picture)
}

/// The picture over a flat background of one grey.
fn over(picture: &DynamicImage, background: u8) -> RgbImage {
    let picture = picture.to_rgba8();
    let mix = |value: u8, alpha: u8| {
        let (value, alpha, background) = (u32::from(value), u32::from(alpha), u32::from(background));
        // Rounded; at most 255.
        ((value * alpha + background * (255 - alpha) + 127) / 255) as u8
    };
    let mut flat = RgbImage::new(picture.width(), picture.height());
    for (to, from) in flat.pixels_mut().zip(picture.pixels()) {
        let [r, g, b, alpha] = from.0;
        *to = Rgb([mix(r, alpha), mix(g, alpha), mix(b, alpha)]);
    }
    flat
}

/// What bytes that are no picture of ours look like.
fn describe(bytes: &[u8]) -> &'static str {
    let start = bytes.trim_ascii_start();
    let text = |prefix: &str| start.len() >= prefix.len() && start[..prefix.len()].eq_ignore_ascii_case(prefix.as_bytes());
    if bytes.is_empty() {
        "the file is empty"
    } else if text("<svg") || text("<?xml") {
        "an SVG or XML text"
    } else if text("<!doctype") || text("<html") {
        "a web page"
    } else if bytes.starts_with(b"GIF8") {
        "a GIF"
    } else if bytes.starts_with(b"BM") {
        "a BMP"
    } else if bytes.starts_with(b"II*\0") || bytes.starts_with(b"MM\0*") {
        "a TIFF or camera raw file"
    } else if bytes.get(4..8) == Some(b"ftyp") {
        "a HEIC, AVIF or video file"
    } else if bytes.starts_with(b"%PDF") {
        "a PDF"
    } else {
        "the first bytes are of no picture format"
    }
}
