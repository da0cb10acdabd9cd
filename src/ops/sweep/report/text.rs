//! Words in pictures, in a font that is part of the program.

use std::sync::Once;

use ::image::RgbImage;
use plotters::backend::BitMapBackend;
use plotters::prelude::*;
use plotters::style::{FontDesc, FontTransform, TextStyle, register_font};
use plotters_backend::text_anchor::{HPos, Pos, VPos};

/// DejaVu Sans with Latin, Greek and Cyrillic letters; its licence lies beside it.
const FONT: &[u8] = include_bytes!("DejaVuSans.ttf");

pub(super) const FAMILY: &str = "sans-serif";

/// Before anything is drawn.
pub(super) fn ready() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let known = register_font(FAMILY, FontStyle::Normal, FONT);
        assert!(known.is_ok(), "the font is part of the program and was tried");
    });
}

fn font(size: f64) -> FontDesc<'static> {
    ready();
    FontDesc::new(FontFamily::SansSerif, size, FontStyle::Normal).transform(FontTransform::None)
}

/// In pixels.
pub(super) fn width(text: &str, size: f64) -> u32 {
    font(size).box_size(text).map_or(0, |(width, _)| width)
}

/// Lines of at most `widest` pixels, broken at spaces; what does not fit into `most` lines is left out, and seen to be.
pub(super) fn wrapped(text: &str, size: f64, widest: u32, most: usize) -> Vec<String> {
    let fits = |text: &str| width(text, size) <= widest;
    let cut = |text: &str| {
        let mut kept: Vec<char> = text.chars().collect();
        while kept.len() > 1 && !fits(&(kept.iter().collect::<String>() + "…")) {
            kept.pop();
        }
        kept.iter().collect::<String>() + "…"
    };
    let mut lines: Vec<String> = Vec::new();
    for word in plain(text).split_whitespace() {
        let longer = lines.last().map(|line| format!("{line} {word}"));
        match longer.filter(|longer| fits(longer)) {
            Some(longer) => *lines.last_mut().expect("there is a last line") = longer,
            None if lines.len() == most => {
                let last = lines.pop().unwrap_or_default();
                lines.push(cut(&format!("{last} {word}")));
                return lines;
            }
            None => lines.push(if fits(word) { word.to_owned() } else { cut(word) }),
        }
    }
    lines
}

/// Without what is no letter: control characters have no picture, and make an SVG no SVG.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || ('\u{fffe}'..='\u{ffff}').contains(&c) { ' ' } else { c }).collect()
}

/// Writes on a picture.
pub(super) struct Pen<'a> {
    backend: BitMapBackend<'a>,
}

impl<'a> Pen<'a> {
    pub(super) fn new(canvas: &'a mut RgbImage) -> Self {
        let size = canvas.dimensions();
        Self { backend: BitMapBackend::with_buffer(canvas, size) }
    }

    /// From this left upper corner on.
    pub(super) fn write(&mut self, text: &str, (x, y): (u32, u32), size: f64, color: &RGBColor) {
        if text.is_empty() {
            return;
        }
        let style = TextStyle::from(font(size)).color(color).pos(Pos::new(HPos::Left, VPos::Top));
        // Only what leaves the picture fails, and is not seen.
        let _ = self.backend.draw_text(text, &style, (x as i32, y as i32));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_labels_are_broken_and_cut() {
        let text = "a portrait of a person with long red hair and glasses, smiling, wearing a blue shirt";
        let lines = wrapped(text, 14., 120, 3);
        assert_eq!(lines.len(), 3);
        assert!(lines.iter().all(|line| width(line, 14.) <= 120), "{lines:?}");
        assert!(lines[2].ends_with('…'));
        assert_eq!(wrapped("3.5", 14., 120, 3), ["3.5"]);
        assert_eq!(wrapped("", 14., 120, 3), Vec::<String>::new());
        assert!(wrapped(&"x".repeat(500), 14., 120, 3)[0].ends_with('…'));
    }

    #[test]
    fn letters_leave_marks() {
        let mut canvas = RgbImage::from_pixel(80, 30, ::image::Rgb([255, 255, 255]));
        Pen::new(&mut canvas).write("Ωß→", (4, 4), 16., &BLACK);
        let dark = canvas.pixels().filter(|pixel| pixel[0] < 128).count();
        assert!(dark > 40, "{dark} dark pixels");
    }
}
