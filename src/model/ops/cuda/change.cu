// What calibration asks of the tokens x before a block and y behind it. Behind `numbers.cu`; the Rust side and the slow
// reference implementations are in `change.rs`. Everything is read as it is and summed in f32, over forwards in f64.

// --- |x|^2, |y - x|^2 and cos(x, y) of each token: 32 threads for each -----------------------------------------------

struct TokenSums {
    RowView x, y;
    void *out;  // (batch, 3, tokens), f32
    int tokens, width, whole;
};

template <typename F>
__device__ void token_sums(const TokenSums &p) {
    const int N = F::N, batch = blockIdx.z, token = blockIdx.x * blockDim.y + threadIdx.y;
    const int width = token < p.tokens ? p.width : 0;
    const typename F::Bits *x_row = row<F>(p.x, batch, token), *y_row = row<F>(p.y, batch, token);
    float xx = 0, yy = 0, xy = 0, change = 0;
    for (int at = threadIdx.x * N; at < width; at += 32 * N) {
        float x[N], y[N];
        read<F>(x_row + at, width - at, p.whole, x);
        read<F>(y_row + at, width - at, p.whole, y);
        #pragma unroll
        for (int j = 0; j < N; j++) {
            xx += x[j] * x[j];
            yy += y[j] * y[j];
            xy += x[j] * y[j];
            change += (y[j] - x[j]) * (y[j] - x[j]);
        }
    }
    xx = sum_of_lanes(xx, 32);
    yy = sum_of_lanes(yy, 32);
    xy = sum_of_lanes(xy, 32);
    change = sum_of_lanes(change, 32);
    if (token < p.tokens && threadIdx.x == 0) {
        float *out = (float *)p.out + (long long)batch * 3 * p.tokens + token;
        out[0] = xx;
        out[p.tokens] = change;
        out[2 * p.tokens] = xy / fmaxf(sqrtf(xx) * sqrtf(yy), 1e-37f);
    }
}

// --- sums of columns: a thread for a column of pieces, of every gridDim.y-th token -----------------------------------

struct ColumnSums {
    RowView x, y;
    void *out;  // (batch, gridDim.y, 2, width), f32: of x and of y
    int tokens, width, whole;
};

template <typename F>
__device__ void column_sums(const ColumnSums &p) {
    const int N = F::N, batch = blockIdx.z;
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * N, left = p.width - at;
    if (left <= 0) return;
    float sums[2][N];
    #pragma unroll
    for (int j = 0; j < N; j++) sums[0][j] = sums[1][j] = 0;
    #pragma unroll 4
    for (int token = blockIdx.y; token < p.tokens; token += gridDim.y) {
        float x[N], y[N];
        read<F>(row<F>(p.x, batch, token) + at, left, p.whole, x);
        read<F>(row<F>(p.y, batch, token) + at, left, p.whole, y);
        #pragma unroll
        for (int j = 0; j < N; j++) {
            sums[0][j] += x[j];
            sums[1][j] += y[j];
        }
    }
    float *out = (float *)p.out + ((long long)batch * gridDim.y + blockIdx.y) * 2 * p.width + at;
    #pragma unroll
    for (int j = 0; j < N; j++) {
        if (j < left) {
            out[j] = sums[0][j];
            out[p.width + j] = sums[1][j];
        }
    }
}

// --- new products added to sums in f64: a thread for each number -----------------------------------------------------

struct AddProducts {
    RowView products;             // x'x and x'y, (2, width, width), f32
    RowView columns;              // the sums of the columns of x and of y, (2, width), f32
    const void *gram, *cross;  // the sums until now, or no data
    void *gram_out;            // z'z for z = [x, 1], (width + 1, width + 1), f64
    void *cross_out;           // z'(y - x), (width + 1, width), f64
    int tokens, width;
};

template <typename F>
__device__ void add_products(const AddProducts &p) {
    const int width = p.width, line = blockIdx.y, column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column > width) return;
    const float *x_sums = (const float *)row<F32>(p.columns, 0, 0), *y_sums = (const float *)row<F32>(p.columns, 1, 0);
    const float *xx = (const float *)row<F32>(p.products, 0, line), *xy = (const float *)row<F32>(p.products, 1, line);
    double gram;
    if (line < width) {
        gram = column < width ? xx[column] : x_sums[line];
    } else {
        gram = column < width ? x_sums[column] : p.tokens;
    }
    if (column < width) {
        const long long at = (long long)line * width + column;
        double cross = (double)(line < width ? xy[column] : y_sums[column]) - gram;
        if (p.cross) cross += ((const double *)p.cross)[at];
        ((double *)p.cross_out)[at] = cross;
    }
    const long long at = (long long)line * (width + 1) + column;
    if (p.gram) gram += ((const double *)p.gram)[at];
    ((double *)p.gram_out)[at] = gram;
}

// ---------------------------------------------------------------------------------------------------------------------

#define CHANGE_KERNEL(name, Params)                                                                                \
    extern "C" __global__ void __launch_bounds__(128) name##_f16(const Params p) { name<F16>(p); }                 \
    extern "C" __global__ void __launch_bounds__(128) name##_bf16(const Params p) { name<BF16>(p); }

CHANGE_KERNEL(token_sums, TokenSums)
CHANGE_KERNEL(column_sums, ColumnSums)
CHANGE_KERNEL(add_products, AddProducts)
