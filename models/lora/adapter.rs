//! An adapter file, read and checked: what it changes, and a report on it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device};
use rayon::prelude::*;
use safetensors::Dtype;
use sha2::{Digest, Sha256};

use super::assemble::{self, Parts};
use super::error::some;
use super::keys::{self, Parsed, Role};
use super::modules::{Module, Naming, WIDTH};
use super::{Base, Change, Error, Report, foreign, metadata, precheck, twice};
use crate::weights::{self, Checkpoint, Component, Kind as Storage, Stored};

/// One change of one tensor of the model.
#[derive(Debug, Clone)]
pub struct Update {
    pub module: Module,
    /// The module's bias, not its weight.
    pub bias: bool,
    pub change: Change,
}

impl Update {
    /// The canonical name of the tensor that is changed.
    #[must_use]
    pub fn tensor(&self) -> String {
        if self.bias { self.module.bias() } else { self.module.weight() }
    }

    /// The hidden width of the base that this fits, as far as a block's matrix tells it.
    fn width(&self) -> Option<usize> {
        let name = self.module.name.as_str();
        if self.bias || !(name.starts_with("double_blocks.") || name.starts_with("single_blocks.")) {
            return None;
        }
        let shape = self.change.kind.shape().ok()?;
        let [rows, columns] = shape.as_slice() else { return None };
        let inwards = name.ends_with("_mlp.2") || name.ends_with(".linear2");
        Some(if inwards { *rows } else { *columns })
    }
}

/// A file that can be applied. Its tensors are as stored; the file is not needed any more.
#[derive(Debug, Clone)]
pub struct Adapter {
    pub updates: Vec<Update>,
    pub report: Report,
    identity: String,
}

impl Adapter {
    /// Reads and checks a file. Errors name what it is instead, or what is wrong with it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let (report, updates) = Self::examine(path);
        let updates = updates?;
        let mut read = Sha256::new_with_prefix(&report.digest);
        updates.iter().for_each(|update| read.update(update.change.factor.to_le_bytes()));
        let identity = hexadecimal(read);
        Ok(Self { updates, report, identity })
    }

    /// The report alone, with the refusal in it if there is one.
    #[must_use]
    pub fn inspect(path: &Path) -> Report {
        let (mut report, updates) = Self::examine(path);
        // No base is at hand that would refuse what does not fit it.
        let widths: BTreeSet<usize> = updates.unwrap_or_default().iter().filter_map(Update::width).collect();
        if widths.iter().any(|width| *width != WIDTH) {
            let widths = widths.iter().map(usize::to_string).collect::<Vec<_>>().join(" and ");
            report.notes.push(format!("it fits a base that is {widths} wide, and not FLUX.1, which is {WIDTH} wide"));
        }
        report
    }

    /// SHA-256 of the file, in hexadecimal.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.report.digest
    }

    /// The same with its tensors on `device`, in f32.
    pub(super) fn to_device(&self, device: &Device) -> candle_core::Result<Self> {
        let moved = |update: &Update| -> candle_core::Result<Update> {
            Ok(Update { module: update.module.clone(), bias: update.bias, change: update.change.to_device(device)? })
        };
        let updates = self.updates.iter().map(moved).collect::<candle_core::Result<_>>()?;
        Ok(Self { updates, report: self.report.clone(), identity: self.identity.clone() })
    }

    /// Of all tensors in f32.
    pub(super) fn bytes(&self) -> candle_core::Result<u64> {
        let values = self.updates.iter().map(|update| update.change.values()).sum::<candle_core::Result<usize>>()?;
        Ok((values * DType::F32.size_in_bytes()) as u64)
    }

    /// Equal for adapters that change weights alike: the file's content, and what an `adapter_config.json` beside it says of it.
    #[must_use]
    pub fn identity(&self) -> &str {
        &self.identity
    }

    fn examine(path: &Path) -> (Report, Result<Vec<Update>, Error>) {
        let mut report = Report::default();
        let updates = read(path, &mut report);
        match &updates {
            Ok(_) => report.warn(),
            Err(error) => report.refuse(error),
        }
        (report, updates)
    }
}

