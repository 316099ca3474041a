#include "tools/replicate_table.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <initializer_list>
#include <set>

#include "engine/data/data.h"
#include "engine/error.h"
#include "engine/files/paths.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kMostRows = 4096, kMostSeeds = 1000;
constexpr std::size_t kLongestName = 100;

// One object of the file, whose keys are asked for one by one.
class Section {
 public:
  Section(const TomlFile& file, const Json& value, std::string key) : file_(file), value_(value), key_(std::move(key)) {
    if (!value_.is_object()) refuse("", "must be a table");
  }

  [[noreturn]] void refuse(const std::string& name, const std::string& what, const std::string& remedy = "see docs/replicate.md") const {
    const std::string full = below(name);
    throw Error(Exit::usage, file_.where(full), full.empty() ? what : escaped(full) + " " + what, remedy);
  }

  void require_known(std::initializer_list<const char*> names) const {
    for (const auto& [name, value] : value_.items()) {
      if (std::ranges::find(names, name) != names.end()) continue;
      const std::string cut = name.substr(0, kLongestName);
      const auto* nearest = std::ranges::min_element(names, {}, [&](const char* n) { return edit_distance(cut, n); });
      refuse(name, "is no key of a table", fmt::format("the nearest is {}", *nearest));
    }
  }

  std::string place(const char* name) const { return file_.where(below(name)); }
  bool has(const char* name) const { return value_.contains(name); }
  const Json& value() const { return value_; }

  std::string text(const char* name, const std::optional<std::string>& fallback = std::nullopt) const {
    if (!has(name)) {
      if (fallback) return *fallback;
      refuse("", fmt::format("has no {}", name));
    }
    if (!value_[name].is_string() || value_[name].get_ref<const std::string&>().find('\0') != std::string::npos)
      refuse(name, "must be a string");
    return value_[name].get<std::string>();
  }

  /// Names become parts of file names.
  std::string identifier(const char* name) const {
    const std::string out = text(name);
    const bool plain =
        std::ranges::all_of(out, [](unsigned char c) { return std::isalnum(c) != 0 || c == '_' || c == '-'; }) && !out.empty();
    if (!plain || out.size() > kLongestName) refuse(name, fmt::format("is \"{}\"", escaped(out)), "use up to 100 letters, digits, _ and -");
    return out;
  }

  std::vector<std::string> texts(const char* name) const {
    std::vector<std::string> out;
    if (!has(name)) return out;
    if (!value_[name].is_array()) refuse(name, "must be a list of strings");
    for (const Json& item : value_[name]) {
      if (!item.is_string()) refuse(name, "must be a list of strings");
      out.push_back(item.get<std::string>());
    }
    return out;
  }

  int64_t whole(const char* name, int64_t fallback, int64_t least, int64_t most) const {
    if (!has(name)) return fallback;
    if (!value_[name].is_number_integer() || value_[name].get<int64_t>() < least || value_[name].get<int64_t>() > most)
      refuse(name, fmt::format("must be a whole number from {} to {}", least, most));
    return value_[name].get<int64_t>();
  }

  double number(const char* name) const {
    if (!has(name)) refuse("", fmt::format("has no {}", name));
    if (!value_[name].is_number()) refuse(name, "must be a number");
    return value_[name].get<double>();
  }

  bool flag(const char* name, bool fallback) const {
    if (!has(name)) return fallback;
    if (!value_[name].is_boolean()) refuse(name, "must be true or false");
    return value_[name].get<bool>();
  }

  template <class E>
  std::optional<E> choice(const char* name) const {
    if (!has(name)) return std::nullopt;
    const auto value = choice_of<E>(text(name));
    if (!value) refuse(name, fmt::format("is \"{}\"", escaped(text(name))), fmt::format("give {}", fmt::join(names_of(E{}), ", ")));
    return value;
  }

  std::vector<Section> sections(const char* name) const {
    std::vector<Section> out;
    if (!has(name)) return out;
    if (!value_[name].is_array()) refuse(name, "must be a list of tables");
    for (std::size_t i = 0; i < value_[name].size(); ++i) out.emplace_back(file_, value_[name][i], fmt::format("{}[{}]", below(name), i));
    return out;
  }

  Section section(const char* name) const { return {file_, value_[name], below(name)}; }

 private:
  std::string below(const std::string& name) const { return name.empty() ? key_ : key_.empty() ? name : key_ + "." + name; }

  const TomlFile& file_;
  const Json& value_;
  std::string key_;
};

TableColumn read_column(const Section& s) {
  s.require_known({"name", "title", "data", "format", "limit", "scorer"});
  TableColumn c;
  c.name = s.identifier("name"), c.title = s.text("title", c.name), c.data = s.text("data");
  c.format = s.choice<DataFormat>("format");
  c.limit = s.whole("limit", 0, 1, int64_t{1} << 40);
  c.scorer = s.choice<Scorer>("scorer").value_or(Scorer::strict), c.scorer_place = s.place("scorer");
  return c;
}

