//! The arithmetic of the adapters: what each algorithm adds to a weight.

use candle_core::{D, DType, Device, Tensor};
use kernels::Delta;

use super::modules::Place;
use crate::Result;

/// A matrix, whole or as a product.
#[derive(Debug, Clone)]
pub enum Factor {
    Whole(Tensor),
    /// up `(rows, r)`, down `(r, columns)`.
    Product(Tensor, Tensor),
}

impl Factor {
    fn dense(&self, device: &Device) -> Result<Tensor> {
        match self {
            Self::Whole(whole) => wide(whole, device),
            Self::Product(up, down) => wide(up, device)?.matmul(&wide(down, device)?),
        }
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(match self {
            Self::Whole(whole) => Self::Whole(f(whole)?),
            Self::Product(up, down) => Self::Product(f(up)?, f(down)?),
        })
    }

    /// Rows and columns.
    pub(super) fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Whole(whole) => whole.dims2(),
            Self::Product(up, down) => Ok((up.dim(0)?, down.dim(1)?)),
        }
    }
}

/// An algorithm with its tensors, as stored, in any dtype.
#[derive(Debug, Clone)]
pub enum Kind {
    /// LoRA: up `(output, r)`, down `(r, input)`.
    LowRank { up: Tensor, down: Tensor },
    /// LoHa: the product, element by element, of two low-rank matrices.
    Hadamard { first: Factor, second: Factor },
    /// LoKr: `kron(left, right)`.
    Kronecker { left: Factor, right: Factor },
    /// The difference itself, of the weight's or the bias's shape.
    Difference(Tensor),
    /// Takes the place of the base's tensor, whatever the scale.
    Replacement(Tensor),
}

impl Kind {
    /// As reports call it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::LowRank { .. } => "lora",
            Self::Hadamard { .. } => "loha",
            Self::Kronecker { .. } => "lokr",
            Self::Difference(_) => "diff",
            Self::Replacement(_) => "set_weight",
        }
    }

    /// The shape of what it changes.
    pub fn shape(&self) -> Result<Vec<usize>> {
        Ok(match self {
            Self::LowRank { up, down } => vec![up.dim(0)?, down.dim(1)?],
            Self::Hadamard { first, .. } => {
                let (rows, columns) = first.dims()?;
                vec![rows, columns]
            }
            Self::Kronecker { left, right } => {
                let ((a, b), (c, d)) = (left.dims()?, right.dims()?);
                vec![a * c, b * d]
            }
            Self::Difference(delta) | Self::Replacement(delta) => delta.dims().to_vec(),
        })
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(match self {
            Self::LowRank { up, down } => Self::LowRank { up: f(up)?, down: f(down)? },
            Self::Hadamard { first, second } => Self::Hadamard { first: first.map(f)?, second: second.map(f)? },
            Self::Kronecker { left, right } => Self::Kronecker { left: left.map(f)?, right: right.map(f)? },
            Self::Difference(delta) => Self::Difference(f(delta)?),
            Self::Replacement(value) => Self::Replacement(f(value)?),
        })
    }

    /// The change in full and in f32, before alpha and scale.
    fn dense(&self, device: &Device) -> Result<Tensor> {
        match self {
            Self::LowRank { up, down } => wide(up, device)?.matmul(&wide(down, device)?),
            Self::Hadamard { first, second } => first.dense(device)? * second.dense(device)?,
            Self::Kronecker { left, right } => kronecker(&left.dense(device)?, &right.dense(device)?),
            Self::Difference(delta) | Self::Replacement(delta) => wide(delta, device),
        }
    }
}

/// `(a, b)` and `(c, d)` -> `(a c, b d)`.
fn kronecker(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    let ((a, b), (c, d)) = (left.dims2()?, right.dims2()?);
    left.reshape((a, 1, b, 1))?.broadcast_mul(&right.reshape((1, c, 1, d))?)?.reshape((a * c, b * d))
}

/// In f32 on `device`. What goes to a card goes as it is stored, where candle can widen it there.
fn wide(x: &Tensor, device: &Device) -> Result<Tensor> {
    if device.is_cuda() && matches!(x.dtype(), DType::F16 | DType::BF16) {
        return x.to_device(device)?.to_dtype(DType::F32);
    }
    x.to_dtype(DType::F32)?.to_device(device)
}

/// DoRA's magnitude, and over what the norm is taken.
#[derive(Debug, Clone)]
pub enum Magnitude {
    /// `(output, 1)`: one norm for each row.
    Output(Tensor),
    /// `(1, input)`: one norm for each column.
    Input(Tensor),
}

