//! Attention as a graph of cuDNN's operations.

use candle_core::{DType, Tensor};

use super::backend::{Descriptor, Failure, Library, Value};
use super::codes::{attribute, descriptor, pointwise, reduction, values};
use super::graph::{Operations, Place, packed};
use crate::launch::in_eights;

/// Attention with its tensors' layouts, all that a plan depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Problem {
    pub(super) b: usize,
    pub(super) h: usize,
    pub(super) l: usize,
    pub(super) l_kv: usize,
    pub(super) e: usize,
    /// Of q, k and v: from one item, head and token to the next, in values.
    pub(super) strides: [[usize; 3]; 3],
    /// Of the result, whose heads lie side by side: from one token to the next.
    pub(super) row: usize,
    /// `bf16` or `f16`.
    pub(super) bf16: bool,
}

/// How attention is put to cuDNN. Its kernels are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// As one operation.
    Whole,
    /// As products and the steps of a softmax, which the library recognises.
    Pieces,
}

/// First version with an operation for attention that can be relied upon.
const WHOLE_SINCE: usize = 91301;

impl Form {
    /// Whether this version knows it.
    pub(super) fn is_in(self, version: usize) -> bool {
        self == Self::Pieces || version >= WHOLE_SINCE
    }
}

/// Names of the tensors that are given.
pub(super) const Q: i64 = 1;
pub(super) const K: i64 = 2;
pub(super) const V: i64 = 3;
pub(super) const Y: i64 = 4;
pub(super) const SCALE: i64 = 5;

impl Problem {
    /// The problem of these tensors, as [`crate::attention`] takes them; `None` if it is not for cuDNN: other types than 16-bit ones,
    /// heads of other widths than 64 and 128, values that do not lie in eights. Its result has rows of `h e` values, or so many.
    pub(super) fn of(q: &Tensor, k: &Tensor, v: &Tensor, row: Option<usize>) -> candle_core::Result<Option<Self>> {
        let ((b, h, l, e), (_, _, l_kv, _), dtype) = (q.dims4()?, k.dims4()?, q.dtype());
        let shaped = k.dims() == [b, h, l_kv, e] && v.dims() == k.dims() && b * h * l * l_kv > 0;
        // A view that repeats values has strides of 0.
        let repeats = |x: &Tensor| x.dims().iter().zip(x.stride()).any(|(n, stride)| *n > 1 && *stride == 0);
        let fits = |x: &Tensor| x.dtype() == dtype && in_eights(x) && !repeats(x);
        if !(shaped && matches!(e, 64 | 128) && matches!(dtype, DType::F16 | DType::BF16) && [q, k, v].into_iter().all(fits)) {
            return Ok(None);
        }
        let strides = [q, k, v].map(|x| {
            // A dimension of one value may have any stride; cuDNN gets one that means something.
            let [mut item, mut head, mut token] = [x.stride()[0], x.stride()[1], x.stride()[2]];
            let (heads, tokens) = (x.dims()[1], x.dims()[2]);
            token = if tokens == 1 { e } else { token };
            head = if heads == 1 { tokens * token } else { head };
            item = if b == 1 { (heads * head).max(tokens * token) } else { item };
            [item, head, token]
        });
        Ok(Some(Self { b, h, l, l_kv, e, strides, row: row.unwrap_or(h * e), bf16: dtype == DType::BF16 }))
    }

    fn values(&self) -> i32 {
        if self.bf16 { values::BF16 } else { values::F16 }
    }

    /// The operations of this form.
    pub(super) fn operations(&self, library: &'static Library, form: Form) -> Result<Operations, Failure> {
        let mut graph = Operations::new(library);
        match form {
            Form::Whole => self.whole(&mut graph)?,
            Form::Pieces => self.pieces(&mut graph)?,
        }
        Ok(graph)
    }

