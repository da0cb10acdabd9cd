//! From main memory to a card.
//!
//! What a program has in its memory a driver copies by itself first, on one core, before a card can read it. With our kernels on
//! ([`crate::use_fused`]) all cores copy it, a piece at a time, into page-locked buffers, which the card reads on a stream of its own: beside
//! its work, and beside the copying of the next piece. Without them, and on other devices, it is left to candle.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Result, Tensor, bail};
use rayon::prelude::*;

use crate::memory::zeros;

/// Places on a card for tensors that do not stay there, see [`visit`].
pub const PLACES: usize = 2;

/// What one core copies at a time.
const PIECE: usize = 1 << 20;

/// A tensor of these bytes, one part after another, little-endian as files have them, on `device`. Errors if they are not as many as
/// `shape` has.
pub fn upload(parts: &[&[u8]], dtype: DType, shape: &[usize], device: &Device) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(card) = cuda::link(device, dtype) {
        return cuda::upload(card, parts, dtype, shape);
    }
    from_parts(parts, dtype, shape, device)
}

/// GGUF's blocks of these bytes, one part after another, as a tensor of `shape` on `device`. Errors if they are not as many as it has.
pub fn upload_blocks(parts: &[&[u8]], kind: GgmlDType, shape: &[usize], device: &Device) -> Result<QTensor> {
    let (bytes, n) = (parts.iter().map(|part| part.len()).sum::<usize>(), shape.iter().product::<usize>());
    if bytes * kind.block_size() != n * kind.type_size() {
        bail!("{bytes} bytes for {shape:?} of {kind:?}");
    }
    #[cfg(feature = "cuda")]
    if let Some(card) = cuda::link(device, DType::U8) {
        return cuda::upload_blocks(card, parts, kind, shape);
    }
    blocks_from_parts(parts, kind, shape, device)
}

fn blocks_from_parts(parts: &[&[u8]], kind: GgmlDType, shape: &[usize], device: &Device) -> Result<QTensor> {
    let bytes = match parts {
        [one] => Cow::Borrowed(*one),
        parts => Cow::Owned(parts.concat()),
    };
    QTensor::new(QStorage::from_data(bytes, device, kind)?, shape)
}

fn from_parts(parts: &[&[u8]], dtype: DType, shape: &[usize], device: &Device) -> Result<Tensor> {
    match parts {
        [bytes] => Tensor::from_raw_buffer(bytes, dtype, shape, device),
        parts => {
            let mut all = zeros(parts.iter().map(|part| part.len()).sum());
            let mut rest = all.as_mut_slice();
            for part in parts {
                let (to, after) = rest.split_at_mut(part.len());
                copy(part, to);
                rest = after;
            }
            Tensor::from_raw_buffer(&all, dtype, shape, device)
        }
    }
}

/// By all cores; both are of the same length.
fn copy(from: &[u8], to: &mut [u8]) {
    to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
}

/// x on `device`.
pub fn to_device(x: &Tensor, device: &Device) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let (true, Some(card)) = (x.device().is_cpu(), cuda::link(device, x.dtype())) {
        return cuda::with_bytes(x, |bytes| cuda::upload(card, &[bytes], x.dtype(), x.dims()));
    }
    x.to_device(device)
}

/// Calls `work` with x on `device`, where it stays no longer than that: for weights that wait in main memory.
///
/// On a card there are [`PLACES`] for them, in turns: while one is worked with, the next is on its way to the other. So `work` must not
/// keep what it is given, nor a view of it.
pub fn visit<R>(x: &Tensor, device: &Device, work: impl FnOnce(Tensor) -> Result<R>) -> Result<R> {
    #[cfg(feature = "cuda")]
    if let (true, Some(card)) = (x.device().is_cpu(), cuda::link(device, x.dtype())) {
        return cuda::with_bytes(x, |bytes| cuda::visit(card, bytes, x.dtype(), x.dims(), work));
    }
    waited_for(work(to_device(x, device)?), device)
}

