// Attention of one head of one sequence (ops/attention.py), forward and backward. Included by ops_kernels.h, inside its namespace.
//
// Keys and values are copied to scratch, rows W rounded up to APART apart: first those of the prefix, then, from a multiple of APART on, the sequence's own. Places without
// a key get the bias -inf, so that everything runs over whole vectors. Queries come in blocks whose scores stay in cache, each row with all its keys:
// no online softmax. Three products share one small kernel. With p the probabilities, m the mask (0 or 1), c its scale:
//     s = q k^T / sqrt(W),  p = e^(s - top) / sum,  out = c (p m) v
//     dv = (p m)^T (c dout),  dp = m (c dout v^T),  ds = p (dp - sum_j p dp),  dq = ds k / sqrt(W),  dk = ds^T q / sqrt(W)
// The row's sum of p dp is taken from p and dp, so the output is not needed. Saved are top and 1 / sum
// of each row, two numbers, since log(sum) + top in one would lose digits of what it is subtracted from.

// ---------------------------------------------------------------- products

// c [R, LANES * C] (+)= a b over `depth`; a is [R, depth], or [depth, R] where TURNED; b [depth, LANES * C]. What is there is added last: a sum of sums errs less than
// one long sum.
template <int R, int C, bool TURNED, bool ADD>
INLINE void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth) {
    vf total[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) total[r][j] = vf{};
    for (int64_t k = 0; k < depth; ++k) {
        vf right[C];
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) right[j] = load(b + k * ldb + LANES * j);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const float left = TURNED ? a[k * lda + r] : a[r * lda + k];
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) total[r][j] += right[j] * left;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) store(c + r * ldc + LANES * j, ADD ? load(c + r * ldc + LANES * j) + total[r][j] : total[r][j]);
}

template <int C, bool TURNED, bool ADD>
static void strip(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
    for (; rows >= 6; rows -= 6, a += TURNED ? 6 : 6 * lda, c += 6 * ldc) tile<6, C, TURNED, ADD>(a, lda, b, ldb, c, ldc, depth);
    switch (rows) {
        case 5: tile<5, C, TURNED, ADD>(a, lda, b, ldb, c, ldc, depth); break;
        case 4: tile<4, C, TURNED, ADD>(a, lda, b, ldb, c, ldc, depth); break;
        case 3: tile<3, C, TURNED, ADD>(a, lda, b, ldb, c, ldc, depth); break;
        case 2: tile<2, C, TURNED, ADD>(a, lda, b, ldb, c, ldc, depth); break;
        case 1: tile<1, C, TURNED, ADD>(a, lda, b, ldb, c, ldc, depth); break;
    }
}

constexpr int64_t DEPTH = 128;  // terms of one sum, at most

// columns: a multiple of LANES.
template <bool TURNED, bool ADD>
static void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
    if (depth > DEPTH) {
        product<TURNED, ADD>(rows, columns, DEPTH, a, lda, b, ldb, c, ldc);
        return product<TURNED, true>(rows, columns, depth - DEPTH, a + (TURNED ? DEPTH * lda : DEPTH), lda, b + DEPTH * ldb, ldb, c, ldc);
    }
    int64_t j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES) strip<2, TURNED, ADD>(rows, depth, a, lda, b + j, ldb, c + j, ldc);
    if (j < columns) strip<1, TURNED, ADD>(rows, depth, a, lda, b + j, ldb, c + j, ldc);
}

// ---------------------------------------------------------------- copies

// to [rows, w8] = from [rows, width] * factor, the columns behind `width` 0.
static void pack(const float* from, int64_t stride, int64_t rows, int64_t width, int64_t w8, float factor, float* to) {
    const int64_t whole = width / LANES * LANES;
    for (int64_t r = 0; r < rows; ++r, from += stride, to += w8) {
        for (int64_t w = 0; w < whole; w += LANES) store(to + w, load(from + w) * factor);
        if (whole < width) store(to + whole, load(from + whole, width - whole) * factor);
        for (int64_t w = (width + LANES - 1) / LANES * LANES; w < w8; w += LANES) store(to + w, vf{});
    }
}

