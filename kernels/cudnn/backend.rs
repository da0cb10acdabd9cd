//! cuDNN's library, opened at run time, and what its backend interface consists of: descriptors, which are made, given attributes, and
//! finalised.

use std::error::Error as _;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::ptr::{null_mut, without_provenance_mut};

use super::codes::kind;

type Raw = *mut c_void;
type Status = c_int;

/// What went wrong, in words.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    status: Status,
    said: String,
}

impl Failure {
    /// Whether it may be another time, with memory to spare: the library could not allocate or load something, or work on the card failed.
    pub(super) fn is_of_the_card(&self) -> bool {
        // CUDNN_STATUS_INTERNAL_ERROR_..._ALLOCATION_FAILED and CUDNN_STATUS_EXECUTION_FAILED_...
        matches!(self.status, 4003 | 4004 | 5000..6000)
    }

    /// The same, about `what`.
    #[cfg(feature = "cuda")]
    pub(super) fn about(self, what: &str) -> Self {
        Self { said: format!("{what}: {}", self.said), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.said)
    }
}

/// Of ours, not of the library's.
impl From<String> for Failure {
    fn from(said: String) -> Self {
        Self { status: 0, said }
    }
}

/// The functions of cuDNN that are used. It is never closed.
#[derive(Debug)]
pub(super) struct Library {
    /// 92800 is 9.28.0.
    pub(super) version: usize,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    last_error: unsafe extern "C" fn(*mut c_char, usize),
    create: unsafe extern "C" fn(*mut Raw) -> Status,
    destroy: unsafe extern "C" fn(Raw) -> Status,
    set_stream: unsafe extern "C" fn(Raw, Raw) -> Status,
    create_descriptor: unsafe extern "C" fn(c_int, *mut Raw) -> Status,
    destroy_descriptor: unsafe extern "C" fn(Raw) -> Status,
    set_attribute: unsafe extern "C" fn(Raw, c_int, c_int, i64, *const c_void) -> Status,
    get_attribute: unsafe extern "C" fn(Raw, c_int, c_int, i64, *mut i64, *mut c_void) -> Status,
    finalize: unsafe extern "C" fn(Raw) -> Status,
    execute: unsafe extern "C" fn(Raw, Raw, Raw) -> Status,
}

impl Library {
    /// Opens the first of these files that is there; the error says what is missing.
    pub(super) fn open(files: &[&str]) -> Result<&'static Self, String> {
        let mut why = String::from("no file to open");
        for file in files {
            // SAFETY: the files are cuDNN's, whose initialisation asks for nothing.
            #[expect(unsafe_code, reason = "a library is opened")]
            match unsafe { libloading::Library::new(*file) } {
                Ok(opened) => return Self::of(opened).map_err(|e| format!("{file}: {e}")),
                Err(e) => why = in_full(&e),
            }
        }
        Err(why)
    }

    fn of(opened: libloading::Library) -> Result<&'static Self, String> {
        // Plans and handles point into the library until the process ends.
        let opened: &'static libloading::Library = Box::leak(Box::new(opened));
        /// # Safety
        /// `F` is the function's type.
        #[expect(unsafe_code, reason = "see above")]
        unsafe fn function<F: Copy>(of: &libloading::Library, name: &CStr) -> Result<F, String> {
            // SAFETY: the caller's.
            unsafe { of.get::<F>(name) }.map(|f| *f).map_err(|e| in_full(&e))
        }
        // SAFETY: the types are those of cudnn_graph.h, which are the same in every 9.x.
        #[expect(unsafe_code, reason = "functions of a library")]
        unsafe {
            let version: unsafe extern "C" fn() -> usize = function(opened, c"cudnnGetVersion")?;
            let version = version();
            if !usable(version) {
                return Err(format!("{} is not a cuDNN 9 that computes attention as it should", dotted(version)));
            }
            Ok(Box::leak(Box::new(Self {
                version,
                error_string: function(opened, c"cudnnGetErrorString")?,
                last_error: function(opened, c"cudnnGetLastErrorString")?,
                create: function(opened, c"cudnnCreate")?,
                destroy: function(opened, c"cudnnDestroy")?,
                set_stream: function(opened, c"cudnnSetStream")?,
                create_descriptor: function(opened, c"cudnnBackendCreateDescriptor")?,
                destroy_descriptor: function(opened, c"cudnnBackendDestroyDescriptor")?,
                set_attribute: function(opened, c"cudnnBackendSetAttribute")?,
                get_attribute: function(opened, c"cudnnBackendGetAttribute")?,
                finalize: function(opened, c"cudnnBackendFinalize")?,
                execute: function(opened, c"cudnnBackendExecute")?,
            })))
        }
    }

    /// The error of a call, in cuDNN's words.
    fn check(&self, status: Status, what: &str) -> Result<(), Failure> {
        if status == 0 {
            return Ok(());
        }
        let mut detail = [0 as c_char; 512];
        // SAFETY: names are constants of the library; it ends the detail with a zero within the space it is told of.
        #[expect(unsafe_code, reason = "calls of the library")]
        let (name, detail) = unsafe {
            (self.last_error)(detail.as_mut_ptr(), detail.len());
            (CStr::from_ptr((self.error_string)(status)), CStr::from_ptr(detail.as_ptr()))
        };
        Err(Failure { status, said: format!("{what}: {} ({})", name.to_string_lossy(), detail.to_string_lossy()) })
    }
}

