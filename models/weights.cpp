#include "models/weights.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <set>

#include "engine/files/json.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr const char* kHead = kHeadName;
constexpr const char *kSingle = "model.safetensors", *kIndex = "model.safetensors.index.json";
constexpr std::size_t kLargestIndex = std::size_t{64} << 20;

[[noreturn]] void fail(const std::string& path, const std::string& what, const std::string& remedy) {
  throw Error(Exit::data, shown_path(path), what, remedy);
}

std::string named(const std::string& tensor) { return "tensor \"" + escaped(tensor, 200) + "\""; }

// What files also hold and nobody reads: the frequencies of rotary positions, and the architecture's buffers.
class Ignored {
 public:
  explicit Ignored(const ModelConfig& c) : architecture_(c.architecture()) {
    for (std::int64_t layer = 0; layer < c.layers; ++layer)
      for (const std::string& buffer : architecture_.buffers) {
        const std::string name = architecture_.layer(layer) + buffer;
        names_.insert(name);
        names_.insert(name.substr(architecture_.prefix.size()));
      }
  }
  bool contains(const std::string& name) const {
    const bool of_layers = name.starts_with(architecture_.prefix) || name.starts_with(architecture_.layers);
    return names_.contains(name) || (architecture_.rotary() && of_layers && name.ends_with("rotary_emb.inv_freq"));
  }

 private:
  const Architecture& architecture_;
  std::set<std::string> names_;
};

// The shards of an index, by file name, each with the tensors that it must hold.
std::map<std::string, std::set<std::string>> read_index(const std::string& path) {
  const Json json = read_json(path, kLargestIndex);
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object() || json["weight_map"].empty())
    fail(path, "has no weight_map", "get the file again");
  std::map<std::string, std::set<std::string>> shards;
  for (const auto& [tensor, file] : json["weight_map"].items()) {
    if (!file.is_string()) fail(path, named(tensor) + " is not mapped to a file name", "get the file again");
    const auto name = file.get<std::string>();
    if (name.empty() || name == "." || name == ".." || name.find_first_of(std::string("/\\\0", 3)) != std::string::npos)
      fail(path, named(tensor) + " is mapped to \"" + escaped(name) + "\", which is no plain file name", "shards lie beside the index");
    shards[name].insert(tensor);
  }
  return shards;
}

std::vector<SafetensorsFile> open_shards(const fs::path& folder, const std::string& index, const Ignored& ignored) {
  std::vector<SafetensorsFile> files;
  for (const auto& [name, tensors] : read_index(index)) {
    files.push_back(SafetensorsFile::open((folder / name).string()));
    for (const TensorInfo& t : files.back().tensors())
      if (!tensors.contains(t.name) && !ignored.contains(t.name))
        fail(files.back().path(), named(t.name) + " is not mapped to this file by the index", "get the folder again");
    for (const std::string& tensor : tensors)
      if (!files.back().find(tensor))
        fail(files.back().path(), named(tensor) + " is missing, but the index maps it to this file", "get the folder again");
  }
  return files;
}

std::vector<SafetensorsFile> open_files(const fs::path& folder, const Ignored& ignored) {
  std::vector<SafetensorsFile> files;
  const fs::path single = folder / kSingle, index = folder / kIndex;
  if (is_there(single)) files.push_back(SafetensorsFile::open(single.string()));
  else if (is_there(index)) files = open_shards(folder, index.string(), ignored);
  else fail(folder.string(), "has neither model.safetensors nor model.safetensors.index.json", "give a folder with weights in that format");
  return files;
}

void check_tensor(const std::string& path, const WeightSpec& spec, const TensorInfo& t) {
  const std::vector<std::int64_t> expected = spec.file_shape();
  if (t.shape != expected)
    fail(path, fmt::format("{} has shape {}, but config.json asks for {}", named(t.name), shape_text(t.shape), shape_text(expected)),
         "use the config.json that belongs to the weights");
  if (!SafetensorsFile::is_floating(t)) fail(path, named(t.name) + " has dtype " + t.dtype, "use weights in F32, F16 or BF16");
}

