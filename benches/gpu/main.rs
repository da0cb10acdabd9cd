//! What speed work is judged by: parity of the tiny fixtures and of pocket on the device, then a FLUX.1-dev-sized transformer
//! with random weights made in memory. `benches/gpu.sh` runs it on a machine without a toolchain. With `--serve` neither: it then
//! is darkroom's side of the races in `benches/peers`.

#![allow(clippy::print_stdout, reason = "a bench talks to a terminal")]

mod load;
mod ops;
mod parity;
mod report;
mod serve;
mod speed;

use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::{DType, Device};
use clap::{Parser, ValueEnum};
use darkroom::config::Config;
use darkroom::engine::Kept;
use darkroom::ops::Machine;
use kernels::{Whose, Work, choose};
use report::Report;
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
    /// candle's operations, our kernels, or both in turn. Operations are always timed both ways.
    #[arg(long, value_enum, default_value_t = Kernels::Both)]
    kernels: Kernels,
    /// Attention of the steps with our kernels: what the program chooses, which is the faster one; ours; or cuDNN's where it is
    /// installed. Operations time both.
    #[arg(long, value_enum, default_value_t = Attention::Chosen)]
    attention: Attention,
    /// Timed steps, after two that warm up.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Only parity; nothing is timed.
    #[arg(long)]
    parity: bool,
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
    /// What `--serve` keeps the model as, in the words of darkroom's own `--dtype`; by default as stored, computed with in `--dtype`.
    #[arg(long, requires = "serve")]
    keep: Option<darkroom::ops::generate::Precision>,
    /// Bytes of the card that `--serve` may use: the model is made to fit, as darkroom makes it.
    #[arg(long, requires = "serve")]
    vram_limit: Option<u64>,
    /// Only how fast a transformer of so many GB is loaded from the page cache, in processes of its own; its file is written to TMPDIR.
    #[arg(long, value_name = "GB", num_args = 0..=1, default_missing_value = "24")]
    load: Option<f64>,
    /// One of those processes.
    #[arg(long, hide = true)]
    load_file: Option<PathBuf>,
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
enum Kernels {
    Plain,
    Fused,
    Both,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Attention {
    Chosen,
    Own,
    Cudnn,
}

impl Kernels {
    /// Whether ours are on, one after the other.
    fn runs(self) -> &'static [bool] {
        match self {
            Self::Plain => &[false],
            Self::Fused => &[true],
            Self::Both => &[false, true],
        }
    }
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
        ordinal => kernels::open_cuda(ordinal.parse()?).map_err(anyhow::Error::msg)?,
    };
    if let Some(file) = &options.load_file {
        kernels::use_fused(options.kernels == Kernels::Fused);
        load::child(file, &device)?;
        return Ok(ExitCode::SUCCESS);
    }
    let dtype = match options.dtype {
        Precision::F32 => DType::F32,
        Precision::F16 => DType::F16,
        Precision::Bf16 => DType::BF16,
    };
    if let Some(cache) = dirs::cache_dir() {
        kernels::keep_choices(Box::new(Kept::in_folder(&cache.join("darkroom"))));
    }
    match options.attention {
        Attention::Chosen => {}
        Attention::Own => choose(Work::Attention, Whose::Own),
        Attention::Cudnn => choose(Work::Attention, Whose::Cudnn),
    }
    if let (true, Some(model)) = (options.serve, &options.model) {
        kernels::use_fused(options.kernels == Kernels::Fused);
        let plan = match (options.keep, options.vram_limit) {
            (None, None) => dtype.into(),
            (keep, vram_limit) => {
                let model = darkroom::ops::models::resolve(&model.to_string_lossy(), &Config::from_environment())?;
                Machine { vram_limit, ..Machine::default() }.plan(&model, &device, keep)?
            }
        };
        serve::run(&device, plan, model)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut report = Report::new(options.json.clone(), &options.device)?;
    if let Some(gigabytes) = options.load {
        report.part("loads", |report| load::run(&options.device, &device, gigabytes, report));
        return report.end();
    }
    // Our kernels are for cards; elsewhere there is nothing to compare.
    let runs = if device.is_cuda() { options.kernels.runs() } else { &[false] };
    // At the sizes of the speed part, and before the first tiny model is loaded: that would choose by its own.
    let (attention, convolution) = if runs.contains(&true) {
        kernels::use_fused(true);
        let (config, side, l_txt) = speed::sizes(options.size == Size::Dev);
        let attention = kernels::settle_attention(&device, config.heads, side * side + l_txt, config.head_width, dtype)?;
        (attention, kernels::settle_convolution(&device, dtype)?)
    } else {
        ("candle's operations".into(), "candle's operations".into())
    };
    println!("attention: {attention}; convolution: {convolution}");
    for fused in runs {
        let name = if *fused { "fused" } else { "plain" };
        report.part(&format!("parity, {name}"), |report| {
            kernels::use_fused(*fused);
            println!("\nparity on {device:?}, {name} kernels: relative L2 error, bound");
            parity::run(&device, &options.fixtures, &mut |check| {
                let verdict = if check.passes() { "ok" } else { "FAILED" };
                println!("{:44} {:.2e} {:.0e} {verdict}", check.name, check.error, check.bound);
                if !check.passes() {
                    report.fail(format!("{}, {name}: {:.1e} off", check.name, check.error));
                }
                report.add("parity", json!({"kernels": name, "name": check.name, "error": check.error, "bound": check.bound}))
            })
        });
        if options.parity {
            continue;
        }
        report.part(&format!("steps, {name}"), |report| {
            kernels::use_fused(*fused);
            println!("\n{name} kernels");
            let mut figures = speed::run(&device, dtype, options.size == Size::Dev, options.steps)?;
            figures["kernels"] = name.into();
            figures["attention"] = if *fused { attention.as_str() } else { "candle's operations" }.into();
            figures["convolution"] = if *fused { convolution.as_str() } else { "candle's operations" }.into();
            report.add("speed", figures)
        });
    }
    if !options.parity {
        report.part("operations", |report| ops::run(&device, dtype, options.size == Size::Dev, options.steps, report));
    }
    report.end()
}
