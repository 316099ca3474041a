#include "engine/files/safetensors.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <set>

#include "engine/device/rounding.h"
#include "engine/files/json.h"

namespace kava {

namespace {

static_assert(std::endian::native == std::endian::little, "tensors lie in the file in little-endian order");

constexpr std::uint64_t kLargestHeader = 100'000'000;
constexpr std::ptrdiff_t kMostValues = 4'000'000;  // some 600,000 tensors; a parsed value takes up to 100 bytes
constexpr std::size_t kMostDims = 64;
constexpr std::size_t kReadChunk = std::size_t{1} << 20;
constexpr const char* kDamaged = "the file is damaged or no safetensors file: get it again";

struct DTypeBits {
  const char* name;
  std::uint64_t bits;
};
constexpr DTypeBits kDTypes[] = {
    {"F64", 64},    {"F32", 32},        {"F16", 16},        {"BF16", 16}, {"I64", 64},    {"I32", 32},    {"I16", 16},    {"I8", 8},
    {"U64", 64},    {"U32", 32},        {"U16", 16},        {"U8", 8},    {"BOOL", 8},    {"C64", 64},    {"F8_E5M2", 8}, {"F8_E4M3", 8},
    {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"F4", 4},    {"F6_E2M3", 6}, {"F6_E3M2", 6},
};

// 0 for an unknown name.
std::uint64_t bits_of(std::string_view dtype) {
  for (const DTypeBits& d : kDTypes)
    if (dtype == d.name) return d.bits;
  return 0;
}

[[noreturn]] void fail(const std::string& path, const std::string& what, const std::string& remedy = kDamaged) {
  throw Error(Exit::data, shown_path(path), what, remedy);
}

std::string named(std::string_view name) { return "tensor \"" + escaped(name, 200) + "\""; }

// An integer from 0 to 2^63-1, false for anything else (JSON numbers beyond 64 bits arrive as floating point).
bool take_size(const Json& value, std::uint64_t& out) {
  if (!value.is_number_unsigned()) return false;
  out = value.get<std::uint64_t>();
  return out <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
}

// One entry of the header, everything that can be checked without its neighbours.
TensorInfo parse_entry(const std::string& path, const std::string& name, const Json& entry) {
  if (!entry.is_object()) fail(path, named(name) + " is not described by a JSON object");
  for (const auto& [key, value] : entry.items())
    if (key != "dtype" && key != "shape" && key != "data_offsets")
      fail(path, named(name) + " has the unknown key \"" + escaped(key) + "\"");
  if (entry.size() != 3) fail(path, named(name) + " lacks one of dtype, shape, data_offsets");
  if (!entry["dtype"].is_string() || !entry["shape"].is_array() || !entry["data_offsets"].is_array())
    fail(path, named(name) + " has a dtype, shape or data_offsets of the wrong type");

  TensorInfo tensor;
  tensor.name = name;
  tensor.dtype = entry["dtype"].get<std::string>();
  const std::uint64_t bits = bits_of(tensor.dtype);
  if (bits == 0) fail(path, named(name) + " has the unknown dtype \"" + escaped(tensor.dtype) + "\"");
  if (entry["shape"].size() > kMostDims) fail(path, fmt::format("{} has more than {} dimensions", named(name), kMostDims));
  std::uint64_t total = 1;
  for (const Json& dim : entry["shape"]) {
    std::uint64_t d = 0;
    if (!take_size(dim, d)) fail(path, named(name) + " has a size in its shape that is not a whole number from 0 to 2^63-1");
    if (__builtin_mul_overflow(total, d, &total)) fail(path, named(name) + " has a shape whose product overflows");
    tensor.shape.push_back(static_cast<std::int64_t>(d));
  }
  if (__builtin_mul_overflow(total, bits, &total)) fail(path, named(name) + " has a shape whose product overflows");
  if (total % 8 != 0) fail(path, named(name) + " does not fill whole bytes");

  const Json& offsets = entry["data_offsets"];
  if (offsets.size() != 2 || !take_size(offsets[0], tensor.begin) || !take_size(offsets[1], tensor.end))
    fail(path, named(name) + " has data_offsets that are not two whole numbers");
  if (tensor.end < tensor.begin) fail(path, named(name) + " ends before it begins");
  if (tensor.end - tensor.begin != total / 8)
    fail(path, fmt::format("{} has {} bytes of data, but {} {} needs {}", named(name), tensor.end - tensor.begin, tensor.dtype,
                           shape_text(tensor.shape), total / 8));
  return tensor;
}

std::map<std::string, std::string> parse_metadata(const std::string& path, const Json& metadata) {
  if (metadata.is_null()) return {};  // as in the library
  if (!metadata.is_object()) fail(path, "__metadata__ is not a JSON object");
  std::map<std::string, std::string> out;
  for (const auto& [key, value] : metadata.items()) {
    if (!value.is_string()) fail(path, "__metadata__ has a value that is not a string, at \"" + escaped(key) + "\"");
    out[key] = value.get<std::string>();
  }
  return out;
}

// Every byte of the data belongs to exactly one tensor.
void check_layout(const std::string& path, const std::vector<TensorInfo>& tensors, std::uint64_t data_bytes) {
  std::vector<const TensorInfo*> order;
  for (const TensorInfo& t : tensors) order.push_back(&t);
  std::sort(order.begin(), order.end(),
            [](const TensorInfo* a, const TensorInfo* b) { return std::pair(a->begin, a->end) < std::pair(b->begin, b->end); });
  std::uint64_t at = 0;
  for (const TensorInfo* t : order) {
    if (t->begin != at)
      fail(path, fmt::format("{} {} at byte {} of the data", named(t->name), t->begin < at ? "overlaps another" : "leaves a gap before it",
                             std::min(t->begin, at)));
    at = t->end;
  }
  if (at != data_bytes) fail(path, fmt::format("the tensors take {} bytes, but the file has {} after its header", at, data_bytes));
}

using kava::to_float;

struct Half {
  std::uint16_t bits;
};

inline float to_float(Half h) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(h.bits & 0x7fffu) << 13;
  // Read as f32 the exponent is 112 too small, for normal and subnormal numbers alike; infinity and NaN need theirs all ones.
  std::uint32_t bits = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(bits | static_cast<std::uint32_t>(h.bits & 0x8000u) << 16);
}

inline void store(float x, float& out) { out = x; }
inline void store(double x, float& out) { out = static_cast<float>(x); }
inline void store(double x, double& out) { out = x; }
inline void store(float x, bf16& out) { out = to_bf16(x); }
inline void store(double x, bf16& out) { out = to_bf16(round_to_odd(x)); }

inline bool infinite_or_nan(float x) { return (std::bit_cast<std::uint32_t>(x) & 0x7f800000u) == 0x7f800000u; }
inline bool infinite_or_nan(double x) { return (std::bit_cast<std::uint64_t>(x) & 0x7ff0000000000000u) == 0x7ff0000000000000u; }
inline bool infinite_or_nan(bf16 x) { return (x.bits & 0x7f80u) == 0x7f80u; }

// Returns whether all results are finite.
template <class From, class To>
bool convert(const From* in, To* out, std::size_t n) {
  unsigned bad = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<From, To>) out[i] = in[i];
    else store(to_float(in[i]), out[i]);
    bad |= static_cast<unsigned>(infinite_or_nan(out[i]));
  }
  return bad == 0;
}

