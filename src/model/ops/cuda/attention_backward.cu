// The backward pass of softmax attention on tensor cores, without matrices of scores in memory. Its reference implementation is
// `plain::attention_backward`; `attention_backward.rs` compiles it, calls it and compares the two.
//
// With S = scale · Q·Kᵀ, P = softmax(S), O = P·V, dP = dO·Vᵀ and D the sum of O ∘ dO, which is that of P ∘ dP, over each row:
//     dV = Pᵀ·dO    dS = P ∘ (dP - D)    dQ = scale · dS·K    dK = scale · dSᵀ·Q
//
// Both kernels keep 128 rows of two operands in registers, 16 for each warp, while tiles of 64 rows of two others pass
// through shared memory, one being copied while another is multiplied. `attention_backward_queries` keeps Q and dO: its
// first pass over K finds the logarithm of the sum of exponentials of each row, its second pass dQ.
// `attention_backward_keys` keeps K and V, computes P and dS transposed from these, and adds up dK and dV. So each sum
// has one thread and one order, and no result depends on when it was computed. Products are accumulated in f32; P and
// dS are rounded for the second products.

// --- tensor cores and shared memory (addresses in bytes) -------------------------------------------------------------

__device__ inline unsigned shared_address(const void *at) {
    unsigned address;
    asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(address) : "l"(at));
    return address;
}

// Begins to copy 16 bytes from global to shared memory, or to write as many zeros if `bytes` is 0.
__device__ inline void copy_16_bytes(unsigned to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(bytes) : "memory");
}

// Waits for the copies of this thread.
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_all;" : : : "memory");
}

// Four matrices of 8x8 numbers of 16 bits, their rows at the addresses of lanes 0 to 7, 8 to 15, 16 to 23 and 24 to 31.
// Each lane gets the numbers 2 · (lane % 4) and one more of row lane / 4.
__device__ inline void load_matrices(unsigned (&to)[4], unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at));
}

// The same of the transposed matrices.
__device__ inline void load_transposed(unsigned (&to)[4], unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at));
}

// sum (16x8) += a (16x16) · b (16x8). Of `sum` a lane holds two columns from 2 · (lane % 4) on of row lane / 4, then of
// the row 8 below; of `a` the same of columns 0 to 7, then of columns 8 to 15; of `b` two rows from 2 · (lane % 4) on of
// column lane / 4, then 8 rows below.
__device__ inline void multiply_f16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply_bf16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

struct TensorF16 {
    static __device__ float2 unpack(unsigned pair) { return from_f16(pair); }
    static __device__ unsigned pack(float first, float second) { return to_f16(first, second); }
    static __device__ void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
        multiply_f16(sum, a, b0, b1);
    }
};

struct TensorBF16 {
    static __device__ float2 unpack(unsigned pair) {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }
    static __device__ unsigned pack(float first, float second) { return to_bf16(first, second); }
    static __device__ void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
        multiply_bf16(sum, a, b0, b1);
    }
};

// --- tiles -----------------------------------------------------------------------------------------------------------

// RowView that a block of threads keeps, 16 for each warp; rows of a tile; threads.
const int KEPT = 128, TILE = 64, THREADS = 2 * KEPT;
// Columns of S and dP that exist at a time for each warp, in the kernel that keeps queries and in the one that keeps keys.
const int QUERIES_CHUNK = 32, KEYS_CHUNK = 32;

struct AttentionBackward {
    const void *q, *k, *v;  // (batch, heads, tokens, size), contiguous
    RowView attended, grad;    // O and dO: (batch, tokens, heads · size)
    void *out;              // dQ, dK and dV: (3, batch, heads, tokens, size)
    float *sums;            // (2, batch, heads, padded): binary logarithms of the sums of exponentials, and D
    int tokens, padded;     // `padded`: the next multiple of 128
    float scale;
};

// RowView of one head in global memory.
struct Matrix {
    const unsigned short *data;
    long long stride;
};

