//! A sweep as a person asks for it, by flags or in a TOML file, and what is to be done for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

use super::{Axis, Grid, Value, command};
use crate::engine::{LoraMode, NoiseKind};
use crate::ops::Machine;
use crate::ops::generate::{Picture, Precision, Request};
use crate::ops::lora::{self, Lora};
use crate::ops::{AspectRatio, Error, Megapixels};
use crate::prompt::Policy;

/// As the value of the axis lora: the base alone.
pub(super) const NO_LORA: &str = "none";

/// Between LoRAs that are on the weights together.
pub(super) const TOGETHER: &str = " + ";

/// The seeds of a sweep that names none.
const FIRST_SEED: u64 = 1;

/// Everything that flags and a file can say, in the words of the flags.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Wish {
    #[serde(deserialize_with = "texts")]
    pub prompt: Vec<String>,
    /// A file with a prompt on each line.
    pub prompts: Option<PathBuf>,
    #[serde(deserialize_with = "texts")]
    pub model: Vec<String>,
    #[serde(deserialize_with = "texts")]
    pub dtype: Vec<String>,
    #[serde(deserialize_with = "texts")]
    pub lora: Vec<String>,
    #[serde(deserialize_with = "texts")]
    pub trigger_policy: Vec<String>,
    pub lora_scale: Option<Numbers>,
    pub width: Option<Numbers>,
    pub height: Option<Numbers>,
    pub strength: Option<Numbers>,
    pub true_cfg: Option<Numbers>,
    pub guidance: Option<Numbers>,
    pub steps: Option<Numbers>,
    pub seed: Option<Numbers>,
    /// How many seeds, from 1.
    pub seeds: Option<u64>,
    /// `a,b`: axes that are walked in step.
    #[serde(deserialize_with = "texts")]
    pub zip: Vec<String>,

    pub negative_prompt: Option<String>,
    #[serde(deserialize_with = "named")]
    pub aspect_ratio: Option<AspectRatio>,
    #[serde(deserialize_with = "named")]
    pub megapixels: Option<Megapixels>,
    #[serde(deserialize_with = "named")]
    pub noise: Option<NoiseKind>,
    pub image: Option<PathBuf>,
    pub mask: Option<PathBuf>,
    pub lora_text_scale: Option<f64>,
    pub lora_blocks: Option<String>,
    #[serde(deserialize_with = "named")]
    pub lora_mode: Option<LoraMode>,
    pub trigger_word: Option<String>,
    pub clean_prompt: bool,
}

/// Numbers of an axis as text; a file may also give a number or an array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Numbers(pub String);

#[derive(Deserialize)]
#[serde(untagged)]
enum Loose {
    Whole(i64),
    Number(f64),
    Text(String),
    Many(Vec<Loose>),
}

impl Loose {
    fn text(self) -> String {
        match self {
            Self::Whole(value) => value.to_string(),
            Self::Number(value) => value.to_string(),
            Self::Text(text) => text,
            Self::Many(values) => values.into_iter().map(Self::text).collect::<Vec<_>>().join(","),
        }
    }
}

impl<'de> Deserialize<'de> for Numbers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let loose = Loose::deserialize(deserializer);
        loose
            .map(|loose| Self(loose.text()))
            .map_err(|_| D::Error::custom("must be a number, a text such as \"1:5:0.5\" or a list"))
    }
}

/// A text or a list of texts.
fn texts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    match Loose::deserialize(deserializer) {
        Ok(Loose::Text(text)) => Ok(vec![text]),
        Ok(Loose::Many(many)) => Ok(many.into_iter().map(Loose::text).collect()),
        _ => Err(D::Error::custom("must be a text or a list of texts")),
    }
}

/// What is said by its name.
fn named<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(deserializer: D) -> Result<Option<T>, D::Error> {
    String::deserialize(deserializer)?.parse().map(Some).map_err(D::Error::custom)
}

