// One thread's share of the work: the attribute words of its texts, their counterfactuals, and what is written of them.

#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "cda_pronouns.h"

namespace cda {

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

struct Made {  // a variant of the text at hand; mark: of its bytes, where many are compared
    int64_t start, size;
    uint64_t mark;
};

struct Change {  // a variant that is not kept: `size` bytes at out_[at] stand for text[start:end]
    int64_t start, end, at, size;
};

class Share : public Pronouns {
public:
    int64_t first_source = 0;
    int error = OK;
    std::vector<int64_t> counts;

    // Which texts lie here.
    void index() {
        counts.assign(size_t(axis->counted), 0);
        out_.clear(), afters_.clear(), ends_.clear(), sources_.clear(), swaps_.clear(), sizes_.clear(), swap_counts_.clear();
        read();
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
    Buffer out_, afters_;
    std::vector<int64_t> ends_, sources_, swaps_;
    std::vector<Made> made_;
    std::vector<Change> changes_;
    std::vector<int32_t> sizes_, swap_counts_;
    std::vector<Hit> hits_;
    std::vector<Done> done_;
    int64_t original_ = 0, original_size_ = 0;

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
        for (int gap = 0; gap < GAP; ++gap) end_before -= joint_before(end_before, t.start);
        if (end_before == start) return false;
        int64_t begin_before = end_before;
        while (begin_before > t.start && end_before - begin_before <= LONGEST && word_.at(begin_before - 1)) --begin_before;
        const int found = axis->barred.find(base_ + begin_before, end_before - begin_before, request->bytes + request->size);
        return found >= 0 && axis->barred_sets[size_t(found)] & sets;
    }

    // Bytes of one of cda.JOINTS that ends at `end`; 0 where another character does.
    int64_t joint_before(int64_t end, int64_t least) const {
        if (end <= least) return 0;
        const uint8_t c = base_[end - 1];
        if (c == ' ' || c == '-' || c == '\t' || c == '\n' || c == '\r') return 1;
        if (c == 0xA0 && end - 2 >= least && base_[end - 2] == 0xC2) return 2;
        const bool wide = c == 0x87 || c == 0x89 || c == 0x8A || c == 0x90 || c == 0x91 || c == 0xAF;
        return wide && end - 3 >= least && base_[end - 3] == 0xE2 && base_[end - 2] == 0x80 ? 3 : 0;
    }

