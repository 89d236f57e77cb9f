// The encoder's ops on a CPU, float32: threads and the C ABI. What is computed is in ops_kernels.h and ops_attention.h, which are compiled three times: here for any
// processor, in ops_avx2.cpp for AVX2 + FMA, in ops_avx512.cpp for AVX-512. The twins in peftdebias/ops are the specification.
//
// Work is cut into stretches that depend on the sizes alone, and sums over stretches are taken in their order: results are the same for any number of threads. Those
// compute as the caller does: its rounding, and whether it flushes what is too small for a normal number (torch.set_flush_denormal), come with each job on x86 and AArch64.
// Pointers and sizes in, return codes out; nothing is thrown. Shapes and strides are the caller's to check.

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#include <pthread.h>
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#include "ops.h"

#define OPS_LANES 4
#define OPS_NAMESPACE portable
#define OPS_TABLE portable_kernels
#include "ops_kernels.h"

namespace ops {
namespace {

enum { OK = 0, NO_MEMORY = 1, NO_TARGET = 2 };

enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };
std::atomic<int> limit{AVX512};  // the best that may be used

int level() {
#if defined(__x86_64__)
    static const int able = !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) ? PORTABLE
                            : __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                    __builtin_cpu_supports("avx512vl")
                                ? AVX512
                                : AVX2;
    const int most = limit.load(std::memory_order_relaxed);
    return able < most ? able : most;
#else
    return PORTABLE;
#endif
}

const Kernels& kernels() {
#if defined(__x86_64__)
    if (const int found = level(); found != PORTABLE) return found == AVX512 ? avx512_kernels : avx2_kernels;
#endif
    return portable_kernels;
}

// ---------------------------------------------------------------- threads

// How this thread computes: its rounding, and what becomes of denormal numbers.
#if defined(__SSE2__)
using Control = unsigned;
Control control() { return _mm_getcsr(); }
void set_control(Control wanted) { _mm_setcsr(wanted); }
#elif defined(__aarch64__)
using Control = uint64_t;
Control control() {
    Control found;
    __asm__ volatile("mrs %0, fpcr" : "=r"(found));
    return found;
}
void set_control(Control wanted) { __asm__ volatile("msr fpcr, %0" : : "r"(wanted)); }
#else
using Control = int;
Control control() { return 0; }
void set_control(Control) {}
#endif

using Step = void (*)(void* job, int64_t stretch, int thread);

// Threads that sleep until there is a job. The caller works too and takes stretches like the others; a thread that wakes when all are taken goes back to sleep,
// so nobody waits for one that the machine has no room for. One job at a time: a second caller does its own alone.
class Pool {
public:
    // The pool of this process, or null without memory.
    static Pool* here() {
        Pool* found = pool_.load(std::memory_order_acquire);
        if (found || !forks_told_) return found;
        Pool* made = new (std::nothrow) Pool;
        if (!made || pool_.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return made;
        delete made;
        return found;
    }

    void run(void* job, Step step, int64_t stretches, int threads) {
        if (threads > stretches) threads = int(stretches);
        if (threads > MOST) threads = MOST;
        if (threads <= 1 || busy_.exchange(true, std::memory_order_acquire)) {
            for (int64_t i = 0; i < stretches; ++i) step(job, i, 0);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (started_ < threads - 1 && start()) {}
            job_ = job, step_ = step, stretches_ = stretches, places_ = threads - 1, control_ = control(), open_ = true;
            next_.store(0, std::memory_order_relaxed);
            ++number_;
        }
        // As many as are wanted, not all there are. One that wakes in vain (another took the place, or it did this job already) leaves a place empty, no more: the caller
        // takes every stretch that nobody else does, and waits only for those that have begun.
        for (int i = 1; i < threads; ++i) wake_.notify_one();
        work(0, job, step, stretches);
        std::unique_lock<std::mutex> lock(mutex_);
        open_ = false;  // who has not begun by now finds nothing to do
        idle_.wait(lock, [this] { return working_ == 0; });
        lock.unlock();
        busy_.store(false, std::memory_order_release);
    }

    static constexpr int MOST = 64;

private:
    bool start() {
        try {
            std::thread(&Pool::live, this).detach();
        } catch (...) {
            return false;
        }
        ++started_;
        return true;
    }

    void live() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (uint64_t seen = 0;;) {
            wake_.wait(lock, [&] { return open_ && number_ != seen; });
            seen = number_;
            if (places_ == 0) continue;
            const int thread = places_--;
            ++working_;
            void* job = job_;
            const Step step = step_;
            const int64_t stretches = stretches_;
            set_control(control_);
            lock.unlock();
            work(thread, job, step, stretches);
            lock.lock();
            if (--working_ == 0) idle_.notify_one();
        }
    }