static void unpack(const float* from, int64_t w8, int64_t rows, int64_t width, float factor, float* to, int64_t stride) {
    const int64_t whole = width / LANES * LANES;
    for (int64_t r = 0; r < rows; ++r, from += w8, to += stride) {
        for (int64_t w = 0; w < whole; w += LANES) store(to + w, load(from + w) * factor);
        if (whole < width) store(to + whole, load(from + whole) * factor, width - whole);
    }
}

INLINE void turn_8x8(const float* from, int64_t stride, float* to, int64_t ld) {
#if defined(OPS_AVX2)
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * stride);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44), a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44), a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to + i * ld, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * ld, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
#else
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) to[j * ld + i] = from[i * stride + j];
#endif
}

// to [w8, ld] = from [n, w8] transposed; n and w8 are multiples of APART.
static void turn(const float* from, int64_t n, int64_t w8, float* to, int64_t ld) {
    for (int64_t j = 0; j < n; j += 8)
        for (int64_t w = 0; w < w8; w += 8) turn_8x8(from + j * w8 + w, w8, to + w * ld + j, ld);
}

// ---------------------------------------------------------------- one head of one sequence

constexpr int64_t APART = LANES < 8 ? 8 : LANES;  // blocks of eight are drawn and turned at once

INLINE int64_t rounded(int64_t n) { return (n + APART - 1) / APART * APART; }

struct Sizes {
    int64_t own, n, ld, w8, block;  // own: place of the sequence's first key; n: places; ld: of rows of scores; block: queries at a time
    Sizes(const Attention& op, int64_t queries, int64_t keys) : own(rounded(op.shared)), n(own + rounded(keys)), w8(rounded(op.width)) {
        ld = n % 64 ? n : n + 8;  // rows that are a power of two apart would share their place in cache
        const int64_t most = n <= 176 ? 96 : n <= 1024 ? 48 : 24, parts = (queries + most - 1) / most;
        block = parts ? (queries + parts - 1) / parts : 0;
    }
};

static size_t attention_scratch(const Attention& op, int64_t queries, int64_t keys) {
    const Sizes s(op, queries, keys);
    return size_t(4 * s.n * s.w8 + 2 * s.w8 * s.ld + 3 * s.block * s.w8 + 2 * s.block * s.ld + s.n + s.block * s.n / 32 + 64);
}

// Hands out parts of the scratch memory in order.
struct Scratch {
    float* next;
    float* take(int64_t count) {
        float* mine = next;
        next += rounded(count);
        return mine;
    }
};

// rows [n, w8] of the prefix's and the sequence's keys, or values.
static void gather(const Attention& op, const Sizes& s, const Stretch& where, int64_t head, const float* own, int64_t stride, const float* prefix, float* rows) {
    __builtin_memset(rows, 0, size_t(s.n * s.w8) * sizeof(float));
    if (op.shared) pack(prefix + head * op.width, op.heads * op.width, op.shared, op.width, s.w8, 1.0f, rows);
    pack(own + where.key0 * stride + head * op.width, stride, where.keys, op.width, s.w8, 1.0f, rows + s.own * s.w8);
}

static void fill_bias(const Attention& op, const Sizes& s, int64_t keys, float* bias) {
    for (int64_t j = 0; j < s.n; ++j) bias[j] = j < op.shared || (j >= s.own && j < s.own + keys) ? 0.0f : -__builtin_inff();
}

// bits [rows, n / 8]: which probabilities of the queries row .. row + rows are kept, of `count` blocks of keys from byte `first` on (attention_keep's counters).
static void fill_bits(const Philox& random, int64_t row, int64_t rows, int64_t first, int64_t count, uint32_t fourth, uint32_t last, uint8_t* bits, int64_t ld) {
    int64_t r = 0, b = 0;
    for (int64_t left = rows * count; left > 0; left -= 8) {
        uint32_t places[8], lines[8], out[8];
        int64_t at[8];
        for (int i = 0; i < 8; ++i) {
            places[i] = uint32_t(b), lines[i] = uint32_t(row + r), at[i] = r * ld + first + b;
            if (++b == count) b = 0, ++r;
        }
        random.kept<8>(places, lines, fourth, last, out);
        for (int i = 0; i < (left < 8 ? int(left) : 8); ++i) bits[at[i]] = uint8_t(out[i]);
    }
}

