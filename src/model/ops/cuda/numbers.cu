// What all kernels share: number formats, pieces of 16 bytes, rows of tensors, sums over threads. The other sources here
// are compiled behind this one, by NVRTC when they are first needed, without a single header.

template <typename F>
union Piece {
    uint4 whole;
    unsigned words[4];
    typename F::Bits each[F::N];
};

// --- arithmetic, and number formats: N of them make a piece ----------------------------------------------------------

__device__ inline float2 from_f16(unsigned pair) {
    float2 x;
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(x.x), "=f"(x.y) : "r"(pair));
    return x;
}

__device__ inline unsigned to_f16(float first, float second) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
    return pair;
}

__device__ inline unsigned to_bf16(float first, float second) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
    return pair;
}

// Good to 2^-22, tiny results are 0.
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

struct F32 {
    typedef unsigned Bits;
    static const int N = 4;
    static __device__ void to_float(const Piece<F32> &piece, float *x) {
        #pragma unroll
        for (int i = 0; i < 4; i++) x[i] = __uint_as_float(piece.words[i]);
    }
    static __device__ void narrow(const float *x, Piece<F32> &piece) {
        #pragma unroll
        for (int i = 0; i < 4; i++) piece.words[i] = __float_as_uint(x[i]);
    }
};

struct F16 {
    typedef unsigned short Bits;
    static const int N = 8;
    static __device__ void to_float(const Piece<F16> &piece, float *x) {
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 pair = from_f16(piece.words[i]);
            x[2 * i] = pair.x;
            x[2 * i + 1] = pair.y;
        }
    }
    static __device__ void narrow(const float *x, Piece<F16> &piece) {
        #pragma unroll
        for (int i = 0; i < 4; i++) piece.words[i] = to_f16(x[2 * i], x[2 * i + 1]);
    }
};

struct BF16 {
    typedef unsigned short Bits;
    static const int N = 8;
    static __device__ void to_float(const Piece<BF16> &piece, float *x) {
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            x[2 * i] = __uint_as_float(piece.words[i] << 16);
            x[2 * i + 1] = __uint_as_float(piece.words[i] & 0xffff0000u);
        }
    }
    static __device__ void narrow(const float *x, Piece<BF16> &piece) {
        #pragma unroll
        for (int i = 0; i < 4; i++) piece.words[i] = to_bf16(x[2 * i], x[2 * i + 1]);
    }
};

// --- rows of tensors -------------------------------------------------------------------------------------------------

// A tensor (batch, tokens, width) whose rows lie in one piece each; strides in numbers, 0 if a row is read again.
struct RowView {
    const void *data;
    long long batch, token;
};

template <typename F>
__device__ const typename F::Bits *row(const RowView &rows, int batch, int token) {
    return (const typename F::Bits *)rows.data + batch * rows.batch + token * rows.token;
}

// The first `count` numbers of a piece (all that there are, if that is more), then zeros.
template <typename F>
__device__ Piece<F> load(const typename F::Bits *from, int count, int whole) {
    Piece<F> piece;
    piece.whole = make_uint4(0, 0, 0, 0);
    if (whole) {
        if (count > 0) piece.whole = __ldg((const uint4 *)from);
    } else {
        #pragma unroll
        for (int i = 0; i < F::N; i++)
            if (i < count) piece.each[i] = from[i];
    }
    return piece;
}

template <typename F>
__device__ void store(const Piece<F> &piece, typename F::Bits *to, int count, int whole) {
    if (whole) {
        if (count > 0) *(uint4 *)to = piece.whole;
    } else {
        #pragma unroll
        for (int i = 0; i < F::N; i++)
            if (i < count) to[i] = piece.each[i];
    }
}

template <typename F>
__device__ void read(const typename F::Bits *from, int count, int whole, float *x) {
    F::to_float(load<F>(from, count, whole), x);
}

template <typename F>
__device__ void write(const float *x, typename F::Bits *to, int count, int whole) {
    Piece<F> piece;
    F::narrow(x, piece);
    store<F>(piece, to, count, whole);
}

// Pieces that a thread holds of a row that a block of threads works on.
const int HELD = 4;

// The sum over `lanes` neighbouring threads, a power of two up to 32; all threads of a warp must call it.
__device__ inline float sum_of_lanes(float x, int lanes) {
    for (int apart = lanes / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
    return x;
}

__device__ inline float sum_of_block(float x) {
    __shared__ float parts[32];
    x = sum_of_lanes(x, 32);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < blockDim.x / 32; i++) x += parts[i];
    __syncthreads();  // before `parts` is written again
    return x;
}

__device__ inline float most_of_block(float x) {
    __shared__ float parts[32];
    for (int apart = 16; apart > 0; apart /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, apart));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
    for (int i = 1; i < blockDim.x / 32; i++) x = fmaxf(x, parts[i]);
    return x;
}

// The row less its mean, zero behind its end, and 1 / its deviation.
template <typename F>
__device__ float centred(const typename F::Bits *x, int width, int whole, float eps, float (&held)[HELD][F::N]) {
    const int N = F::N;
    float sum = 0;
    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = (i * blockDim.x + threadIdx.x) * N;
        read<F>(x + at, width - at, whole, held[i]);
        #pragma unroll
        for (int j = 0; j < N; j++) sum += held[i][j];
    }
    const float mean = sum_of_block(sum) / width;

    float squares = 0;
    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int left = width - (i * blockDim.x + threadIdx.x) * N;
        #pragma unroll
        for (int j = 0; j < N; j++) {
            held[i][j] = j < left ? held[i][j] - mean : 0;
            squares += held[i][j] * held[i][j];
        }
    }
    return 1 / sqrtf(sum_of_block(squares) / width + eps);
}
