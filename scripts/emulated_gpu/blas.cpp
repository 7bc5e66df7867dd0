// libcublas.so.13 and libcurand.so.10 for `driver.cpp`: products by OpenBLAS in f32 and f64, rounded at the end; normal
// numbers of the standard library.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

using Result = int;
constexpr Result OK = 0, INVALID_VALUE = 7, LENGTH_NOT_MULTIPLE = 105;
// cudaDataType, cublasComputeType
constexpr int F32 = 0, F16 = 2, BF16 = 14, COMPUTE_16F = 64;

extern "C" {
void sgemm_(const char *, const char *, const int *, const int *, const int *, const float *, const float *, const int *,
            const float *, const int *, const float *, float *, const int *);
void dgemm_(const char *, const char *, const int *, const int *, const int *, const double *, const double *, const int *,
            const double *, const int *, const double *, double *, const int *);
}

static float get(const void *data, int type, size_t at) {
    if (type == F32) return ((const float *)data)[at];
    uint16_t bits = ((const uint16_t *)data)[at];
    if (type == F16) {
        _Float16 x;
        memcpy(&x, &bits, sizeof x);
        return (float)x;
    }
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

static void put(void *data, int type, size_t at, float x) {
    if (type == F32) {
        ((float *)data)[at] = x;
        return;
    }
    uint16_t bits;
    if (type == F16) {
        _Float16 narrow = (_Float16)x;
        memcpy(&bits, &narrow, sizeof bits);
    } else {
        uint32_t wide;
        memcpy(&wide, &x, sizeof wide);
        bits = std::isnan(x) ? wide >> 16 | 0x40 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
    }
    ((uint16_t *)data)[at] = bits;
}

// Columns of a matrix, one behind the other.
static std::vector<float> columns(const void *data, int type, long long from, int rows, int count, int apart) {
    std::vector<float> out((size_t)rows * count);
    for (int column = 0; column < count; column++)
        for (int row = 0; row < rows; row++)
            out[(size_t)column * rows + row] = get(data, type, from + (size_t)column * apart + row);
    return out;
}

static std::mt19937 random_bits;

template <typename T> static Result normal(T *out, size_t count, T mean, T deviation) {
    if (count % 2) return LENGTH_NOT_MULTIPLE;
    std::normal_distribution<T> draw(mean, deviation);
    for (size_t i = 0; i < count; i++) out[i] = draw(random_bits);
    return OK;
}

extern "C" {

static int something;
Result cublasCreate_v2(void **handle) { return *handle = &something, OK; }
Result cublasDestroy_v2(void *) { return OK; }
Result cublasSetStream_v2(void *, void *) { return OK; }

Result cublasGemmStridedBatchedEx(void *, int a_turned, int b_turned, int m, int n, int k, const void *alpha,
                                  const void *a, int a_type, int a_apart, long long a_next, const void *b, int b_type,
                                  int b_apart, long long b_next, const void *beta, void *c, int c_type, int c_apart,
                                  long long c_next, int batch, int compute, int) {
    const int a_rows = a_turned ? k : m, b_rows = b_turned ? n : k;
    if (a_apart < a_rows || b_apart < b_rows || c_apart < m) return INVALID_VALUE;
    // see driver.cpp
    if (getenv("EMULATED_GPU_COUNT") && 1.0 * m * n * k * batch > 3e7) return OK;
    const char *turned[] = {"N", "T"};
    const int factor = compute == COMPUTE_16F ? F16 : F32;
    const float scale = get(alpha, factor, 0), keep = get(beta, factor, 0);
    for (int i = 0; i < batch; i++) {
        auto left = columns(a, a_type, i * a_next, a_rows, a_turned ? m : k, a_apart);
        auto right = columns(b, b_type, i * b_next, b_rows, b_turned ? k : n, b_apart);
        auto out = keep == 0 ? std::vector<float>((size_t)m * n) : columns(c, c_type, i * c_next, m, n, c_apart);
        sgemm_(turned[a_turned != 0], turned[b_turned != 0], &m, &n, &k, &scale, left.data(), &a_rows, right.data(), &b_rows,
               &keep, out.data(), &m);
        for (int column = 0; column < n; column++)
            for (int row = 0; row < m; row++)
                put(c, c_type, i * c_next + (size_t)column * c_apart + row, out[(size_t)column * m + row]);
    }
    return OK;
}

Result cublasDgemmStridedBatched(void *, int a_turned, int b_turned, int m, int n, int k, const double *alpha,
                                 const double *a, int a_apart, long long a_next, const double *b, int b_apart,
                                 long long b_next, const double *beta, double *c, int c_apart, long long c_next, int batch) {
    const char *turned[] = {"N", "T"};
    for (int i = 0; i < batch; i++)
        dgemm_(turned[a_turned != 0], turned[b_turned != 0], &m, &n, &k, alpha, a + i * a_next, &a_apart, b + i * b_next,
               &b_apart, beta, c + i * c_next, &c_apart);
    return OK;
}

Result curandCreateGenerator(void **generator, int) { return *generator = &something, OK; }
Result curandDestroyGenerator(void *) { return OK; }
Result curandSetPseudoRandomGeneratorSeed(void *, unsigned long long seed) { return random_bits.seed(seed), OK; }
Result curandSetStream(void *, void *) { return OK; }

Result curandGenerateNormal(void *, float *out, size_t count, float mean, float deviation) {
    return normal(out, count, mean, deviation);
}
Result curandGenerateNormalDouble(void *, double *out, size_t count, double mean, double deviation) {
    return normal(out, count, mean, deviation);
}
}
