//! Attention as a graph of cuDNN's operations, and the plan that runs it.

use candle_core::{DType, Tensor};

use super::backend::{Descriptor, Handle, Library, Value};
use super::codes::{attribute, descriptor, heuristics, kind, pointwise, reduction, values};
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

/// What a plan is made for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target<'a> {
    Card(&'a Handle),
    /// A card that is described, not there: since 9.8, cuDNN makes plans for it, to run elsewhere.
    #[cfg_attr(all(feature = "cuda", not(test)), expect(dead_code, reason = "only tests describe cards"))]
    Described(&'a [&'a Descriptor; 1]),
}

impl<'a> Target<'a> {
    /// How a descriptor is told of it: by the first of these attributes if it is a card, by the second if it is described.
    fn told(self, card: Option<i32>, described: Option<i32>) -> Option<(i32, Value<'a>)> {
        match self {
            Self::Card(handle) => card.map(|attribute| (attribute, Value::Handle(handle))),
            Self::Described(device) => described.map(|attribute| (attribute, Value::Descriptors(device))),
        }
    }
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
    /// The forms that this version knows, best first.
    pub(super) fn of(version: usize) -> &'static [Self] {
        if version >= WHOLE_SINCE { &[Self::Whole, Self::Pieces] } else { &[Self::Pieces] }
    }
}

/// Names of the tensors that are given.
const Q: i64 = 1;
const K: i64 = 2;
const V: i64 = 3;
const Y: i64 = 4;
const SCALE: i64 = 5;

/// Where a tensor's values are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Memory,
    /// Nowhere: between two operations.
    Between,
    /// One number, given along with the pointers.
    Given,
}

/// Operations and all that they are made of, which is kept as long as they are.
#[derive(Debug)]
pub(super) struct Operations {
    library: &'static Library,
    operations: Vec<Descriptor>,
    parts: Vec<Descriptor>,
}

impl Operations {
    pub(super) fn new(library: &'static Library, form: Form, problem: &Problem) -> Result<Self, String> {
        let mut new = Self { library, operations: Vec::new(), parts: Vec::new() };
        match form {
            Form::Whole => new.whole(problem)?,
            Form::Pieces => new.pieces(problem)?,
        }
        Ok(new)
    }

    fn whole(&mut self, problem: &Problem) -> Result<(), String> {
        let &Problem { b, h, l, l_kv, e, strides: [q_at, k_at, v_at], .. } = problem;
        let values = problem.values();
        let q = self.tensor(Q, values, [b, h, l, e], rows(q_at), Place::Memory)?;
        let k = self.tensor(K, values, [b, h, l_kv, e], rows(k_at), Place::Memory)?;
        let v = self.tensor(V, values, [b, h, l_kv, e], rows(v_at), Place::Memory)?;
        let (y, scale) = (self.y(problem)?, self.scale()?);
        let attributes = [
            (attribute::ATTENTION_Q, Value::Descriptors(&[&q])),
            (attribute::ATTENTION_K, Value::Descriptors(&[&k])),
            (attribute::ATTENTION_V, Value::Descriptors(&[&v])),
            (attribute::ATTENTION_Y, Value::Descriptors(&[&y])),
            (attribute::ATTENTION_SCALE, Value::Descriptors(&[&scale])),
        ];
        self.operations.push(Descriptor::new(self.library, descriptor::ATTENTION_OPERATION, &attributes)?);
        self.parts.extend([q, k, v, y, scale]);
        Ok(())
    }

    fn pieces(&mut self, problem: &Problem) -> Result<(), String> {
        let &Problem { b, h, l, l_kv, e, strides: [q_at, k_at, v_at], .. } = problem;
        let values = problem.values();
        let q = self.tensor(Q, values, [b, h, l, e], rows(q_at), Place::Memory)?;
        // Transposed, as a product has it.
        let k = self.tensor(K, values, [b, h, e, l_kv], [k_at[0], k_at[1], 1, k_at[2]], Place::Memory)?;
        let v = self.tensor(V, values, [b, h, l_kv, e], rows(v_at), Place::Memory)?;
        let (y, scale) = (self.y(problem)?, self.scale()?);

        let scores = |id, values| self.tensor(id, values, [b, h, l, l_kv], packed([b, h, l, l_kv]), Place::Between);
        let of_rows = |id| self.tensor(id, values::F32, [b, h, l, 1], packed([b, h, l, 1]), Place::Between);
        let (product, scaled, less, powers) =
            (scores(10, values::F32)?, scores(11, values::F32)?, scores(12, values::F32)?, scores(13, values::F32)?);
        let weights = scores(14, values)?;
        let (most, sum, log, log_sum) = (of_rows(20)?, of_rows(21)?, of_rows(22)?, of_rows(23)?);

        self.product(&q, &k, &product)?;
        self.pointwise(pointwise::MUL, &product, Some(&scale), &scaled)?;
        self.reduce(reduction::MAX, &scaled, &most)?;
        self.pointwise(pointwise::SUB, &scaled, Some(&most), &less)?;
        self.pointwise(pointwise::EXP, &less, None, &powers)?;
        self.reduce(reduction::ADD, &powers, &sum)?;
        // Nobody reads the logarithm of the sum. It is what the library knows its fast kernels by.
        self.pointwise(pointwise::LOG, &sum, None, &log)?;
        self.pointwise(pointwise::ADD, &most, Some(&log), &log_sum)?;
        self.pointwise(pointwise::DIV, &powers, Some(&sum), &weights)?;
        self.product(&weights, &v, &y)?;
        self.parts.extend([q, k, v, y, scale, product, scaled, less, powers, weights, most, sum, log, log_sum]);
        Ok(())
    }

