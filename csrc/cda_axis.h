// An axis ready for use: what attribute words, pronoun rules and characters there are, made once of the tables of cda.h and read only from then on.

#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "cda.h"
#include "cda_words.h"

struct cda_axis {
    struct Word {                    // what a run of word characters may begin
        int32_t form = -1;           // the form that it is, or -1
        std::vector<int32_t> longer; // forms that go on behind an apostrophe, longest first
    };
    std::vector<uint8_t> characters;
    std::vector<std::string> forms, choices;
    std::vector<Word> beginnings;
    cda::Dictionary words, barred, tokens;
    std::vector<int32_t> form_word, form_row, row_ends, token_class, capital_class, spelled;
    std::vector<uint8_t> form_pronoun, form_flags, choice_flags, outcomes;
    std::vector<uint64_t> form_barred, barred_sets, allowed, pronoun_rules;
    int32_t sign_class, end_class, none_class, classes, rules, rule_words, counted;
    int32_t ascii_signs[128];  // class of each sign
    size_t longest_token = 0;

    explicit cda_axis(const cda_tables& t)
        : characters(cda::copied(t.characters, 0x110000)), forms(cda::strings(t.form_bytes, t.form_ends, t.forms)),
          choices(cda::strings(t.choice_bytes, t.choice_ends, t.choices)), form_word(cda::copied(t.form_word, t.forms)), form_row(cda::copied(t.form_row, t.forms)),
          row_ends(cda::copied(t.row_ends, t.rows)), token_class(cda::copied(t.token_class, t.tokens)), capital_class(cda::copied(t.capital_class, t.classes)),
          spelled(t.spelled, t.spelled + 20), form_pronoun(cda::copied(t.form_pronoun, t.forms)), form_flags(cda::copied(t.form_flags, t.forms)),
          choice_flags(cda::copied(t.choice_flags, t.choices)), outcomes(cda::copied(t.outcomes, int64_t(2) * t.rules)),
          form_barred(cda::copied(t.form_barred, t.forms)), barred_sets(cda::copied(t.barred_sets, t.barred)),
          allowed(cda::copied(t.allowed, int64_t(5) * t.classes * t.rule_words)), pronoun_rules(cda::copied(t.pronoun_rules, int64_t(2) * t.rule_words)),
          sign_class(t.sign_class), end_class(t.end_class), none_class(t.none_class), classes(t.classes), rules(t.rules), rule_words(t.rule_words),
          counted(t.words) {
        std::vector<std::string> heads;
        cda::Dictionary known;
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
        barred.build(cda::strings(t.barred_bytes, t.barred_ends, t.barred));
        tokens.build(cda::strings(t.token_bytes, t.token_ends, t.tokens));
        for (uint8_t c = 0; c < 128; ++c) {
            const int found = tokens.find(&c, 1, &c + 1);
            ascii_signs[c] = found < 0 ? sign_class : token_class[size_t(found)];
        }
        for (int32_t i = 0, start = 0; i < t.tokens; start = t.token_ends[i++]) longest_token = std::max(longest_token, size_t(t.token_ends[i] - start));
    }
    int32_t row_start(int32_t row) const { return row ? row_ends[size_t(row - 1)] : 0; }
};
