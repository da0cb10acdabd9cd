pub(crate) mod attention;
pub(crate) mod norm;
pub(crate) mod rotary;