impl Wish {
    /// From a TOML file; paths in it are found from its folder.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text =
            fs::read_to_string(path).map_err(|source| Error::UnreadableFile { field: "file", path: path.into(), source })?;
        let told = |error: toml::de::Error| {
            Error::Combination {
            field: "file",
            problem: format!("{} is not a sweep: {}", path.display(), error.to_string().trim().replace('\n', " ")),
            hint: "its keys are the axes and settings of the pictures, called as the flags; how to run and report stays with the command".into(),
        }
        };
        let mut wish: Self = toml::from_str(&text).map_err(told)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        for named in [&mut wish.prompts, &mut wish.image, &mut wish.mask].into_iter().flatten() {
            *named = folder.join(&*named);
        }
        // Names of models and of LoRAs elsewhere are none of its files.
        let near = |text: &str| {
            let (reference, scale) =
                text.trim().rsplit_once('@').map_or((text.trim(), None), |(name, scale)| (name, Some(scale)));
            let path = folder.join(reference);
            let path = if path.exists() { path.display().to_string() } else { return text.trim().to_owned() };
            scale.map_or_else(|| path.clone(), |scale| format!("{path}@{scale}"))
        };
        for model in &mut wish.model {
            *model = near(model);
        }
        for set in &mut wish.lora {
            *set = set.split(TOGETHER).map(near).collect::<Vec<_>>().join(TOGETHER);
        }
        Ok(wish)
    }

    /// What `self` says, and of the rest what `file` says.
    #[must_use]
    pub fn or(self, file: Self) -> Self {
        fn either<T>(flags: Vec<T>, file: Vec<T>) -> Vec<T> {
            if flags.is_empty() { file } else { flags }
        }
        // Seeds are one thing said in two ways, as prompts are.
        let seeds_said = self.seed.is_some() || self.seeds.is_some();
        let prompts_said = !self.prompt.is_empty() || self.prompts.is_some();
        Self {
            prompt: if prompts_said { self.prompt } else { file.prompt },
            prompts: if prompts_said { self.prompts } else { file.prompts },
            model: either(self.model, file.model),
            dtype: either(self.dtype, file.dtype),
            lora: either(self.lora, file.lora),
            trigger_policy: either(self.trigger_policy, file.trigger_policy),
            lora_scale: self.lora_scale.or(file.lora_scale),
            width: self.width.or(file.width),
            height: self.height.or(file.height),
            strength: self.strength.or(file.strength),
            true_cfg: self.true_cfg.or(file.true_cfg),
            guidance: self.guidance.or(file.guidance),
            steps: self.steps.or(file.steps),
            seed: if seeds_said { self.seed } else { file.seed },
            seeds: if seeds_said { self.seeds } else { file.seeds },
            zip: either(self.zip, file.zip),
            negative_prompt: self.negative_prompt.or(file.negative_prompt),
            aspect_ratio: self.aspect_ratio.or(file.aspect_ratio),
            megapixels: self.megapixels.or(file.megapixels),
            noise: self.noise.or(file.noise),
            image: self.image.or(file.image),
            mask: self.mask.or(file.mask),
            lora_text_scale: self.lora_text_scale.or(file.lora_text_scale),
            lora_blocks: self.lora_blocks.or(file.lora_blocks),
            lora_mode: self.lora_mode.or(file.lora_mode),
            trigger_word: self.trigger_word.or(file.trigger_word),
            clean_prompt: self.clean_prompt || file.clean_prompt,
        }
    }

    /// The axes and their values. Model, prompt and seed always have one.
    pub fn grid(&self) -> Result<Grid, Error> {
        let mut axes = Vec::new();
        let texts = |values: Vec<String>| values.into_iter().map(Value::Text).collect::<Vec<_>>();
        let model = if self.model.is_empty() { vec!["pocket".to_owned()] } else { self.model.clone() };
        axes.push((Axis::Model, texts(model)));
        axes.push((Axis::Prompt, texts(self.all_prompts()?)));
        for (axis, values) in [(Axis::Dtype, &self.dtype), (Axis::Lora, &self.lora), (Axis::TriggerPolicy, &self.trigger_policy)]
        {
            if !values.is_empty() {
                axes.push((axis, texts(values.clone())));
            }
        }
        let numbers = [
            (Axis::LoraScale, &self.lora_scale),
            (Axis::Width, &self.width),
            (Axis::Height, &self.height),
            (Axis::Strength, &self.strength),
            (Axis::TrueCfg, &self.true_cfg),
            (Axis::Guidance, &self.guidance),
            (Axis::Steps, &self.steps),
        ];
        for (axis, numbers) in numbers {
            if let Some(Numbers(text)) = numbers {
                axes.push((axis, axis.numbers(text)?));
            }
        }
        axes.push((Axis::Seed, self.all_seeds()?));
        Grid::new(axes, self.zip.iter().map(|text| zip(text)).collect::<Result<_, _>>()?)
    }

    fn all_prompts(&self) -> Result<Vec<String>, Error> {
        let mut all = self.prompt.clone();
        if let Some(path) = &self.prompts {
            let text = fs::read_to_string(path).map_err(|source| Error::UnreadableFile {
                field: "prompts",
                path: path.clone(),
                source,
            })?;
            // Windows' editors begin a text with a byte order mark.
            let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
            all.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
        }
        if all.is_empty() {
            return Err(Error::invalid("prompt", &"missing", "a text, or several, or a file of them with prompts"));
        }
        Ok(all)
    }

    fn all_seeds(&self) -> Result<Vec<Value>, Error> {
        match (&self.seed, self.seeds) {
            (Some(_), Some(_)) => Err(Error::Combination {
                field: "seeds",
                problem: "was given together with seed".into(),
                hint: "give how many (seeds) or which ones (seed)".into(),
            }),
            (Some(Numbers(text)), None) => Axis::Seed.numbers(text),
            (None, Some(0)) => Err(Error::invalid("seeds", &0, "at least 1")),
            (None, count) => Axis::Seed.numbers(&format!("{FIRST_SEED}:{}", FIRST_SEED + count.unwrap_or(1) - 1)),
        }
    }

    /// What all pictures have in common; the fields that are axes are left out.
    pub fn shared(&self) -> Result<Shared, Error> {
        let picture = |field, path: &Option<PathBuf>| -> Result<Option<Picture>, Error> {
            let Some(path) = path else { return Ok(None) };
            let bytes = fs::read(path).map_err(|source| Error::UnreadableFile { field, path: path.clone(), source })?;
            Ok(Some(Picture { name: path.display().to_string(), bytes }))
        };
        Ok(Shared {
            request: Request {
                negative_prompt: self.negative_prompt.clone(),
                aspect_ratio: self.aspect_ratio,
                megapixels: self.megapixels,
                noise: self.noise,
                image: picture("image", &self.image)?,
                mask: picture("mask", &self.mask)?,
                lora_mode: self.lora_mode.unwrap_or_default(),
                trigger_word: self.trigger_word.clone(),
                clean_prompt: self.clean_prompt,
                ..Request::default()
            },
            text_scale: self.lora_text_scale,
            blocks: self.lora_blocks.clone(),
            files: [("--image", &self.image), ("--mask", &self.mask)]
                .into_iter()
                .filter_map(|(flag, path)| Some((flag, path.clone()?)))
                .collect(),
        })
    }
}

