//! The one EXIF block that pictures carry: `UserComment`, where A1111 and its readers keep the settings; `ImageDescription`, with
//! our JSON behind its name, as ComfyUI keeps its graphs in files that have no text chunks; and `Software`.
//!
//! Big-endian throughout. The comment's text is UTF-16 in the order of the block, as the standard asks; the readers that
//! ignore the block's order assume big-endian, so both agree.

use super::{JSON_KEY, Metadata};

const DESCRIPTION: u16 = 0x010e;
const SOFTWARE: u16 = 0x0131;
const EXIF_FOLDER: u16 = 0x8769;
const USER_COMMENT: u16 = 0x9286;

/// The 8 bytes that say that a comment is Unicode.
const UNICODE: &[u8; 8] = b"UNICODE\0";

const ASCII: u16 = 2;
const LONG: u16 = 4;
const UNDEFINED: u16 = 7;

const HEADER_BYTES: u32 = 8;
const ENTRY_BYTES: u32 = 12;

/// A TIFF block, without the `Exif\0\0` that a JPEG puts before it.
pub(super) fn write(metadata: &Metadata) -> Vec<u8> {
    let description = format!("{JSON_KEY}:{}\0", metadata.json);
    let software = format!("{}\0", metadata.software);
    let mut comment = UNICODE.to_vec();
    comment.extend(metadata.parameters.encode_utf16().flat_map(u16::to_be_bytes));

    // Header; folder 0 with three entries and its two texts; the EXIF folder with one entry and the comment.
    let description_at = HEADER_BYTES + folder_bytes(3);
    let software_at = description_at + description.len() as u32;
    // Folders begin at even offsets.
    let exif_at = (software_at + software.len() as u32).next_multiple_of(2);
    let comment_at = exif_at + folder_bytes(1);

    let mut block = b"MM\0*".to_vec();
    block.extend(HEADER_BYTES.to_be_bytes());
    block.extend(3u16.to_be_bytes());
    push_entry(&mut block, DESCRIPTION, ASCII, description.len() as u32, description_at);
    push_entry(&mut block, SOFTWARE, ASCII, software.len() as u32, software_at);
    push_entry(&mut block, EXIF_FOLDER, LONG, 1, exif_at);
    block.extend(0u32.to_be_bytes());
    block.extend(description.bytes());
    block.extend(software.bytes());
    block.resize(exif_at as usize, 0);
    block.extend(1u16.to_be_bytes());
    push_entry(&mut block, USER_COMMENT, UNDEFINED, comment.len() as u32, comment_at);
    block.extend(0u32.to_be_bytes());
    block.extend(comment);
    block
}

/// Count, entries, and where the next folder is.
fn folder_bytes(entries: u32) -> u32 {
    2 + entries * ENTRY_BYTES + 4
}

/// Every value here is longer than the four bytes that would be stored in place, so `at` is always an offset (or, for the
/// folder, a `LONG` that is the value itself).
fn push_entry(block: &mut Vec<u8>, tag: u16, kind: u16, count: u32, at: u32) {
    block.extend(tag.to_be_bytes());
    block.extend(kind.to_be_bytes());
    block.extend(count.to_be_bytes());
    block.extend(at.to_be_bytes());
}
