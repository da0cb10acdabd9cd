//! Pixels to PNG, JPEG or WebP files.

use std::fmt;
use std::str::FromStr;

use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder, RgbImage};

use super::{Error, JSON_KEY, Metadata, PARAMETERS_KEY, exif};

/// Longest side that a JPEG (16-bit sizes) or a WebP (14-bit sizes) can state, in pixels.
const JPEG_SIDE: u32 = 65_535;
const WEBP_SIDE: u32 = 16_383;

/// Settings longer than this do not fit the 64 KiB segment that EXIF has in a JPEG.
const JPEG_EXIF_BYTES: usize = 65_533 - 6;

/// A file format that pictures are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Lossless.
    #[default]
    Png,
    /// Lossy.
    Jpg,
    /// Lossy.
    Webp,
}

impl Format {
    pub const ALL: [Self; 3] = [Self::Png, Self::Jpg, Self::Webp];

    /// The file extension, without the dot.
    #[must_use]
    pub fn extension(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpg => "jpg",
            Self::Webp => "webp",
        }
    }

    /// The format that an extension stands for.
    #[must_use]
    pub fn from_extension(extension: &str) -> Option<Self> {
        match extension.to_ascii_lowercase().as_str() {
            "png" => Some(Self::Png),
            "jpg" | "jpeg" => Some(Self::Jpg),
            "webp" => Some(Self::Webp),
            _ => None,
        }
    }

    /// Whether `quality` means anything.
    #[must_use]
    pub fn is_lossy(self) -> bool {
        !matches!(self, Self::Png)
    }

    /// Longest side in pixels.
    #[must_use]
    pub fn longest_side(self) -> u32 {
        match self {
            Self::Png => i32::MAX as u32,
            Self::Jpg => JPEG_SIDE,
            Self::Webp => WEBP_SIDE,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.extension())
    }
}

impl FromStr for Format {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::from_extension(text).ok_or(())
    }
}

/// The bytes of a picture file. `quality` is 0 (smallest) to 100 (best), read by the lossy formats only.
pub fn encode(picture: &RgbImage, format: Format, quality: u8, metadata: Option<&Metadata>) -> Result<Vec<u8>, Error> {
    let (width, height) = picture.dimensions();
    let limit = format.longest_side();
    if width > limit || height > limit {
        return Err(Error::TooLargeFor { format, limit, width, height });
    }
    match format {
        Format::Png => png(picture, metadata),
        Format::Jpg => jpeg(picture, quality, metadata),
        Format::Webp => webp(picture, quality, metadata),
    }
}

fn png(picture: &RgbImage, metadata: Option<&Metadata>) -> Result<Vec<u8>, Error> {
    let failed = |e: png::EncodingError| Error::Encode { format: Format::Png, reason: e.to_string() };
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, picture.width(), picture.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    if let Some(metadata) = metadata {
        // iTXt, the text chunk that is UTF-8; readers treat it as tEXt.
        encoder.add_itxt_chunk(PARAMETERS_KEY.into(), metadata.parameters.clone()).map_err(failed)?;
        encoder.add_itxt_chunk(JSON_KEY.into(), metadata.json.clone()).map_err(failed)?;
    }
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(picture.as_raw()).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(bytes)
}

fn jpeg(picture: &RgbImage, quality: u8, metadata: Option<&Metadata>) -> Result<Vec<u8>, Error> {
    let failed = |reason: String| Error::Encode { format: Format::Jpg, reason };
    let mut bytes = Vec::new();
    // The encoder's scale starts at 1.
    let mut encoder = JpegEncoder::new_with_quality(&mut bytes, quality.clamp(1, 100));
    if let Some(exif) = metadata.map(exif::write).filter(|exif| exif.len() <= JPEG_EXIF_BYTES) {
        encoder.set_exif_metadata(exif).map_err(|e| failed(e.to_string()))?;
    }
    let (width, height) = picture.dimensions();
    encoder.write_image(picture.as_raw(), width, height, ExtendedColorType::Rgb8).map_err(|e| failed(e.to_string()))?;
    Ok(bytes)
}

fn webp(picture: &RgbImage, quality: u8, metadata: Option<&Metadata>) -> Result<Vec<u8>, Error> {
    let failed = |reason: String| Error::Encode { format: Format::Webp, reason };
    let (width, height) = picture.dimensions();
    let encoder = webp::Encoder::from_rgb(picture.as_raw(), width, height);
    let simple = encoder.encode_simple(false, f32::from(quality.min(100))).map_err(|e| failed(format!("{e:?}")))?;
    match metadata {
        None => Ok(simple.to_vec()),
        Some(metadata) => extended_webp(&simple, width, height, &exif::write(metadata))
            .ok_or_else(|| failed("the encoder's file is not laid out as expected".into())),
    }
}

/// A plain WebP file (`RIFF size WEBP`, one picture chunk) as an extended one with an EXIF chunk.
/// The layout is that of the WebP container specification, RFC 9649 section 2.7.
fn extended_webp(simple: &[u8], width: u32, height: u32, exif: &[u8]) -> Option<Vec<u8>> {
    const HAS_EXIF: u8 = 0b0000_1000;
    let picture = simple.get(12..)?;
    if !simple.starts_with(b"RIFF") || simple.get(8..12)? != b"WEBP" || !picture.starts_with(b"VP8 ") {
        return None;
    }
    let mut header = [0; 10];
    header[0] = HAS_EXIF;
    header[4..7].copy_from_slice(&(width - 1).to_le_bytes()[..3]);
    header[7..10].copy_from_slice(&(height - 1).to_le_bytes()[..3]);

    let mut body = b"WEBP".to_vec();
    push_chunk(&mut body, *b"VP8X", &header)?;
    body.extend_from_slice(picture);
    push_chunk(&mut body, *b"EXIF", exif)?;
    let mut file = Vec::with_capacity(body.len() + 8);
    push_chunk(&mut file, *b"RIFF", &body)?;
    Some(file)
}

/// Name, length, bytes, and a zero if the length is odd.
fn push_chunk(file: &mut Vec<u8>, name: [u8; 4], bytes: &[u8]) -> Option<()> {
    file.extend_from_slice(&name);
    file.extend_from_slice(&u32::try_from(bytes.len()).ok()?.to_le_bytes());
    file.extend_from_slice(bytes);
    if bytes.len() % 2 == 1 {
        file.push(0);
    }
    Some(())
}
