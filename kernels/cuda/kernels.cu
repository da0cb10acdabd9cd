// All kernels, as one module for a card.
#include "common.cuh"

#include "activation.cu"
#include "attention.cu"
#include "blocks.cu"
#include "convolve.cu"
#include "fp8.cu"
#include "group_norm.cu"
#include "heads.cu"
#include "merge.cu"
#include "norm.cu"
