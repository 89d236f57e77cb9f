// The counterfactual engine: byte for byte what peftdebias/cda.py does, which is the specification and is read first. Plain C ABI, at the end.
//
// What it adds: speed. A block of texts is classified 64 bytes at a time into bit maps (word character, line end, beyond ASCII, to be escaped); words are
// runs of bits; a filter of hash bits turns nearly all of them away before a look-up decides. Nothing is allocated per word or per text:
// buffers grow and stay. Left out: what is an attribute word, a word character, a space, a rule; all of that comes as tables from cda_engine.py.
//
// Which rule decides a pronoun is no search: for each of the five places around it and each class of token there is a bit set of the rules that the place
// allows; the lowest bit of their intersection is the first rule of pronouns.toml that fits.
//
// Texts are UTF-8. `texts` are given by offsets, or `lines` are found here as corpus.py reads a .txt: \n ends a line, one \r before it is dropped, blank
// lines are no texts. A line that is not UTF-8 is reported and no text either.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

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

namespace {

constexpr int ABI = 3;  // of the whole library: this file's C ABI and that of ops.cpp
constexpr int WINDOW = 64;  // cda.WINDOW
constexpr int GAP = 3;      // cda.GAP
constexpr int LONGEST = 400;  // bytes of axes.LONGEST_WORD characters at most
enum { OK = 0, NO_MEMORY = 1, NO_THREAD = 2 };
enum { WORD = 1, SPACE = 2 };
enum { PLURAL_NO_S = 1, ENDS_IN_S = 2, BARE = 4, UPPER = 8 };

inline int lowest_bit(uint64_t bits) { return __builtin_ctzll(bits); }

// ---------------------------------------------------------------- memory

// Bytes that grow; no zeroing, so that growing costs one copy at most.
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }
    void clear() { size_ = 0; }
    void shrink(int64_t size) { size_ = size; }
    int64_t size() const { return size_; }
    const uint8_t* data() const { return data_; }
    uint8_t* room(int64_t more) {
        if (size_ + more > capacity_) grow(more);
        return data_ + size_;
    }
    void add(int64_t n) { size_ += n; }
    void put(const void* bytes, int64_t n) {
        if (n > 0) std::memcpy(room(n), bytes, size_t(n)), size_ += n;
    }
    template <size_t N> void text(const char (&literal)[N]) { put(literal, N - 1); }
    void byte(uint8_t value) { *room(1) = value, ++size_; }
    void number(int64_t value) {  // not negative
        char digits[20];
        int n = 0;
        do digits[n++] = char('0' + value % 10);
        while (value /= 10);
        uint8_t* to = room(n);
        for (int i = 0; i < n; ++i) to[i] = uint8_t(digits[n - 1 - i]);
        size_ += n;
    }

private:
    void grow(int64_t more) {
        int64_t wanted = capacity_ + capacity_ / 2 + 4096;
        if (wanted < size_ + more) wanted = size_ + more;
        void* larger = std::realloc(data_, size_t(wanted));
        if (!larger) throw std::bad_alloc();
        data_ = static_cast<uint8_t*>(larger), capacity_ = wanted;
    }
    uint8_t* data_ = nullptr;
    int64_t size_ = 0, capacity_ = 0;
};

// ---------------------------------------------------------------- words to numbers

    struct Fronts {  // all bits of the first n bytes in memory order
        uint64_t of[9] = {};
        constexpr Fronts() {
            for (int n = 1; n <= 8; ++n)
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
                of[n] = of[n - 1] | uint64_t(0xFF) << (64 - 8 * n);
#else
                of[n] = of[n - 1] | uint64_t(0xFF) << (8 * n - 8);
#endif
        }
    };
constexpr Fronts FRONTS;