PublishedValue read_published(const Section& s, const std::vector<TableColumn>& columns) {
  s.require_known({"column", "measure", "value", "sd", "source"});
  PublishedValue p;
  p.column = s.text("column", columns.size() == 1 ? std::optional(columns[0].name) : std::nullopt);
  if (std::ranges::find(columns, p.column, &TableColumn::name) == columns.end()) s.refuse("column", "names no column of this table");
  p.measure = s.choice<Measure>("measure").value_or(Measure::accuracy);
  p.value = s.number("value");
  if (s.has("sd")) p.sd = s.number("sd");
  if (p.measure == Measure::accuracy && !(p.value >= 0 && p.value <= 100))
    s.refuse("value", fmt::format("is {}, which is no accuracy in %", p.value), "give a value from 0 to 100");
  if (p.value < 0) s.refuse("value", "is negative");
  if (p.sd && *p.sd < 0) s.refuse("sd", "is negative");
  if (s.text("source", "").empty()) s.refuse("", "is published without a source", "say where it was published");
  p.source = s.text("source");
  return p;
}

TableRow read_row(const Section& s, const std::vector<TableColumn>& columns) {
  s.require_known({"name", "title", "block", "config", "set", "start", "groups", "scorer", "shown", "published"});
  TableRow r;
  r.name = s.identifier("name"), r.title = s.text("title", r.name), r.block = s.text("block", "");
  r.config = s.text("config"), r.sets = s.texts("set"), r.sets_place = s.place("set");
  r.start = s.text("start", ""), r.start_place = s.place("start");
  r.groups = s.texts("groups"), r.shown = s.flag("shown", true);
  r.scorer = s.choice<Scorer>("scorer"), r.scorer_place = s.place("scorer");
  for (const std::string& set : r.sets) {
    const std::string_view key = stripped(std::string_view(set).substr(0, set.find('=')));
    if (!r.start.empty() && (key == "model.path" || key == "model.init"))
      s.refuse("set", fmt::format("holds \"{}\", but the model is what {} trained", escaped(set), escaped(r.start)),
               "leave out one of the two");
    if (key == "seed") s.refuse("set", fmt::format("holds \"{}\", but the seeds are the table's", escaped(set)), "name it in seeds");
  }
  for (const Section& p : s.sections("published")) r.published.push_back(read_published(p, columns));
  return r;
}

void read_seeds(const Section& root, ReplicaTable& table) {
  if (!root.has("seeds") || !root.value()["seeds"].is_array() || root.value()["seeds"].empty() || root.value()["seeds"].size() > kMostSeeds)
    root.refuse("seeds", fmt::format("must be a list of 1 to {} whole numbers", kMostSeeds));
  for (const Json& seed : root.value()["seeds"]) {
    if (!seed.is_number_integer() || seed.get<int64_t>() < 0) root.refuse("seeds", "must be whole numbers from 0");
    if (std::ranges::find(table.seeds, seed.get<int64_t>()) != table.seeds.end())
      root.refuse("seeds", fmt::format("names {} twice", seed.get<int64_t>()));
    table.seeds.push_back(seed.get<int64_t>());
  }
}

void read_measures(const Section& root, ReplicaTable& table) {
  const std::string some = fmt::format("give some of {}", fmt::join(names_of(Measure{}), ", "));
  for (const std::string& word : root.has("measures") ? root.texts("measures") : std::vector<std::string>{"accuracy", "passes", "ms"}) {
    const auto measure = choice_of<Measure>(word);
    if (!measure) root.refuse("measures", fmt::format("holds \"{}\"", escaped(word)), some);
    if (std::ranges::find(table.measures, *measure) != table.measures.end())
      root.refuse("measures", fmt::format("names {} twice", word), "name it once");
    table.measures.push_back(*measure);
  }
  if (table.measures.empty()) root.refuse("measures", "is empty", some);
}

void read_synth(const Section& root, ReplicaTable& table) {
  if (!root.has("synth")) return;
  const Section s = root.section("synth");
  s.require_known({"rows", "steps", "seed"});
  SynthOptions options;
  options.rows = s.whole("rows", options.rows, 1, 10'000'000);
  options.steps = static_cast<int>(s.whole("steps", options.steps, 1, kRingNames - 1));
  options.seed = s.whole("seed", options.seed, 0, INT64_MAX - 1);
  table.synth = options;
}

void require_unique_and_started(const Section& root, const ReplicaTable& table) {
  std::set<std::string> seen;
  for (std::size_t i = 0; i < table.rows.size(); ++i) {
    const TableRow& row = table.rows[i];
    const std::string key = fmt::format("row[{}]", i);
    if (!row.start.empty() && !seen.contains(row.start))
      root.refuse(key + ".start", fmt::format("names no row above {}", row.name), "put the row that is started from first");
    if (!seen.insert(row.name).second) root.refuse(key + ".name", fmt::format("is taken by another row, {}", row.name));
  }
  seen.clear();
  for (std::size_t i = 0; i < table.columns.size(); ++i)
    if (!seen.insert(table.columns[i].name).second)
      root.refuse(fmt::format("column[{}].name", i), fmt::format("is taken by another column, {}", table.columns[i].name));
}

