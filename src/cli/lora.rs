//! `darkroom lora`.

use std::ops::ControlFlow;
use std::path::PathBuf;

use super::progress::JobBar;
use super::settings::device;
use super::signal::Interrupt;
use crate::bytes;
use crate::config::Config;
use crate::engine::{DeviceChoice, LoraMode};
use crate::fetch::Progress;
use crate::ops::generate::Precision;
use crate::ops::generate::Stage;
use crate::ops::lora::{self, ConvertOrder, Format, MergeOrder, Sources, VerifyOrder};

/// Look into LoRA files, convert and merge them, and prove that they leave nothing behind
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
        /// A .safetensors file, a folder with one, a trainer's .tar or .tar.gz, a link, owner/repo on Hugging Face, civitai:ID, s3://bucket/key
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
    /// Write a LoRA under another program's names
    ///
    /// Fused modules are cut into their members and members fused, which is exact; one factor or scale may be rounded to the type.
    /// What the other names cannot say is refused.
    Convert {
        /// As for generate
        #[arg(value_name = "LORA")]
        reference: String,
        /// The .safetensors file to write
        #[arg(value_name = "OUT")]
        out: PathBuf,
        /// diffusers (and PEFT), kohya, or comfy
        #[arg(long, value_name = "FORMAT", value_parser = format)]
        to: Format,
        /// f32, bf16 or f16 [default: as it is stored]
        #[arg(long, value_name = "DTYPE", value_parser = dense)]
        dtype: Option<Precision>,
        /// Replace a file that is there
        #[arg(long)]
        force: bool,
    },
    /// Write a model's files anew with LoRAs merged into them: same layout, names and types
    Merge {
        /// A model's name, a diffusers folder, or a transformer's .safetensors file; not GGUF or fp8
        #[arg(value_name = "BASE")]
        base: String,
        /// LoRAs, each with its scale
        #[arg(value_name = "LORA[@SCALE]", required = true, num_args = 1..)]
        loras: Vec<String>,
        /// What to write: a .safetensors file for the transformer alone, or a folder
        #[arg(value_name = "OUT")]
        out: PathBuf,
        /// The scale for the LoRAs' text encoder parts [default: each LoRA's own scale]
        #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
        lora_text_scale: Option<f64>,
        /// A factor for each block, as for generate
        #[arg(long, value_name = "FACTORS")]
        lora_blocks: Option<String>,
        /// Replace what is there
        #[arg(long)]
        force: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
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
        #[arg(long, value_name = "MODE", default_value = "auto")]
        lora_mode: LoraMode,
        /// auto, cpu, cuda, cuda:1 (the second card) or metal
        #[arg(long, value_name = "DEVICE", value_parser = device, default_value = "auto")]
        device: DeviceChoice,
        /// f32, bf16, f16, fp8, fp8-products, fp8-merged, q8_0 and so on, as in generate [default: f32 on a CPU, else bf16]
        #[arg(long, value_name = "DTYPE")]
        dtype: Option<Precision>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

fn format(text: &str) -> Result<Format, String> {
    text.parse().map_err(|()| "must be diffusers, kohya or comfy".into())
}

/// A bar for what must be fetched. It goes when this is dropped.
fn fetching() -> impl FnMut(Progress) -> ControlFlow<()> {
    let mut bar = JobBar::new(false);
    move |progress| {
        bar.tell(Stage::Fetching(progress));
        ControlFlow::Continue(())
    }
}

/// The same for what writes a file. Ctrl-C stops it before the next tensor, so that nothing half done is left.
fn writing() -> anyhow::Result<impl FnMut(lora::Stage) -> ControlFlow<()>> {
    let interrupt = Interrupt::install()?;
    interrupt.job_begins();
    let mut bar = JobBar::new(false);
    Ok(move |stage: lora::Stage| {
        match stage {
            lora::Stage::Fetching(progress) => bar.tell(Stage::Fetching(progress)),
            lora::Stage::Writing => {}
            lora::Stage::Finishing => interrupt.writing_begins(),
        }
        if interrupt.stopping() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
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
            let extracted = lora::extract(&archive, &out, force, &mut writing()?)?;
            super::say(&format!("{} from {}, {}", extracted.member, archive.display(), bytes::in_words(extracted.bytes)));
            super::show(&extracted.path.display().to_string())
        }
        Verb::Convert { reference, out, to, dtype, force } => {
            let order = ConvertOrder { reference, out, format: to, precision: dtype, force };
            let converted = lora::convert(&order, config, &mut writing()?)?;
            converted.warnings.iter().for_each(|warning| super::say(&format!("warning: {warning}")));
            super::say(&format!("{} tensors, {}", converted.tensors, bytes::in_words(converted.bytes)));
            super::show(&converted.path.display().to_string())
        }
        Verb::Merge { base, loras, out, lora_text_scale, lora_blocks, force, json } => {
            let loras = lora::parse(&loras, lora_text_scale, lora_blocks.as_deref())?;
            let merged = lora::merge(&MergeOrder { base, loras, out, force }, config, &mut writing()?)?;
            merged.remarks.iter().for_each(|remark| super::say(&format!("note: {remark}")));
            if json {
                return super::show(&serde_json::to_string(&merged)?);
            }
            super::say(&format!("{} tensors changed, {} written", merged.tensors_changed, bytes::in_words(merged.bytes)));
            super::show(&merged.path.display().to_string())
        }
        Verb::Verify { loras, model, switches, seed, lora_mode, device, dtype, json } => {
            let loras = lora::parse(&loras, None, None)?;
            let order = VerifyOrder {
                loras,
                model,
                machine: device.into(),
                precision: dtype,
                mode: lora_mode,
                switches: switches as usize,
                seed,
            };
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

/// LoRAs are written in formats that are computed in.
fn dense(text: &str) -> Result<Precision, String> {
    text.parse()
        .ok()
        .filter(|precision: &Precision| precision.dtype().is_some())
        .ok_or_else(|| "must be one of f32, bf16, f16".into())
}
