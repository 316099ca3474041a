// The schema of the configuration: one table of every key with its place in RunConfig and its range. Reading, checking, printing, hashing
// and the documentation all walk it, so that no key is written twice. Only the sources of this folder include this.
#pragma once
#include <array>
#include <functional>
#include <variant>

#include "engine/config/config.h"

namespace kava::schema {

struct Whole {
  int64_t* value;
  int64_t least, most;
};

struct Interval {
  double least, most;
  bool without_least = false, without_most = false;
  bool holds(double x) const { return (without_least ? x > least : x >= least) && (without_most ? x < most : x <= most); }
  std::string text() const;
};

struct Real {
  double* value;
  Interval range;
};

struct Pair {
  std::array<double, 2>* value;
  Interval range;
};

struct Flag {
  bool* value;
};

struct Text {
  std::string* value;
  bool is_path = false;
};

struct Choice {
  const std::vector<std::string>* words;
  std::function<std::size_t()> get;
  std::function<void(std::size_t)> set;
};

struct Files {
  std::vector<DataFile>* value;
};

struct Targets {
  std::vector<std::string>* value;
};

using Field = std::variant<Whole, Real, Pair, Flag, Text, Choice, Files, Targets>;

struct Key {
  std::string name;  // "train.lr"
  Field field;
  OnResume on_resume = OnResume::fixed;
  std::string section() const { return name.substr(0, name.find('.') == std::string::npos ? 0 : name.find('.')); }
  std::string leaf() const { return name.substr(name.find('.') + 1); }
};

/// Every key, bound to the members of `config`, in the order in which they are printed.
std::vector<Key> keys_of(RunConfig& config);

/// The linears that LoRA can adapt in one architecture or another, by the names that lora.targets gives them.
const std::vector<std::string>& lora_linears();

/// The key's present value in TOML; floats in the shortest form that reads back.
std::string value_text(const Key& key);

/// What the key may hold, in words: "0 to 1", "lora | all".
std::string range_text(const Key& key);

/// `text` as a TOML string with its quotes.
std::string toml_string(std::string_view text);
std::string real_text(double value);

}  // namespace kava::schema
