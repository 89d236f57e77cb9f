// The counterfactual engine: byte for byte what peftdebias/cda.py does, which is the specification and is read first. Plain C ABI, at the end of this file.
//
// What it adds: speed. A block of texts is classified 64 bytes at a time into bit maps (word character, line end, beyond ASCII, to be escaped); words are
// runs of bits; a filter of hash bits turns nearly all of them away before a look-up decides. Nothing is allocated per word or per text:
// buffers grow and stay. Left out: what is an attribute word, a word character, a space, a rule; all of that comes as tables from cda_engine.py. Written here a second time,
// and held to the specification by tests alone: cda.JOINTS, the class of a word by its spelling, the rule for possessives, and the numbers WINDOW, GAP and LONGEST.
//
// Texts are UTF-8. `texts` are given by offsets, or `lines` are found here as corpus.py reads a .txt: \n ends a line, one \r before it is dropped, blank
// lines are no texts. A line that is not UTF-8 is reported and no text either.
//
//     cda.h -> cda_words.h -> cda_axis.h -> cda_text.h -> cda_block.h -> cda_pronouns.h -> cda_share.h -> this file: threads and their shares, the C ABI

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "cda_share.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

using namespace cda;

// ---------------------------------------------------------------- a job: threads and their shares

struct cda_job {
    std::vector<std::unique_ptr<Share>> shares;
    std::vector<cda_part> parts;
    std::vector<int64_t> counts;

    int run(const cda_axis& axis, const cda_request& request, cda_result& result) {
        divide(axis, request);
        each(&Share::index);
        int64_t source = request.first_source;
        for (auto& share : shares) share->first_source = source, source += share->part.texts;
        each(&Share::run);
        parts.clear();
        counts.assign(size_t(axis.counted), 0);
        for (auto& share : shares) {
            if (share->error) return share->error;
            parts.push_back(share->part);
            for (size_t i = 0; i < counts.size(); ++i) counts[i] += share->counts[i];
        }
        result = cda_result{parts.data(), counts.data(), int64_t(parts.size())};
        return OK;
    }

    // Equal stretches of bytes, cut where a text ends. To start a thread costs as much as some ten kilobytes of text.
    void divide(const cda_axis& axis, const cda_request& request) {
        const int64_t n = std::clamp<int64_t>(request.size >> 16, 1, std::max(1, request.threads));
        while (int64_t(shares.size()) < n) shares.push_back(std::make_unique<Share>());
        shares.resize(size_t(n));
        int64_t begin = 0, text = 0;
        for (int64_t i = 0; i < n; ++i) {
            Share& share = *shares[size_t(i)];
            share.axis = &axis, share.request = &request, share.error = OK;
            const int64_t target = std::max(begin, i + 1 == n ? request.size : request.size / n * (i + 1));
            share.begin = begin, share.first_text = text;
            if (request.ends) {
                while (text < request.texts && (request.ends[text] <= target || i + 1 == n)) ++text;
                begin = text ? std::min(request.size, request.ends[text - 1] + 1) : 0;
                share.end = text ? request.ends[text - 1] : 0;
                share.end = std::max(share.begin, share.end);
            } else {
                const void* newline = target < request.size ? std::memchr(request.bytes + target, '\n', size_t(request.size - target)) : nullptr;
                begin = newline ? static_cast<const uint8_t*>(newline) - request.bytes + 1 : request.size;
                share.end = begin;
            }
            share.last_text = text;
        }
    }

    void each(void (Share::*step)()) {
        const auto guarded = [step](Share* share) {
            if (share->error) return;
            try {
                (share->*step)();
            } catch (...) {
                share->error = NO_MEMORY;
            }
        };
        std::vector<std::thread> threads;
        for (size_t i = 1; i < shares.size(); ++i) {
            try {
                threads.emplace_back(guarded, shares[i].get());
            } catch (...) {  // no thread to be had: this one does the work
                guarded(shares[i].get());
            }
        }
        guarded(shares[0].get());
        for (std::thread& thread : threads) thread.join();
    }
};

// ---------------------------------------------------------------- C ABI

// Calls return OK (0) or NO_MEMORY (1). An axis is read only and may be shared by threads; a job belongs to one at a time.

EXPORT int peftdebias_cda_abi() { return ABI; }

EXPORT int peftdebias_cda_axis_new(const cda_tables* tables, cda_axis** made) {
    try {
        *made = new cda_axis(*tables);
        return OK;
    } catch (...) {
        return NO_MEMORY;
    }
}

EXPORT void peftdebias_cda_axis_free(cda_axis* axis) { delete axis; }

EXPORT int peftdebias_cda_job_new(cda_job** made) {
    *made = new (std::nothrow) cda_job;
    return *made ? OK : NO_MEMORY;
}

EXPORT void peftdebias_cda_job_free(cda_job* job) { delete job; }

EXPORT int peftdebias_cda_run(const cda_axis* axis, cda_job* job, const cda_request* request, cda_result* result) {
    try {
        return job->run(*axis, *request, *result);
    } catch (...) {
        return NO_MEMORY;
    }
}