fn parsed<T: FromStr<Err = String>>(field: &'static str, text: &str) -> Result<T, Error> {
    text.parse().map_err(|allowed: String| Error::invalid(field, &text, allowed.trim_start_matches("must be ")))
}

fn zip(text: &str) -> Result<Vec<Axis>, Error> {
    let named = |name: &str| {
        let all = Axis::ALL.map(Axis::name).join(", ");
        Axis::named(name.trim()).ok_or_else(|| Error::invalid("zip", &name, format!("names of axes: {all}")))
    };
    text.split(',').map(named).collect()
}

/// What every picture of a sweep has in common.
#[derive(Debug, Clone)]
pub struct Shared {
    request: Request,
    text_scale: Option<f64>,
    blocks: Option<String>,
    /// Flags with the files that they name.
    files: Vec<(&'static str, PathBuf)>,
}

/// One picture as asked for.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) model: String,
    pub(super) precision: Option<Precision>,
    pub(super) request: Request,
}

impl Asked {
    /// What was asked for, or the device's own: rows and resumed sweeps must not depend on how full a card is.
    pub(super) fn precision_on(&self, device: &candle_core::Device) -> Precision {
        self.precision.unwrap_or_else(|| Precision::of(device))
    }
}

impl Shared {
    /// As flags of `darkroom generate`.
    pub(super) fn flags(&self) -> Vec<String> {
        let request = &self.request;
        let named = [
            ("--negative-prompt", request.negative_prompt.clone()),
            ("--aspect-ratio", request.aspect_ratio.map(|ratio| ratio.to_string())),
            ("--megapixels", request.megapixels.filter(|m| *m == Megapixels::Quarter).map(|_| "0.25".into())),
            ("--noise", command::noise(request.noise).map(str::to_owned)),
            ("--lora-mode", command::mode(request.lora_mode).map(str::to_owned)),
            ("--trigger-word", request.trigger_word.clone()),
            ("--lora-text-scale", self.text_scale.map(|scale| scale.to_string())),
            ("--lora-blocks", self.blocks.clone()),
        ];
        let mut flags: Vec<String> = named.into_iter().filter_map(|(flag, value)| Some(format!("{flag}={}", value?))).collect();
        flags.extend(self.files.iter().map(|(flag, path)| format!("{flag}={}", path.display())));
        flags.extend(request.clean_prompt.then(|| "--clean-prompt".to_owned()));
        flags
    }

