//! Whether our kernels give on a card what the plain operations give. A program asks before it uses them there: nobody has tried every
//! card with every driver.

mod cases;

use candle_core::{DType, Device, Result, Tensor};

use crate::launch::{launches, use_fused};
use crate::whose::{Whose, Work, choose};
use cases::{Case, Sizes};

/// Free memory from which on FLUX.1's own sizes are tried as well, in bytes.
const ROOM: u64 = 6 << 30;

/// How one operation came out in one type.
#[derive(Debug, Clone)]
pub struct Proof {
    pub operation: &'static str,
    pub dtype: DType,
    /// At FLUX.1's sizes, or at small odd ones.
    pub at_full_size: bool,
    /// |ours - truth|₂ / |truth|₂, the truth being the plain operation in f32 of the same inputs.
    pub error: f64,
    /// What that may be.
    pub most: f64,
    /// The same of the value that is furthest off, relative to itself and to the typical value.
    pub worst: f64,
    pub most_of_worst: f64,
    /// Equal inputs gave equal bits.
    pub repeats: bool,
    /// Kernels of ours that ran: where there are none, the plain operation was compared with itself.
    pub launches: usize,
}

impl Proof {
    #[must_use]
    pub fn holds(&self) -> bool {
        // What is no number is not within them.
        self.error <= self.most && self.worst <= self.most_of_worst && self.repeats
    }
}

/// How something is computed.
type Run = fn(&dyn Fn() -> Result<Tensor>) -> Result<Tensor>;

/// Tries every operation on `device`: at small odd sizes against the processor, and at FLUX.1's, where there is room, against candle's
/// operations on the same device. Tells of each when it is done; errors if one cannot be tried.
///
/// It takes up to `most` bytes, if given. The program must not compute anything else meanwhile.
pub fn prove(device: &Device, most: Option<u64>, told: &mut dyn FnMut(&Proof)) -> Result<()> {
    // cuDNN's are compared with ours before they are used.
    [Work::Attention, Work::Convolution].into_iter().for_each(|work| choose(work, Whose::Own));
    let ours: Run = |op| {
        use_fused(true);
        let result = op();
        use_fused(false);
        result
    };
    for case in cases::all(&Sizes::SMALL, &Device::Cpu, device)? {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            told(&compare(&case, dtype, device, ours)?);
        }
    }
    if crate::free_memory(device).into_iter().chain(most).min().is_some_and(|room| room >= ROOM) {
        for case in cases::all(&Sizes::FLUX1, device, device)? {
            told(&Proof { at_full_size: true, ..compare(&case, DType::BF16, device, ours)? });
        }
    }
    Ok(())
}

/// The operation as `ours` runs it on `device`, and the plain one where the inputs are.
fn compare(case: &Case, dtype: DType, device: &Device, ours: Run) -> Result<Proof> {
    let rounded = case.inputs.iter().map(|x| x.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
    let exact = rounded.iter().map(|x| x.to_dtype(DType::F32)).collect::<Result<Vec<_>>>()?;
    let truth = (case.op)(&exact)?.to_dtype(DType::F32)?;
    let plain = apart(&(case.op)(&rounded)?, &truth)?;
    let placed = rounded.iter().map(|x| x.to_device(device)).collect::<Result<Vec<_>>>()?;
    let before = launches();
    let got = ours(&|| (case.op)(&placed))?;
    let launches = launches() - before;
    let [error, worst] = apart(&got, &truth)?;
    let again = apart(&ours(&|| (case.op)(&placed))?, &got.to_dtype(DType::F32)?)?;
    // What a rounding costs at most.
    let unit = match dtype {
        DType::F32 => 4e-5,
        DType::F16 => 5e-4,
        _ => 4e-3,
    };
    Ok(Proof {
        operation: case.name,
        dtype,
        at_full_size: false,
        error,
        most: 1.5 * plain[0] + 0.5 * unit + case.slack,
        worst,
        most_of_worst: 2. * plain[1] + 6. * unit + 30. * case.slack,
        repeats: again == [0.; 2],
        launches,
    })
}

/// |x - truth|₂ / |truth|₂, and the largest |x - truth| / (|truth| + its root mean square), NaN if one value is.
fn apart(x: &Tensor, truth: &Tensor) -> Result<[f64; 2]> {
    let distance = (x.to_device(truth.device())?.to_dtype(DType::F32)? - truth)?.abs()?;
    let scalar = |x: Tensor| Ok::<_, candle_core::Error>(f64::from(x.to_dtype(DType::F32)?.to_scalar::<f32>()?));
    let size = scalar(truth.sqr()?.mean_all()?)?.sqrt();
    let relative = (&distance / (truth.abs()? + size)?)?;
    // A maximum passes over what is no number; a mean does not.
    let unordered = 0. * scalar(relative.mean_all()?)?;
    Ok([scalar(distance.sqr()?.mean_all()?)?.sqrt() / size, scalar(relative.flatten_all()?.max(0)?)? + unordered])
}

/// The small sizes on the processor, where the kernels are emulated.
#[cfg(test)]
#[cfg(feature = "emulator")]
mod tests {
    use super::*;

    fn proofs(ours: Run) -> Vec<Proof> {
        let cases = cases::all(&Sizes::SMALL, &Device::Cpu, &Device::Cpu).unwrap();
        let proof = |case: &Case| compare(case, DType::BF16, &Device::Cpu, ours).unwrap();
        cases.iter().map(proof).collect()
    }

    #[test]
    fn emulated_kernels_are_right() {
        for proof in proofs(|op| crate::emulated(op)) {
            assert!(proof.holds(), "{proof:?}");
            // Products are a library's, and what is sent is sent to a card.
            let ours = !["product", "weights that wait in main memory"].contains(&proof.operation);
            assert_eq!(proof.launches > 0, ours, "{proof:?}");
        }
    }

    /// One value in a thousand that is not there, one that is not a number, values that come out otherwise the next time.
    #[test]
    fn what_is_wrong_does_not_hold() {
        let wrong: [Run; 3] = [
            |op| {
                let got = op()?;
                let mut values = got.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                values.iter_mut().step_by(1000).for_each(|value| *value = if value.abs() > 0.5 { 0. } else { 3. });
                Tensor::from_vec(values, got.shape(), &Device::Cpu)?.to_dtype(got.dtype())
            },
            |op| {
                let got = op()?;
                let mut values = got.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                *values.last_mut().unwrap() = f32::NAN;
                Tensor::from_vec(values, got.shape(), &Device::Cpu)?.to_dtype(got.dtype())
            },
            |op| {
                let got = op()?;
                let noise = got.to_dtype(DType::F32)?.rand_like(-1e-3, 1e-3)?;
                (got.to_dtype(DType::F32)? + noise)?.to_dtype(got.dtype())
            },
        ];
        for (i, wrong) in wrong.into_iter().enumerate() {
            for proof in proofs(wrong) {
                assert!(!proof.holds(), "{i}: {proof:?}");
            }
        }
    }
}
