pub(crate) mod attention;
pub(crate) mod convolve;
pub(crate) mod group_norm;
pub(crate) mod norm;
pub(crate) mod rotary;
