//! The one linear layer: dense, fp8 or GGUF weights behind the same `forward`.

use std::fmt;
use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Result, Tensor};
use kernels::{Addend, Beside, Delta, Fp8Rows};

use super::{Activations, Parameter};

/// A weight matrix `(output, input)` as it is kept in memory.
#[derive(Debug, Clone)]
pub enum Weight {
    /// In the dtype of computation.
    Dense(Tensor),
    /// fp8 e4m3, with one f32 scale `()` or one for each row `(output, 1)` if the file has them; and whether activations are to be
    /// fp8 too in its products, for which there must be a scale for each row.
    Fp8 { data: Tensor, scale: Option<Tensor>, products: bool },
    /// GGUF blocks.
    Quantised(Arc<QTensor>),
    /// Of a model on a card: waits in its file.
    Mapped(Mapped),
}

/// A matrix in a file that is mapped into memory, of which the system keeps as much there as it has room for.
#[derive(Clone)]
pub struct Mapped {
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    /// In the file, and computed with.
    stored: DType,
    dtype: DType,
    shape: [usize; 2],
}

impl Mapped {
    /// `bytes` are a matrix `(output, input)` of `stored` (f32, f16 or bf16), to be computed with in `dtype`.
    pub(crate) fn new(bytes: Arc<dyn AsRef<[u8]> + Send + Sync>, stored: DType, dtype: DType, shape: [usize; 2]) -> Self {
        Self { bytes, stored, dtype, shape }
    }

    /// In the dtype of computation, in main memory.
    pub(crate) fn tensor(&self) -> Result<Tensor> {
        self.on(&Device::Cpu)
    }

    fn on(&self, device: &Device) -> Result<Tensor> {
        kernels::upload(&[(*self.bytes).as_ref()], self.stored, &self.shape, device)?.to_dtype(self.dtype)
    }
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapped({:?} of {:?})", self.shape, self.stored)
    }
}

impl Weight {
    /// The whole matrix in `dtype`, shape `(output, input)`.
    pub fn dense(&self, dtype: DType) -> Result<Tensor> {
        self.widened(dtype, &[])
    }

    /// [`Self::dense`] with what is added to a matrix that is widened.
    fn widened(&self, dtype: DType, addends: &[Addend]) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => weight.to_dtype(dtype),
            Self::Fp8 { data, scale, .. } => {
                let scale = scale.as_ref().map(|scale| scale.to_device(data.device())).transpose()?;
                kernels::widen_fp8(data, scale.as_ref(), dtype, addends)
            }
            Self::Quantised(blocks) => kernels::widen_blocks(blocks, dtype, addends),
            Self::Mapped(mapped) => mapped.tensor()?.to_dtype(dtype),
        }
    }

    /// Whether it holds its values as they were stored, so that what is added to them is not swallowed by coarser steps.
    pub(crate) fn is_dense(&self) -> bool {
        matches!(self, Self::Dense(_) | Self::Mapped(_))
    }

    /// Where it is.
    fn device(&self) -> Device {
        match self {
            Self::Dense(weight) | Self::Fp8 { data: weight, .. } => weight.device().clone(),
            Self::Quantised(blocks) => blocks.device(),
            Self::Mapped(_) => Device::Cpu,
        }
    }

    /// The same, with what is small on `device` already: sending it for each product would wait for the product before.
    pub(crate) fn with_scales_on(self, device: &Device) -> Result<Self> {
        Ok(match self {
            Self::Fp8 { data, scale, products } => {
                Self::Fp8 { data, scale: scale.map(|scale| scale.to_device(device)).transpose()?, products }
            }
            other => other,
        })
    }

    /// The same on another device. Scales that are on a card stay there.
    pub(crate) fn to_device(&self, device: &Device) -> Result<Self> {
        if self.device().same_device(device) {
            // What is mapped stays so.
            return Ok(self.clone());
        }
        Ok(match self {
            Self::Dense(weight) => Self::Dense(kernels::to_device(weight, device)?),
            Self::Fp8 { data, scale, products } => Self::Fp8 {
                products: *products,
                data: kernels::to_device(data, device)?,
                scale: match scale {
                    Some(scale) if !device.is_cpu() => Some(scale.to_device(device)?),
                    scale => scale.clone(),
                },
            },
            Self::Quantised(blocks) => {
                let moved = kernels::upload_blocks(&[&blocks.data()?], blocks.dtype(), blocks.shape().dims(), device)?;
                Self::Quantised(Arc::new(moved))
            }
            Self::Mapped(mapped) => Self::Dense(mapped.on(device)?),
        })
    }

    /// Whether widening it on `device` into `dtype` takes these in the same pass.
    fn takes(&self, addends: &[Addend], dtype: DType, device: &Device) -> bool {
        let shape = match self {
            Self::Fp8 { data, products: false, .. } => data.dims2(),
            Self::Quantised(blocks) => blocks.shape().dims2(),
            _ => return false,
        };
        shape.is_ok_and(|shape| kernels::merges_while_widening(addends, dtype, shape, device))
    }

    /// Calls `work` with itself on `device`, for a product in `dtype` of itself and what widening it takes: what waits in main memory is
    /// sent there for this one product.
    fn visit<R>(&self, device: &Device, dtype: DType, taken: &[Addend], work: impl FnOnce(&Self) -> Result<R>) -> Result<R> {
        match self {
            here if here.device().same_device(device) => work(here),
            Self::Dense(weight) => kernels::visit(weight, device, |weight| work(&Self::Dense(weight))),
            Self::Fp8 { data, scale, products } => {
                let (products, scale) = (*products, scale.as_ref().map(|scale| scale.to_device(device)).transpose()?);
                kernels::visit(data, device, |data| work(&Self::Fp8 { data, scale, products }))
            }
            Self::Quantised(blocks) => kernels::visit_blocks(blocks, dtype, taken, device, |weight| work(&Self::Dense(weight))),
            Self::Mapped(Mapped { bytes, stored, shape, dtype }) => {
                let widened = |weight: Tensor| work(&Self::Dense(weight.to_dtype(*dtype)?));
                kernels::visit_bytes((**bytes).as_ref(), *stored, shape, device, widened)
            }
        }
    }
}

