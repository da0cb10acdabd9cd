//! A contact sheet as one picture: labelled rows and columns.

use ::image::imageops::{self, FilterType};
use ::image::{Rgb, RgbImage};
use plotters::prelude::*;

use super::layout::{Edge, Sheet};
use super::text;

/// Longest side of a sheet in pixels, unless its labels alone need more.
const LONGEST: u32 = 8192;
/// Smallest picture in a sheet, longer side.
const SMALLEST: u32 = 48;
/// Narrower columns leave no room for a label.
const NARROWEST: u32 = 96;
const GAP: u32 = 4;
const MARGIN: u32 = 12;
const PAPER: Rgb<u8> = Rgb([250, 250, 249]);
const EMPTY: Rgb<u8> = Rgb([228, 228, 226]);
const INK: RGBColor = RGBColor(28, 28, 30);
const FAINT: RGBColor = RGBColor(110, 110, 115);
/// Lines of a column's label, and widest row label in pixels.
const LINES: usize = 3;
const WIDEST_LABEL: u32 = 260;

/// Draws the sheet. `picture` gives the picture of a row; all are about of one size.
pub(super) fn draw(
    sheet: &Sheet,
    title: &str,
    mut picture: impl FnMut(usize) -> Result<RgbImage, crate::ops::Error>,
) -> Result<RgbImage, crate::ops::Error> {
    let (rows, columns) = (sheet.rows.values.len() as u32, sheet.columns.values.len() as u32);
    let mut pictures = Vec::new();
    let (mut width, mut height) = (1, 1);
    for cell in sheet.cells.iter().flatten() {
        pictures.push(match cell {
            None => None,
            Some(row) => {
                let mut found = picture(*row)?;
                // Never more of them in memory than the sheet will show.
                let most = (LONGEST / rows.max(columns)).max(SMALLEST);
                let longer = found.width().max(found.height());
                if longer > most {
                    let side = |side: u32| (side * most / longer).max(1);
                    found = imageops::resize(&found, side(found.width()), side(found.height()), FilterType::Lanczos3);
                }
                (width, height) = (width.max(found.width()), height.max(found.height()));
                Some(found)
            }
        });
    }
    let size = (f64::from(width) / 12.).clamp(13., 28.);
    let line = (size * 1.35) as u32;
    let cell = width.max(NARROWEST);
    let labels: Vec<Vec<String>> = sheet.columns.values.iter().map(|value| text::wrapped(value, size, cell - 8, LINES)).collect();
    let lines = labels.iter().map(Vec::len).max().unwrap_or(0) as u32;
    let row_labels: Vec<Vec<String>> =
        sheet.rows.values.iter().map(|value| text::wrapped(value, size, WIDEST_LABEL, (height / line).max(1) as usize)).collect();
    let widest = row_labels.iter().flatten().map(|text| text::width(text, size)).max().unwrap_or(0);
    let corner = corner(&sheet.rows, &sheet.columns);
    let left = MARGIN + widest.max(text::width(&corner, size * 0.8).min(WIDEST_LABEL)) + MARGIN;
    let total_width = (left + columns * (cell + GAP) + MARGIN).max(left + MARGIN + 200);
    let titles = text::wrapped(title, size, total_width - 2 * MARGIN, 4);
    let head = MARGIN + titles.len() as u32 * line + line / 2;
    let top = head + lines.max(1) * line + GAP;
    let mut canvas = RgbImage::from_pixel(total_width, top + rows * (height + GAP) + MARGIN, PAPER);

    let place = |i: usize| {
        let (row, column) = (i as u32 / columns, i as u32 % columns);
        (left + column * (cell + GAP), top + row * (height + GAP))
    };
    for (i, found) in pictures.iter().enumerate() {
        let (x, y) = place(i);
        match found {
            Some(found) => {
                let (dx, dy) = ((cell - found.width()) / 2, (height - found.height()) / 2);
                imageops::replace(&mut canvas, found, i64::from(x + dx), i64::from(y + dy));
            }
            None => imageops::replace(&mut canvas, &RgbImage::from_pixel(cell, height, EMPTY), i64::from(x), i64::from(y)),
        }
    }
    let mut pen = text::Pen::new(&mut canvas);
    for (i, text) in titles.iter().enumerate() {
        pen.write(text, (MARGIN, MARGIN + i as u32 * line), size, &INK);
    }
    pen.write(&corner, (MARGIN, top - line), size * 0.8, &FAINT);
    for (i, lines) in labels.iter().enumerate() {
        for (j, text) in lines.iter().enumerate() {
            let x = place(i).0 + (cell.saturating_sub(text::width(text, size))) / 2;
            pen.write(text, (x, top - GAP - (lines.len() - j) as u32 * line), size, &INK);
        }
    }
    for (i, lines) in row_labels.iter().enumerate() {
        let y = place(i * columns as usize).1 + (height.saturating_sub(lines.len() as u32 * line)) / 2;
        for (j, text) in lines.iter().enumerate() {
            let x = left - MARGIN - text::width(text, size);
            pen.write(text, (x, y + j as u32 * line), size, &INK);
        }
    }
    drop(pen);
    Ok(canvas)
}

/// Which axis is which.
fn corner(rows: &Edge, columns: &Edge) -> String {
    let name = |edge: &Edge, arrow| edge.axis.map(|axis| format!("{axis} {arrow}"));
    [name(rows, '↓'), name(columns, '→')].into_iter().flatten().collect::<Vec<_>>().join("  ")
}
