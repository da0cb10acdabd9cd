//! What a verb that writes a file tells while it works, and how it is stopped: as by any other failure, so that nothing half done is left.

use std::io::{self, Read, Write};
use std::ops::ControlFlow;

use crate::engine;
use crate::fetch::Progress;
use crate::ops::Error;

/// What is being done. Answering `ControlFlow::Break` stops it: a download at once, writing before the next tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// A LoRA that is not on this machine.
    Fetching(Progress),
    Writing,
    /// All is written and gets its name now.
    Finishing,
}

pub(super) type Told<'a> = &'a mut dyn FnMut(Stage) -> ControlFlow<()>;

pub(super) fn tell(told: Told<'_>, stage: Stage) -> Result<(), Error> {
    match told(stage) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(engine::Error::Cancelled.into()),
    }
}

/// What is read or written, asked before each piece whether to go on.
pub(super) struct Watched<'a, T> {
    inner: T,
    told: Told<'a>,
    stopped: bool,
}

impl<'a, T> Watched<'a, T> {
    pub(super) fn new(inner: T, told: Told<'a>) -> Self {
        Self { inner, told, stopped: false }
    }

    /// Why it failed: `error`, unless that is only how it was stopped.
    pub(super) fn cause(&self, error: Error) -> Error {
        if self.stopped { engine::Error::Cancelled.into() } else { error }
    }

    fn go_on(&mut self) -> io::Result<()> {
        self.stopped = (self.told)(Stage::Writing).is_break();
        // Not `Interrupted`, after which readers and writers try again.
        if self.stopped { Err(io::Error::other("stopped")) } else { Ok(()) }
    }
}

impl<T: Read> Read for Watched<'_, T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.go_on()?;
        self.inner.read(buffer)
    }
}

impl<T: Write> Write for Watched<'_, T> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.go_on()?;
        self.inner.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
