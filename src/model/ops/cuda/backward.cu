// The backward passes of what lies between the matrix products. Each thread moves pieces of 16 bytes, everything is computed
// in f32 and rounded once, as in `kernels.cu`; `backward.rs` compares them with candle's gradients of the compositions.

// --- the gradient of x from that of gelu(x + bias): a thread for a column of pieces, of every gridDim.y-th token ------

struct GeluBackward {
    RowView x, bias, grad;  // bias may have no data
    void *out;              // rows of `stride` numbers
    int tokens, width, stride, whole;
};

// s + 2x s (1 - s) du/dx with s = sigmoid(2u): the derivative of the tanh approximation.
__device__ inline float gelu_slope(float x) {
    const float square = x * x, u = 0.7978846f * x * (1 + 0.044715f * square);
    const float s = reciprocal(1 + power_of_two(-2.885390082f * u));
    return s + 2 * x * s * (1 - s) * 0.7978846f * (1 + 0.134145f * square);
}

template <typename F>
__device__ void gelu_backward(const GeluBackward &p) {
    const int N = F::N, batch = blockIdx.z;
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * N, left = p.width - at;
    if (left <= 0) return;
    float bias[N];
    #pragma unroll
    for (int j = 0; j < N; j++) bias[j] = 0;
    if (p.bias.data) read<F>(row<F>(p.bias, batch, 0) + at, left, p.whole, bias);
    for (int token = blockIdx.y; token < p.tokens; token += gridDim.y) {
        float x[N], grad[N];
        read<F>(row<F>(p.x, batch, token) + at, left, p.whole, x);
        read<F>(row<F>(p.grad, batch, token) + at, left, p.whole, grad);
        #pragma unroll
        for (int j = 0; j < N; j++) grad[j] *= gelu_slope(x[j] + bias[j]);
        const long long to = ((long long)batch * p.tokens + token) * p.stride;
        write<F>(grad, (typename F::Bits *)p.out + to + at, left, p.whole);
    }
}

// --- the gradients of both halves of x from that of silu(a) b, x = [a, b]: threads as above ---------------------------

struct SwigluBackward {
    RowView x, grad;
    void *out;  // (batch, tokens, 2 width)
    int tokens, width, whole;
};

template <typename F>
__device__ void swiglu_backward(const SwigluBackward &p) {
    const int N = F::N, batch = blockIdx.z;
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * N, left = p.width - at;
    if (left <= 0) return;
    for (int token = blockIdx.y; token < p.tokens; token += gridDim.y) {
        float a[N], b[N], grad[N];
        const typename F::Bits *x = row<F>(p.x, batch, token) + at;
        read<F>(x, left, p.whole, a);
        read<F>(x + p.width, left, p.whole, b);
        read<F>(row<F>(p.grad, batch, token) + at, left, p.whole, grad);
        #pragma unroll
        for (int j = 0; j < N; j++) {
            const float s = reciprocal(1 + power_of_two(-1.442695041f * a[j])), silu = a[j] * s;
            a[j] = grad[j] * b[j] * (s + silu * (1 - s));
            b[j] = grad[j] * silu;
        }
        typename F::Bits *out = (typename F::Bits *)p.out + ((long long)batch * p.tokens + token) * 2 * p.width + at;
        write<F>(a, out, left, p.whole);
        write<F>(b, out + p.width, left, p.whole);
    }
}

// --- the gradient of x from that of layer_norm(x) (1 + scale) + shift: a block of threads for each row ----------------

struct NormBackward {
    RowView x, scale, grad;
    void *out;    // the gradient of x
    void *along;  // grad times the normed x, whose sum over the tokens is the gradient of scale
    int width, whole;
    float eps;
};

// With n the normed row and d = grad (1 + scale): (d - mean(d) - n mean(d n)) / deviation.
template <typename F>
__device__ void norm_backward(const NormBackward &p) {
    const int N = F::N, token = blockIdx.x, batch = blockIdx.z;
    const typename F::Bits *x = row<F>(p.x, batch, token), *scale = row<F>(p.scale, batch, 0);
    const typename F::Bits *grad = row<F>(p.grad, batch, token);
    const long long to = ((long long)batch * gridDim.x + token) * p.width;
    float held[HELD][N], moved[HELD][N];
    const float factor = centred<F>(x, p.width, p.whole, p.eps, held);

    float along_one = 0, along_normed = 0;
    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * N, left = p.width - at;
        float times[N], along[N];
        read<F>(grad + at, left, p.whole, moved[i]);
        read<F>(scale + at, left, p.whole, times);
        #pragma unroll
        for (int j = 0; j < N; j++) {
            held[i][j] *= factor;
            along[j] = moved[i][j] * held[i][j];
            moved[i][j] *= 1 + times[j];
            along_one += moved[i][j];
            along_normed += moved[i][j] * held[i][j];
        }
        write<F>(along, (typename F::Bits *)p.along + to + at, left, p.whole);
    }
    along_one = sum_of_block(along_one) / p.width;
    along_normed = sum_of_block(along_normed) / p.width;

    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * N;
        #pragma unroll
        for (int j = 0; j < N; j++) moved[i][j] = factor * (moved[i][j] - along_one - held[i][j] * along_normed);
        write<F>(moved[i], (typename F::Bits *)p.out + to + at, p.width - at, p.whole);
    }
}

// --- the gradient of a projection from those of its heads: a block for each token, as `heads` has ----------------------

struct HeadsBackward {
    RowView qkv, bias, query, key;  // bias may have no data
    const float *cos, *sin;         // as in `Heads`
    const void *grad;               // (3, batch, heads, total, size), read from token `first` on
    void *out;                      // rows of `stride` numbers
    int number, size, first, total, stride, whole;
    float eps;
};

