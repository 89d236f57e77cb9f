// The kernels of csrc/ops.cpp, written once for any processor: elementwise ops here, attention in ops_attention.h. Included by ops.cpp (portable),
// ops_avx2.cpp and ops_avx512.cpp, each with its own OPS_NAMESPACE and OPS_TABLE. What each computes is said by its twin in Python, named at its head.

namespace ops {
namespace OPS_NAMESPACE {

#include "ops_lanes.h"

// ---------------------------------------------------------------- bits (kernels/fused/dropout.py)

typedef uint64_t vl __attribute__((vector_size(4 * OPS_LANES)));
typedef uint16_t vh __attribute__((vector_size(4 * OPS_LANES)));

#if defined(OPS_AVX2)
// Philox4x32-10 of several counters at once. A vector holds LANES / 2 of them, a 32-bit word in each 64-bit lane, since that is what the multiplier takes; what the
// upper halves hold does not matter.
struct Philox {
    vl keys[20];
    vl high;  // third word of the counter: the seed's high half

    explicit Philox(const Drop& drop) {
        uint32_t k0 = uint32_t(drop.seed), k1 = drop.site;
        for (int i = 0; i < 10; ++i) {
            keys[2 * i] = vl{} + uint64_t(k0), keys[2 * i + 1] = vl{} + uint64_t(k1);
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        high = vl{} + uint64_t(uint32_t(drop.seed >> 32));
    }

#if defined(OPS_AVX512)
    static vl product(vl x, uint32_t factor) { return (vl)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(int64_t(factor))); }
    static vl widened(const uint32_t* p) { return (vl)_mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i_u*)p)); }
    static void narrowed(vl v, uint32_t* p) { _mm256_storeu_si256((__m256i_u*)p, _mm512_cvtepi64_epi32((__m512i)v)); }
