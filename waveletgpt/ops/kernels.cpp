// The kernels of backend "cpp": each reads its input once and writes its result once. cpp.py calls them through ctypes,
// so they need GCC or Clang with OpenMP to build, and no headers of Python or torch. Installing goes on without them.
//
// Shapes: B batch, T tokens, C mixed channels. Inputs are (B, T, C) with any strides of B and T; results are dense.
// Backwards: time runs from the last token to the first, as for gradients.
//
// kernels.h is compiled once for each width of vectors: 64 bytes (AVX-512), 32 (AVX2) and 16 (any other: SSE2, NEON).
// The widest that the processor has is used. Vectors wider than its registers would be several times slower.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER
#define UNROLL _Pragma("GCC unroll 8")

namespace {

using Index = std::int64_t;
struct BFloat16 { std::uint16_t bits; };

// The type in which `Element`s are added up (Sum), and an integer of the size of that type (Word).
template <class Element> struct Sums { using Sum = float; using Word = std::int32_t; };
template <> struct Sums<double> { using Sum = double; using Word = std::int64_t; };
template <class Element> using Sum = typename Sums<Element>::Sum;

// Aligned memory of this thread, kept between calls. Each thread has four such buffers; `which` selects one.
template <class V> V* scratch(Index count, int which) {
    static thread_local std::vector<char> memory[4];
    if (memory[which].size() < count * sizeof(V) + 64) memory[which].resize(count * sizeof(V) + 64);
    return (V*)((std::uintptr_t(memory[which].data()) + 63) & ~std::uintptr_t(63));
}

template <class Element> struct Input {
    const Element* data;
    Index row, step;  // strides of B and T
    const Element* at(Index b, Index t, Index c) const { return data + b * row + t * step + c; }
};

struct Shape { Index B, T, C; };

// How many tokens before each token belong to its document. Without `data`: all.
struct Reach {
    const std::int32_t* data;
    Index row;  // stride of B
};

// The same in the order in which time runs: backwards, it counts the tokens after each token. `least` is the minimum of
// each block of 8 tokens. In most blocks no document begins; then only `least` is read.
struct Limits {
    const std::int32_t *data, *least;
    Index row, blocks;  // strides of B
    const std::int32_t* of(Index b) const { return data + b * row; }
    const std::int32_t* least_of(Index b) const { return least + b * blocks; }
};

// The limits of one call, whose blocks of 8 tokens begin at token `first`.
class Documents {
    std::vector<std::int32_t> limits, least;
    Index row = 0, blocks = 0;

   public:
    Documents(Reach reach, Shape shape, bool backwards, Index first) {
        if (!reach.data) return;
        const Index rows = reach.row ? shape.B : 1, T = shape.T, length = T + 8, count = (T - first + 7) / 8;
        limits.resize(rows * length);
        least.resize(rows * count);
        for (Index b = 0; b < rows; b++) {
            const std::int32_t* from = reach.data + b * reach.row;
            std::int32_t* to = limits.data() + b * length;
            for (Index t = 0; t < T; t++)
                if (!backwards) to[t] = std::max(0, from[t]);
                else to[t] = t > 0 && from[T - t] > 0 ? to[t - 1] + 1 : 0;
            std::fill(to + T, to + length, to[T - 1]);
            for (Index i = 0; i < count; i++)
                least[b * count + i] = *std::min_element(to + first + 8 * i, to + first + 8 * i + 8);
        }
        if (reach.row) row = length, blocks = count;
    }
    Limits view() const { return {limits.empty() ? nullptr : limits.data(), least.data(), row, blocks}; }
};

// Learned kernels: channel c has windows[c] taps, which begin at taps[offsets[c]].
struct Layout {
    const Index *windows, *offsets;
    Index longest(Index c, Index n, Index most) const {
        return std::min(*std::max_element(windows + c, windows + c + n), most);
    }
};

constexpr Index PART = 64;  // number of taps whose gradients one call of `correlate` computes

// Decoding in float32: one token x for each sequence (rows are E apart) after the S tokens of `past`, oldest first.
// y is dense.
struct Newest { const float* x; float* y; Index B, C, E; const float* past; Index S, row, step; };

// Neighbouring channels with the same window are a group: their number, the window, their taps (none: the mean), and
// the distance from one channel's taps to the next one's.
struct Group { Index size, window; const float* taps; Index stride; };

}  // namespace

#if defined(__x86_64__)
#define BYTES 64
#define WIDTH_NAME of_64
#define KERNEL __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "kernels.h"
#define BYTES 32
#define WIDTH_NAME of_32
#define KERNEL __attribute__((target("avx2,fma")))
#include "kernels.h"
#endif
#define BYTES 16
#define WIDTH_NAME of_16
#define KERNEL
#include "kernels.h"

namespace {

// The widest vectors of this processor, in bytes, up to `most`.
int widest(int most) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512 && most >= 64) return 64;
    if (avx2 && most >= 32) return 32;
#endif
    return 16;
}

int bytes = widest(64);

}  // namespace

#if defined(__x86_64__)
#define CALL(NAME, ARGUMENTS) \
    if (bytes == 64) of_64::NAME ARGUMENTS; \
    else if (bytes == 32) of_32::NAME ARGUMENTS; \
    else of_16::NAME ARGUMENTS
#else
#define CALL(NAME, ARGUMENTS) of_16::NAME ARGUMENTS
#endif
#define ENTRY(NAME, PARAMETERS, ARGUMENTS) \
    extern "C" void waveletgpt_##NAME PARAMETERS { CALL(NAME, ARGUMENTS); }

#define MIXING(TYPE, E)                                                                                               \
    ENTRY(mean_##TYPE,                                                                                                \
          (Input<E> x, E* y, Shape shape, const Sum<E>* windows, Reach reach, bool backwards, Index past,           \
           int threads),                                                                                              \
          (x, y, shape, windows, reach, backwards, past, threads))                                                   \
    ENTRY(filter_##TYPE,                                                                                              \
          (Input<E> x, E* y, Shape shape, Layout layout, const Sum<E>* taps, Reach reach, bool backwards,           \
           Index past, int threads),                                                                                  \
          (x, y, shape, layout, taps, reach, backwards, past, threads))                                              \
    ENTRY(correlate_##TYPE,                                                                                           \
          (Input<E> grad, Input<E> x, Shape shape, Layout layout, Reach reach, Index longest, Sum<E>* result,       \
           int threads),                                                                                              \
          (grad, x, shape, layout, reach, longest, result, threads))

#define DECAYED_SUM(TYPE, E)                                                                                          \
    ENTRY(decayed_sum_##TYPE, (Input<E> u, E* y, Shape shape, const E* decay, bool backwards, int threads),           \
          (u, y, shape, decay, backwards, threads))

MIXING(float32, float)
MIXING(float64, double)
MIXING(bfloat16, BFloat16)
DECAYED_SUM(float32, float)
DECAYED_SUM(float64, double)
ENTRY(newest, (Newest t, const Group* groups, Index count), (t, groups, count))

// Use vectors of at most `most` bytes; returns the size used.
extern "C" int waveletgpt_vectors(int most) { return bytes = widest(most); }

// Raise it with every change of an entry: cpp.py refuses a library of another version.
extern "C" int waveletgpt_version() { return 4; }
