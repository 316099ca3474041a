// What stands between text and a model: its shape, its tokenizer and its end of sequence.
#pragma once
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/data/data.h"
#include "engine/text/tokenizer.h"
#include "models/chat.h"
#include "models/config.h"

namespace kava {

struct TextModel {
  std::string folder;
  ModelConfig shape;
  std::optional<Tokenizer> tokenizer;  // absent where the folder has no tokenizer.json: then only `ids` rows can be read
  std::optional<int32_t> eos;          // absent only without a tokenizer and without eos_token_id in config.json
  std::string note;                    // a line for the user where the folder's files disagree; mostly empty
  ChatForm chat = {};                  // in which questions are asked; mostly none
};

/// Reads config.json and, where there is one, the tokenizer of a model folder; no weights. The end of sequence is the tokenizer's
/// eos_token, else eos_token_id of config.json (a list there alone is an error).
TextModel open_text_model(const std::string& folder);

SampleOptions sample_options(const RunConfig& config, int32_t eos, int64_t vocab_size);

/// Error(code data) where rows of text need a tokenizer and the model's folder has another form of one than tokenizer.json.
void require_tokenizer(const TextModel& text, const std::vector<RowFile>& files);

/// The samples of data files, in file order; those that are left out are counted.
std::vector<Sample> read_samples(const TextModel& text, const RunConfig& config, const std::vector<RowFile>& files, LeftOut* left_out);

/// Leaves out, and counts, the samples that need more positions than the model has, and those whose longest sequence is over
/// data.max_tokens.
void leave_out_long(std::vector<Sample>& samples, const RunConfig& config, const ModelConfig& shape, LeftOut& left_out);

/// Error(code data) naming the file and what left its rows out, where none is left.
void require_samples(const RunConfig& config, const ModelConfig& shape, const std::string& path, std::span<const Sample> samples,
                     const LeftOut& left_out);
/// What was left out and why, in words.
std::string text_of(const LeftOut& left_out, const RunConfig& config, const ModelConfig& shape);

/// The row files of data.train.
std::vector<RowFile> read_train_files(const RunConfig& config);

}  // namespace kava