#else
    static vl product(vl x, uint32_t factor) { return (vl)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(int64_t(factor))); }
    static vl widened(const uint32_t* p) { return (vl)_mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i_u*)p)); }
    static void narrowed(vl v, uint32_t* p) {
        const __m256i places = _mm256_permutevar8x32_epi32((__m256i)v, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
        _mm_storeu_si128((__m128i_u*)p, _mm256_castsi256_si128(places));
    }
#endif

    // Of a word of each counter: bit k where its low 16 bits are at most `limit`, bit k + 20 where its next 16 are.
    static vl small(vl word, vh limit, int k) { return (vl)((vh)word <= limit) & (uint64_t(0x00100001) << k); }

    // Bits 0 .. 7 of out[j], for COUNT counters: which elements of the block with counter (c0[j], c1[j], seed's high half, c3) are kept. A round waits for the one before
    // it: with eight counters the multipliers have little to do meanwhile.
    template <int COUNT>
    void kept(const uint32_t* c0, const uint32_t* c1, uint32_t c3, uint32_t last, uint32_t* out) const {
        constexpr int EACH = OPS_LANES / 2, PARTS = COUNT / EACH;
        vl w0[PARTS], w1[PARTS], w2[PARTS], w3[PARTS];
        for (int n = 0; n < PARTS; ++n) w0[n] = widened(c0 + EACH * n), w1[n] = widened(c1 + EACH * n), w2[n] = high, w3[n] = vl{} + uint64_t(c3);
        for (int i = 0; i < 10; ++i) {
            for (int n = 0; n < PARTS; ++n) {
                const vl p = product(w0[n], 0xD2511F53u), q = product(w2[n], 0xCD9E8D57u);
                w0[n] = (q >> 32) ^ w1[n] ^ keys[2 * i], w1[n] = q, w2[n] = (p >> 32) ^ w3[n] ^ keys[2 * i + 1], w3[n] = p;
            }
        }
        const vh limit = vh{} + uint16_t(last);
        for (int n = 0; n < PARTS; ++n) {
            const vl bits = small(w0[n], limit, 0) | small(w1[n], limit, 1) | small(w2[n], limit, 2) | small(w3[n], limit, 3);
            narrowed((bits | bits >> 16) & 0xFFull, out + EACH * n);
        }
    }
#else
// Philox4x32-10, counters one after the other.
struct Philox {
    uint32_t k0, k1, high;

    explicit Philox(const Drop& drop) : k0(uint32_t(drop.seed)), k1(drop.site), high(uint32_t(drop.seed >> 32)) {}

    // Bits 0 .. 7 of out[j], for COUNT counters: which elements of the block with counter (c0[j], c1[j], seed's high half, c3) are kept.
    template <int COUNT>
    void kept(const uint32_t* c0, const uint32_t* c1, uint32_t c3, uint32_t last, uint32_t* out) const {
        for (int j = 0; j < COUNT; ++j) {
            uint32_t word[4] = {c0[j], c1[j], high, c3}, a = k0, b = k1;
            for (int i = 0; i < 10; ++i, a += 0x9E3779B9u, b += 0xBB67AE85u) {
                const uint64_t p = word[0] * uint64_t(0xD2511F53u), q = word[2] * uint64_t(0xCD9E8D57u);
                word[0] = uint32_t(q >> 32) ^ word[1] ^ a, word[1] = uint32_t(q), word[2] = uint32_t(p >> 32) ^ word[3] ^ b, word[3] = uint32_t(p);
            }
            uint32_t bits = 0;
            for (int k = 0; k < 4; ++k) bits |= uint32_t((word[k] & 0xFFFF) <= last) << k | uint32_t(word[k] >> 16 <= last) << (k + 4);
            out[j] = bits;
        }
    }
#endif

    // The same of the blocks n .. n + COUNT - 1 of a tensor's elements. A call of its own: inside, it would take its caller's sums their registers.
    template <int COUNT>
    __attribute__((noinline)) void kept(uint64_t n, uint32_t last, uint32_t* out) const {
        uint32_t low[COUNT], above[COUNT];
        for (uint64_t j = 0; j < COUNT; ++j) low[j] = uint32_t(n + j), above[j] = uint32_t((n + j) >> 32);
        kept<COUNT>(low, above, 0, last, out);
    }
};

constexpr int DRAWN = 16;  // blocks of eight elements whose bits are drawn together

// Of elements' bits, eight to a word or byte: the mask of LANES of them, the first a multiple of LANES.
template <class Eight>
INLINE vf mask_at(const Eight* bits, int64_t first) {
    const uint32_t own = bits[first / 8];
    return mask_of(LANES == 16 ? own | uint32_t(bits[first / 8 + 1]) << 8 : LANES == 8 ? own : own >> first % 8);
}

// ---------------------------------------------------------------- dropout (ops/dropout.py)

static void dropout_row(const Philox& random, const float* x, float* y, int64_t width, uint64_t block, const Drop& drop) {
    uint32_t bits[DRAWN];
    for (; width >= 8 * DRAWN; width -= 8 * DRAWN, x += 8 * DRAWN, y += 8 * DRAWN, block += DRAWN) {
        random.kept<DRAWN>(block, drop.last, bits);
        for (int64_t d = 0; d < 8 * DRAWN; d += LANES) store(y + d, both(load(x + d) * drop.scale, mask_at(bits, d)));
    }
    if (width > 0) random.kept<DRAWN>(block, drop.last, bits);
    for (int64_t d = 0; d < width; d += LANES) {
        if (const int64_t left = width - d; left >= LANES)
            store(y + d, both(load(x + d) * drop.scale, mask_at(bits, d)));
        else
            store(y + d, both(load(x + d, left) * drop.scale, mask_at(bits, d)), left);
    }
}

static void dropout(Rows x, float* y, int64_t first, int64_t last, int64_t width, const Drop& drop) {
    const Philox random(drop);
    for (int64_t t = first; t < last; ++t) dropout_row(random, x.at(t), y + t * width, width, uint64_t(t) * uint64_t((width + 7) / 8), drop);
}

static void dropout_flat(const float* x, float* y, int64_t first, int64_t last, const Drop& drop) {
    dropout_row(Philox(drop), x + first, y + first, last - first, uint64_t(first) / 8, drop);
}

// ---------------------------------------------------------------- norm (ops/norm.py)

static void norm_forward(const NormForward& op, int64_t first, int64_t last) {
    const Philox random(op.drop);
    const int64_t width = op.width, whole = width / LANES * LANES, rest = width - whole, blocks = (width + 7) / 8;
    for (int64_t t = first; t < last; ++t) {
        const float *hidden = op.hidden.at(t), *residual = op.residual.at(t);
        float *out = op.out + t * width, *sums = op.sum ? op.sum + t * width : out;
        vf even = {}, odd = {};  // named and taken in turn: an array indexed by a running number would lie in memory
        uint32_t bits[DRAWN];
        for (int64_t d = 0; d < width; d += LANES) {
            if (op.drop.on && d % (8 * DRAWN) == 0) random.kept<DRAWN>(uint64_t(t) * uint64_t(blocks) + uint64_t(d / 8), op.drop.last, bits);
            const bool full = d < whole;
            vf v = full ? load(hidden + d) : load(hidden + d, rest);
            if (op.drop.on) v = both(v * op.drop.scale, mask_at(bits, d % (8 * DRAWN)));
            if (residual) v += full ? load(residual + d) : load(residual + d, rest);
            const vf next = odd + v;
            odd = even, even = next;
            if (full) store(sums + d, v);
            else store(sums + d, v, rest);
        }
        const float rough = sum(even + odd) / float(width);
        vf shifts[2] = {}, squares[2] = {};  // of the sums about `rough`, which rows far from zero leave a few roundings off the mean
        int64_t d = 0;
        for (; d + 2 * LANES <= whole; d += 2 * LANES) {
            const vf v = load(sums + d) - rough, w = load(sums + d + LANES) - rough;
            shifts[0] += v, squares[0] += v * v;
            shifts[1] += w, squares[1] += w * w;
        }
        if (d < whole) {
            const vf v = load(sums + d) - rough;
            shifts[0] += v, squares[0] += v * v;
        }
        if (rest) {
            const vf v = both(load(sums + whole, rest) - rough, first_lanes(rest));
            shifts[0] += v, squares[0] += v * v;
        }
        const float shift = sum(shifts[0] + shifts[1]) / float(width), mean = rough + shift;
        const float rstd = 1.0f / __builtin_sqrtf(sum(squares[0] + squares[1]) / float(width) - shift * shift + op.epsilon);
        if (op.mean) op.mean[t] = mean, op.rstd[t] = rstd;
        for (int64_t d = 0; d < whole; d += LANES) store(out + d, (load(sums + d) - mean) * rstd * load(op.gain + d) + load(op.bias + d));
        for (int64_t d = whole; d < width; ++d) out[d] = (sums[d] - mean) * rstd * op.gain[d] + op.bias[d];
    }
}

// With n = (s - mean) rstd and g = dy gain: ds = rstd (g - mean(g) - n mean(g n)); ds is dresidual, and dhidden once it is dropped.
static void norm_backward(const NormBackward& op, int64_t first, int64_t last, float* partial) {
    const Philox random(op.drop);
    const int64_t width = op.width, whole = width / LANES * LANES, rest = width - whole, blocks = (width + 7) / 8;
    const bool inputs = op.dhidden || op.dresidual;
    float *dgain = partial, *dbias = partial ? partial + width : nullptr;
    if (partial) __builtin_memset(partial, 0, size_t(2 * width) * sizeof(float));
    for (int64_t t = first; t < last; ++t) {
        const float *dy = op.dy.at(t), *sums = op.sum + t * width, mean = op.mean[t], rstd = op.rstd[t];
        vf totals = {}, products = {};
        for (int64_t d = 0; d < whole; d += LANES) {
            const vf v = load(dy + d), n = (load(sums + d) - mean) * rstd, g = v * load(op.gain + d);
            totals += g, products += g * n;
            if (partial) store(dgain + d, load(dgain + d) + v * n), store(dbias + d, load(dbias + d) + v);
        }
        float total = sum(totals), product = sum(products);
        for (int64_t d = whole; d < width; ++d) {
            const float n = (sums[d] - mean) * rstd, g = dy[d] * op.gain[d];
            total += g, product += g * n;
            if (partial) dgain[d] += dy[d] * n, dbias[d] += dy[d];
        }
        if (!inputs) continue;
        const float c1 = total / float(width), c2 = product / float(width);
        float *dhidden = op.dhidden ? op.dhidden + t * width : nullptr, *dresidual = op.dresidual ? op.dresidual + t * width : nullptr;
        uint32_t bits[DRAWN];
        const bool drops = op.drop.on && dhidden;
        for (int64_t d = 0; d < width; d += LANES) {
            if (drops && d % (8 * DRAWN) == 0) random.kept<DRAWN>(uint64_t(t) * uint64_t(blocks) + uint64_t(d / 8), op.drop.last, bits);
            const bool full = d < whole;
            const vf v = full ? load(dy + d) : load(dy + d, rest), s = full ? load(sums + d) : load(sums + d, rest);
            const vf gain = full ? load(op.gain + d) : load(op.gain + d, rest);
            const vf ds = rstd * (v * gain - c1 - (s - mean) * rstd * c2);
            if (dresidual) {
                if (full) store(dresidual + d, ds);
                else store(dresidual + d, ds, rest);
            }
            if (dhidden) {
                const vf dh = drops ? both(ds * op.drop.scale, mask_at(bits, d % (8 * DRAWN))) : ds;
                if (full) store(dhidden + d, dh);
                else store(dhidden + d, dh, rest);
            }
        }
    }
}

// ---------------------------------------------------------------- gelu (ops/gelu.py)

// y = z Phi(z), dx = dy (Phi(z) + z phi(z)). For a = |z|, 1 - Phi(a) = e^(-a^2 / 2) R(1 / (1 + 0.29 a)) with a polynomial R of degree 8, fitted here to the
// smallest relative error over 0 .. 9.5: 1.6e-8, in float32 1.5e-7 absolute at 0. phi takes the same exponential.
INLINE vf gelu_value(vf z, vf dy, bool backward) {
    const vf a = magnitude(z);
    const vf t = 1.0f / (a * 0.29f + 1.0f);
    vf r = all(0.04116119317347154f);
    r = r * t + -0.20198399769209574f;
    r = r * t + 0.32568164499211427f;
    r = r * t + -0.17455308554256976f;
    r = r * t + 0.2027126163521597f;
    r = r * t + 0.06907798071703153f;
    r = r * t + 0.12299050394736197f;
    r = r * t + 0.11487317547931519f;
    r = r * t + 3.997620572519574e-05f;
    const vf e = exponential(z * z * -0.5f);
    const vf tail = e * r;
    const vf phi = z < 0.0f ? tail : 1.0f - tail;
    return backward ? dy * (phi + z * e * 0.3989422804f) : z * phi;
}

template <bool BACKWARD>
static void gelu_rows(const Gelu& op, int64_t first, int64_t last, float* partial) {
    const int64_t width = op.width, whole = width / LANES * LANES, rest = width - whole;
    if (partial) __builtin_memset(partial, 0, size_t(width) * sizeof(float));
    for (int64_t t = first; t < last; ++t) {
        const float *x = op.x.at(t), *dy = BACKWARD ? op.dy.at(t) : x;
        float* out = op.out + t * width;
        for (int64_t d = 0; d < whole; d += LANES) {
            const vf z = op.bias ? load(x + d) + load(op.bias + d) : load(x + d), v = gelu_value(z, load(dy + d), BACKWARD);
            store(out + d, v);
            if (partial) store(partial + d, load(partial + d) + v);
        }
        if (rest) {
            const vf z = op.bias ? load(x + whole, rest) + load(op.bias + whole, rest) : load(x + whole, rest);
            const vf v = gelu_value(z, load(dy + whole, rest), BACKWARD);
            store(out + whole, v, rest);
            if (partial) store(partial + whole, load(partial + whole, rest) + v, rest);
        }
    }
}

static void gelu(const Gelu& op, int64_t first, int64_t last, float* partial) {
    op.dy.data ? gelu_rows<true>(op, first, last, partial) : gelu_rows<false>(op, first, last, partial);
}

// ---------------------------------------------------------------- adamw (optimizer.py)

INLINE void adamw_lanes(const AdamW& op, vf& values, vf& first, vf& second, vf gradient) {
    first += (gradient - first) * op.rise1;
    second = second * op.beta2 + gradient * gradient * op.rise2;
    values = values * op.kept - first * op.size / (root(second) * op.root_factor + op.epsilon);
}

static void adamw(const AdamW& op, int64_t first, int64_t last) {
    int64_t i = first;
    for (; i + LANES <= last; i += LANES) {
        vf values = load(op.values + i), m = load(op.first + i), v = load(op.second + i);
        adamw_lanes(op, values, m, v, load(op.gradient + i));
        store(op.values + i, values), store(op.first + i, m), store(op.second + i, v);
    }
    if (const int64_t rest = last - i; rest > 0) {
        vf values = load(op.values + i, rest), m = load(op.first + i, rest), v = load(op.second + i, rest);
        adamw_lanes(op, values, m, v, load(op.gradient + i, rest));
        store(op.values + i, values, rest), store(op.first + i, m, rest), store(op.second + i, v, rest);
    }
}

template <int N>
struct Several {
    vf v[N];
};

// Of N vectors of neighbours in `count` rows, or, N = 1, of n <= LANES neighbours; by halves, so that the error grows with the logarithm of the count.
template <int N>
static Several<N> sum_of_rows(const float* rows, int64_t count, int64_t stride, int64_t n = LANES) {
    Several<N> total{};
    if (count > 8) {
        total = sum_of_rows<N>(rows, count / 2, stride, n);
        const Several<N> more = sum_of_rows<N>(rows + count / 2 * stride, count - count / 2, stride, n);
        for (int j = 0; j < N; ++j) total.v[j] += more.v[j];
        return total;
    }
    for (int64_t i = 0; i < count; ++i, rows += stride)
        for (int j = 0; j < N; ++j) total.v[j] += N > 1 || n == LANES ? load(rows + j * LANES) : load(rows, n);
    return total;
}

static void add_rows(float* sum, const float* rows, int64_t count, int64_t stride, int64_t width) {
    constexpr int N = 8;  // lines of cache that follow each other, sums that do not wait for each other, one recursion for all
    int64_t d = 0;
    for (; d + N * LANES <= width; d += N * LANES) {
        const Several<N> total = sum_of_rows<N>(rows + d, count, stride);
        for (int64_t j = 0; j < N; ++j) store(sum + d + j * LANES, load(sum + d + j * LANES) + total.v[j]);
    }
    for (; d + LANES <= width; d += LANES) store(sum + d, load(sum + d) + sum_of_rows<1>(rows + d, count, stride).v[0]);
    if (const int64_t rest = width - d; rest > 0) store(sum + d, load(sum + d, rest) + sum_of_rows<1>(rows + d, count, stride, rest).v[0], rest);
}

// ---------------------------------------------------------------- mlm_loss (tasks.py)

static float loss_forward(const Loss& op, int64_t row) {
    const int64_t width = op.vocabulary, whole = width / LANES * LANES;
    const float* logits = op.logits + row * width;
    vf most = all(-__builtin_inff());
    for (int64_t v = 0; v < whole; v += LANES) most = larger(load(logits + v), most);
    float top = largest(most);
    for (int64_t v = whole; v < width; ++v) top = logits[v] > top ? logits[v] : top;
    double total = 0.0;
    for (int64_t v = 0; v < width;) {  // in stretches: a float32 sum over a whole vocabulary would lose digits
        vf part = {};
        const int64_t end = v + 1024 < whole ? v + 1024 : whole;
        for (; v < end; v += LANES) part += exponential(load(logits + v) - top);
        if (v == whole && v < width) part += both(exponential(load(logits + v, width - v) - top), first_lanes(width - v)), v = width;
        total += double(sum(part));
    }
    op.tops[row] = top, op.sums[row] = float(total);
    return float(__builtin_log(total) - (double(logits[op.targets[row]]) - double(top)));
}

static void loss_backward(const Loss& op, int64_t row, float factor) {
    const int64_t width = op.vocabulary, whole = width / LANES * LANES;
    const float *logits = op.logits + row * width, top = op.tops[row], share = factor / op.sums[row];
    float* dlogits = op.dlogits + row * width;
    for (int64_t v = 0; v < whole; v += LANES) store(dlogits + v, exponential(load(logits + v) - top) * share);
    if (whole < width) store(dlogits + whole, exponential(load(logits + whole, width - whole) - top) * share, width - whole);
    dlogits[op.targets[row]] -= factor;
}

#include "ops_attention.h"

#undef INLINE

}  // namespace OPS_NAMESPACE

const Kernels OPS_TABLE = {
    OPS_NAMESPACE::dropout,           OPS_NAMESPACE::dropout_flat,       OPS_NAMESPACE::norm_forward, OPS_NAMESPACE::norm_backward,
    OPS_NAMESPACE::gelu,              OPS_NAMESPACE::adamw,              OPS_NAMESPACE::add_rows,     OPS_NAMESPACE::attention_scratch,
    OPS_NAMESPACE::attention_forward, OPS_NAMESPACE::attention_backward, OPS_NAMESPACE::loss_forward, OPS_NAMESPACE::loss_backward,
};

}  // namespace ops
