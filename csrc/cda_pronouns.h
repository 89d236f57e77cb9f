// Which rule of pronouns.toml decides what a pronoun becomes: pronouns.deciding_rule.
//
// It is no search: for each of the five places around a pronoun and each class of token there is a bit set of the rules that the place allows; the lowest bit of
// their intersection is the first rule that fits.

#pragma once

#include <algorithm>
#include <cstring>

#include "cda_block.h"

namespace cda {

class Pronouns : public Block {
protected:
    // What becomes of a pronoun, 0 her or 1 his, that stands from start to end: a column of axis.outcomes.
    int outcome(const Text& t, int64_t start, int64_t end, int pronoun) {
        int32_t seen[5] = {axis->none_class, axis->none_class, axis->end_class, axis->end_class, axis->end_class};
        if (t.ascii)
            before_ascii(t, start, seen), after_ascii(t, end, seen + 2);
        else
            before(t, start, seen), after(t, end, seen + 2);
        const size_t words = size_t(axis->rule_words);
        for (size_t w = 0; w < words; ++w) {
            uint64_t fitting = axis->pronoun_rules[size_t(pronoun) * words + w];
            for (size_t place = 0; place < 5; ++place) fitting &= axis->allowed[(place * size_t(axis->classes) + size_t(seen[place])) * words + w];
            if (fitting) return axis->outcomes[size_t(pronoun) * size_t(axis->rules) + w * 64 + size_t(lowest_bit(fitting))];
        }
        return 2;  // the last rule of the table always fits
    }

private:
    // after() and before() where a byte is a character.
    void after_ascii(const Text& t, int64_t at, int32_t* seen) {
        const int64_t stop = std::min(t.end, at + WINDOW);
        int found = 0;
        for (int64_t i = at; i < stop && found < 3;) {
            const uint8_t c = base_[i];
            if (word_.at(i)) {
                const int64_t n = word_.next_clear(i, stop) - i;
                seen[found++] = token(base_ + i, n, int(n), true);
                i += n;
            } else if (kind(c) & SPACE) {
                const uint8_t* paragraph = c == '\n' ? last_newline(base_ + i, base_ + stop, WINDOW) : nullptr;
                if (paragraph) seen[found++] = axis->end_class;
                i = paragraph ? paragraph - base_ + 1 : i + 1;
            } else
                seen[found++] = axis->ascii_signs[c], ++i;
        }
        for (; found < 3; ++found) seen[found] = stop == t.end ? axis->end_class : axis->none_class;
    }

    void before_ascii(const Text& t, int64_t at, int32_t* seen) {
        const int64_t start = std::max(t.start, at - WINDOW);
        for (int64_t i = at, found = 0; i > start && found < 2;) {
            const uint8_t c = base_[i - 1];
            if (word_.at(i - 1)) {
                int n = 0;
                while (i > start && word_.at(i - 1)) --i, ++n;
                seen[1 - found++] = token(base_ + i, n, n, true);
            } else if (kind(c) & SPACE) {
                int newlines = 0;
                for (; i > start && kind(base_[i - 1]) & SPACE; --i) newlines += base_[i - 1] == '\n';
                if (newlines > 1) seen[1 - found++] = axis->end_class;
            } else
                seen[1 - found++] = axis->ascii_signs[c], --i;
        }
    }

    // The three tokens after `at`; what the window leaves out is no token, what the text leaves out is END.
    void after(const Text& t, int64_t at, int32_t* seen) {
        const uint8_t *p = base_ + at, *stop = base_ + t.end;
        int seen_characters = 0, found = 0;
        while (p < stop && seen_characters < WINDOW && found < 3) {
            uint32_t code;
            const int n = decode(p, stop, code);
            if (kind(code) & WORD) {
                const uint8_t* start = p;
                int characters = 0;
                bool ascii = true;
                do {
                    const int k = decode(p, stop, code);
                    if (!(kind(code) & WORD)) break;
                    ascii &= k == 1, p += k, ++characters;
                } while (p < stop && seen_characters + characters < WINDOW);
                seen_characters += characters;
                seen[found++] = token(start, p - start, characters, ascii);
            } else if (kind(code) & SPACE) {
                const uint8_t* paragraph = code == '\n' ? last_newline(p, stop, WINDOW - seen_characters) : nullptr;
                if (paragraph) {
                    seen[found++] = axis->end_class;
                    seen_characters += int(characters_in(p, paragraph + 1)), p = paragraph + 1;
                } else
                    p += n, ++seen_characters;
            } else {
                seen[found++] = sign(p, n);
                p += n, ++seen_characters;
            }
        }
        for (; found < 3; ++found) seen[found] = p >= stop ? axis->end_class : axis->none_class;
    }

