//! `darkroom lora`.

use std::ops::ControlFlow;
use std::path::PathBuf;

use super::generate::{device, mode};
use super::progress::JobBar;
use crate::config::Config;
use crate::engine::{DeviceChoice, LoraMode};
use crate::fetch::Progress;
use crate::ops::generate::Precision;
use crate::ops::generate::Stage;
use crate::ops::lora::{self, Sources, VerifyOrder};

/// Look into LoRA files, and prove that they leave nothing behind
#[derive(Debug, clap::Args)]
#[command(arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Say what is in a file: format, modules, ranks, trainer; needs no model
    ///
    /// Exit code 1 if the file cannot be used; the reason is in the report.
    Inspect {
        /// A .safetensors file, a trainer's .tar or .tar.gz, a link, owner/repo on Hugging Face, civitai:ID, s3://bucket/key
        #[arg(value_name = "LORA")]
        reference: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Take the .safetensors file out of a trainer's archive
    Extract {
        /// Such as Replicate's trained_model.tar
        #[arg(value_name = "ARCHIVE")]
        archive: PathBuf,
        /// The file to write
        #[arg(value_name = "OUT")]
        out: PathBuf,
        /// Replace a file that is there
        #[arg(long)]
        force: bool,
    },
    /// Put LoRAs on a model and take them off in random order; every weight must come back bit for bit
    Verify {
        /// LoRAs, each with its scale
        #[arg(value_name = "LORA[@SCALE]", required = true)]
        loras: Vec<String>,
        /// As for generate
        #[arg(long, value_name = "MODEL", default_value = "pocket")]
        model: String,
        /// How many switches, 1 to 10000
        #[arg(long, value_name = "COUNT", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        switches: u32,
        /// Of the random order
        #[arg(long, value_name = "NUMBER", default_value_t = 0)]
        seed: u64,
        /// auto, merge or branch
        #[arg(long, value_name = "MODE", value_parser = mode, default_value = "auto")]
        lora_mode: LoraMode,
        /// auto, cpu, cuda, cuda:1 (the second card) or metal
        #[arg(long, value_name = "DEVICE", value_parser = device, default_value = "auto")]
        device: DeviceChoice,
        /// f32, bf16 or f16 [default: f32 on a CPU, else bf16]
        #[arg(long, value_name = "DTYPE")]
        dtype: Option<Precision>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// A bar for what must be fetched. It goes when this is dropped.
fn fetching() -> impl FnMut(Progress) -> ControlFlow<()> {
    let mut bar = JobBar::new(false);
    move |progress| {
        bar.tell(Stage::Fetching(progress));
        ControlFlow::Continue(())
    }
}

pub(super) fn run(args: Args, config: &Config) -> anyhow::Result<()> {
    match args.verb {
        Verb::Inspect { reference, json } => {
            let report = Sources::new(config).inspect(&reference, &mut fetching())?;
            super::show(if json { serde_json::to_string(&report)? } else { report.to_string() }.trim_end())?;
            match report.refused {
                Some(refused) => anyhow::bail!("{} cannot be used: {}", lora::shown(&reference), refused.reason),
                None => Ok(()),
            }
        }
        Verb::Extract { archive, out, force } => {
            let extracted = lora::extract(&archive, &out, force)?;
            super::say(&format!("{} from {}, {:.1} MB", extracted.member, archive.display(), extracted.bytes as f64 / 1e6));
            super::show(&extracted.path.display().to_string())
        }
        Verb::Verify { loras, model, switches, seed, lora_mode, device, dtype, json } => {
            let loras = lora::parse(&loras, None, None)?;
            let order =
                VerifyOrder { loras, model, device, precision: dtype, mode: lora_mode, switches: switches as usize, seed };
            let verified = lora::verify(&order, config, &mut fetching())?;
            if json {
                return super::show(&serde_json::to_string(&verified)?);
            }
            for state in &verified.states {
                let name = state.reference.as_deref().unwrap_or("no LoRA");
                super::show(&format!("{:>8.1} ms  {:.12}  {} times  {name}", state.milliseconds, state.weights, state.times))?;
            }
            super::show(&format!(
                "{} switches on {}: all {} tensors were equal bit for bit, every time",
                verified.switches, verified.model, verified.tensors
            ))
        }
    }
}