/// With what the dynamic linker says.
fn in_full(error: &libloading::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

/// 9.10.0 and 9.10.1 compute wrong attention; before 9 and after it, numbers and functions may differ.
fn usable(version: usize) -> bool {
    (90000..100_000).contains(&version) && !matches!(version, 91000 | 91001)
}

/// 92800 as 9.28.0.
pub(super) fn dotted(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// What cuDNN knows a card by: the one that is current on this thread when it is made.
#[derive(Debug)]
pub(super) struct Handle {
    raw: Raw,
    /// The stream that work goes into.
    stream: Raw,
    library: &'static Library,
}

// SAFETY: a handle may be used from any thread, by one at a time: no method takes `&self` but those that only read it.
#[expect(unsafe_code, reason = "see above")]
unsafe impl Send for Handle {}

impl Handle {
    pub(super) fn new(library: &'static Library) -> Result<Self, Failure> {
        let mut raw = null_mut();
        // SAFETY: it writes one pointer.
        #[expect(unsafe_code, reason = "a call of the library")]
        let status = unsafe { (library.create)(&raw mut raw) };
        library.check(status, "open the card")?;
        Ok(Self { raw, stream: null_mut(), library })
    }

    pub(super) fn use_stream(&mut self, stream: Raw) -> Result<(), Failure> {
        if stream != self.stream {
            // SAFETY: a stream of this card; candle's lives as long as the device.
            #[expect(unsafe_code, reason = "a call of the library")]
            let status = unsafe { (self.library.set_stream)(self.raw, stream) };
            self.library.check(status, "use the stream")?;
            self.stream = stream;
        }
        Ok(())
    }

    /// # Safety
    /// The pack's pointers are those of the plan's tensors, valid until the work is in the stream.
    #[expect(unsafe_code, reason = "see above")]
    pub(super) unsafe fn execute(&mut self, plan: &Descriptor, pack: &Descriptor) -> Result<(), Failure> {
        // SAFETY: both are finalised, and the rest is the caller's.
        let status = unsafe { (self.library.execute)(self.raw, plan.raw, pack.raw) };
        self.library.check(status, "run the plan")
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and given back once.
        #[expect(unsafe_code, reason = "a call of the library")]
        let _ = unsafe { (self.library.destroy)(self.raw) };
    }
}

/// Values of an attribute.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value<'a> {
    /// A number of one of C's enums, after the `kind` of the enum.
    Choice(i32, i32),
    Flag(bool),
    Integers(&'a [i64]),
    Float(f32),
    Descriptors(&'a [&'a Descriptor]),
    Handle(&'a Handle),
    /// Addresses, of the card's memory or of the processor's.
    Pointers(&'a [u64]),
    #[cfg(test)]
    Text(&'a str),
}

#[derive(Debug)]
pub(super) struct Descriptor {
    raw: Raw,
    kind: i32,
    library: &'static Library,
}

// SAFETY: a descriptor is memory of the library's, bound to no thread.
#[expect(unsafe_code, reason = "see above")]
unsafe impl Send for Descriptor {}

impl Descriptor {
    /// One with these attributes, in this order, finalised. The error says what cuDNN does not like.
    pub(super) fn new(library: &'static Library, kind: i32, attributes: &[(i32, Value<'_>)]) -> Result<Self, Failure> {
        let new = Self::empty(library, kind)?;
        for (attribute, value) in attributes {
            new.set(*attribute, *value)?;
        }
        // SAFETY: a descriptor of the library's.
        #[expect(unsafe_code, reason = "a call of the library")]
        let status = unsafe { (library.finalize)(new.raw) };
        library.check(status, &format!("finalise descriptor {kind}"))?;
        Ok(new)
    }

    fn empty(library: &'static Library, kind: i32) -> Result<Self, Failure> {
        let mut raw = null_mut();
        // SAFETY: it writes one pointer.
        #[expect(unsafe_code, reason = "a call of the library")]
        let status = unsafe { (library.create_descriptor)(kind, &raw mut raw) };
        library.check(status, &format!("make descriptor {kind}"))?;
        Ok(Self { raw, kind, library })
    }

    fn set(&self, attribute: i32, value: Value<'_>) -> Result<(), Failure> {
        let pointers: Vec<Raw> = match value {
            Value::Descriptors(parts) => parts.iter().map(|part| part.raw).collect(),
            Value::Handle(handle) => vec![handle.raw],
            Value::Pointers(addresses) => addresses.iter().map(|at| without_provenance_mut(*at as usize)).collect(),
            _ => Vec::new(),
        };
        let (kind, count, at): (i32, usize, *const c_void) = match &value {
            Value::Choice(kind, number) => (*kind, 1, std::ptr::from_ref(number).cast()),
            Value::Flag(flag) => (kind::BOOLEAN, 1, std::ptr::from_ref(flag).cast()),
            Value::Integers(integers) => (kind::INT64, integers.len(), integers.as_ptr().cast()),
            Value::Float(number) => (kind::FLOAT, 1, std::ptr::from_ref(number).cast()),
            Value::Descriptors(_) => (kind::DESCRIPTOR, pointers.len(), pointers.as_ptr().cast()),
            Value::Handle(_) => (kind::HANDLE, 1, pointers.as_ptr().cast()),
            Value::Pointers(_) => (kind::POINTER, pointers.len(), pointers.as_ptr().cast()),
            #[cfg(test)]
            Value::Text(text) => (kind::CHAR, text.len(), text.as_ptr().cast()),
        };
        // SAFETY: there are as many values of this kind as it is told, and it copies them.
        #[expect(unsafe_code, reason = "a call of the library")]
        let status = unsafe { (self.library.set_attribute)(self.raw, attribute, kind, count as i64, at) };
        self.library.check(status, &format!("set attribute {attribute} of descriptor {}", self.kind))
    }

    /// An attribute that is one whole number.
    pub(super) fn integer(&self, attribute: i32) -> Result<i64, Failure> {
        let (mut value, mut count) = (0i64, 0i64);
        // SAFETY: there is room for the one value that is asked for.
        #[expect(unsafe_code, reason = "a call of the library")]
        let status =
            unsafe { (self.library.get_attribute)(self.raw, attribute, kind::INT64, 1, &raw mut count, (&raw mut value).cast()) };
        self.library.check(status, &format!("read attribute {attribute} of descriptor {}", self.kind))?;
        Ok(value)
    }

    /// An attribute that is some choices of this kind, of which there are a dozen.
    pub(super) fn choices(&self, attribute: i32, kind: i32) -> Result<Vec<i32>, Failure> {
        let (mut values, mut count) = ([0i32; 64], 0i64);
        let room = values.len();
        // SAFETY: there is room for as many as are asked for.
        #[expect(unsafe_code, reason = "a call of the library")]
        let status = unsafe {
            (self.library.get_attribute)(self.raw, attribute, kind, room as i64, &raw mut count, values.as_mut_ptr().cast())
        };
        self.library.check(status, &format!("read attribute {attribute} of descriptor {}", self.kind))?;
        Ok(values[..(count.max(0) as usize).min(room)].to_vec())
    }

    /// An attribute that is any number of descriptors of this kind.
    pub(super) fn descriptors(&self, attribute: i32, of: i32) -> Result<Vec<Self>, Failure> {
        let read = |raws: &mut [Raw]| {
            let mut count = 0;
            // SAFETY: there is room for as many as are asked for, and each is a descriptor to write into.
            #[expect(unsafe_code, reason = "a call of the library")]
            let status = unsafe {
                let at = if raws.is_empty() { null_mut() } else { raws.as_mut_ptr().cast() };
                (self.library.get_attribute)(self.raw, attribute, kind::DESCRIPTOR, raws.len() as i64, &raw mut count, at)
            };
            self.library.check(status, &format!("read attribute {attribute} of descriptor {}", self.kind))?;
            Ok::<_, Failure>(count.max(0) as usize)
        };
        // Asked for none, it says how many there may be; some of those turn out not to be.
        let room = read(&mut [])?;
        let mut found = (0..room).map(|_| Self::empty(self.library, of)).collect::<Result<Vec<_>, _>>()?;
        if room > 0 {
            let mut raws: Vec<Raw> = found.iter().map(|one| one.raw).collect();
            let count = read(&mut raws)?;
            found.truncate(count);
        }
        Ok(found)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made in `empty`, and given back once.
        #[expect(unsafe_code, reason = "a call of the library")]
        let _ = unsafe { (self.library.destroy_descriptor)(self.raw) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(dotted(92800), "9.28.0");
        assert_eq!(dotted(91002), "9.10.2");
        let all = [8907, 90000, 91000, 91001, 91002, 92800, 100_000];
        assert_eq!(all.map(usable), [false, true, false, false, true, true, false]);
    }

    #[test]
    fn a_missing_library_is_named() {
        let missing = Library::open(&["libdarkroom-none.so.9"]).unwrap_err();
        assert!(missing.contains("libdarkroom-none.so.9"), "{missing}");
        // A library, but another one.
        if let Err(other) = Library::open(&["libc.so.6"]) {
            assert!(other.contains("cudnnGetVersion") || other.contains("libc.so.6"), "{other}");
        }
    }
}