static void draw(const Attention& op, const Sizes& s, const Philox& random, int64_t row, int64_t rows, int64_t head, uint8_t* bits) {
    const int64_t ld = s.n / 8, before = s.own / 8;
    if (before) fill_bits(random, row, rows, 0, before, uint32_t(2 + 2 * head), op.drop.last, bits, ld);
    if (ld > before) fill_bits(random, row, rows, before, ld - before, uint32_t(1 + 2 * head), op.drop.last, bits, ld);
}

static void attention_forward(const Attention& op, const Stretch& where, int64_t head, float* scratch) {
    const Sizes s(op, where.queries, where.keys);
    const int64_t out_stride = op.heads * op.width;
    if (!s.n) {  // no keys: nothing to weigh
        for (int64_t i = 0; i < where.queries; ++i) __builtin_memset(op.out + (where.query0 + i) * out_stride + head * op.width, 0, size_t(op.width) * sizeof(float));
        return;
    }
    Scratch room{scratch};
    float *rows = room.take(s.n * s.w8), *turned = room.take(s.w8 * s.ld), *query = room.take(s.block * s.w8), *out = room.take(s.block * s.w8);
    float *scores = room.take(s.block * s.ld), *bias = room.take(s.n);
    uint8_t* bits = reinterpret_cast<uint8_t*>(room.take(s.block * s.n / 32 + 8));
    const Philox random(op.drop);
    gather(op, s, where, head, op.key, op.key_stride, op.prefix_key, rows);
    turn(rows, s.n, s.w8, turned, s.ld);
    gather(op, s, where, head, op.value, op.value_stride, op.prefix_value, rows);
    fill_bias(op, s, where.keys, bias);
    for (int64_t i0 = 0; i0 < where.queries; i0 += s.block) {
        const int64_t count = where.queries - i0 < s.block ? where.queries - i0 : s.block, row = where.query0 + i0;
        pack(op.query + row * op.query_stride + head * op.width, op.query_stride, count, op.width, s.w8, 1.0f / __builtin_sqrtf(float(op.width)), query);
        product<false, false>(count, s.n, s.w8, query, s.w8, turned, s.ld, scores, s.ld);
        if (op.drop.on) draw(op, s, random, row, count, head, bits);
        for (int64_t i = 0; i < count; ++i) {
            float* line = scores + i * s.ld;
            vf most = all(-__builtin_inff()), total = {};
            for (int64_t j = 0; j < s.n; j += LANES) most = larger(load(line + j) + load(bias + j), most);
            const float top = largest(most);
            for (int64_t j = 0; j < s.n; j += LANES) {
                const vf p = exponential(load(line + j) + load(bias + j) - top);
                total += p;
                store(line + j, op.drop.on ? both(p, mask_at(bits + i * (s.n / 8), j)) : p);
            }
            const float whole = sum(total), factor = (op.drop.on ? op.drop.scale : 1.0f) / whole;
            if (op.statistics) {
                float* mine = op.statistics + 2 * (head * op.all_queries + row + i);
                mine[0] = top, mine[1] = 1.0f / whole;
            }
            for (int64_t j = 0; j < s.n; j += LANES) store(line + j, load(line + j) * factor);
        }
        product<false, false>(count, s.w8, s.n, scores, s.ld, rows, s.w8, out, s.w8);
        unpack(out, s.w8, count, op.width, 1.0f, op.out + row * out_stride + head * op.width, out_stride);
    }
}

