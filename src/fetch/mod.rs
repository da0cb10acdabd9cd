//! Getting an adapter's file from where a user says it is. Knows nothing of models.
//!
//! Today: files and archives on this machine. Links, the hub and object stores are refused with what to do instead.

mod archive;
mod error;
mod reference;

pub use archive::{Member, extract};
pub use error::Error;
pub use reference::Reference;
