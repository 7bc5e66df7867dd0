// What CUDA C++ has and C++ has not, for kernels that are compiled for the CPU: indices, barriers and shuffles
// (`driver.cpp`), number formats, arithmetic. Takes the place of cuda_fp16.h, cuda_bf16.h and cuda_fp8.h.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
// blocks run one after the other
#define __shared__ static

using std::isinf;
using std::isnan;
using std::signbit;

// --- threads -----------------------------------------------------------------------------------------------------------

struct Index {
    unsigned x, y, z;
};
extern "C" {
extern Index emulated_thread, emulated_block, emulated_block_size, emulated_grid_size;
extern char emulated_shared[];
void emulated_wait_block();
void emulated_wait_warp();
void *emulated_slot(int lane);
void emulated_copy_later(unsigned to, const void *from, int bytes);
void emulated_finish_copies();
int emulated_lane();
void emulated_register(const char *name, void (*call)(void *, void **), void *function, bool waits);
}
#define threadIdx emulated_thread
#define blockIdx emulated_block
#define blockDim emulated_block_size
#define gridDim emulated_grid_size
#define __syncthreads emulated_wait_block

inline void __syncwarp(unsigned = 0) { emulated_wait_warp(); }

template <typename T> T emulated_exchange(T value, int lane) {
    memcpy(emulated_slot(emulated_lane()), &value, sizeof value);
    emulated_wait_warp();
    memcpy(&value, emulated_slot(lane & 31), sizeof value);
    emulated_wait_warp();
    return value;
}
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
    return emulated_exchange(value, emulated_lane() ^ mask);
}
template <typename T> T __shfl_sync(unsigned, T value, int lane, int width = 32) {
    return emulated_exchange(value, (emulated_lane() & ~(width - 1)) | (lane & (width - 1)));
}
template <typename T> T __shfl_down_sync(unsigned, T value, int by, int width = 32) {
    const int lane = emulated_lane();
    return emulated_exchange(value, lane % width + by < width ? lane + by : lane);
}

template <typename T> T atomicAdd(T *at, T value) {
    T old = *at;
    *at = old + value;
    return old;
}
template <typename T, typename U> T atomicMax(T *at, U value) {
    T old = *at;
    *at = old > (T)value ? old : (T)value;
    return old;
}
template <typename T, typename U> T atomicMin(T *at, U value) {
    T old = *at;
    *at = old < (T)value ? old : (T)value;
    return old;
}
template <typename T> T atomicCAS(T *at, T compare, T value) {
    T old = *at;
    if (old == compare) *at = value;
    return old;
}

// --- vectors and bits ------------------------------------------------------------------------------------------------

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct int2 {
    int x, y;
};
struct int4 {
    int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }

template <typename T> T __ldg(const T *at) { return *at; }

template <typename To, typename From> To emulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }
inline long long __double_as_longlong(double x) { return emulated_bits<long long>(x); }