/// One change of one tensor of the model.
#[derive(Debug, Clone)]
pub struct Change {
    pub kind: Kind,
    /// alpha / r and what else multiplies the delta apart from the user's scale.
    pub factor: f64,
    pub magnitude: Option<Magnitude>,
}

impl Change {
    /// With every tensor on `device` and in f32, as merges want them.
    pub(super) fn to_device(&self, device: &Device) -> Result<Self> {
        self.map(&mut |x| wide(x, device)?.force_contiguous())
    }

    /// Values of all tensors.
    pub(super) fn values(&self) -> Result<usize> {
        let mut values = 0;
        self.map(&mut |x| {
            values += x.elem_count();
            Ok(x.clone())
        })?;
        Ok(values)
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let magnitude = match &self.magnitude {
            None => None,
            Some(Magnitude::Output(m)) => Some(Magnitude::Output(f(m)?)),
            Some(Magnitude::Input(m)) => Some(Magnitude::Input(f(m)?)),
        };
        Ok(Self { kind: self.kind.map(f)?, factor: self.factor, magnitude })
    }

    /// The addend at scale `u` for the rows that `place` names, in f32 on `device`. `base` gives those rows of the pristine weight
    /// in f32; only DoRA and replacements ask for it.
    pub fn delta(&self, u: f64, place: Place, device: &Device, base: impl FnOnce() -> Result<Tensor>) -> Result<Delta> {
        let swapped = place == Place::SwappedHalves;
        let order = |x: Tensor| if swapped { swap_halves(&x) } else { Ok(x) };
        if let (Kind::LowRank { up, down }, None) = (&self.kind, &self.magnitude) {
            let up = (order(wide(up, device)?)? * (u * self.factor))?;
            return Ok(Delta::LowRank { up, down: wide(down, device)? });
        }
        if let Kind::Replacement(value) = &self.kind {
            return Ok(Delta::Dense((order(wide(value, device)?)? - base()?)?));
        }
        let delta = (self.kind.dense(device)? * self.factor)?;
        let delta = match &self.magnitude {
            None => (delta * u)?,
            // The norms are those of the matrix as it was trained.
            Some(magnitude) => {
                let base = order(base()?)?;
                ((dora(&base, &delta, magnitude)? - base)? * u)?
            }
        };
        Ok(Delta::Dense(order(delta)?))
    }
}

/// m V / ‖V‖ with V = W + dW (arXiv 2402.09353, equation 5).
fn dora(base: &Tensor, delta: &Tensor, magnitude: &Magnitude) -> Result<Tensor> {
    let v = (base + delta)?;
    let (norm, m) = match magnitude {
        Magnitude::Output(m) => (v.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?, m),
        Magnitude::Input(m) => (v.sqr()?.sum_keepdim(0)?.sqrt()?, m),
    };
    let m = wide(m, base.device())?.reshape(norm.shape())?;
    // A row or column of zeros stays one.
    let norm = norm.maximum(f64::from(f32::MIN_POSITIVE))?;
    v.broadcast_mul(&m.div(&norm)?)
}

