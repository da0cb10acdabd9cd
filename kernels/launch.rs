//! Where kernels of ours run, and what they are given.
//!
//! They take the place of candle's operations on CUDA once [`use_fused`] says so. In tests, [`emulated`] runs the very same launches
//! (names, grids, arguments) on the processor, with every access to memory checked.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Result, Tensor};

static FUSED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static EMULATED: Cell<bool> = const { Cell::new(false) };
    static LAUNCHES: Cell<usize> = const { Cell::new(0) };
}

/// Whether kernels of ours are used on CUDA. Off at first: a program turns them on where [`prove`](crate::prove) found them right.
pub fn use_fused(on: bool) {
    FUSED.store(on, Ordering::Relaxed);
}

/// What [`use_fused`] said last.
#[must_use]
pub fn fused() -> bool {
    FUSED.load(Ordering::Relaxed)
}

/// Runs `f` with the kernels for cards, emulated, in the place of this thread's operations on CPU tensors. For tests: it is thousands
/// of times slower.
#[cfg(feature = "emulator")]
pub fn emulated<R>(f: impl FnOnce() -> R) -> R {
    let before = EMULATED.replace(true);
    let result = f();
    EMULATED.set(before);
    result
}

/// Names these kernels, as they are compiled, among others.
#[must_use]
pub fn digest() -> String {
    #[cfg(feature = "cuda")]
    return cuda::digest();
    #[cfg(not(feature = "cuda"))]
    String::new()
}

/// Kernels of ours that this thread has launched: tests ask it whether a kernel ran or candle's operations did.
#[must_use]
pub fn launches() -> usize {
    LAUNCHES.get()
}

/// One more.
pub(crate) fn count() {
    LAUNCHES.set(LAUNCHES.get() + 1);
}

/// Whether kernels of ours run where x is.
pub(crate) fn applies(x: &Tensor) -> bool {
    applies_on(x.device())
}

/// The same of a device.
pub(crate) fn applies_on(device: &Device) -> bool {
    match device {
        Device::Cpu => EMULATED.get(),
        Device::Cuda(_) => fused(),
        Device::Metal(_) => false,
    }
}

/// Whether kernels of ours can run where x is: for what candle has no operation for.
pub(crate) fn reachable(x: &Tensor) -> bool {
    x.device().is_cuda() || applies(x)
}

/// Memory of the device, as a kernel's arguments name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Pointer(u64);

impl Pointer {
    pub(crate) const NULL: Self = Self(0);

    /// To memory that no tensor holds; the caller does.
    #[cfg(feature = "cuda")]
    pub(crate) fn to(at: *const u8) -> Self {
        Self(at as u64)
    }
}

/// One launch. `A` is `repr(C)` and equals the kernel's struct of arguments.
#[derive(Debug)]
#[cfg_attr(
    not(any(feature = "cuda", feature = "emulator")),
    expect(dead_code, reason = "this build has no place to run kernels")
)]
pub(crate) struct Launch<A> {
    /// Without the type of its values.
    pub(crate) kernel: &'static str,
    pub(crate) values: DType,
    /// Blocks.
    pub(crate) grid: [usize; 3],
    /// Of a block.
    pub(crate) threads: usize,
    /// Bytes of a block.
    pub(crate) shared: usize,
    pub(crate) arguments: A,
}

/// What kernels call values of this type; `None` if there are no kernels for it.
pub(crate) fn suffix(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("f32"),
        DType::F16 => Some("f16"),
        DType::BF16 => Some("bf16"),
        _ => None,
    }
}

/// Whether kernels can read x eight values at a time: its last dimension in one piece and everything at multiples of eight.
pub(crate) fn in_eights(x: &Tensor) -> bool {
    let eight = |n: usize| n.is_multiple_of(8);
    let Some((&1, outer)) = x.stride().split_last() else { return false };
    x.dims().last().is_some_and(|d| eight(*d))
        && eight(x.layout().start_offset())
        && x.dims().iter().zip(outer).all(|(n, stride)| *n == 1 || eight(*stride))
}

/// Threads of a block that keeps a row of `d` values in registers, 32 of them in each; `None` if a block has no room for it.
pub(crate) fn threads_of_a_row(d: usize) -> Option<usize> {
    (d <= 32 * 1024).then(|| d.div_ceil(32).next_multiple_of(32))
}

