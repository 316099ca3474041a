#include "engine/config/config.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <filesystem>
#include <map>

#include "engine/config/architecture.h"
#include "engine/config/config_files.h"
#include "engine/config/config_schema.h"
#include "engine/config/key_help.h"
#include "engine/config/method_rules.h"
#include "engine/config/toml_text.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/hub.h"
#include "engine/files/json.h"
#include "engine/files/paths.h"

namespace kava {

namespace {

namespace fs = std::filesystem;
using namespace schema;

constexpr int64_t kMostLatents = 4096;

[[noreturn]] void refuse(const std::string& where, const std::string& what, const std::string& remedy) {
  throw Error(Exit::usage, where, what, remedy);
}

class Assigner;

// One value given by the file or by --set.
struct Setting {
  std::string key;
  const toml::node* node;
  std::string where;
  const Assigner* assigner = nullptr;  // whose folder relative paths start from
};

const char* type_name(const toml::node& node) {
  switch (node.type()) {
    case toml::node_type::table:
      return "a table";
    case toml::node_type::array:
      return "an array";
    case toml::node_type::string:
      return "a string";
    case toml::node_type::integer:
      return "an integer";
    case toml::node_type::floating_point:
      return "a float";
    case toml::node_type::boolean:
      return "a boolean";
    default:
      return "a date or time";
  }
}

[[noreturn]] void refuse_unknown(const std::string& name, const std::string& where) {
  refuse(where, fmt::format("unknown key {}", escaped(name)), remedy_for_key(name));
}

// Puts TOML values into the members of a RunConfig, each checked against the schema.
class Assigner {
 public:
  Assigner(RunConfig& config, fs::path folder) : keys_(keys_of(config)), folder_(std::move(folder)) {}

  const std::vector<Key>& keys() const { return keys_; }

  const Key* find(std::string_view name) const {
    auto i = std::find_if(keys_.begin(), keys_.end(), [&](const Key& k) { return k.name == name; });
    return i == keys_.end() ? nullptr : &*i;
  }

  const Key& get(std::string_view name) const {
    const Key* key = find(name);
    KAVA_CHECK(key, "no key {}", name);
    return *key;
  }

  bool is_section(std::string_view name) const {
    return !name.empty() && std::any_of(keys_.begin(), keys_.end(), [&](const Key& k) { return k.section() == name; });
  }

  void assign(const Setting& setting) const {
    const Key& key = get(setting.key);
    std::visit([&](const auto& field) { put(field, key, *setting.node, setting.where); }, key.field);
  }

  void assign_text(std::string_view name, const std::string& toml) const {
    const toml::table table = toml::parse("x = " + toml);
    assign({std::string(name), table.get("x"), std::string(name)});
  }

 private:
  std::vector<Key> keys_;
  fs::path folder_;

  [[noreturn]] static void wrong_type(const Key& key, const toml::node& node, const std::string& where, const char* wanted) {
    refuse(where, fmt::format("{} must be {}, not {}", key.name, wanted, type_name(node)), fmt::format("give {}", range_text(key)));
  }

  [[noreturn]] static void outside(const Key& key, const std::string& value, const std::string& where) {
    refuse(where, fmt::format("{} = {} is outside its range", key.name, value), fmt::format("give {}", range_text(key)));
  }

  static void put(const Whole& field, const Key& key, const toml::node& node, const std::string& where) {
    if (!node.is_integer()) wrong_type(key, node, where, "an integer");
    const int64_t value = node.as_integer()->get();
    if (value < field.least || value > field.most) outside(key, fmt::format("{}", value), where);
    *field.value = value;
  }

  static double number(const Interval& range, const Key& key, const toml::node& node, const std::string& where) {
    if (!node.is_number()) wrong_type(key, node, where, "a number");
    const double value = node.is_integer() ? static_cast<double>(node.as_integer()->get()) : node.as_floating_point()->get();
    if (!std::isfinite(value)) refuse(where, fmt::format("{} must be finite", key.name), fmt::format("give {}", range_text(key)));
    if (!range.holds(value)) outside(key, real_text(value), where);
    return value + 0.0;  // -0.0 becomes 0.0
  }

