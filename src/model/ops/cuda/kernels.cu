// What lies between the matrix products, for NVIDIA GPUs. Each kernel has a reference implementation of the same name next to the CPU
// kernels, and `check.rs` compares the two. The parameters' Rust side is in `launch.rs`, `calls.rs` says how many threads
// each kernel gets.
//
// The kernels wait for memory, so a thread moves 16 bytes at a time (a piece) and nothing is read twice. Everything is
// computed in f32 and rounded once. If rows do not begin on 16 bytes (`whole` is 0) a piece is moved number by number.

// --- layer_norm(x) · (1 + scale) + shift: a block of threads for each row, which is held in registers ----------------

struct NormModulate {
    RowView x, shift, scale;
    void *out;
    int width, whole;
    float eps;
};

template <typename F>
__device__ void norm_modulate(const NormModulate &p) {
    const int N = F::N, token = blockIdx.x, batch = blockIdx.z;
    const typename F::Bits *x = row<F>(p.x, batch, token);
    const typename F::Bits *shift = row<F>(p.shift, batch, 0), *scale = row<F>(p.scale, batch, 0);
    typename F::Bits *out = (typename F::Bits *)p.out + ((long long)batch * gridDim.x + token) * p.width;
    float held[HELD][N];
    const float factor = centred<F>(x, p.width, p.whole, p.eps, held);

    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * N;
        float add[N], times[N];
        read<F>(shift + at, p.width - at, p.whole, add);
        read<F>(scale + at, p.width - at, p.whole, times);
        #pragma unroll
        for (int j = 0; j < N; j++) held[i][j] = held[i][j] * factor * (1 + times[j]) + add[j];
        write<F>(held[i], out + at, p.width - at, p.whole);
    }
}

// --- softmax(x) of rows in f32, rounded: a block of threads for each row, which is held in registers -----------------

struct Softmax {
    RowView x;  // (rows, width), f32
    void *out;
    int width, whole;
};

template <typename F>
__device__ void softmax(const Softmax &p) {
    const int N = F::N;
    const unsigned *x = row<F32>(p.x, blockIdx.x, 0);
    typename F::Bits *out = (typename F::Bits *)p.out + (long long)blockIdx.x * p.width;
    float held[HELD][N];

    float most = -3.4028235e38f;
    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * N, left = p.width - at;
        #pragma unroll
        for (int part = 0; part < N; part += 4) read<F32>(x + at + part, left - part, p.whole, held[i] + part);
        #pragma unroll
        for (int j = 0; j < N; j++)
            if (j < left) most = fmaxf(most, held[i][j]);
    }
    most = most_of_block(most);

    float sum = 0;
    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int left = p.width - (i * blockDim.x + threadIdx.x) * N;
        #pragma unroll
        for (int j = 0; j < N; j++) {
            held[i][j] = power_of_two(1.442695041f * (held[i][j] - most));
            if (j < left) sum += held[i][j];
        }
    }
    const float factor = 1 / sum_of_block(sum);

    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * N;
        #pragma unroll
        for (int j = 0; j < N; j++) held[i][j] *= factor;
        write<F>(held[i], out + at, p.width - at, p.whole);
    }
}

// --- x + gate · (y + bias): a thread for a column of pieces, of every gridDim.y-th token -----------------------------

struct GatedResidual {
    RowView x, y, bias, gate;  // bias and gate may have no data: 0 and 1
    void *out;              // (batch, total, width), written from token `first` on
    int tokens, width, first, total, whole;
};