/// What becomes of a layer's product.
#[derive(Debug, Clone, Copy)]
enum After {
    Nothing,
    Gelu,
    /// Its first columns stay, and the others go through GELU beside `room` columns.
    Beside {
        first: usize,
        room: usize,
    },
}

/// `y = x Wᵀ + b`, and what a LoRA adds to it.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Parameter,
    bias: Option<Parameter>,
}

impl Linear {
    #[must_use]
    pub fn new(weight: Parameter, bias: Option<Parameter>) -> Self {
        Self { weight, bias }
    }

    /// x `(.., input)` -> `(.., output)`, in x's dtype. Errors if the last dimension is not the weight's.
    ///
    /// fp8 and GGUF matrices are widened before the product, if they are not for products in e4m3: FLUX multiplies hundreds of tokens at
    /// once, so widening costs little next to the product and the activations keep their precision.
    pub fn forward(&self, x: impl Into<Activations>) -> Result<Tensor> {
        Ok(self.apply(x.into(), After::Nothing)?.0)
    }

    /// [`Self::forward`], then GELU (tanh form).
    pub fn forward_gelu(&self, x: impl Into<Activations>) -> Result<Tensor> {
        Ok(self.apply(x.into(), After::Gelu)?.0)
    }

    /// [`Self::forward`]'s first columns, and the others through GELU beside `room` columns, see [`kernels::linear_beside`].
    pub(super) fn forward_beside(&self, x: impl Into<Activations>, first: usize, room: usize) -> Result<(Tensor, Beside)> {
        match self.apply(x.into(), After::Beside { first, room })? {
            (y, Some(right)) => Ok((y, right)),
            (y, None) => Beside::open(&y, first),
        }
    }

    /// Whether it multiplies in e4m3 and nothing else: what comes before it may then give it that.
    pub(super) fn takes_fp8(&self) -> Result<bool> {
        let (weight, branch) = self.weight.current()?;
        Ok(branch.is_empty() && matches!(weight, Weight::Fp8 { scale: Some(_), products: true, .. }))
    }

