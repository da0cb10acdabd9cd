//! What people look at: tables, contact sheets, plots, and one page that holds them all.

mod html;
mod layout;
mod plot;
mod sheet;
mod text;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use layout::Layout;

use super::metrics::{self, Better};
use super::results::{self, DENOISE, Results};
use super::{Axis, References, folder};
use crate::config::Config;
use crate::image::{self, Format};
use crate::ops::{Error, files, shown};

/// More sheets than this nobody looks at one by one; the page has them all.
const MOST_SHEETS: usize = 100;

/// Of the page and of sheets as files.
const SHEETS: &str = "sheets";
const PLOTS: &str = "plots";
const ENVIRONMENT: &str = "environment.json";

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct Written {
    #[serde(serialize_with = "shown::path")]
    pub html: PathBuf,
    pub rows: usize,
    #[serde(serialize_with = "shown::paths")]
    pub sheets: Vec<PathBuf>,
    #[serde(serialize_with = "shown::paths")]
    pub plots: Vec<PathBuf>,
}

/// Measures a run's pictures and writes everything that people look at.
pub(super) fn write(run: &Path, references: &References, layout: Layout, config: &Config) -> Result<Written, Error> {
    let mut results = Results::read(run)?;
    if results.rows.is_empty() {
        return Err(Error::Run {
            folder: run.into(),
            problem: "has no picture yet".into(),
            hint: "let the sweep make some first".into(),
        });
    }
    layout.check(&results.manifest.grid)?;
    references.keep(run)?;
    results.measure(run, &references.judges(&results, config)?)?;
    results.write(run)?;
    let sheets = layout.sheets(&results);
    let mut notes = results.manifest.remarks.clone();
    notes.extend(notes_of(&results, sheets.len()));
    let written = draw(run, &results, &sheets)?;
    let plots = plots(&results);
    clear(&run.join(PLOTS))?;
    let mut drawn = Vec::new();
    for plot in &plots {
        let path = run.join(PLOTS).join(format!("{}.svg", plot.name));
        files::write(&path, true, plot.svg.as_bytes())?;
        drawn.push(path);
    }
    let html = html::write(run, &results, &sheets, &plots, &environment(run), &notes)?;
    Ok(Written { html, rows: results.rows.len(), sheets: written, plots: drawn })
}

/// The contact sheets as files.
fn draw(run: &Path, results: &Results, sheets: &[layout::Sheet]) -> Result<Vec<PathBuf>, Error> {
    let title = html::title(results);
    let mut written = Vec::new();
    clear(&run.join(SHEETS))?;
    for (i, sheet) in sheets.iter().take(MOST_SHEETS).enumerate() {
        let title = if sheet.title.is_empty() { title.clone() } else { format!("{title} · {}", sheet.title) };
        let drawn = sheet::draw(sheet, &title, |row| metrics::read(run, &results.rows[row].key))?;
        let path = run.join(SHEETS).join(format!("sheet-{:03}.png", i + 1));
        files::write(&path, true, &image::encode(&drawn, Format::Png, 100, None)?)?;
        written.push(path);
    }
    Ok(written)
}

/// The contact sheets alone, anew.
pub fn sheets(run: &Path, layout: &Layout) -> Result<Vec<PathBuf>, Error> {
    let results = Results::read(run)?;
    layout.check(&results.manifest.grid)?;
    draw(run, &results, &layout.sheets(&results))
}

/// Keeps what the pictures were made with; what was kept by an earlier part of the run stays beside it.
pub(super) fn keep_environment(run: &Path, found: &BTreeMap<String, String>) -> Result<(), Error> {
    let mut all = environment(run);
    for (name, value) in found {
        let entry = all.entry(name.clone()).or_default();
        if !entry.split("; ").any(|has| has == value) {
            *entry = if entry.is_empty() { value.clone() } else { format!("{entry}; {value}") };
        }
    }
    files::write(&run.join(ENVIRONMENT), true, &serde_json::to_vec_pretty(&all).expect("texts"))
}

fn environment(run: &Path) -> BTreeMap<String, String> {
    fs::read(run.join(ENVIRONMENT)).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

/// An empty folder: what an earlier grid left would mislead.
fn clear(folder: &Path) -> Result<(), Error> {
    let failed = |source| Error::Write { path: folder.into(), source };
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    fs::create_dir_all(folder).map_err(failed)
}

fn notes_of(results: &Results, sheets: usize) -> Vec<String> {
    let manifest = &results.manifest;
    let (have, all) = (results.rows.len(), manifest.cells.len());
    let mut notes = Vec::new();
    if have < all {
        notes.push(format!("{have} of {all} pictures are made; the same command goes on."));
    }
    if sheets > MOST_SHEETS {
        notes.push(format!("{MOST_SHEETS} of {sheets} sheets were written as files."));
    }
    let repeats = if manifest.repeats > 1 { format!(", medians of {} repeats", manifest.repeats) } else { String::new() };
    notes.push(format!(
        "Times are wall clock of each stage with the device synchronised, without loading and after a warm-up{repeats}."
    ));
    notes.push(
        "Means are over seeds, of each seed the mean of its pictures; intervals are 95 % bootstrap intervals of the mean.".into(),
    );
    notes
}

fn plots(results: &Results) -> Vec<plot::Plot> {
    let grid = &results.manifest.grid;
    let mut found = Vec::new();
    let along = |axis: Axis, figure: &str, shown: &str| {
        let values = grid.values(axis).unwrap_or_default();
        let points: Vec<plot::At> = values
            .iter()
            .enumerate()
            .filter_map(|(place, value)| {
                Some(plot::At { label: value.to_string(), x: value.as_number(), summary: results.summary(axis, place, figure)? })
            })
            .collect();
        let title = format!("{shown} against {axis}");
        (points.len() > 1).then(|| plot::along(&format!("{figure}-{axis}"), &title, axis.name(), shown, &points)).flatten()
    };
    let varied: Vec<Axis> = grid.varied().map(|(axis, _)| axis).filter(|axis| !axis.is_chance()).collect();
    if varied.contains(&Axis::Steps) {
        found.extend(along(Axis::Steps, DENOISE, "seconds of denoising"));
    }
    for metric in &results.metrics {
        found.extend(varied.iter().filter_map(|axis| along(*axis, metric.name, metric.name)));
    }
    for metric in results.metrics.iter().filter(|metric| metric.better.is_some()) {
        let of = |setting: results::Setting| plot::Setting {
            seconds: setting.mean(DENOISE),
            quality: setting.mean(metric.name),
            label: setting.name,
        };
        let settings: Vec<_> = results.settings(metric.name).into_iter().map(of).collect();
        if settings.len() > 1 {
            let title = format!("{} against time", metric.name);
            found.extend(plot::pareto(&title, metric.name, metric.better == Some(Better::Higher), &settings));
        }
    }
    found
}

/// As `darkroom sweep report` does it.
pub fn report(run: &Path, references: &References, layout: &Layout, config: &Config) -> Result<Written, Error> {
    Results::read(run)?;
    let _lock = folder::lock(run)?;
    let references = if references.is_empty() { References::kept(run) } else { references.clone() };
    references.check(config)?;
    write(run, &references, *layout, config)
}
