//! One page with everything in it, which opens from the disk without a network.

use std::collections::BTreeMap;
use std::path::Path;

use ::image::RgbImage;
use ::image::imageops::{self, FilterType};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value as Json, json};

use super::super::results::{DENOISE, Results, SPREAD, TOTAL};
use super::super::{Axis, folder, metrics};
use super::layout::{Edge, Sheet};
use super::plot::Plot;
use crate::image::{self, Format};
use crate::ops::{Error, files};

const TEMPLATE: &str = include_str!("report.html");

/// Longer side of the small pictures, in pixels.
const THUMB: u32 = 256;
const THUMB_QUALITY: u8 = 82;

/// Pictures of up to this many bytes in all are put into the page; more stay beside it.
const MOST_INSIDE: u64 = 24_000_000;

/// 2^53: whole numbers up to here are exact in JavaScript.
const LARGEST: u64 = 1 << 53;

/// Settings that are shown as columns, if they are not the same in all rows.
const HELP: [(Axis, &str); 13] = [
    (Axis::Model, "Base model"),
    (Axis::Dtype, "Number format of the computation"),
    (Axis::Lora, "LoRAs on the weights"),
    (Axis::LoraScale, "Factor on the LoRAs' scales"),
    (Axis::TriggerPolicy, "Where the trigger word stands"),
    (Axis::Prompt, "What was asked for"),
    (Axis::Width, "Pixels"),
    (Axis::Height, "Pixels"),
    (Axis::Strength, "How much of the given picture is painted anew"),
    (Axis::TrueCfg, "Classifier-free guidance, 1 is off"),
    (Axis::Guidance, "Distilled guidance"),
    (Axis::Steps, "Denoising steps"),
    (Axis::Seed, "Of the noise"),
];

pub(super) fn write(
    run: &Path,
    results: &Results,
    sheets: &[Sheet],
    plots: &[Plot],
    environment: &BTreeMap<String, String>,
    notes: &[String],
) -> Result<std::path::PathBuf, Error> {
    let size = |key: &str| std::fs::metadata(run.join(folder::picture(key))).map_or(0, |meta| meta.len());
    let inside = results.rows.iter().map(|row| size(&row.key)).sum::<u64>() <= MOST_INSIDE;
    let grid = &results.manifest.grid;
    let mut columns: Vec<Json> = Vec::new();
    for (axis, _) in &grid.axes {
        let help = HELP.iter().find(|(has, _)| has == axis).map_or("", |(_, help)| *help);
        columns.push(json!({ "name": axis, "kind": "axis", "unit": null, "help": help, "better": null }));
    }
    for metric in &results.metrics {
        columns
            .push(json!({ "name": metric.name, "kind": "metric", "unit": null, "help": metric.help, "better": metric.better }));
    }
    for (name, help) in [(DENOISE, "Time of all steps"), (TOTAL, "With the LoRA switch, the text encoders and the autoencoder")] {
        let name = name.trim_end_matches("_s");
        columns.push(json!({ "name": name, "kind": "time", "unit": "s", "help": help, "better": "lower" }));
    }
    let repeated = results.manifest.repeats > 1;
    if repeated {
        let help = "Of the repeats: slowest less fastest, as a share of their median";
        columns.push(json!({ "name": "denoise spread", "kind": "time", "unit": null, "help": help, "better": "lower" }));
    }
    columns.push(
        json!({ "name": "peak memory", "kind": "other", "unit": "MB", "help": "Resident memory of the process", "better": null }),
    );
    let mut rows = Vec::new();
    for row in &results.rows {
        let picture = metrics::read(run, &row.key)?;
        let mut values: Vec<Json> = row.values.iter().map(|(axis, value)| exact(*axis, results)(value)).collect();
        values.extend(results.metrics.iter().map(|metric| json!(row.metrics.get(metric.name))));
        values.extend([DENOISE, TOTAL].map(|name| json!(row.figure(name))));
        values.extend(repeated.then(|| json!(row.figure(SPREAD))));
        values.push(json!(row.made.peak_memory_bytes.map(|bytes| bytes / 1_000_000)));
        let name = folder::picture(&row.key);
        let source = if inside {
            let bytes = std::fs::read(run.join(&name)).map_err(|source| Error::UnreadableFile {
                field: "picture",
                path: run.join(&name),
                source,
            })?;
            format!("data:image/png;base64,{}", STANDARD.encode(bytes))
        } else {
            name
        };
        rows.push(json!({
            "id": row.key,
            "values": values,
            "picture": source,
            "thumb": thumb(&picture)?,
            "width": picture.width(),
            "height": picture.height(),
            "command": row.command,
        }));
    }
    let manifest = &results.manifest;
    let title = title(results);
    let data = json!({
        "title": title,
        "made": manifest.made,
        "command": manifest.command,
        "environment": environment,
        "notes": notes,
        "columns": columns,
        "rows": rows,
        "sheets": sheets.iter().map(sheet).collect::<Vec<_>>(),
        "plots": plots.iter().map(|plot| json!({ "title": plot.title, "svg": plot.svg })).collect::<Vec<_>>(),
        "summary": summary(results),
    });
    // Inside of a script nothing may look like its end.
    let data = data.to_string().replace('<', "\\u003c");
    // A prompt may hold a placeholder's name: each is looked for in the template alone.
    let page = filled(&[("{{TITLE}}", &escaped(&title)), ("{{DATA}}", &data)]);
    let path = run.join("report.html");
    files::write(&path, true, page.as_bytes())?;
    Ok(path)
}

