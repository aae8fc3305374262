// The kernels for vectors of BYTES bytes, in the namespace WIDTH_NAME. KERNEL makes a function use such vectors. Only
// kernels.cpp includes this file; it defines what all widths share.

namespace {
namespace WIDTH_NAME {

// A vector of neighbouring channels, in the type of their sums.
template <class Element> struct Types {
    typedef Sum<Element> Vector __attribute__((vector_size(BYTES)));
    typedef typename Sums<Element>::Word Mask __attribute__((vector_size(BYTES)));
};
template <class Element> using Vector = typename Types<Element>::Vector;
template <class Element> using Mask = typename Types<Element>::Mask;
template <class Element> constexpr Index WIDTH = BYTES / sizeof(Sum<Element>);
typedef std::uint16_t Halves __attribute__((vector_size(BYTES / 2)));
typedef std::uint32_t Words __attribute__((vector_size(BYTES)));

// A vector of the n channels at `from`; its other elements are 0.
template <class Element> INLINE Vector<Element> load(const Element* from, Index n) {
    Vector<Element> v{};
    if (n == WIDTH<Element>) std::memcpy(&v, from, BYTES);
    else for (Index i = 0; i < n; i++) v[i] = from[i];
    return v;
}

INLINE Vector<BFloat16> load(const BFloat16* from, Index n) {
    Halves bits{};
    if (n == WIDTH<BFloat16>) std::memcpy(&bits, from, BYTES / 2);
    else for (Index i = 0; i < n; i++) bits[i] = from[i].bits;
    return (Vector<BFloat16>)(__builtin_convertvector(bits, Words) << 16);
}

template <class Element> INLINE void store(Element* to, Index n, Vector<Element> v) {
    if (n == WIDTH<Element>) std::memcpy(to, &v, BYTES);
    else for (Index i = 0; i < n; i++) to[i] = v[i];
}

INLINE void store(BFloat16* to, Index n, Vector<BFloat16> v) {
    const Words bits = (Words)v, even = bits + 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
    const Halves rounded = __builtin_convertvector((v == v ? even : bits | 0x400000) >> 16, Halves);
    if (n == WIDTH<BFloat16>) std::memcpy(to, &rounded, BYTES / 2);
    else for (Index i = 0; i < n; i++) to[i].bits = rounded[i];
}

// The limits of the 8 tokens from t on, with their minimum and maximum. If the minimum is `enough`, only that is read.
template <bool LIMITED> struct Near {
    const std::int32_t* limit;
    Index least, most;
    INLINE_MEMBER Near(Limits limits, Index T, Index b, Index t, Index block, Index enough) : least(T), most(T) {
        if (!LIMITED || (least = limits.least_of(b)[block]) >= enough) return;
        limit = limits.of(b) + t;
        most = *std::max_element(limit, limit + 8);
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
        UNROLL for (Index i = 0; i < 8; i++) if (near.limit[i] >= distance) s[i] += before[i];
    }
}

// Means over windows of powers of two, from token `past` on, of the n channels from c of sequence b:
// s_0 = x / w, s_{k+1}(t) = s_k(t) + s_k(t - 2^k); the last term counts within the same document only. A ring that
// begins at rings[2^k - 1] holds the last 2^k values of s_k.
template <class E, bool LIMITED>
INLINE void mean(
    Input<E> x, E* y, Shape shape, const Sum<E>* windows, Limits limits, bool backwards, Index past, Index b, Index c,
    Index n
) {
    Index reach = 1;
    while (reach < shape.T) reach *= 2;  // a longer window sees nothing more
    const Vector<E> window = load(windows + c, n), scale = 1 / window;
    Mask<E> done[64];  // done[k]: the channels that are done after k steps
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
        const Near<LIMITED> near(limits, shape.T, b, t, t / 8, (Index(1) << steps) / 2);
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

// The n channels from c of sequence b as vectors, with `margin` zeros before the tokens and after them.
template <class E>
INLINE Vector<E>* unpack(Input<E> x, Index T, bool backwards, Index b, Index c, Index n, int which) {
    constexpr Index margin = 8;
    Vector<E>* rows = scratch<Vector<E>>(T + 2 * margin, which) + margin;
    std::fill(rows - margin, rows, Vector<E>{});
    for (Index t = 0; t < T; t++) rows[t] = load(x.at(b, backwards ? T - 1 - t : t, c), n);
    std::fill(rows + T, rows + T + margin, Vector<E>{});
    return rows;
}

// y(t) = sum of taps[j] x(t - j) over the j with t - j in the same document, for t >= past and the n channels from c of
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
        const Near<LIMITED> near(limits, shape.T, b, t, (t - past) / 8, longest - 1);
        const Index most = std::min(longest, LIMITED ? std::min(t + 8, near.most + 1) : t + 8);
        const Index least = LIMITED ? std::min(most, near.least + 1) : most;
        for (Index j = 0; j < least; j++)
            UNROLL for (Index i = 0; i < 8; i++) sums[i] += h[j] * rows[t + i - j];
        for (Index j = least; j < most; j++)
            UNROLL for (Index i = 0; i < 8; i++) if (near.limit[i] >= j) sums[i] += h[j] * rows[t + i - j];
        for (Index i = 0; i < std::min(Index(8), shape.T - t); i++) store(place(t + i), n, sums[i]);
    }
    // Shorter windows have taps of 0 at their end, and 0 times infinity is NaN. So a channel with inputs that are not
    // finite is filtered again with its own taps only.
    for (Index t = 0; t < shape.T; t++) finite += rows[t] * 0;
    for (Index i = 0; i < n; i++) {
        if (finite[i] == 0) continue;
        for (Index t = past; t < shape.T; t++) {
            Vector<E> sum{};
            const Index own = LIMITED ? limits.of(b)[t] : t;
            for (Index j = 0; j <= std::min({layout.windows[c + i] - 1, t, own}); j++)
                sum[0] += h[j][i] * rows[t - j][i];
            store(place(t) + i, 1, sum);
        }
    }
}

// Gradients of taps j ... j + PART - 1 of the n channels from c: the sums of grad(t) x(t - j) over B and T, with both
// factors in the same document.
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
                        UNROLL for (Index i = 0; i < 8; i++)
                            if (limit[t] >= lag + i) sums[i] += late[t] * early[t - lag - i];
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

// y(t) = u(t) + decay y(t - 1) for the n channels from c of sequence b.
template <class E>
INLINE void decayed_sum(Input<E> u, E* y, Shape shape, const E* decay, bool backwards, Index b, Index c, Index n) {
    Vector<E> sum{}, a = load(decay + c, n);
    for (Index i = 0; i < shape.T; i++) {
        const Index t = backwards ? shape.T - 1 - i : i;
        sum = load(u.at(b, t, c), n) + a * sum;
        store(y + (b * shape.T + t) * shape.C + c, n, sum);
    }
}

// Runs `work` for each index below `outer` and each vector of channels. The last vector may overlap the one before it;
// both write the same values there. No result depends on the number of threads.
template <class E, class Work> void for_each(Index outer, Index C, int threads, Work work) {
    const Index n = std::min(C, WIDTH<E>), vectors = (C + n - 1) / n;
#pragma omp parallel for num_threads(threads) if (threads > 1 && outer * vectors > 1)
    for (Index i = 0; i < outer * vectors; i++) work(i / vectors, std::min(i % vectors * n, C - n), n);
}

// 16 channels at a time, so that the sums stay in registers.
KERNEL void newest(Newest t, const Group* groups, Index count) {
    for (Index b = 0; b < t.B; b++) {
        const float *x = t.x + b * t.E, *past = t.past + b * t.row;
        float* y = t.y + b * t.C;
        for (Index g = 0, c = 0; g < count; g++) {
            const auto [size, w, taps, stride] = groups[g];
            for (Index end = c + size; c < end;) {
                const Index n = std::min(end - c, Index(16));
                const float* h = taps + (taps ? (c - (end - size)) * stride : 0);
                double sums[16];
                for (Index i = 0; i < n; i++) sums[i] = taps ? double(h[i * stride]) * x[c + i] : x[c + i];
                for (Index j = 1; j <= std::min(w - 1, t.S); j++) {
                    const float* from = past + (t.S - j) * t.step + c;
                    if (taps) for (Index i = 0; i < n; i++) sums[i] += double(h[i * stride + j]) * from[i];
                    else for (Index i = 0; i < n; i++) sums[i] += from[i];
                }
                for (Index i = 0; i < n; i++) y[c + i] = float(taps ? sums[i] : sums[i] / double(w));
                c += n;
            }
        }
    }
}

// Templates cannot have a target attribute, so each type of elements has its own functions.
#define MIXING(TYPE, E)                                                                                               \
    KERNEL void mean_part_##TYPE(Input<E> x, E* y, Shape s, const Sum<E>* w, Limits d, bool r, Index p, Index b,      \
                                 Index c, Index n) {                                                                  \
        if (d.data) mean<E, true>(x, y, s, w, d, r, p, b, c, n);                                                      \
        else mean<E, false>(x, y, s, w, d, r, p, b, c, n);                                                            \
    }                                                                                                                 \
    void mean_##TYPE(Input<E> x, E* y, Shape s, const Sum<E>* w, Reach d, bool r, Index p, int threads) {             \
        const Documents documents(d, s, r, 0);                                                                        \
        const Limits limits = documents.view();                                                                       \
        for_each<E>(s.B, s.C, threads,                                                                                \
                    [=](Index b, Index c, Index n) { mean_part_##TYPE(x, y, s, w, limits, r, p, b, c, n); });         \
    }                                                                                                                 \
    KERNEL void filter_part_##TYPE(Input<E> x, E* y, Shape s, Layout l, const Sum<E>* h, Limits d, bool r, Index p,   \
                                   Index b, Index c, Index n) {                                                       \
        if (d.data) filter<E, true>(x, y, s, l, h, d, r, p, b, c, n);                                                 \
        else filter<E, false>(x, y, s, l, h, d, r, p, b, c, n);                                                       \
    }                                                                                                                 \
    void filter_##TYPE(Input<E> x, E* y, Shape s, Layout l, const Sum<E>* h, Reach d, bool r, Index p,                \
                       int threads) {                                                                                 \
        const Documents documents(d, s, r, p);                                                                        \
        const Limits limits = documents.view();                                                                       \
        for_each<E>(s.B, s.C, threads,                                                                                \
                    [=](Index b, Index c, Index n) { filter_part_##TYPE(x, y, s, l, h, limits, r, p, b, c, n); });    \
    }                                                                                                                 \
    KERNEL void correlate_part_##TYPE(Input<E> g, Input<E> x, Shape s, Layout l, Limits d, Sum<E>* h, Index j,        \
                                      Index c, Index n) {                                                             \
        if (d.data) correlate<E, true>(g, x, s, l, d, h, j, c, n);                                                    \
        else correlate<E, false>(g, x, s, l, d, h, j, c, n);                                                          \
    }                                                                                                                 \
    void correlate_##TYPE(Input<E> g, Input<E> x, Shape s, Layout l, Reach d, Index longest, Sum<E>* h,               \
                          int threads) {                                                                              \
        const Documents documents(d, s, false, 0);                                                                    \
        const Limits limits = documents.view();                                                                       \
        for_each<E>((longest + PART - 1) / PART, s.C, threads,                                                        \
                    [=](Index i, Index c, Index n) {                                                                  \
                        correlate_part_##TYPE(g, x, s, l, limits, h, i * PART, c, n);                                 \
                    });                                                                                               \
    }

#define DECAYED_SUM(TYPE, E)                                                                                          \
    KERNEL void decayed_sum_part_##TYPE(Input<E> u, E* y, Shape s, const E* a, bool r, Index b, Index c, Index n) {   \
        decayed_sum<E>(u, y, s, a, r, b, c, n);                                                                       \
    }                                                                                                                 \
    void decayed_sum_##TYPE(Input<E> u, E* y, Shape s, const E* a, bool r, int threads) {                             \
        for_each<E>(s.B, s.C, threads,                                                                                \
                    [=](Index b, Index c, Index n) { decayed_sum_part_##TYPE(u, y, s, a, r, b, c, n); });             \
    }

MIXING(float32, float)
MIXING(float64, double)
MIXING(bfloat16, BFloat16)
DECAYED_SUM(float32, float)
DECAYED_SUM(float64, double)

}  // namespace WIDTH_NAME
}  // namespace

#undef MIXING
#undef DECAYED_SUM
#undef BYTES
#undef WIDTH_NAME
#undef KERNEL