// Short byte strings -> a number each. The first 8 bytes are compared as one integer; a filter of 4 KiB, which stays in the nearest cache, turns most
// unknown strings away by one bit of their hash.
class Dictionary {
public:
    void build(const std::vector<std::string>& keys) {
        size_t slots = 16;
        while (slots < keys.size() * 2) slots *= 2;
        slots_.assign(slots, Slot{});
        filter_.assign(FILTER / 64, 0);
        mask_ = slots - 1, keys_ = keys;
        for (size_t i = 0; i < keys.size(); ++i) {
            const auto* bytes = reinterpret_cast<const uint8_t*>(keys[i].data());
            const int64_t n = int64_t(keys[i].size());
            if (find(bytes, n, bytes + n) >= 0) continue;  // the first of two equal ones counts
            const uint64_t head = load(bytes, n, bytes + n);
            const uint64_t h = hash(head, n);
            filter_[h >> 49 >> 6] |= uint64_t(1) << (h >> 49 & 63);
            size_t at = size_t(h) & mask_;
            while (slots_[at].value >= 0) at = (at + 1) & mask_;
            slots_[at] = Slot{head, int32_t(n), int32_t(i)};
        }
    }
    // limit: the end of what may be read.
    int find(const uint8_t* bytes, int64_t n, const uint8_t* limit) const { return find(load(bytes, n, limit), bytes, n); }
    // head: what load() gives.
    int find(uint64_t head, const uint8_t* bytes, int64_t n) const {
        if (!perhaps(head, n)) return -1;
        const uint64_t h = hash(head, n);
        for (size_t at = size_t(h) & mask_; slots_[at].value >= 0; at = (at + 1) & mask_) {
            const Slot& slot = slots_[at];
            if (slot.head == head && slot.length == n && (n <= 8 || !std::memcmp(keys_[size_t(slot.value)].data() + 8, bytes + 8, size_t(n - 8)))) return slot.value;
        }
        return -1;
    }
    // 0 where there is no such string for sure.
    int perhaps(uint64_t head, int64_t n) const {
        const uint64_t h = hash(head, n);
        return int(filter_[h >> 49 >> 6] >> (h >> 49 & 63) & 1);
    }
    // The first 8 bytes in memory order, zeros behind the n-th.
    static uint64_t load(const uint8_t* bytes, int64_t n, const uint8_t* limit) {
        uint64_t head = 0;
        if (limit - bytes >= 8) {
            std::memcpy(&head, bytes, 8);
            return head & FRONTS.of[n < 8 ? n : 8];
        }
        std::memcpy(&head, bytes, size_t(n < 8 ? n : 8));
        return head;
    }

private:
    static constexpr size_t FILTER = 1 << 15;  // bits: the top 15 of a hash
    struct Slot {
        uint64_t head = 0;
        int32_t length = 0, value = -1;
    };
    static uint64_t hash(uint64_t head, int64_t n) {
        const uint64_t h = (head ^ uint64_t(n) * 0x9E3779B97F4A7C15u) * 0xD6E8FEB86659FD93u;
        return h ^ h >> 32;
    }
    std::vector<uint64_t> filter_ = std::vector<uint64_t>(FILTER / 64);
    std::vector<Slot> slots_{16};
    std::vector<std::string> keys_;
    size_t mask_ = 15;
};

std::vector<std::string> strings(const uint8_t* bytes, const int32_t* ends, int32_t n) {
    std::vector<std::string> found;
    for (int32_t i = 0, start = 0; i < n; start = ends[i++]) found.emplace_back(reinterpret_cast<const char*>(bytes) + start, size_t(ends[i] - start));
    return found;
}

template <class T> std::vector<T> copied(const T* from, int64_t n) { return n > 0 ? std::vector<T>(from, from + n) : std::vector<T>(); }

}  // namespace

// ---------------------------------------------------------------- an axis

struct cda_axis {
    struct Word {                    // what a run of word characters may begin
        int32_t form = -1;           // the form that it is, or -1
        std::vector<int32_t> longer; // forms that go on behind an apostrophe, longest first
    };
    std::vector<uint8_t> characters;
    std::vector<std::string> forms, choices;
    std::vector<Word> beginnings;
    Dictionary words, barred, tokens;
    std::vector<int32_t> form_word, form_row, row_ends, token_class, capital_class, spelled;
    std::vector<uint8_t> form_pronoun, form_flags, choice_flags, outcomes;
    std::vector<uint64_t> form_barred, barred_sets, allowed, pronoun_rules;
    int32_t sign_class, end_class, none_class, classes, rules, rule_words, counted;
    int32_t ascii_signs[128];  // class of each sign
    size_t longest_token = 0;

