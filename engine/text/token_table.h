// Ids by text, for a vocabulary: some hundred thousand tokens that are looked up a million times while a tokenizer.json is read. The texts
// lie in one string and the slots in one array (open addressing), so that a lookup waits for two places of memory, of which the second is
// often in a cache.
#pragma once
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "engine/error.h"

namespace kava {

class TokenTable {
 public:
  TokenTable() : TokenTable(0, 0) {}
  /// Room for `count` tokens of `bytes` bytes in all.
  TokenTable(std::size_t count, std::size_t bytes) : slots_(std::bit_ceil(2 * count + 1)) { texts_.reserve(bytes); }

  bool empty() const { return texts_.empty(); }

  /// At most `count` times, with texts of `bytes` bytes in all. False where the text is there already, which stays.
  bool add(std::string_view text, std::int32_t id) {
    const std::uint32_t hash = hash_of(text);
    Slot& slot = slots_[find(text, hash)];
    if (slot.id >= 0) return false;
    KAVA_CHECK(texts_.size() + text.size() <= std::numeric_limits<std::uint32_t>::max(), "{} bytes of tokens", texts_.size());
    slot = {hash, static_cast<std::uint32_t>(texts_.size()), static_cast<std::uint32_t>(text.size()), id};
    texts_ += text;
    return true;
  }

  /// -1 where the text is not there.
  std::int32_t id_of(std::string_view text) const { return slots_[find(text, hash_of(text))].id; }

 private:
  struct Slot {
    std::uint32_t hash = 0, begin = 0, size = 0;
    std::int32_t id = -1;
  };

  static std::uint32_t hash_of(std::string_view text) { return static_cast<std::uint32_t>(std::hash<std::string_view>{}(text)); }
  /// The slot of the text, or the free one where it would be.
  std::size_t find(std::string_view text, std::uint32_t hash) const {
    const std::size_t mask = slots_.size() - 1;
    std::size_t at = hash & mask;
    for (; slots_[at].id >= 0; at = (at + 1) & mask)
      if (const Slot& s = slots_[at]; s.hash == hash && std::string_view(texts_.data() + s.begin, s.size) == text) break;
    return at;
  }

  std::vector<Slot> slots_;  // a power of two, half of them free at least
  std::string texts_;
};

}  // namespace kava
