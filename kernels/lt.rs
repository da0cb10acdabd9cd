//! Matrix products through cuBLASLt: bias and GELU in the epilogue, and the algorithm timed once for each shape.

use std::collections::{BTreeSet, HashMap};
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t;
use candle_core::cuda_backend::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys::{self, cublasStatus_t as Status};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, sys::CUevent_flags};
use candle_core::{CudaDevice, DType, Device, Result, Tensor};

use crate::choices::{Algorithm, Choices, Shape};
use crate::launch::{applies, count, in_eights, output, with_addresses};
use crate::ops::fp8::{Fp8Rows, scale_products};

/// What Hopper's fastest algorithms may use.
const WORKSPACE: usize = 32 << 20;
/// CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE.
const SUM_IN_F32: u32 = 2;
/// Of every matrix, in bytes: eight values.
const ALIGNMENT: u32 = 16;
/// Algorithms that are timed, of those that the library thinks best; and runs of each, whose fastest counts.
const CANDIDATES: usize = 8;
const RUNS: usize = 5;

/// The library, for one card.
struct Library {
    handle: sys::cublasLtHandle_t,
    /// Of the stream that the last product went into: there they use it one after another.
    workspace: CudaSlice<u8>,
    choices: Choices,
    /// Products that it has no algorithm for.
    without: BTreeSet<Shape>,
}

// SAFETY: a handle may be used from any thread, and the lock around it keeps that to one at a time.
#[expect(unsafe_code, reason = "see above")]
unsafe impl Send for Library {}

static LIBRARIES: Mutex<Option<HashMap<usize, Library>>> = Mutex::new(None);

/// x `(n, input)`, weight `(output, input)`, bias `(output)` -> `x Wᵀ + b`, through GELU if asked, `(n, output)`. `None` if this is
/// not for cuBLASLt: other devices, types other than 16-bit ones, sizes that are not multiples of eight.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, gelu: bool) -> Result<Option<Tensor>> {
    let Some(device) = fit(x, weight, bias)? else { return Ok(None) };
    let y = output((x.dim(0)?, weight.dim(0)?), x.dtype(), x.device())?;
    run(device, &Product { x, weight, scales: None, bias, gelu, y: &y }).map(|done| done.then_some(y))
}

/// As [`linear`] -> its first columns `(n, first)`, and GELU of the others `(n, m)` in the right part of rows `(n, room + m)`.
pub(crate) fn linear_beside(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    first: usize,
    room: usize,
) -> Result<Option<(Tensor, Tensor)>> {
    let Some(device) = fit(x, weight, bias)? else { return Ok(None) };
    let (n, m) = (x.dim(0)?, weight.dim(0)? - first);
    if !(first.is_multiple_of(8) && room.is_multiple_of(8)) {
        return Ok(None);
    }
    let [y, rows] = [first, room + m].map(|width| output((n, width), x.dtype(), x.device()));
    let (y, rows) = (y?, rows?);
    let part = |from, length, gelu, y: &Tensor| {
        let bias = bias.map(|bias| bias.narrow(0, from, length)).transpose()?;
        run(device, &Product { x, weight: &weight.narrow(0, from, length)?, scales: None, bias: bias.as_ref(), gelu, y })
    };
    let done = part(first, m, true, &rows.narrow(1, room, m)?)? && part(0, first, false, &y)?;
    Ok(done.then_some((y, rows)))
}

/// The card, if these are for the library.
fn fit<'a>(x: &'a Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<&'a CudaDevice>> {
    let Device::Cuda(device) = x.device() else { return Ok(None) };
    let dtype = x.dtype();
    let fits = |m: &Tensor| m.dtype() == dtype && in_eights(m) && m.elem_count() > 0;
    let bias_fits = bias.is_none_or(|bias| bias.dtype() == dtype && bias.is_contiguous() && in_eights(bias));
    let sixteen = matches!(dtype, DType::F16 | DType::BF16);
    let all = applies(x) && sixteen && fits(x) && fits(weight) && bias_fits && weight.dim(0)?.is_multiple_of(8);
    Ok(all.then_some(device))
}

