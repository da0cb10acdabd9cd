//! Named base models: what each consists of, where it is, how it gets here.
//!
//! A [`Card`] says which files make up a model; `--model` accepts a card's name, a card's path, a folder or a single file
//! ([`resolve`]). Files of the hub live in the hub's own cache, shared with Python, and are checked after they arrive.

mod card;
mod digest;
mod error;
mod hub;
mod pull;
mod resolve;
mod store;

pub use card::{Card, Defaults, File, Role};
pub(super) use digest::of_model as digest;
pub use error::Error;
pub use pull::{Pulled, Pulling, Watcher, pull};
pub(super) use resolve::judge;
pub use resolve::{Model, resolve};
pub use store::{Checked, Found, Installed, Listed, Removed, list, remove, verify};