template <typename F>
__device__ void gated_residual(const GatedResidual &p) {
    const int N = F::N, batch = blockIdx.z;
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * N, left = p.width - at;
    if (left <= 0) return;
    float bias[N], gate[N];
    #pragma unroll
    for (int j = 0; j < N; j++) {
        bias[j] = 0;
        gate[j] = 1;
    }
    if (p.bias.data) read<F>(row<F>(p.bias, batch, 0) + at, left, p.whole, bias);
    if (p.gate.data) read<F>(row<F>(p.gate, batch, 0) + at, left, p.whole, gate);
    for (int token = blockIdx.y; token < p.tokens; token += gridDim.y) {
        float x[N], y[N];
        read<F>(row<F>(p.x, batch, token) + at, left, p.whole, x);
        read<F>(row<F>(p.y, batch, token) + at, left, p.whole, y);
        #pragma unroll
        for (int j = 0; j < N; j++) x[j] += gate[j] * (y[j] + bias[j]);
        const long long to = (long long)batch * p.total + p.first + token;
        write<F>(x, (typename F::Bits *)p.out + to * p.width + at, left, p.whole);
    }
}

// --- bias, RMS norm, rotation and layout: a block for each token, blockDim.x threads for each query, key or value ----

struct Heads {
    RowView qkv, bias, query, key;  // bias may have no data
    const float *cos, *sin;      // (total, size): cosines twice each, sines negated for the first of a pair
    void *out;                   // (3, batch, heads, total, size), written from token `first` on
    int number, size, first, total, whole;  // number of heads, and their size
    float eps;
};

template <typename F>
__device__ void heads(const Heads &p) {
    const int N = F::N, batch = blockIdx.z, token = p.first + blockIdx.x;
    const int at = threadIdx.x * N, left = p.size - at;
    const typename F::Bits *x_row = row<F>(p.qkv, batch, blockIdx.x), *bias_row = row<F>(p.bias, 0, 0);
    float cosine[N / 2], sine[N / 2];
    #pragma unroll
    for (int part = 0; part < N / 4; part++) {
        const long long from = (long long)token * p.size + at + 4 * part;
        float four[4];
        read<F32>((const unsigned *)p.cos + from, left - 4 * part, p.whole, four);
        cosine[2 * part] = four[1];
        cosine[2 * part + 1] = four[3];
        read<F32>((const unsigned *)p.sin + from, left - 4 * part, p.whole, four);
        sine[2 * part] = four[1];
        sine[2 * part + 1] = four[3];
    }
    // all threads go round equally often, for the sums
    for (int begin = 0; begin < 3 * p.number; begin += blockDim.y) {
        const int index = begin + threadIdx.y, count = index < 3 * p.number ? left : 0;
        const int which = (index >= p.number) + (index >= 2 * p.number), head = index - which * p.number;
        float x[N], factor[N];
        read<F>(x_row + index * p.size + at, count, p.whole, x);
        if (p.bias.data) {
            float bias[N];
            read<F>(bias_row + index * p.size + at, count, p.whole, bias);
            #pragma unroll
            for (int j = 0; j < N; j++) x[j] += bias[j];
        }
        float squares = 0;
        #pragma unroll
        for (int j = 0; j < N; j++) squares += x[j] * x[j];
        squares = sum_of_lanes(squares, blockDim.x);
        if (which < 2) {
            const float rms = 1 / sqrtf(squares / p.size + p.eps);
            read<F>(row<F>(which == 0 ? p.query : p.key, 0, 0) + at, count, p.whole, factor);
            #pragma unroll
            for (int j = 0; j < N; j += 2) {
                const float first = x[j] * (rms * factor[j]), second = x[j + 1] * (rms * factor[j + 1]);
                x[j] = first * cosine[j / 2] - second * sine[j / 2];
                x[j + 1] = second * cosine[j / 2] + first * sine[j / 2];
            }
        }
        const long long to = (((long long)which * gridDim.z + batch) * p.number + head) * p.total + token;
        write<F>(x, (typename F::Bits *)p.out + to * p.size + at, count, p.whole);
    }
}

// --- prefix ‖ gelu(x + bias): a thread for a column of pieces, of every gridDim.y-th token ---------------------------

