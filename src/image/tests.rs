use super::*;
use image::{DynamicImage, ImageFormat, Rgb, RgbImage, Rgba, RgbaImage};
use std::io::Cursor;

fn picture() -> RgbImage {
    RgbImage::from_fn(48, 32, |x, y| Rgb([(x * 5) as u8, (y * 7) as u8, 90]))
}

fn metadata() -> Metadata {
    let settings = [("Steps", "4".to_owned()), ("Seed", "7".to_owned()), ("Size", "48x32".to_owned())];
    Metadata::new("darkroom test", "a café, 猫 🙂", Some("blur"), &settings, r#"{"seed":7}"#.into())
}

/// Mean absolute difference of two pictures.
fn distance(a: &RgbImage, b: &RgbImage) -> f64 {
    assert_eq!(a.dimensions(), b.dimensions());
    let sum: f64 = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
    sum / a.as_raw().len() as f64
}

/// The comment and the description, found by walking the block as a reader does.
fn texts(block: &[u8]) -> (String, String) {
    assert_eq!(&block[..4], b"MM\0*");
    let short = |at: usize| u16::from_be_bytes([block[at], block[at + 1]]);
    let long = |at: usize| u32::from_be_bytes(block[at..at + 4].try_into().unwrap()) as usize;
    let find = |folder: usize, tag: u16| {
        let entries = (0..usize::from(short(folder))).map(|i| folder + 2 + 12 * i);
        entries.into_iter().find(|entry| short(*entry) == tag).unwrap()
    };
    let exif = long(find(long(4), 0x8769) + 8);
    assert_eq!(exif % 2, 0, "a folder begins at an even offset");
    let entry = find(exif, 0x9286);
    let (count, at) = (long(entry + 4), long(entry + 8));
    let comment = &block[at..at + count];
    assert_eq!(&comment[..8], b"UNICODE\0");
    let units: Vec<u16> = comment[8..].chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
    let entry = find(long(4), 0x010e);
    let (count, at) = (long(entry + 4), long(entry + 8));
    let description = String::from_utf8(block[at..at + count - 1].to_vec()).unwrap();
    assert_eq!(block[at + count - 1], 0);
    (String::from_utf16(&units).unwrap(), description)
}

#[test]
fn png_is_lossless_and_carries_both_texts() {
    let bytes = encode(&picture(), Format::Png, 0, Some(&metadata())).unwrap();
    assert_eq!(decode_picture(&bytes, Limits::default()).unwrap(), picture());
    let reader = png::Decoder::new(Cursor::new(&bytes)).read_info().unwrap();
    let texts: Vec<_> = reader.info().utf8_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.get_text().unwrap())).collect();
    assert_eq!(texts, [(PARAMETERS_KEY.to_owned(), metadata().parameters), (JSON_KEY.to_owned(), metadata().json)]);
}

#[test]
fn lossy_formats_come_back_close_and_carry_the_settings() {
    for format in [Format::Jpg, Format::Webp] {
        let bytes = encode(&picture(), format, 95, Some(&metadata())).unwrap();
        assert!(distance(&decode_picture(&bytes, Limits::default()).unwrap(), &picture()) < 6.0, "{format}");
        let at = bytes.windows(4).position(|window| window == b"MM\0*").unwrap();
        let expected = (metadata().parameters, format!("{JSON_KEY}:{}", metadata().json));
        assert_eq!(texts(&bytes[at..]), expected, "{format}");
        let mut decoder = image::ImageReader::new(Cursor::new(&bytes)).with_guessed_format().unwrap().into_decoder().unwrap();
        let exif = image::ImageDecoder::exif_metadata(&mut decoder).unwrap().expect("the decoder finds the block");
        assert_eq!(texts(&exif), expected, "{format}");
    }
}

#[test]
fn webp_is_really_lossy_and_quality_matters() {
    let size = |format, quality| encode(&picture(), format, quality, None).unwrap().len();
    assert!(size(Format::Webp, 10) < size(Format::Webp, 95));
    assert!(size(Format::Jpg, 10) < size(Format::Jpg, 95));
    let bytes = encode(&picture(), Format::Webp, 10, None).unwrap();
    assert_eq!(&bytes[12..16], b"VP8 ");
}

#[test]
fn without_metadata_nothing_is_written() {
    for format in Format::ALL {
        let bytes = encode(&picture(), format, 90, None).unwrap();
        let has = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        assert!(!has(b"parameters") && !has(b"darkroom") && !has(b"MM\0*") && !has(b"Exif"), "{format}");
    }
}

#[test]
fn pictures_are_turned_as_their_exif_says() {
    // Orientation 6: the camera was turned, the picture has to be rotated a quarter clockwise.
    let mut block = b"MM\0*\0\0\0\x08\0\x01".to_vec();
    block.extend([0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, 6, 0, 0]);
    block.extend([0; 4]);
    let mut bytes = Vec::new();
    let mut encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 95);
    image::ImageEncoder::set_exif_metadata(&mut encoder, block).unwrap();
    encoder.encode_image(&picture()).unwrap();
    let turned = decode_picture(&bytes, Limits::default()).unwrap();
    assert!(distance(&turned, &image::imageops::rotate90(&picture())) < 6.0);
}

#[test]
fn transparent_parts_are_white_in_a_picture_and_black_in_a_mask() {
    let see_through = RgbaImage::from_fn(8, 8, |x, _| if x < 4 { Rgba([10, 20, 30, 0]) } else { Rgba([255, 255, 255, 255]) });
    let mut bytes = Cursor::new(Vec::new());
    DynamicImage::ImageRgba8(see_through).write_to(&mut bytes, ImageFormat::Png).unwrap();
    let picture = decode_picture(bytes.get_ref(), Limits::default()).unwrap();
    assert_eq!(picture.get_pixel(0, 0).0, [255; 3]);
    let mask = decode_mask(bytes.get_ref(), Limits::default()).unwrap();
    assert_eq!((mask.get_pixel(0, 0).0, mask.get_pixel(7, 0).0), ([0], [255]));
}

#[test]
fn bad_files_are_named_for_what_they_are() {
    let limits = Limits::default();
    let message = |bytes: &[u8]| decode_picture(bytes, limits).unwrap_err().to_string();
    assert!(message(b"").contains("empty"));
    assert!(message(b"<html>").contains("web page"));
    assert!(message(b"GIF89a....").contains("GIF"));
    assert!(message(b"\0\0\0\x18ftypheic").contains("HEIC"));
    let whole = encode(&picture(), Format::Png, 0, None).unwrap();
    assert!(message(&whole[..whole.len() / 2]).contains("damaged"));
    let small = Limits { side: 40, ..limits };
    assert!(matches!(decode_picture(&whole, small), Err(Error::TooLarge { width: 48, height: 32, .. })));
    let tight = Limits { bytes: 100, ..limits };
    assert!(decode_picture(&whole, tight).is_err());
}

#[test]
fn formats_that_cannot_state_the_size_say_so() {
    let long = RgbImage::new(16_400, 1);
    let message = encode(&long, Format::Webp, 80, None).unwrap_err().to_string();
    assert!(message.contains("16383") && message.contains("16400"), "{message}");
    assert!(encode(&long, Format::Png, 80, None).is_ok());
}