/// x `(n, input)` and weight `(output, input)` -> as [`linear`], in `dtype`. `None` where our kernels are off or the card has no units for it.
pub(crate) fn linear_fp8(
    Fp8Rows { data: x, scale: x_scale }: &Fp8Rows,
    Fp8Rows { data: weight, scale }: &Fp8Rows,
    bias: Option<&Tensor>,
    gelu: bool,
    dtype: DType,
) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = x.device() else { return Ok(None) };
    let capable = applies(x) && crate::card::has_fp8_products(x.device());
    let sixteens = |m: &Tensor| m.is_contiguous() && m.dims().iter().all(|d| d.is_multiple_of(16)) && m.elem_count() > 0;
    let bias_fits = bias.is_none_or(|bias| bias.dtype() == dtype && bias.is_contiguous() && in_eights(bias));
    let fits = sixteens(weight) && x.is_contiguous() && x.dim(1)?.is_multiple_of(16) && matches!(dtype, DType::F16 | DType::BF16);
    if !(capable && fits && bias_fits) {
        return Ok(None);
    }
    let y = output((x.dim(0)?, weight.dim(0)?), dtype, x.device())?;
    let product = Product { x, weight, scales: Some([x_scale, scale]), bias, gelu, y: &y };
    if run(device, &product)? {
        return Ok(Some(y));
    }
    // There may be algorithms with a scale for each row, and none of them with GELU.
    if gelu && run(device, &Product { gelu: false, ..product })? {
        return Ok(Some(crate::gelu(&y)?));
    }
    // Only Hopper has algorithms with a scale for each row: elsewhere the product comes first. Without its scales it is of up to
    // 448² for each input, which f16 does not hold.
    let bare = Product { scales: None, bias: None, gelu: false, ..product };
    if dtype != DType::BF16 || !run(device, &bare)? {
        return Ok(None);
    }
    scale_products(&y, [x_scale, scale], bias, gelu)?;
    Ok(Some(y))
}

/// `y = x Wᵀ + b`.
#[derive(Clone, Copy)]
struct Product<'a> {
    x: &'a Tensor,
    weight: &'a Tensor,
    /// Of the rows of x and of the weight, if both are e4m3.
    scales: Option<[&'a Tensor; 2]>,
    bias: Option<&'a Tensor>,
    gelu: bool,
    /// May be columns of longer rows.
    y: &'a Tensor,
}

/// Whether the library can do it; then it is in the stream.
fn run(device: &CudaDevice, product: &Product<'_>) -> Result<bool> {
    let mut libraries = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
    let stream = device.cuda_stream();
    let library = match libraries.get_or_insert_default().entry(stream.context().ordinal()) {
        std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
        std::collections::hash_map::Entry::Vacant(entry) => entry.insert(Library::open(device)?),
    };
    let done = library.product(device, product)?;
    if done {
        count();
    }
    Ok(done)
}

/// Memory for products to work in.
fn workspace(device: &CudaDevice) -> Result<CudaSlice<u8>> {
    // SAFETY: the library writes to it before it reads.
    #[expect(unsafe_code, reason = "memory that nothing has written")]
    unsafe {
        device.alloc::<u8>(WORKSPACE)
    }
}

impl Library {
    fn open(device: &CudaDevice) -> Result<Self> {
        // SAFETY: it takes nothing.
        #[expect(unsafe_code, reason = "a call of the library")]
        let version = unsafe { sys::cublasLtGetVersion() };
        let machine = crate::card::machine(&Device::Cuda(device.clone()))?;
        let choices = Choices::of(&format!("{machine}-cublaslt-{version}"));
        Ok(Self {
            handle: result::create_handle().map_err(candle_core::Error::wrap)?,
            workspace: workspace(device)?,
            choices,
            without: BTreeSet::new(),
        })
    }

