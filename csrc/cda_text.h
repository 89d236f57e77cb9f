// UTF-8, and a block of bytes as bit maps: word character, line end, beyond ASCII, to be escaped, 64 bytes at a time.

#pragma once

#include <vector>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cda.h"

namespace cda {

// ---------------------------------------------------------------- UTF-8

// Length of the character at p, or 0 where it is none (RFC 3629: no overlong forms, no surrogates, at most U+10FFFF).
inline int decode(const uint8_t* p, const uint8_t* end, uint32_t& code) {
    const uint8_t a = p[0];
    code = a;
    if (a < 0x80) return 1;
    const auto follows = [&](int i) { return p + i < end && (p[i] & 0xC0) == 0x80; };
    if (a >= 0xC2 && a < 0xE0) {
        if (!follows(1)) return 0;
        return code = uint32_t(a & 0x1F) << 6 | (p[1] & 0x3Fu), 2;
    }
    if (a >= 0xE0 && a < 0xF0) {
        if (!follows(1) || !follows(2)) return 0;
        code = uint32_t(a & 0x0F) << 12 | uint32_t(p[1] & 0x3F) << 6 | (p[2] & 0x3Fu);
        return code >= 0x800 && (code < 0xD800 || code > 0xDFFF) ? 3 : 0;
    }
    if (a >= 0xF0 && a < 0xF5) {
        if (!follows(1) || !follows(2) || !follows(3)) return 0;
        code = uint32_t(a & 0x07) << 18 | uint32_t(p[1] & 0x3F) << 12 | uint32_t(p[2] & 0x3F) << 6 | (p[3] & 0x3Fu);
        return code >= 0x10000 && code <= 0x10FFFF ? 4 : 0;
    }
    return 0;
}

inline int64_t characters_in(const uint8_t* from, const uint8_t* to) {
    int64_t n = 0;
    for (; from < to; ++from) n += (*from & 0xC0) != 0x80;
    return n;
}

// ---------------------------------------------------------------- bit maps

struct Classes {
    uint64_t word, high, line, escaped;
};

#if defined(__SSE2__)
inline Classes classify(const uint8_t* p) {
    Classes found{0, 0, 0, 0};
    for (int i = 0; i < 4; ++i) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i);
        const auto within = [](__m128i v, char low, char high) {
            return _mm_and_si128(_mm_cmpgt_epi8(v, _mm_set1_epi8(char(low - 1))), _mm_cmplt_epi8(v, _mm_set1_epi8(char(high + 1))));
        };
        const auto is = [&](char c) { return _mm_cmpeq_epi8(x, _mm_set1_epi8(c)); };
        const __m128i letter = within(_mm_or_si128(x, _mm_set1_epi8(0x20)), 'a', 'z');
        const __m128i word = _mm_or_si128(_mm_or_si128(letter, within(x, '0', '9')), is('_'));
        const __m128i control = _mm_cmpeq_epi8(_mm_min_epu8(x, _mm_set1_epi8(0x1F)), x);
        const __m128i escaped = _mm_or_si128(_mm_or_si128(is('"'), is('\\')), control);
        const auto bits = [&](__m128i v) { return uint64_t(uint32_t(_mm_movemask_epi8(v))) << (16 * i); };
        found.high |= bits(x), found.word |= bits(_mm_or_si128(word, x)), found.line |= bits(is('\n')), found.escaped |= bits(escaped);
    }
    return found;
}
#else
inline Classes classify(const uint8_t* p) {
    Classes found{0, 0, 0, 0};
    for (int i = 0; i < 64; ++i) {
        const uint8_t c = p[i];
        const uint64_t bit = uint64_t(1) << i;
        const uint8_t letter = uint8_t((c | 0x20) - 'a'), digit = uint8_t(c - '0');
        if (c >= 0x80) found.high |= bit;
        if (c >= 0x80 || letter < 26 || digit < 10 || c == '_') found.word |= bit;
        if (c == '\n') found.line |= bit;
        if (c < 0x20 || c == '"' || c == '\\') found.escaped |= bit;
    }
    return found;
}
#endif

// One bit a byte.
class Bits {
public:
    void resize(int64_t n) { words_.resize(size_t(n / 64 + 2)); }
    uint64_t& word(int64_t i) { return words_[size_t(i)]; }
    bool at(int64_t i) const { return words_[size_t(i >> 6)] >> (i & 63) & 1; }
    void clear(int64_t from, int64_t n) {
        for (int64_t i = from; i < from + n; ++i) words_[size_t(i >> 6)] &= ~(uint64_t(1) << (i & 63));
    }
    // The first set bit in from .. to - 1, or `to`.
    int64_t next(int64_t from, int64_t to) const { return seek(from, to, 0); }
    // The first bit that is not set.
    int64_t next_clear(int64_t from, int64_t to) const { return seek(from, to, ~uint64_t(0)); }

private:
    int64_t seek(int64_t from, int64_t to, uint64_t turned) const {
        if (from >= to) return to;
        int64_t w = from >> 6;
        uint64_t bits = (words_[size_t(w)] ^ turned) & (~uint64_t(0) << (from & 63));
        while (!bits) {
            if ((++w << 6) >= to) return to;
            bits = words_[size_t(w)] ^ turned;
        }
        const int64_t found = (w << 6) + lowest_bit(bits);
        return found < to ? found : to;
    }
    std::vector<uint64_t> words_;
};

}  // namespace cda
