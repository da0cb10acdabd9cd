//! Graphs of cuDNN's operations, and the plans that run them.

use super::backend::{Descriptor, Failure, Handle, Library, Value};
use super::codes::{CROSS_CORRELATION, attribute, descriptor, heuristics, kind, note, values};

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

/// Where a tensor's values are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Memory,
    /// Nowhere: between two operations.
    Between,
    /// One number, given along with the pointers.
    Given,
}

/// Operations and all that they are made of, which is kept as long as they are.
#[derive(Debug)]
pub(super) struct Operations {
    pub(super) library: &'static Library,
    operations: Vec<Descriptor>,
    parts: Vec<Descriptor>,
}

impl Operations {
    pub(super) fn new(library: &'static Library) -> Self {
        Self { library, operations: Vec::new(), parts: Vec::new() }
    }

    /// Adds an operation.
    pub(super) fn push(&mut self, operation: Descriptor) {
        self.operations.push(operation);
    }

    /// Keeps what operations were made of.
    pub(super) fn keep(&mut self, parts: impl IntoIterator<Item = Descriptor>) {
        self.parts.extend(parts);
    }

    pub(super) fn tensor(
        &self,
        id: i64,
        of: i32,
        dims: [usize; 4],
        strides: [usize; 4],
        place: Place,
    ) -> Result<Descriptor, Failure> {
        // Kernels load 16 bytes at a time, and rely on what is said here: problems are made of nothing else.
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

    pub(super) fn product(&mut self, a: &Descriptor, b: &Descriptor, c: &Descriptor) -> Result<(), Failure> {
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

    pub(super) fn pointwise(&mut self, mode: i32, x: &Descriptor, b: Option<&Descriptor>, y: &Descriptor) -> Result<(), Failure> {
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

    /// x `(b, c, height, width)` under windows of w `(o, c, s, s)`, in f32: strides, and zeros before and after, alike in both directions.
    pub(super) fn convolution(
        &mut self,
        [x, w, y]: [&Descriptor; 3],
        [stride, before, after]: [usize; 3],
    ) -> Result<(), Failure> {
        let both = |n: usize| [n as i64; 2];
        let [dilations, strides, before, after] = [both(1), both(stride), both(before), both(after)];
        let of = [
            (attribute::CONVOLUTION_DIMENSIONS, Value::Integers(&[2])),
            (attribute::CONVOLUTION_PRECISION, Value::Choice(kind::DATA_TYPE, values::F32)),
            (attribute::CONVOLUTION_MODE, Value::Choice(kind::CONVOLUTION_MODE, CROSS_CORRELATION)),
            (attribute::CONVOLUTION_DILATIONS, Value::Integers(&dilations)),
            (attribute::CONVOLUTION_STRIDES, Value::Integers(&strides)),
            (attribute::CONVOLUTION_BEFORE, Value::Integers(&before)),
            (attribute::CONVOLUTION_AFTER, Value::Integers(&after)),
        ];
        let of = Descriptor::new(self.library, descriptor::CONVOLUTION, &of)?;
        let attributes = [
            (attribute::CONVOLUTION_OF, Value::Descriptors(&[&of])),
            (attribute::CONVOLUTION_X, Value::Descriptors(&[x])),
            (attribute::CONVOLUTION_W, Value::Descriptors(&[w])),
            (attribute::CONVOLUTION_Y, Value::Descriptors(&[y])),
            (attribute::CONVOLUTION_ALPHA, Value::Float(1.)),
            (attribute::CONVOLUTION_BETA, Value::Float(0.)),
        ];
        self.operations.push(Descriptor::new(self.library, descriptor::CONVOLUTION_OPERATION, &attributes)?);
        self.parts.push(of);
        Ok(())
    }

    /// Over the last dimension, which is the one that y has not.
    pub(super) fn reduce(&mut self, operator: i32, x: &Descriptor, y: &Descriptor) -> Result<(), Failure> {
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

/// Strides of a tensor in one piece.
pub(super) fn packed([_, h, l, e]: [usize; 4]) -> [usize; 4] {
    [h * l * e, l * e, e, 1]
}

/// What the library says of an engine's numbers.
fn notes(config: &Descriptor) -> Result<Vec<i32>, Failure> {
    let engines = config.descriptors(attribute::CONFIG_ENGINE, descriptor::ENGINE)?;
    let notes = engines.iter().map(|engine| engine.choices(attribute::ENGINE_NOTES, kind::NOTE));
    notes.collect::<Result<Vec<_>, _>>().map(|notes| notes.concat())
}

/// Why an engine of which this is said is not used: equal jobs give equal bytes, and sums are f32.
fn unfit(note: i32) -> Option<&'static str> {
    match note {
        note::CHANGING => Some("may give something else the next time"),
        note::SHORT_SUMS => Some("sums in fewer than 32 bits"),
        note::FEWER_BITS => Some("rounds what it is given"),
        _ => None,
    }
}

/// A kernel, compiled, with all that it is called with except for the pointers.
#[derive(Debug)]
pub(super) struct Plan {
    plan: Descriptor,
    /// Bytes.
    pub(super) workspace: usize,
    /// Why an engine that comes before it was not taken, if that may be for the card's being full.
    pub(super) passed_over: Option<Failure>,
    /// What the library says of its numbers.
    #[cfg_attr(not(test), expect(dead_code, reason = "only tests look at it"))]
    pub(super) notes: Vec<i32>,
    library: &'static Library,
    _graph: Descriptor,
    _operations: Operations,
}

impl Plan {
    /// The first that the library has for a problem that may be put to it in these ways: in either what it knows to be fast, then whatever
    /// works. `most` bytes of workspace. Compiling takes part of a second. The error says why there is none.
    pub(super) fn new(
        ways: &[&dyn Fn() -> Result<Operations, Failure>],
        target: Target<'_>,
        most: usize,
    ) -> Result<Self, Failure> {
        let (mut why, mut passed_over) = (Vec::new(), None);
        for mode in [heuristics::A, heuristics::FALLBACK] {
            for way in ways {
                match way().and_then(|operations| Self::of(operations, target, mode, most)) {
                    Ok(plan) => return Ok(Self { passed_over: passed_over.or(plan.passed_over), ..plan }),
                    Err(e) if e.is_of_the_card() => passed_over = passed_over.or(Some(e)),
                    Err(e) => why.push(e.to_string()),
                }
            }
        }
        Err(passed_over.unwrap_or_else(|| why.join("; ").into()))
    }

    pub(super) fn of(operations: Operations, target: Target<'_>, mode: i32, most: usize) -> Result<Self, Failure> {
        let library = operations.library;
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
        let (mut why, mut passed_over) = (Failure::from(String::from("no engine for this graph")), None);
        for config in &configs {
            // An engine that nothing is said of may be used.
            let notes = match notes(config) {
                Err(e) if e.is_of_the_card() => {
                    passed_over = passed_over.or(Some(e));
                    continue;
                }
                notes => notes.unwrap_or_default(),
            };
            if let Some(what) = notes.iter().find_map(|note| unfit(*note)) {
                why = format!("an engine {what}").into();
                continue;
            }
            let parts = [config];
            let mut attributes = vec![(attribute::PLAN_CONFIG, Value::Descriptors(&parts))];
            attributes.extend(target.told(Some(attribute::PLAN_HANDLE), Some(attribute::PLAN_DEVICE)));
            let plan = match Descriptor::new(library, descriptor::PLAN, &attributes) {
                Ok(plan) => plan,
                Err(e) => {
                    passed_over = passed_over.or_else(|| e.is_of_the_card().then(|| e.clone()));
                    why = e;
                    continue;
                }
            };
            let workspace = plan.integer(attribute::PLAN_WORKSPACE)?.max(0) as usize;
            if workspace <= most {
                return Ok(Self { plan, workspace, passed_over, notes, library, _graph: graph, _operations: operations });
            }
            why = format!("an engine wants {workspace} bytes to work in").into();
        }
        Err(passed_over.unwrap_or(why))
    }

    /// What is called with: where each of the given tensors is, by its name, and the workspace. Single numbers are in the processor's memory.
    pub(super) fn pack(&self, given: &[(i64, u64)], workspace: u64) -> Result<Descriptor, Failure> {
        let (ids, pointers): (Vec<i64>, Vec<u64>) = given.iter().copied().unzip();
        let attributes = [
            (attribute::PACK_IDS, Value::Integers(&ids)),
            (attribute::PACK_POINTERS, Value::Pointers(&pointers)),
            (attribute::PACK_WORKSPACE, Value::Pointers(&[workspace])),
        ];
        Descriptor::new(self.library, descriptor::VARIANT_PACK, &attributes)
    }

    /// Puts the work into the handle's stream.
    ///
    /// # Safety
    /// What is given, as in [`Self::pack`], and the workspace are valid until the work is in the stream, and as large and aligned as the
    /// plan has it.
    #[expect(unsafe_code, reason = "see above")]
    #[cfg(feature = "cuda")]
    pub(super) unsafe fn run(&self, handle: &mut Handle, given: &[(i64, u64)], workspace: u64) -> Result<(), Failure> {
        let pack = self.pack(given, workspace)?;
        // SAFETY: the caller's.
        unsafe { handle.execute(&self.plan, &pack) }
    }
}