  static void put(const Real& field, const Key& key, const toml::node& node, const std::string& where) {
    *field.value = number(field.range, key, node, where);
  }

  static void put(const Pair& field, const Key& key, const toml::node& node, const std::string& where) {
    const toml::array* array = node.as_array();
    if (!array) wrong_type(key, node, where, "an array of two numbers");
    if (array->size() != 2) refuse(where, fmt::format("{} has {} elements", key.name, array->size()), "give two numbers");
    for (std::size_t i = 0; i < 2; ++i) (*field.value)[i] = number(field.range, key, (*array)[i], where);
  }

  static void put(const Flag& field, const Key& key, const toml::node& node, const std::string& where) {
    if (!node.is_boolean()) wrong_type(key, node, where, "a boolean");
    *field.value = node.as_boolean()->get();
  }

  static const std::string& text(const Key& key, const toml::node& node, const std::string& where) {
    if (!node.is_string()) wrong_type(key, node, where, "a string");
    const std::string& value = node.as_string()->get();
    if (!is_utf8(value)) refuse(where, fmt::format("{} is not valid UTF-8", key.name), "write it in UTF-8");
    return value;
  }

  std::string resolved(const Key& key, const std::string& path, const std::string& where) const {
    if (path.find('\0') != std::string::npos) refuse(where, fmt::format("the path in {} holds a NUL character", key.name), "remove it");
    if (path.empty()) return "";
    return key.name.starts_with("model.") ? model_folder(folder_, path) : (folder_ / expand_home(path)).string();
  }

  void put(const Text& field, const Key& key, const toml::node& node, const std::string& where) const {
    const std::string& value = text(key, node, where);
    *field.value = field.is_path ? resolved(key, value, where) : value;
  }

  template <class Word>
  static std::size_t index_of(const std::vector<std::string>& words, const Word& word, const std::string& name, const std::string& where) {
    auto i = std::find(words.begin(), words.end(), word);
    if (i == words.end()) refuse(where, fmt::format("{} has no value {}", name, toml_string(escaped(word))), remedy_for_word(word, words));
    return static_cast<std::size_t>(i - words.begin());
  }

  static void put(const Choice& field, const Key& key, const toml::node& node, const std::string& where) {
    field.set(index_of(*field.words, text(key, node, where), key.name, where));
  }

  DataFile file(const Key& key, const toml::node& node, const std::string& where) const {
    if (node.is_string()) {
      DataFile out{resolved(key, text(key, node, where), where), std::nullopt};
      if (out.path.empty()) refuse(where, fmt::format("{} holds an empty path", key.name), "name a file");
      return out;
    }
    const toml::table* table = node.as_table();
    if (!table) wrong_type(key, node, where, "an array of paths or {path, format} tables");
    for (const auto& [name, value] : *table)
      if (name != "path" && name != "format")
        refuse(where, fmt::format("unknown key {} in {}", escaped(name.str()), key.name),
               fmt::format("the nearest valid key is {}", name.str().starts_with("f") ? "format" : "path"));
    const toml::node* path = table->get("path");
    if (!path || !path->is_string())
      refuse(where, fmt::format("an element of {} has no path", key.name), "give {path = \"FILE\", format = \"...\"}");
    DataFile out = file(key, *path, where);
    if (const toml::node* format = table->get("format"))
      out.format = static_cast<DataFormat>(index_of(names_of(DataFormat{}), text(key, *format, where), key.name + ".format", where));
    return out;
  }

  void put(const Files& field, const Key& key, const toml::node& node, const std::string& where) const {
    const toml::array* array = node.as_array();
    if (!array) wrong_type(key, node, where, "an array, as [\"train.txt\"]");
    field.value->clear();
    for (const toml::node& element : *array) field.value->push_back(file(key, element, where));
  }

