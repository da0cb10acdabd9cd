//! From a sweep to its pictures: each checked, described exactly, named by its content, and put in the order that is done fastest.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;

use ::models::bundle::{Bundle, ClipVocabulary};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};

use super::wish::{Asked, Sweep};
use super::{Axis, Grid, Value};
use crate::config::Config;
use crate::fetch::Progress;
use crate::hex::hex;
use crate::ops::Error;
use crate::ops::generate::{self, Picture};
use crate::ops::lora::{Lora, Sources};
use crate::ops::models::{self, Model};

/// A run's manifest is held in memory, about a kilobyte for each cell.
const MOST_CELLS: usize = 1_000_000;

/// Hexadecimal digits of a picture's name.
const KEY_DIGITS: usize = 20;

/// One place of the grid.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Cell {
    /// The picture's name: a digest of `exact`. Two cells that ask for the same picture have the same one.
    pub(super) key: String,
    /// The place of its value on each axis.
    pub(super) at: Vec<usize>,
    /// Everything that decides the picture, with digests instead of names.
    pub(super) exact: Json,
}

/// A base model of the sweep.
#[derive(Debug, Clone)]
pub(super) struct Base {
    pub(super) model: Model,
    /// Over the content of all weight files.
    pub(super) sha256: String,
    /// Over everything else that decides its pictures: configs, schedule, tokenizers.
    pub(super) settings: String,
}

impl Base {
    /// Two bases with the same name here make the same pictures.
    pub(super) fn identity(&self) -> (&str, &str) {
        (&self.sha256, &self.settings)
    }
}

/// A digest of what a model is besides its weights.
fn settings(bundle: &Bundle) -> Result<String, Error> {
    let vocabulary = match &bundle.clip_tokenizer {
        ClipVocabulary::Json(json) => vec![json],
        ClipVocabulary::VocabMerges { vocab, merges } => vec![vocab, merges],
    };
    let configs = [&bundle.transformer, &bundle.t5, &bundle.clip, &bundle.vae].map(|files| files.config.as_ref());
    let others = [bundle.scheduler.as_ref(), Some(&bundle.t5_tokenizer), bundle.t5_tokenizer_config.as_ref()];
    let mut hasher = Sha256::new();
    for blob in configs.into_iter().chain(others).chain(vocabulary.into_iter().map(Some)) {
        // A file that is not there is another model than an empty one.
        hasher.update(match blob {
            Some(blob) => Sha256::digest(blob.read()?),
            None => Sha256::digest("absent"),
        });
    }
    Ok(hex(&hasher.finalize()))
}

/// What is to be done.
#[derive(Debug)]
pub(super) struct Plan {
    /// In the grid's order.
    pub(super) cells: Vec<Cell>,
    pub(super) bases: BTreeMap<String, Base>,
    /// What of the settings has no effect, each remark once.
    pub(super) remarks: Vec<String>,
}

type Told<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// Checks every picture of the sweep, fetches and reads every LoRA once.
pub(super) fn plan(sweep: &Sweep, config: &Config, device: &Device, sources: &Sources, told: Told) -> Result<Plan, Error> {
    let grid = &sweep.grid;
    let count = grid.count().unwrap_or(usize::MAX);
    if count > MOST_CELLS {
        return Err(Error::Combination {
            field: "sweep",
            problem: format!("would have {count} cells, more than {MOST_CELLS}, which is the most of one run"),
            hint: "make several runs of it".into(),
        });
    }
    if let Some(most) = sweep.most.filter(|most| count > *most) {
        return Err(Error::Combination {
            field: "sweep",
            problem: format!("would make {count} pictures, more than {most}"),
            hint: "leave values out, or say that it is meant with --yes".into(),
        });
    }
    let mut planner = Planner { config, device, sources, bases: BTreeMap::new(), adapters: HashMap::new(), pictures: None };
    planner.check_pictures(sweep)?;
    let (mut cells, mut remarks) = (Vec::new(), Vec::new());
    for at in grid.cells() {
        let asked = sweep.shared.asked(&values(grid, &at))?;
        let exact = planner.exact(asked, &mut remarks, told)?;
        let key = hex(&Sha256::digest(exact.to_string()))[..KEY_DIGITS].to_owned();
        cells.push(Cell { key, at, exact });
    }
    Ok(Plan { cells, bases: planner.bases, remarks })
}