fn read(path: &Path, report: &mut Report) -> Result<Vec<Update>, Error> {
    let foreign = |looks_like| Error::Foreign { path: path.into(), looks_like };
    let checkpoint = open(path)?;
    if checkpoint.keys().any(|key| matches!(checkpoint.get(key).map(|s| s.kind), Some(Storage::Gguf(_)))) {
        return Err(foreign("a GGUF file; LoRAs are safetensors files".into()));
    }
    report.bytes = checkpoint.file_bytes().iter().map(|bytes| bytes.len() as u64).sum();
    report.tensors = checkpoint.len();
    let (digest, checked) = rayon::join(|| digest(&checkpoint), || check_values(&checkpoint));
    report.digest = digest;
    for key in checkpoint.keys() {
        if let Some(Stored { kind: Storage::Plain(dtype), .. }) = checkpoint.get(key) {
            *report.dtypes.entry(format!("{dtype:?}").to_lowercase()).or_default() += 1;
        }
    }
    let header = checkpoint.metadata();
    report.trigger_words = metadata::trigger_words(header);
    report.trainer = metadata::trainer(header);

    let (mut modules, unmatched_modules) = sort(&checkpoint, report)?;
    let guidance = modules.keys().any(|module| module.name.starts_with("guidance_in"));
    report.base = Some(match metadata::base(header) {
        Base::Unknown if guidance => Base::Dev,
        stated => stated,
    });
    let transformer = modules.keys().any(|module| module.component == Component::Transformer);
    foreign::refuse(&checkpoint, &report.unmatched_keys, transformer)?;
    let keys = report.unmatched_keys.clone();
    if modules.is_empty() && foreign::whole_checkpoint(&checkpoint) {
        let what = "a base model or a part of one, not an adapter; give it with --model".into();
        return Err(Error::Unsupported { what, keys: Vec::new() });
    }
    if modules.is_empty() {
        return Err(Error::NothingMatched { tensors: checkpoint.len(), keys });
    }
    if unmatched_modules > modules.len() {
        return Err(Error::MostlyUnmatched { unmatched: unmatched_modules, modules: modules.len() + unmatched_modules, keys });
    }
    report.warnings.extend(twice::settle(&checkpoint, &mut modules));
    report.modules_matched = modules.len();
    checked?;
    assemble::updates(&checkpoint, path, modules, report)
}

fn open(path: &Path) -> Result<Checkpoint, Error> {
    use std::io::Read;
    let io = |source| Error::Io { path: path.into(), source };
    let mut file = std::fs::File::open(path).map_err(io)?;
    let mut head = vec![0; 9];
    let n = file.read(&mut head).map_err(io)?;
    // A header is checked before the parser allocates for it; what is no safetensors file gets its own message from the sniffer.
    if n == 9 && head[8] == b'{' {
        let length = u64::from_le_bytes([head[0], head[1], head[2], head[3], head[4], head[5], head[6], head[7]]);
        let mut header = head;
        file.take(length.min(precheck::MAX_HEADER_BYTES as u64).saturating_sub(1)).read_to_end(&mut header).map_err(io)?;
        precheck(&header).map_err(|reason| Error::Limit { path: path.into(), reason })?;
    }
    Checkpoint::open(&[path.to_path_buf()]).map_err(|error| match error {
        weights::Error::Foreign { path, looks_like } => Error::Foreign { path, looks_like },
        weights::Error::Damaged { path, reason } => Error::Damaged { path, reason },
        other => other.into(),
    })
}

fn digest(checkpoint: &Checkpoint) -> String {
    let mut hasher = Sha256::new();
    checkpoint.file_bytes().iter().for_each(|bytes| hasher.update(bytes));
    hexadecimal(hasher)
}

