//! Attention and convolution through cuDNN, whose library is opened when it is first asked for: nothing is linked, and without it nothing is lost.
//!
//! It wants `libcudnn.so.9` and, as it compiles its kernels when it makes a plan, NVRTC of the same CUDA, where the dynamic linker finds
//! them.

// Without a card, tests look at what can be looked at.
#[cfg(any(feature = "cuda", test))]
mod attention;
#[cfg(any(feature = "cuda", test))]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only cards run plans"))]
mod backend;
#[cfg(any(feature = "cuda", test))]
mod codes;
#[cfg(any(feature = "cuda", test))]
mod convolution;
#[cfg(any(feature = "cuda", test))]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only cards run plans"))]
mod graph;
#[cfg(test)]
mod tests;

use candle_core::{Device, Tensor};

use crate::ops::convolve::Window;

/// q `(b, h, l, e)`, k and v `(b, h, l_kv, e)` -> softmax(scale q kᵀ) v, `(b, l, h, e)`: `into`, or a new tensor.
///
/// `None` if this is not for cuDNN: other devices, types other than 16-bit ones, heads of widths other than 64 and 128, no library, no
/// plan; [`cudnn_status`] tells of the last two. Errors if the plan that there is does not run.
#[cfg_attr(not(feature = "cuda"), expect(clippy::unnecessary_wraps, reason = "as with CUDA"))]
pub(crate) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    into: Option<&Tensor>,
) -> candle_core::Result<Option<Tensor>> {
    #[cfg(feature = "cuda")]
    return card::attention([q, k, v], scale, into);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (q, k, v, scale, into);
        Ok(None)
    }
}

/// x `(b, y, x, c)`, weight `(o, s, s, c)`, bias `(o)` -> `(b, y', x', o)`, as [`crate::convolve`]; `None` as for [`attention`], and for
/// pictures that are enlarged and channels that are not in eights.
#[cfg_attr(not(feature = "cuda"), expect(clippy::unnecessary_wraps, reason = "as with CUDA"))]
pub(crate) fn convolve(
    inputs: [&Tensor; 3],
    residual: Option<&Tensor>,
    window: Window,
    shape: [usize; 4],
) -> candle_core::Result<Option<Tensor>> {
    #[cfg(feature = "cuda")]
    return card::convolve(inputs, residual, window, shape);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (inputs, residual, window, shape);
        Ok(None)
    }
}

/// cuDNN's version, and what it was last not used for; or why it cannot be used. The first call opens the library.
#[must_use]
pub fn cudnn_status() -> String {
    #[cfg(feature = "cuda")]
    return card::status();
    #[cfg(not(feature = "cuda"))]
    "no cuDNN: this build has no CUDA".into()
}

/// cuDNN's version by itself; empty without it.
pub(crate) fn cudnn_version() -> String {
    #[cfg(feature = "cuda")]
    return card::version();
    #[cfg(not(feature = "cuda"))]
    String::new()
}

/// Gives back what its kernels take of the card's memory; they are made again when they are wanted.
pub fn forget_plans(device: &Device) -> candle_core::Result<()> {
    #[cfg(feature = "cuda")]
    card::forget(device)?;
    let _ = device;
    Ok(())
}

/// Whether cuDNN is there to be used. The first call opens the library.
#[must_use]
pub fn has_cudnn() -> bool {
    #[cfg(feature = "cuda")]
    return card::library().is_ok();
    #[cfg(not(feature = "cuda"))]
    false
}

#[cfg(feature = "cuda")]
mod card {
    use std::collections::HashMap;
    use std::collections::hash_map::Entry;
    use std::sync::{Arc, Mutex, OnceLock, PoisonError};

    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
    use candle_core::{CudaDevice, Device, Error, Tensor};

    use super::attention::{self, Form};
    use super::backend::{Failure, Handle, Library, dotted};
    use super::convolution;
    use super::graph::{Plan, Target};
    use crate::launch::{applies, output, with_addresses};
    use crate::ops::attention::destination;
    use crate::ops::convolve::Window;

    /// The library's names: the whole of it, and the part that is used.
    const FILES: [&str; 2] = ["libcudnn.so.9", "libcudnn_graph.so.9"];

    /// Bytes that an engine may have to work in, as plans of memory have no more for it.
    const WORKSPACE: usize = 32 << 20;