/// The values at a place of the grid.
pub(super) fn values<'a>(grid: &'a Grid, at: &[usize]) -> Vec<(Axis, &'a Value)> {
    grid.axes.iter().zip(at).map(|((axis, values), place)| (*axis, &values[*place])).collect()
}

/// The cells whose pictures are to be made, each picture once, so that models, LoRAs and prompts change least: all pictures of a
/// model together, in these all of a set of LoRAs, in these all of a prompt.
pub(super) fn order(cells: &[Cell], done: &dyn Fn(&str) -> bool) -> Vec<usize> {
    fn place<'a>(seen: &mut Vec<&'a Json>, value: &'a Json) -> usize {
        seen.iter().position(|has| *has == value).unwrap_or_else(|| {
            seen.push(value);
            seen.len() - 1
        })
    }
    let (mut bases, mut sets, mut keys) = (Vec::new(), Vec::new(), std::collections::HashSet::new());
    let mut prompts: HashMap<&str, usize> = HashMap::new();
    let mut wanted = Vec::new();
    for (i, cell) in cells.iter().enumerate() {
        if done(&cell.key) || !keys.insert(&cell.key) {
            continue;
        }
        let exact = &cell.exact;
        let next = prompts.len();
        let prompt = *prompts.entry(exact["prompt"].as_str().unwrap_or_default()).or_insert(next);
        let base = place(&mut bases, &exact["base"]);
        wanted.push(((base, place(&mut sets, &exact["loras"]), prompt), i));
    }
    // Stable: the rest stays as the grid has it.
    wanted.sort_by_key(|(group, _)| *group);
    wanted.into_iter().map(|(_, i)| i).collect()
}

struct Planner<'a> {
    config: &'a Config,
    device: &'a Device,
    sources: &'a Sources,
    bases: BTreeMap<String, Base>,
    /// The digest of what each reference leads to.
    adapters: HashMap<String, String>,
    /// Digests of the picture to start from and of its mask.
    pictures: Option<(String, Option<String>)>,
}

