#include "engine/data/synth.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "engine/error.h"
#include "engine/text/bpe_train.h"
#include "kernels/philox.h"

namespace kava {

namespace {

constexpr int64_t kRing = 10;
constexpr int64_t kValidRows = 2000, kTestRows = 2000;
constexpr uint32_t kLastStepKept = 60;  // of 100 rows of the base file
constexpr const char* kEos = "<|end|>";

constexpr std::array<const char*, kRingNames> kNames = {"Ann", "Ben", "Dan", "Eva", "Finn", "Gus", "Ida", "Jack",
                                                        "Kim", "Leo", "Mia", "Ned", "Pam",  "Rob", "Sue", "Tom"};
constexpr std::array<const char*, 6> kThings = {"apples", "books", "coins", "pens", "shells", "stamps"};

// The random numbers of one row, in order.
class Draws {
 public:
  Draws(int64_t seed, int64_t index)
      : key_(philox_key(Purpose::synth, static_cast<uint64_t>(seed))), index_(static_cast<uint64_t>(index)) {}
  /// Uniform in 0..n-1.
  uint32_t below(uint32_t n) {
    if (next_ % 4 == 0) words_ = philox({static_cast<uint32_t>(index_), static_cast<uint32_t>(index_ >> 32), next_ / 4, 0}, key_);
    return static_cast<uint32_t>(uint64_t{words_[next_++ % 4]} * n >> 32);
  }

 private:
  std::array<uint32_t, 2> key_;
  uint64_t index_;
  std::array<uint32_t, 4> words_{};
  uint32_t next_ = 0;
};

int64_t on_ring(int64_t x) { return (x % kRing + kRing) % kRing; }

bool keeps_last_step(int64_t seed, int64_t index) {
  // Counter word 3 sets these draws apart from those of the row.
  const auto words = philox({static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0, 1},
                            philox_key(Purpose::synth, static_cast<uint64_t>(seed)));
  return (uint64_t{words[0]} * 100 >> 32) < kLastStepKept;
}

double different_questions(int steps) {
  double count = kRing * kThings.size() * kNames.size();  // the start
  for (std::size_t i = 1; i <= static_cast<std::size_t>(steps); ++i)
    count *= static_cast<double>(kNames.size() - i) * (2 * (kRing - 1) + 2);
  return count;
}

std::string line_of(const RingRow& row, bool last_step) {
  std::vector<std::string> steps = row.steps;
  if (!last_step) steps.pop_back();
  return fmt::format("{}||{}{}#### {}\n", row.question, fmt::join(steps, " "), steps.empty() ? "" : " ", row.answer);
}

// Every pre-token that a row, its steps, its answer and the answer prompt can hold.
std::map<std::string, int64_t> ring_words() {
  std::map<std::string, int64_t> words;
  auto add = [&](const std::string& word) { ++words[word]; };
  for (const char* name : kNames) add(name), add(std::string(" ") + name);
  for (const char* thing : kThings) add(std::string(" ") + thing);
  for (int64_t n = 0; n < kRing; ++n) add(fmt::format(" {}", n)), add(fmt::format("{}", n));
  for (const char* word : {" has", " more", " fewer", " than", " times", "'s", ".", " How", " many", " does",   " have", " modulo",
                           " 10",  "?",     "<<",     ">>",    "+",      "-",  "*", "=",    "The",   " answer", " is",   ":"})
    add(word);
  return words;
}

std::map<std::string, std::string> model_files() {
  using nlohmann::ordered_json;
  const BpeVocabulary vocabulary = train_bpe(ring_words(), 4096);
  const std::size_t eos = vocabulary.tokens.size();
  // Rows of the embedding and the head in multiples of 8: the alignment that matrix products like. The spare ones are never used as ids.
  const std::size_t rows = (eos + 1 + 7) / 8 * 8;
  const ordered_json model = {{"architectures", {"LlamaForCausalLM"}},
                              {"model_type", "llama"},
                              {"hidden_size", 128},
                              {"intermediate_size", 256},
                              {"num_hidden_layers", 2},
                              {"num_attention_heads", 4},
                              {"num_key_value_heads", 2},
                              {"head_dim", 32},
                              {"vocab_size", rows},
                              {"max_position_embeddings", 512},
                              {"rms_norm_eps", 1e-5},
                              {"rope_theta", 100.0},
                              {"hidden_act", "silu"},
                              {"attention_bias", false},
                              {"mlp_bias", false},
                              {"tie_word_embeddings", true},
                              {"initializer_range", 0.02},
                              {"bos_token_id", nullptr},
                              {"eos_token_id", eos},
                              {"torch_dtype", "float32"}};
  const ordered_json tokenizer = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                                  {"eos_token", kEos},
                                  {"model_max_length", 512},
                                  {"clean_up_tokenization_spaces", false}};
  return {{"model/config.json", model.dump(1) + "\n"},
          {"model/tokenizer.json", tokenizer_json(vocabulary, kEos)},
          {"model/tokenizer_config.json", tokenizer.dump(1) + "\n"}};
}

}  // namespace