fn hexadecimal(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How OneTrainer calls an embedding that it trained with the LoRA, before the embedding's own name and the encoder's.
const EMBEDDING: &str = "bundle_emb.";

/// Sorts the keys by module. Returns the modules and the number of modules that are none of FLUX.1's.
fn sort<'a>(checkpoint: &'a Checkpoint, report: &mut Report) -> Result<(BTreeMap<Module, Parts<'a>>, usize), Error> {
    let mut modules: BTreeMap<Module, Parts<'a>> = BTreeMap::new();
    let (mut prefixes, mut namings, mut separators) = (BTreeSet::new(), BTreeSet::<Naming>::new(), BTreeSet::new());
    let (mut unknown, mut ignored, mut embeddings) = (BTreeSet::new(), 0, BTreeSet::new());
    for key in checkpoint.keys() {
        match keys::parse(key) {
            Parsed::Known(found) => {
                prefixes.insert(found.prefix);
                namings.insert(found.naming);
                separators.insert(if found.dotted { "dotted" } else { "flattened" });
                let parts = modules.entry(found.module).or_default();
                parts.body = found.body;
                parts.naming = Some(found.naming);
                // What is refused by its name may have several tensors in one role.
                if let Some(before) = parts.keys.insert(found.role, key)
                    && !matches!(found.role, Role::Unsupported(_))
                    && !same(checkpoint, before, key)
                {
                    let reason = format!("{before} and {key} say different things about it");
                    return Err(Error::Module { module: parts.body.clone(), reason });
                }
            }
            Parsed::Ignored => match key.strip_prefix(EMBEDDING) {
                Some(name) => {
                    embeddings.insert(name.rsplit_once('.').map_or(name, |(name, _)| name).to_owned());
                }
                None => ignored += 1,
            },
            // ComfyUI's extraction stores differences of tensors that it did not change.
            Parsed::Unknown if key.ends_with(".diff") && zero(checkpoint, key) => ignored += 1,
            Parsed::Unknown => {
                unknown.insert(keys::split_role(key).map_or(key, |(stem, _)| stem));
                report.unmatched_keys.push(key.into());
            }
        }
    }
    if ignored > 0 {
        report.notes.push(format!("{ignored} tensors of the trainer's own bookkeeping, or zero, are not applied"));
    }
    if !embeddings.is_empty() {
        let words = some("", &embeddings.into_iter().collect::<Vec<_>>(), "");
        let lost = "which are not applied: in a prompt they do not mean what they meant in training";
        report.warnings.push(format!("the LoRA brings embeddings of its own for {words}, {lost}"));
    }
    report.prefix = prefixes.into_iter().collect();
    report.naming = namings.into_iter().collect();
    report.separators = separators.into_iter().collect();
    let encoders = [(Component::Clip, "clip_l"), (Component::T5, "t5")];
    let has = |component: Component| modules.keys().any(|module| module.component == component);
    report.text_encoders = encoders.into_iter().filter(|(component, _)| has(*component)).map(|(_, name)| name).collect();
    Ok((modules, unknown.len()))
}

fn same(checkpoint: &Checkpoint, one: &str, other: &str) -> bool {
    let (Some(one), Some(other)) = (checkpoint.get(one), checkpoint.get(other)) else { return false };
    one.kind == other.kind && one.shape == other.shape && checkpoint.bytes(one) == checkpoint.bytes(other)
}

/// All values are (positive or negative) zero.
pub(super) fn zero(checkpoint: &Checkpoint, key: &str) -> bool {
    let Some(stored) = checkpoint.get(key) else { return false };
    let size = match stored.kind {
        Storage::Plain(dtype) => dtype.bitsize() / 8,
        Storage::Gguf(_) => return false,
    };
    // The sign is the upper bit of the last byte.
    let value =
        |bytes: &[u8]| bytes.split_last().is_none_or(|(last, rest)| last & 0x7f == 0 && rest.iter().all(|byte| *byte == 0));
    size > 0 && checkpoint.bytes(stored).chunks(size).all(value)
}

/// Every value is a number. Alphas may be infinite: ai-toolkit's full LoKr overflows f16, and no one multiplies with it.
fn check_values(checkpoint: &Checkpoint) -> Result<(), Error> {
    let keys: Vec<&str> = checkpoint.keys().filter(|key| !matches!(keys::split_role(key), Some((_, Role::Alpha)))).collect();
    let bad = keys.par_iter().find_map_first(|key| {
        let stored = checkpoint.get(key)?;
        let Storage::Plain(dtype) = stored.kind else { return None };
        (!finite(dtype, checkpoint.bytes(stored))).then(|| (*key).to_owned())
    });
    bad.map_or(Ok(()), |key| Err(Error::NotFinite { key }))
}