// Begins to copy rows `first` and on, zeros from row `tokens` on. Pieces of a row lie in another order in each of 8 rows,
// so that 8 rows of a matrix lie in different banks.
template <int SIZE, int COUNT>
__device__ void copy_rows(unsigned to, const Matrix &from, int first, int tokens) {
    const int PIECES = SIZE / 8;
    #pragma unroll
    for (int i = 0; i < COUNT * PIECES / THREADS; i++) {
        const int index = i * THREADS + threadIdx.x, row = index / PIECES, piece = index % PIECES;
        const bool there = first + row < tokens;
        const unsigned short *at = from.data + (there ? first + row : 0) * from.stride + piece * 8;
        copy_16_bytes(to + row * SIZE * 2 + (piece ^ row % 8) * 16, at, there ? 16 : 0);
    }
}

// What lies at column 0 for this lane: of a 16x16 matrix that is multiplied as it lies, or transposed.
template <int SIZE>
__device__ unsigned lane_straight() {
    const int lane = threadIdx.x % 32;
    return (lane % 8 + lane / 16 * 8) * SIZE * 2 + (lane / 8 % 2 ^ lane % 8) * 16;
}

template <int SIZE>
__device__ unsigned lane_transposed() {
    const int lane = threadIdx.x % 32;
    return lane % 16 * SIZE * 2 + (lane / 16 ^ lane % 8) * 16;
}

// The rows of two operands that this warp keeps; they take the room of both buffers on their way.
template <int SIZE>
__device__ void keep(
    unsigned shared, const Matrix &a, const Matrix &b, int first, int tokens,
    unsigned (&kept_a)[SIZE / 16][4], unsigned (&kept_b)[SIZE / 16][4]
) {
    const unsigned bytes = KEPT * SIZE * 2;
    copy_rows<SIZE, KEPT>(shared, a, first, tokens);
    copy_rows<SIZE, KEPT>(shared + bytes, b, first, tokens);
    wait_for_copies();
    __syncthreads();
    const unsigned at = shared + threadIdx.x / 32 * 16 * SIZE * 2 + lane_transposed<SIZE>();
    #pragma unroll
    for (int k = 0; k < SIZE / 16; k++) {
        load_matrices(kept_a[k], at ^ k * 32);
        load_matrices(kept_b[k], (at + bytes) ^ k * 32);
    }
    __syncthreads();
}

// product (16xCOLUMNS) = kept (16xSIZE) · rowsᵀ, `rows` with `lane_straight`
template <typename F, int SIZE, int COLUMNS>
__device__ void inner(float (&product)[COLUMNS / 8][4], const unsigned (&kept)[SIZE / 16][4], unsigned rows) {
    #pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++)
        #pragma unroll
        for (int i = 0; i < 4; i++) product[n][i] = 0;
    #pragma unroll
    for (int k = 0; k < SIZE / 16; k++)
        #pragma unroll
        for (int n = 0; n < COLUMNS / 16; n++) {
            unsigned b[4];
            load_matrices(b, (rows ^ k * 32) + n * 32 * SIZE);
            F::multiply(product[2 * n], kept[k], b[0], b[1]);
            F::multiply(product[2 * n + 1], kept[k], b[2], b[3]);
        }
}