impl Planner<'_> {
    /// Decodes the picture to start from once, with every strength.
    fn check_pictures(&mut self, sweep: &Sweep) -> Result<(), Error> {
        let grid = &sweep.grid;
        let first = vec![0; grid.axes.len()];
        let asked = sweep.shared.asked(&values(grid, &first))?;
        let digest = |picture: &Picture| hex(&Sha256::digest(&picture.bytes));
        self.pictures = asked.request.image.as_ref().map(|image| (digest(image), asked.request.mask.as_ref().map(digest)));
        let strengths = grid.axes.iter().position(|(axis, _)| *axis == Axis::Strength);
        for place in 0..strengths.map_or(1, |i| grid.axes[i].1.len()) {
            let mut at = first.clone();
            if let Some(i) = strengths {
                at[i] = place;
            }
            let asked = sweep.shared.asked(&values(grid, &at))?;
            generate::prepare(&asked.request, &self.base(&asked.model)?.model)?;
        }
        Ok(())
    }

    fn base(&mut self, name: &str) -> Result<&Base, Error> {
        if !self.bases.contains_key(name) {
            let model = models::resolve(name, self.config)?;
            let unreadable = |source| Error::UnreadableFile { field: "model", path: name.into(), source };
            let sha256 = models::digest(&model.bundle, self.config.cache.as_deref()).map_err(unreadable)?;
            let settings = settings(&model.bundle)?;
            self.bases.insert(name.into(), Base { model, sha256, settings });
        }
        Ok(&self.bases[name])
    }

    /// Read and checked, but not kept: a sweep may have more LoRAs than fit into memory.
    fn adapter(&mut self, lora: &Lora, told: Told) -> Result<String, Error> {
        if let Some(digest) = self.adapters.get(&lora.reference) {
            return Ok(digest.clone());
        }
        let opened = self.sources.open(std::slice::from_ref(lora), told)?;
        let digest = opened[0].adapter.digest().to_owned();
        self.adapters.insert(lora.reference.clone(), digest.clone());
        Ok(digest)
    }

    fn exact(&mut self, asked: Asked, remarks: &mut Vec<String>, told: Told) -> Result<Json, Error> {
        let precision = asked.precision_on(self.device);
        precision.fits(self.device)?;
        precision.allows(asked.request.lora_mode)?;
        let Asked { model, mut request, .. } = asked;
        let loras = std::mem::take(&mut request.loras);
        let strength = request.image.take().map(|_| request.prompt_strength.unwrap_or(generate::PROMPT_STRENGTH));
        (request.mask, request.prompt_strength) = (None, None);
        // What `prepare` says of trigger words depends on there being LoRAs.
        request.loras.clone_from(&loras);
        let pictures = self.pictures.clone().unzip();
        let base = self.base(&model)?;
        let guided = base.model.shape.guidance;
        let (digest, settings) = (base.sha256.clone(), base.settings.clone());
        let (job, said) = generate::prepare(&request, &base.model)?;
        for remark in said {
            if !remarks.contains(&remark) {
                remarks.push(remark);
            }
        }
        let mut selected = Vec::new();
        for lora in &loras {
            let digest = self.adapter(lora, told)?;
            // Nothing of it is on the weights.
            if lora.scales.model != 0. || lora.scales.text != 0. {
                selected.push(exact_lora(&digest, lora));
            }
        }
        Ok(json!({
            "base": { "sha256": digest, "settings": settings, "dtype": precision.name() },
            "loras": selected,
            "lora_mode": format!("{:?}", job.lora_mode).to_lowercase(),
            "prompt": job.prompt,
            "negative_prompt": (job.true_cfg > 1.).then_some(job.negative_prompt),
            "width": job.width,
            "height": job.height,
            "steps": job.steps,
            "guidance": guided.then_some(job.guidance),
            "true_cfg": job.true_cfg,
            "seed": job.seed,
            "noise": generate::noise_name(job.noise),
            "image": pictures.0,
            "mask": pictures.1.flatten(),
            "strength": strength,
        }))
    }
}

fn exact_lora(digest: &str, lora: &Lora) -> Json {
    let scales = &lora.scales;
    json!({
        "sha256": digest,
        "scale": scales.model,
        "text_scale": scales.text,
        "blocks": scales.blocks.iter().any(|factor| *factor != 1.).then(|| scales.blocks.to_vec()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(key: &str, base: u32, lora: &str, prompt: &str) -> Cell {
        let exact = json!({ "base": base, "loras": lora, "prompt": prompt });
        Cell { key: key.into(), at: Vec::new(), exact }
    }

    fn changes(cells: &[Cell], order: &[usize], field: &str) -> usize {
        order.windows(2).filter(|pair| cells[pair[0]].exact[field] != cells[pair[1]].exact[field]).count()
    }

    #[test]
    fn models_loras_and_prompts_change_as_rarely_as_they_can() {
        let mut cells = Vec::new();
        for (i, (base, lora, prompt)) in [
            (1, "b", "x"),
            (2, "a", "x"),
            (1, "a", "y"),
            (2, "b", "y"),
            (1, "b", "y"),
            (1, "a", "x"),
            (1, "b", "x"),
            (1, "a", "y"),
        ]
        .into_iter()
        .enumerate()
        {
            cells.push(cell(&i.to_string(), base, lora, prompt));
        }
        let order = order(&cells, &|_| false);
        assert_eq!(order.len(), 8);
        assert_eq!(changes(&cells, &order, "base"), 1);
        assert_eq!(changes(&cells, &order, "loras"), 3, "two sets on each of two models");
        assert_eq!(order[..6], [0, 6, 4, 5, 2, 7], "the first model's, each LoRA's prompts together");
    }

    #[test]
    fn a_picture_is_made_once_and_not_again() {
        let cells = [cell("a", 1, "", "x"), cell("b", 1, "", "x"), cell("a", 1, "", "x"), cell("c", 1, "", "x")];
        assert_eq!(order(&cells, &|_| false), [0, 1, 3]);
        assert_eq!(order(&cells, &|key| key == "b"), [0, 3]);
    }
}