// four signed bytes in a number
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += (int8_t)(a >> i) * (int8_t)(b >> i);
    return sum;
}
inline int __vsubss4(int a, int b) {
    unsigned all = 0;
    for (int i = 0; i < 32; i += 8)
        all |= (std::clamp((int8_t)(a >> i) - (int8_t)(b >> i), -128, 127) & 0xffu) << i;
    return (int)all;
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

template <typename A, typename B> std::common_type_t<A, B> emulated_min(A a, B b) {
    using C = std::common_type_t<A, B>;
    return (C)a < (C)b ? (C)a : (C)b;
}
template <typename A, typename B> std::common_type_t<A, B> emulated_max(A a, B b) {
    using C = std::common_type_t<A, B>;
    return (C)a > (C)b ? (C)a : (C)b;
}
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float normcdff(float x) { return 0.5f * erfcf(-x * (float)M_SQRT1_2); }
inline double normcdf(double x) { return 0.5 * erfc(-x * M_SQRT1_2); }

// --- numbers of 16 bits: computed in f32, rounded to the nearest, ties to even ------------------------------------------

inline float emulated_from_half(uint16_t x) { return (float)emulated_bits<_Float16>(x); }
inline uint16_t emulated_to_half(float x) { return emulated_bits<uint16_t>((_Float16)x); }
inline float emulated_from_bfloat(uint16_t x) { return emulated_bits<float>((uint32_t)x << 16); }
inline uint16_t emulated_to_bfloat(float x) {
    uint32_t bits = emulated_bits<uint32_t>(x);
    if (std::isnan(x)) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#define NUMBER(T, FROM, TO)                                                                                                  \
    struct T {                                                                                                               \
        unsigned short x;                                                                                                    \
        T() = default;                                                                                                       \
        template <typename N, typename = std::enable_if_t<std::is_arithmetic_v<N>>> T(N n) : x(TO((float)n)) {}              \
        operator float() const { return FROM(x); }                                                                           \
        T operator-() const {                                                                                                \
            T y;                                                                                                             \
            y.x = x ^ 0x8000;                                                                                                \
            return y;                                                                                                        \
        }                                                                                                                    \
    };                                                                                                                       \
    inline T operator+(T a, T b) { return (float)a + (float)b; }                                                             \
    inline T operator-(T a, T b) { return (float)a - (float)b; }                                                             \
    inline T operator*(T a, T b) { return (float)a * (float)b; }                                                             \
    inline T operator/(T a, T b) { return (float)a / (float)b; }                                                             \
    inline T &operator+=(T &a, T b) { return a = a + b; }                                                                    \
    inline T &operator-=(T &a, T b) { return a = a - b; }                                                                    \
    inline T &operator*=(T &a, T b) { return a = a * b; }                                                                    \
    inline T &operator/=(T &a, T b) { return a = a / b; }                                                                    \
    inline bool operator<(T a, T b) { return (float)a < (float)b; }                                                          \
    inline bool operator>(T a, T b) { return (float)a > (float)b; }                                                          \
    inline bool operator<=(T a, T b) { return (float)a <= (float)b; }                                                        \
    inline bool operator>=(T a, T b) { return (float)a >= (float)b; }                                                        \
    inline bool operator==(T a, T b) { return (float)a == (float)b; }                                                        \
    inline bool operator!=(T a, T b) { return (float)a != (float)b; }                                                        \
    inline bool __hisnan(T a) { return std::isnan((float)a); }                                                               \
    inline T hsqrt(T a) { return sqrtf(a); }                                                                                 \
    inline T hcos(T a) { return cosf(a); }                                                                                   \
    inline T hsin(T a) { return sinf(a); }                                                                                   \
    inline T hlog(T a) { return logf(a); }                                                                                   \
    inline T hexp(T a) { return expf(a); }                                                                                   \
    inline T __habs(T a) { return fabsf(a); }                                                                                \
    inline T __hmax_nan(T a, T b) { return __hisnan(a) ? a : __hisnan(b) ? b : a > b ? a : b; }                              \
    inline T __hmin_nan(T a, T b) { return __hisnan(a) ? a : __hisnan(b) ? b : a < b ? a : b; }                              \
    inline T __hmul(T a, T b) { return a * b; }                                                                              \
    struct T##2 {                                                                                                            \
        T x, y;                                                                                                              \
    };                                                                                                                       \
    inline T##2 __hadd2(T##2 a, T##2 b) { return {a.x + b.x, a.y + b.y}; }                                                   \
    inline T##2 __hsub2(T##2 a, T##2 b) { return {a.x - b.x, a.y - b.y}; }                                                   \
    inline T##2 __hmul2(T##2 a, T##2 b) { return {a.x * b.x, a.y * b.y}; }                                                   \
    inline T##2 __h2div(T##2 a, T##2 b) { return {a.x / b.x, a.y / b.y}; }

NUMBER(__half, emulated_from_half, emulated_to_half)
NUMBER(__nv_bfloat16, emulated_from_bfloat, emulated_to_bfloat)
using half = __half;
using half2 = __half2;
using __nv_bfloat162 = __nv_bfloat162;

struct __half_raw {
    unsigned short x;
};
inline float __half2float(__half x) { return x; }
inline float __half2float(__half_raw x) { return emulated_from_half(x.x); }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline unsigned short __half_as_ushort(__half x) { return x.x; }
inline __half __ushort_as_half(unsigned short bits) { return emulated_bits<__half>(bits); }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return emulated_bits<__nv_bfloat16>(bits); }
inline __half __low2half(half2 x) { return x.x; }
inline __half __high2half(half2 x) { return x.y; }
inline float __low2float(half2 x) { return x.x; }
inline float __high2float(half2 x) { return x.y; }
inline float2 __half22float2(half2 x) { return {x.x, x.y}; }
inline half2 make_half2(__half x, __half y) { return {x, y}; }

