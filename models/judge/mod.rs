//! Models that look at pictures instead of making them: how well one fits its prompt, and who is on it.

mod clip;

pub use clip::Clip;
