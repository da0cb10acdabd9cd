//! Figures as curves: SVG, so that they stay sharp in a paper.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::text;
use crate::ops::sweep::Summary;

const SIZE: (u32, u32) = (520, 340);
const INK: RGBColor = RGBColor(40, 40, 44);
const GRID: RGBColor = RGBColor(225, 225, 228);
/// Told apart by people who see few colours (Okabe and Ito 2008).
const COLORS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];
const SMALL: f64 = 12.;
/// Longest label at a tick, in pixels.
const WIDEST_TICK: u32 = 110;
/// Labels nearer than this to one another, across and down, are in each other's way, in pixels.
const ROOM: (i32, i32) = (150, 14);

/// A plot and what is in it.
#[derive(Debug, Clone)]
pub(super) struct Plot {
    /// A file's name, without its ending.
    pub(super) name: String,
    pub(super) title: String,
    pub(super) svg: String,
}

/// A value of an axis with what was measured there.
pub(super) struct At {
    pub(super) label: String,
    /// For axes of numbers.
    pub(super) x: Option<f64>,
    pub(super) summary: Summary,
}

/// Means with their intervals along an axis.
pub(super) fn along(name: &str, title: &str, axis: &str, figure: &str, points: &[At]) -> Option<Plot> {
    // Numbers lie where they are, everything else side by side.
    let numeric = points.iter().all(|point| point.x.is_some());
    let x_of = |i: usize, point: &At| point.x.filter(|_| numeric).unwrap_or(i as f64);
    let placed: Vec<(f64, &At)> = points.iter().enumerate().map(|(i, point)| (x_of(i, point), point)).collect();
    let x = spread(placed.iter().map(|(x, _)| *x))?;
    let y = spread(points.iter().flat_map(|point| {
        let (low, high) = point.summary.interval.unwrap_or((point.summary.mean, point.summary.mean));
        [low, high, point.summary.mean]
    }))?;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = chart(&root, title, x, y)?;
        let ticks: Vec<(f64, String)> =
            placed.iter().map(|(x, point)| (*x, text::wrapped(&point.label, SMALL, WIDEST_TICK, 1).concat())).collect();
        let label = |x: &f64| {
            if numeric {
                return format!("{}", (x * 1000.).round() / 1000.);
            }
            ticks.iter().find(|(at, _)| (at - x).abs() < 1e-9).map_or_else(String::new, |(_, label)| label.clone())
        };
        mesh(&mut chart, axis, figure, &label, if numeric { 8 } else { 2 * points.len() })?;
        let color = COLORS[0];
        if numeric {
            let mut line: Vec<(f64, f64)> = placed.iter().map(|(x, point)| (*x, point.summary.mean)).collect();
            line.sort_by(|a, b| a.0.total_cmp(&b.0));
            chart.draw_series(LineSeries::new(line, color.stroke_width(2))).ok()?;
        }
        let whiskers = placed.iter().filter_map(|(x, point)| {
            let (low, high) = point.summary.interval?;
            Some(ErrorBar::new_vertical(*x, low, point.summary.mean, high, color.filled(), 8))
        });
        chart.draw_series(whiskers).ok()?;
        chart.draw_series(placed.iter().map(|(x, point)| Circle::new((*x, point.summary.mean), 4, color.filled()))).ok()?;
        root.present().ok()?;
    }
    Some(Plot { name: name.into(), title: title.into(), svg })
}

/// A setting's cost and worth.
pub(super) struct Setting {
    pub(super) label: String,
    pub(super) seconds: f64,
    pub(super) quality: f64,
}

