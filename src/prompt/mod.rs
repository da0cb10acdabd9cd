//! Words that call the subject of a LoRA, and prompts that come from a chat model. Knows nothing of the rest.

mod clean;
mod trigger;

pub use clean::clean;
pub use trigger::Policy;
