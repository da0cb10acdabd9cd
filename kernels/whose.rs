//! Whose kernels do what several libraries have kernels for.

use std::sync::{Mutex, PoisonError};

/// Whose kernels are used on CUDA, once [`use_fused`](crate::use_fused) is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    Own,
    /// cuDNN's, where it is installed and has a plan; ours elsewhere. [`cudnn_status`](crate::cudnn_status) tells.
    Cudnn,
}

/// What there is a choice for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Attention,
    Convolution,
}

static CHOSEN: Mutex<[Option<Whose>; 2]> = Mutex::new([None; 2]);

/// Whose kernels are used from now on. Without a choice ours are, until [`settle_attention`](crate::settle_attention) or
/// [`settle_convolution`](crate::settle_convolution) has timed both.
pub fn choose(work: Work, whose: Whose) {
    CHOSEN.lock().unwrap_or_else(PoisonError::into_inner)[work as usize] = Some(whose);
}

/// What was chosen last, if anything was.
#[must_use]
pub fn chosen(work: Work) -> Option<Whose> {
    CHOSEN.lock().unwrap_or_else(PoisonError::into_inner)[work as usize]
}