    explicit cda_axis(const cda_tables& t)
        : characters(copied(t.characters, 0x110000)), forms(strings(t.form_bytes, t.form_ends, t.forms)),
          choices(strings(t.choice_bytes, t.choice_ends, t.choices)), form_word(copied(t.form_word, t.forms)), form_row(copied(t.form_row, t.forms)),
          row_ends(copied(t.row_ends, t.rows)), token_class(copied(t.token_class, t.tokens)), capital_class(copied(t.capital_class, t.classes)),
          spelled(t.spelled, t.spelled + 20), form_pronoun(copied(t.form_pronoun, t.forms)), form_flags(copied(t.form_flags, t.forms)),
          choice_flags(copied(t.choice_flags, t.choices)), outcomes(copied(t.outcomes, int64_t(2) * t.rules)),
          form_barred(copied(t.form_barred, t.forms)), barred_sets(copied(t.barred_sets, t.barred)),
          allowed(copied(t.allowed, int64_t(5) * t.classes * t.rule_words)), pronoun_rules(copied(t.pronoun_rules, int64_t(2) * t.rule_words)),
          sign_class(t.sign_class), end_class(t.end_class), none_class(t.none_class), classes(t.classes), rules(t.rules), rule_words(t.rule_words),
          counted(t.words) {
        std::vector<std::string> heads;
        Dictionary known;
        for (const std::string& form : forms) {
            const size_t n = std::min(form.find('\''), form.find("\xE2\x80\x99"));
            heads.push_back(form.substr(0, n));
        }
        known.build(heads);
        beginnings.resize(heads.size());
        for (size_t i = 0; i < forms.size(); ++i) {
            const auto* bytes = reinterpret_cast<const uint8_t*>(heads[i].data());
            Word& word = beginnings[size_t(known.find(bytes, int64_t(heads[i].size()), bytes + heads[i].size()))];
            if (heads[i].size() == forms[i].size())
                word.form = word.form < 0 ? int32_t(i) : word.form;
            else {
                size_t at = 0;
                while (at < word.longer.size() && forms[size_t(word.longer[at])].size() >= forms[i].size()) ++at;
                word.longer.insert(word.longer.begin() + long(at), int32_t(i));
            }
        }
        words = known;
        barred.build(strings(t.barred_bytes, t.barred_ends, t.barred));
        tokens.build(strings(t.token_bytes, t.token_ends, t.tokens));
        for (uint8_t c = 0; c < 128; ++c) {
            const int found = tokens.find(&c, 1, &c + 1);
            ascii_signs[c] = found < 0 ? sign_class : token_class[size_t(found)];
        }
        for (int32_t i = 0, start = 0; i < t.tokens; start = t.token_ends[i++]) longest_token = std::max(longest_token, size_t(t.token_ends[i] - start));
    }
    int32_t row_start(int32_t row) const { return row ? row_ends[size_t(row - 1)] : 0; }
};

namespace {

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

// ---------------------------------------------------------------- one thread's share

struct Text {
    int64_t start, end;
    bool ascii, plain;  // plain: nothing to escape in JSON
};

struct Hit {
    int64_t start, end;
    int32_t form, row, choices;
};

struct Done {  // one replaced stretch
    int64_t start, end;
    int32_t choice;
    int suffix;         // bytes behind the choice: an apostrophe that moved, and its s
    uint8_t tail[4];
};

class Share {
public:
    const cda_axis* axis = nullptr;
    const cda_request* request = nullptr;
    int64_t begin = 0, end = 0;              // bytes of the request
    int64_t first_text = 0, last_text = 0;   // texts of the request, where it gives them
    int64_t first_source = 0;
    int error = OK;
    std::vector<int64_t> counts;
    cda_part part{};

