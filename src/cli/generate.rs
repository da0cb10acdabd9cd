//! `darkroom generate`.

use std::ops::ControlFlow;
use std::path::PathBuf;

use super::progress::JobBar;
use super::settings::Settings;
use super::signal::Interrupt;
use crate::config::Config;
use crate::image::Format;
use crate::ops::generate::{self, Order, Output, Picture, Precision, Report, Request, Stage};
use crate::ops::{self, lora};
use crate::prompt::Policy;

const EXAMPLES: &str = "\
Examples:
  A picture of the embedded model, into darkroom-<seed>.png:
    darkroom generate \"a portrait of a person with long red hair and glasses, smiling\"
  The same picture again, four neighbours of it, into a folder:
    darkroom generate \"a portrait of a person in a blue shirt\" --seed 7 --num-outputs 4 -o pictures/
  FLUX.1 [dev], wide, after `darkroom models pull flux1-dev`:
    darkroom generate \"a lighthouse in a storm\" --model flux1-dev --aspect-ratio 16:9
  From a picture, half of it kept:
    darkroom generate \"the same house in winter\" --image house.jpg --prompt-strength 0.5
  With a person's LoRA, as trained elsewhere:
    darkroom generate \"confident woman, street fashion\" --model flux1-dev --lora trained_model.tar@0.9 --trigger-word user42
  One of pocket's own people, whose LoRA is in the program:
    darkroom generate \"portrait of user1003, wearing a green shirt, red top hat\" --lora user1003@0.9
  For scripts, one JSON object:
    darkroom generate \"a cat\" --json --quiet | jq -r '.files[]'

Exit codes: 0 done, 1 failed, 2 the command is wrong, 130 stopped with Ctrl-C (nothing is written then).";

/// Turn a prompt into pictures
///
/// Prints the path of each picture. Everything left out comes from the model's card: steps, guidance and size are those
/// that the model was made for.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES, after_help = "More with --help: examples, what each option is for.")]
pub(super) struct Args {
    /// What the picture shows, in words; "" lets the model choose
    #[arg(value_name = "PROMPT", allow_hyphen_values = false)]
    prompt: String,

    /// A model's name, a diffusers folder, a .safetensors or .gguf file, or a card (.toml)
    ///
    /// Names: `darkroom models list`. Beside a single transformer file there must be ae.safetensors, clip_l.safetensors, a
    /// t5xxl file, and the folders tokenizer and tokenizer_2 of the model's repository.
    #[arg(long, value_name = "MODEL", default_value = "pocket", help_heading = "Model")]
    model: String,

    /// A LoRA and its scale: me.safetensors@0.9, or a link; may be repeated [scale: 1]
    ///
    /// A file; a trainer's .tar or .tar.gz; an https link to either; owner/repo[@revision][/file] or any link of Hugging Face (HF_TOKEN
    /// for private ones); civitai:VERSION or a link of CivitAI (CIVITAI_API_TOKEN); s3://bucket/key (AWS_...). What is fetched is kept
    /// in a cache by its content. user1001 to user1005 and user1001-retrained are pocket's own people.
    ///
    /// Any published format: kohya, diffusers and PEFT, BFL and ComfyUI names, XLabs, LyCORIS (LoHa, LoKr), DoRA, full differences.
    /// It is on the weights for this run only. `darkroom lora inspect FILE` says what is in a file.
    #[arg(long = "lora", value_name = "LORA[@SCALE]", help_heading = "LoRA")]
    loras: Vec<String>,

    /// Where the trigger word goes: prepend (unless it is there), start-and-middle, or none
    #[arg(long, value_name = "POLICY", default_value = "prepend", help_heading = "LoRA")]
    trigger_policy: Policy,

