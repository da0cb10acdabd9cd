//! LoRA and its relatives: every published file format, read on independent axes and merged into a base from its pristine weights.
//!
//! [`Adapter::open`] reads a file: [`keys`] takes each key apart, [`modules`] knows every module's names, [`Change`] is the arithmetic of
//! the algorithms, [`Report`] says what was found. [`Patches`] puts a set of adapters on a model's weights and takes them off again, bit
//! for bit. Formats and formulas: the paper named in `change.rs`, and the writers' own sources.

mod adapter;
mod assemble;
mod bake;
mod change;
mod convert;
mod error;
mod foreign;
mod keys;
mod metadata;
mod modules;
mod patch;
mod plan;
mod precheck;
mod report;
mod resident;
mod scales;
mod twice;

pub use adapter::{Adapter, Update};
pub use bake::Baking;
pub use change::{Change, Factor, Kind, Magnitude};
pub use convert::{Format, convert};
pub use error::Error;
pub use keys::module_of;
pub use metadata::Base;
pub use modules::{Module, Naming, Place};
pub use patch::{Home, Mode, Patches, RESIDENT, Selected, Switch};
pub use precheck::precheck;
pub use report::{Refused, Report};
pub use scales::{BLOCKS, Scales, parse_blocks};
