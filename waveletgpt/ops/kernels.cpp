// The kernels of backend "cpp": each reads its input once and writes its result once. cpp.py calls them through ctypes,
// so they need GCC or Clang with OpenMP to build, and no headers of Python or torch. Installing goes on without them.
//
// Shapes: B batch, T tokens, C mixed coordinates. Inputs are (B, T, C) with any strides of B and T; results are dense.
// Backwards: time runs from the last token to the first, as for gradients.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// On x86 GCC compiles every kernel for three generations of processors, and the loader of glibc picks one.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define KERNEL __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define KERNEL __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define KERNEL
#endif
#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER
#define UNROLL _Pragma("GCC unroll 8")

namespace {

using Index = std::int64_t;
struct BFloat16 { std::uint16_t bits; };

// Sums of `Element`s, in vectors of 64 bytes that hold neighbouring coordinates.
template <class Element> struct Sums {
    using Sum = float;
    typedef float Vector __attribute__((vector_size(64)));
    typedef std::int32_t Mask __attribute__((vector_size(64)));
};
template <> struct Sums<double> {
    using Sum = double;
    typedef double Vector __attribute__((vector_size(64)));
    typedef std::int64_t Mask __attribute__((vector_size(64)));
};
template <class Element> using Sum = typename Sums<Element>::Sum;
template <class Element> using Vector = typename Sums<Element>::Vector;
template <class Element> using Mask = typename Sums<Element>::Mask;
template <class Element> constexpr Index WIDTH = 64 / sizeof(Sum<Element>);
typedef std::uint16_t Halves __attribute__((vector_size(32)));
typedef std::uint32_t Words __attribute__((vector_size(64)));

// The first n coordinates at `from`, and 0 in the others.
template <class Element> INLINE Vector<Element> load(const Element* from, Index n) {
    Vector<Element> v{};
    if (n == WIDTH<Element>) std::memcpy(&v, from, 64);
    else for (Index i = 0; i < n; i++) v[i] = from[i];
    return v;
}

INLINE Vector<BFloat16> load(const BFloat16* from, Index n) {
    Halves bits{};
    if (n == 16) std::memcpy(&bits, from, 32);
    else for (Index i = 0; i < n; i++) bits[i] = from[i].bits;
    return (Vector<BFloat16>)(__builtin_convertvector(bits, Words) << 16);
}

template <class Element> INLINE void store(Element* to, Index n, Vector<Element> v) {
    if (n == WIDTH<Element>) std::memcpy(to, &v, 64);
    else for (Index i = 0; i < n; i++) to[i] = v[i];
}

INLINE void store(BFloat16* to, Index n, Vector<BFloat16> v) {
    const Words bits = (Words)v, even = bits + 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
    const Halves rounded = __builtin_convertvector((v == v ? even : bits | 0x400000) >> 16, Halves);
    if (n == 16) std::memcpy(to, &rounded, 32);
    else for (Index i = 0; i < n; i++) to[i].bits = rounded[i];
}

// Aligned memory of this thread, kept between calls; `which` of four.
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

// How many tokens before each one (after it, backwards) are of its document; no `data`: all, and code of its own.
struct Limits {
    const std::int32_t* data;
    Index row;  // stride of B
    const std::int32_t* of(Index b) const { return data + b * row; }
};

// Those of the 8 tokens from t on, as time runs, and the least and the most of them; most documents begin elsewhere, so
// that often the least is `enough`, and nothing else is needed.
template <bool LIMITED> struct Near {
    Index limit[8], least, most;
    INLINE_MEMBER Near(const std::int32_t* limits, Index T, bool backwards, Index t, Index enough) : least(T), most(T) {
        if (!LIMITED) return;
        if (T - t >= 8) {
            const std::int32_t* from = limits + (backwards ? T - 8 - t : t);
            std::int32_t low = from[0];
            UNROLL for (Index i = 1; i < 8; i++) low = std::min(low, from[i]);
            least = low;
            if (least >= enough) return;
        }
        for (Index i = 0; i < 8; i++) {
            const Index at = std::min(t + i, T - 1);
            limit[i] = std::max(0, limits[backwards ? T - 1 - at : at]);
            least = i ? std::min(least, limit[i]) : limit[i];
            most = i ? std::max(most, limit[i]) : limit[i];
        }
    }
};

// s(t) + s(t - distance) for 8 tokens; `ring` holds the `shift` values before them and gets the newest.
template <Index shift, bool LIMITED, class V>
INLINE void add_shifted(V (&s)[8], V* ring, Index distance, const Near<LIMITED>& near) {
    V before[8];
    UNROLL for (Index i = 0; i < 8; i++) before[i] = i < shift ? ring[i] : s[i - shift];
    UNROLL for (Index i = 0; i < shift; i++) ring[i] = s[8 - shift + i];
    if (!LIMITED || near.least >= distance) {
        UNROLL for (Index i = 0; i < 8; i++) s[i] += before[i];
    } else if (near.most >= distance) {
        for (Index i = 0; i < 8; i++) if (near.limit[i] >= distance) s[i] += before[i];
    }
}

// Means over windows of powers of two, from token `past` on, of the n coordinates from c of sequence b:
// s_0 = x / w, s_{k+1}(t) = s_k(t) + s_k(t - 2^k), the latter where it is of the same document. The last 2^k values of
// s_k are in a ring at 2^k - 1.
template <class E, bool LIMITED>
INLINE void mean(
    Input<E> x, E* y, Shape shape, const Sum<E>* windows, Limits limits, bool backwards, Index past, Index b, Index c,
    Index n
) {
    Index reach = 1;
    while (reach < shape.T) reach *= 2;  // a longer window sees nothing more
    const Vector<E> window = load(windows + c, n), scale = 1 / window;
    Mask<E> done[64];  // which coordinates are done after as many steps
    Index steps = 0;
    for (Index k = 0; Index(1) << k <= reach; k++) {
        const Sum<E> size = Index(1) << k;
        done[k] = size < reach ? window == size : window >= size;
        for (Index i = 0; i < n; i++) if (done[k][i]) steps = k;
    }
    Vector<E>* rings = scratch<Vector<E>>(Index(1) << steps, 0);
    std::fill(rings, rings + (Index(1) << steps), Vector<E>{});
    const Index forward = backwards ? -1 : 1, start = backwards ? shape.T - 1 : 0;
    for (Index t = 0; t < shape.T; t += 8) {
        const E* from = x.at(b, start + forward * t, c);
        E* to = y + (b * (shape.T - past) + start - past + forward * t) * shape.C + c;
        Vector<E> s[8];
        Mask<E> result[8];
        const bool whole = t >= past && shape.T - t >= 8 && n == WIDTH<E>;
        if (whole) {
            UNROLL for (Index i = 0; i < 8; i++) {
                __builtin_prefetch(from + forward * (i + 8) * x.step);
                s[i] = load(from + forward * i * x.step, WIDTH<E>);
            }
        } else {
            for (Index i = 0; i < 8; i++) s[i] = i < shape.T - t ? load(from + forward * i * x.step, n) : Vector<E>{};
        }
        const Near<LIMITED> near(limits.of(b), shape.T, backwards, t, (Index(1) << steps) / 2);
        UNROLL for (Index i = 0; i < 8; i++) result[i] = (Mask<E>)(s[i] *= scale) & done[0];
        for (Index k = 0; k < steps; k++) {
            const Index distance = Index(1) << k;
            Vector<E>* ring = rings + distance - 1;
            if (k == 0) add_shifted<1>(s, ring, distance, near);
            else if (k == 1) add_shifted<2>(s, ring, distance, near);
            else if (k == 2) add_shifted<4>(s, ring, distance, near);
            else add_shifted<8>(s, ring + (t & (distance - 1)), distance, near);
            UNROLL for (Index i = 0; i < 8; i++) result[i] |= (Mask<E>)s[i] & done[k + 1];
        }
        if (whole) {
            UNROLL for (Index i = 0; i < 8; i++) store(to + forward * i * shape.C, WIDTH<E>, (Vector<E>)result[i]);
        } else {
            for (Index i = std::max(Index(0), past - t); i < std::min(Index(8), shape.T - t); i++)
                store(to + forward * i * shape.C, n, (Vector<E>)result[i]);
        }
    }
}

// The n coordinates from c of sequence b as vectors, with `margin` zeros before the tokens and after them.
template <class E>
INLINE Vector<E>* unpack(Input<E> x, Index T, bool backwards, Index b, Index c, Index n, int which) {
    constexpr Index margin = 8;
    Vector<E>* rows = scratch<Vector<E>>(T + 2 * margin, which) + margin;
    std::fill(rows - margin, rows, Vector<E>{});
    for (Index t = 0; t < T; t++) rows[t] = load(x.at(b, backwards ? T - 1 - t : t, c), n);
    std::fill(rows + T, rows + T + margin, Vector<E>{});
    return rows;
}

// Learned kernels: that of coordinate c has windows[c] taps, from offsets[c] on in `taps`.
struct Layout {
    const Index *windows, *offsets;
    Index longest(Index c, Index n, Index most) const {
        return std::min(*std::max_element(windows + c, windows + c + n), most);
    }
};

// y(t) = sum of taps[j] x(t - j) over j, those of the same document, for t >= past, of the n coordinates from c of
// sequence b.
template <class E, bool LIMITED>
INLINE void filter(
    Input<E> x, E* y, Shape shape, Layout layout, const Sum<E>* taps, Limits limits, bool backwards, Index past, Index b,
    Index c, Index n
) {
    const Index longest = layout.longest(c, n, shape.T);
    const Vector<E>* rows = unpack(x, shape.T, backwards, b, c, n, 0);
    Vector<E> *h = scratch<Vector<E>>(longest, 1), finite{};
    std::fill(h, h + longest, Vector<E>{});
    for (Index i = 0; i < n; i++)
        for (Index j = 0; j < std::min(longest, layout.windows[c + i]); j++) h[j][i] = taps[layout.offsets[c + i] + j];
    auto place = [&](Index t) {
        return y + (b * (shape.T - past) + (backwards ? shape.T - 1 - t : t) - past) * shape.C + c;
    };
    for (Index t = past; t < shape.T; t += 8) {
        Vector<E> sums[8] = {};
        const Near<LIMITED> near(limits.of(b), shape.T, backwards, t, longest - 1);
        const Index most = std::min(longest, LIMITED ? std::min(t + 8, near.most + 1) : t + 8);
        const Index least = LIMITED ? std::min(most, near.least + 1) : most;
        for (Index j = 0; j < least; j++)
            UNROLL for (Index i = 0; i < 8; i++) sums[i] += h[j] * rows[t + i - j];
        for (Index j = least; j < most; j++)
            for (Index i = 0; i < 8; i++) if (near.limit[i] >= j) sums[i] += h[j] * rows[t + i - j];
        for (Index i = 0; i < std::min(Index(8), shape.T - t); i++) store(place(t + i), n, sums[i]);
    }
    // A tap of 0 beyond a shorter window times infinity is NaN: where inputs are not finite, each window by itself.
    for (Index t = 0; t < shape.T; t++) finite += rows[t] * 0;
    for (Index i = 0; i < n; i++) {
        if (finite[i] == 0) continue;
        for (Index t = past; t < shape.T; t++) {
            Vector<E> sum{};
            const Index own = LIMITED ? std::max(0, limits.of(b)[backwards ? shape.T - 1 - t : t]) : t;
            for (Index j = 0; j <= std::min({layout.windows[c + i] - 1, t, own}); j++)
                sum[0] += h[j][i] * rows[t - j][i];
            store(place(t) + i, 1, sum);
        }
    }
}

constexpr Index PART = 64;  // taps whose gradients one call of `correlate` finds

// Gradients of taps j ... j + PART - 1 of the n coordinates from c: the sums of grad(t) x(t - j) over B and T, where
// both are of one document.
template <class E, bool LIMITED>
INLINE void correlate(
    Input<E> grad, Input<E> x, Shape shape, Layout layout, Limits limits, Sum<E>* result, Index j, Index c, Index n
) {
    const Index longest = layout.longest(c, n, std::min(shape.T, j + PART));
    std::vector<double> total(PART * n);
    for (Index b = 0; b < shape.B && j < longest; b++) {
        const Vector<E>* late = unpack(grad, shape.T, false, b, c, n, 0);
        const Vector<E>* early = unpack(x, shape.T, false, b, c, n, 1);
        const std::int32_t* limit = limits.of(b);
        for (Index lag = j; lag < longest; lag += 8) {
            for (Index start = lag; start < shape.T; start += 1024) {  // longer sums would lose digits
                Vector<E> sums[8] = {};
                for (Index t = start; t < std::min(start + 1024, shape.T); t++) {
                    if (!LIMITED || limit[t] >= lag + 7) {
                        UNROLL for (Index i = 0; i < 8; i++) sums[i] += late[t] * early[t - lag - i];
                    } else {
                        const Index own = std::max(0, limit[t]);
                        for (Index i = 0; lag + i <= own; i++) sums[i] += late[t] * early[t - lag - i];
                    }
                }
                for (Index i = 0; i < 8; i++)
                    for (Index lane = 0; lane < n; lane++) total[(lag - j + i) * n + lane] += sums[i][lane];
            }
        }
    }
    for (Index lane = 0; lane < n; lane++)
        for (Index lag = j; lag < std::min(layout.windows[c + lane], j + PART); lag++)
            result[layout.offsets[c + lane] + lag] = total[(lag - j) * n + lane];
}

// y(t) = u(t) + decay y(t - 1), of the n coordinates from c of sequence b.
template <class E>
INLINE void decayed_sum(Input<E> u, E* y, Shape shape, const E* decay, bool backwards, Index b, Index c, Index n) {
    Vector<E> sum{}, a = load(decay + c, n);
    for (Index i = 0; i < shape.T; i++) {
        const Index t = backwards ? shape.T - 1 - i : i;
        sum = load(u.at(b, t, c), n) + a * sum;
        store(y + (b * shape.T + t) * shape.C + c, n, sum);
    }
}

// Runs `work` for each of `outer` with each vector of coordinates. The last vector may overlap the one before it: both
// write the same values there. No result depends on the number of threads.
template <class E, class Work> void for_each(Index outer, Index C, int threads, Work work) {
    const Index n = std::min(C, WIDTH<E>), vectors = (C + n - 1) / n;
#pragma omp parallel for num_threads(threads) if (threads > 1 && outer * vectors > 1)
    for (Index i = 0; i < outer * vectors; i++) work(i / vectors, std::min(i % vectors * n, C - n), n);
}

}  // namespace

