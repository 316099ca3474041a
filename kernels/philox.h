// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011). A number is a function of its coordinates alone, so that batch
// split, accumulation, thread count, backend and resumption change nothing. All functions are constexpr, which nvcc takes in device code
// (--expt-relaxed-constexpr), so that the engine and the kernels share them.
#pragma once
#include <array>
#include <cstdint>

namespace kava {

/// The two words of a key in each of the ten rounds.
struct PhiloxKeys {
  uint32_t word[10][2] = {};
  constexpr PhiloxKeys(std::array<uint32_t, 2> key) {
    for (auto& [first, second] : word) {
      first = key[0], second = key[1];
      key[0] += 0x9E3779B9;
      key[1] += 0xBB67AE85;
    }
  }
};

constexpr std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, const PhiloxKeys& keys) {
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ keys.word[round][0], static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ keys.word[round][1], static_cast<uint32_t>(p0)};
  }
  return c;
}

/// What a random number is drawn for: with the seed's high half the first word of the key. The second word is its low half.
enum class Purpose : uint32_t {
  dropout = 1,
  init = 2,
  epoch_order = 3,
  fraction = 4,
  eviction = 5,
  bench = 6,
  synth = 7,
  stage = 8,
  offset = 9,
  sampling = 10,
  bootstrap = 11
};

constexpr std::array<uint32_t, 2> philox_key(Purpose purpose, uint64_t seed) {
  // The high half of a seed beyond 32 bits is turned into the first word, so that no two seeds of one purpose share a key.
  const uint32_t high = static_cast<uint32_t>(seed >> 32);
  return {static_cast<uint32_t>(purpose) ^ (high << 8 | high >> 24), static_cast<uint32_t>(seed)};
}

}  // namespace kava
