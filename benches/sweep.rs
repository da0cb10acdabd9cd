//! What a sweep costs beside its pictures, and how long its sheets take: `cargo bench --bench sweep`.
//!
//! The same pictures of pocket are made by calling the engine in a loop and by a sweep, in turns; of both the time from the first to the
//! last picture counts, without loading, warm-up and report.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a bench that cannot go on fails; figures are printed")]

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use darkroom::config::Config;
use darkroom::engine::{DeviceChoice, Pipeline};
use darkroom::ops::generate::{Request, prepare};
use darkroom::ops::models;
use darkroom::ops::sweep::{self, Layout, Numbers, References, Stage, Sweep, Wish};

const PROMPT: &str = "portrait of a person with red hair";
const ROUNDS: usize = 5;

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
        device: DeviceChoice::Cpu,
        folder: folder.into(),
        repeats: 1,
        command: "bench".into(),
        most: None,
    }
}

/// From the estimate to the report.
fn swept(sweep: &Sweep, config: &Config) -> Duration {
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
    ended.unwrap() - begun.unwrap()
}

fn looped(pipeline: &Pipeline, model: &models::Model) -> Duration {
    let begun = Instant::now();
    for guidance in [1., 2., 3., 4.] {
        for seed in 1..=4 {
            let request = Request { prompt: PROMPT.into(), guidance: Some(guidance), seed: Some(seed), ..Request::default() };
            let (job, _) = prepare(&request, model).unwrap();
            pipeline.run(&job, &mut |_| ControlFlow::Continue(())).unwrap();
        }
    }
    begun.elapsed()
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
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
    let (looped, swept) = (median(loops), median(sweeps));
    println!(
        "16 pictures of 20 steps: engine {looped:.3} s, sweep {swept:.3} s, overhead {:+.2} %",
        100. * (swept / looped - 1.)
    );

    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    sweep::run(&order(&run, "1:10", "1:10", 1), &References::default(), &Layout::default(), &config, &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap();
    let times = (0..ROUNDS).map(|_| {
        let begun = Instant::now();
        sweep::sheets(&run, &Layout::default()).unwrap();
        begun.elapsed()
    });
    println!("a sheet of 10 x 10 pictures: {:.3} s", median(times.collect()));
    let begun = Instant::now();
    sweep::report(&run, &References::default(), &Layout::default(), &config).unwrap();
    println!("the whole report of 100 pictures, measured anew: {:.3} s", begun.elapsed().as_secs_f64());
}
