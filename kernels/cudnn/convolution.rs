//! Convolution as a graph of cuDNN's operations, with its bias and what it is added to.

use candle_core::{DType, Tensor};

use super::backend::{Failure, Library};
use super::codes::{pointwise, values};
use super::graph::{Operations, Place};
use crate::ops::convolve::Window;

/// A convolution whose channels lie side by side, all that a plan depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Problem {
    b: usize,
    /// Height, width and channels of the input and of the output.
    input: [usize; 3],
    output: [usize; 3],
    /// Of the window.
    side: usize,
    stride: usize,
    before: usize,
    after: usize,
    residual: bool,
    bf16: bool,
}

/// Names of the tensors that are given.
pub(super) const X: i64 = 1;
pub(super) const W: i64 = 2;
pub(super) const BIAS: i64 = 3;
pub(super) const Y: i64 = 4;
pub(super) const RESIDUAL: i64 = 5;

impl Problem {
    /// The problem of these tensors, as [`crate::convolve`] takes them, with an output `(b, y', x', o)`; `None` if it is not for cuDNN:
    /// other types than 16-bit ones, channels that are not in eights, values that do not lie in one piece, enlarged pictures.
    pub(super) fn of(
        [x, weight, bias]: [&Tensor; 3],
        residual: Option<&Tensor>,
        window: Window,
        [b, rows, columns, o]: [usize; 4],
    ) -> candle_core::Result<Option<Self>> {
        let (dtype, (_, height, width, c), side) = (x.dtype(), x.dims4()?, weight.dim(1)?);
        let given = [Some(x), Some(weight), Some(bias), residual];
        let fits = |x: &Tensor| x.dtype() == dtype && x.is_contiguous() && x.layout().start_offset().is_multiple_of(8);
        let eights = c.is_multiple_of(8) && o.is_multiple_of(8) && b * rows * columns * c * o > 0;
        let sixteen = matches!(dtype, DType::F16 | DType::BF16);
        let Window { stride, before, after, enlarge: 1 } = window else { return Ok(None) };
        Ok((sixteen && eights && given.into_iter().flatten().all(fits)).then(|| Self {
            b,
            input: [height, width, c],
            output: [rows, columns, o],
            side,
            stride,
            before,
            after,
            residual: residual.is_some(),
            bf16: dtype == DType::BF16,
        }))
    }

    pub(super) fn operations(&self, library: &'static Library) -> Result<Operations, Failure> {
        let &Self { b, input: [height, width, c], output: [rows, columns, o], side, stride, before, after, .. } = self;
        let mut graph = Operations::new(library);
        let values = if self.bf16 { values::BF16 } else { values::F16 };
        // cuDNN names channels second, wherever they lie.
        let beside = |[height, width, channels]: [usize; 3]| [height * width * channels, 1, width * channels, channels];
        let x = graph.tensor(X, values, [b, c, height, width], beside(self.input), Place::Memory)?;
        let w = graph.tensor(W, values, [o, c, side, side], beside([side, side, c]), Place::Memory)?;
        let bias = graph.tensor(BIAS, values, [1, o, 1, 1], beside([1, 1, o]), Place::Memory)?;
        let of_output = |id, values, place| graph.tensor(id, values, [b, o, rows, columns], beside(self.output), place);
        let (product, y) = (of_output(10, values::F32, Place::Between)?, of_output(Y, values, Place::Memory)?);
        let (sum, residual) = (of_output(11, values::F32, Place::Between)?, of_output(RESIDUAL, values, Place::Memory)?);

        graph.convolution([&x, &w, &product], [stride, before, after])?;
        if self.residual {
            graph.pointwise(pointwise::ADD, &product, Some(&bias), &sum)?;
            graph.pointwise(pointwise::ADD, &sum, Some(&residual), &y)?;
        } else {
            graph.pointwise(pointwise::ADD, &product, Some(&bias), &y)?;
        }
        graph.keep([x, w, bias, product, sum, residual, y]);
        Ok(graph)
    }
}
