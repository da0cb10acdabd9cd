// What a CUDA program asks of cuBLAS, cuBLASLt and cuRAND, on the processor: products as the libraries' documents describe them, sums in
// f32 (f64 for f64), each result rounded once.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <curand.h>

#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#include "emulator.hpp"

extern "C" const char *card_use(const void *at, size_t bytes, const void *stream, bool writing); // of libcuda.so.1

namespace {

float e4m3(uint8_t byte) {
    int exponent = byte >> 3 & 15, mantissa = byte & 7;
    float x = (byte & 127) == 127 ? NAN : exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return byte >> 7 ? -x : x;
}

template <typename T> float get(const void *p, size_t i) { return widen(((const T *)p)[i]); }

float load(cudaDataType type, const void *p, size_t i) {
    switch (type) {
    case CUDA_R_32F: return get<float>(p, i);
    case CUDA_R_16F: return get<f16>(p, i);
    case CUDA_R_16BF: return get<bf16>(p, i);
    case CUDA_R_8F_E4M3: return e4m3(((const uint8_t *)p)[i]);
    default: abort();
    }
}

void store(cudaDataType type, void *p, size_t i, float x) {
    switch (type) {
    case CUDA_R_32F: ((float *)p)[i] = x; break;
    case CUDA_R_16F: round_to(x, ((f16 *)p)[i]); break;
    case CUDA_R_16BF: round_to(x, ((bf16 *)p)[i]); break;
    default: abort();
    }
}

size_t size_of(cudaDataType type) { return type == CUDA_R_32F ? 4 : type == CUDA_R_8F_E4M3 ? 1 : 2; }

bool known(cudaDataType type) { return type == CUDA_R_32F || type == CUDA_R_16F || type == CUDA_R_16BF; }

struct Matrix { const void *at; cudaDataType type; size_t pitch; bool transposed; };

// Row i of op(X), or column i of it, as k floats in one piece.
std::vector<float> gathered(const Matrix &x, size_t lines, size_t k, bool rows) {
    std::vector<float> all(lines * k);
    // Columns of X lie in one piece. Rows of op(X) are columns of X where it is transposed.
    bool piece = rows == x.transposed;
    for (size_t i = 0; i < lines; i++)
        for (size_t l = 0; l < k; l++) all[i * k + l] = load(x.type, x.at, piece ? i * x.pitch + l : l * x.pitch + i);
    return all;
}

// A host's pointer would work here, but not on a card; nor would memory that another stream still works with.
void use(const void *at, size_t bytes, const void *stream, bool writing = false) {
    const char *why = card_use(at, bytes, stream, writing);
    if (!why) return;
    fprintf(stderr, "card: a library's work %s\n", why);
    abort();
}

// Nothing is computed, and there is no memory behind the addresses.
[[maybe_unused]] bool dry() {
    static const bool is = getenv("CARD_DRY") && *getenv("CARD_DRY");
    return is;
}

// D (m x n, by columns) = finish(op(A) op(B)).
template <typename Finish> void multiply(size_t m, size_t n, size_t k, const Matrix &a, const Matrix &b, const Finish &finish) {
    if (dry()) return;
    std::vector<float> left = gathered(a, m, k, true), right = gathered(b, n, k, false);
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < m; i++) {
            const float *x = &left[i * k], *y = &right[j * k];
            float parts[16] = {};
            size_t l = 0;
            for (; l + 16 <= k; l += 16)
                for (int p = 0; p < 16; p++) parts[p] += x[l + p] * y[l + p];
            float sum = 0;
            for (; l < k; l++) sum += x[l] * y[l];
            for (float part : parts) sum += part;
            finish(i, j, sum);
        }
}

cublasStatus_t refuse(const char *what) {
    fprintf(stderr, "card: %s\n", what);
    return CUBLAS_STATUS_NOT_SUPPORTED;
}

} // namespace