    void work(int thread, void* job, Step step, int64_t stretches) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < stretches;) step(job, i, thread);
    }

    inline static std::atomic<Pool*> pool_{nullptr};
    // A forked child has none of its parent's threads and begins anew; what the parent left is not touched, since its locks may be held. Asked for when the library is
    // loaded, before there is a pool.
#if defined(_WIN32)
    static constexpr bool forks_told_ = true;
#else
    inline static const bool forks_told_ = pthread_atfork(nullptr, nullptr, [] { pool_.store(nullptr, std::memory_order_relaxed); }) == 0;
#endif

    std::atomic<bool> busy_{false};
    std::mutex mutex_;
    std::condition_variable wake_, idle_;
    std::atomic<int64_t> next_{0};
    void* job_ = nullptr;
    Step step_ = nullptr;
    int64_t stretches_ = 0;
    Control control_ = 0;
    uint64_t number_ = 0;
    int started_ = 0, places_ = 0, working_ = 0;
    bool open_ = false;
};

template <class Job>
void spread(const Job& job, int64_t stretches, int threads) {
    Pool* pool = threads > 1 && stretches > 1 ? Pool::here() : nullptr;
    if (!pool) {
        for (int64_t i = 0; i < stretches; ++i) job(i, 0);
        return;
    }
    pool->run(const_cast<Job*>(&job), [](void* of, int64_t i, int thread) { (*static_cast<const Job*>(of))(i, thread); }, stretches, threads);
}

constexpr int64_t STRETCH = 16384;  // elements: some ten microseconds of the cheapest op

int64_t rows_at_once(int64_t width) { return width >= STRETCH ? 1 : STRETCH / (width < 1 ? 1 : width); }
int64_t stretches_of(int64_t count, int64_t each) { return (count + each - 1) / each; }

// Waking a thread costs as much as a few stretches.
int worth(int threads, int64_t stretches) { return stretches / 3 < threads ? int(stretches / 3) : threads; }

// fn(first row, last row, stretch) over all rows.
template <class Fn>
void by_rows(int64_t rows, int64_t width, int threads, const Fn& fn) {
    const int64_t each = rows_at_once(width);
    spread([&](int64_t i, int) { fn(i * each, (i + 1) * each < rows ? (i + 1) * each : rows, i); }, stretches_of(rows, each), worth(threads, stretches_of(rows, each)));
}

// sum [width] = the sum of `count` rows that follow each other. Each column is added up for itself, wherever they are cut.
void sum_of(const Kernels& k, float* sum, const float* rows, int64_t count, int64_t width, int threads) {
    const int64_t each = (rows_at_once(count) + 127) / 128 * 128, stretches = stretches_of(width, each);
    std::memset(sum, 0, size_t(width) * sizeof(float));
    spread([&](int64_t i, int) { k.add_rows(sum + i * each, rows + i * each, count, width, i + 1 < stretches ? each : width - i * each); }, stretches, worth(threads, stretches));
}

Drop drop_of(const int64_t* seed, int64_t site, int64_t threshold) {
    if (!seed) return Drop{0, 0, 0, 1.0f, false};
    return Drop{uint64_t(*seed), uint32_t(site), uint32_t(threshold - 1), float(65536.0 / double(threshold)), true};
}

struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

