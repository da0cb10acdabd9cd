pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod convolve;
mod cpu;
pub(crate) mod group_norm;
pub(crate) mod heads;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod rotary;