    // Which texts lie here.
    void index() {
        reset();
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

    // What becomes of them.
    void run() {
        for (size_t i = 0; i < texts_.size(); ++i) {
            const int64_t source = first_source + int64_t(i);
            if (source >= request->from_source && source < request->to_source) text(texts_[i], source);
        }
        part.bytes = out_.data(), part.n_bytes = out_.size();
        part.ends = ends_.data(), part.n_members = int64_t(ends_.size());
        part.sizes = sizes_.data(), part.sources = sources_.data(), part.n_families = int64_t(sizes_.size());
        part.swaps = swaps_.data(), part.swap_counts = swap_counts_.data(), part.afters = afters_.data();
        part.bad = bad_.data(), part.n_bad = int64_t(bad_.size()) / 3;
    }

private:
    const uint8_t* base_ = nullptr;
    Bits word_, high_, line_, escaped_;
    std::vector<Text> texts_;
    Buffer out_, afters_;
    std::vector<int64_t> ends_, sources_, swaps_, bad_, starts_;
    std::vector<int32_t> sizes_, swap_counts_;
    std::vector<Hit> hits_;
    std::vector<Done> done_;
    int64_t original_ = 0, original_size_ = 0;

    void reset() {
        part = cda_part{};
        counts.assign(size_t(axis->counted), 0);
        texts_.clear(), out_.clear(), afters_.clear(), ends_.clear(), sources_.clear(), swaps_.clear(), bad_.clear(), sizes_.clear(), swap_counts_.clear();
    }

    void report(int64_t start, int64_t stop) { bad_.insert(bad_.end(), {part.lines, begin + start, begin + stop}); }

    // Takes a text up, its word bits made exact beyond ASCII. Returns where it is not UTF-8, or -1.
    int64_t add(int64_t start, int64_t stop) {
        bool ascii = true;
        for (int64_t i = high_.next(start, stop); i < stop; i = high_.next(i, stop)) {
            uint32_t code;
            const int n = decode(base_ + i, base_ + stop, code);
            if (!n) return i;
            if (!(axis->characters[code] & WORD)) word_.clear(i, n);
            ascii = false;
            i += n;
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

    bool word_at(int64_t i, const Text& t) const { return i < t.end && word_.at(i); }

    // ---- one text

    void text(const Text& t, int64_t source) {
        find(t);
        int made = 0;
        const int64_t at = out_.size();
        const bool json = request->write == WRITE_JSON, members = request->write != WRITE_NOTHING && !json;
        if (members && request->keep != KEEP_COUNTERFACTUALS) original(t);
        if (!hits_.empty()) made = variants(t, source);
        part.touched += made > 0, part.variants += made;
        if (!made && !axis_keeps()) {
            out_.shrink(at);
            if (members && request->keep != KEEP_COUNTERFACTUALS) ends_.pop_back(), drop_count();
            return;
        }
        int size = members ? (made && request->keep == KEEP_COUNTERFACTUALS ? made : request->keep == KEEP_PAIRS ? 1 + made : 1) : 0;
        if (members && !made && request->keep == KEEP_COUNTERFACTUALS) original(t);
        if (json && (!made || request->keep == KEEP_ORIGINALS)) {
            out_.text("{\"text\": \"");
            piece(t, t.start, t.end);
            out_.text("\", \"counterfactual\": null, \"swaps\": [], \"source\": ");
            out_.number(source);
            out_.text("}\n");
        }
        if (members) sizes_.push_back(size), sources_.push_back(source);
    }

    bool axis_keeps() const { return request->keep_untouched != 0; }

    void original(const Text& t) {
        out_.put(base_ + t.start, t.end - t.start);
        member();
        if (request->write == WRITE_SWAPS) swap_counts_.push_back(0);
    }

    void member() {
        if (request->write == WRITE_LINES) out_.byte('\n');
        ends_.push_back(out_.size());
    }

    void drop_count() {
        if (request->write == WRITE_SWAPS) swap_counts_.pop_back();
    }

    // The attribute words, from left to right.
    void find(const Text& t) {
        hits_.clear();
        const uint8_t* limit = request->bytes + request->size;
        int64_t free_from = t.start;
        uint64_t carry = 0;
        for (int64_t w = t.start >> 6; w <= (t.end - 1) >> 6 && t.end > t.start; ++w) {
            uint64_t bits = word_.word(w);
            if (w == t.start >> 6) bits &= ~uint64_t(0) << (t.start & 63);
            if (w == (t.end - 1) >> 6) bits &= ~uint64_t(0) >> (63 - ((t.end - 1) & 63));
            uint64_t starts = bits & ~(bits << 1 | carry);
            carry = bits >> 63;
            // Which words may be known is decided without a branch: it goes one way or the other too often to be foreseen.
            struct Candidate {
                int64_t start, n;
                uint64_t head;
            } candidates[32];
            int many = 0;
            for (; starts; starts &= starts - 1) {
                const int64_t start = (w << 6) + lowest_bit(starts);
                const uint64_t run = ~(bits >> (start & 63));
                const int rest = 64 - int(start & 63);
                int64_t n = run ? lowest_bit(run) : 64;
                if (n >= rest) n = word_.next_clear(start + rest, t.end) - start;
                const uint64_t head = Dictionary::load(base_ + start, n, limit);
                candidates[many] = Candidate{start, n, head};
                many += axis->words.perhaps(head, n);
            }
            for (const Candidate* candidate = candidates; candidate < candidates + many; ++candidate) {
                const int64_t start = candidate->start;
                int64_t n = candidate->n;
                if (start < free_from) continue;
                const int found = axis->words.find(candidate->head, base_ + start, n);
                if (found < 0) continue;
                const cda_axis::Word& word = axis->beginnings[size_t(found)];
                int32_t form = word.form;
                for (int32_t longer : word.longer) {
                    const std::string& bytes = axis->forms[size_t(longer)];
                    const int64_t size = int64_t(bytes.size());
                    if (start + size <= t.end && !std::memcmp(base_ + start, bytes.data(), size_t(size)) && !word_at(start + size, t)) {
                        form = longer, n = size;
                        break;
                    }
                }
                if (form < 0) continue;
                free_from = start + n;
                if (axis->form_barred[size_t(form)] && is_barred(t, start, axis->form_barred[size_t(form)])) continue;
                ++counts[size_t(axis->form_word[size_t(form)])];
                hits_.push_back(Hit{start, start + n, form, 0, 0});
            }
        }
    }

    // Whether the word before `start` is in one of the sets.
    bool is_barred(const Text& t, int64_t start, uint64_t sets) const {
        int64_t end_before = start;
        while (end_before > std::max(t.start, start - GAP) && (base_[end_before - 1] == ' ' || base_[end_before - 1] == '-')) --end_before;
        if (end_before == start) return false;
        int64_t begin_before = end_before;
        while (begin_before > t.start && end_before - begin_before <= LONGEST && word_.at(begin_before - 1)) --begin_before;
        const int found = axis->barred.find(base_ + begin_before, end_before - begin_before, request->bytes + request->size);
        return found >= 0 && axis->barred_sets[size_t(found)] & sets;
    }

    // All variants of a text with hits; how many.
    int variants(const Text& t, int64_t source) {
        int64_t longest = 0, candidates = 0;
        for (Hit& hit : hits_) {
            int32_t row = axis->form_row[size_t(hit.form)];
            if (const int pronoun = axis->form_pronoun[size_t(hit.form)]) row += outcome(t, hit, pronoun - 1);
            hit.row = row, hit.choices = axis->row_ends[size_t(row)] - axis->row_start(row);
            longest = std::max<int64_t>(longest, hit.choices), candidates += hit.choices;
        }
        if (!request->one_at_a_time) candidates = longest;
        if (!candidates) return 0;
        int64_t first = 0, wanted = candidates;
        if (request->max_variants && candidates > request->max_variants) {
            wanted = request->max_variants;
            first = int64_t(checksum(base_ + t.start, t.end - t.start) % uint64_t(candidates));
        }
        starts_.clear();
        const int64_t mark = out_.size();
        const bool kept = request->write != WRITE_NOTHING && request->keep != KEEP_ORIGINALS;
        if (!kept) written(t);
        int made = 0;
        size_t hit = 0;
        int64_t passed = 0;  // candidates of the hits before `hit`
        for (int64_t i = 0; i < candidates; ++i) {
            if ((i - first + candidates) % candidates >= wanted) continue;
            if (!request->one_at_a_time) {
                made += variant(t, source, i + 1, 0, hits_.size(), kept);
                continue;
            }
            while (i - passed >= hits_[hit].choices) passed += hits_[hit++].choices;
            made += variant(t, source, i - passed + 1, hit, hit + 1, kept);
        }
        if (!kept) out_.shrink(mark);  // they were made to see which differ
        return made;
    }

    // Candidate r over hits first .. last - 1, written unless it repeats the text or an earlier one.
    bool variant(const Text& t, int64_t source, int64_t r, size_t first, size_t last, bool kept) {
        done_.clear();
        for (size_t i = first; i < last; ++i) {
            const Hit& hit = hits_[i];
            const int64_t turn = r % (hit.choices + 1);
            if (!turn) continue;
            Done done{hit.start, hit.end, axis->row_start(hit.row) + int32_t(turn) - 1, 0, {}};
            possessive(t, hit, done);
            done_.push_back(done);
        }
        const bool json = request->write == WRITE_JSON;
        const int64_t row = out_.size();
        if (json && kept) {
            out_.text("{\"text\": \"");
            written(t);
            out_.text("\", \"counterfactual\": \"");
        }
        const int64_t start = out_.size();
        int64_t copied = t.start;
        for (const Done& done : done_) {
            if (done.start > copied) piece(t, copied, done.start);
            const std::string& choice = axis->choices[size_t(done.choice)];
            out_.put(choice.data(), int64_t(choice.size()));
            out_.put(done.tail, done.suffix);
            copied = done.end;
        }
        piece(t, copied, t.end);
        const int64_t size = out_.size() - start;
        if (repeats(t, start, size, json || !kept)) return out_.shrink(row), false;
        starts_.insert(starts_.end(), {start, size});
        part.replaced += int64_t(done_.size());
        if (!kept) return true;
        if (json)
            finish_row(t, source);
        else {
            member();
            if (request->write == WRITE_SWAPS) record(t);
        }
        return true;
    }

    // The text as it is written, kept to compare with.
    void written(const Text& t) {
        original_ = out_.size();
        piece(t, t.start, t.end);
        original_size_ = out_.size() - original_;
    }

    bool repeats(const Text& t, int64_t start, int64_t size, bool was_written) {
        const auto same = [&](const uint8_t* a, int64_t n) { return n == size && !std::memcmp(a, out_.data() + start, size_t(n)); };
        if (was_written ? same(out_.data() + original_, original_size_) : same(base_ + t.start, t.end - t.start)) return true;
        for (size_t i = 0; i < starts_.size(); i += 2)
            if (same(out_.data() + starts_[i], starts_[i + 1])) return true;
        return false;
    }

    // text[start:end] as it is written.
    void piece(const Text& t, int64_t start, int64_t stop) {
        if (request->write != WRITE_JSON || t.plain) return out_.put(base_ + start, stop - start);
        while (start < stop) {
            const int64_t next = escaped_.next(start, stop);
            out_.put(base_ + start, next - start);
            if (next == stop) return;
            escape(base_[next]);
            start = next + 1;
        }
    }

    void escape(uint8_t c) {
        static const char short_forms[] = "\"\"\\\\\nn\rr\tt\ff\bb";
        for (const char* pair = short_forms; *pair; pair += 2)
            if (uint8_t(*pair) == c) return out_.byte('\\'), out_.byte(uint8_t(pair[1]));
        out_.text("\\u00");
        out_.byte(uint8_t('0' + (c >> 4))), out_.byte(uint8_t("0123456789abcdef"[c & 15]));
    }

    void finish_row(const Text& t, int64_t source) {
        out_.text("\", \"swaps\": [");
        int64_t byte = t.start, character = 0;
        bool first = true;
        for (const Done& done : done_) {
            if (!first) out_.text(", ");
            first = false;
            const int64_t from = offset(t, byte, character, done.start), to = offset(t, byte, character, done.end);
            out_.text("{\"start\": "), out_.number(from);
            out_.text(", \"end\": "), out_.number(to);
            out_.text(", \"from\": \""), out_.put(base_ + done.start, done.end - done.start);
            const std::string& choice = axis->choices[size_t(done.choice)];
            out_.text("\", \"to\": \""), out_.put(choice.data(), int64_t(choice.size())), out_.put(done.tail, done.suffix);
            out_.text("\"}");
        }
        out_.text("], \"source\": ");
        out_.number(source);
        out_.text("}\n");
    }

    void record(const Text& t) {
        int64_t byte = t.start, character = 0;
        for (const Done& done : done_) {
            const int64_t from = offset(t, byte, character, done.start), to = offset(t, byte, character, done.end);
            const std::string& choice = axis->choices[size_t(done.choice)];
            afters_.put(choice.data(), int64_t(choice.size())), afters_.put(done.tail, done.suffix);
            swaps_.insert(swaps_.end(), {from, to, afters_.size()});
        }
        swap_counts_.push_back(int32_t(done_.size()));
    }

    // Characters before byte `at`, counted on from the last place asked about.
    int64_t offset(const Text& t, int64_t& byte, int64_t& character, int64_t at) const {
        if (t.ascii) return at - t.start;
        if (at < byte) byte = t.start, character = 0;
        character += characters_in(base_ + byte, base_ + at);
        byte = at;
        return character;
    }

    // cda._possessive
    void possessive(const Text& t, const Hit& hit, Done& done) const {
        const int64_t at = hit.end;
        if (at >= t.end) return;
        int mark = base_[at] == '\'' ? 1 : 0;
        if (!mark && t.end - at >= 3 && !std::memcmp(base_ + at, "\xE2\x80\x99", 3)) mark = 3;
        if (!mark) return;
        const uint8_t before = axis->form_flags[size_t(hit.form)], after = axis->choice_flags[size_t(done.choice)];
        const int64_t next = at + mark;
        if (before & PLURAL_NO_S && after & ENDS_IN_S) {
            if (next < t.end && (base_[next] == 's' || base_[next] == 'S') && !word_at(next + 1, t)) {
                done.end = next + 1;
                std::memcpy(done.tail, base_ + at, size_t(mark)), done.suffix = mark;
            }
        } else if (before & BARE && !(after & ENDS_IN_S)) {
            uint32_t code;
            if (next >= t.end) return;
            const int n = decode(base_ + next, base_ + t.end, code);
            if (axis->characters[code] & SPACE && word_at(next + n, t)) {
                done.end = next;
                std::memcpy(done.tail, base_ + at, size_t(mark));
                done.tail[mark] = after & UPPER ? 'S' : 's', done.suffix = mark + 1;
            }
        }
    }

    // ---- pronouns: cda.deciding_rule

    int outcome(const Text& t, const Hit& hit, int pronoun) {
        int32_t seen[5] = {axis->none_class, axis->none_class, axis->end_class, axis->end_class, axis->end_class};
        if (t.ascii)
            before_ascii(t, hit.start, seen), after_ascii(t, hit.end, seen + 2);
        else
            before(t, hit.start, seen), after(t, hit.end, seen + 2);
        const size_t words = size_t(axis->rule_words);
        for (size_t w = 0; w < words; ++w) {
            uint64_t fitting = axis->pronoun_rules[size_t(pronoun) * words + w];
            for (size_t place = 0; place < 5; ++place) fitting &= axis->allowed[(place * size_t(axis->classes) + size_t(seen[place])) * words + w];
            if (fitting) return axis->outcomes[size_t(pronoun) * size_t(axis->rules) + w * 64 + size_t(lowest_bit(fitting))];
        }
        return 2;  // the last rule of the table always fits
    }

    uint8_t kind(uint32_t code) const { return axis->characters[code]; }

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

    // cda._classes of a word, as the number of its set of classes.
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

    // CRC-32 as zlib has it.
    static uint64_t checksum(const uint8_t* p, int64_t n) {
        static const auto table = [] {
            std::vector<uint32_t> made(256);
            for (uint32_t i = 0; i < 256; ++i) {
                uint32_t c = i;
                for (int k = 0; k < 8; ++k) c = c & 1 ? 0xEDB88320u ^ c >> 1 : c >> 1;
                made[i] = c;
            }
            return made;
        }();
        uint32_t c = 0xFFFFFFFFu;
        for (; n > 0; --n, ++p) c = table[(c ^ *p) & 255] ^ c >> 8;
        return c ^ 0xFFFFFFFFu;
    }
};

}  // namespace

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

    // Equal stretches of bytes, cut where a text ends.
    void divide(const cda_axis& axis, const cda_request& request) {
        const int64_t n = std::max<int64_t>(1, request.threads);
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