    /// The result: in memory it is `(b, l, h, e)`, in rows that may be longer.
    fn y(&self, problem: &Problem) -> Result<Descriptor, String> {
        let &Problem { b, h, l, e, row, .. } = problem;
        self.tensor(Y, problem.values(), [b, h, l, e], [l * row, e, row, 1], Place::Memory)
    }

    fn scale(&self) -> Result<Descriptor, String> {
        self.tensor(SCALE, values::F32, [1; 4], [1; 4], Place::Given)
    }

    fn tensor(&self, id: i64, of: i32, dims: [usize; 4], strides: [usize; 4], place: Place) -> Result<Descriptor, String> {
        // Kernels load 16 bytes at a time, and rely on what is said here: `Problem::of` takes nothing else.
        let alignment = if place == Place::Given { 4 } else { 16 };
        let attributes = [
            (attribute::TENSOR_TYPE, Value::Choice(kind::DATA_TYPE, of)),
            (attribute::TENSOR_DIMS, Value::Integers(&dims.map(|n| n as i64))),
            (attribute::TENSOR_STRIDES, Value::Integers(&strides.map(|n| n as i64))),
            (attribute::TENSOR_ID, Value::Integers(&[id])),
            (attribute::TENSOR_ALIGNMENT, Value::Integers(&[alignment])),
            (attribute::TENSOR_VIRTUAL, Value::Flag(place == Place::Between)),
            (attribute::TENSOR_BY_VALUE, Value::Flag(place == Place::Given)),
        ];
        Descriptor::new(self.library, descriptor::TENSOR, &attributes)
    }

    fn product(&mut self, a: &Descriptor, b: &Descriptor, c: &Descriptor) -> Result<(), String> {
        let precision = (attribute::PRODUCT_PRECISION, Value::Choice(kind::DATA_TYPE, values::F32));
        let of = Descriptor::new(self.library, descriptor::PRODUCT, &[precision])?;
        let attributes = [
            (attribute::PRODUCT_OF, Value::Descriptors(&[&of])),
            (attribute::PRODUCT_A, Value::Descriptors(&[a])),
            (attribute::PRODUCT_B, Value::Descriptors(&[b])),
            (attribute::PRODUCT_C, Value::Descriptors(&[c])),
        ];
        self.operations.push(Descriptor::new(self.library, descriptor::PRODUCT_OPERATION, &attributes)?);
        self.parts.push(of);
        Ok(())
    }

    fn pointwise(&mut self, mode: i32, x: &Descriptor, b: Option<&Descriptor>, y: &Descriptor) -> Result<(), String> {
        let mode = (attribute::POINTWISE_MODE, Value::Choice(kind::POINTWISE_MODE, mode));
        let precision = (attribute::POINTWISE_PRECISION, Value::Choice(kind::DATA_TYPE, values::F32));
        let of = Descriptor::new(self.library, descriptor::POINTWISE, &[mode, precision])?;
        let attributes = [
            (attribute::POINTWISE_OF, Value::Descriptors(&[&of])),
            (attribute::POINTWISE_X, Value::Descriptors(&[x])),
            (attribute::POINTWISE_Y, Value::Descriptors(&[y])),
            (attribute::POINTWISE_B, Value::Descriptors(b.as_slice())),
        ];
        let attributes = if b.is_some() { &attributes[..] } else { &attributes[..3] };
        self.operations.push(Descriptor::new(self.library, descriptor::POINTWISE_OPERATION, attributes)?);
        self.parts.push(of);
        Ok(())
    }

    /// Over the last dimension, which is the one that y has not.
    fn reduce(&mut self, operator: i32, x: &Descriptor, y: &Descriptor) -> Result<(), String> {
        let operator = (attribute::REDUCTION_OPERATOR, Value::Choice(kind::REDUCTION_OPERATOR, operator));
        let precision = (attribute::REDUCTION_PRECISION, Value::Choice(kind::DATA_TYPE, values::F32));
        let of = Descriptor::new(self.library, descriptor::REDUCTION, &[operator, precision])?;
        let attributes = [
            (attribute::REDUCTION_OF, Value::Descriptors(&[&of])),
            (attribute::REDUCTION_X, Value::Descriptors(&[x])),
            (attribute::REDUCTION_Y, Value::Descriptors(&[y])),
        ];
        self.operations.push(Descriptor::new(self.library, descriptor::REDUCTION_OPERATION, &attributes)?);
        self.parts.push(of);
        Ok(())
    }
}

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
}