    /// Plans that are kept: a dozen sizes of pictures. Their kernels stay on the card as long as they do.
    const PLANS: usize = 128;

    /// What plans are made for.
    #[derive(Debug, PartialEq, Eq, Hash)]
    enum Problem {
        Attention(attention::Problem),
        Convolution(convolution::Problem),
    }

    impl Problem {
        fn plan(&self, library: &'static Library, target: Target<'_>) -> Result<Plan, Failure> {
            match self {
                Self::Attention(problem) => {
                    let whole = || problem.operations(library, Form::Whole);
                    let pieces = || problem.operations(library, Form::Pieces);
                    let ways: [&dyn Fn() -> _; 2] = [&whole, &pieces];
                    Plan::new(&ways[usize::from(!Form::Whole.is_in(library.version))..], target, WORKSPACE)
                }
                Self::Convolution(problem) => Plan::new(&[&|| problem.operations(library)], target, WORKSPACE),
            }
        }
    }

    /// cuDNN on one card: used by one thread at a time.
    struct Card {
        /// `None` where there is no plan, which is not looked for again.
        plans: HashMap<Problem, Option<Plan>>,
        handle: Handle,
        /// What the plans and the handle live in.
        _context: Arc<CudaContext>,
    }

    static CARDS: Mutex<Option<HashMap<usize, Option<Card>>>> = Mutex::new(None);

    /// Why work was last left to others.
    static REFUSAL: Mutex<Option<String>> = Mutex::new(None);

    pub(super) fn library() -> Result<&'static Library, &'static str> {
        static LIBRARY: OnceLock<Result<&'static Library, String>> = OnceLock::new();
        LIBRARY.get_or_init(|| Library::open(&FILES)).as_ref().map(|opened| *opened).map_err(String::as_str)
    }

    pub(super) fn status() -> String {
        let refusal = REFUSAL.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match (library(), refusal) {
            (Err(why), _) => format!("no cuDNN: {why}"),
            (Ok(library), None) => format!("cuDNN {}", dotted(library.version)),
            (Ok(library), Some(why)) => format!("cuDNN {}; {why}", dotted(library.version)),
        }
    }

    pub(super) fn version() -> String {
        library().map_or_else(|_| String::new(), |library| dotted(library.version))
    }

    pub(super) fn attention([q, k, v]: [&Tensor; 3], scale: f64, into: Option<&Tensor>) -> candle_core::Result<Option<Tensor>> {
        let row = into.map(|y| y.stride()[1]);
        let Some(problem) = attention::Problem::of(q, k, v, row)? else { return Ok(None) };
        let Some(y) = destination(q, into)? else { return Ok(None) };
        let tensors = [(attention::Q, q), (attention::K, k), (attention::V, v), (attention::Y, &y)];
        Ok(run(Problem::Attention(problem), &tensors, Some((attention::SCALE, scale as f32)))?.then_some(y))
    }

    pub(super) fn convolve(
        [x, weight, bias]: [&Tensor; 3],
        residual: Option<&Tensor>,
        window: Window,
        shape: [usize; 4],
    ) -> candle_core::Result<Option<Tensor>> {
        let Some(problem) = convolution::Problem::of([x, weight, bias], residual, window, shape)? else { return Ok(None) };
        let y = output(&shape, x.dtype(), x.device())?;
        let mut tensors = vec![(convolution::X, x), (convolution::W, weight), (convolution::BIAS, bias), (convolution::Y, &y)];
        tensors.extend(residual.map(|residual| (convolution::RESIDUAL, residual)));
        Ok(run(Problem::Convolution(problem), &tensors, None)?.then_some(y))
    }