/// A new tensor with nothing in it yet: a kernel writes every value.
#[expect(unsafe_code, reason = "memory that nothing has written")]
pub(crate) fn output(shape: impl Into<candle_core::Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: every caller hands it to a kernel that writes all of it, which the tests look at with the memory poisoned.
    let new = unsafe { Tensor::empty(shape, dtype, device) }?;
    #[cfg(feature = "emulator")]
    emulator::poison(&new)?;
    Ok(new)
}

/// Launches a kernel. `make` is given where each of `inputs` and `outputs` begins, views' offsets included; outputs are in one piece.
pub(crate) fn launch<A: Copy, const I: usize, const O: usize>(
    inputs: [&Tensor; I],
    outputs: [&Tensor; O],
    make: impl FnOnce([Pointer; I], [Pointer; O]) -> Launch<A>,
) -> Result<()> {
    count();
    match outputs[0].device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::launch(device, &inputs, &outputs, make),
        #[cfg(feature = "emulator")]
        Device::Cpu => emulator::launch(&inputs, &outputs, make),
        other => {
            let _ = (inputs, make);
            candle_core::bail!("no kernels for {other:?}")
        }
    }
}

/// The pointers of all tensors, shared out to `make`.
#[cfg(any(feature = "cuda", feature = "emulator"))]
fn build<A, const I: usize, const O: usize>(
    pointers: &[u64],
    make: impl FnOnce([Pointer; I], [Pointer; O]) -> Launch<A>,
) -> Launch<A> {
    make(std::array::from_fn(|i| Pointer(pointers[i])), std::array::from_fn(|i| Pointer(pointers[I + i])))
}

#[cfg(feature = "cuda")]
pub(crate) use cuda::with_addresses;

#[cfg(feature = "cuda")]
mod cuda {
    use std::collections::HashMap;
    use std::sync::{Arc, Mutex, PoisonError};

    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::{
        CudaContext, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg, SyncOnDrop, sys,
    };
    use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
    use candle_core::{CudaDevice, CudaStorage, DType, Result, Storage, Tensor, bail};
    use half::{bf16, f16};

    use super::{Launch, Pointer, build, suffix};

    const KERNELS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

    pub(super) fn digest() -> String {
        let mut hasher = std::hash::DefaultHasher::new();
        std::hash::Hasher::write(&mut hasher, KERNELS);
        format!("{:016x}", std::hash::Hasher::finish(&hasher))
    }

    /// What a block may have of shared memory without asking.
    const SHARED: usize = 48 << 10;

    #[repr(transparent)]
    struct Arguments<A>(A);

    // SAFETY: every struct of arguments is `repr(C)` of numbers and pointers, as the kernel's is.
    #[expect(unsafe_code, reason = "see above")]
    unsafe impl<A: Copy> DeviceRepr for Arguments<A> {}

    pub(super) fn launch<A: Copy, const I: usize, const O: usize>(
        device: &CudaDevice,
        inputs: &[&Tensor; I],
        outputs: &[&Tensor; O],
        make: impl FnOnce([Pointer; I], [Pointer; O]) -> Launch<A>,
    ) -> Result<()> {
        let tensors: Vec<_> = inputs.iter().chain(outputs).map(|x| Some(*x)).collect();
        with_addresses(device, &tensors, |pointers| start(&device.cuda_stream(), &build(pointers, make)))
    }