/// Whether no element has all bits of its exponent set (for e4m3: of exponent and mantissa).
fn finite(dtype: Dtype, bytes: &[u8]) -> bool {
    const STRETCH: usize = 1 << 16;
    // A count without early exit, so that the compiler can use vectors.
    fn none<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool + Sync) -> bool {
        let clean = |stretch: &[u8]| stretch.as_chunks::<N>().0.iter().map(|raw| u64::from(bad(*raw))).sum::<u64>() == 0;
        bytes.par_chunks(STRETCH * N).all(clean)
    }
    match dtype {
        Dtype::F32 => none(bytes, |raw| u32::from_le_bytes(raw) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::BF16 => none(bytes, |raw| u16::from_le_bytes(raw) & 0x7f80 == 0x7f80),
        Dtype::F16 => none(bytes, |raw| u16::from_le_bytes(raw) & 0x7c00 == 0x7c00),
        Dtype::F64 => none(bytes, |raw| u64::from_le_bytes(raw) & 0x7ff0_0000_0000_0000 == 0x7ff0_0000_0000_0000),
        Dtype::F8_E4M3 => none(bytes, |[byte]| byte & 0x7f == 0x7f),
        Dtype::F8_E5M2 => none(bytes, |[byte]| byte & 0x7c == 0x7c),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use half::{bf16, f16};

    use super::*;

    /// PEFT keeps alpha in a file of its own: the same tensors beside another one are another adapter.
    #[test]
    fn what_is_said_beside_a_file_is_part_of_it() {
        let peft = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/lora/writers/peft");
        let folder = tempfile::tempdir().unwrap();
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            std::fs::copy(peft.join(file), folder.path().join(file)).unwrap();
        }
        let open = || Adapter::open(&folder.path().join("adapter_model.safetensors")).unwrap();
        let (first, again) = (open(), open());
        assert_eq!(first.identity(), again.identity());
        let config = folder.path().join("adapter_config.json");
        let mut said: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        said["alpha_pattern"]["out"] = 7.into();
        said["lora_alpha"] = 7.into();
        std::fs::write(&config, said.to_string()).unwrap();
        let other = open();
        assert_eq!(first.digest(), other.digest());
        assert_ne!(first.identity(), other.identity());
    }

    /// Without that file nobody knows the scale, and whoever uses the adapter is told.
    #[test]
    fn an_adapter_of_pefts_that_came_without_its_config_says_so() {
        let peft = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/lora/writers/peft/adapter_model.safetensors");
        let alone = tempfile::tempdir().unwrap().path().with_extension("safetensors");
        std::fs::copy(&peft, &alone).unwrap();
        let told = |path: &Path| Adapter::inspect(path).warnings.iter().any(|warning| warning.contains("adapter_config.json"));
        assert_eq!((told(&peft), told(&alone)), (false, true));
        std::fs::remove_file(alone).unwrap();
    }

    /// kohya's extraction writes alpha as Python has it.
    #[test]
    fn alphas_may_be_whole_numbers() {
        let kohya = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/lora/kohya.safetensors");
        let folder = tempfile::tempdir().unwrap();
        let factors = |dtype: DType| {
            let mut tensors = candle_core::safetensors::load(&kohya, &Device::Cpu).unwrap();
            for (_, alpha) in tensors.iter_mut().filter(|(name, _)| name.ends_with(".alpha")) {
                *alpha = Tensor::full(3f32, (), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            }
            let path = folder.path().join("a.safetensors");
            candle_core::safetensors::save(&tensors, &path).unwrap();
            Adapter::open(&path).unwrap().updates.iter().map(|update| update.change.factor).collect::<Vec<_>>()
        };
        let of_floats = factors(DType::F32);
        assert!(of_floats.len() > 3 && of_floats.iter().all(|factor| *factor != 1.));
        assert_eq!(factors(DType::I64), of_floats);
    }

    #[test]
    fn numbers_that_are_none_are_found_in_every_type() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 70_000, 99_999] {
                let mut values = vec![1.5f32; 100_000];
                let check = |values: &[f32]| {
                    let bytes = |f: &dyn Fn(f32) -> Vec<u8>| values.iter().flat_map(|v| f(*v)).collect::<Vec<u8>>();
                    [
                        finite(Dtype::F32, &bytes(&|v| v.to_le_bytes().to_vec())),
                        finite(Dtype::F16, &bytes(&|v| f16::from_f32(v).to_le_bytes().to_vec())),
                        finite(Dtype::BF16, &bytes(&|v| bf16::from_f32(v).to_le_bytes().to_vec())),
                        finite(Dtype::F64, &bytes(&|v| f64::from(v).to_le_bytes().to_vec())),
                    ]
                };
                assert_eq!(check(&values), [true; 4]);
                values[at] = bad;
                assert_eq!(check(&values), [false; 4], "{bad} at {at}");
            }
        }
        assert!(finite(Dtype::F8_E4M3, &[0x7e, 0xfe, 0]) && !finite(Dtype::F8_E4M3, &[0, 0xff]));
        assert!(finite(Dtype::F8_E5M2, &[0x7b, 0]) && !finite(Dtype::F8_E5M2, &[0x7c]));
    }
}
