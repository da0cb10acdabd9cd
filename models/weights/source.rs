//! What a layer's `load` walks: named tensors under a prefix, with a record of what was asked for and found.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};

use super::keep::{self, Keep, OnHost};
use super::names::{self, Component, Part};
use super::read::{self, Rows};
use super::{Checkpoint, Error, Kind};
use crate::nn::{Linear, Mapped, Parameter, Reread, Weight};

/// Keys that real files carry and no model uses.
const IGNORED: &[&str] = &[
    "position_ids",
    "logit_scale",
    "text_projection",
    "text_projection.weight",
    "scaled_fp8",
    "spiece_model",
    "tekken_model",
    "scale_input",
    "input_scale",
    "comfy_quant",
    "encoder.embed_tokens.weight",
];

/// Names under which the scale of an fp8 weight is stored, beside `weight`.
const SCALES: [&str; 2] = ["scale_weight", "weight_scale"];

/// What a load found. A model is used only if nothing is missing, unused or of the wrong shape.
#[derive(Debug, Clone)]
pub struct LoadReport {
    pub component: Component,
    pub applied: usize,
    pub missing: Vec<String>,
    pub unused: Vec<String>,
    /// Name, expected shape, shape in the file.
    pub wrong_shape: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// What the checkpoint seems to be instead.
    pub looks_like: Option<&'static str>,
}

impl LoadReport {
    #[must_use]
    pub fn complete(&self) -> bool {
        self.missing.is_empty() && self.unused.is_empty() && self.wrong_shape.is_empty()
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn some(f: &mut fmt::Formatter<'_>, what: &str, keys: &[String]) -> fmt::Result {
            if keys.is_empty() {
                return Ok(());
            }
            let more = if keys.len() > 5 { format!(" and {} more", keys.len() - 5) } else { String::new() };
            write!(f, "; {} {what}: {}{more}", keys.len(), keys[..keys.len().min(5)].join(", "))
        }
        if let Some(kind) = self.looks_like {
            write!(f, "this is {kind}; ")?;
        }
        write!(f, "{} tensors applied", self.applied)?;
        some(f, "missing", &self.missing)?;
        some(f, "unused", &self.unused)?;
        let shapes: Vec<String> =
            self.wrong_shape.iter().map(|(key, want, got)| format!("{key} (expected {want:?}, got {got:?})")).collect();
        some(f, "of the wrong shape", &shapes)
    }
}

#[derive(Debug, Default)]
struct Seen {
    used: BTreeSet<String>,
    missing: Vec<String>,
    wrong_shape: Vec<(String, Vec<usize>, Vec<usize>)>,
}

/// Canonical names of one component, below a prefix.
#[derive(Debug, Clone)]
pub struct Source {
    component: Component,
    checkpoint: Checkpoint,
    names: Arc<BTreeMap<String, Vec<Part>>>,
    seen: Arc<Mutex<Seen>>,
    parameters: Arc<Mutex<BTreeMap<String, Parameter>>>,
    prefix: String,
    dtype: DType,
    device: Device,
    keep: Keep,
    on_host: OnHost,
    /// Bytes of tensors that were loaded, see [`Self::counting`].
    loaded: Arc<AtomicU64>,
    /// Every tensor that is asked for exists and is random.
    synthetic: bool,
}

impl Source {
    /// The `component` inside `checkpoint`, to be loaded as `dtype` (the type of computation; fp8 and GGUF matrices stay as
    /// stored) on `device`.
    #[must_use]
    pub fn new(component: Component, checkpoint: &Checkpoint, dtype: DType, device: &Device) -> Self {
        let checkpoint = checkpoint.of(component);
        let names = Arc::new(names::canonical(component, &checkpoint));
        Self {
            component,
            checkpoint,
            names,
            seen: Arc::default(),
            parameters: Arc::default(),
            prefix: String::new(),
            dtype,
            device: device.clone(),
            keep: Keep::default(),
            on_host: OnHost::default(),
            loaded: Arc::default(),
            synthetic: false,
        }
    }

    /// The same, with the large matrices kept in another form, and some of the transformer's in main memory.
    #[must_use]
    pub fn kept(self, keep: Keep, on_host: OnHost) -> Self {
        Self { keep, on_host, ..self }
    }