// Calls f with a value of the element type of a floating dtype's name.
template <class F>
void with_source_type(const std::string& path, const TensorInfo& tensor, F&& f) {
  if (tensor.dtype == "F32") f(float{});
  else if (tensor.dtype == "BF16") f(bf16{});
  else if (tensor.dtype == "F16") f(Half{});
  else if (tensor.dtype == "F64") f(double{});
  else fail(path, named(tensor.name) + " has dtype " + tensor.dtype, "only F64, F32, F16 and BF16 are read as numbers");
}

}  // namespace

std::int64_t TensorInfo::count() const {
  std::int64_t n = 1;
  for (std::int64_t d : shape) n *= d;
  return n;
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

SafetensorsFile SafetensorsFile::open(const std::string& path) {
  SafetensorsFile file(path);
  file.parse_header();
  return file;
}

SafetensorsFile SafetensorsFile::of_tensors(const std::string& path, std::vector<TensorInfo> tensors) {
  SafetensorsFile file(path);
  file.tensors_ = std::move(tensors);
  std::ranges::sort(file.tensors_, {}, &TensorInfo::name);
  if (const auto twice = std::ranges::adjacent_find(file.tensors_, {}, &TensorInfo::name); twice != file.tensors_.end())
    fail(path, named(twice->name) + " is there twice");
  return file;
}

namespace {

// What is often given in place of a safetensors file, by its first bytes, which none has as an allowed length of its header.
void refuse_other_file(const std::string& path, std::string_view first) {
  const auto text = first.substr(std::min(first.find_first_not_of(" \t\r\n"), first.size()));
  const auto refuse = [&](const char* what, const char* remedy) { throw Error(Exit::data, shown_path(path), what, remedy); };
  const auto is_text = [](unsigned char c) { return (c >= ' ' && c <= '~') || c == '\t' || c == '\r' || c == '\n'; };
  if (text.starts_with('{')) refuse("is a JSON file and no safetensors file", "name the safetensors file beside it, or the folder of both");
  if (first == "version ") refuse("is a pointer of git-lfs and not the file itself", "get it by git lfs pull");
  if (text.starts_with("PK\3\4") || text.starts_with("\x80\x02"))
    refuse("is a checkpoint of PyTorch (pickle) and no safetensors file", "save the model as safetensors");
  if (std::ranges::all_of(first, is_text))
    refuse("is a text file and no safetensors file", "name a safetensors file, or the folder of one");
}

}  // namespace

void SafetensorsFile::parse_header() {
  if (file_.size() < 8) fail(path(), fmt::format("has {} bytes, too few for a safetensors file", file_.size()));
  file_.read_at(0, &header_bytes_, 8);
  if (header_bytes_ > kLargestHeader) refuse_other_file(path(), std::string_view(reinterpret_cast<const char*>(&header_bytes_), 8));
  if (header_bytes_ > kLargestHeader) fail(path(), fmt::format("claims a header of {} bytes, more than {}", header_bytes_, kLargestHeader));
  if (header_bytes_ > file_.size() - 8) fail(path(), fmt::format("claims a header of {} bytes, more than the file has", header_bytes_));
  data_begin_ = 8 + header_bytes_;
  const std::string text = header_text();
  const auto first = text.find_first_not_of(" \t\r\n");
  if (first == std::string::npos || text[first] != '{') fail(path(), "has a header that is not a JSON object");
  if (std::count(text.begin(), text.end(), ',') > kMostValues)
    fail(path(), fmt::format("has more than {} values in its header", kMostValues));
  const Json header = parse_json(text, shown_path(path()));
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") metadata_ = parse_metadata(path(), entry);
    else tensors_.push_back(parse_entry(path(), name, entry));
  }
  check_layout(path(), tensors_, file_.size() - 8 - header_bytes_);
}

