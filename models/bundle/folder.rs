//! Finding a model's files: a diffusers folder, or single files as BFL and ComfyUI publish them, side by side.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{Blob, Bundle, ClipVocabulary, Files};
use crate::weights::names::{self, Component};
use crate::weights::{Checkpoint, Error};

/// Where ComfyUI keeps each kind of file, seen from the folder of the transformer.
const NEIGHBOURS: &[&str] = &[".", "../clip", "../text_encoders", "../vae"];

impl Bundle {
    /// The model at `path`: a diffusers folder, a folder of single files, or the transformer's file.
    pub fn detect(path: &Path) -> Result<Self, Error> {
        if path.join("transformer").is_dir() {
            Self::from_folder(path)
        } else if path.is_dir() {
            Self::from_files(None, &weight_files(path)?, path)
        } else {
            let folder = path.parent().unwrap_or(Path::new("."));
            let mut files = Vec::new();
            for neighbour in NEIGHBOURS {
                let neighbour = folder.join(neighbour);
                if neighbour.is_dir() {
                    files.extend(weight_files(&neighbour)?);
                }
            }
            Self::from_files(Some(path), &files, folder)
        }
    }

    /// A folder in the diffusers layout.
    pub fn from_folder(folder: &Path) -> Result<Self, Error> {
        let part = |component, name: &str| component_files(component, &folder.join(name));
        let scheduler = folder.join("scheduler/scheduler_config.json");
        let (t5_tokenizer, t5_tokenizer_config, clip_tokenizer) = tokenizers(folder)?;
        Ok(Self {
            transformer: part(Component::Transformer, "transformer")?,
            t5: part(Component::T5, "text_encoder_2")?,
            clip: part(Component::Clip, "text_encoder")?,
            vae: part(Component::Vae, "vae")?,
            scheduler: scheduler.is_file().then_some(Blob::File(scheduler)),
            t5_tokenizer,
            t5_tokenizer_config,
            clip_tokenizer,
        })
    }

    /// Single files, told apart by the tensors in them. The transformer is `chosen` if given; each other component comes from
    /// the same file if that holds it, else from the largest of `others` that does.
    fn from_files(chosen: Option<&Path>, others: &[PathBuf], folder: &Path) -> Result<Self, Error> {
        let chosen = chosen.map(|path| Ok::<_, Error>((path.to_path_buf(), components_in(path)?))).transpose()?;
        let found: Vec<(PathBuf, BTreeSet<Component>)> =
            others.iter().filter_map(|path| Some((path.clone(), components_in(path).ok()?))).collect();
        let pick = |component: Component| {
            let here = chosen.iter().filter(|(_, kinds)| kinds.contains(&component)).map(|(path, _)| path);
            let beside = found.iter().filter(|(_, kinds)| kinds.contains(&component)).map(|(path, _)| path);
            let size = |path: &&PathBuf| std::fs::metadata(path).map_or(0, |meta| meta.len());
            let path = match (component, &chosen) {
                (Component::Transformer, Some((path, kinds))) if !kinds.contains(&component) => return Err(no_transformer(path)),
                _ => here.chain(beside.max_by_key(size)).next(),
            };
            let path = path.ok_or_else(|| Error::MissingComponent { component, folder: folder.into() })?;
            tracing::debug!(%component, path = %path.display(), "weights");
            Ok(Files { weights: vec![Blob::File(path.clone())], config: None })
        };
        let (t5_tokenizer, t5_tokenizer_config, clip_tokenizer) = tokenizers(folder)?;
        Ok(Self {
            transformer: pick(Component::Transformer)?,
            t5: pick(Component::T5)?,
            clip: pick(Component::Clip)?,
            vae: pick(Component::Vae)?,
            scheduler: None,
            t5_tokenizer,
            t5_tokenizer_config,
            clip_tokenizer,
        })
    }
}

/// The components that a file holds, from its header.
fn components_in(path: &Path) -> Result<BTreeSet<Component>, Error> {
    let checkpoint = Checkpoint::open(&[path.to_path_buf()])?;
    let all = [Component::Transformer, Component::T5, Component::Clip, Component::Vae];
    Ok(all.into_iter().filter(|component| names::prefix_in(*component, &checkpoint).is_some()).collect())
}

