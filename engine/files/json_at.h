// A value inside a JSON file together with its place, for checked reading: each wrong type or missing key is Error(code data) with FILE
// and the path of the value.
#pragma once
#include <cstdint>
#include <string>

#include "engine/error.h"
#include "engine/files/json.h"

namespace kava {

class JsonAt {
 public:
  /// All must outlive this object. path: "" for the root; remedy: of each fault, here and below.
  JsonAt(const Json& value, const std::string& file, std::string path = "", const std::string& remedy = kRemedy)
      : value_(&value), file_(&file), path_(std::move(path)), remedy_(&remedy) {}

  const Json& value() const { return *value_; }
  const std::string& file() const { return *file_; }
  bool is_null() const { return value_->is_null(); }

  /// Whether this object has the key with a value other than null.
  bool has(const char* key) const {
    expect(value_->is_object(), "an object");
    auto it = value_->find(key);
    return it != value_->end() && !it->is_null();
  }

  JsonAt at(const char* key) const {
    expect(value_->is_object(), "an object");
    auto it = value_->find(key);
    if (it == value_->end()) throw Error(Exit::data, *file_, fmt::format("{}: the key is missing", below(key)), *remedy_);
    return {*it, *file_, below(key), *remedy_};
  }

  JsonAt at(std::size_t index) const { return {(*value_)[index], *file_, fmt::format("{}[{}]", path_, index), *remedy_}; }

  const Json::object_t& object() const { return expect(value_->is_object(), "an object"), value_->get_ref<const Json::object_t&>(); }
  const Json::array_t& array() const { return expect(value_->is_array(), "an array"), value_->get_ref<const Json::array_t&>(); }
  const std::string& string() const { return expect(value_->is_string(), "a string"), value_->get_ref<const std::string&>(); }
  bool boolean() const { return expect(value_->is_boolean(), "true or false"), value_->get<bool>(); }

  /// A whole number from 0 to `most`.
  std::int32_t whole(std::int32_t most) const {
    if (!value_->is_number_unsigned() || value_->get<std::uint64_t>() > static_cast<std::uint64_t>(most))
      expect(false, fmt::format("a whole number from 0 to {}", most));
    return value_->get<std::int32_t>();
  }

  /// The boolean under `key`, or `fallback` where it is missing or null.
  bool boolean_or(const char* key, bool fallback) const { return has(key) ? at(key).boolean() : fallback; }

  [[noreturn]] void refuse(const std::string& what) const { refuse(what, *remedy_); }
  [[noreturn]] void refuse(const std::string& what, const std::string& remedy) const {
    throw Error(Exit::data, *file_, path_.empty() ? what : path_ + ": " + what, remedy);
  }

 private:
  void expect(bool holds, std::string_view form) const {
    if (!holds) refuse(fmt::format("must be {}, is {}", form, escaped(value_->dump(-1, ' ', true, Json::error_handler_t::replace), 40)));
  }
  std::string below(const char* key) const { return path_.empty() ? key : path_ + "." + key; }

  static inline const std::string kRemedy = "correct the file or take it from the model's origin again";
  const Json* value_;
  const std::string* file_;
  std::string path_;
  const std::string* remedy_;
};

}  // namespace kava