    /// Whether there is an algorithm for it; then it is in the stream.
    fn product(&mut self, device: &CudaDevice, product: &Product<'_>) -> Result<bool> {
        let Product { x, weight, scales, bias, gelu, y } = *product;
        let (n, input, outputs) = (x.dim(0)?, x.dim(1)?, weight.dim(0)?);
        let epilogue = match (bias, gelu) {
            (None, false) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
            (Some(_), false) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            (None, true) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU,
            (Some(_), true) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        let scaled = if scales.is_some() { "-scaled" } else { "" };
        let kind = format!("{:?}-{:?}-{epilogue:?}-{}-{}{scaled}", x.dtype(), y.dtype(), x.stride()[0], y.stride()[0]);
        let shape = Shape { n, output: outputs, input, kind };
        if self.without.contains(&shape) {
            return Ok(false);
        }

        let [x_scale, weight_scale] = [scales.map(|[of_x, _]| of_x), scales.map(|[_, of_weight]| of_weight)];
        let tensors = [Some(x), Some(weight), bias, Some(y), x_scale, weight_scale];
        with_addresses(device, &tensors, |at| self.product_at(device, product, &shape, epilogue, at))
    }

    /// The same with where x, the weight, the bias, y and the scales of x and of the weight are.
    fn product_at(
        &mut self,
        device: &CudaDevice,
        product: &Product<'_>,
        shape: &Shape,
        epilogue: sys::cublasLtEpilogue_t,
        at: &[u64],
    ) -> Result<bool> {
        let Product { x, weight, scales, y, .. } = *product;
        let &[x_at, weight_at, bias_at, y_at, x_scale, weight_scale] = at else { unreachable!("six tensors were given") };
        let stream = &device.cuda_stream();
        // Of a card that was opened twice, each device has a stream. What the other's products still use is freed in the order of theirs.
        if self.workspace.stream() != stream {
            self.workspace = workspace(device)?;
        }
        let (workspace, _used) = self.workspace.device_ptr(stream);

        // The library counts by columns, where rows of ours are columns: yᵀ = W xᵀ.
        let matrix = |of: &Tensor| match of.dtype() {
            DType::F16 => sys::cudaDataType::CUDA_R_16F,
            DType::F8E4M3 => sys::cudaDataType::CUDA_R_8F_E4M3,
            _ => sys::cudaDataType::CUDA_R_16BF,
        };
        let a = Layout::new(matrix(weight), shape.input, shape.output, weight.stride()[0])?;
        let b = Layout::new(matrix(x), shape.input, shape.n, x.stride()[0])?;
        let c = Layout::new(matrix(y), shape.output, shape.n, y.stride()[0])?;
        let description = Description::new(epilogue, bias_at)?;
        if x.dtype() == DType::F8E4M3 {
            description.sum_fast()?;
        }
        if scales.is_some() {
            description.scale_rows(weight_scale, x_scale)?;
        }
        let call = |algorithm: &Algorithm| {
            let (alpha, beta) = (1f32, 0f32);
            let algorithm = sys::cublasLtMatmulAlgo_t { data: *algorithm };
            // SAFETY: layouts are those of the tensors, which are held until the product is in the stream.
            #[expect(unsafe_code, reason = "a call of the library")]
            unsafe {
                sys::cublasLtMatmul(
                    self.handle,
                    description.0,
                    (&raw const alpha).cast(),
                    weight_at as *const c_void,
                    a.0,
                    x_at as *const c_void,
                    b.0,
                    (&raw const beta).cast(),
                    y_at as *const c_void,
                    c.0,
                    y_at as *mut c_void,
                    c.0,
                    &raw const algorithm,
                    workspace as *mut c_void,
                    WORKSPACE,
                    stream.cu_stream().cast(),
                )
            }
            .result()
        };
        // One that was kept may be refused, by another version of the library under the same number.
        let kept = self.choices.get(shape);
        if kept.is_some_and(|kept| call(&kept).is_ok()) {
            return Ok(true);
        }
        let candidates = self.candidates(&description, [&a, &b, &c])?;
        let Some(fastest) = fastest(stream, &candidates, &call)? else {
            tracing::warn!("cuBLASLt has no algorithm for {shape:?} here; another way is taken, which is slower");
            self.without.insert(shape.clone());
            return Ok(false);
        };
        // The last run of the fastest need not have been the last run: the product is made again.
        call(&self.choices.note(shape.clone(), fastest, kept)).or_else(|_| call(&fastest)).map_err(candle_core::Error::wrap)?;
        Ok(true)
    }

    /// What the library thinks best, first first.
    fn candidates(&self, description: &Description, [a, b, c]: [&Layout; 3]) -> Result<Vec<Algorithm>> {
        let preference = Preference::new()?;
        let mut found = [sys::cublasLtMatmulHeuristicResult_t {
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspaceSize: 0,
            state: sys::cublasStatus_t::CUBLAS_STATUS_NOT_INITIALIZED,
            wavesCount: 0.0,
            reserved: [0; 4],
        }; CANDIDATES];
        let mut count = 0;
        // SAFETY: there is room for as many results as are asked for.
        #[expect(unsafe_code, reason = "a call of the library")]
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                description.0,
                a.0,
                b.0,
                c.0,
                c.0,
                preference.0,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        if refused(status) {
            return Ok(Vec::new());
        }
        status.result().map_err(candle_core::Error::wrap)?;
        let usable = |one: &&sys::cublasLtMatmulHeuristicResult_t| one.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        Ok(found[..count as usize].iter().filter(usable).map(|one| one.algo.data).collect())
    }
}

/// Whether the library has nothing for this product or this card, rather than that something went wrong.
fn refused(status: Status) -> bool {
    matches!(
        status,
        Status::CUBLAS_STATUS_NOT_SUPPORTED | Status::CUBLAS_STATUS_INVALID_VALUE | Status::CUBLAS_STATUS_ARCH_MISMATCH
    )
}

/// The algorithm whose fastest run is the fastest, if any is for this card. What fails for another reason (memory) is an error: which one
/// is chosen must not depend on it.
fn fastest(stream: &CudaStream, candidates: &[Algorithm], call: &Call<'_>) -> Result<Option<Algorithm>> {
    let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w();
    let (begin, end) = (event()?, event()?);
    let mut best: Option<(f32, Algorithm)> = None;
    for candidate in candidates {
        match call(candidate) {
            Err(CublasError(status)) if refused(status) => continue,
            done => done.map_err(candle_core::Error::wrap)?,
        }
        let mut shortest = f32::INFINITY;
        for _ in 0..RUNS {
            begin.record(stream).w()?;
            call(candidate).map_err(candle_core::Error::wrap)?;
            end.record(stream).w()?;
            end.synchronize().w()?;
            shortest = shortest.min(begin.elapsed_ms(&end).w()?);
        }
        if best.is_none_or(|(time, _)| shortest < time) {
            best = Some((shortest, *candidate));
        }
    }
    Ok(best.map(|(_, algorithm)| algorithm))
}

type Call<'a> = dyn Fn(&Algorithm) -> std::result::Result<(), CublasError> + 'a;

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(of: sys::cudaDataType, rows: usize, columns: usize, pitch: usize) -> Result<Self> {
        result::create_matrix_layout(of, rows as u64, columns as u64, pitch as i64).map(Self).map_err(candle_core::Error::wrap)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and given back once.
        #[expect(unsafe_code, reason = "a call of the library")]
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new(epilogue: sys::cublasLtEpilogue_t, bias: u64) -> Result<Self> {
        let (sum, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F);
        let new = Self(result::create_matmul_desc(sum, scale).map_err(candle_core::Error::wrap)?);
        new.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, &cublasOperation_t::CUBLAS_OP_T)?;
        new.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if bias != 0 {
            new.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        Ok(new)
    }

    /// Of products in e4m3, whose rounding is a hundred times coarser: without promoting sums to registers of f32 again and again, which
    /// takes Hopper and Ada a part of their speed. torchao's default, and diffusers' with it.
    fn sum_fast(&self) -> Result<()> {
        self.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &1i8)
    }

