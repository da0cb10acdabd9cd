//! What a sweep costs beside its pictures, and how long its sheets take: `cargo bench --bench sweep`.
//!
//! The same pictures of pocket are made by calling the engine in a loop and by a sweep, in turns. What counts is the time from the first
//! to the last picture, without loading, warm-up and report, and of it the part that is not the engine's: on a shared machine the engine's
//! own time varies by more than a sweep adds.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a bench that cannot go on fails; figures are printed")]

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device};
use darkroom::config::Config;
use darkroom::engine::{DeviceChoice, Pipeline};
use darkroom::ops::generate::{Request, prepare};
use darkroom::ops::models;
use darkroom::ops::sweep::{self, Layout, Numbers, References, Stage, Sweep, Wish};

const PROMPT: &str = "portrait of a person with red hair";
const ROUNDS: usize = 9;

fn order(folder: &Path, steps: &str, guidance: &str, seeds: u64) -> Sweep {
    let numbers = |text: &str| Some(Numbers(text.into()));
    let wish = Wish {
        prompt: vec![PROMPT.into()],
        steps: numbers(steps),
        guidance: numbers(guidance),
        seeds: Some(seeds),
        ..Wish::default()
    };
    Sweep {
        grid: wish.grid().unwrap(),
        shared: wish.shared().unwrap(),
        machine: DeviceChoice::Cpu.into(),
        folder: folder.into(),
        repeats: 1,
        command: "bench".into(),
        most: None,
    }
}

/// From the first to the last picture, and of it the engine's stages, in seconds.
struct Taken {
    wall: f64,
    engine: f64,
}

/// From the estimate to the report.
fn swept(sweep: &Sweep, config: &Config) -> Taken {
    let (mut begun, mut ended) = (None, None);
    sweep::run(sweep, &References::default(), &Layout::default(), config, &mut |stage| {
        match stage {
            Stage::Estimated(_) => begun = Some(Instant::now()),
            Stage::Reporting => ended = Some(Instant::now()),
            _ => {}
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    let rows = std::fs::read_to_string(sweep.folder.join("results.jsonl")).unwrap();
    let seconds = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["total_s"].as_f64().unwrap();
    Taken { wall: (ended.unwrap() - begun.unwrap()).as_secs_f64(), engine: rows.lines().map(seconds).sum() }
}

fn looped(pipeline: &Pipeline, model: &models::Model) -> Taken {
    let (begun, mut engine) = (Instant::now(), 0.);
    for guidance in [1., 2., 3., 4.] {
        for seed in 1..=4 {
            let request = Request { prompt: PROMPT.into(), guidance: Some(guidance), seed: Some(seed), ..Request::default() };
            let (job, _) = prepare(&request, model).unwrap();
            let timings = pipeline.run(&job, &mut |_| ControlFlow::Continue(())).unwrap().timings;
            engine += (timings.switch + timings.encode + timings.denoise + timings.decode).as_secs_f64();
        }
    }
    Taken { wall: begun.elapsed().as_secs_f64(), engine }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn show(name: &str, taken: &[Taken]) {
    let beside = median(taken.iter().map(|taken| 100. * (taken.wall - taken.engine) / taken.engine));
    let wall = median(taken.iter().map(|taken| taken.wall));
    println!("{name:10} {wall:.3} s for 16 pictures of 20 steps, of it {beside:.2} % beside the engine's stages");
}

fn main() {
    let config = Config::from_environment();
    let model = models::resolve("pocket", &config).unwrap();
    let pipeline = Pipeline::load(&model.bundle, &Device::Cpu, DType::F32, &mut |_| {}).unwrap();
    looped(&pipeline, &model);
    let (mut loops, mut sweeps) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let place = tempfile::tempdir().unwrap();
        loops.push(looped(&pipeline, &model));
        sweeps.push(swept(&order(&place.path().join("run"), "20", "1:4", 4), &config));
    }
    show("engine", &loops);
    show("sweep", &sweeps);

    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    sweep::run(&order(&run, "1:10", "1:10", 1), &References::default(), &Layout::default(), &config, &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap();
    let times = (0..ROUNDS).map(|_| {
        let begun = Instant::now();
        sweep::sheets(&run, &Layout::default()).unwrap();
        begun.elapsed().as_secs_f64()
    });
    println!("a sheet of 10 x 10 pictures: {:.3} s", median(times));
    let begun = Instant::now();
    sweep::report(&run, &References::default(), &Layout::default(), &config).unwrap();
    println!("the whole report of 100 pictures, measured anew: {:.3} s", begun.elapsed().as_secs_f64());
}