// Templates get no clones for processors: each type of elements has its own functions, and entries that call them.
#define CLONES(NAME, PARAMETERS, ...) \
    namespace { KERNEL void NAME PARAMETERS { __VA_ARGS__; } }
#define ENTRY(NAME, PARAMETERS, ...) \
    extern "C" void waveletgpt_##NAME PARAMETERS { __VA_ARGS__; }

#define MIXING(TYPE, E)                                                                                               \
    CLONES(mean_##TYPE,                                                                                               \
           (Input<E> x, E* y, Shape s, const Sum<E>* w, Limits d, bool r, Index p, Index b, Index c, Index n),        \
           if (d.data) mean<E, true>(x, y, s, w, d, r, p, b, c, n);                                                   \
           else mean<E, false>(x, y, s, w, d, r, p, b, c, n))                                                         \
    ENTRY(mean_##TYPE, (Input<E> x, E* y, Shape s, const Sum<E>* w, Limits d, bool r, Index p, int threads),          \
          for_each<E>(s.B, s.C, threads,                                                                              \
                      [=](Index b, Index c, Index n) { mean_##TYPE(x, y, s, w, d, r, p, b, c, n); }))                 \
    CLONES(filter_##TYPE,                                                                                             \
           (Input<E> x, E* y, Shape s, Layout l, const Sum<E>* h, Limits d, bool r, Index p, Index b, Index c,        \
            Index n),                                                                                                 \
           if (d.data) filter<E, true>(x, y, s, l, h, d, r, p, b, c, n);                                              \
           else filter<E, false>(x, y, s, l, h, d, r, p, b, c, n))                                                    \
    ENTRY(filter_##TYPE,                                                                                              \
          (Input<E> x, E* y, Shape s, Layout l, const Sum<E>* h, Limits d, bool r, Index p, int threads),             \
          for_each<E>(s.B, s.C, threads,                                                                              \
                      [=](Index b, Index c, Index n) { filter_##TYPE(x, y, s, l, h, d, r, p, b, c, n); }))            \
    CLONES(correlate_##TYPE,                                                                                          \
           (Input<E> g, Input<E> x, Shape s, Layout l, Limits d, Sum<E>* h, Index j, Index c, Index n),               \
           if (d.data) correlate<E, true>(g, x, s, l, d, h, j, c, n);                                                 \
           else correlate<E, false>(g, x, s, l, d, h, j, c, n))                                                       \
    ENTRY(correlate_##TYPE,                                                                                           \
          (Input<E> g, Input<E> x, Shape s, Layout l, Limits d, Index longest, Sum<E>* h, int threads),               \
          for_each<E>((longest + PART - 1) / PART, s.C, threads,                                                      \
                      [=](Index part, Index c, Index n) { correlate_##TYPE(g, x, s, l, d, h, part * PART, c, n); }))

#define DECAYED_SUM(TYPE, E)                                                                                          \
    CLONES(decayed_sum_##TYPE, (Input<E> u, E* y, Shape s, const E* a, bool r, Index b, Index c, Index n),            \
           decayed_sum<E>(u, y, s, a, r, b, c, n))                                                                    \
    ENTRY(decayed_sum_##TYPE, (Input<E> u, E* y, Shape s, const E* a, bool r, int threads),                           \
          for_each<E>(s.B, s.C, threads,                                                                              \
                      [=](Index b, Index c, Index n) { decayed_sum_##TYPE(u, y, s, a, r, b, c, n); }))

MIXING(float32, float)
MIXING(float64, double)
MIXING(bfloat16, BFloat16)
DECAYED_SUM(float32, float)
DECAYED_SUM(float64, double)

// Decoding, one token of float32: of each coordinate `row` holds the last w inputs, w its window, input number t in slot
// -t mod w of the coordinate's own. x and y are (B, E); coordinates from C on are copied.
namespace {

struct Token { const float* x; float* y; Index B, E, C; float* row; Index R, now; };

INLINE Index slot_of(Index t, Index window) { return (window - t % window) % window; }

INLINE float dot(const float* a, const float* b, Index n) {
    Vector<float> sums{};
    Index i = 0;
    for (; i + WIDTH<float> <= n; i += WIDTH<float>)
        sums += load(a + i, WIDTH<float>) * load(b + i, WIDTH<float>);
    float sum = 0;
    for (Index k = 0; k < WIDTH<float>; k++) sum += sums[k];
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

KERNEL void step_mean(Token t, const Index* windows, double* sums) {
    for (Index b = 0; b < t.B; b++) {
        const float* x = t.x + b * t.E;
        float *y = t.y + b * t.E, *row = t.row + b * t.R;
        std::copy(x + t.C, x + t.E, y + t.C);
        for (Index c = 0; c < t.C; row += windows[c++]) {
            const Index slot = slot_of(t.now, windows[c]);
            double& sum = sums[b * t.C + c];
            sum = sum - row[slot] + x[c];
            row[slot] = x[c];
            y[c] = float(sum) * (1.0f / float(windows[c]));
        }
    }
}

// Neighbours with the same window are a group: their number, the window, where their taps are, and how far apart.
struct Group { Index size, window; const float* taps; Index stride; };

KERNEL void step_filter(Token t, const Group* groups, Index count) {
    for (Index b = 0; b < t.B; b++) {
        const float* x = t.x + b * t.E;
        float *y = t.y + b * t.E, *row = t.row + b * t.R;
        std::copy(x + t.C, x + t.E, y + t.C);
        for (Index g = 0; g < count; g++) {
            const auto [size, w, taps, stride] = groups[g];
            const Index slot = slot_of(t.now, w);
            for (Index i = 0; i < size; i++, row += w) {
                const float* h = taps + i * stride;
                row[slot] = *x++;
                *y++ = dot(row + slot, h, w - slot) + dot(row, h + w - slot, slot);
            }
        }
    }
}

}  // namespace

extern "C" void waveletgpt_step_mean(Token t, const Index* windows, double* sums) { step_mean(t, windows, sums); }
extern "C" void waveletgpt_step_filter(Token t, const Group* groups, Index count) { step_filter(t, groups, count); }

// To be raised with every change of an entry: cpp.py calls no others than its own.
extern "C" int waveletgpt_version() { return 3; }
