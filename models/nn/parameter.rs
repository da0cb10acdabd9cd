//! A stored tensor of a model, and what is computed with in its place at present.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use candle_core::{DType, Device, Result, Tensor, bail};
use kernels::Addend;

use super::{Mapped, Weight};

/// Reads the stored tensor again from where it came.
pub(crate) type Reread = Arc<dyn Fn() -> Result<Weight> + Send + Sync>;

/// Where the pristine tensor is kept while another one is in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Home {
    /// Beside it, on the device: restoring costs nothing.
    #[default]
    Device,
    /// In main memory.
    Host,
    /// In the file it came from.
    File,
}

impl fmt::Display for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "device",
            Self::Host => "host",
            Self::File => "file",
        })
    }
}

/// A weight that a LoRA may change while the model stands. Clones are the same parameter.
#[derive(Clone)]
pub struct Parameter(Arc<RwLock<State>>);

struct State {
    pristine: Pristine,
    /// In the pristine tensor's place.
    merged: Option<Weight>,
    /// Beside it, in the dtype of computation.
    branch: Arc<[Addend]>,
    reread: Option<Reread>,
    /// The pristine tensor as it can wait for its device without a copy.
    waits: Option<Mapped>,
    shape: Vec<usize>,
    device: Device,
}

enum Pristine {
    Here(Weight),
    Host(Weight),
    File,
}

impl fmt::Debug for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.read(|state| {
            f.debug_struct("Parameter").field("shape", &state.shape).field("merged", &state.merged.is_some()).finish()
        })
    }
}

impl Parameter {
    pub(crate) fn new(weight: Weight, shape: &[usize], device: &Device, reread: Option<Reread>) -> Self {
        let (merged, branch, waits) = (None, Arc::from([]), None);
        let (shape, device) = (shape.to_vec(), device.clone());
        Self(Arc::new(RwLock::new(State { pristine: Pristine::Here(weight), merged, branch, reread, waits, shape, device })))
    }

    /// That it waits in its file rather than in a copy, if it is ever sent to main memory.
    pub(crate) fn waiting(self, waits: Option<Mapped>) -> Self {
        self.write(|state| state.waits = waits);
        self
    }

    fn read<R>(&self, f: impl FnOnce(&State) -> R) -> R {
        f(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Where the weight is that is computed with.
    #[must_use]
    pub fn device(&self) -> Device {
        self.read(|state| state.device.clone())
    }

    #[must_use]
    pub fn shape(&self) -> Vec<usize> {
        self.read(|state| state.shape.clone())
    }

    /// What is computed with, and what is added to its product.
    pub fn current(&self) -> Result<(Weight, Arc<[Addend]>)> {
        self.read(|state| {
            let weight = match (&state.merged, &state.pristine) {
                (Some(merged), _) => merged.clone(),
                (None, Pristine::Here(weight)) => weight.clone(),
                // Only between a failed switch and the next one.
                (None, _) => bail!("a weight was given up in a switch of LoRAs that failed; switch again or load the model anew"),
            };
            Ok((weight, state.branch.clone()))
        })
    }

    /// What is computed with, if it is dense: norms and biases always are.
    pub fn tensor(&self) -> Result<Tensor> {
        match self.current()?.0 {
            Weight::Dense(tensor) => Ok(tensor),
            other => bail!("a vector is stored as {other:?}"),
        }
    }

    /// As it was stored, on the device.
    pub fn pristine(&self) -> Result<Weight> {
        let (kept, reread, device) = self.read(|state| {
            let kept = match &state.pristine {
                Pristine::Here(weight) => Some((weight.clone(), false)),
                Pristine::Host(weight) => Some((weight.clone(), true)),
                Pristine::File => None,
            };
            (kept, state.reread.clone(), state.device.clone())
        });
        match (kept, reread) {
            (Some((weight, false)), _) => Ok(weight),
            (Some((weight, true)), _) => weight.to_device(&device),
            (None, Some(reread)) => reread()?.to_device(&device),
            (None, None) => bail!("a weight has no file to be read from again"),
        }
    }

    /// Puts `merged` in the pristine tensor's place, which moves to `home`. Errors if that fails, and then nothing has changed.
    pub(crate) fn replace(&self, merged: Weight, home: Home) -> Result<()> {
        let keep = self.read(|state| match (&state.pristine, home) {
            (Pristine::Here(weight), Home::Host) => Some(weight.clone()),
            _ => None,
        });
        let host = keep.map(|weight| weight.to_device(&Device::Cpu)).transpose()?;
        self.write(|state| {
            match (host, home) {
                (Some(host), _) => state.pristine = Pristine::Host(host),
                (None, Home::File) if state.reread.is_some() => state.pristine = Pristine::File,
                _ => {}
            }
            state.merged = Some(merged);
            state.branch = Arc::from([]);
        });
        Ok(())
    }

    /// Moves what is computed with, and the pristine tensor if it is beside it, to main memory.
    pub(crate) fn send_to_host(&self) -> Result<()> {
        let host = Device::Cpu;
        let (pristine, merged, waits) = self.read(|state| {
            let here = if let Pristine::Here(weight) = &state.pristine { Some(weight.clone()) } else { None };
            (here, state.merged.clone(), state.waits.clone().filter(|_| !state.device.is_cpu()))
        });
        let pristine = match &waits {
            Some(waits) => Some(Weight::Mapped(waits.clone())),
            None => pristine.map(|weight| weight.to_device(&host)).transpose()?,
        };
        let merged = merged.map(|weight| weight.to_device(&host)).transpose()?;
        self.write(|state| {
            if waits.is_some() {
                // It is read where it is from now on, never onto the device.
                state.reread = None;
            }
            if let Some(weight) = pristine {
                state.pristine = Pristine::Here(weight);
            }
            (state.merged, state.device) = (merged, host);
        });
        Ok(())
    }

    /// Moves the pristine tensor to `home` if a changed one is in its place; from elsewhere it does not come back.
    pub(crate) fn pristine_to(&self, home: Home) -> Result<()> {
        let (beside, in_file) = self.read(|state| match (&state.pristine, &state.merged) {
            (Pristine::Here(weight), Some(_)) if home != Home::Device => {
                (Some(weight.clone()), home == Home::File && state.reread.is_some())
            }
            _ => (None, false),
        });
        if let Some(weight) = beside {
            let kept = if in_file { Pristine::File } else { Pristine::Host(weight.to_device(&Device::Cpu)?) };
            self.write(|state| state.pristine = kept);
        }
        Ok(())
    }

    /// Leaves the pristine tensor in place and adds `addends` to its products.
    pub(crate) fn branch(&self, addends: Vec<Addend>, dtype: DType) -> Result<()> {
        let narrow = addends.into_iter().map(|addend| addend.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
        self.restore()?;
        self.write(|state| state.branch = narrow.into());
        Ok(())
    }

    /// Back to the tensor as it was stored.
    pub(crate) fn restore(&self) -> Result<()> {
        let weight = self.pristine()?;
        self.write(|state| {
            state.pristine = Pristine::Here(weight);
            state.merged = None;
            state.branch = Arc::from([]);
        });
        Ok(())
    }
}