// With n the normed query or key and d the gradient turned back, times the norm's weight: (d - n mean(d n)) / rms.
template <typename F>
__device__ void heads_backward(const HeadsBackward &p) {
    const int N = F::N, batch = blockIdx.z, token = p.first + blockIdx.x;
    const int at = threadIdx.x * N, left = p.size - at;
    const typename F::Bits *x_row = row<F>(p.qkv, batch, blockIdx.x), *bias_row = row<F>(p.bias, 0, 0);
    typename F::Bits *out = (typename F::Bits *)p.out + ((long long)batch * gridDim.x + blockIdx.x) * p.stride;
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
        const long long from = (((long long)which * gridDim.z + batch) * p.number + head) * p.total + token;
        float x[N], grad[N], factor[N];
        read<F>((const typename F::Bits *)p.grad + from * p.size + at, count, p.whole, grad);
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
        const float rms = 1 / sqrtf(sum_of_lanes(squares, blockDim.x) / p.size + p.eps);
        if (which < 2) {
            read<F>(row<F>(which == 0 ? p.query : p.key, 0, 0) + at, count, p.whole, factor);
            #pragma unroll
            for (int j = 0; j < N; j += 2) {
                const float first = grad[j] * cosine[j / 2] + grad[j + 1] * sine[j / 2];
                const float second = grad[j + 1] * cosine[j / 2] - grad[j] * sine[j / 2];
                grad[j] = first * factor[j];
                grad[j + 1] = second * factor[j + 1];
            }
        }
        float along = 0;
        #pragma unroll
        for (int j = 0; j < N; j++) {
            x[j] *= rms;
            along += grad[j] * x[j];
        }
        along = sum_of_lanes(along, blockDim.x) / p.size;
        if (which < 2) {
            #pragma unroll
            for (int j = 0; j < N; j++) grad[j] = rms * (grad[j] - x[j] * along);
        }
        write<F>(grad, out + index * p.size + at, count, p.whole);
    }
}

// --- the gradients of y and, in parts, of gate from that of x + gate (y + bias): threads as for GELU ------------------

struct ResidualBackward {
    RowView y, bias, gate, grad;  // bias may have no data
    void *out;                    // the gradient of y
    void *sums;                   // (batch, gridDim.y, width), f32: that of gate, of every gridDim.y-th token
    int tokens, width, whole;
};

template <typename F>
__device__ void residual_backward(const ResidualBackward &p) {
    const int N = F::N, batch = blockIdx.z;
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * N, left = p.width - at;
    if (left <= 0) return;
    float bias[N], gate[N], sums[N];
    #pragma unroll
    for (int j = 0; j < N; j++) bias[j] = sums[j] = 0;
    if (p.bias.data) read<F>(row<F>(p.bias, batch, 0) + at, left, p.whole, bias);
    read<F>(row<F>(p.gate, batch, 0) + at, left, p.whole, gate);
    for (int token = blockIdx.y; token < p.tokens; token += gridDim.y) {
        float y[N], grad[N];
        read<F>(row<F>(p.y, batch, token) + at, left, p.whole, y);
        read<F>(row<F>(p.grad, batch, token) + at, left, p.whole, grad);
        #pragma unroll
        for (int j = 0; j < N; j++) {
            sums[j] += grad[j] * (y[j] + bias[j]);
            grad[j] *= gate[j];
        }
        const long long to = ((long long)batch * p.tokens + token) * p.width;
        write<F>(grad, (typename F::Bits *)p.out + to + at, left, p.whole);
    }
    float *to = (float *)p.sums + ((long long)batch * gridDim.y + blockIdx.y) * p.width + at;
    #pragma unroll
    for (int j = 0; j < N; j++)
        if (j < left) to[j] = sums[j];
}

// --- a x + b y: a thread for each piece ------------------------------------------------------------------------------

struct WeightedSum {
    RowView x, y;
    void *out;
    long long len;
    float a, b;
    int whole;
};

template <typename F>
__device__ void weighted_sum(const WeightedSum &p) {
    const int N = F::N;
    const long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (at >= p.len) return;
    const int left = p.len - at < N ? (int)(p.len - at) : N;
    float x[N], y[N];
    read<F>(row<F>(p.x, 0, 0) + at, left, p.whole, x);
    read<F>(row<F>(p.y, 0, 0) + at, left, p.whole, y);
    #pragma unroll
    for (int j = 0; j < N; j++) x[j] = p.a * x[j] + p.b * y[j];
    write<F>(x, (typename F::Bits *)p.out + at, left, p.whole);
}

// ---------------------------------------------------------------------------------------------------------------------

#define BACKWARD_KERNEL(name, Params, threads)                                                                     \
    extern "C" __global__ void __launch_bounds__(threads) name##_f32(const Params p) { name<F32>(p); }             \
    extern "C" __global__ void __launch_bounds__(threads) name##_f16(const Params p) { name<F16>(p); }             \
    extern "C" __global__ void __launch_bounds__(threads) name##_bf16(const Params p) { name<BF16>(p); }

BACKWARD_KERNEL(gelu_backward, GeluBackward, 128)
BACKWARD_KERNEL(swiglu_backward, SwigluBackward, 128)
BACKWARD_KERNEL(norm_backward, NormBackward, 512)
BACKWARD_KERNEL(heads_backward, HeadsBackward, 128)
BACKWARD_KERNEL(residual_backward, ResidualBackward, 128)
BACKWARD_KERNEL(weighted_sum, WeightedSum, 128)