    fn whole(&self, graph: &mut Operations) -> Result<(), Failure> {
        let &Self { b, h, l, l_kv, e, strides: [q_at, k_at, v_at], .. } = self;
        let values = self.values();
        let q = graph.tensor(Q, values, [b, h, l, e], rows(q_at), Place::Memory)?;
        let k = graph.tensor(K, values, [b, h, l_kv, e], rows(k_at), Place::Memory)?;
        let v = graph.tensor(V, values, [b, h, l_kv, e], rows(v_at), Place::Memory)?;
        let (y, scale) = (self.y(graph)?, scale(graph)?);
        let attributes = [
            (attribute::ATTENTION_Q, Value::Descriptors(&[&q])),
            (attribute::ATTENTION_K, Value::Descriptors(&[&k])),
            (attribute::ATTENTION_V, Value::Descriptors(&[&v])),
            (attribute::ATTENTION_Y, Value::Descriptors(&[&y])),
            (attribute::ATTENTION_SCALE, Value::Descriptors(&[&scale])),
        ];
        graph.push(Descriptor::new(graph.library, descriptor::ATTENTION_OPERATION, &attributes)?);
        graph.keep([q, k, v, y, scale]);
        Ok(())
    }

    fn pieces(&self, graph: &mut Operations) -> Result<(), Failure> {
        let &Self { b, h, l, l_kv, e, strides: [q_at, k_at, v_at], .. } = self;
        let values = self.values();
        let q = graph.tensor(Q, values, [b, h, l, e], rows(q_at), Place::Memory)?;
        // Transposed, as a product has it.
        let k = graph.tensor(K, values, [b, h, e, l_kv], [k_at[0], k_at[1], 1, k_at[2]], Place::Memory)?;
        let v = graph.tensor(V, values, [b, h, l_kv, e], rows(v_at), Place::Memory)?;
        let (y, scale) = (self.y(graph)?, scale(graph)?);

        let scores = |id, values| graph.tensor(id, values, [b, h, l, l_kv], packed([b, h, l, l_kv]), Place::Between);
        let of_rows = |id| graph.tensor(id, values::F32, [b, h, l, 1], packed([b, h, l, 1]), Place::Between);
        let (product, scaled, less, powers) =
            (scores(10, values::F32)?, scores(11, values::F32)?, scores(12, values::F32)?, scores(13, values::F32)?);
        let weights = scores(14, values)?;
        let (most, sum, log, log_sum) = (of_rows(20)?, of_rows(21)?, of_rows(22)?, of_rows(23)?);

        graph.product(&q, &k, &product)?;
        graph.pointwise(pointwise::MUL, &product, Some(&scale), &scaled)?;
        graph.reduce(reduction::MAX, &scaled, &most)?;
        graph.pointwise(pointwise::SUB, &scaled, Some(&most), &less)?;
        graph.pointwise(pointwise::EXP, &less, None, &powers)?;
        graph.reduce(reduction::ADD, &powers, &sum)?;
        // Nobody reads the logarithm of the sum. It is what the library knows its fast kernels by.
        graph.pointwise(pointwise::LOG, &sum, None, &log)?;
        graph.pointwise(pointwise::ADD, &most, Some(&log), &log_sum)?;
        graph.pointwise(pointwise::DIV, &powers, Some(&sum), &weights)?;
        graph.product(&weights, &v, &y)?;
        graph.keep([q, k, v, y, scale, product, scaled, less, powers, weights, most, sum, log, log_sum]);
        Ok(())
    }

    /// The result: in memory it is `(b, l, h, e)`, in rows that may be longer.
    fn y(&self, graph: &Operations) -> Result<Descriptor, Failure> {
        let &Self { b, h, l, e, row, .. } = self;
        graph.tensor(Y, self.values(), [b, h, l, e], [l * row, e, row, 1], Place::Memory)
    }
}

fn scale(graph: &Operations) -> Result<Descriptor, Failure> {
    graph.tensor(SCALE, values::F32, [1; 4], [1; 4], Place::Given)
}

/// Strides of a tensor whose last dimension is in one piece.
fn rows([item, head, token]: [usize; 3]) -> [usize; 4] {
    [item, head, token, 1]
}