// sum (16xSIZE) += weights (16xCOLUMNS) · rows, `rows` with `lane_transposed`
template <typename F, int SIZE, int COLUMNS>
__device__ void outer(float (&sum)[SIZE / 8][4], const float (&weights)[COLUMNS / 8][4], unsigned rows) {
    #pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++) {
        const float (&left)[4] = weights[2 * k], (&right)[4] = weights[2 * k + 1];
        const unsigned a[4] = {
            F::pack(left[0], left[1]), F::pack(left[2], left[3]), F::pack(right[0], right[1]), F::pack(right[2], right[3])
        };
        #pragma unroll
        for (int n = 0; n < SIZE / 16; n++) {
            unsigned b[4];
            load_transposed(b, (rows ^ n * 32) + k * 32 * SIZE);
            F::multiply(sum[2 * n], a, b[0], b[1]);
            F::multiply(sum[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// Writes the rows of this warp, of which the first is row `first` of the head.
template <typename F, int SIZE>
__device__ void write_rows(const float (&sum)[SIZE / 8][4], float factor, unsigned short *to, int first, int tokens) {
    const int lane = threadIdx.x % 32;
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first + lane / 4 + 8 * half;
        if (row >= tokens) continue;
        unsigned *at = (unsigned *)(to + (long long)row * SIZE) + lane % 4;
        #pragma unroll
        for (int n = 0; n < SIZE / 8; n++)
            at[4 * n] = F::pack(factor * sum[n][2 * half], factor * sum[n][2 * half + 1]);
    }
}

// --- kernels ---------------------------------------------------------------------------------------------------------

const float LOG2_E = 1.442695041f;

template <typename F, int SIZE>
__device__ void attention_backward_queries(const AttentionBackward &p) {
    extern __shared__ uint4 buffers[];  // two of a tile of K and one of V
    const int C = QUERIES_CHUNK, TILE_BYTES = TILE * SIZE * 2;
    const int lane = threadIdx.x % 32, first = blockIdx.x * KEPT, mine = first + threadIdx.x / 32 * 16;
    const long long head = (long long)blockIdx.z * gridDim.y + blockIdx.y, heads = (long long)gridDim.z * gridDim.y;
    const long long skipped = head * p.tokens * SIZE;
    const Matrix q = {(const unsigned short *)p.q + skipped, SIZE}, k = {(const unsigned short *)p.k + skipped, SIZE};
    const Matrix v = {(const unsigned short *)p.v + skipped, SIZE};
    const Matrix grad = {row<BF16>(p.grad, blockIdx.z, 0) + blockIdx.y * SIZE, p.grad.token};
    const unsigned shared = shared_address(buffers);
    const unsigned straight = shared + lane_straight<SIZE>(), transposed = shared + lane_transposed<SIZE>();
    const float scale = p.scale * LOG2_E;
    unsigned kept_q[SIZE / 16][4], kept_grad[SIZE / 16][4];
    keep<SIZE>(shared, q, grad, first, p.tokens, kept_q, kept_grad);

    const int tiles = (p.tokens + TILE - 1) / TILE;
    int step = 0;  // over both passes
    // waits for the tile of this step, begins to copy the next; where this one is
    const auto next = [&](int tile) {
        wait_for_copies();
        __syncthreads();
        const unsigned at = step % 2 * 2 * TILE_BYTES, other = shared + 2 * TILE_BYTES - at;
        step++;
        if (step < 2 * tiles) {
            const int begin = (tile + 1 < tiles ? tile + 1 : 0) * TILE;
            copy_rows<SIZE, TILE>(other, k, begin, p.tokens);
            if (step >= tiles) copy_rows<SIZE, TILE>(other + TILE_BYTES, v, begin, p.tokens);
        }
        return at;
    };
    copy_rows<SIZE, TILE>(shared, k, 0, p.tokens);

    // of the rows lane / 4 and lane / 4 + 8
    const float infinite = __int_as_float(0x7f800000);
    float most[2] = {-infinite, -infinite}, exponentials[2] = {0, 0};
    for (int tile = 0; tile < tiles; tile++) {
        const unsigned at = next(tile);
        #pragma unroll
        for (int begin = 0; begin < TILE; begin += C) {
            float s[C / 8][4];
            inner<F, SIZE, C>(s, kept_q, straight + at + begin * SIZE * 2);
            const int left = p.tokens - tile * TILE - begin;
            if (left < C) {
                #pragma unroll
                for (int n = 0; n < C / 8; n++)
                    #pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (8 * n + 2 * (lane % 4) + i % 2 >= left) s[n][i] = -infinite;
            }
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                float now = most[half];
                #pragma unroll
                for (int n = 0; n < C / 8; n++) now = fmaxf(now, scale * fmaxf(s[n][2 * half], s[n][2 * half + 1]));
                now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
                now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
                exponentials[half] *= power_of_two(most[half] - now);
                most[half] = now;
                #pragma unroll
                for (int n = 0; n < C / 8; n++)
                    #pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) exponentials[half] += power_of_two(scale * s[n][i] - now);
            }
        }
    }
    float logarithm[2], mean[2];
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row_here = mine + lane / 4 + 8 * half;
        const bool there = row_here < p.tokens;
        const unsigned *o = (const unsigned *)(row<BF16>(p.attended, blockIdx.z, there ? row_here : 0) + blockIdx.y * SIZE) + lane % 4;
        float product = 0;
        #pragma unroll
        for (int k = 0; k < SIZE / 16; k++)
            #pragma unroll
            for (int right = 0; right < 2; right++) {
                const float2 a = F::unpack(o[8 * k + 4 * right]), b = F::unpack(kept_grad[k][2 * right + half]);
                product += a.x * b.x + a.y * b.y;
            }
        logarithm[half] = most[half] + log2f(sum_of_lanes(exponentials[half], 4));
        mean[half] = sum_of_lanes(product, 4);
        if (lane % 4 == 0) {
            // rows that do not exist get no weight
            p.sums[head * p.padded + row_here] = there ? logarithm[half] : infinite;
            p.sums[(heads + head) * p.padded + row_here] = there ? mean[half] : 0;
        }
    }

    float dq[SIZE / 8][4];
    #pragma unroll
    for (int n = 0; n < SIZE / 8; n++)
        #pragma unroll
        for (int i = 0; i < 4; i++) dq[n][i] = 0;
    for (int tile = 0; tile < tiles; tile++) {
        const unsigned at = next(tile);
        #pragma unroll
        for (int begin = 0; begin < TILE; begin += C) {
            float s[C / 8][4], dp[C / 8][4];
            inner<F, SIZE, C>(s, kept_q, straight + at + begin * SIZE * 2);
            inner<F, SIZE, C>(dp, kept_grad, straight + at + TILE_BYTES + begin * SIZE * 2);
            #pragma unroll
            for (int n = 0; n < C / 8; n++)
                #pragma unroll
                for (int i = 0; i < 4; i++)
                    dp[n][i] = power_of_two(scale * s[n][i] - logarithm[i / 2]) * (dp[n][i] - mean[i / 2]);
            const int left = p.tokens - tile * TILE - begin;
            if (left < C) {
                #pragma unroll
                for (int n = 0; n < C / 8; n++)
                    #pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (8 * n + 2 * (lane % 4) + i % 2 >= left) dp[n][i] = 0;
            }
            outer<F, SIZE, C>(dq, dp, transposed + at + begin * SIZE * 2);
        }
    }
    write_rows<F, SIZE>(dq, p.scale, (unsigned short *)p.out + skipped, mine, p.tokens);
}

template <typename F, int SIZE>
__device__ void attention_backward_keys(const AttentionBackward &p) {
    extern __shared__ uint4 buffers[];  // two of a tile of Q and one of dO, then two of both sums of 64 rows
    const int C = KEYS_CHUNK, TILE_BYTES = TILE * SIZE * 2;
    const int lane = threadIdx.x % 32, first = blockIdx.x * KEPT, mine = first + threadIdx.x / 32 * 16;
    const long long head = (long long)blockIdx.z * gridDim.y + blockIdx.y, heads = (long long)gridDim.z * gridDim.y;
    const long long skipped = head * p.tokens * SIZE;
    const Matrix q = {(const unsigned short *)p.q + skipped, SIZE}, k = {(const unsigned short *)p.k + skipped, SIZE};
    const Matrix v = {(const unsigned short *)p.v + skipped, SIZE};
    const Matrix grad = {row<BF16>(p.grad, blockIdx.z, 0) + blockIdx.y * SIZE, p.grad.token};
    const unsigned shared = shared_address(buffers);
    const unsigned straight = shared + lane_straight<SIZE>(), transposed = shared + lane_transposed<SIZE>();
    const float *sums = (const float *)(buffers + 4 * TILE_BYTES / 16);
    const float scale = p.scale * LOG2_E;
    unsigned kept_k[SIZE / 16][4], kept_v[SIZE / 16][4];
    keep<SIZE>(shared, k, v, first, p.tokens, kept_k, kept_v);

    const auto copy_tile = [&](int tile) {
        const int buffer = tile % 2, begin = tile * TILE;
        const unsigned to = shared + buffer * 2 * TILE_BYTES;
        copy_rows<SIZE, TILE>(to, q, begin, p.tokens);
        copy_rows<SIZE, TILE>(to + TILE_BYTES, grad, begin, p.tokens);
        if (threadIdx.x < 2 * TILE / 4) {
            const int which = threadIdx.x / (TILE / 4), piece = threadIdx.x % (TILE / 4) * 4;
            const float *from = p.sums + (which * heads + head) * p.padded + begin + piece;
            copy_16_bytes(shared + 4 * TILE_BYTES + ((buffer * 2 + which) * TILE + piece) * 4, from, 16);
        }
    };
    copy_tile(0);

    float dk[SIZE / 8][4], dv[SIZE / 8][4];
    #pragma unroll
    for (int n = 0; n < SIZE / 8; n++)
        #pragma unroll
        for (int i = 0; i < 4; i++) dk[n][i] = dv[n][i] = 0;
    const int tiles = (p.tokens + TILE - 1) / TILE;
    for (int tile = 0; tile < tiles; tile++) {
        wait_for_copies();
        __syncthreads();
        if (tile + 1 < tiles) copy_tile(tile + 1);
        const unsigned at = tile % 2 * 2 * TILE_BYTES;
        const float *sums_here = sums + tile % 2 * 2 * TILE + 2 * (lane % 4);
        #pragma unroll
        for (int begin = 0; begin < TILE; begin += C) {
            float s[C / 8][4], dp[C / 8][4];
            inner<F, SIZE, C>(s, kept_k, straight + at + begin * SIZE * 2);
            inner<F, SIZE, C>(dp, kept_v, straight + at + TILE_BYTES + begin * SIZE * 2);
            #pragma unroll
            for (int n = 0; n < C / 8; n++) {
                const float2 logarithm = *(const float2 *)(sums_here + begin + 8 * n);
                const float2 mean = *(const float2 *)(sums_here + TILE + begin + 8 * n);
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    s[n][i] = power_of_two(scale * s[n][i] - (i % 2 ? logarithm.y : logarithm.x));
                    dp[n][i] = s[n][i] * (dp[n][i] - (i % 2 ? mean.y : mean.x));
                }
            }
            outer<F, SIZE, C>(dv, s, transposed + at + TILE_BYTES + begin * SIZE * 2);
            outer<F, SIZE, C>(dk, dp, transposed + at + begin * SIZE * 2);
        }
    }
    const long long all = heads * p.tokens * SIZE;
    write_rows<F, SIZE>(dk, p.scale, (unsigned short *)p.out + all + skipped, mine, p.tokens);
    write_rows<F, SIZE>(dv, 1, (unsigned short *)p.out + 2 * all + skipped, mine, p.tokens);
}

#define ATTENTION_KERNEL(name)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) name##_f16(const AttentionBackward p) {                  \
        name<TensorF16, 128>(p);                                                                                   \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) name##_bf16(const AttentionBackward p) {                 \
        name<TensorBF16, 128>(p);                                                                                  \
    }

ATTENTION_KERNEL(attention_backward_queries)
ATTENTION_KERNEL(attention_backward_keys)
