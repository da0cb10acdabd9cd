//! What speed work is judged by: parity of the tiny fixtures and of pocket on the device, then a FLUX.1-dev-sized transformer
//! with random weights made in memory. `benches/gpu.sh` runs it on a machine without a toolchain. With `--serve` neither: it then
//! is darkroom's side of the races in `benches/peers`.

#![allow(clippy::print_stdout, reason = "a bench talks to a terminal")]

mod parity;
mod serve;
mod speed;

use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::{DType, Device};
use clap::{Parser, ValueEnum};
use serde_json::json;

/// Parity and speed on one device.
#[derive(Debug, Parser)]
struct Options {
    /// `cpu`, or the number of a CUDA card.
    #[arg(long, default_value = "0")]
    device: String,
    /// Type of computation of the speed part.
    #[arg(long, value_enum, default_value_t = Precision::Bf16)]
    dtype: Precision,
    /// Sizes of the speed part: FLUX.1-dev's, or a tenth of them to try the bench itself.
    #[arg(long, value_enum, default_value_t = Size::Dev)]
    size: Size,
    /// Timed steps, after two that warm up.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Where the tiny fixtures are.
    #[arg(long, default_value = "tests/fixtures")]
    fixtures: PathBuf,
    /// Write all results here.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Load `--model` and answer requests on stdin, one JSON object a line, until it ends.
    #[arg(long, requires = "model")]
    serve: bool,
    /// A model's folder, for `--serve`.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Precision {
    F32,
    F16,
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Size {
    Dev,
    Tenth,
}

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    let device = match options.device.as_str() {
        "cpu" => Device::Cpu,
        ordinal => Device::new_cuda(ordinal.parse()?)?,
    };
    let dtype = match options.dtype {
        Precision::F32 => DType::F32,
        Precision::F16 => DType::F16,
        Precision::Bf16 => DType::BF16,
    };
    if let (true, Some(model)) = (options.serve, &options.model) {
        serve::run(&device, dtype, model)?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("\nparity on {device:?}: relative L2 error, bound");
    let checks = parity::run(&device, &options.fixtures)?;
    for check in &checks {
        println!("{:44} {:.2e} {:.0e} {}", check.name, check.error, check.bound, if check.passes() { "ok" } else { "FAILED" });
    }
    let speed = speed::run(&device, dtype, options.size == Size::Dev, options.steps)?;
    let passed = checks.iter().all(parity::Check::passes);
    if let Some(path) = options.json {
        let parity: Vec<_> = checks.iter().map(|c| json!({"name": c.name, "error": c.error, "bound": c.bound})).collect();
        let report = json!({"version": env!("CARGO_PKG_VERSION"), "device": options.device, "passed": passed, "parity": parity, "speed": speed});
        std::fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