bool same_bytes(const SafetensorsFile& a, const TensorInfo& s, const SafetensorsFile& b, const TensorInfo& t) {
  constexpr std::uint64_t kChunk = std::uint64_t{1} << 20;
  if (s.dtype != t.dtype || s.shape != t.shape) return false;
  std::vector<char> left(kChunk), right(kChunk);
  const std::uint64_t total = s.end - s.begin;
  for (std::uint64_t at = 0; at < total; at += kChunk) {
    const std::size_t n = std::min(kChunk, total - at);
    a.read(s, at, left.data(), n);
    b.read(t, at, right.data(), n);
    if (!std::equal(left.begin(), left.begin() + static_cast<std::ptrdiff_t>(n), right.begin())) return false;
  }
  return true;
}

}  // namespace

std::vector<std::string> weight_paths(const std::string& folder) {
  const fs::path single = fs::path(folder) / kSingle, index = fs::path(folder) / kIndex;
  if (is_there(single) || !is_there(index)) return {single.string()};
  std::vector<std::string> paths = {index.string()};
  for (const auto& [name, tensors] : read_index(index.string())) paths.push_back((fs::path(folder) / name).string());
  return paths;
}

std::vector<WeightSpec> weight_specs(const ModelConfig& c) {
  using Role = WeightSpec::Role;
  const Architecture& arch = c.architecture();
  std::vector<WeightSpec> specs;
  const auto vector = [&](const std::string& name, Role role, std::int64_t size) { specs.push_back({name, role, 1, size}); };
  const auto norm = [&](const std::string& path) {
    vector(path + ".weight", Role::gain, c.hidden);
    if (arch.norm == NormKind::layer) vector(path + ".bias", Role::bias, c.hidden);
  };
  const auto maps = [&](const std::string& layer, MapGroup group) {
    const Role role = group == kAttentionOut || group == kMlpOut ? Role::residual_linear : Role::linear;
    bool joined = false;
    for (const LinearSpec& map : arch.maps[group]) {
      const std::int64_t out = c.width(map.out);
      specs.push_back({layer + map.path + ".weight", role, out, c.width(map.in), arch.transposed, joined});
      if (map.bias) specs.push_back({layer + map.path + ".bias", Role::bias, 1, out, false, joined});
      joined = true;
    }
  };
  specs.push_back({arch.prefix + arch.embedding + ".weight", Role::embedding, c.vocab, c.hidden});
  if (!arch.rotary()) specs.push_back({arch.prefix + arch.positions + ".weight", Role::embedding, c.max_positions, c.hidden});
  for (std::int64_t l = 0; l < c.layers; ++l) {
    const std::string layer = arch.layer(l);
    norm(layer + arch.norm1);
    maps(layer, kAttentionIn);
    if (arch.has_head_norms())
      for (const std::string& name : {arch.q_norm, arch.k_norm}) vector(layer + name + ".weight", Role::gain, c.head_dim);
    maps(layer, kAttentionOut);
    norm(layer + arch.norm2);
    maps(layer, kMlpIn);
    maps(layer, kMlpOut);
  }
  norm(arch.prefix + arch.final_norm);
  if (!c.tied) specs.push_back({kHead, Role::embedding, c.vocab, c.hidden});
  return specs;
}

namespace {

void read_transposed(Ops& ops, const Tensor& to, const SafetensorsFile& file, const TensorInfo& tensor) {
  const std::int64_t rows = to.rows, cols = to.cols, size = size_of(to.dtype);
  std::vector<char> stored(static_cast<std::size_t>(rows * cols * size)), turned(stored.size());
  file.read_as(tensor, 0, rows * cols, to.dtype, stored.data(), true);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < cols; ++c)
      std::memcpy(&turned[static_cast<std::size_t>((r * cols + c) * size)], &stored[static_cast<std::size_t>((c * rows + r) * size)],
                  static_cast<std::size_t>(size));
  ops.upload(to, turned.data());
}

}  // namespace

void read_tensor(Ops& ops, const Tensor& to, const SafetensorsFile& file, const TensorInfo& tensor, bool transposed,
                 std::int64_t first_row) {
  constexpr std::int64_t kElements = std::int64_t{1} << 20;
  const std::int64_t first = first_row * to.cols;
  KAVA_CHECK(tensor.count() >= first + to.count(), "{} read as [{}, {}]", tensor.name, to.rows, to.cols);
  if (transposed) return read_transposed(ops, to, file, tensor);
  const std::int64_t rows = std::max<std::int64_t>(1, kElements / std::max<std::int64_t>(to.cols, 1));
  std::vector<char> host(static_cast<std::size_t>(std::min(rows, to.rows) * to.cols * size_of(to.dtype)));
  for (std::int64_t row = 0; row < to.rows; row += rows) {
    const Tensor piece = to.row_range(row, std::min(to.rows, row + rows));
    file.read_as(tensor, first + row * to.cols, piece.count(), to.dtype, host.data(), true);
    ops.upload(piece, host.data());
  }
}