fn no_transformer(path: &Path) -> Error {
    let kind = Checkpoint::open(&[path.to_path_buf()]).ok().and_then(|checkpoint| names::foreign(&checkpoint));
    let looks_like = kind.unwrap_or("it holds no FLUX.1 transformer").to_string();
    Error::Foreign { path: path.into(), looks_like }
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let io = |source| Error::Io { path: folder.into(), source };
    let mut paths = std::fs::read_dir(folder).map_err(io)?.map(|entry| Ok(entry.map_err(io)?.path())).collect::<Result<Vec<_>, _>>()?;
    paths.sort();
    Ok(paths)
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().and_then(|extension| extension.to_str()).is_some_and(|extension| extensions.contains(&extension))
}

fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    Ok(list(folder)?.into_iter().filter(|path| has_extension(path, &["safetensors", "gguf"])).collect())
}

/// One component's folder: an index with its shards, or a single file.
fn component_files(component: Component, folder: &Path) -> Result<Files, Error> {
    let missing = || Error::MissingComponent { component, folder: folder.into() };
    if !folder.is_dir() {
        return Err(missing());
    }
    let config = Some(folder.join("config.json")).filter(|path| path.is_file()).map(Blob::File);
    let indices: Vec<PathBuf> = list(folder)?.into_iter().filter(|path| path.to_string_lossy().ends_with(".safetensors.index.json")).collect();
    // `model.fp16.safetensors` and the like are variants; the plain name is shorter.
    let shortest = |paths: Vec<PathBuf>| paths.into_iter().min_by_key(|path| path.as_os_str().len());
    let weights = match shortest(indices) {
        Some(index) => shards(&index, folder)?,
        None => vec![shortest(weight_files(folder)?).ok_or_else(|| pickled(folder).unwrap_or_else(missing))?],
    };
    Ok(Files { weights: weights.into_iter().map(Blob::File).collect(), config })
}

/// A folder with nothing but PyTorch pickles deserves its own message.
fn pickled(folder: &Path) -> Option<Error> {
    let path = list(folder).ok()?.into_iter().find(|path| has_extension(path, &["bin", "pt", "pth", "ckpt"]))?;
    let looks_like = "a PyTorch pickle, which can run code when opened; get the .safetensors files of the model".into();
    Some(Error::Foreign { path, looks_like })
}

/// The files that an index names, all of which must be there.
fn shards(index: &Path, folder: &Path) -> Result<Vec<PathBuf>, Error> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let text = Blob::File(index.into()).read()?;
    let parsed: Index = serde_json::from_slice(&text).map_err(|e| Error::Config { path: index.into(), reason: e.to_string() })?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    let shard = |name: String| {
        let plain = Path::new(&name).file_name().is_some_and(|file| file == name.as_str());
        let path = folder.join(&name);
        if plain && path.is_file() { Ok(path) } else { Err(Error::MissingShard { index: index.into(), shard: name.into() }) }
    };
    names.into_iter().map(shard).collect()
}

/// T5's and CLIP's tokenizers in `tokenizer_2` and `tokenizer` below `folder`.
fn tokenizers(folder: &Path) -> Result<(Blob, Option<Blob>, ClipVocabulary), Error> {
    let file = |name: &str| Some(folder.join(name)).filter(|path| path.is_file()).map(Blob::File);
    let absent = |what: &str, name: &str| Error::Config {
        path: folder.join(name),
        reason: format!("{what}'s tokenizer is not there; copy the folders tokenizer and tokenizer_2 of the model's repository beside the weights"),
    };
    let t5 = file("tokenizer_2/tokenizer.json").ok_or_else(|| absent("T5", "tokenizer_2/tokenizer.json"))?;
    let clip = match (file("tokenizer/vocab.json"), file("tokenizer/merges.txt"), file("tokenizer/tokenizer.json")) {
        (Some(vocab), Some(merges), _) => ClipVocabulary::VocabMerges { vocab, merges },
        (_, _, Some(json)) => ClipVocabulary::Json(json),
        _ => return Err(absent("CLIP", "tokenizer/vocab.json")),
    };
    Ok((t5, file("tokenizer_2/tokenizer_config.json"), clip))
}
