//! Numbers of cuDNN 9's C interface (`cudnn_graph.h`), as far as attention and convolution need them. They are the same in every 9.x.

/// Kinds of descriptors.
pub(super) mod descriptor {
    pub(crate) const POINTWISE: i32 = 0;
    pub(crate) const CONVOLUTION: i32 = 1;
    pub(crate) const ENGINE: i32 = 2;
    pub(crate) const ENGINE_CONFIG: i32 = 3;
    pub(crate) const HEURISTICS: i32 = 4;
    pub(crate) const PLAN: i32 = 5;
    pub(crate) const CONVOLUTION_OPERATION: i32 = 10;
    pub(crate) const POINTWISE_OPERATION: i32 = 13;
    pub(crate) const GRAPH: i32 = 15;
    pub(crate) const VARIANT_PACK: i32 = 16;
    pub(crate) const TENSOR: i32 = 17;
    pub(crate) const PRODUCT: i32 = 18;
    pub(crate) const PRODUCT_OPERATION: i32 = 19;
    pub(crate) const REDUCTION: i32 = 21;
    pub(crate) const REDUCTION_OPERATION: i32 = 22;
    /// Since 9.8.
    #[cfg(test)]
    pub(crate) const DEVICE: i32 = 38;
    /// Since 9.13.
    pub(crate) const ATTENTION_OPERATION: i32 = 41;
}

/// Attributes of descriptors.
pub(super) mod attribute {
    pub(crate) const POINTWISE_MODE: i32 = 0;
    pub(crate) const POINTWISE_PRECISION: i32 = 1;

    pub(crate) const CONVOLUTION_PRECISION: i32 = 100;
    pub(crate) const CONVOLUTION_MODE: i32 = 101;
    pub(crate) const CONVOLUTION_DILATIONS: i32 = 102;
    pub(crate) const CONVOLUTION_STRIDES: i32 = 103;
    pub(crate) const CONVOLUTION_AFTER: i32 = 104;
    pub(crate) const CONVOLUTION_BEFORE: i32 = 105;
    pub(crate) const CONVOLUTION_DIMENSIONS: i32 = 106;

    pub(crate) const HEURISTICS_MODE: i32 = 200;
    pub(crate) const HEURISTICS_GRAPH: i32 = 201;
    pub(crate) const HEURISTICS_RESULTS: i32 = 202;
    pub(crate) const HEURISTICS_DEVICE: i32 = 204;

    pub(crate) const CONFIG_ENGINE: i32 = 300;

    pub(crate) const PLAN_HANDLE: i32 = 400;
    pub(crate) const PLAN_CONFIG: i32 = 401;
    pub(crate) const PLAN_WORKSPACE: i32 = 402;
    pub(crate) const PLAN_DEVICE: i32 = 407;

    pub(crate) const CONVOLUTION_ALPHA: i32 = 700;
    pub(crate) const CONVOLUTION_BETA: i32 = 701;
    pub(crate) const CONVOLUTION_OF: i32 = 702;
    pub(crate) const CONVOLUTION_W: i32 = 703;
    pub(crate) const CONVOLUTION_X: i32 = 704;
    pub(crate) const CONVOLUTION_Y: i32 = 705;

    pub(crate) const POINTWISE_OF: i32 = 750;
    pub(crate) const POINTWISE_X: i32 = 751;
    pub(crate) const POINTWISE_B: i32 = 752;
    pub(crate) const POINTWISE_Y: i32 = 753;

    pub(crate) const GRAPH_HANDLE: i32 = 800;
    pub(crate) const GRAPH_OPERATIONS: i32 = 801;

    pub(crate) const TENSOR_ALIGNMENT: i32 = 900;
    pub(crate) const TENSOR_TYPE: i32 = 901;
    pub(crate) const TENSOR_DIMS: i32 = 902;
    pub(crate) const TENSOR_STRIDES: i32 = 903;
    pub(crate) const TENSOR_ID: i32 = 906;
    pub(crate) const TENSOR_VIRTUAL: i32 = 907;
    pub(crate) const TENSOR_BY_VALUE: i32 = 908;

