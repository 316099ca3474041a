#include "models/decode_ranks.h"

#include <cstring>

#include "engine/error.h"

namespace kava {

namespace {

// Results as whole numbers, for the way between ranks.
std::string packed(const std::vector<DecodeResult>& results) {
  std::vector<int64_t> words;
  for (const DecodeResult& r : results) {
    words.insert(words.end(), {std::ssize(r.ids), r.tokens, r.hit_limit ? 1 : 0, r.hit_positions ? 1 : 0, r.passes, r.passes_merged});
    words.insert(words.end(), r.ids.begin(), r.ids.end());
  }
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t)};
}

void unpack(std::vector<DecodeResult>& results, const std::string& bytes) {
  std::vector<int64_t> words(bytes.size() / sizeof(int64_t));
  std::memcpy(words.data(), bytes.data(), words.size() * sizeof(int64_t));
  constexpr std::size_t kHead = 6;
  for (std::size_t at = 0; at < words.size();) {
    KAVA_CHECK(at + kHead <= words.size() && words[at] >= 0 && at + kHead + static_cast<std::size_t>(words[at]) <= words.size(),
               "results of a rank are cut");
    DecodeResult& r = results.emplace_back();
    r.tokens = words[at + 1], r.hit_limit = words[at + 2] != 0, r.hit_positions = words[at + 3] != 0;
    r.passes = words[at + 4], r.passes_merged = words[at + 5];
    for (std::size_t end = at + kHead + static_cast<std::size_t>(words[at]), i = at + kHead; i < end; ++i)
      r.ids.push_back(static_cast<int32_t>(words[i]));
    at += kHead + r.ids.size();
  }
}

}  // namespace

std::vector<DecodeResult> decode_on_ranks(Comm& comm, Model& model, Arena& arena, std::span<const Sample> questions,
                                          const DecodeOptions& options) {
  if (comm.alone()) return decode(model, arena, questions, options);
  KAVA_CHECK(!options.keep_latents, "latents stay on their rank");
  const auto n = questions.size(), ranks = static_cast<std::size_t>(comm.size()), rank = static_cast<std::size_t>(comm.rank());
  const std::size_t begin = n * rank / ranks, end = n * (rank + 1) / ranks;
  DecodeOptions mine = options;
  mine.numbers.clear();
  for (std::size_t i = begin; i < end; ++i) mine.numbers.push_back(options.numbers.empty() ? static_cast<int64_t>(i) : options.numbers[i]);
  std::vector<DecodeResult> decoded;
  if (begin < end) decoded = decode(model, arena, questions.subspan(begin, end - begin), mine);
  std::vector<DecodeResult> all;
  for (const std::string& part : comm.gather(packed(decoded), "gathering answers")) unpack(all, part);
  return all;
}

}  // namespace kava