std::string RingRow::trace() const { return fmt::format("{}", fmt::join(steps, " ")); }

RingRow ring_row(int64_t seed, int steps, int64_t index) {
  KAVA_CHECK(steps >= 1 && steps < kRingNames, "{} steps need {} names", steps, steps + 1);
  Draws draws(seed, index);
  auto names = kNames;
  for (uint32_t i = 0; i <= static_cast<uint32_t>(steps); ++i) std::swap(names[i], names[i + draws.below(kRingNames - i)]);
  const char* thing = kThings[draws.below(kThings.size())];
  int64_t value = draws.below(kRing);

  RingRow row;
  row.question = fmt::format("{} has {} {}.", names[0], value, thing);
  for (std::size_t i = 1; i <= static_cast<std::size_t>(steps); ++i) {
    const char *before = names[i - 1], *name = names[i];
    const uint32_t kind = draws.below(4);
    const int64_t b = kind < 2 ? 1 + draws.below(kRing - 1) : draws.below(2) ? 7 : 3;
    const int64_t result = on_ring(kind == 0 ? value + b : kind == 1 ? value - b : value * b);
    row.question += kind == 0   ? fmt::format(" {} has {} more than {}.", name, b, before)
                    : kind == 1 ? fmt::format(" {} has {} fewer than {}.", name, b, before)
                                : fmt::format(" {} has {} times {}'s.", name, b, before);
    row.steps.push_back(fmt::format("<<{}{}{}={}>>", value, "+-**"[kind], b, result));
    value = result;
  }
  row.question += fmt::format(" How many {} does {} have modulo {}?", thing, names[static_cast<std::size_t>(steps)], kRing);
  row.answer = fmt::format("{}", value);
  return row;
}

Split split_of(const RingRow& row) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (char c : row.trace()) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  const uint64_t sixteenth = hash >> 60;
  return sixteenth == 0 ? Split::valid : sixteenth == 1 ? Split::test : Split::train;
}

std::map<std::string, std::string> synthesize(const SynthOptions& options) {
  // Rows come at random: of the last different questions of a small task most draws would be repeats.
  if (static_cast<double>(options.rows) > 0.4 * different_questions(options.steps))
    throw Error(Exit::usage, fmt::format("--rows {}", options.rows),
                fmt::format("too many of the {:.0f} different questions of {} step{}", different_questions(options.steps), options.steps,
                            options.steps == 1 ? "" : "s"),
                "ask for fewer rows or more steps");
  std::map<std::string, std::string> files = model_files();
  std::unordered_set<std::string> questions;
  std::map<Split, int64_t> wanted = {{Split::train, options.rows}, {Split::valid, kValidRows}, {Split::test, kTestRows}};
  int64_t missing = options.rows + kValidRows + kTestRows;
  for (int64_t index = 0; missing > 0; ++index) {
    const RingRow row = ring_row(options.seed, options.steps, index);
    const Split split = split_of(row);
    if (wanted[split] == 0 || !questions.insert(row.question).second) continue;
    --wanted[split];
    --missing;
    if (split == Split::train) {
      files["train.txt"] += line_of(row, true);
      files["base.txt"] += line_of(row, keeps_last_step(options.seed, index));
    } else {
      files[split == Split::valid ? "valid.txt" : "test.txt"] += line_of(row, true);
    }
  }
  return files;
}

}  // namespace kava