    /// A scale for each row of the weight and of x, which are the library's A and B.
    fn scale_rows(&self, weight: u64, x: u64) -> Result<()> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let mode = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode)?;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode)?;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &weight)?;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x)
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
        // SAFETY: the library copies as many bytes as the value has.
        #[expect(unsafe_code, reason = "a call of the library")]
        let set =
            unsafe { result::set_matmul_desc_attribute(self.0, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) };
        set.map_err(candle_core::Error::wrap)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and given back once.
        #[expect(unsafe_code, reason = "a call of the library")]
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let new = Self(result::create_matmul_pref().map_err(candle_core::Error::wrap)?);
        new.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)?;
        // Parts of a sum are added in f32, whichever algorithm is the fastest.
        new.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &SUM_IN_F32)?;
        for matrix in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            new.set(matrix, &ALIGNMENT)?;
        }
        Ok(new)
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulPreferenceAttributes_t, value: &T) -> Result<()> {
        // SAFETY: the library copies as many bytes as the value has.
        #[expect(unsafe_code, reason = "a call of the library")]
        let set =
            unsafe { result::set_matmul_pref_attribute(self.0, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) };
        set.map_err(candle_core::Error::wrap)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and given back once.
        #[expect(unsafe_code, reason = "a call of the library")]
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
