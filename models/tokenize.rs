//! Prompt to token ids.