/// As [`visit`], of a tensor of these bytes; see [`upload`].
pub fn visit_bytes<R>(
    bytes: &[u8],
    dtype: DType,
    shape: &[usize],
    device: &Device,
    work: impl FnOnce(Tensor) -> Result<R>,
) -> Result<R> {
    #[cfg(feature = "cuda")]
    if let Some(card) = cuda::link(device, dtype) {
        return cuda::visit(card, bytes, dtype, shape, work);
    }
    waited_for(work(upload(&[bytes], dtype, shape, device)?), device)
}

/// On Metal nothing that was sent is given back before the work with it is waited for.
fn waited_for<R>(done: Result<R>, device: &Device) -> Result<R> {
    if device.is_metal() {
        device.synchronize()?;
    }
    done
}

/// Gives the memory of the places for [`visit`] back.
pub fn forget_places(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(card) = device {
        cuda::forget_places(card);
    }
    #[cfg(not(feature = "cuda"))]
    let _ = device;
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::collections::{HashMap, VecDeque};
    use std::sync::{Arc, Mutex, PoisonError};

    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result};
    use candle_core::quantized::cuda::QCudaStorage;
    use candle_core::quantized::{GgmlDType, QStorage, QTensor};
    use candle_core::{CpuStorage, CudaDevice, DType, Device, Result, Storage, Tensor, bail};

    use super::PLACES;
    use crate::launch::{fused, output, suffix, with_addresses};

    type Driven<T> = std::result::Result<T, DriverError>;

    /// Bytes of a page-locked buffer, and how many there are: the card reads one while the next is filled.
    const BUFFER: usize = 16 << 20;
    const BUFFERS: usize = 4;

    /// Tensors of less than this are left to candle: starting costs more than copying.
    const LEAST: usize = 1 << 20;

    /// The card, if tensors of this type are sent to it from here.
    pub(super) fn link(device: &Device, dtype: DType) -> Option<&CudaDevice> {
        match device {
            Device::Cuda(card) if fused() && (suffix(dtype).is_some() || matches!(dtype, DType::F8E4M3 | DType::U8)) => {
                // Where there is no page-locked memory, it is left to candle, too.
                with_link(card, |link| Ok(link.is_some())).is_ok_and(|there| there).then_some(card)
            }
            _ => None,
        }
    }

    pub(super) fn forget_places(card: &CudaDevice) {
        let _ = with_link(card, |link| {
            if let Some(link) = link {
                link.places.clear();
            }
            Ok(())
        });
    }

    /// The way to one card.
    struct Link {
        stream: Arc<CudaStream>,
        /// The buffer that was filled longest ago comes first.
        buffers: VecDeque<Buffer>,
        places: VecDeque<Place>,
    }

    /// Page-locked memory, and until when the card reads from it.
    struct Buffer {
        memory: *mut u8,
        read: CudaEvent,
    }

    impl Drop for Buffer {
        fn drop(&mut self) {
            // SAFETY: it is the driver's memory, and goes with the last buffer of a link that could not be made.
            #[expect(unsafe_code, reason = "a call of the driver")]
            let _ = unsafe { result::free_host(self.memory.cast()) };
        }
    }

    // SAFETY: the memory is this buffer's alone, and any thread may use it.
    #[expect(unsafe_code, reason = "see above")]
    unsafe impl Send for Buffer {}

    /// Memory of the card, one tensor of one dimension, and until when something is computed with what is there.
    struct Place {
        memory: Tensor,
        used: CudaEvent,
    }

    impl Link {
        fn new(context: &Arc<CudaContext>) -> Driven<Self> {
            context.bind_to_thread()?;
            let buffer = || {
                let read = context.new_event(None)?;
                // SAFETY: it is written before it is read.
                #[expect(unsafe_code, reason = "a call of the driver")]
                let memory = unsafe { result::malloc_host(BUFFER, 0) }?;
                Ok(Buffer { memory: memory.cast(), read })
            };
            let buffers = (0..BUFFERS).map(|_| buffer()).collect::<Driven<_>>()?;
            Ok(Self { stream: context.new_stream()?, buffers, places: VecDeque::new() })
        }

        /// Sends `parts`, one after another, to `to` on the card, once it has come to `ready`; the event is when they are all there.
        fn send(&mut self, parts: &[&[u8]], mut to: u64, ready: &CudaEvent) -> Driven<CudaEvent> {
            self.stream.wait(ready)?;
            for part in parts.iter().flat_map(|part| part.chunks(BUFFER)) {
                self.buffers.rotate_left(1);
                let Buffer { memory, read } = &self.buffers[BUFFERS - 1];
                read.synchronize()?;
                // SAFETY: the buffer is this long, and the card has read what was in it.
                #[expect(unsafe_code, reason = "memory of the driver's")]
                let buffer = unsafe { std::slice::from_raw_parts_mut(*memory, part.len()) };
                super::copy(part, buffer);
                // SAFETY: the destination is as long as all parts, and the buffer stays as it is until the card has read it.
                #[expect(unsafe_code, reason = "a call of the driver")]
                unsafe { result::memcpy_htod_async(to, buffer, self.stream.cu_stream()) }?;
                read.record(&self.stream)?;
                to += part.len() as u64;
            }
            self.stream.record_event(None)
        }

        /// A place for so many values: one that was used before, or a new one where those are too small, of another type, or of a model
        /// that was there before.
        fn place(&mut self, n: usize, dtype: DType, card: &CudaDevice) -> Result<Place> {
            let device = Device::Cuda(card.clone());
            let known = if self.places.len() < PLACES { None } else { self.places.pop_front() };
            let fits = |place: &Place| {
                let Place { memory, .. } = place;
                memory.dtype() == dtype && memory.elem_count() >= n && memory.device().same_device(&device)
            };
            // What does not fit goes before the new one comes.
            if let Some(place) = known.filter(fits) {
                return Ok(place);
            }
            let memory = output(n, dtype, &device)?;
            Ok(Place { memory, used: card.cuda_stream().record_event(None).w()? })
        }
    }

    /// Calls `f` with the way to this card, or nothing if it could not be made.
    fn with_link<R>(card: &CudaDevice, f: impl FnOnce(Option<&mut Link>) -> Result<R>) -> Result<R> {
        static LINKS: Mutex<Option<HashMap<usize, Option<Link>>>> = Mutex::new(None);
        let context = card.cuda_stream().context().clone();
        let mut links = LINKS.lock().unwrap_or_else(PoisonError::into_inner);
        let open = || {
            let slower =
                |error| tracing::warn!(%error, "no page-locked memory: weights are sent from where they are, which is slower");
            Link::new(&context).map_err(slower).ok()
        };
        f(links.get_or_insert_default().entry(context.ordinal()).or_insert_with(open).as_mut())
    }

    /// The same where [`link`] said that there is one.
    fn with_known_link<R>(card: &CudaDevice, f: impl FnOnce(&mut Link) -> Result<R>) -> Result<R> {
        with_link(card, |link| match link {
            Some(link) => f(link),
            None => bail!("no page-locked memory"),
        })
    }

    /// Sends `parts` to `to` on the card; what it does after that waits for them.
    fn send(link: &mut Link, card: &CudaDevice, parts: &[&[u8]], to: u64, ready: &CudaEvent) -> Result<()> {
        let arrived = link.send(parts, to, ready).and_then(|arrived| card.cuda_stream().wait(&arrived));
        if arrived.is_err() {
            // What is under way still reads and writes memory that others are about to get.
            let _ = link.stream.synchronize();
        }
        arrived.w()
    }

    pub(super) fn upload(card: &CudaDevice, parts: &[&[u8]], dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let device = Device::Cuda(card.clone());
        let bytes = parts.iter().map(|part| part.len()).sum();
        values(bytes, dtype, shape)?;
        if bytes < LEAST {
            return super::from_parts(parts, dtype, shape, &device);
        }
        let tensor = output(shape, dtype, &device)?;
        // Its memory may have been another tensor's, which the card still works with.
        let ready = card.cuda_stream().record_event(None).w()?;
        with_known_link(card, |link| with_addresses(card, &[Some(&tensor)], |at| send(link, card, parts, at[0], &ready)))?;
        Ok(tensor)
    }

    pub(super) fn upload_blocks(card: &CudaDevice, parts: &[&[u8]], kind: GgmlDType, shape: &[usize]) -> Result<QTensor> {
        if parts.iter().map(|part| part.len()).sum::<usize>() < LEAST {
            return super::blocks_from_parts(parts, kind, shape, &Device::Cuda(card.clone()));
        }
        let blocks = QTensor::new(QStorage::Cuda(QCudaStorage::zeros(card, shape.iter().product(), kind)?), shape)?;
        let stream = card.cuda_stream();
        // Once the zeros are there, which candle's kernels want behind the blocks.
        let ready = stream.record_event(None).w()?;
        let (at, used) = blocks.device_ptr_with_guard(&stream)?;
        with_known_link(card, |link| send(link, card, parts, at as u64, &ready))?;
        drop(used);
        Ok(blocks)
    }

    pub(super) fn visit<R>(
        card: &CudaDevice,
        bytes: &[u8],
        dtype: DType,
        shape: &[usize],
        work: impl FnOnce(Tensor) -> Result<R>,
    ) -> Result<R> {
        let stream = card.cuda_stream();
        let n = values(bytes.len(), dtype, shape)?;
        let place = with_known_link(card, |link| {
            let place = link.place(n, dtype, card)?;
            with_addresses(card, &[Some(&place.memory)], |at| send(link, card, &[bytes], at[0], &place.used))?;
            Ok(place)
        })?;
        let done = place.memory.narrow(0, 0, n).and_then(|x| work(x.reshape(shape)?));
        // Whatever became of it, some of it may be in the stream.
        place.used.record(&stream).w()?;
        with_known_link(card, |link| {
            if link.places.len() < PLACES {
                link.places.push_back(place);
            }
            Ok(())
        })?;
        done
    }

    /// How many values of `dtype` so many bytes are. An error unless a tensor of `shape` has as many.
    fn values(bytes: usize, dtype: DType, shape: &[usize]) -> Result<usize> {
        let n = shape.iter().product();
        if bytes != n * dtype.size_in_bytes() {
            bail!("{bytes} bytes for {shape:?} of {dtype:?}");
        }
        Ok(n)
    }

    /// Calls `f` with the bytes of a tensor in main memory.
    pub(super) fn with_bytes<R>(x: &Tensor, f: impl FnOnce(&[u8]) -> Result<R>) -> Result<R> {
        fn bytes<T: bytemuck::NoUninit>(values: &[T], (begin, end): (usize, usize)) -> &[u8] {
            bytemuck::cast_slice(&values[begin..end])
        }
        let x = x.contiguous()?;
        let (storage, layout) = x.storage_and_layout();
        let (Storage::Cpu(storage), Some(range)) = (&*storage, layout.contiguous_offsets()) else {
            bail!("a tensor that is not in one piece in main memory");
        };
        match storage {
            CpuStorage::F32(values) => f(bytes(values, range)),
            CpuStorage::F16(values) => f(bytes(values, range)),
            CpuStorage::BF16(values) => f(bytes(values, range)),
            CpuStorage::F8E4M3(values) => f(bytes(values, range)),
            CpuStorage::U8(values) => f(bytes(values, range)),
            other => bail!("{:?} is not sent", candle_core::backend::BackendStorage::dtype(other)),
        }
    }
}