Floats floats(size_t count) {
    void* p = nullptr;
#if defined(_WIN32)
    p = std::malloc(count * sizeof(float) + 64);
#else
    if (posix_memalign(&p, 64, count * sizeof(float) + 64)) p = nullptr;
#endif
    return Floats(static_cast<float*>(p));
}

}  // namespace
}  // namespace ops

// ---------------------------------------------------------------- C ABI

// Calls return OK (0), NO_MEMORY (1) or NO_TARGET (2). Matrices are float32, rows `_stride` elements apart, neighbours in a row next to each other; results are contiguous where
// no stride is given. seed: int64 [1] or null (no dropout); threshold: of 65536, how many are kept. Pointers named as wanted results may be null.

using namespace ops;

// Use no better kernels than 0 portable, 1 AVX2, 2 AVX-512.
EXPORT void peftdebias_ops_limit(int most) { limit.store(most, std::memory_order_relaxed); }

// Which run: 0, 1 or 2.
EXPORT int peftdebias_ops_level() { return level(); }

EXPORT int peftdebias_dropout(const float* x, int64_t x_stride, float* y, int64_t rows, int64_t width, const int64_t* seed, int64_t site, int64_t threshold, int threads) {
    const Drop drop = drop_of(seed, site, threshold);
    const Kernels& k = kernels();
    if (width % 8 == 0 && x_stride == width) {
        const int64_t count = rows * width;
        spread([&](int64_t i, int) { k.dropout_flat(x, y, i * STRETCH, (i + 1) * STRETCH < count ? (i + 1) * STRETCH : count, drop); }, stretches_of(count, STRETCH),
               worth(threads, stretches_of(count, STRETCH)));
    } else {
        by_rows(rows, width, threads, [&](int64_t first, int64_t last, int64_t) { k.dropout(Rows{x, x_stride}, y, first, last, width, drop); });
    }
    return OK;
}

EXPORT int peftdebias_norm_forward(const float* hidden, int64_t hidden_stride, const float* residual, int64_t residual_stride, const float* gain, const float* bias,
                                   float* sum, float* mean, float* rstd, float* out, int64_t rows, int64_t width, float epsilon, const int64_t* seed, int64_t site,
                                   int64_t threshold, int threads) {
    const NormForward op{{hidden, hidden_stride}, {residual, residual_stride}, gain, bias, sum, mean, rstd, out, width, epsilon, drop_of(seed, site, threshold)};
    const Kernels& k = kernels();
    by_rows(rows, width, threads, [&](int64_t first, int64_t last, int64_t) { k.norm_forward(op, first, last); });
    return OK;
}

EXPORT int peftdebias_norm_backward(const float* dy, int64_t dy_stride, const float* sum, const float* mean, const float* rstd, const float* gain, float* dhidden,
                                    float* dresidual, float* dgain_dbias, int64_t rows, int64_t width, const int64_t* seed, int64_t site, int64_t threshold, int threads) {
    const int64_t stretches = stretches_of(rows, rows_at_once(width));
    const Floats partial = dgain_dbias ? floats(size_t(stretches * 2 * width)) : nullptr;
    if (dgain_dbias && !partial) return NO_MEMORY;
    const NormBackward op{{dy, dy_stride}, sum, mean, rstd, gain, dhidden, dresidual, partial.get(), width, drop_of(seed, site, threshold)};
    const Kernels& k = kernels();
    by_rows(rows, width, threads, [&](int64_t first, int64_t last, int64_t i) { k.norm_backward(op, first, last, partial ? partial.get() + i * 2 * width : nullptr); });
    if (dgain_dbias) sum_of(k, dgain_dbias, partial.get(), stretches, 2 * width, threads);
    return OK;
}

