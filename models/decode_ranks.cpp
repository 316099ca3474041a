#include "models/decode_ranks.h"

#include <array>
#include <bit>
#include <cstring>

#include "engine/error.h"

namespace kava {

namespace {

// Results as whole numbers of 32 bits, for the way between ranks.
using Words = std::vector<int32_t>;

template <class T>
void put(Words& words, const std::vector<T>& values) {
  static_assert(sizeof(T) == sizeof(int32_t));
  words.push_back(static_cast<int32_t>(values.size()));
  for (T v : values) words.push_back(std::bit_cast<int32_t>(v));
}

std::string packed(const std::vector<DecodeResult>& results) {
  Words words;
  for (const DecodeResult& r : results) {
    const auto nll = std::bit_cast<std::array<int32_t, 2>>(r.gold_nll);
    for (int64_t n : {r.tokens, r.passes, r.passes_merged, int64_t{r.hit_limit}, r.gold_tokens}) words.push_back(static_cast<int32_t>(n));
    words.insert(words.end(), nll.begin(), nll.end());
    put(words, r.ids), put(words, r.latents.values), put(words, r.latents.hidden), put(words, r.latents.top),
        put(words, r.latents.positions);
  }
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int32_t)};
}

class Unpacker {
 public:
  explicit Unpacker(const std::string& bytes) : words_(bytes.size() / sizeof(int32_t)) {
    if (!words_.empty()) std::memcpy(words_.data(), bytes.data(), words_.size() * sizeof(int32_t));
  }
  bool more() const { return at_ < words_.size(); }
  DecodeResult next() {
    DecodeResult r;
    r.tokens = word(), r.passes = word(), r.passes_merged = word();
    r.hit_limit = word() != 0;
    r.gold_tokens = word();
    const std::array<int32_t, 2> nll{word(), word()};
    r.gold_nll = std::bit_cast<double>(nll);
    take(r.ids), take(r.latents.values), take(r.latents.hidden), take(r.latents.top), take(r.latents.positions);
    return r;
  }

 private:
  int32_t word() {
    KAVA_CHECK(more(), "results of a rank are cut");
    return words_[at_++];
  }
  template <class T>
  void take(std::vector<T>& values) {
    for (int32_t n = word(); n > 0; --n) values.push_back(std::bit_cast<T>(word()));
  }
  Words words_;
  std::size_t at_ = 0;
};

}  // namespace

std::vector<DecodeResult> gather_results(Comm& comm, const std::vector<DecodeResult>& mine) {
  std::vector<DecodeResult> all;
  for (const std::string& part : comm.gather(packed(mine), "gathering answers"))
    for (Unpacker from(part); from.more();) all.push_back(from.next());
  return all;
}

std::vector<DecodeResult> decode_on_ranks(Comm& comm, Model& model, Arena& arena, std::span<const Sample> questions,
                                          const DecodeOptions& options) {
  if (comm.alone()) return decode(model, arena, questions, options);
  const auto n = questions.size(), ranks = static_cast<std::size_t>(comm.size()), rank = static_cast<std::size_t>(comm.rank());
  const std::size_t begin = n * rank / ranks, end = n * (rank + 1) / ranks;
  DecodeOptions mine = options;
  mine.numbers.clear();
  for (std::size_t i = begin; i < end; ++i) mine.numbers.push_back(options.numbers.empty() ? static_cast<int64_t>(i) : options.numbers[i]);
  std::vector<DecodeResult> decoded;
  if (begin < end) decoded = decode(model, arena, questions.subspan(begin, end - begin), mine);
  return gather_results(comm, decoded);
}

}  // namespace kava