  static void put(const Targets& field, const Key& key, const toml::node& node, const std::string& where) {
    const toml::array* array = node.as_array();
    if (!array && node.is_string())
      refuse(where, fmt::format("{} must be an array, not {}", key.name, toml_string(escaped(node.as_string()->get()))),
             remedy_for_target(node.as_string()->get(), lora_linears()));
    if (!array) wrong_type(key, node, where, "an array, as [\"q_proj\"]");
    field.value->clear();
    for (const toml::node& element : *array) {
      const std::string& name = text(key, element, where);  // of a linear: apply_architecture looks
      if (std::find(field.value->begin(), field.value->end(), name) != field.value->end())
        refuse(where, fmt::format("{} names {} twice", key.name, name), "name it once");
      field.value->push_back(name);
    }
  }
};

using Origins = std::map<std::string, std::string>;  // key -> where it was given

// The file that `include` names, whose keys lie below those of `path`; the key is taken out of `root`.
std::string included_file(toml::table& root, const std::string& path) {
  const toml::node* node = root.get("include");
  if (!node) return "";
  const std::string where = at(shown_path(path), node->source());
  if (!node->is_string()) refuse(where, fmt::format("include must be a string, not {}", type_name(*node)), "name one file");
  const std::string name = node->as_string()->get();
  root.erase("include");
  if (name.empty()) return "";
  if (!is_utf8(name) || name.find('\0') != std::string::npos) refuse(where, "include holds no path", "name one file");
  return (fs::absolute(path).parent_path() / expand_home(name)).string();
}

std::vector<Setting> settings_of(const toml::table& root, const std::string& path, const Assigner& assigner) {
  std::vector<Setting> out;
  for (const auto& [name, node] : root) {
    const std::string top(name.str()), where = at(path, name.source());
    if (assigner.is_section(top)) {
      const toml::table* section = node.as_table();
      if (!section) refuse(where, fmt::format("{} must be a table, not {}", top, type_name(node)), fmt::format("write [{}]", top));
      for (const auto& [leaf, value] : *section) {
        const std::string full = top + "." + std::string(leaf.str());
        if (!assigner.find(full)) refuse_unknown(full, at(path, leaf.source()));
        out.push_back({full, &value, at(path, leaf.source()), &assigner});
      }
    } else {
      if (node.is_table() && !assigner.find(top)) refuse(where, fmt::format("unknown section [{}]", escaped(top)), remedy_for_section(top));
      if (top.find('.') != std::string::npos && assigner.find(top))
        refuse(where, fmt::format("\"{}\" is one name, with a dot in it, and no key", top), "write it without the quotes");
      if (!assigner.find(top)) refuse_unknown(top, where);
      out.push_back({top, &node, where, &assigner});
    }
  }
  return out;
}

// VALUE of --set as the only value of a TOML table: what is TOML neither alone nor in an array is a string. The array tells a trailing
// comment or a second key from a value.
toml::table parse_value(const std::string& value) {
  auto parse = [](const std::string& text) -> std::optional<toml::table> {
    try {
      if (!is_safe_toml(text)) return std::nullopt;
      return toml::parse(text);
    } catch (const toml::parse_error&) {
      return std::nullopt;
    }
  };
  auto alone = parse("x = " + value), listed = parse("x = [" + value + "]");
  if (alone && alone->size() == 1 && listed && listed->size() == 1 && listed->get("x")->as_array()->size() == 1) return *std::move(alone);
  toml::table text;
  text.insert("x", value);
  return text;
}

bool is_beyond_64_bits(const std::string& value) {
  try {
    if (is_safe_toml(value)) (void)toml::parse("x = " + value);
  } catch (const toml::parse_error& e) {
    return e.description().find("representable in 64 bits") != std::string_view::npos;
  }
  return false;
}

Setting setting_of(const std::string& argument, std::deque<toml::table>& values, const Assigner& assigner) {
  const std::string where = "--set " + escaped(argument);
  const auto equals = argument.find('=');
  if (equals == std::string::npos) refuse(where, "has no =", "give --set KEY=VALUE, as --set train.lr=1e-3");
  auto strip = [](std::string s) {
    s.erase(0, s.find_first_not_of(' '));
    return s.erase(s.find_last_not_of(' ') + 1);
  };
  const std::string key = strip(argument.substr(0, equals)), value = argument.substr(equals + 1);
  if (assigner.is_section(key))
    refuse(where, fmt::format("{} is a section", key), fmt::format("set one of its keys, as {}.KEY=VALUE", key));
  if (key == "include") refuse(where, "include is of a file alone", "name the file as CONFIG");
  const Key* known = assigner.find(key);
  if (!known) refuse_unknown(key, where);
  if (!std::holds_alternative<Text>(known->field) && is_beyond_64_bits(value))
    refuse(where, key + " has a number that is not representable in 64 bits", "give a smaller one");
  values.push_back(parse_value(value));
  return {key, values.back().get("x"), where, &assigner};
}

void apply_fixed(RunConfig& config, const Assigner& assigner, const Origins& given) {
  auto fix = [&](const std::string& name, const std::string& value, const std::string& why) {
    const Key& key = assigner.get(name);
    auto origin = given.find(name);
    if (origin != given.end() && value_text(key) != value)
      refuse(origin->second, fmt::format("method {} has {} = {}{}, not {}", name_of(config.method), name, value, why, value_text(key)),
             "remove the key or change the method");
    assigner.assign_text(name, value);
  };
  for (const Rule& rule : method_rules())
    if (rule.method == config.method && rule.fixed) fix(rule.key, rule.value, "");
  if (config.method == Method::codi || config.method == Method::codi_exact)
    fix("latent.iterations", value_text(assigner.get("latent.count")), " (latent.count)");
}

template <class Where>
void check_stages(const RunConfig& config, const Where& where) {
  const RunConfig::Stages& s = config.stages;
  const RunConfig::Coconut& c = config.coconut;
  // A range as that of each of the two, so for every method.
  if (c.thoughts * c.max_stage > kMostLatents)
    refuse(where("coconut.thoughts"), fmt::format("coconut.thoughts times coconut.max_stage is {}", c.thoughts * c.max_stage),
           fmt::format("make it at most {}", kMostLatents));
  if (config.method != Method::coconut) return;
  if (!c.markers && c.thoughts > 0)
    refuse(where("coconut.markers"), fmt::format("latents need markers, and coconut.thoughts is {}", c.thoughts),
           "set coconut.thoughts = 0, or leave the markers");
  const std::pair<const char*, int64_t> asked[] = {{"stages.fixed", s.fixed}, {"stages.first", s.first}, {"stages.last", s.last}};
  for (const auto& [key, stage] : asked)
    if (stage > c.max_stage + 1)
      refuse(where(key), fmt::format("{} = {} is beyond the last stage {}", key, stage, c.max_stage + 1),
             "make it smaller, or raise coconut.max_stage");
  if (s.last >= 0 && s.last < s.first)
    refuse(where("stages.last"), fmt::format("stages.last = {} comes before stages.first = {}", s.last, s.first), "swap them");
}

void check_together(const RunConfig& config, const Origins& given, const std::string& path) {
  auto where = [&](const std::string& key) {
    auto i = given.find(key);
    return i == given.end() ? path : i->second;
  };
  check_stages(config, where);
  if (config.train.micro_batch > config.train.batch)
    refuse(where(given.contains("train.micro_batch") ? "train.micro_batch" : "train.batch"),
           fmt::format("train.micro_batch = {} is larger than train.batch = {}", config.train.micro_batch, config.train.batch),
           "make it smaller, or 0");
  if (config.train.trainable == Trainable::lora && config.lora.targets.empty())
    refuse(where("lora.targets"), "lora.targets is empty and train.trainable is \"lora\": no LoRA would be trained",
           fmt::format("name some of {}", fmt::join(lora_linears(), ", ")));
}

// The architecture of the model's folder; nullptr where that cannot be told, which is said when the folder is opened.
const Architecture* architecture_at(const std::string& folder) {
  if (folder.empty()) return nullptr;
  try {
    const Json json = read_json((fs::path(folder) / "config.json").string());
    const auto type = json.is_object() ? json.find("model_type") : json.end();
    return type != json.end() && type->is_string() ? find_architecture(type->get<std::string>()) : nullptr;
  } catch (const Error&) {
    return nullptr;
  }
}

void apply_architecture(RunConfig& config, const Origins& given) {
  const Architecture* a = architecture_at(config.model.path);
  const auto origin = given.find("lora.targets");
  if (origin == given.end()) {
    if (a) config.lora.targets = a->lora_targets;
    return;
  }
  const std::vector<std::string> names = a ? a->target_names() : lora_linears();
  const auto among = [](const std::vector<std::string>& all, const std::string& name) { return std::ranges::find(all, name) != all.end(); };
  for (const std::string& target : config.lora.targets) {
    if (among(names, target)) continue;
    const std::string name = toml_string(escaped(target));
    if (a && among(lora_linears(), target))
      refuse(origin->second, fmt::format("lora.targets names {}, which is no linear of {}", name, a->family),
             fmt::format("name some of {}", fmt::join(names, ", ")));
    refuse(origin->second, fmt::format("lora.targets has no value {}", name), remedy_for_target(target, names));
  }
}

}  // namespace

RunConfig method_defaults(Method method) {
  RunConfig config;
  config.method = method;
  const Assigner assigner(config, "");
  for (const Rule& rule : method_rules())
    if (rule.method == method) assigner.assign_text(rule.key, rule.value);
  apply_fixed(config, assigner, {});
  return config;
}

std::vector<std::string> config_files(const std::string& path) {
  std::vector<std::string> files = {path};
  toml::table root = parse_toml_file(path);
  if (std::string include = included_file(root, path); !include.empty()) files.push_back(std::move(include));
  return files;
}

std::vector<std::string> contents_of(const RunConfig& config) {
  std::vector<std::string> paths = {config.model.path, config.model.adapter, config.data.valid};
  for (const DataFile& data : config.data.train) paths.push_back(data.path);
  return paths;
}

std::vector<std::string> inputs_of(const std::string& path, const RunConfig& config) {
  std::error_code ignored;
  std::vector<std::string> inputs = contents_of(config);
  if (fs::is_directory(path, ignored))
    for (const char* name : {"config.toml", "metrics.jsonl", "progress.json", "checkpoints", "adapter"})
      inputs.push_back(path_in(path, name));
  else
    for (std::string& read : config_files(path)) inputs.push_back(std::move(read));
  return inputs;
}

RunConfig load_config(const std::string& path, const std::vector<std::string>& sets) {
  toml::table root = parse_toml_file(path);
  const std::string include = included_file(root, path);
  toml::table below = include.empty() ? toml::table{} : parse_toml_file(include);
  if (const toml::node* second = below.get("include")) {
    const std::string where = at(shown_path(include), second->source());
    if (!included_file(below, include).empty()) refuse(where, "an included file includes another", "write its keys into this one");
  }
  RunConfig config;
  const Assigner from_include(config, fs::path(include).parent_path()), from_file(config, fs::absolute(path).parent_path()),
      from_arguments(config, fs::current_path());
  std::vector<Setting> settings = settings_of(below, shown_path(include), from_include);
  for (Setting& s : settings_of(root, shown_path(path), from_file)) settings.push_back(std::move(s));
  std::deque<toml::table> values;
  for (const std::string& argument : sets) settings.push_back(setting_of(argument, values, from_arguments));

  // The method first: its defaults lie below everything that is given.
  for (const Setting& s : settings)
    if (s.key == "method") from_file.assign(s);
  config = method_defaults(config.method);
  Origins given;
  for (const Setting& s : settings) {
    s.assigner->assign(s);
    given[s.key] = s.where;
  }
  apply_fixed(config, from_file, given);
  apply_architecture(config, given);
  check_together(config, given, shown_path(path));
  return config;
}

void require_for_training(const RunConfig& config, const std::string& path) {
  if (config.model.path.empty()) refuse(shown_path(path), "model.path is missing", "name the model's folder, as [model] path = \"...\"");
  if (config.data.train.empty())
    refuse(shown_path(path), "data.train is missing", "name the data files, as [data] train = [\"train.txt\"]");
}

std::string config_reference() {
  RunConfig defaults;
  std::string out = "| key | default | range |\n|---|---|---|\n";
  for (const Key& key : keys_of(defaults)) {
    std::string range = range_text(key);
    for (std::size_t i = 0; (i = range.find('|', i)) != std::string::npos; i += 2) range.insert(i, 1, '\\');
    out += fmt::format("| `{}` | `{}` | {} |\n", key.name, value_text(key), range);
  }
  return out;
}

}  // namespace kava