    /// The same, adding the bytes of each tensor to `loaded` when its turn comes.
    #[must_use]
    pub fn counting(self, loaded: &Arc<AtomicU64>) -> Self {
        Self { loaded: loaded.clone(), ..self }
    }

    /// Bytes of all tensors that a load asks for, as they are stored.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        // T5's table has two names; one of them is enough.
        let table = |path: &str| path.ends_with("embed_tokens.weight") && !self.names.contains_key("shared.weight");
        let wanted = self.names.keys().filter(|path| !ignored(path) || table(path));
        wanted.filter_map(|path| self.rows(path)).flatten().map(|part| part.bytes(&self.checkpoint).len() as u64).sum()
    }

    /// Random weights of any size, made on `device`: for benches at real sizes without a checkpoint. Matrices are normal with
    /// the deviation `1 / sqrt(input)`, so activations keep their scale and the arithmetic costs what it costs in earnest.
    pub fn synthetic(component: Component, dtype: DType, device: &Device) -> Result<Self, Error> {
        let empty = Checkpoint::open(&[])?;
        Ok(Self { synthetic: true, ..Self::new(component, &empty, dtype, device) })
    }

    /// The names below `name`.
    #[must_use]
    pub fn at(&self, name: impl fmt::Display) -> Self {
        Self { prefix: self.path(name) + ".", ..self.clone() }
    }

    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    #[must_use]
    pub fn contains(&self, name: impl fmt::Display) -> bool {
        self.names.contains_key(&self.path(name))
    }

    /// The shape that a tensor has in the file, or `None` if there is none of that name. Configurations are read with it.
    #[must_use]
    pub fn shape(&self, name: impl fmt::Display) -> Option<Vec<usize>> {
        self.rows(&self.path(name)).map(|rows| joined(&rows))
    }

    /// Number of consecutive `prefix.0`, `prefix.1`, … below this source.
    #[must_use]
    pub fn count(&self, list: &str) -> usize {
        let below = |i: usize| self.path(format_args!("{list}.{i}."));
        (0..).take_while(|i| self.names.range(below(*i)..).next().is_some_and(|(name, _)| name.starts_with(&below(*i)))).count()
    }

    /// A tensor of this shape, in the dtype of computation.
    pub fn tensor(&self, name: &str, shape: impl Into<Shape>) -> Result<Tensor, Error> {
        self.tensor_as(name, shape, self.dtype)
    }

    /// A tensor of this shape in `dtype`: for values that are used in f32 whatever the model's dtype is.
    pub fn tensor_as(&self, name: &str, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor, Error> {
        let (shape, path) = (shape.into(), self.path(name));
        if self.synthetic {
            return Ok(self.random(&shape)?.to_dtype(dtype)?);
        }
        match self.expect(&path, &shape) {
            Some(rows) => read::dense(&self.checkpoint, &rows, shape.dims(), dtype, &self.device)
                .map_err(|source| Error::Tensor { key: path, source }),
            None => Ok(self.placeholder(&shape)?),
        }
    }

    /// A vector that a LoRA may change, in the dtype of computation.
    pub fn vector(&self, name: &str, width: usize) -> Result<Parameter, Error> {
        self.vector_as(name, width, self.dtype)
    }

    /// As [`Self::vector`], in `dtype`.
    pub fn vector_as(&self, name: &str, width: usize, dtype: DType) -> Result<Parameter, Error> {
        let tensor = self.tensor_as(name, width, dtype)?;
        Ok(self.register(name, Weight::Dense(tensor), &[width], dtype, &self.device))
    }

    /// A linear layer with bias: weight `(output, input)`, bias `(output)`.
    pub fn linear(&self, name: &str, output: usize, input: usize) -> Result<Linear, Error> {
        let layer = self.at(name);
        Ok(Linear::new(layer.matrix(output, input)?, Some(layer.vector("bias", output)?)))
    }

    /// A linear layer without bias: weight `(output, input)`.
    pub fn linear_no_bias(&self, name: &str, output: usize, input: usize) -> Result<Linear, Error> {
        Ok(Linear::new(self.at(name).matrix(output, input)?, None))
    }

    /// Everything that a LoRA may change and that was asked for so far, by canonical name.
    #[must_use]
    pub fn parameters(&self) -> BTreeMap<String, Parameter> {
        self.parameters.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn matrix(&self, output: usize, input: usize) -> Result<Parameter, Error> {
        let device = self.home(&self.path("weight"));
        Ok(self.register("weight", self.weight(output, input)?, &[output, input], self.dtype, &device))
    }

    fn register(&self, name: &str, weight: Weight, shape: &[usize], dtype: DType, device: &Device) -> Parameter {
        let path = self.path(name);
        // Quantised weights stay in place (a LoRA is a branch beside them), so only dense ones are ever read again.
        let reread = matches!(weight, Weight::Dense(_)).then(|| self.rows(&path)).flatten().map(|rows| -> Reread {
            let (checkpoint, shape, device) = (self.checkpoint.clone(), shape.to_vec(), device.clone());
            Arc::new(move || read::dense(&checkpoint, &rows, &shape, dtype, &device).map(Weight::Dense))
        });
        let dense = matches!(weight, Weight::Dense(_)).then(|| self.rows(&path)).flatten();
        let waits = dense.and_then(|rows| self.mapped(&rows, dtype, shape.try_into().ok()?));
        let parameter = Parameter::new(weight, shape, device, reread).waiting(waits);
        self.parameters.lock().unwrap_or_else(PoisonError::into_inner).insert(path, parameter.clone());
        parameter
    }

    /// Where a tensor lives.
    fn home(&self, path: &str) -> Device {
        if self.on_host.has(self.component, path) { Device::Cpu } else { self.device.clone() }
    }

    fn weight(&self, output: usize, input: usize) -> Result<Weight, Error> {
        let (shape, path) = (Shape::from((output, input)), self.path("weight"));
        let device = self.home(&path);
        let keep = if keep::is_large(self.component, &path) { self.keep } else { Keep::Stored };
        if self.synthetic {
            return Ok(keep.convert(self.random(&shape)?.to_device(&device)?)?.with_scales_on(&self.device)?);
        }
        let Some(rows) = self.expect(&path, &shape) else { return Ok(Weight::Dense(self.placeholder(&shape)?)) };
        let failed = |source| Error::Tensor { key: path.clone(), source };
        let all = |kind: fn(Kind) -> bool| rows.iter().all(|part| kind(part.stored.kind));
        if all(|kind| kind == Kind::Plain(safetensors::Dtype::F8_E4M3)) && rows.len() == 1 {
            let data = read::fp8(&self.checkpoint, &rows, shape.dims(), &device).map_err(failed)?;
            let (scale, products) = (self.scale()?, keep.fitting(input) == Keep::Fp8Products);
            if !products {
                return Ok(Weight::Fp8 { data, scale, products });
            }
            // Products take a scale for each row.
            let scale = scale.map_or_else(|| Tensor::ones((), DType::F32, &self.device), Ok)?;
            let scale = Some(scale.broadcast_as((output, 1))?.contiguous()?);
            return Ok(Weight::Fp8 { data, scale, products });
        }
        if all(|kind| matches!(kind, Kind::Gguf(dtype) if dtype.block_size() > 1)) {
            let blocks = read::quantised(&self.checkpoint, &rows, shape.dims(), &device).map_err(failed)?;
            return Ok(Weight::Quantised(Arc::new(blocks)));
        }
        if keep.fitting(input) == Keep::Stored
            && device.is_cpu()
            && !self.device.is_cpu()
            && let Some(mapped) = self.mapped(&rows, self.dtype, [output, input])
        {
            // It waits for the card where it lies.
            return Ok(Weight::Mapped(mapped));
        }
        // GGUF blocks are made by the processor.
        let made = if matches!(keep, Keep::Gguf(_)) { Device::Cpu } else { device.clone() };
        let dense = read::dense(&self.checkpoint, &rows, shape.dims(), self.dtype, &made).map_err(failed)?;
        keep.convert(dense).and_then(|weight| weight.to_device(&device)?.with_scales_on(&self.device)).map_err(failed)
    }

    /// A matrix where it lies, if its values need nothing but widening to be computed with in `dtype`.
    fn mapped(&self, rows: &[Rows], dtype: DType, shape: [usize; 2]) -> Option<Mapped> {
        let [one] = rows else { return None };
        let stored = read::computed(one.stored.kind).filter(|stored| stored.size_in_bytes() <= dtype.size_in_bytes())?;
        let bytes = read::InFile { checkpoint: self.checkpoint.clone(), rows: one.clone() };
        Some(Mapped::new(Arc::new(bytes), stored, dtype, shape))
    }

    /// The scale of a scaled fp8 weight: one number, or one for each output row as `(output, 1)`.
    fn scale(&self) -> Result<Option<Tensor>, Error> {
        let Some(name) = SCALES.into_iter().find(|name| self.contains(name)) else { return Ok(None) };
        let shape = self.shape(name).unwrap_or_default();
        let scale = self.tensor_as(name, shape.as_slice(), DType::F32)?;
        Ok(Some(if scale.elem_count() == 1 { scale.reshape(())? } else { scale.reshape(((), 1))? }))
    }

    /// Ends a load: an error unless every stored tensor was applied and none was missing or misshapen.
    pub fn finish(self) -> Result<LoadReport, Error> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let unused = self.names.keys().filter(|name| !seen.used.contains(*name) && !ignored(name)).cloned().collect();
        let mut report = LoadReport {
            component: self.component,
            applied: seen.used.len(),
            missing: seen.missing.clone(),
            unused,
            wrong_shape: seen.wrong_shape.clone(),
            looks_like: None,
        };
        if report.complete() {
            return Ok(report);
        }
        report.looks_like = names::foreign(&self.checkpoint);
        Err(Error::Incomplete { report: Box::new(report) })
    }

    /// The error of a component of which not even the size can be told, with what the file seems to be.
    #[must_use]
    pub fn unsupported(&self, reason: &str) -> Error {
        let reason = names::foreign(&self.checkpoint).unwrap_or(reason).to_string();
        Error::Unsupported { component: self.component, reason }
    }

    fn path(&self, name: impl fmt::Display) -> String {
        format!("{}{name}", self.prefix)
    }

    fn rows(&self, path: &str) -> Option<Vec<Rows>> {
        let parts = self.names.get(path)?;
        parts.iter().map(|part| Some(Rows { stored: self.checkpoint.get(&part.key)?.clone(), half: part.half })).collect()
    }

    /// Notes that `path` was asked for; its rows if it is there with this shape.
    fn expect(&self, path: &str, shape: &Shape) -> Option<Vec<Rows>> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(rows) = self.rows(path) else {
            seen.missing.push(path.into());
            return None;
        };
        seen.used.insert(path.into());
        let stored = joined(&rows);
        if stored != shape.dims() && squeezed(&stored) != squeezed(shape.dims()) {
            seen.wrong_shape.push((path.into(), shape.dims().to_vec(), stored));
            return None;
        }
        let bytes = rows.iter().map(|part| part.bytes(&self.checkpoint).len() as u64).sum();
        self.loaded.fetch_add(bytes, Ordering::Relaxed);
        Some(rows)
    }

    fn random(&self, shape: &Shape) -> candle_core::Result<Tensor> {
        let (mean, deviation) = match shape.dims() {
            [_] => (0.5, 0.2),
            [_, inputs @ ..] => (0., 1. / (inputs.iter().product::<usize>() as f64).sqrt()),
            [] => (1., 0.),
        };
        Tensor::randn(mean as f32, deviation as f32, shape, &self.device)?.to_dtype(self.dtype)
    }

    /// Stands in for a tensor that is missing, so that one load reports all faults; it takes no memory.
    fn placeholder(&self, shape: &Shape) -> candle_core::Result<Tensor> {
        Tensor::zeros((), self.dtype, &self.device)?.broadcast_as(shape)
    }
}

fn ignored(name: &str) -> bool {
    IGNORED.iter().any(|end| name.ends_with(end))
}

/// The shape of rows put one below the other.
fn joined(rows: &[Rows]) -> Vec<usize> {
    let mut shape = rows.first().map(Rows::shape).unwrap_or_default();
    for part in &rows[1..] {
        if let (Some(sum), Some(more)) = (shape.first_mut(), part.shape().first()) {
            *sum += more;
        }
    }
    shape
}

/// A 1x1 convolution is a matrix: BFL stores the autoencoder's attention as one, diffusers as the other.
fn squeezed(shape: &[usize]) -> &[usize] {
    match shape {
        [head @ .., 1, 1] if head.len() == 2 => head,
        _ => shape,
    }
}
