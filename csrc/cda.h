// The C ABI of the counterfactual engine (cda.cpp): what cda_engine.py hands over and gets back, field by field, and the numbers that all of its files share.

#pragma once

#include <cstdint>

extern "C" {

// An axis ready for use. `*_ends[i]` is where string i ends in `*_bytes`.
struct cda_tables {
    const uint8_t* characters;  // [0x110000] bit 0: word character, bit 1: space
    const uint8_t* form_bytes;  // what is found, exactly as it stands
    const int32_t* form_ends;
    const int32_t* form_word;     // its number among the counted words
    const int32_t* form_row;      // its row of choices; of a pronoun the first of three: two partners, none
    const uint8_t* form_pronoun;  // 0: no pronoun, 1: her, 2: his
    const uint8_t* form_flags;    // of each: PLURAL_NO_S | ENDS_IN_S | BARE | UPPER
    const int32_t* row_ends;      // choices of row i: row_ends[i - 1] .. row_ends[i]
    const uint8_t* choice_bytes;  // what is put
    const int32_t* choice_ends;
    const uint8_t* choice_flags;  // the same
    const uint64_t* form_barred;  // sets of words behind which the form does not count
    const uint8_t* barred_bytes;  // those words, as they stand
    const int32_t* barred_ends;
    const uint64_t* barred_sets;  // the sets that each is in
    const uint8_t* token_bytes;   // words and signs that the pronoun rules know, in lower case
    const int32_t* token_ends;
    const int32_t* token_class;
    const int32_t* capital_class;  // [classes] the same class with CAPITAL
    const uint64_t* allowed;       // [5, classes, rule_words] the rules that a token of that class allows at that place
    const uint64_t* pronoun_rules; // [2, rule_words] rules for her, for his
    const uint8_t* outcomes;       // [2, rules] which of the three rows
    int32_t spelled[20];           // class by spelling: (number * 5 + ending) * 2 + capital; endings none, ing, ly, ed, adj
    int32_t sign_class, end_class, none_class;
    int32_t forms, rows, choices, words, barred, tokens, classes, rules, rule_words;
};

enum { KEEP_PAIRS = 0, KEEP_ORIGINALS = 1, KEEP_COUNTERFACTUALS = 2 };
enum { WRITE_NOTHING = 0, WRITE_MEMBERS = 1, WRITE_SWAPS = 2, WRITE_JSON = 3, WRITE_LINES = 4 };

struct cda_request {
    const uint8_t* bytes;
    int64_t size;
    const int64_t* ends;  // texts: text i is bytes ends[i - 1] + 1 .. ends[i], one byte \n between two; null: lines
    int64_t texts;
    int64_t first_source;            // number of the first text
    int64_t from_source, to_source;  // texts outside are counted and passed over
    int64_t max_variants;            // 0: no limit
    int32_t one_at_a_time, keep, keep_untouched, write, threads;
};

// What one thread made of its share; shares follow each other as the texts do. Pointers hold until the next run of the job.
struct cda_part {
    const uint8_t* bytes;  // members end to end (WRITE_LINES: each with \n), or jsonl rows
    const int64_t* ends;   // of each member in bytes
    const int32_t* sizes;  // members of each family
    const int64_t* sources;
    const int64_t* swaps;        // WRITE_SWAPS: start, end (characters of the text), end of the replacement in afters: three each
    const int32_t* swap_counts;  // of each member; 0 of an original
    const uint8_t* afters;
    const int64_t* bad;  // lines that are not UTF-8: number of the line in this part, its start and end in the request's bytes: three each
    int64_t n_bytes, n_members, n_families, n_bad;
    int64_t lines, texts, touched, variants, replaced;
};

struct cda_result {
    const cda_part* parts;
    const int64_t* counts;  // [words] how often each attribute word was found
    int64_t n_parts;
};

}  // extern "C"

namespace cda {

constexpr int ABI = 3;  // of the whole library: this C ABI and that of ops.h
constexpr int WINDOW = 64;  // pronouns.WINDOW
constexpr int GAP = 3;      // cda.GAP
constexpr int LONGEST = 400;  // bytes of axes.LONGEST_WORD characters at most
enum { OK = 0, NO_MEMORY = 1 };
enum { WORD = 1, SPACE = 2 };
enum { PLURAL_NO_S = 1, ENDS_IN_S = 2, BARE = 4, UPPER = 8 };

inline int lowest_bit(uint64_t bits) { return __builtin_ctzll(bits); }

}  // namespace cda
