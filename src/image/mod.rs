//! Picture files: pixels and settings to bytes, and bytes that strangers send to pixels.
//!
//! Knows nothing of models or requests. Encoding is exact about what it writes into the file ([`Metadata`]); decoding goes by
//! content, never by name, and is bounded.

mod decode;
mod encode;
mod exif;
pub mod measure;
mod metadata;
#[cfg(test)]
mod tests;

pub use decode::{Limits, decode_mask, decode_picture, mask_of_alpha};
pub use encode::{Format, encode};
pub use metadata::{JSON_KEY, Metadata, PARAMETERS_KEY};

/// Why a picture could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("not a picture that can be read: {looks_like}; send a PNG, JPEG or WebP file")]
    NotAPicture { looks_like: String },
    #[error("the picture is {width} x {height} pixels; at most {} x {} can be read", limits.side, limits.side)]
    TooLarge { width: u32, height: u32, limits: Limits },
    #[error("the {format} picture is damaged: {reason}; send it again")]
    Damaged { format: &'static str, reason: String },
    #[error("{format} holds at most {limit} pixels a side, this picture is {width} x {height}; use png")]
    TooLargeFor { format: Format, limit: u32, width: u32, height: u32 },
    #[error("the picture could not be written as {format}: {reason}")]
    Encode { format: Format, reason: String },
}