    pub(super) fn forget(device: &Device) -> candle_core::Result<()> {
        let Device::Cuda(card) = device else { return Ok(()) };
        device.synchronize()?;
        let mut cards = CARDS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Some(card)) = cards.get_or_insert_default().get_mut(&card.cuda_stream().context().ordinal()) {
            card.plans.clear();
        }
        Ok(())
    }

    /// Whether there is a plan for it; then its work, with these tensors and this number, is in the stream.
    fn run(problem: Problem, tensors: &[(i64, &Tensor)], number: Option<(i64, f32)>) -> candle_core::Result<bool> {
        let (_, x) = tensors[0];
        let Device::Cuda(device) = x.device() else { return Ok(false) };
        let (true, Ok(library)) = (applies(x), library()) else { return Ok(false) };
        let stream = device.cuda_stream();
        // cuDNN takes the card that is current.
        stream.context().bind_to_thread().w()?;
        let mut cards = CARDS.lock().unwrap_or_else(PoisonError::into_inner);
        let card = match cards.get_or_insert_default().entry(stream.context().ordinal()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let handle = noted(x.device(), Handle::new(library))?;
                entry.insert(handle.map(|handle| Card { plans: HashMap::new(), handle, _context: stream.context().clone() }))
            }
        };
        let Some(card) = card else { return Ok(false) };
        card.run(library, device, &stream, problem, tensors, number)
    }

    impl Card {
        fn run(
            &mut self,
            library: &'static Library,
            device: &CudaDevice,
            stream: &CudaStream,
            problem: Problem,
            tensors: &[(i64, &Tensor)],
            number: Option<(i64, f32)>,
        ) -> candle_core::Result<bool> {
            let of = Device::Cuda(device.clone());
            self.handle.use_stream(stream.cu_stream().cast()).map_err(|failure| said(&of, &failure))?;
            if self.plans.len() >= PLANS && !self.plans.contains_key(&problem) {
                // Their kernels may be at work.
                of.synchronize()?;
                self.plans.clear();
            }
            let plan = match self.plans.entry(problem) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    let plan = entry.key().plan(library, Target::Card(&self.handle));
                    // What is second best on a card that is full would stay in use when it is not.
                    let plan = plan.and_then(|plan| match &plan.passed_over {
                        Some(why) if is_full(&of) => Err(why.clone()),
                        _ => Ok(plan),
                    });
                    let plan = noted(&of, plan.map_err(|why| why.about(&format!("no plan for {:?}", entry.key()))))?;
                    entry.insert(plan)
                }
            };
            let Some(plan) = plan else { return Ok(false) };
            let workspace = workspace(device, plan.workspace)?;
            let working = workspace.as_ref().map(|memory| memory.device_ptr(stream));
            let all: Vec<_> = tensors.iter().map(|(_, x)| Some(*x)).collect();
            with_addresses(device, &all, |at| {
                let mut given: Vec<_> = tensors.iter().zip(at).map(|((name, _), at)| (*name, *at)).collect();
                given.extend(number.as_ref().map(|(name, number)| (*name, std::ptr::from_ref(number) as u64)));
                let working = working.as_ref().map_or(0, |(at, _)| *at);
                // SAFETY: the problem is that of the tensors, which are held until the work is in the stream, as is the workspace,
                // whose memory is given back in the order of the stream. The number is read when the work is put into it.
                #[expect(unsafe_code, reason = "a call of the library")]
                unsafe { plan.run(&mut self.handle, &given, working) }.map_err(|failure| said(&of, &failure))
            })?;
            Ok(true)
        }
    }

    /// So many bytes with nothing in them yet; none for none.
    fn workspace(device: &CudaDevice, bytes: usize) -> candle_core::Result<Option<CudaSlice<u8>>> {
        if bytes == 0 {
            return Ok(None);
        }
        // SAFETY: cuDNN expects nothing of what is in it.
        #[expect(unsafe_code, reason = "memory that nothing has written")]
        let memory = unsafe { device.alloc::<u8>(bytes) }?;
        Ok(Some(memory))
    }

    /// What there is, or `None` with the reason kept for [`status`]. Whose kernels are used must not depend on how full the card was: what
    /// fails on one that has nothing left is an error, and is tried again.
    fn noted<T>(device: &Device, result: Result<T, Failure>) -> candle_core::Result<Option<T>> {
        match result {
            Ok(there) => Ok(Some(there)),
            Err(failure) if failure.is_of_the_card() && is_full(device) => Err(said(device, &failure)),
            Err(failure) => {
                *REFUSAL.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure.to_string());
                Ok(None)
            }
        }
    }

    /// Less is free than the library's kernels may take.
    fn is_full(device: &Device) -> bool {
        crate::free_memory(device).is_some_and(|free| free < 256 << 20)
    }

    fn said(device: &Device, failure: &Failure) -> Error {
        let full = failure.is_of_the_card() && is_full(device);
        Error::msg(if full { format!("out of memory: {failure}") } else { failure.to_string() })
    }
}