const TensorInfo* SafetensorsFile::find(std::string_view name) const {
  // JSON objects are ordered by key, so tensors_ is sorted by name.
  const auto at =
      std::lower_bound(tensors_.begin(), tensors_.end(), name, [](const TensorInfo& t, std::string_view n) { return t.name < n; });
  return at != tensors_.end() && at->name == name ? &*at : nullptr;
}

std::string SafetensorsFile::header_text() const {
  std::string text(header_bytes_, '\0');
  file_.read_at(8, text.data(), text.size());
  return text;
}

void SafetensorsFile::read(const TensorInfo& tensor, void* out) const { read(tensor, 0, out, tensor.end - tensor.begin); }

void SafetensorsFile::read(const TensorInfo& tensor, std::uint64_t offset, void* out, std::size_t count) const {
  KAVA_CHECK(offset + count <= tensor.end - tensor.begin, "bytes {}..{} of {}", offset, offset + count, tensor.name);
  file_.read_at(data_begin_ + tensor.begin + offset, out, count);
}

bool SafetensorsFile::is_floating(const TensorInfo& tensor) {
  return tensor.dtype == "F64" || tensor.dtype == "F32" || tensor.dtype == "F16" || tensor.dtype == "BF16";
}

void SafetensorsFile::read_as(const TensorInfo& tensor, DType type, void* out, bool finite) const {
  read_as(tensor, 0, tensor.count(), type, out, finite);
}