// --- tensor cores: each lane shows its part to the others ----------------------------------------------------------------

inline void emulated_load_matrices(unsigned (&to)[4], unsigned at, bool transposed) {
    memcpy(emulated_slot(emulated_lane()), &at, sizeof at);
    emulated_wait_warp();
    const int group = emulated_lane() / 4, pair = emulated_lane() % 4 * 2;
    for (int i = 0; i < 4; i++) {
        uint16_t both[2];
        for (int half = 0; half < 2; half++) {
            const int row = transposed ? pair + half : group, column = transposed ? group : pair + half;
            unsigned from;
            memcpy(&from, emulated_slot(8 * i + row), sizeof from);
            if (from % 16) abort();
            memcpy(&both[half], emulated_shared + from + 2 * column, sizeof both[half]);
        }
        to[i] = both[0] | (unsigned)both[1] << 16;
    }
    emulated_wait_warp();
}

// sum (16x8) += a (16x16) · b (16x8), spread over the lanes as m16n8k16 has them
template <float (*FROM)(uint16_t)>
inline void emulated_multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const unsigned all[6] = {a[0], a[1], a[2], a[3], b0, b1};
    memcpy(emulated_slot(emulated_lane()), all, sizeof all);
    emulated_wait_warp();
    const int group = emulated_lane() / 4, pair = emulated_lane() % 4 * 2;
    const auto number = [](int lane, int word, int half) {
        unsigned both;
        memcpy(&both, (char *)emulated_slot(lane) + 4 * word, sizeof both);
        return FROM(both >> 16 * half & 0xffff);
    };
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            const int column = pair + i % 2, lane = k % 8 / 2;
            sum[i] += number(4 * group + lane, k / 8 * 2 + i / 2, k % 2) * number(4 * column + lane, 4 + k / 8, k % 2);
        }
    emulated_wait_warp();
}

// --- float8 (e4m3): without infinities, too large becomes the largest -----------------------------------------------------

enum { __NV_E4M3 };

inline float emulated_from_f8(uint8_t x) {
    const int exponent = x >> 3 & 15, fraction = x & 7;
    if (exponent == 15 && fraction == 7) return NAN;
    const float size = exponent ? ldexpf(8 + fraction, exponent - 10) : ldexpf(fraction, -9);
    return x & 0x80 ? -size : size;
}
inline uint8_t emulated_to_f8(float x) {
    if (std::isnan(x)) return 0x7f;
    int nearest = 0;
    for (int i = 1; i < 0x7f; i++) {
        const float here = fabsf(emulated_from_f8(i) - fabsf(x)), best = fabsf(emulated_from_f8(nearest) - fabsf(x));
        if (here < best || (here == best && i % 2 == 0)) nearest = i;
    }
    return nearest | (std::signbit(x) ? 0x80 : 0);
}
struct __nv_fp8_e4m3 {
    uint8_t __x;
    __nv_fp8_e4m3() = default;
    template <typename N, typename = std::enable_if_t<std::is_convertible_v<N, float>>>
    __nv_fp8_e4m3(N n) : __x(emulated_to_f8((float)n)) {}
    operator float() const { return emulated_from_f8(__x); }
};
inline __half_raw __nv_cvt_fp8_to_halfraw(uint8_t x, int) { return {emulated_to_half(emulated_from_f8(x))}; }

// --- limits, which candle takes from libcu++ ------------------------------------------------------------------------------

namespace cuda::std {
template <typename T> struct numeric_limits {
    static T infinity() { return (T)INFINITY; }
    static T lowest() { return ::std::numeric_limits<T>::lowest(); }
    static T emulated_max() { return ::std::numeric_limits<T>::max(); }
};
} // namespace cuda::std

// --- kernels by name -----------------------------------------------------------------------------------------------------

template <typename F> struct Call;
template <typename... A> struct Call<void (*)(A...)> {
    template <size_t... I> static void with(void (*f)(A...), void **given, std::index_sequence<I...>) {
        f(*(std::remove_const_t<A> *)given[I]...);
    }
    static void all(void *f, void **given) { with((void (*)(A...))f, given, std::index_sequence_for<A...>{}); }
};
#define REGISTER(NAME, KERNEL, WAITS) emulated_register(NAME, Call<decltype(&KERNEL)>::all, (void *)&KERNEL, WAITS)

#define min emulated_min
#define max emulated_max