struct Gelu {
    RowView x, bias, prefix;  // bias and prefix may have no data
    void *out;             // (batch, tokens, front + width)
    int tokens, front, width, whole;
};

// x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): the tanh approximation.
__device__ inline float gelu_of(float x) {
    const float u = 0.7978846f * x * (1 + 0.044715f * x * x);
    return x * reciprocal(1 + power_of_two(-2.885390082f * u));
}

template <typename F>
__device__ void gelu(const Gelu &p) {
    const int N = F::N, batch = blockIdx.z, index = blockIdx.x * blockDim.x + threadIdx.x;
    const int pieces = (p.front + N - 1) / N;  // of what is copied
    const bool copied = index < pieces;
    const int at = (copied ? index : index - pieces) * N, left = (copied ? p.front : p.width) - at;
    if (left <= 0) return;
    float bias[N];
    #pragma unroll
    for (int j = 0; j < N; j++) bias[j] = 0;
    if (p.bias.data && !copied) read<F>(row<F>(p.bias, batch, 0) + at, left, p.whole, bias);
    for (int token = blockIdx.y; token < p.tokens; token += gridDim.y) {
        Piece<F> piece = load<F>(row<F>(copied ? p.prefix : p.x, batch, token) + at, left, p.whole);
        if (!copied) {
            float x[N];
            F::to_float(piece, x);
            #pragma unroll
            for (int j = 0; j < N; j++) x[j] = gelu_of(x[j] + bias[j]);
            F::narrow(x, piece);
        }
        const long long to = ((long long)batch * p.tokens + token) * (p.front + p.width);
        store<F>(piece, (typename F::Bits *)p.out + to + (copied ? 0 : p.front) + at, left, p.whole);
    }
}

// --- prefix ‖ silu(a) b, x = [a, b]: threads as in `gelu` -------------------------------------------------------------

struct Swiglu {
    RowView x, prefix;  // prefix may have no data
    void *out;          // (batch, tokens, front + width)
    int tokens, front, width, whole;
};

template <typename F>
__device__ void swiglu(const Swiglu &p) {
    const int N = F::N, batch = blockIdx.z, index = blockIdx.x * blockDim.x + threadIdx.x;
    const int pieces = (p.front + N - 1) / N;  // of what is copied
    const bool copied = index < pieces;
    const int at = (copied ? index : index - pieces) * N, left = (copied ? p.front : p.width) - at;
    if (left <= 0) return;
    for (int token = blockIdx.y; token < p.tokens; token += gridDim.y) {
        const typename F::Bits *from = row<F>(copied ? p.prefix : p.x, batch, token) + at;
        Piece<F> piece = load<F>(from, left, p.whole);
        if (!copied) {
            float a[N], b[N];
            F::to_float(piece, a);
            read<F>(from + p.width, left, p.whole, b);
            #pragma unroll
            for (int j = 0; j < N; j++) a[j] *= reciprocal(1 + power_of_two(-1.442695041f * a[j])) * b[j];
            F::narrow(a, piece);
        }
        const long long to = ((long long)batch * p.tokens + token) * (p.front + p.width);
        store<F>(piece, (typename F::Bits *)p.out + to + (copied ? 0 : p.front) + at, left, p.whole);
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#define KERNEL(name, Params, threads)                                                                              \
    extern "C" __global__ void __launch_bounds__(threads) name##_f32(const Params p) { name<F32>(p); }             \
    extern "C" __global__ void __launch_bounds__(threads) name##_f16(const Params p) { name<F16>(p); }             \
    extern "C" __global__ void __launch_bounds__(threads) name##_bf16(const Params p) { name<BF16>(p); }

KERNEL(norm_modulate, NormModulate, 512)
KERNEL(softmax, Softmax, 1024)
KERNEL(gated_residual, GatedResidual, 128)
KERNEL(heads, Heads, 128)
KERNEL(gelu, Gelu, 128)
KERNEL(swiglu, Swiglu, 128)