// dy null: out = gelu(x + bias); else out = dx, and dbias [width] where it is not null.
EXPORT int peftdebias_gelu(const float* x, int64_t x_stride, const float* dy, int64_t dy_stride, const float* bias, float* out, float* dbias, int64_t rows, int64_t width,
                           int threads) {
    const int64_t stretches = stretches_of(rows, rows_at_once(width));
    const Floats partial = dbias ? floats(size_t(stretches * width)) : nullptr;
    if (dbias && !partial) return NO_MEMORY;
    const Gelu op{{x, x_stride}, {dy, dy_stride}, bias, out, partial.get(), width};
    const Kernels& k = kernels();
    by_rows(rows, width, threads, [&](int64_t first, int64_t last, int64_t i) { k.gelu(op, first, last, partial ? partial.get() + i * width : nullptr); });
    if (dbias) sum_of(k, dbias, partial.get(), stretches, width, threads);
    return OK;
}

EXPORT int peftdebias_adamw(float* values, const float* gradient, float* first, float* second, const float* rates, int64_t count, double beta1, double beta2, double epsilon,
                            int threads) {
    const AdamW op{values, first, second, gradient, rates[0], float(1.0 - beta1), float(beta2), float(1.0 - beta2), rates[1], 1.0f / rates[2], float(epsilon)};
    const Kernels& k = kernels();
    spread([&](int64_t i, int) { k.adamw(op, i * STRETCH, (i + 1) * STRETCH < count ? (i + 1) * STRETCH : count); }, stretches_of(count, STRETCH), worth(threads, stretches_of(count, STRETCH)));
    return OK;
}

// nll [rows] nats; tops and sums [rows] for the backward. A target that is none gives NO_TARGET.
EXPORT int peftdebias_loss_forward(const float* logits, const int64_t* targets, float* tops, float* sums, float* nll, int64_t rows, int64_t vocabulary, int threads) {
    for (int64_t row = 0; row < rows; ++row)
        if (targets[row] < 0 || targets[row] >= vocabulary) return NO_TARGET;
    const Loss op{logits, targets, tops, sums, nullptr, vocabulary};
    const Kernels& k = kernels();
    by_rows(rows, vocabulary, threads, [&](int64_t first, int64_t last, int64_t) {
        for (int64_t row = first; row < last; ++row) nll[row] = k.loss_forward(op, row);
    });
    return OK;
}

// dlogits [rows, vocabulary] = factors[row] * (softmax - one at the target); it may be the logits themselves.
EXPORT int peftdebias_loss_backward(const float* logits, const int64_t* targets, float* tops, float* sums, const float* factors, float* dlogits, int64_t rows,
                                    int64_t vocabulary, int threads) {
    const Loss op{logits, targets, tops, sums, dlogits, vocabulary};
    const Kernels& k = kernels();
    by_rows(rows, vocabulary, threads, [&](int64_t first, int64_t last, int64_t) {
        for (int64_t row = first; row < last; ++row) k.loss_backward(op, row, factors[row]);
    });
    return OK;
}

namespace {

constexpr int64_t GROUPS = 16;  // of sequences; each sums the prefix's gradients for itself

// lengths: [2, sequences] queries and keys of each. prefix_sums: [2, P, H, W] written, or null: sequences are then tasks of their own, else groups of them.
int attention(const Attention& op, const int64_t* lengths, int64_t sequences, bool backward, float* prefix_sums, int threads) {
    const Kernels& k = kernels();
    const std::unique_ptr<Stretch[]> where(new (std::nothrow) Stretch[size_t(sequences + 1)]);
    if (!where) return NO_MEMORY;
    int64_t query0 = 0, key0 = 0;
    size_t most = 0;
    for (int64_t b = 0; b < sequences; ++b) {
        where[size_t(b)] = Stretch{query0, lengths[b], key0, lengths[sequences + b]};
        query0 += lengths[b], key0 += lengths[sequences + b];
        const size_t mine = k.attention_scratch(op, lengths[b], lengths[sequences + b]);
        most = mine > most ? mine : most;
    }
    most = (most + 15) / 16 * 16 + 256;  // threads do not share a line of cache
    threads = threads < 1 ? 1 : threads > Pool::MOST ? Pool::MOST : threads;
    const int64_t groups = prefix_sums && sequences > GROUPS ? GROUPS : sequences, place = 2 * op.shared * op.width;
    if (groups * op.heads < threads) threads = int(groups * op.heads < 1 ? 1 : groups * op.heads);
    const Floats scratch = floats(most * size_t(threads));
    const Floats partial = prefix_sums ? floats(size_t(groups * op.heads * place)) : nullptr;
    if (!scratch || (prefix_sums && !partial)) return NO_MEMORY;
    spread([&](int64_t i, int thread) {
        const int64_t group = i / op.heads, head = i % op.heads;
        float* mine = scratch.get() + size_t(thread) * most;
        float* sums = partial ? partial.get() + i * place : nullptr;
        if (sums) std::memset(sums, 0, size_t(place) * sizeof(float));
        for (int64_t b = group * sequences / groups; b < (group + 1) * sequences / groups; ++b)
            backward ? k.attention_backward(op, where[size_t(b)], head, sums, mine) : k.attention_forward(op, where[size_t(b)], head, mine);
    }, groups * op.heads, threads);
    if (prefix_sums) {  // [groups, H, 2, P, W] -> [2, P, H, W]
        std::memset(prefix_sums, 0, size_t(op.heads * place) * sizeof(float));
        for (int64_t i = 0; i < 2 * op.shared; ++i)
            for (int64_t head = 0; head < op.heads; ++head)
                k.add_rows(prefix_sums + (i * op.heads + head) * op.width, partial.get() + head * place + i * op.width, groups, op.heads * place, op.width);
    }
    return OK;
}

}  // namespace