    /// All outputs; or the first ones and what stands beside others, if the product makes that.
    fn apply(&self, x: Activations, after: After) -> Result<(Tensor, Option<Beside>)> {
        let (weight, addends) = self.weight.current()?;
        let bias = self.bias.as_ref().map(Parameter::tensor).transpose()?;
        let mut shape = x.tensor().dims().to_vec();
        let dtype = x.dtype();
        let x = x.flat()?;
        let device = x.tensor().device();
        // What stands beside the weight is added to it while it is widened for this product, or else has a product of its own.
        let (taken, branch) = addends.split_at(if weight.takes(&addends, dtype, device) { addends.len() } else { 0 });
        // What a branch adds comes before GELU.
        let gelu = matches!(after, After::Gelu);
        let in_product = gelu && branch.is_empty();
        let beside = match after {
            After::Beside { first, room } if branch.is_empty() && kernels::places_beside(x.tensor()) => Some((first, room)),
            _ => None,
        };
        let (mut y, right) = weight.visit(device, dtype, taken, |weight| {
            let y = match (weight, beside) {
                (Weight::Fp8 { data, scale: Some(scale), products: true }, _) => {
                    let weight = Fp8Rows { data: data.clone(), scale: scale.clone() };
                    kernels::linear_fp8(&x.fp8()?, &weight, bias.as_ref(), in_product, dtype)?
                }
                (weight, Some((first, room))) => {
                    let weight = weight.widened(dtype, taken)?;
                    let (y, right) = kernels::linear_beside(&x.values()?, &weight, bias.as_ref(), first, room)?;
                    return Ok((y, Some(right)));
                }
                (Weight::Quantised(blocks), None) => {
                    kernels::linear_blocks(&x.values()?, blocks, taken, bias.as_ref(), in_product)?
                }
                (weight, None) if in_product => {
                    kernels::linear_gelu(&x.values()?, &weight.widened(dtype, taken)?, bias.as_ref())?
                }
                (weight, None) => kernels::linear(&x.values()?, &weight.widened(dtype, taken)?, bias.as_ref())?,
            };
            Ok((y, None))
        })?;
        for addend in branch.iter() {
            y = add_branch(y, &x.values()?, addend)?;
        }
        if gelu && !branch.is_empty() {
            y = kernels::gelu(&y)?;
        }
        shape.pop();
        let right = right.map(|right| right.reshape(&shape)).transpose()?;
        shape.push(y.dim(1)?);
        Ok((y.reshape(shape)?, right))
    }
}

/// y `(n, output)` plus x `(n, input)` through a low-rank (or dense) branch of some of the output's columns.
fn add_branch(y: Tensor, x: &Tensor, addend: &Addend) -> Result<Tensor> {
    let update = match &addend.delta {
        Delta::LowRank { up, down } => x.matmul(&down.t()?)?.matmul(&up.t()?)?,
        Delta::Dense(delta) => x.matmul(&delta.t()?)?,
    };
    let after = y.dim(1)? - addend.rows.end;
    y + update.pad_with_zeros(1, addend.rows.start, after)?
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::super::Home;
    use super::*;

    /// What waits in its file gives what a copy of it gives, also with a LoRA merged into it or beside it, and then again by itself.
    #[test]
    fn a_mapped_matrix_is_the_matrix() {
        let random = |shape: &[usize]| Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap();
        let stored = random(&[6, 4]).to_dtype(DType::F16).unwrap();
        let bytes: Vec<u8> =
            stored.flatten_all().unwrap().to_vec1::<f16>().unwrap().iter().flat_map(|value| value.to_le_bytes()).collect();
        let mapped = Mapped::new(Arc::new(bytes), DType::F16, DType::F32, [6, 4]);
        let parameter = |weight| Parameter::new(weight, &[6, 4], &Device::Cpu, None);
        let (waits, here) = (parameter(Weight::Mapped(mapped)), parameter(Weight::Dense(stored.to_dtype(DType::F32).unwrap())));
        let x = random(&[3, 4]);
        let of = |parameter: &Parameter| {
            Linear::new(parameter.clone(), None).forward(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let pristine = of(&here);
        assert_eq!(of(&waits), pristine);
        let merged = random(&[6, 4]);
        for home in [Home::Device, Home::Host, Home::File] {
            waits.replace(Weight::Dense(merged.clone()), home).unwrap();
            assert_eq!(of(&waits), of(&parameter(Weight::Dense(merged.clone()))));
            waits.restore().unwrap();
            assert!(matches!(waits.current().unwrap().0, Weight::Mapped(_)), "{home}: nothing is kept of it");
            assert_eq!(of(&waits), pristine);
        }
        let low_rank = || Delta::LowRank { up: random(&[6, 1]), down: random(&[1, 4]) };
        waits.branch(vec![Addend { rows: 0..6, delta: low_rank() }], DType::F32).unwrap();
        assert_ne!(of(&waits), pristine);
        waits.restore().unwrap();
        assert_eq!(of(&waits), pristine);
    }
}
