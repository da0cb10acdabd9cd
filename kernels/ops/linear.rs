//! A matrix product with its bias.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::activation::gelu;
use super::cpu;

/// x `(n, input)`, weight `(output, input)`, bias `(output)` -> `x Wᵀ + b` `(n, output)`, in x's dtype, which is also the weight's.
///
/// On the CPU in f32 the product is added onto the bias, which saves a pass over the output. Errors if the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let [n, input, output] = sizes(x, weight, bias)?;
    #[cfg(feature = "cuda")]
    if let Some(y) = crate::lt::linear(x, weight, bias, false)? {
        return Ok(y);
    }
    match bias {
        None => x.matmul(&weight.t()?),
        Some(bias) if x.device().is_cpu() && x.dtype() == DType::F32 => onto_bias(x, weight, bias, [n, input, output]),
        Some(bias) => x.matmul(&weight.t()?)?.broadcast_add(bias),
    }
}

/// Rows, inputs and outputs, if they fit.
fn sizes(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<[usize; 3]> {
    let ((n, input), (output, width)) = (x.dims2()?, weight.dims2()?);
    if width != input || bias.is_some_and(|bias| bias.dims() != [output]) {
        bail!("a linear layer of weight {:?} was given {:?}", weight.shape(), x.shape());
    }
    Ok([n, input, output])
}

/// The same through [`gelu`], which cuBLASLt does to the product before it is written.
pub fn linear_gelu(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    sizes(x, weight, bias)?;
    #[cfg(feature = "cuda")]
    if let Some(y) = crate::lt::linear(x, weight, bias, true)? {
        return Ok(y);
    }
    gelu(&linear(x, weight, bias)?)
}

fn onto_bias(x: &Tensor, weight: &Tensor, bias: &Tensor, [n, input, output]: [usize; 3]) -> Result<Tensor> {
    let mut y = cpu::read(bias, |bias| bias.repeat(n))?;
    cpu::read(x, |x| {
        cpu::read(weight, |weight| {
            let everywhere = gemm::Parallelism::Rayon(rayon::current_num_threads());
            cpu::add_product(x, weight, &mut y, [n, output, input], everywhere);
        })
    })??;
    Tensor::from_vec(y, (n, output), &Device::Cpu)
}
