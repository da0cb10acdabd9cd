//! Open files: every tensor's place, type and shape, without reading any data.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, gguf_file};

use super::{Component, Error, names, sniff};

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    Plain(safetensors::Dtype),
    Gguf(GgmlDType),
}

/// One tensor in a file.
#[derive(Debug, Clone)]
pub struct Stored {
    pub kind: Kind,
    pub shape: Vec<usize>,
    file: usize,
    start: usize,
    end: usize,
}

enum Bytes {
    Mapped(memmap2::Mmap),
    Static(&'static [u8]),
}

struct Opened {
    path: PathBuf,
    bytes: Bytes,
}

impl Opened {
    fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
        }
    }
}

impl Stored {
    /// Which of the checkpoint's files has it.
    #[must_use]
    pub fn file(&self) -> usize {
        self.file
    }
}

/// The tensors of one or several files, by their stored keys.
#[derive(Clone)]
pub struct Checkpoint {
    files: Arc<Vec<Opened>>,
    tensors: Arc<BTreeMap<String, Stored>>,
    metadata: Arc<BTreeMap<String, String>>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint").field("files", &self.paths()).field("tensors", &self.tensors.len()).finish()
    }
}

impl Checkpoint {
    /// Maps the files and reads their headers. All shards of one component are passed together.
    pub fn open(paths: &[PathBuf]) -> Result<Self, Error> {
        let files = paths.iter().map(|path| map(path)).collect::<Result<Vec<_>, _>>()?;
        Self::from_files(files)
    }

    /// A checkpoint that is part of the program.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self, Error> {
        Self::from_files(vec![Opened { path: name.into(), bytes: Bytes::Static(bytes) }])
    }

    fn from_files(files: Vec<Opened>) -> Result<Self, Error> {
        let mut tensors = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for (key, stored) in index(i, file)? {
                if tensors.insert(key.clone(), stored).is_some() {
                    let reason = format!("tensor {key} is also in another shard");
                    return Err(Error::Damaged { path: file.path.clone(), reason });
                }
            }
        }
        let metadata = files.first().map(|file| metadata(file.bytes())).unwrap_or_default();
        Ok(Self { files: Arc::new(files), tensors: Arc::new(tensors), metadata: Arc::new(metadata) })
    }

    /// What belongs to a component if one file holds several (all-in-one files), else all of it.
    #[must_use]
    pub fn of(&self, component: Component) -> Self {
        match names::prefix_in(component, self) {
            None | Some("") => self.clone(),
            Some(prefix) => self.under(prefix),
        }
    }

    /// The tensors whose keys begin with `prefix`, under the rest of their keys.
    #[must_use]
    pub fn under(&self, prefix: &str) -> Self {
        let inside = |(key, stored): (&String, &Stored)| Some((key.strip_prefix(prefix)?.to_string(), stored.clone()));
        let tensors = Arc::new(self.tensors.iter().filter_map(inside).collect());
        Self { tensors, ..self.clone() }
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Stored> {
        self.tensors.get(key)
    }

    /// The stored bytes of a tensor: little endian, row-major.
    #[must_use]
    pub fn bytes(&self, stored: &Stored) -> &[u8] {
        &self.files[stored.file].bytes()[stored.start..stored.end]
    }

    /// The one whole number that it is, if it is one.
    #[must_use]
    pub fn whole_number(&self, stored: &Stored) -> Option<i64> {
        let bytes = self.bytes(stored);
        match stored.kind {
            Kind::Plain(safetensors::Dtype::I64) => bytes.try_into().ok().map(i64::from_le_bytes),
            Kind::Plain(safetensors::Dtype::I32) => bytes.try_into().ok().map(|bytes| i32::from_le_bytes(bytes).into()),
            Kind::Plain(safetensors::Dtype::I16) => bytes.try_into().ok().map(|bytes| i16::from_le_bytes(bytes).into()),
            _ => None,
        }
    }

    /// The texts that the first file's header carries.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Everything in each file.
    #[must_use]
    pub fn file_bytes(&self) -> Vec<&[u8]> {
        self.files.iter().map(Opened::bytes).collect()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    #[must_use]
    pub fn paths(&self) -> Vec<&Path> {
        self.files.iter().map(|file| file.path.as_path()).collect()
    }
}

/// `__metadata__` of a safetensors file.
fn metadata(bytes: &[u8]) -> BTreeMap<String, String> {
    let header = safetensors::SafeTensors::read_metadata(bytes).ok();
    header.and_then(|(_, header)| header.metadata().clone()).map(|texts| texts.into_iter().collect()).unwrap_or_default()
}

#[expect(unsafe_code, reason = "memory-mapping a file is unsafe because another process may truncate it while it is read")]
fn map(path: &Path) -> Result<Opened, Error> {
    let io = |source| Error::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    // An empty file cannot be mapped; `sniff` gives it its own message.
    if file.metadata().map_err(io)?.len() == 0 {
        return Ok(Opened { path: path.into(), bytes: Bytes::Static(&[]) });
    }
    let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    Ok(Opened { path: path.into(), bytes: Bytes::Mapped(bytes) })
}

fn index(i: usize, file: &Opened) -> Result<Vec<(String, Stored)>, Error> {
    let bytes = file.bytes();
    match sniff::format(bytes) {
        Ok(sniff::Format::Safetensors) => index_safetensors(i, file, bytes),
        Ok(sniff::Format::Gguf) => index_gguf(i, file, bytes),
        Err(looks_like) => Err(Error::Foreign { path: file.path.clone(), looks_like }),
    }
}

fn index_safetensors(i: usize, file: &Opened, bytes: &[u8]) -> Result<Vec<(String, Stored)>, Error> {
    let damaged = |reason: String| Error::Damaged { path: file.path.clone(), reason };
    let tensors = safetensors::SafeTensors::deserialize(bytes).map_err(|e| match e {
        safetensors::SafeTensorError::MetadataIncompleteBuffer => {
            damaged(format!("it is truncated or has bytes left over ({} bytes on disk); download it again", bytes.len()))
        }
        other => damaged(other.to_string()),
    })?;
    let base = bytes.as_ptr().addr();
    Ok(tensors
        .iter()
        .map(|(key, view)| {
            let start = view.data().as_ptr().addr() - base;
            let end = start + view.data().len();
            (key.to_string(), Stored { kind: Kind::Plain(view.dtype()), shape: view.shape().to_vec(), file: i, start, end })
        })
        .collect())
}

fn index_gguf(i: usize, file: &Opened, bytes: &[u8]) -> Result<Vec<(String, Stored)>, Error> {
    let damaged = |reason: String| Error::Damaged { path: file.path.clone(), reason };
    let content = gguf_file::Content::read(&mut std::io::Cursor::new(bytes)).map_err(|e| damaged(e.to_string()))?;
    let place = |(key, info): (String, gguf_file::TensorInfo)| {
        let kind = info.ggml_dtype;
        let shape = info.shape.dims().to_vec();
        let elements: usize = shape.iter().product();
        let start = usize::try_from(content.tensor_data_offset + info.offset).map_err(|e| damaged(e.to_string()))?;
        let end = start + elements / kind.block_size() * kind.type_size();
        if !elements.is_multiple_of(kind.block_size()) || end > bytes.len() {
            return Err(damaged(format!("tensor {key} ends at byte {end} of {}; download it again", bytes.len())));
        }
        Ok((key, Stored { kind: Kind::Gguf(kind), shape, file: i, start, end }))
    };
    content.tensor_infos.into_iter().map(place).collect()
}
