// A block of bytes that one thread takes: which texts lie in it, and where its words do.

#pragma once

#include <cstring>
#include <vector>

#include "cda_axis.h"
#include "cda_text.h"

namespace cda {

struct Text {
    int64_t start, end;
    bool ascii, plain;  // plain: nothing to escape in JSON
};

class Block {
public:
    const cda_axis* axis = nullptr;
    const cda_request* request = nullptr;
    int64_t begin = 0, end = 0;              // bytes of the request
    int64_t first_text = 0, last_text = 0;   // texts of the request, where it gives them
    cda_part part{};

protected:
    const uint8_t* base_ = nullptr;
    Bits word_, high_, line_, escaped_;
    std::vector<Text> texts_;
    std::vector<int64_t> bad_;

    // Which texts lie here.
    void read() {
        part = cda_part{};
        texts_.clear(), bad_.clear();
        base_ = request->bytes + begin;
        const int64_t n = end - begin;
        for (Bits* bits : {&word_, &high_, &line_, &escaped_}) bits->resize(n);
        for (int64_t i = 0; i <= n / 64; ++i) {
            Classes found;
            if (i * 64 + 64 <= n) {
                found = classify(base_ + i * 64);
            } else {
                uint8_t rest[64] = {};
                std::memcpy(rest, base_ + i * 64, size_t(n - i * 64));
                found = classify(rest);
                if (n - i * 64 < 64) found.escaped &= (uint64_t(1) << (n - i * 64)) - 1;
            }
            word_.word(i) = found.word, high_.word(i) = found.high, line_.word(i) = found.line, escaped_.word(i) = found.escaped;
        }
        word_.word(n / 64 + 1) = high_.word(n / 64 + 1) = line_.word(n / 64 + 1) = escaped_.word(n / 64 + 1) = 0;
        if (request->ends) {
            for (int64_t i = first_text; i < last_text; ++i) {
                const int64_t start = (i ? request->ends[i - 1] + 1 : 0) - begin, stop = request->ends[i] - begin;
                const int64_t bad = add(start, stop);
                if (bad >= 0) report(start, stop);
            }
            part.lines = last_text - first_text;
        } else {
            for (int64_t start = 0; start < n; ++part.lines) {
                const int64_t found = line_.next(start, n);
                int64_t stop = found;
                if (stop > start && base_[stop - 1] == '\r') --stop;
                if (add(start, stop) >= 0)
                    report(start, found);
                else if (blank(texts_.back()))
                    texts_.pop_back();
                start = found + 1;
            }
        }
        part.texts = int64_t(texts_.size());
    }

    bool word_at(int64_t i, const Text& t) const { return i < t.end && word_.at(i); }

    uint8_t kind(uint32_t code) const { return axis->characters[code]; }

private:
    void report(int64_t start, int64_t stop) { bad_.insert(bad_.end(), {part.lines, begin + start, begin + stop}); }

    // Takes a text up, its word bits made exact beyond ASCII. Returns where it is not UTF-8, or -1.
    int64_t add(int64_t start, int64_t stop) {
        bool ascii = true;
        for (int64_t i = high_.next(start, stop); i < stop; i = high_.next(i, stop)) {
            ascii = false;
            do {  // they come in runs
                uint32_t code;
                const int n = decode(base_ + i, base_ + stop, code);
                if (!n) return i;
                if (!(axis->characters[code] & WORD)) word_.clear(i, n);
                i += n;
            } while (i < stop && base_[i] >= 0x80);
        }
        texts_.push_back(Text{start, stop, ascii, escaped_.next(start, stop) == stop});
        return -1;
    }

    bool blank(const Text& t) const {
        if (word_.next(t.start, t.end) < t.end) return false;
        for (int64_t i = t.start; i < t.end;) {
            uint32_t code;
            i += decode(base_ + i, base_ + t.end, code);
            if (!(axis->characters[code] & SPACE)) return false;
        }
        return true;
    }
};

}  // namespace cda
