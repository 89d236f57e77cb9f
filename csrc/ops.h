// What ops.cpp (threads, C ABI) asks of the kernels, which are compiled for any processor, for AVX2 + FMA and for AVX-512. No state, no allocation but scratch
// memory that the caller hands in; every call does a stretch of the rows, and stretches are cut the same however many threads there are.
//
// Letters: T rows, D columns, H heads, W head width, P prefix length.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ops {

// Dropout from counters; which bits: kernels/fused/dropout.py. An element is kept where its 16 bits are at most `last`, and multiplied by `scale`.
struct Drop {
    uint64_t seed;
    uint32_t site, last;
    float scale;
    bool on;
};

struct Rows {  // of a matrix: neighbours in a row lie next to each other
    const float* data;
    int64_t stride;
    const float* at(int64_t row) const { return data ? data + row * stride : nullptr; }
};

struct NormForward {
    Rows hidden, residual;  // residual.data may be null
    const float *gain, *bias;
    float* sum;  // [T, D] dropout(hidden) + residual, or null
    float *mean, *rstd, *out;  // [T], [T], [T, D]
    int64_t width;
    float epsilon;
    Drop drop;
};

struct NormBackward {
    Rows dy;
    const float *sum, *mean, *rstd, *gain;
    float *dhidden, *dresidual;  // [T, D] or null; where nothing drops, one of them is enough
    float* partial;              // [chunks, 2, D] sums of the gain's and the bias's gradient, or null
    int64_t width;
    Drop drop;
};

struct Gelu {
    Rows x, dy;         // dy.data null: forward
    const float* bias;  // [D] or null
    float* out;         // y, or dx
    float* partial;     // [chunks, D] sums of dx, or null
    int64_t width;
};

struct AdamW {
    float *values, *first, *second;
    const float* gradient;
    float kept;                                // 1 - lr * decay
    float rise1, beta2, rise2;                 // rise: 1 - beta
    float size, root_factor, epsilon;          // lr / (1 - beta1 ^ step); 1 / sqrt(1 - beta2 ^ step)
};

// Queries, keys and values of one head of one sequence; see ops_attention.h.
struct Attention {
    const float *query, *key, *value, *dout;  // [., H, W], heads W apart
    int64_t query_stride, key_stride, value_stride, dout_stride;
    const float *prefix_key, *prefix_value;  // [P, H, W], contiguous, or null
    const float* known;                      // backward: the statistics
    float *out, *statistics;                 // [Mq, H, W] contiguous; [H, Mq, 2] or null: the largest score, 1 / the sum of e^(score - largest)
    float *dquery, *dkey, *dvalue;           // backward; any may be null
    int64_t dquery_stride, dkey_stride, dvalue_stride;
    int64_t all_queries, heads, width, shared;
    Drop drop;
};

struct Stretch {  // of one sequence
    int64_t query0, queries, key0, keys;
};

struct Loss {
    const float* logits;     // [M, V] contiguous
    const int64_t* targets;  // in 0 .. V - 1
    float *tops, *sums;      // [M] the largest logit a, and the sum of e^(logit - a)
    float* dlogits;          // backward
    int64_t vocabulary;
};

struct Kernels {
    void (*dropout)(Rows x, float* y, int64_t first, int64_t last, int64_t width, const Drop& drop);  // rows first .. last; y contiguous
    void (*dropout_flat)(const float* x, float* y, int64_t first, int64_t last, const Drop& drop);    // elements, first a multiple of 8
    void (*norm_forward)(const NormForward& op, int64_t first, int64_t last);
    void (*norm_backward)(const NormBackward& op, int64_t first, int64_t last, float* partial);
    void (*gelu)(const Gelu& op, int64_t first, int64_t last, float* partial);
    void (*adamw)(const AdamW& op, int64_t first, int64_t last);
    void (*add_rows)(float* sum, const float* rows, int64_t count, int64_t stride, int64_t width);  // sum [width] += the sum of `count` rows
    size_t (*attention_scratch)(const Attention& op, int64_t queries, int64_t keys);               // floats
    void (*attention_forward)(const Attention& op, const Stretch& where, int64_t head, float* scratch);
    void (*attention_backward)(const Attention& op, const Stretch& where, int64_t head, float* prefix, float* scratch);  // prefix: [2, P, W] added to, or null
    float (*loss_forward)(const Loss& op, int64_t row);  // nats; writes tops and sums
    void (*loss_backward)(const Loss& op, int64_t row, float factor);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif

}  // namespace ops