    // All variants of a text with hits; how many.
    int variants(const Text& t, int64_t source) {
        int64_t longest = 0, candidates = 0;
        for (Hit& hit : hits_) {
            int32_t row = axis->form_row[size_t(hit.form)];
            if (const int pronoun = axis->form_pronoun[size_t(hit.form)]) row += outcome(t, hit.start, hit.end, pronoun - 1);
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
        made_.clear(), changes_.clear();
        const int64_t mark = out_.size();
        const bool kept = request->write != WRITE_NOTHING && request->keep != KEEP_ORIGINALS;
        if (!kept && !request->one_at_a_time) written(t);
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
        if (!kept && request->one_at_a_time) made = different(), part.replaced += made;
        if (!kept) out_.shrink(mark);  // they were made to see which differ
        return made;
    }

    // Candidate r over hits first .. last - 1, written unless it repeats the text or an earlier one.
    bool variant(const Text& t, int64_t source, int64_t r, size_t first, size_t last, bool kept) {
        done_.clear();
        for (size_t i = first; i < last; ++i) {
            const Hit& hit = hits_[i];
            const int64_t turn = r % (hit.choices + 1);
            if (!turn || (!done_.empty() && hit.start < done_.back().end)) continue;  // the s of a possessive went with the word before it
            Done done{hit.start, hit.end, axis->row_start(hit.row) + int32_t(turn) - 1, 0, {}};
            possessive(t, hit, done);
            done_.push_back(done);
        }
        if (!kept && request->one_at_a_time) return change(t, done_[0]), false;
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
        const uint64_t mark = request->one_at_a_time ? mark_of(out_.data() + start, size) : 0;
        if (repeats(t, start, size, mark, json || !kept)) return out_.shrink(row), false;
        made_.push_back(Made{start, size, mark});
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

    // A variant of one stretch as what it changes: cut down to where it differs from the text, and what only puts bytes in or only takes some out moved on as far as that makes no
    // difference. Two variants are equal exactly if their changes are. Nothing is noted of one that is the text itself.
    void change(const Text& t, const Done& done) {
        const std::string& choice = axis->choices[size_t(done.choice)];
        int64_t start = done.start, end = done.end, at = out_.size();
        out_.put(choice.data(), int64_t(choice.size())), out_.put(done.tail, done.suffix);
        int64_t stop = out_.size(), moved = 0;
        uint8_t* put = out_.data();
        while (at < stop && start < end && put[at] == base_[start]) ++at, ++start;
        while (at < stop && start < end && put[stop - 1] == base_[end - 1]) --stop, --end;
        if (at == stop && start == end) return;
        if (at == stop)
            while (end < t.end && base_[start] == base_[end]) ++start, ++end;
        if (start == end) {
            while (end < t.end && put[at + moved % (stop - at)] == base_[end]) ++moved, ++end;
            std::rotate(put + at, put + at + moved % (stop - at), put + stop), start = end;
        }
        changes_.push_back(Change{start, end, at, stop - at});
    }

    // How many of the changes are different ones.
    int different() {
        const auto key = [this](const Change& one) {
            return std::tuple(one.start, one.end, std::string_view(reinterpret_cast<const char*>(out_.data()) + one.at, size_t(one.size)));
        };
        std::sort(changes_.begin(), changes_.end(), [&](const Change& a, const Change& b) { return key(a) < key(b); });
        return int(std::unique(changes_.begin(), changes_.end(), [&](const Change& a, const Change& b) { return key(a) == key(b); }) - changes_.begin());
    }

    // The text as it is written, kept to compare with.
    void written(const Text& t) {
        original_ = out_.size();
        piece(t, t.start, t.end);
        original_size_ = out_.size() - original_;
    }

    bool repeats(const Text& t, int64_t start, int64_t size, uint64_t mark, bool was_written) {
        const auto same = [&](const uint8_t* a, int64_t n) { return n == size && !std::memcmp(a, out_.data() + start, size_t(n)); };
        if (was_written ? same(out_.data() + original_, original_size_) : same(base_ + t.start, t.end - t.start)) return true;
        for (const Made& other : made_)
            if (other.mark == mark && same(out_.data() + other.start, other.size)) return true;
        return false;
    }

    // A number that equal bytes share, and others hardly ever.
    static uint64_t mark_of(const uint8_t* p, int64_t n) {
        uint64_t found = uint64_t(n);
        for (uint64_t part; n > 0; n -= 8, p += 8) {
            part = 0;
            std::memcpy(&part, p, size_t(std::min<int64_t>(n, 8)));
            found = (found ^ part) * 0x9E3779B97F4A7C15u;
            found ^= found >> 29;
        }
        return found;
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
            if (axis->characters[code] & SPACE && word_at(next + n, t) && !quoted(t, hit.start)) {
                done.end = next;
                std::memcpy(done.tail, base_ + at, size_t(mark));
                done.tail[mark] = after & UPPER ? 'S' : 's', done.suffix = mark + 1;
            }
        }
    }

    // Whether a quotation mark that an apostrophe closes stands before `start`.
    bool quoted(const Text& t, int64_t start) const {
        return (start > t.start && base_[start - 1] == '\'') || (start - 3 >= t.start && !std::memcmp(base_ + start - 3, "\xE2\x80\x98", 3));
    }

    // CRC-32 as zlib has it, eight bytes at a time: row k of the table is what a byte does with k bytes behind it.
    static uint64_t checksum(const uint8_t* p, int64_t n) {
        static const auto tables = [] {
            std::vector<std::array<uint32_t, 256>> made(8);
            for (uint32_t i = 0; i < 256; ++i) {
                uint32_t c = i;
                for (int k = 0; k < 8; ++k) c = c & 1 ? 0xEDB88320u ^ c >> 1 : c >> 1;
                made[0][i] = c;
            }
            for (size_t k = 1; k < 8; ++k)
                for (size_t i = 0; i < 256; ++i) made[k][i] = made[k - 1][i] >> 8 ^ made[0][made[k - 1][i] & 255];
            return made;
        }();
        const auto* table = tables.data();
        uint32_t c = 0xFFFFFFFFu;
        for (; n >= 8; n -= 8, p += 8) {
            const uint32_t mixed = c ^ (p[0] | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24);
            c = table[7][mixed & 255] ^ table[6][mixed >> 8 & 255] ^ table[5][mixed >> 16 & 255] ^ table[4][mixed >> 24];
            c ^= table[3][p[4]] ^ table[2][p[5]] ^ table[1][p[6]] ^ table[0][p[7]];
        }
        for (; n > 0; --n, ++p) c = table[0][(c ^ *p) & 255] ^ c >> 8;
        return c ^ 0xFFFFFFFFu;
    }
};

}  // namespace cda