    fn start<A: Copy>(stream: &Arc<CudaStream>, launch: &Launch<A>) -> Result<()> {
        let &Launch { kernel, values, grid, threads, shared, arguments } = launch;
        let Some(suffix) = suffix(values) else { bail!("no kernel for {values:?}") };
        let function = module(stream.context())?.load_function(&format!("{kernel}_{suffix}")).w()?;
        if shared > SHARED {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, shared as i32).w()?;
        }
        let [x, y, z] = grid.map(|n| n as u32);
        let config = LaunchConfig { grid_dim: (x, y, z), block_dim: (threads as u32, 1, 1), shared_mem_bytes: shared as u32 };
        let arguments = Arguments(arguments);
        let mut builder = stream.launch_builder(&function);
        builder.arg(&arguments);
        // SAFETY: the arguments are the kernel's, and the tensors that they point into are held by the caller.
        #[expect(unsafe_code, reason = "a launch is as safe as its arguments")]
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }

    /// The kernels, loaded once for each card.
    fn module(context: &Arc<CudaContext>) -> Result<Arc<CudaModule>> {
        static MODULES: Mutex<Option<HashMap<usize, Arc<CudaModule>>>> = Mutex::new(None);
        let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
        let modules = modules.get_or_insert_default();
        if let Some(module) = modules.get(&context.ordinal()) {
            return Ok(module.clone());
        }
        let module = context.load_module(Ptx::from_binary(KERNELS.to_vec())).w()?;
        modules.insert(context.ordinal(), module.clone());
        Ok(module)
    }

    /// Calls `call` with where each tensor begins on this card, its view's offset included (0 for none). The tensors are held until it
    /// returns: until then what it does must be in the stream.
    pub(crate) fn with_addresses<R>(
        device: &CudaDevice,
        tensors: &[Option<&Tensor>],
        call: impl FnOnce(&[u64]) -> Result<R>,
    ) -> Result<R> {
        let stream = device.cuda_stream();
        let held: Vec<_> = tensors.iter().map(|x| x.map(|x| (x.storage_and_layout().0, x.layout(), x.dtype()))).collect();
        let mut pointers = Vec::new();
        let mut used = Vec::new();
        for one in &held {
            let Some((storage, layout, dtype)) = one else {
                pointers.push(0);
                continue;
            };
            let Storage::Cuda(storage) = &**storage else { bail!("a kernel for CUDA was given a tensor on another device") };
            let (begin, record) = address(storage, &stream)?;
            pointers.push(begin + (layout.start_offset() * dtype.size_in_bytes()) as u64);
            used.push(record);
        }
        call(&pointers)
    }

    /// Where a storage begins, and what must be kept until the work with it is in the stream.
    fn address<'a>(storage: &'a CudaStorage, stream: &'a CudaStream) -> Result<(u64, SyncOnDrop<'a>)> {
        fn of<'a, T>(slice: &'a CudaSlice<T>, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
            slice.device_ptr(stream)
        }
        Ok(match candle_core::backend::BackendStorage::dtype(storage) {
            DType::F32 => of(storage.as_cuda_slice::<f32>()?, stream),
            DType::F16 => of(storage.as_cuda_slice::<f16>()?, stream),
            DType::BF16 => of(storage.as_cuda_slice::<bf16>()?, stream),
            DType::F8E4M3 => of(storage.as_cuda_slice::<float8::F8E4M3>()?, stream),
            DType::U8 => of(storage.as_cuda_slice::<u8>()?, stream),
            other => bail!("no kernel for {other:?}"),
        })
    }
}

#[cfg(feature = "emulator")]
mod emulator {
    use std::ffi::{CStr, CString, c_char, c_int, c_void};
    use std::sync::atomic::{AtomicU32, Ordering};

    use candle_core::{CpuStorage, Result, Storage, Tensor, bail};

    use super::{Launch, Pointer, build, suffix};

    #[expect(unsafe_code, reason = "the emulator is C++")]
    unsafe extern "C" {
        fn emulator_launch(
            name: *const c_char,
            grid: *const u32,
            threads: u32,
            shared: u32,
            arguments: *const c_void,
            buffers: *const u64,
            count: usize,
            seed: u32,
            message: *mut c_char,
        ) -> c_int;
    }

    /// NaN everywhere, so that what a kernel does not write shows.
    pub(super) fn poison(x: &Tensor) -> Result<()> {
        let (storage, _) = x.storage_and_layout();
        if let Storage::Cpu(storage) = &*storage {
            let (begin, bytes, _) = memory(storage)?;
            // SAFETY: a new tensor's own memory, which nobody else reads or writes yet.
            #[expect(unsafe_code, reason = "memory that nothing has written")]
            unsafe {
                std::ptr::write_bytes(begin as *mut u8, 0xff, bytes);
            }
        }
        Ok(())
    }

    /// Where the values begin, how many bytes there are, and of each value.
    fn memory(storage: &CpuStorage) -> Result<(u64, usize, usize)> {
        Ok(match storage {
            CpuStorage::F32(values) => (values.as_ptr() as u64, size_of_val(&values[..]), 4),
            CpuStorage::F16(values) => (values.as_ptr() as u64, size_of_val(&values[..]), 2),
            CpuStorage::BF16(values) => (values.as_ptr() as u64, size_of_val(&values[..]), 2),
            CpuStorage::F8E4M3(values) => (values.as_ptr() as u64, size_of_val(&values[..]), 1),
            CpuStorage::U8(values) => (values.as_ptr() as u64, size_of_val(&values[..]), 1),
            other => bail!("no kernel for {:?}", candle_core::backend::BackendStorage::dtype(other)),
        })
    }