    // The last \n of the white space that begins at p with one, if it has another.
    const uint8_t* last_newline(const uint8_t* p, const uint8_t* stop, int room) const {
        const uint8_t *found = nullptr, *first = p;
        for (uint32_t code; room && p < stop; --room) {
            const int n = decode(p, stop, code);
            if (!(kind(code) & SPACE)) break;
            if (code == '\n' && p != first) found = p;
            p += n;
        }
        return found;
    }

    // The two tokens before `at`: seen[0] the farther one, seen[1] the nearer.
    void before(const Text& t, int64_t at, int32_t* seen) {
        const uint8_t *start = base_ + t.start, *p = base_ + at;
        int room = WINDOW;
        for (int found = 0; p > start && room && found < 2;) {
            uint32_t code;
            const uint8_t* q = previous(p, code);
            if (kind(code) & WORD) {
                const uint8_t* stop = p;
                int characters = 0;
                bool ascii = true;
                for (;;) {
                    ascii &= p - q == 1, p = q, ++characters, --room;
                    if (p == start || !room) break;
                    q = previous(p, code);
                    if (!(kind(code) & WORD)) break;
                }
                seen[1 - found++] = token(p, stop - p, characters, ascii);
            } else if (kind(code) & SPACE) {
                int newlines = 0;
                for (;;) {
                    newlines += code == '\n', p = q, --room;
                    if (p == start || !room) break;
                    q = previous(p, code);
                    if (!(kind(code) & SPACE)) break;
                }
                if (newlines > 1) seen[1 - found++] = axis->end_class;
            } else {
                seen[1 - found++] = sign(q, p - q);
                p = q, --room;
            }
        }
    }

    static const uint8_t* previous(const uint8_t* p, uint32_t& code) {
        const uint8_t* q = p - 1;
        while ((*q & 0xC0) == 0x80) --q;
        decode(q, p, code);
        return q;
    }

    int32_t sign(const uint8_t* p, int64_t n) {
        const int found = axis->tokens.find(p, n, request->bytes + request->size);
        return found < 0 ? axis->sign_class : axis->token_class[size_t(found)];
    }

    // pronouns._classes of a word, as the number of its set of classes.
    int32_t token(const uint8_t* p, int64_t n, int characters, bool ascii) {
        const bool capital = p[0] >= 'A' && p[0] <= 'Z' && n > 1 && p[1] >= 'a' && p[1] <= 'z';
        uint8_t lower[4 * WINDOW];
        if (n <= 8) {
            uint64_t head = Dictionary::load(p, n, request->bytes + request->size);
            if (ascii) head = lowered(head);
            std::memcpy(lower, &head, 8);
        } else
            for (int64_t i = 0; i < n; ++i) lower[i] = ascii && p[i] >= 'A' && p[i] <= 'Z' ? uint8_t(p[i] | 0x20) : p[i];
        if (size_t(n) <= axis->longest_token) {
            const int found = axis->tokens.find(lower, n, lower + sizeof lower);
            if (found >= 0) return capital ? axis->capital_class[size_t(axis->token_class[size_t(found)])] : axis->token_class[size_t(found)];
        }
        const auto ends = [&](const char* ending, int64_t k) { return n >= k && !std::memcmp(lower + n - k, ending, size_t(k)); };
        int ending = 0;
        if (ends("ing", 3) && characters > 5)
            ending = 1;
        else if (ends("ly", 2) && characters > 4)
            ending = 2;
        else if (ends("ed", 2) && !ends("eed", 3) && characters > 4)
            ending = 3;
        else if (characters > 5 && (ends("able", 4) || ends("ible", 4) || ends("ful", 3) || ends("less", 4) || ends("ous", 3)))
            ending = 4;
        const int number = lower[0] >= '0' && lower[0] <= '9';
        return axis->spelled[size_t((number * 5 + ending) * 2 + capital)];
    }

    // Eight ASCII characters in lower case: bit 5 is set where a byte lies in A .. Z.
    static uint64_t lowered(uint64_t head) {
        const uint64_t each = 0x0101010101010101u;
        const uint64_t at_least_a = head + each * (0x80 - 'A'), beyond_z = head + each * (0x7F - 'Z');
        return head | ((at_least_a & ~beyond_z & each * 0x80) >> 2);
    }
};

}  // namespace cda