void SafetensorsFile::read_as(const TensorInfo& tensor, std::int64_t first, std::int64_t count, DType type, void* out, bool finite) const {
  KAVA_CHECK(0 <= first && 0 <= count && first + count <= tensor.count(), "elements {} + {} of {}", first, count, tensor.count());
  with_source_type(path(), tensor, [&](auto source) {
    using From = decltype(source);
    dispatch(type, [&]<class To>() {
      constexpr std::size_t at_once = kReadChunk / sizeof(From);
      const auto total = static_cast<std::size_t>(count), begin = static_cast<std::size_t>(first);
      std::vector<From> chunk(std::is_same_v<From, To> ? 0 : std::min(total, at_once));
      for (std::size_t done = 0; done < total; done += at_once) {
        const std::size_t n = std::min(at_once, total - done);
        To* to = static_cast<To*>(out) + done;
        From* from = chunk.data();
        if constexpr (std::is_same_v<From, To>) from = to;
        read(tensor, (begin + done) * sizeof(From), from, n * sizeof(From));
        if (!convert(from, to, n) && finite)
          fail(path(), fmt::format("{} has a NaN or infinity in {}", named(tensor.name), name_of(type)),
               "use sound weights, or a wider model.dtype");
      }
    });
  });
}

void write_safetensors(const std::string& path, std::vector<TensorOut> tensors, const std::map<std::string, std::string>& metadata) {
  FileWriter file(path);
  write_safetensors(file, std::move(tensors), metadata);
}

void write_safetensors(FileWriter& file, std::vector<TensorOut> tensors, const std::map<std::string, std::string>& metadata) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorOut& a, const TensorOut& b) {
    const std::uint64_t wide_a = bits_of(a.dtype), wide_b = bits_of(b.dtype);
    return wide_a != wide_b ? wide_a > wide_b : a.name < b.name;
  });
  std::map<std::string, std::string> all = metadata;
  all["format"] = "pt";
  std::string header = "{\"__metadata__\":" + Json(all).dump();
  std::vector<std::uint64_t> bytes;
  std::set<std::string> names;
  std::uint64_t at = 0;
  for (const TensorOut& t : tensors) {
    KAVA_CHECK(names.insert(t.name).second, "tensor {} is given twice", t.name);
    const std::uint64_t bits = bits_of(t.dtype);
    KAVA_CHECK(bits % 8 == 0 && bits > 0, "tensor {} cannot be written as {}", t.name, t.dtype);
    std::uint64_t size = bits / 8;
    for (std::int64_t d : t.shape) size *= static_cast<std::uint64_t>(d);
    header += fmt::format(",{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{},{}]}}", Json(t.name).dump(), t.dtype,
                          shape_text(t.shape), at, at + size);
    bytes.push_back(size);
    at += size;
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  KAVA_CHECK(header.size() <= kLargestHeader, "the header takes {} bytes", header.size());

  const std::uint64_t header_bytes = header.size();
  file.write(&header_bytes, sizeof header_bytes);
  file.write(header);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto size = static_cast<std::size_t>(bytes[i]);
    if (tensors[i].data || size == 0) {
      file.write(tensors[i].data, size);
      continue;
    }
    const auto room = std::make_unique_for_overwrite<char[]>(size);
    tensors[i].fill(room.get());
    file.write(room.get(), size);
  }
  file.commit();
}

}  // namespace kava