    /// The order of threads differs from launch to launch.
    static SEED: AtomicU32 = AtomicU32::new(1);

    pub(super) fn launch<A: Copy, const I: usize, const O: usize>(
        inputs: &[&Tensor; I],
        outputs: &[&Tensor; O],
        make: impl FnOnce([Pointer; I], [Pointer; O]) -> Launch<A>,
    ) -> Result<()> {
        let held: Vec<_> = inputs.iter().chain(outputs).map(|x| (x.storage_and_layout().0, x.layout())).collect();
        let (mut pointers, mut buffers) = (Vec::new(), Vec::new());
        for (i, (storage, layout)) in held.iter().enumerate() {
            let Storage::Cpu(storage) = &**storage else { bail!("the emulator was given a tensor on another device") };
            let (begin, bytes, each) = memory(storage)?;
            let writable = i >= I;
            pointers.push(begin + (layout.start_offset() * each) as u64);
            buffers.extend([begin, begin + bytes as u64, u64::from(writable)]);
        }
        let Launch { kernel, values, grid, threads, shared, arguments } = build(&pointers, make);
        let Some(suffix) = suffix(values) else { bail!("no kernel for {values:?}") };
        let name = CString::new(format!("{kernel}_{suffix}")).map_err(candle_core::Error::wrap)?;
        let (grid, mut message) = (grid.map(|n| n as u32), [0 as c_char; 256]);
        // SAFETY: the arguments are the kernel's; it is kept to the buffers by the emulator's checks.
        #[expect(unsafe_code, reason = "the emulator is C++")]
        let failed = unsafe {
            emulator_launch(
                name.as_ptr(),
                grid.as_ptr(),
                threads as u32,
                shared as u32,
                (&raw const arguments).cast(),
                buffers.as_ptr(),
                buffers.len() / 3,
                SEED.fetch_add(1, Ordering::Relaxed),
                message.as_mut_ptr(),
            )
        };
        // SAFETY: the emulator ends its message with a zero.
        #[expect(unsafe_code, reason = "the emulator is C++")]
        let message = unsafe { CStr::from_ptr(message.as_ptr()) };
        if failed != 0 {
            bail!("{name:?}: {}", message.to_string_lossy());
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Copy)]
    #[repr(C)]
    struct Faulty {
        x: Pointer,
        y: Pointer,
        mistake: u32,
    }

    /// Runs cuda/faulty.cu: what it writes, or what the emulator says.
    fn run(mistake: u32) -> std::result::Result<Vec<f32>, String> {
        let n = 128;
        let launched = || {
            let x = Tensor::arange(0f32, n as f32, &Device::Cpu)?;
            let y = output(n, DType::F32, &Device::Cpu)?;
            launch([&x], [&y], |[x], [y]| {
                let arguments = Faulty { x, y, mistake };
                Launch { kernel: "faulty", values: DType::F32, grid: [1; 3], threads: n, shared: 4 * n, arguments }
            })?;
            y.to_vec1()
        };
        launched().map_err(|error: candle_core::Error| error.to_string())
    }

    #[test]
    fn the_emulator_finds_mistakes() {
        let right: Vec<f32> = (0..128).map(|i| ((i + 32) % 128) as f32).collect();
        for _ in 0..20 {
            assert_eq!(run(0).as_ref(), Ok(&right));
        }
        for (mistake, said) in [
            (1, "a write of 4 bytes outside"),
            (2, "a write of 4 bytes outside"),
            (3, "not aligned"),
            (4, "not all threads reach a barrier"),
            (5, "not all threads reach a barrier"),
            (6, "beyond the shared memory"),
        ] {
            let error = run(mistake).unwrap_err();
            assert!(error.contains(said), "{mistake}: {error}");
        }
        for mistake in [7, 8] {
            assert!(run(mistake).unwrap().iter().any(|value| value.is_nan()), "{mistake}");
        }
        // Races depend on the order of threads, which is another one in each launch.
        for mistake in [9, 10, 11] {
            let found = (0..20).filter(|_| run(mistake).unwrap().iter().zip(&right).any(|(got, want)| got != want)).count();
            assert!(found >= 5, "mistake {mistake} was found in {found} of 20 launches");
        }
    }
}