/// Strides of a tensor whose last dimension is in one piece.
fn rows([item, head, token]: [usize; 3]) -> [usize; 4] {
    [item, head, token, 1]
}

/// Strides of a tensor in one piece.
fn packed([_, h, l, e]: [usize; 4]) -> [usize; 4] {
    [h * l * e, l * e, e, 1]
}

/// A kernel, compiled, with all that it is called with except for the pointers.
#[derive(Debug)]
pub(super) struct Plan {
    plan: Descriptor,
    /// Bytes.
    pub(super) workspace: usize,
    library: &'static Library,
    _graph: Descriptor,
    _operations: Operations,
}

impl Plan {
    /// The first that the library has for this problem: in either form what it knows to be fast, then whatever works. Compiling takes
    /// part of a second. The error says why there is none.
    pub(super) fn new(library: &'static Library, problem: &Problem, target: Target<'_>) -> Result<Self, String> {
        let mut why = Vec::new();
        for mode in [heuristics::A, heuristics::FALLBACK] {
            for form in Form::of(library.version) {
                match Self::in_form(library, problem, target, *form, mode) {
                    Ok(plan) => return Ok(plan),
                    Err(e) => why.push(format!("{form:?}: {e}")),
                }
            }
        }
        Err(why.join("; "))
    }

    pub(super) fn in_form(
        library: &'static Library,
        problem: &Problem,
        target: Target<'_>,
        form: Form,
        mode: i32,
    ) -> Result<Self, String> {
        let operations = Operations::new(library, form, problem)?;
        let of: Vec<&Descriptor> = operations.operations.iter().collect();
        let mut attributes = vec![(attribute::GRAPH_OPERATIONS, Value::Descriptors(&of))];
        attributes.extend(target.told(Some(attribute::GRAPH_HANDLE), None));
        let graph = Descriptor::new(library, descriptor::GRAPH, &attributes)?;

        let graphs = [&graph];
        let mut question = vec![
            (attribute::HEURISTICS_GRAPH, Value::Descriptors(&graphs)),
            (attribute::HEURISTICS_MODE, Value::Choice(kind::HEURISTICS_MODE, mode)),
        ];
        question.extend(target.told(None, Some(attribute::HEURISTICS_DEVICE)));
        let answer = Descriptor::new(library, descriptor::HEURISTICS, &question)?;
        let configs = answer.descriptors(attribute::HEURISTICS_RESULTS, descriptor::ENGINE_CONFIG)?;
        let mut why = String::from("no engine for this graph");
        for config in &configs {
            let parts = [config];
            let mut attributes = vec![(attribute::PLAN_CONFIG, Value::Descriptors(&parts))];
            attributes.extend(target.told(Some(attribute::PLAN_HANDLE), Some(attribute::PLAN_DEVICE)));
            match Descriptor::new(library, descriptor::PLAN, &attributes) {
                Ok(plan) => {
                    let workspace = plan.integer(attribute::PLAN_WORKSPACE)?.max(0) as usize;
                    return Ok(Self { plan, workspace, library, _graph: graph, _operations: operations });
                }
                Err(e) => why = e,
            }
        }
        Err(why)
    }

    /// What is called with: pointers to q, k, v, y, the scale (in the processor's memory) and the workspace.
    pub(super) fn pack(&self, tensors: [u64; 5], workspace: u64) -> Result<Descriptor, String> {
        let attributes = [
            (attribute::PACK_IDS, Value::Integers(&[Q, K, V, Y, SCALE])),
            (attribute::PACK_POINTERS, Value::Pointers(&tensors)),
            (attribute::PACK_WORKSPACE, Value::Pointers(&[workspace])),
        ];
        Descriptor::new(self.library, descriptor::VARIANT_PACK, &attributes)
    }

    /// Puts the work into the handle's stream.
    ///
    /// # Safety
    /// Tensors and workspace are valid until the work is in the stream, and as large and aligned as the plan has it.
    #[expect(unsafe_code, reason = "see above")]
    #[cfg(feature = "cuda")]
    pub(super) unsafe fn run(&self, handle: &mut Handle, tensors: [u64; 4], scale: f32, workspace: u64) -> Result<(), String> {
        let [q, k, v, y] = tensors;
        let pack = self.pack([q, k, v, y, (&raw const scale) as u64], workspace)?;
        // SAFETY: the scale is read when the work is put into the stream; the rest is the caller's.
        unsafe { handle.execute(&self.plan, &pack) }
    }
}