static void attention_backward(const Attention& op, const Stretch& where, int64_t head, float* prefix, float* scratch) {
    const Sizes s(op, where.queries, where.keys);
    const int64_t at = head * op.width;
    const float scale = 1.0f / __builtin_sqrtf(float(op.width)), kept = op.drop.on ? op.drop.scale : 1.0f;
    Scratch room{scratch};
    float *key = room.take(s.n * s.w8), *key_turned = room.take(s.w8 * s.ld), *value = room.take(s.n * s.w8), *value_turned = room.take(s.w8 * s.ld);
    float *dkey = room.take(s.n * s.w8), *dvalue = room.take(s.n * s.w8), *query = room.take(s.block * s.w8), *dout = room.take(s.block * s.w8);
    float *dquery = room.take(s.block * s.w8), *p = room.take(s.block * s.ld), *dp = room.take(s.block * s.ld), *bias = room.take(s.n);
    uint8_t* bits = reinterpret_cast<uint8_t*>(room.take(s.block * s.n / 32 + 8));
    const bool keys = op.dkey || prefix, values = op.dvalue || prefix;
    const Philox random(op.drop);
    gather(op, s, where, head, op.key, op.key_stride, op.prefix_key, key);
    turn(key, s.n, s.w8, key_turned, s.ld);
    gather(op, s, where, head, op.value, op.value_stride, op.prefix_value, value);
    turn(value, s.n, s.w8, value_turned, s.ld);
    fill_bias(op, s, where.keys, bias);
    __builtin_memset(dkey, 0, size_t(s.n * s.w8) * sizeof(float));
    __builtin_memset(dvalue, 0, size_t(s.n * s.w8) * sizeof(float));
    for (int64_t i0 = 0; i0 < where.queries; i0 += s.block) {
        const int64_t count = where.queries - i0 < s.block ? where.queries - i0 : s.block, row = where.query0 + i0;
        pack(op.query + row * op.query_stride + at, op.query_stride, count, op.width, s.w8, scale, query);
        pack(op.dout + row * op.dout_stride + at, op.dout_stride, count, op.width, s.w8, kept, dout);
        product<false, false>(count, s.n, s.w8, query, s.w8, key_turned, s.ld, p, s.ld);
        product<false, false>(count, s.n, s.w8, dout, s.w8, value_turned, s.ld, dp, s.ld);
        if (op.drop.on) draw(op, s, random, row, count, head, bits);
        for (int64_t i = 0; i < count; ++i) {
            float *line = p + i * s.ld, *dline = dp + i * s.ld;
            const uint8_t* kept_here = bits + i * (s.n / 8);
            const float* known = op.known + 2 * (head * op.all_queries + row + i);
            const float top = known[0], part = known[1];
            vf total = {};
            for (int64_t j = 0; j < s.n; j += LANES) {
                const vf share = exponential(load(line + j) + load(bias + j) - top) * part;
                vf d = load(dline + j);
                if (op.drop.on) d = both(d, mask_at(kept_here, j));
                total += share * d;
                store(line + j, share), store(dline + j, d);
            }
            const float delta = sum(total);
            for (int64_t j = 0; j < s.n; j += LANES) {  // line becomes ds, dline what the values were weighted with
                const vf share = load(line + j);
                store(line + j, share * (load(dline + j) - delta));
                store(dline + j, op.drop.on ? both(share, mask_at(kept_here, j)) : share);
            }
        }
        if (values) product<true, true>(s.n, s.w8, count, dp, s.ld, dout, s.w8, dvalue, s.w8);
        if (keys) product<true, true>(s.n, s.w8, count, p, s.ld, query, s.w8, dkey, s.w8);
        if (op.dquery) {
            product<false, false>(count, s.w8, s.n, p, s.ld, key, s.w8, dquery, s.w8);
            unpack(dquery, s.w8, count, op.width, scale, op.dquery + row * op.dquery_stride + at, op.dquery_stride);
        }
    }
    if (op.dkey) unpack(dkey + s.own * s.w8, s.w8, where.keys, op.width, 1.0f, op.dkey + where.key0 * op.dkey_stride + at, op.dkey_stride);
    if (op.dvalue) unpack(dvalue + s.own * s.w8, s.w8, where.keys, op.width, 1.0f, op.dvalue + where.key0 * op.dvalue_stride + at, op.dvalue_stride);
    if (prefix) {
        for (int64_t i = 0; i < op.shared; ++i) {
            for (int64_t w = 0; w < op.width; ++w) {
                prefix[i * op.width + w] += dkey[i * s.w8 + w];
                prefix[(op.shared + i) * op.width + w] += dvalue[i * s.w8 + w];
            }
        }
    }
}