    /// How closely the prompt is followed, 0 to 100 [default: the model's; 3.5 for FLUX.1 dev]
    ///
    /// This is the distilled guidance of FLUX.1 dev, one forward per step. schnell has none and ignores it.
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, help_heading = "Guidance")]
    guidance: Option<f64>,

    /// Classifier-free guidance on top, 1 (off) to 100; twice the time per step [default: 1]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, help_heading = "Guidance")]
    true_cfg: Option<f64>,

    /// Width in pixels, a multiple of 16 [default: the model's]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true, help_heading = "Size")]
    width: Option<usize>,

    /// Height in pixels, a multiple of 16 [default: the model's]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true, help_heading = "Size")]
    height: Option<usize>,

    /// Denoising steps, 1 to 1000; time grows with them [default: the model's; 28 for dev, 4 for schnell]
    #[arg(long, value_name = "COUNT", allow_negative_numbers = true, help_heading = "Sampling")]
    steps: Option<usize>,

    /// The first picture's noise; the next ones use seed + 1, seed + 2, ... [default: random]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, help_heading = "Sampling")]
    seed: Option<u64>,

    /// How many pictures, 1 to 1000 [default: 1]
    #[arg(long, value_name = "COUNT", allow_negative_numbers = true, help_heading = "Sampling")]
    num_outputs: Option<usize>,

    /// With --image: above 0 (keep it) to 1 (ignore it) [default: 0.8]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, help_heading = "From a picture")]
    prompt_strength: Option<f64>,

    #[command(flatten)]
    settings: Settings,

    /// A file, or a folder for names such as darkroom-<seed>.png [default: the current folder]
    ///
    /// With several outputs name.png becomes name-1.png, name-2.png, ...
    #[arg(short, long, value_name = "PATH", help_heading = "Output")]
    output: Option<PathBuf>,

    /// png, jpg or webp [default: by the name given with -o, else png]
    #[arg(long, value_name = "FORMAT", value_parser = format, help_heading = "Output")]
    output_format: Option<Format>,

    /// For jpg and webp: 0 (smallest) to 100 (best) [default: 90]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, help_heading = "Output")]
    output_quality: Option<usize>,

    /// Replace files that are there
    #[arg(long, help_heading = "Output")]
    force: bool,

    /// Leave the settings (prompt, seed, model, ...) out of the pictures
    #[arg(long, help_heading = "Output")]
    no_metadata: bool,

    /// Also write the final latents: safetensors, one f32 tensor `latents` of (outputs, 16, height/8, width/8)
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    save_latents: Option<PathBuf>,

    /// Print one JSON object: files, seeds, sizes, seconds per stage, model digest, what was cut off
    #[arg(long, help_heading = "Output")]
    json: bool,

    /// No progress bar and no remarks
    #[arg(short, long, help_heading = "Output")]
    quiet: bool,

    /// f32, bf16, f16 to compute in; fp8, fp8-products, fp8-merged, q8_0, q6_k, q5_k, q4_k, q4_0 to keep matrices in less memory [default: f32 on a CPU, else
    /// bf16, or what fits the card]
    #[arg(long, value_name = "DTYPE", help_heading = "Device")]
    dtype: Option<Precision>,
}

pub(super) fn run(args: Args, config: &Config) -> anyhow::Result<()> {
    let (json, quiet) = (args.json, args.quiet);
    let order = order(args)?;
    let interrupt = Interrupt::install()?;
    let mut bar = JobBar::new(quiet);
    let report = generate::run(&order, config, &mut |stage| {
        bar.tell(stage);
        match stage {
            Stage::Fetching(_) | Stage::Loading(_) => {}
            Stage::Engine(_) => interrupt.job_begins(),
            Stage::Writing => interrupt.writing_begins(),
        }
        if interrupt.stopping() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish();
    let report = report?;
    if !quiet {
        remark(&report);
    }
    if json {
        return super::show(&serde_json::to_string(&report)?);
    }
    report.files.iter().try_for_each(|path| super::show(&path.display().to_string()))
}

fn remark(report: &Report) {
    for remark in &report.remarks {
        super::say(&format!("note: {remark}"));
    }
    for cut in &report.truncated {
        super::say(&format!(
            "note: {} reads {} tokens of the {}; it did not see: {}",
            cut.encoder, cut.limit, cut.field, cut.lost
        ));
    }
}

fn order(args: Args) -> anyhow::Result<Order> {
    let settings = args.settings;
    let picture = |field, path: Option<PathBuf>| path.map(|path| read(field, path)).transpose();
    let machine = settings.machine();
    let request = Request {
        prompt: args.prompt,
        negative_prompt: settings.negative_prompt,
        width: args.width,
        height: args.height,
        aspect_ratio: settings.aspect_ratio,
        megapixels: settings.megapixels,
        steps: args.steps,
        guidance: args.guidance,
        true_cfg: args.true_cfg,
        seed: args.seed,
        outputs: args.num_outputs,
        noise: settings.noise,
        image: picture("image", settings.image)?,
        mask: picture("mask", settings.mask)?,
        prompt_strength: args.prompt_strength,
        loras: lora::parse(&args.loras, settings.lora_text_scale, settings.lora_blocks.as_deref())?,
        lora_mode: settings.lora_mode.unwrap_or_default(),
        previews: None,
        trigger_word: settings.trigger_word,
        trigger_policy: args.trigger_policy,
        clean_prompt: settings.clean_prompt,
    };
    let output = Output {
        path: args.output,
        format: args.output_format,
        quality: args.output_quality,
        force: args.force,
        metadata: !args.no_metadata,
        latents: args.save_latents,
    };
    Ok(Order { request, output, model: args.model, machine, precision: args.dtype, digest: args.json })
}

fn read(field: &'static str, path: PathBuf) -> Result<Picture, ops::Error> {
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Picture { name: path.display().to_string(), bytes }),
        Err(source) => Err(ops::Error::UnreadableFile { field, path, source }),
    }
}

fn format(text: &str) -> Result<Format, String> {
    text.parse().map_err(|()| "must be one of png, jpg, webp".into())
}