WeightFiles WeightFiles::open(const std::string& folder, const ModelConfig& config) {
  WeightFiles weights;
  const Ignored ignored(config);
  const Architecture& arch = config.architecture();
  weights.config_ = config;
  weights.prefix_ = arch.prefix, weights.embedding_ = arch.prefix + arch.embedding + ".weight";
  weights.files_ = open_files(folder, ignored);
  std::map<std::string, std::pair<const SafetensorsFile*, const TensorInfo*>> found;
  for (const SafetensorsFile& file : weights.files_)
    for (const TensorInfo& t : file.tensors())
      if (!ignored.contains(t.name) && !found.emplace(t.name, std::pair{&file, &t}).second)
        fail(file.path(), named(t.name) + " is in two files", "get the folder again");

  for (const auto& [name, at] : found)
    if (name.starts_with(arch.prefix) && found.contains(name.substr(arch.prefix.size())))
      fail(at.first->path(), named(name) + " is there without \"" + arch.prefix + "\" too", "get the folder again");
  // A model without a head is saved with the names of its own tensors.
  weights.bare_names_ = std::ranges::none_of(found, [&](const auto& entry) { return entry.first.starts_with(arch.prefix); });
  // A head that is tied may be what is stored of the two.
  weights.head_alone_ = config.tied && found.contains(kHead) && !found.contains(weights.name_in_file(weights.embedding_));
  for (const WeightSpec& spec : weight_specs(config)) {
    const auto at = found.find(weights.name_in_file(spec.name));
    if (at == found.end()) fail(folder, named(spec.name) + " is missing", "get the weights again");
    check_tensor(at->second.first->path(), spec, *at->second.second);
    if (spec.name != weights.embedding_) found.erase(at);
  }
  const auto embedding = found.extract(weights.name_in_file(weights.embedding_)).mapped();
  if (const auto head = found.find(kHead); config.tied && head != found.end()) {
    const auto& [file, tensor] = head->second;
    if (!same_bytes(*file, *tensor, *embedding.first, *embedding.second))
      fail(file->path(), named(kHead) + " differs from the embedding, but config.json ties them",
           "set tie_word_embeddings as the weights were made");
    found.erase(head);
  }
  if (!found.empty())
    fail(found.begin()->second.first->path(), named(found.begin()->first) + " is not part of this model",
         "use the config.json that belongs to the weights");
  return weights;
}

bool WeightFiles::passes_over(const std::string& name) const { return Ignored(config_).contains(name); }

std::string WeightFiles::name_with_prefix(const std::string& name) const { return bare_names_ && name != kHead ? prefix_ + name : name; }

std::string WeightFiles::name_in_file(const std::string& name) const {
  if (head_alone_ && name == embedding_) return kHead;
  return bare_names_ && name.starts_with(prefix_) ? name.substr(prefix_.size()) : name;
}

const SafetensorsFile& WeightFiles::file_of(const std::string& name) const {
  for (const SafetensorsFile& file : files_)
    if (file.find(name)) return file;
  KAVA_CHECK(false, "{} was not checked when the weights were opened", name);
}

void WeightFiles::read(const WeightSpec& spec, Ops& ops, const Tensor& to) const {
  const std::string name = name_in_file(spec.name);
  const SafetensorsFile& file = file_of(name);
  read_tensor(ops, to, file, *file.find(name), spec.transposed);
}

std::string WeightFiles::header_text() const {
  std::string text;
  for (const SafetensorsFile& file : files_) text += file.header_text();
  return text;
}

std::vector<std::string> WeightFiles::paths() const {
  std::vector<std::string> all;
  for (const SafetensorsFile& file : files_) all.push_back(file.path());
  return all;
}

std::string digest_of_base(const ModelConfig& config, const WeightFiles& weights) {
  return sha256(read_file(config.source, std::size_t{64} << 20) + weights.header_text());
}

}  // namespace kava