/// diffusers orders the final modulation (scale, shift), BFL (shift, scale).
pub(super) fn swap_halves(x: &Tensor) -> Result<Tensor> {
    let half = x.dim(0)? / 2;
    Tensor::cat(&[x.narrow(0, half, half)?, x.narrow(0, 0, half)?], 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0.1f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    fn dense(change: &Change, u: f64, place: Place, base: &Tensor) -> Vec<Vec<f32>> {
        let delta = change.delta(u, place, &Device::Cpu, || Ok(base.clone())).unwrap();
        match delta {
            Delta::Dense(delta) => delta,
            Delta::LowRank { up, down } => up.matmul(&down).unwrap(),
        }
        .to_vec2()
        .unwrap()
    }

    fn change(kind: Kind, factor: f64) -> Change {
        Change { kind, factor, magnitude: None }
    }

    fn assert_close(got: &[Vec<f32>], want: impl Fn(usize, usize) -> f64) {
        for (i, row) in got.iter().enumerate() {
            for (j, value) in row.iter().enumerate() {
                assert!((f64::from(*value) - want(i, j)).abs() < 1e-5 * (1.0 + want(i, j).abs()), "({i}, {j})");
            }
        }
    }

    fn at(x: &Tensor) -> impl Fn(usize, usize) -> f64 + use<> {
        let values = x.to_vec2::<f32>().unwrap();
        move |i, j| f64::from(values[i][j])
    }

    #[test]
    fn loha_and_lokr_element_by_element() {
        let (a, b, c, d) = (random(&[6, 2]), random(&[2, 4]), random(&[6, 3]), random(&[3, 4]));
        let (ab, cd) = (at(&a.matmul(&b).unwrap()), at(&c.matmul(&d).unwrap()));
        let kind = Kind::Hadamard { first: Factor::Product(a, b), second: Factor::Product(c, d) };
        let none = random(&[6, 4]);
        assert_close(&dense(&change(kind, 0.5), -2., Place::Whole, &none), |i, j| -ab(i, j) * cd(i, j));

        let (left, right) = (random(&[2, 3]), random(&[3, 4]));
        let (l, r) = (at(&left), at(&right));
        let kind = Kind::Kronecker { left: Factor::Whole(left), right: Factor::Whole(right) };
        assert_eq!(kind.shape().unwrap(), [6, 12]);
        assert_close(&dense(&change(kind, 1.), 3., Place::Whole, &none), |i, j| 3. * l(i / 3, j / 4) * r(i % 3, j % 4));
    }

    #[test]
    fn dora_on_both_axes() {
        let (up, down, base) = (random(&[6, 2]), random(&[2, 4]), random(&[6, 4]));
        let (w, dw) = (at(&base), at(&up.matmul(&down).unwrap()));
        let v = |i: usize, j: usize| w(i, j) + 0.25 * dw(i, j);
        let kind = Kind::LowRank { up, down };
        let (m_out, m_in) = (random(&[6, 1]), random(&[1, 4]));
        let (mo, mi) = (at(&m_out), at(&m_in));

        let magnitude = Some(Magnitude::Output(m_out));
        let got = dense(&Change { kind: kind.clone(), factor: 0.25, magnitude }, 0.7, Place::Whole, &base);
        let norm = |i: usize| (0..4).map(|j| v(i, j).powi(2)).sum::<f64>().sqrt();
        assert_close(&got, |i, j| 0.7 * (mo(i, 0) * v(i, j) / norm(i) - w(i, j)));

        let magnitude = Some(Magnitude::Input(m_in));
        let got = dense(&Change { kind, factor: 0.25, magnitude }, 0.7, Place::Whole, &base);
        let norm = |j: usize| (0..6).map(|i| v(i, j).powi(2)).sum::<f64>().sqrt();
        assert_close(&got, |i, j| 0.7 * (mi(0, j) * v(i, j) / norm(j) - w(i, j)));
    }

    #[test]
    fn halves_change_places_whatever_the_algorithm() {
        let (up, down, base) = (random(&[6, 2]), random(&[2, 4]), random(&[6, 4]));
        let dw = at(&up.matmul(&down).unwrap());
        let low_rank = change(Kind::LowRank { up: up.clone(), down: down.clone() }, 1.);
        assert_close(&dense(&low_rank, 1., Place::SwappedHalves, &base), |i, j| dw((i + 3) % 6, j));
        let full = change(Kind::Difference(up.matmul(&down).unwrap()), 1.);
        assert_close(&dense(&full, 1., Place::SwappedHalves, &base), |i, j| dw((i + 3) % 6, j));

        // A magnitude for each row belongs to the stored order.
        let m = random(&[6, 1]);
        let (w, mo) = (at(&base), at(&m));
        let dora = Change { kind: Kind::LowRank { up, down }, factor: 1., magnitude: Some(Magnitude::Output(m)) };
        let v = |i: usize, j: usize| w(i, j) + dw((i + 3) % 6, j);
        let norm = |i: usize| (0..4).map(|j| v(i, j).powi(2)).sum::<f64>().sqrt();
        assert_close(&dense(&dora, 1., Place::SwappedHalves, &base), |i, j| mo((i + 3) % 6, 0) * v(i, j) / norm(i) - w(i, j));
    }

    #[test]
    fn dora_of_a_row_of_zeros_is_a_row_of_zeros() {
        let base = Tensor::cat(&[random(&[2, 4]), Tensor::zeros((1, 4), DType::F32, &Device::Cpu).unwrap()], 0).unwrap();
        let up = Tensor::cat(&[random(&[2, 2]), Tensor::zeros((1, 2), DType::F32, &Device::Cpu).unwrap()], 0).unwrap();
        let kind = Kind::LowRank { up, down: random(&[2, 4]) };
        let magnitude = Some(Magnitude::Output(random(&[3, 1])));
        let got = dense(&Change { kind, factor: 1., magnitude }, 1., Place::Whole, &base);
        assert_eq!(got[2], [0.; 4]);
        assert!(got.iter().flatten().all(|value| value.is_finite()));
    }

    #[test]
    fn a_replacement_ignores_the_scale() {
        let (value, base) = (random(&[2, 3]), random(&[2, 3]));
        let (v, w) = (at(&value), at(&base));
        assert_close(&dense(&change(Kind::Replacement(value), 1.), 0.1, Place::Whole, &base), |i, j| v(i, j) - w(i, j));
    }
}