/// All settings by cost and worth; those that no other beats in both are joined and named.
pub(super) fn pareto(title: &str, figure: &str, higher: bool, settings: &[Setting]) -> Option<Plot> {
    let x = spread(settings.iter().map(|setting| setting.seconds))?;
    let y = spread(settings.iter().map(|setting| setting.quality))?;
    let mut sorted: Vec<&Setting> = settings.iter().collect();
    let worth = |setting: &Setting| if higher { setting.quality } else { -setting.quality };
    sorted.sort_by(|a, b| a.seconds.total_cmp(&b.seconds).then(worth(b).total_cmp(&worth(a))));
    let mut front: Vec<&Setting> = Vec::new();
    for setting in &sorted {
        if front.last().is_none_or(|last| worth(setting) > worth(last)) {
            front.push(setting);
        }
    }
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = chart(&root, title, x, y)?;
        mesh(&mut chart, "seconds a picture", figure, &|x| format!("{}", (x * 1000.).round() / 1000.), 8)?;
        let faint = COLORS[0].mix(0.35);
        chart.draw_series(settings.iter().map(|s| Circle::new((s.seconds, s.quality), 4, faint.filled()))).ok()?;
        let line = front.iter().map(|s| (s.seconds, s.quality));
        chart.draw_series(LineSeries::new(line, COLORS[1].stroke_width(2))).ok()?;
        chart.draw_series(front.iter().map(|s| Circle::new((s.seconds, s.quality), 4, COLORS[1].filled()))).ok()?;
        // Labels away from the edge that they are near; none where it would cover the one before.
        let middle = f64::midpoint(x.0, x.1);
        let mut last: Option<(i32, i32)> = None;
        for setting in &front {
            let at = chart.backend_coord(&(setting.seconds, setting.quality));
            if last.is_some_and(|last| (at.1 - last.1).abs() < ROOM.1 && (at.0 - last.0).abs() < ROOM.0) {
                continue;
            }
            last = Some(at);
            let (side, shift) = if setting.seconds > middle { (HPos::Right, -7) } else { (HPos::Left, 7) };
            let style = TextStyle::from((text::FAMILY, SMALL - 1.).into_font()).color(&INK).pos(Pos::new(side, VPos::Bottom));
            let at =
                EmptyElement::at((setting.seconds, setting.quality)) + Text::new(text::plain(&setting.label), (shift, -5), style);
            chart.draw_series(std::iter::once(at)).ok()?;
        }
        root.present().ok()?;
    }
    Some(Plot { name: format!("pareto-{figure}"), title: title.into(), svg })
}

type Chart<'a, 'b> =
    ChartContext<'a, SVGBackend<'b>, Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>>;

fn chart<'a, 'b>(
    root: &'a DrawingArea<SVGBackend<'b>, Shift>,
    title: &str,
    x: (f64, f64),
    y: (f64, f64),
) -> Option<Chart<'a, 'b>> {
    text::ready();
    root.fill(&WHITE).ok()?;
    let built = ChartBuilder::on(root)
        .caption(text::plain(title), (text::FAMILY, 15).into_font().color(&INK))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(62)
        .build_cartesian_2d(x.0..x.1, y.0..y.1);
    built.ok()
}

fn mesh(chart: &mut Chart<'_, '_>, x: &str, y: &str, label: &dyn Fn(&f64) -> String, ticks: usize) -> Option<()> {
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc(y)
        .x_labels(ticks)
        .y_labels(6)
        .x_label_formatter(&|value| label(value))
        .y_label_formatter(&|value| number(*value))
        .label_style((text::FAMILY, SMALL).into_font().color(&INK))
        .axis_desc_style((text::FAMILY, SMALL).into_font().color(&INK))
        .axis_style(GRID)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .draw()
        .ok()
}

/// Four digits that count.
fn number(value: f64) -> String {
    let digits = if value == 0. { 0 } else { (3 - value.abs().log10().floor() as i32).clamp(0, 6) };
    let text = format!("{value:.*}", digits as usize);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// The range of values with some room around; `None` of nothing.
fn spread(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return None;
    }
    let room = if high > low { (high - low) * 0.08 } else { low.abs().max(1.) * 0.1 };
    Some((low - room, high + room))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_room_and_numbers_few_digits() {
        assert_eq!(spread([1., f64::NAN, 2.].into_iter()), Some((0.92, 2.08)));
        assert_eq!(spread(std::iter::empty()), None);
        assert_eq!([0., 0.5, 1234.6, 0.012_345, 3.].map(number), ["0", "0.5", "1235", "0.01235", "3"]);
    }

    #[test]
    fn the_front_holds_what_nothing_beats() {
        let setting = |label: &str, seconds, quality| Setting { label: label.into(), seconds, quality };
        let settings = [setting("slow", 4., 0.9), setting("bad", 3., 0.4), setting("fast", 1., 0.5)];
        let plot = pareto("worth", "ssim", true, &settings).unwrap();
        assert!(plot.svg.contains("slow") && plot.svg.contains("fast") && !plot.svg.contains("bad"), "{}", plot.svg);
    }
}