/// What the run is called.
pub(super) fn title(results: &Results) -> String {
    let prompts = results.manifest.grid.values(Axis::Prompt).unwrap_or_default();
    match prompts {
        [one] => one.to_string(),
        [first, rest @ ..] => format!("{first} and {} more", rest.len()),
        [] => "sweep".into(),
    }
}

fn thumb(picture: &RgbImage) -> Result<String, Error> {
    let longer = picture.width().max(picture.height());
    let small = if longer > THUMB {
        let side = |side: u32| (side * THUMB / longer).max(1);
        &imageops::resize(picture, side(picture.width()), side(picture.height()), FilterType::Lanczos3)
    } else {
        picture
    };
    let jpeg = image::encode(small, Format::Jpg, THUMB_QUALITY, None)?;
    Ok(format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg)))
}

fn sheet(sheet: &Sheet) -> Json {
    let edge = |edge: &Edge| json!({ "axis": edge.axis.map_or("", Axis::name), "values": edge.values });
    json!({ "title": sheet.title, "rows": edge(&sheet.rows), "columns": edge(&sheet.columns), "cells": sheet.cells })
}

/// Every figure along every axis that was varied, chance left out.
fn summary(results: &Results) -> Vec<Json> {
    let mut tables = Vec::new();
    for (axis, values) in results.manifest.grid.varied().filter(|(axis, _)| !axis.is_chance()) {
        let figures = results.metrics.iter().map(|metric| (metric.name, json!(metric.better)));
        for (figure, better) in figures.chain([(DENOISE, json!("lower"))]) {
            let point = |(place, value): (usize, &super::super::Value)| {
                let summary = results.summary(axis, place, figure)?;
                let (low, high) = summary.interval.unzip();
                Some(json!({
                    "value": value.to_string(), "n": summary.n, "mean": summary.mean, "median": summary.median,
                    "low": low, "high": high,
                }))
            };
            let points: Vec<Json> = values.iter().enumerate().filter_map(point).collect();
            tables.push(json!({ "axis": axis, "metric": figure.trim_end_matches("_s"), "better": better, "points": points, "interval": "95 % interval" }));
        }
    }
    tables
}

/// The template with these in their places, in this order.
fn filled(parts: &[(&str, &str)]) -> String {
    let (mut page, mut rest) = (String::new(), TEMPLATE);
    for (place, content) in parts {
        let (before, after) = rest.split_once(place).expect("the template is part of the program");
        page += before;
        page += content;
        rest = after;
    }
    page + rest
}

/// A column of whole numbers beyond what JavaScript holds exactly is one of texts, which the page sorts by number.
fn exact(axis: Axis, results: &Results) -> impl Fn(&super::super::Value) -> Json {
    use super::super::Value;
    let values = results.manifest.grid.values(axis).unwrap_or_default();
    let large = values.iter().any(|value| matches!(value, Value::Whole(whole) if *whole > LARGEST));
    move |value| if large { json!(value.to_string()) } else { json!(value) }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
