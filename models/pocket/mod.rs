//! The embedded demonstration model.
