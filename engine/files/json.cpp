#include "engine/files/json.h"

#include <utility>

#include "engine/error.h"
#include "engine/files/files.h"

namespace kava {

namespace {

constexpr std::size_t kDeepestJson = 64;

// What nlohmann says after its own name and number, for one line.
std::string reason(const char* what) {
  std::string_view s = what;
  if (auto i = s.find("] "); i != std::string_view::npos) s.remove_prefix(i + 2);
  return escaped(s, 160);
}

// Builds the value from the parser's events. (nlohmann's own builder lets the last of equal keys win; its callback form, which could
// refuse them, takes several times as long on a tokenizer.json.)
class Builder : public nlohmann::json_sax<Json> {
 public:
  Builder(const std::string& where, const JsonPath& listed, Json& root) : where_(where), listed_(listed), root_(root) {}

  bool null() override { return put(nullptr); }
  bool boolean(bool value) override { return put(value); }
  bool number_integer(number_integer_t value) override { return put(value); }
  bool number_unsigned(number_unsigned_t value) override { return put(value); }
  // A whole number beyond 64 bits stays what was written: a double would change its digits.
  bool number_float(number_float_t value, const string_t& text) override {
    return text.find_first_not_of("-0123456789") == text.npos ? put(text) : put(value);
  }
  bool string(string_t& value) override { return put(std::move(value)); }
  bool binary(binary_t& value) override { return put(std::move(value)); }
  bool start_object(std::size_t) override {
    const bool listed = !listed_.empty() && open_.size() == listed_.size() && matched_ == listed_.size();
    open(Json::object());
    if (!listed) return true;
    member_ = &(*open_.back())[""];
    open(Json::array());
    listing_ = open_.size();
    return true;
  }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& name) override {
    if (open_.size() == listing_) return put(std::move(name));
    if (const std::size_t depth = open_.size() - 1; depth <= matched_ && depth < listed_.size())
      matched_ = depth + (name == listed_[depth]);
    auto& object = open_.back()->get_ref<Json::object_t&>();
    auto [it, fresh] = object.try_emplace(std::move(name));
    if (!fresh)
      throw Error(Exit::data, where_, fmt::format("key \"{}\" is given twice in one JSON object", escaped(it->first)), "keep one of them");
    member_ = &it->second;
    return true;
  }

  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& e) override {
    throw Error(Exit::data, where_, "not valid JSON: " + reason(e.what()), "correct the file");
  }

 private:
  // Stores a value where the last event said: as the root, behind the last element, or under the last key. A child's address is only
  // kept while it is the last of its array, so growth of the array does not move an open container.
  template <class T>
  Json* store(T&& value) {
    if (open_.empty()) {
      root_ = std::forward<T>(value);
      return &root_;
    }
    if (Json& parent = *open_.back(); parent.is_array()) {
      auto& array = parent.get_ref<Json::array_t&>();
      array.emplace_back(std::forward<T>(value));
      return &array.back();
    }
    *member_ = std::forward<T>(value);
    return member_;
  }

  template <class T>
  bool put(T&& value) {
    store(std::forward<T>(value));
    return true;
  }

  bool open(Json container) {
    if (open_.size() == kDeepestJson)
      throw Error(Exit::data, where_, fmt::format("JSON nested deeper than {} levels", kDeepestJson), "flatten the file");
    open_.push_back(store(std::move(container)));
    return true;
  }

  bool close() {
    if (open_.size() == std::exchange(listing_, open_.size() == listing_ ? kNone : listing_)) open_.pop_back();
    open_.pop_back();
    return true;
  }

  static constexpr std::size_t kNone = ~std::size_t{0};
  const std::string& where_;
  const JsonPath& listed_;
  Json& root_;
  std::vector<Json*> open_;
  Json* member_ = nullptr;
  std::size_t matched_ = 0;      // so many keys of listed_ are those of the containers around
  std::size_t listing_ = kNone;  // open_.size() where the listed object's keys come
};

}  // namespace

Json parse_json(std::string_view text, const std::string& where, const JsonPath& listed) {
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  // The parser takes a NUL for the end of its input and would pass over what follows.
  if (const auto nul = text.find('\0'); nul != std::string_view::npos)
    throw Error(Exit::data, where, fmt::format("not valid JSON: a NUL character at byte {}", nul), "correct the file");
  Json root;
  Builder builder(where, listed, root);
  try {
    Json::sax_parse(text.begin(), text.end(), &builder);
  } catch (const Json::exception& e) {
    throw Error(Exit::data, where, "not valid JSON: " + reason(e.what()), "correct the file");
  }
  return root;
}

Json read_json(const std::string& path, std::size_t most_bytes, const JsonPath& listed) {
  return parse_json(read_file(path, most_bytes), path, listed);
}

}  // namespace kava
