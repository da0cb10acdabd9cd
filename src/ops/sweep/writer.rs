//! Writes pictures while the next ones are made: encoding and waiting for the disk cost the device no time.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};

use super::folder::{Folder, Made};
use crate::engine::{Finished, Job};
use crate::image::Format;
use crate::ops::Error;
use crate::ops::generate::{self, Setting};

/// Pictures that may wait.
const WAITING: usize = 2;

/// A picture that was made, and what its file says of it.
pub(super) struct Picture {
    pub(super) made: Made,
    pub(super) job: Job,
    pub(super) finished: Finished,
    pub(super) model: String,
    pub(super) sha256: String,
    pub(super) dtype: String,
    pub(super) latents: bool,
}

/// The thread that writes.
pub(super) struct Writer<'scope> {
    sender: SyncSender<Picture>,
    thread: ScopedJoinHandle<'scope, Result<(), Error>>,
}

impl<'scope> Writer<'scope> {
    pub(super) fn begin<'env>(scope: &'scope Scope<'scope, 'env>, folder: &'env mut Folder) -> Self {
        let (sender, receiver) = sync_channel(WAITING);
        Self { sender, thread: scope.spawn(move || write(folder, &receiver)) }
    }

    /// Takes a picture; `false` if nothing can be written any more.
    pub(super) fn take(&self, picture: Picture) -> bool {
        self.sender.send(picture).is_ok()
    }

    /// When all is written.
    pub(super) fn finish(self) -> Result<(), Error> {
        drop(self.sender);
        self.thread.join().expect("writing does not panic")
    }
}

fn write(folder: &mut Folder, pictures: &Receiver<Picture>) -> Result<(), Error> {
    for picture in pictures {
        let Picture { made, job, finished, model, sha256, dtype, latents } = picture;
        let setting = Setting { model: &model, digest: Some(&sha256), device: &made.device, dtype: &dtype };
        let png = generate::encode(&job, &finished, (Format::Png, 100), Some(setting))?.swap_remove(0);
        let latents = latents.then(|| generate::latents(&finished)).transpose()?;
        folder.add(&made, &png, latents.as_deref())?;
    }
    Ok(())
}