    /// The picture at these values of the grid.
    pub(super) fn asked(&self, values: &[(Axis, &Value)]) -> Result<Asked, Error> {
        let mut asked = Asked { model: String::new(), precision: None, request: self.request.clone() };
        let (mut lora, mut factor) = (None, None);
        let request = &mut asked.request;
        for (axis, value) in values {
            match (axis, value) {
                (Axis::Model, Value::Text(text)) => asked.model.clone_from(text),
                (Axis::Dtype, Value::Text(text)) => asked.precision = Some(parsed("dtype", text)?),
                (Axis::Lora, Value::Text(text)) => lora = Some(text.as_str()),
                (Axis::TriggerPolicy, Value::Text(text)) => request.trigger_policy = parsed::<Policy>("trigger-policy", text)?,
                (Axis::Prompt, Value::Text(text)) => request.prompt.clone_from(text),
                (Axis::LoraScale, Value::Number(number)) => factor = Some(*number),
                (Axis::Strength, Value::Number(number)) => request.prompt_strength = Some(*number),
                (Axis::TrueCfg, Value::Number(number)) => request.true_cfg = Some(*number),
                (Axis::Guidance, Value::Number(number)) => request.guidance = Some(*number),
                (Axis::Width, Value::Whole(number)) => request.width = Some(side(*number)),
                (Axis::Height, Value::Whole(number)) => request.height = Some(side(*number)),
                (Axis::Steps, Value::Whole(number)) => request.steps = Some(side(*number)),
                (Axis::Seed, Value::Whole(number)) => request.seed = Some(*number),
                (axis, value) => return Err(Error::invalid(axis.name(), value, "a value of this axis's kind")),
            }
        }
        request.loras = self.loras(lora, factor)?;
        Ok(asked)
    }

    fn loras(&self, set: Option<&str>, factor: Option<f64>) -> Result<Vec<Lora>, Error> {
        let texts: Vec<String> = match set {
            // Beside others of the axis, the base alone has no scale.
            Some(NO_LORA) => return Ok(Vec::new()),
            Some(set) => set.split(TOGETHER).map(|text| text.trim().into()).collect(),
            None if factor.is_some() => {
                let hint = "add a LoRA with lora".into();
                return Err(Error::Combination { field: "lora-scale", problem: "was given without lora".into(), hint });
            }
            None => Vec::new(),
        };
        let mut loras = lora::parse(&texts, self.text_scale, self.blocks.as_deref())?;
        for lora in &mut loras {
            lora.scales.model *= factor.unwrap_or(1.);
            if self.text_scale.is_none() {
                lora.scales.text *= factor.unwrap_or(1.);
            }
            if !lora.scales.is_finite() {
                return Err(Error::invalid("lora-scale", &factor.unwrap_or(1.), "a factor that leaves the scales finite"));
            }
        }
        Ok(loras)
    }
}

fn side(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// A sweep, complete.
#[derive(Debug, Clone)]
pub struct Sweep {
    pub grid: Grid,
    pub shared: Shared,
    pub machine: Machine,
    /// Where everything goes; made if it is not there.
    pub folder: PathBuf,
    /// How often each picture is made and timed.
    pub repeats: usize,
    /// As it was typed, for the report.
    pub command: String,
    /// More pictures than this are refused.
    pub most: Option<usize>,
}
