//! Memory for weights on the processor.

/// Smallest buffer, in bytes, for which large pages are asked for.
#[cfg(target_os = "linux")]
const LARGE: usize = 8 << 20;

/// A vector of `n` zeros whose memory is not touched before it is written, so that many cores can write it first.
///
/// Large ones get large pages where the system has them: with pages of 4 KB, asking for memory is most of the time of a copy.
#[must_use]
pub fn zeros<T: bytemuck::Zeroable>(n: usize) -> Vec<T> {
    let values = bytemuck::zeroed_vec(n);
    advise(&values);
    values
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "advice to the system about a range of memory")]
fn advise<T>(values: &[T]) {
    const PAGE: usize = 4096;
    let (start, bytes) = (values.as_ptr().cast::<u8>(), size_of_val(values));
    if bytes >= LARGE {
        let offset = start.align_offset(PAGE);
        // SAFETY: the range is inside the slice, from a page's start; the advice changes no content, and whether it is taken does
        // not matter.
        unsafe { libc::madvise(start.add(offset).cast_mut().cast(), bytes - offset, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise<T>(_values: &[T]) {}