// query [Mq, H, W], key and value [T, H, W]: strides are those of rows, heads are W apart. prefix_key, prefix_value [P, H, W] or null. out [Mq, H, W], statistics
// [H, Mq, 2] for the backward, or null.
// lengths int64 [2, sequences]: queries and keys of each, summing to Mq and T.
EXPORT int peftdebias_attention_forward(const float* query, int64_t query_stride, const float* key, int64_t key_stride, const float* value, int64_t value_stride,
                                        const float* prefix_key, const float* prefix_value, int64_t shared, float* out, float* statistics, const int64_t* lengths,
                                        int64_t sequences, int64_t all_queries, int64_t heads, int64_t width, const int64_t* seed, int64_t site, int64_t threshold,
                                        int threads) {
    Attention op{};
    op.query = query, op.key = key, op.value = value, op.query_stride = query_stride, op.key_stride = key_stride, op.value_stride = value_stride;
    op.prefix_key = prefix_key, op.prefix_value = prefix_value, op.shared = shared, op.out = out, op.statistics = statistics;
    op.all_queries = all_queries, op.heads = heads, op.width = width, op.drop = drop_of(seed, site, threshold);
    return attention(op, lengths, sequences, false, nullptr, threads);
}

// dquery, dkey, dvalue [., H, W] with row strides, and dprefix [2, P, H, W] (keys, values): each where it is not null.
EXPORT int peftdebias_attention_backward(const float* query, int64_t query_stride, const float* key, int64_t key_stride, const float* value, int64_t value_stride,
                                         const float* prefix_key, const float* prefix_value, int64_t shared, const float* statistics, const float* dout,
                                         int64_t dout_stride, float* dquery, int64_t dquery_stride, float* dkey, int64_t dkey_stride, float* dvalue,
                                         int64_t dvalue_stride, float* dprefix, const int64_t* lengths, int64_t sequences, int64_t all_queries, int64_t heads, int64_t width, const int64_t* seed, int64_t site,
                                         int64_t threshold, int threads) {
    Attention op{};
    op.query = query, op.key = key, op.value = value, op.query_stride = query_stride, op.key_stride = key_stride, op.value_stride = value_stride;
    op.prefix_key = prefix_key, op.prefix_value = prefix_value, op.shared = shared, op.known = statistics, op.dout = dout, op.dout_stride = dout_stride;
    op.dquery = dquery, op.dkey = dkey, op.dvalue = dvalue, op.dquery_stride = dquery_stride, op.dkey_stride = dkey_stride, op.dvalue_stride = dvalue_stride;
    op.all_queries = all_queries, op.heads = heads, op.width = width, op.drop = drop_of(seed, site, threshold);
    return attention(op, lengths, sequences, true, dprefix, threads);
}
