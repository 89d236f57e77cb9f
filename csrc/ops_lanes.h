// Four, eight or sixteen lanes at a time, in the vector types of GCC and Clang: what the kernels are written in. Included inside a namespace, once for each kind of
// processor, with OPS_LANES set. Left out: everything that a plain operator says already.

constexpr int64_t LANES = OPS_LANES;

typedef float vf __attribute__((vector_size(4 * OPS_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * OPS_LANES)));
typedef float vf_anywhere __attribute__((vector_size(4 * OPS_LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float* p) { return *reinterpret_cast<const vf_anywhere*>(p); }
INLINE void store(float* p, vf v) { *reinterpret_cast<vf_anywhere*>(p) = v; }
INLINE vf all(float x) { return vf{} + x; }

// The first n lanes; the others are 0, and no memory of theirs is touched.
INLINE vf load(const float* p, int64_t n) {
    float lanes[LANES] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
}
INLINE void store(float* p, vf v, int64_t n) {
    float lanes[LANES];
    store(lanes, v);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// All bits set in the lanes whose bit is.
INLINE vf mask_of(uint32_t bits) {
#if OPS_LANES == 16
    const vi each = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
#elif OPS_LANES == 8
    const vi each = {1, 2, 4, 8, 16, 32, 64, 128};
#else
    const vi each = {1, 2, 4, 8};
#endif
    return (vf)(((vi{} + int32_t(bits)) & each) == each);
}
INLINE vf first_lanes(int64_t n) { return mask_of((1u << n) - 1); }
INLINE vf both(vf v, vf mask) { return (vf)((vi)v & (vi)mask); }

#if defined(OPS_AVX512)
INLINE vf larger(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where one is not a number
INLINE vf root(vf a) { return _mm512_sqrt_ps(a); }
#elif defined(OPS_AVX2)
INLINE vf larger(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf root(vf a) { return _mm256_sqrt_ps(a); }
#elif defined(__SSE2__)
INLINE vf larger(vf a, vf b) { return _mm_max_ps(a, b); }
INLINE vf root(vf a) { return _mm_sqrt_ps(a); }
#else
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
INLINE vf root(vf a) {
    for (int i = 0; i < LANES; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
}
#endif

INLINE float sum(vf v) {
    float lanes[LANES];
    store(lanes, v);
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
INLINE float largest(vf v) {
    float lanes[LANES], most;
    store(lanes, v);
    most = lanes[0];
    for (int64_t i = 1; i < LANES; ++i) most = lanes[i] > most ? lanes[i] : most;
    return most;
}
INLINE vf magnitude(vf v) { return (vf)((vi)v & 0x7FFFFFFF); }

// e^x to about one unit in the last place for x <= 88; 0 below -87, and of -inf; what is not a number stays none.
INLINE vf exponential(vf x) {
    x = larger(all(-90.0f), x);
    const vf whole = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded number
    const vf n = whole - 12582912.0f;
    const vf r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in n times it
    vf p = all(1.9875691500e-4f);  // Cephes' expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const vi power = ((vi)whole - 0x4B400000 + 127) << 23;
    return both(p * (vf)power, (vf) ~(x <= -87.0f));
}