    pub(crate) const PACK_IDS: i32 = 1000;
    pub(crate) const PACK_POINTERS: i32 = 1001;
    pub(crate) const PACK_WORKSPACE: i32 = 1003;

    pub(crate) const ENGINE_NOTES: i32 = 1303;

    pub(crate) const PRODUCT_PRECISION: i32 = 1500;
    pub(crate) const PRODUCT_A: i32 = 1520;
    pub(crate) const PRODUCT_B: i32 = 1521;
    pub(crate) const PRODUCT_C: i32 = 1522;
    pub(crate) const PRODUCT_OF: i32 = 1523;

    pub(crate) const REDUCTION_OPERATOR: i32 = 1600;
    pub(crate) const REDUCTION_PRECISION: i32 = 1601;
    pub(crate) const REDUCTION_X: i32 = 1610;
    pub(crate) const REDUCTION_Y: i32 = 1611;
    pub(crate) const REDUCTION_OF: i32 = 1612;

    #[cfg(test)]
    pub(crate) const DEVICE_JSON: i32 = 2702;

    pub(crate) const ATTENTION_Q: i32 = 2800;
    pub(crate) const ATTENTION_K: i32 = 2801;
    pub(crate) const ATTENTION_V: i32 = 2802;
    pub(crate) const ATTENTION_Y: i32 = 2803;
    pub(crate) const ATTENTION_SCALE: i32 = 2805;
}

/// Types of attributes' values.
pub(super) mod kind {
    pub(crate) const HANDLE: i32 = 0;
    pub(crate) const DATA_TYPE: i32 = 1;
    pub(crate) const BOOLEAN: i32 = 2;
    pub(crate) const INT64: i32 = 3;
    pub(crate) const FLOAT: i32 = 4;
    pub(crate) const POINTER: i32 = 6;
    pub(crate) const CONVOLUTION_MODE: i32 = 7;
    pub(crate) const HEURISTICS_MODE: i32 = 8;
    pub(crate) const NOTE: i32 = 11;
    pub(crate) const POINTWISE_MODE: i32 = 14;
    pub(crate) const DESCRIPTOR: i32 = 15;
    pub(crate) const REDUCTION_OPERATOR: i32 = 18;
    #[cfg(test)]
    pub(crate) const CHAR: i32 = 24;
}

/// Types of tensors' values.
pub(super) mod values {
    pub(crate) const F32: i32 = 0;
    pub(crate) const F16: i32 = 2;
    pub(crate) const BF16: i32 = 9;
}

/// How a window lies on a picture: as in every network, not mirrored.
pub(super) const CROSS_CORRELATION: i32 = 1;

pub(super) mod pointwise {
    pub(crate) const ADD: i32 = 0;
    pub(crate) const MUL: i32 = 1;
    pub(crate) const DIV: i32 = 6;
    pub(crate) const SUB: i32 = 9;
    pub(crate) const EXP: i32 = 13;
    pub(crate) const LOG: i32 = 15;
}

pub(super) mod reduction {
    pub(crate) const ADD: i32 = 0;
    pub(crate) const MAX: i32 = 3;
}

/// What it says of an engine's numbers.
pub(super) mod note {
    /// It multiplies by the units for matrices.
    #[cfg(test)]
    pub(crate) const MATRIX_UNITS: i32 = 0;
    /// Inputs are rounded to fewer bits.
    pub(crate) const FEWER_BITS: i32 = 1;
    /// Sums have fewer bits than was asked for.
    pub(crate) const SHORT_SUMS: i32 = 2;
    /// The next time it may be something else.
    pub(crate) const CHANGING: i32 = 4;
}

/// How the library looks for engines: what it knows to be fast, and whatever works.
pub(super) mod heuristics {
    pub(crate) const FALLBACK: i32 = 2;
    pub(crate) const A: i32 = 3;
}