// A reference that no row is would leave the tables without comparisons.
void require_reference(const Section& root, const ReplicaTable& table) {
  std::vector<std::string> rows;
  for (const TableRow& row : table.rows) {
    if (!row.shown) continue;
    if (table.reference.empty() || std::ranges::find(row.groups, table.reference) != row.groups.end()) return;
    rows.push_back(row.name);
  }
  if (table.reference.empty()) return;
  constexpr std::size_t most = 40;
  if (rows.size() > most) rows.resize(most), rows.emplace_back("...");
  root.refuse("reference", fmt::format("is \"{}\", which is a group of no row that is shown", escaped(table.reference)),
              rows.empty() ? "leave it out" : fmt::format("put it into the groups of one of {}", fmt::join(rows, ", ")));
}

// Takes the name of the included file out of a table; "" where there is none.
std::string take_include(TomlFile& file) {
  const std::string name = Section(file, file.value, "").text("include", "");
  file.value.erase("include");
  return name;
}

// The file with what it includes below it.
TomlFile read_with_included(const std::string& path) {
  TomlFile file = read_toml(path);
  const std::string name = take_include(file);
  if (name.empty()) return file;
  TomlFile below = read_toml((fs::absolute(path).parent_path() / expand_home(name)).string());
  if (!take_include(below).empty()) throw Error(Exit::usage, below.where("include"), "is a second include", "include the file itself");
  if (fs::absolute(below.path).parent_path().lexically_normal() != fs::absolute(path).parent_path().lexically_normal())
    throw Error(Exit::usage, file.where("include"), "names a table in another folder", "paths of both are from one folder");
  for (const auto& [key, value] : below.value.items())
    if (!file.value.contains(key)) file.value[key] = value;
  file.places.insert(below.places.begin(), below.places.end());
  return file;
}

}  // namespace

const TableRow* ReplicaTable::find(const std::string& row) const {
  const auto found = std::ranges::find(rows, row, &TableRow::name);
  return found == rows.end() ? nullptr : &*found;
}

ReplicaTable read_table(const std::string& path) {
  const TomlFile file = read_with_included(path);
  const Section root(file, file.value, "");
  root.require_known({"name", "title", "seeds", "measures", "reference", "notes", "synth", "sha256", "column", "row"});
  ReplicaTable table;
  table.file = fs::absolute(path).lexically_normal(), table.folder = table.file.parent_path();
  table.name = root.has("name") ? root.identifier("name") : table.file.stem().string();
  table.title = root.text("title", table.name), table.reference = root.text("reference", "");
  table.notes = root.texts("notes");
  read_seeds(root, table);
  read_measures(root, table);
  read_synth(root, table);
  if (root.has("sha256")) {
    const Section digests = root.section("sha256");
    for (const auto& [name, value] : digests.value().items()) table.digests[name] = digests.text(name.c_str());
  }
  for (const Section& s : root.sections("column")) table.columns.push_back(read_column(s));
  for (const Section& s : root.sections("row")) table.rows.push_back(read_row(s, table.columns));
  if (table.columns.empty()) root.refuse("", "holds no [[column]]");
  if (table.rows.empty() || table.rows.size() > kMostRows) root.refuse("", fmt::format("must hold 1 to {} of [[row]]", kMostRows));
  require_unique_and_started(root, table);
  require_reference(root, table);
  return table;
}

std::string filled_in(const std::string& text, const fs::path& out, int64_t seed) {
  std::string filled = text;
  for (const auto& [name, value] : {std::pair<std::string, std::string>("{out}", out.string()), {"{seed}", fmt::format("{}", seed)}})
    for (std::size_t at = 0; (at = filled.find(name, at)) != std::string::npos; at += value.size()) filled.replace(at, name.size(), value);
  return filled;
}

fs::path table_path(const ReplicaTable& table, const std::string& path, const fs::path& out, int64_t seed) {
  return (table.folder / expand_home(filled_in(path, out, seed))).lexically_normal();
}

std::string adapter_of(const TableRow& row, const fs::path& out, int64_t seed) {
  return (out / "runs" / row.name / fmt::format("{}", seed) / "adapter").string();
}

std::vector<std::string> settings_of(const ReplicaTable& table, const TableRow& row, const fs::path& out, int64_t seed) {
  std::vector<std::string> sets;
  if (const TableRow* start = table.find(row.start)) {
    // A model of which every weight was trained is a folder of its own; else its adapter lies on the base that the start had.
    const std::vector<std::string> before = settings_of(table, *start, out, seed);
    const RunConfig config = load_config((table.folder / start->config).string(), before);
    const std::string adapter = adapter_of(*start, out, seed);
    const bool whole = config.train.trainable == Trainable::all;
    sets.push_back("model.path=" + Json(whole ? adapter : config.model.path).dump());
    if (!whole) sets.push_back("model.adapter=" + Json(adapter).dump());
  }
  for (const std::string& set : row.sets) sets.push_back(filled_in(set, out, seed));
  sets.push_back(fmt::format("seed={}", seed));
  return sets;
}

}  // namespace kava
