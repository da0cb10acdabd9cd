//! An adapter's file under another program's names.

use std::collections::HashMap;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use ::models::lora::{Adapter, Format, convert as tensors};
use ::models::weights::{Checkpoint, write};
use serde::Serialize;

use super::watch::{Stage, Told, Watched, tell};
use super::{Sources, target};
use crate::config::Config;
use crate::fetch;
use crate::ops::generate::Precision;
use crate::ops::{Error, files, shown};

/// What of a header stays true under other names: not ranks and alphas, which are in the tensors now.
const KEPT: &[&str] = &["ss_tag_frequency", "ss_base_model_version", "ss_output_name", "ss_sd_model_name", "modelspec."];

#[derive(Debug, Clone, Serialize)]
pub struct Converted {
    #[serde(serialize_with = "shown::path")]
    pub path: PathBuf,
    pub tensors: usize,
    pub bytes: u64,
    /// What of the adapter is not in it, and what else a user of it should be told.
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct ConvertOrder {
    pub reference: String,
    pub out: PathBuf,
    pub format: Format,
    /// As it is stored if not given.
    pub precision: Option<Precision>,
    pub force: bool,
}

/// Writes the adapter under the other names; `out` is there either whole or not at all.
pub fn convert(order: &ConvertOrder, config: &Config, told: Told<'_>) -> Result<Converted, Error> {
    let (reference, out) = (order.reference.as_str(), order.out.as_path());
    let failed = |source| Error::Write { path: out.into(), source };
    let folder = target::check(out, order.force)?;
    let refused = |source: ::models::lora::Error| Error::Lora { reference: fetch::shown(reference), source: Box::new(source) };
    let file = Sources::new(config).file(reference, &mut |progress| told(Stage::Fetching(progress)))?;
    let adapter = Adapter::open(file.path()).map_err(refused)?;
    let tensors = tensors(&adapter, order.format, order.precision.and_then(Precision::dtype)).map_err(refused)?;
    let header = Checkpoint::open(&[file.path().into()]).map_err(|e| refused(e.into()))?;
    let kept = |(key, _): &(&String, &String)| KEPT.iter().any(|kept| key.starts_with(kept));
    let mut metadata: HashMap<String, String> =
        header.metadata().iter().filter(kept).map(|(key, text)| (key.clone(), text.clone())).collect();
    metadata.insert("format".into(), "pt".into());

    let count = tensors.len();
    let entry = |(name, tensor): (String, candle_core::Tensor)| {
        let dtype = write::stored_as(tensor.dtype()).unwrap_or(safetensors::Dtype::F32);
        let shape = tensor.dims().to_vec();
        write::Entry { name, dtype, shape, bytes: Box::new(move || write::bytes(&tensor).map_err(std::io::Error::other)) }
    };
    let mut temporary = files::temporary(folder).map_err(failed)?;
    let mut writer = Watched::new(BufWriter::new(temporary.as_file_mut()), told);
    let written = write::write(&mut writer, Some(metadata), tensors.into_iter().map(entry).collect());
    written.and_then(|()| writer.flush()).map_err(|source| writer.cause(failed(source)))?;
    drop(writer);
    tell(told, Stage::Finishing)?;
    let bytes = temporary.as_file().metadata().map_err(failed)?.len();
    files::finish(temporary, out, order.force)?;
    Ok(Converted { path: out.into(), tensors: count, bytes, warnings: adapter.report.warnings })
}