extern "C" {

#ifdef CUBLAS
struct cublasContext { const void *stream = nullptr; };
cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) { return *handle = new cublasContext, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) { return delete handle, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) { return handle->stream = stream, CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void *alpha,
                                          const void *A, cudaDataType at, int lda, long long sa, const void *B, cudaDataType bt, int ldb,
                                          long long sb, const void *beta, void *C, cudaDataType ct, int ldc, long long sc, int batches,
                                          cublasComputeType_t compute, cublasGemmAlgo_t) {
    bool in_f16 = compute == CUBLAS_COMPUTE_16F;
    if (!known(at) || at != bt || (at != ct && ct != CUDA_R_32F) || (in_f16 && ct != CUDA_R_16F))
        return refuse("cuBLAS: a product of types that nobody has described");
    if (lda < (ta == CUBLAS_OP_N ? m : k) || ldb < (tb == CUBLAS_OP_N ? k : n) || ldc < m) return CUBLAS_STATUS_INVALID_VALUE;
    float scale = in_f16 ? widen(*(const f16 *)alpha) : *(const float *)alpha, keep = in_f16 ? widen(*(const f16 *)beta) : *(const float *)beta;
    size_t size = size_of(at), out_size = size_of(ct);
    use(A, ((size_t)lda * ((ta == CUBLAS_OP_N ? k : m) - 1) + (ta == CUBLAS_OP_N ? m : k) + sa * (batches - 1)) * size, handle->stream);
    use(B, ((size_t)ldb * ((tb == CUBLAS_OP_N ? n : k) - 1) + (tb == CUBLAS_OP_N ? k : n) + sb * (batches - 1)) * size, handle->stream);
    use(C, ((size_t)ldc * (n - 1) + m + sc * (batches - 1)) * out_size, handle->stream, true);
    for (int batch = 0; batch < batches; batch++) {
        char *c = (char *)C + batch * sc * out_size;
        multiply(m, n, k, {(const char *)A + batch * sa * size, at, (size_t)lda, ta != CUBLAS_OP_N},
                 {(const char *)B + batch * sb * size, bt, (size_t)ldb, tb != CUBLAS_OP_N}, [&](size_t i, size_t j, float sum) {
                     size_t where = j * ldc + i;
                     store(ct, c, where, scale * sum + (keep != 0 ? keep * load(ct, c, where) : 0));
                 });
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDgemmStridedBatched(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const double *alpha,
                                         const double *A, int lda, long long sa, const double *B, int ldb, long long sb, const double *beta,
                                         double *C, int ldc, long long sc, int batches) {
    for (int batch = 0; batch < batches; batch++)
        for (int j = 0; j < n; j++)
            for (int i = 0; i < m; i++) {
                double sum = 0;
                for (int l = 0; l < k; l++)
                    sum += A[batch * sa + (ta == CUBLAS_OP_N ? (size_t)l * lda + i : (size_t)i * lda + l)] *
                           B[batch * sb + (tb == CUBLAS_OP_N ? (size_t)j * ldb + l : (size_t)l * ldb + j)];
                double &c = C[batch * sc + (size_t)j * ldc + i];
                c = *alpha * sum + (*beta != 0 ? *beta * c : 0);
            }
    return CUBLAS_STATUS_SUCCESS;
}
#endif

#ifdef CUBLASLT
struct Layout { cudaDataType type; uint64_t rows, columns; int64_t pitch; };
struct Description {
    cublasOperation_t ta = CUBLAS_OP_N, tb = CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    const void *bias = nullptr;
    const float *a_scale = nullptr, *b_scale = nullptr;
    int8_t fast = 0; // sums are exact here either way
    cublasLtMatmulMatrixScale_t a_mode = CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F, b_mode = CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F;
};

size_t cublasLtGetVersion() { return 130000; }
cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) { return *handle = (cublasLtHandle_t)malloc(1), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows, uint64_t columns, int64_t pitch) {
    return *layout = (cublasLtMatrixLayout_t) new Layout{type, rows, columns, pitch}, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return delete (Layout *)layout, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *description, cublasComputeType_t compute, cudaDataType scale) {
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F) return refuse("cuBLASLt: a way to compute that nobody has described");
    return *description = (cublasLtMatmulDesc_t) new Description, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) { return delete (Description *)description, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t of, cublasLtMatmulDescAttributes_t attribute, const void *value, size_t bytes) {
    Description &d = *(Description *)of;
    auto set = [&](auto &field) {
        if (bytes != sizeof field) return refuse("cuBLASLt: an attribute of another size");
        memcpy(&field, value, bytes);
        return CUBLAS_STATUS_SUCCESS;
    };
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return set(d.ta);
    case CUBLASLT_MATMUL_DESC_TRANSB: return set(d.tb);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return set(d.epilogue);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return set(d.bias);
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER: return set(d.a_scale);
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER: return set(d.b_scale);
    case CUBLASLT_MATMUL_DESC_FAST_ACCUM: return set(d.fast);
    case CUBLASLT_MATMUL_DESC_A_SCALE_MODE: return set(d.a_mode);
    case CUBLASLT_MATMUL_DESC_B_SCALE_MODE: return set(d.b_mode);
    default: return refuse("cuBLASLt: an attribute that nobody has described");
    }
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *made) {
    return *made = (cublasLtMatmulPreference_t)malloc(1), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t made) { return free(made), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t attribute, const void *,
                                                    size_t bytes) {
    return bytes == (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? 8 : 4) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t of, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int room,
                                              cublasLtMatmulHeuristicResult_t *results, int *found) {
    const Description &d = *(Description *)of;
    // Only Hopper has algorithms with a scale for each row; whether with GELU as well, nobody says: CARD_PLAIN_SCALES=1 has none.
    int capability = atoi(getenv("CARD_CAPABILITY") ? getenv("CARD_CAPABILITY") : "9");
    bool gelu = d.epilogue == CUBLASLT_EPILOGUE_GELU || d.epilogue == CUBLASLT_EPILOGUE_GELU_BIAS;
    bool has = capability == 9 && !(gelu && getenv("CARD_PLAIN_SCALES"));
    if (d.a_mode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F && !has) return *found = 0, CUBLAS_STATUS_NOT_SUPPORTED;
    *found = room < 2 ? room : 2;
    for (int i = 0; i < *found; i++) {
        memset(&results[i], 0, sizeof results[i]);
        results[i].algo.data[0] = 77 + i;
        results[i].state = CUBLAS_STATUS_SUCCESS;
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t of, const void *alpha, const void *A, cublasLtMatrixLayout_t a_layout,
                              const void *B, cublasLtMatrixLayout_t b_layout, const void *beta, const void *, cublasLtMatrixLayout_t,
                              void *D, cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t room, cudaStream_t stream) {
    const Description &d = *(Description *)of;
    const Layout &a = *(Layout *)a_layout, &b = *(Layout *)b_layout, &out = *(Layout *)d_layout;
    if (algorithm->data[0] - 77 > 1) return CUBLAS_STATUS_INVALID_VALUE;
    bool ta = d.ta != CUBLAS_OP_N, tb = d.tb != CUBLAS_OP_N, e4m3s = a.type == CUDA_R_8F_E4M3;
    uint64_t m = ta ? a.columns : a.rows, k = ta ? a.rows : a.columns, n = tb ? b.rows : b.columns;
    if (k != (tb ? b.columns : b.rows) || m != out.rows || n != out.columns || a.pitch < (int64_t)a.rows || b.pitch < (int64_t)b.rows ||
        out.pitch < (int64_t)out.rows)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (a.type != b.type || !(e4m3s || known(a.type)) || !known(out.type)) return refuse("cuBLASLt: a product of types that nobody has described");
    for (const void *p : {A, B, (const void *)D})
        if ((uintptr_t)p % 16) return CUBLAS_STATUS_NOT_SUPPORTED;
    bool rows = d.a_mode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F && d.b_mode == d.a_mode && d.a_scale && d.b_scale;
    bool bare = d.a_mode == CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F && d.b_mode == d.a_mode && !d.a_scale && !d.b_scale;
    if (e4m3s && !((rows || bare) && ta && !tb && m % 16 == 0 && k % 16 == 0))
        return refuse("cuBLASLt: e4m3 other than A transposed, B not, by sixteens, a scale for each row or none");
    bool biased = d.epilogue == CUBLASLT_EPILOGUE_BIAS || d.epilogue == CUBLASLT_EPILOGUE_GELU_BIAS;
    bool gelu = d.epilogue == CUBLASLT_EPILOGUE_GELU || d.epilogue == CUBLASLT_EPILOGUE_GELU_BIAS;
    if ((!biased && !gelu && d.epilogue != CUBLASLT_EPILOGUE_DEFAULT) || biased != (d.bias != nullptr) || *(const float *)beta != 0)
        return refuse("cuBLASLt: an epilogue that nobody has described");
    use(A, (a.pitch * (a.columns - 1) + a.rows) * size_of(a.type), stream);
    use(B, (b.pitch * (b.columns - 1) + b.rows) * size_of(b.type), stream);
    use(D, (out.pitch * (out.columns - 1) + out.rows) * size_of(out.type), stream, true);
    if (d.bias) use(d.bias, m * size_of(out.type), stream);
    if (d.a_scale) use(d.a_scale, m * sizeof(float), stream);
    if (d.b_scale) use(d.b_scale, n * sizeof(float), stream);
    if (workspace) use(workspace, room, stream, true);
    multiply(m, n, k, {A, a.type, (size_t)a.pitch, ta}, {B, b.type, (size_t)b.pitch, tb}, [&](size_t i, size_t j, float sum) {
        sum *= *(const float *)alpha;
        if (e4m3s && rows) sum *= d.a_scale[i] * d.b_scale[j];
        if (biased) sum += load(out.type, d.bias, i);
        if (gelu) sum = 0.5f * sum * (1.0f + tanhf(0.7978845608028654f * (sum + 0.044715f * sum * sum * sum)));
        store(out.type, D, j * out.pitch + i, sum);
    });
    return CUBLAS_STATUS_SUCCESS;
}
#endif

#ifdef CURAND
struct curandGenerator_st { std::mt19937_64 random; const void *stream = nullptr; };
curandStatus_t curandCreateGenerator(curandGenerator_t *made, curandRngType_t) { return *made = new curandGenerator_st, CURAND_STATUS_SUCCESS; }
curandStatus_t curandDestroyGenerator(curandGenerator_t made) { return delete made, CURAND_STATUS_SUCCESS; }
curandStatus_t curandSetPseudoRandomGeneratorSeed(curandGenerator_t made, unsigned long long seed) {
    return made->random.seed(seed), CURAND_STATUS_SUCCESS;
}
curandStatus_t curandSetStream(curandGenerator_t made, cudaStream_t stream) { return made->stream = stream, CURAND_STATUS_SUCCESS; }
#define FILL(name, T, Distribution, ...) \
    curandStatus_t name(curandGenerator_t made, T *to, size_t n __VA_OPT__(, T mean, T deviation)) { \
        std::Distribution<T> draw __VA_OPT__((mean, deviation)); \
        use(to, n * sizeof(T), made->stream, true); \
        for (size_t i = 0; i < n && !dry(); i++) to[i] = draw(made->random); \
        return CURAND_STATUS_SUCCESS; \
    }
FILL(curandGenerateNormal, float, normal_distribution, normal)
FILL(curandGenerateNormalDouble, double, normal_distribution, normal)
FILL(curandGenerateUniform, float, uniform_real_distribution)
FILL(curandGenerateUniformDouble, double, uniform_real_distribution)
#endif

} // extern "C"
