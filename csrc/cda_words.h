// What the counterfactual engine allocates, and words to numbers.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

namespace cda {

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
    uint8_t* data() { return data_; }
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

inline std::vector<std::string> strings(const uint8_t* bytes, const int32_t* ends, int32_t n) {
    std::vector<std::string> found;
    for (int32_t i = 0, start = 0; i < n; start = ends[i++]) found.emplace_back(reinterpret_cast<const char*>(bytes) + start, size_t(ends[i] - start));
    return found;
}

template <class T> std::vector<T> copied(const T* from, int64_t n) { return n > 0 ? std::vector<T>(from, from + n) : std::vector<T>(); }

}  // namespace cda
