// The safetensors format: u64 header length, a JSON header, the tensors' bytes without a gap. A file is checked completely before any of it
// is used: what the header claims never decides an allocation.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "engine/device/tensor.h"
#include "engine/files/files.h"

namespace kava {

struct TensorInfo {
  std::string name;
  std::string dtype;  // as in the file: F64 F32 F16 BF16 I64 I32 ...
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;  // bytes, from where the data begins

  /// Elements; checked not to overflow when the file was opened.
  std::int64_t count() const;
};

/// "[3, 64]"
std::string shape_text(const std::vector<std::int64_t>& shape);

/// A file opened for reading. Reads may come from several threads.
class SafetensorsFile {
 public:
  /// Error(code data) unless the file is well-formed: header at most 100 MB and inside the file, no key twice, known dtypes, metadata of
  /// strings, byte ranges that fit their shapes and cover the rest of the file exactly once.
  static SafetensorsFile open(const std::string& path);

  /// A file of another format in which these tensors lie, each in one piece: begin and end count from the file's start. The caller has
  /// checked that dtypes, shapes and ranges fit each other and the file. Error(code data) where two have one name.
  static SafetensorsFile of_tensors(const std::string& path, std::vector<TensorInfo> tensors);

  const std::string& path() const { return file_.path(); }
  /// Sorted by name.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  /// Null where there is none of that name.
  const TensorInfo* find(std::string_view name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  /// The header's bytes as they are in the file, for hashing.
  std::string header_text() const;

  /// The bytes of a tensor, all of them or `count` bytes from `offset` on.
  void read(const TensorInfo& tensor, void* out) const;
  void read(const TensorInfo& tensor, std::uint64_t offset, void* out, std::size_t count) const;

  /// Whether read_as can convert from this dtype: F64, F32, F16, BF16.
  static bool is_floating(const TensorInfo& tensor);
  /// The values in another type (f32, f64 or bf16), each rounded once to nearest even, through a buffer of one megabyte. With `finite`, NaN
  /// and infinity in `out` are Error naming the tensor. A dtype that is not floating is Error.
  void read_as(const TensorInfo& tensor, DType type, void* out, bool finite = false) const;
  /// `count` of them from element `first` on.
  void read_as(const TensorInfo& tensor, std::int64_t first, std::int64_t count, DType type, void* out, bool finite) const;

 private:
  explicit SafetensorsFile(const std::string& path) : file_(path) {}
  void parse_header();

  FileReader file_;
  std::uint64_t header_bytes_ = 0, data_begin_ = 0;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
};

struct TensorOut {
  std::string name;
  std::string dtype;  // as in the file
  std::vector<std::int64_t> shape;
  const void* data = nullptr;             // contiguous
  std::function<void(void* out)> fill{};  // where data is null: called when this tensor is written, with room for all of it
};

/// Writes a file as write_file does, one tensor at a time. Wider types come first, then by name, so that every tensor is aligned. Metadata
/// always has "format": "pt", which other readers demand.
void write_safetensors(const std::string& path, std::vector<TensorOut> tensors, const std::map<std::string, std::string>& metadata = {});
/// The same to a writer, which it commits.
void write_safetensors(FileWriter& file, std::vector<TensorOut> tensors, const std::map<std::string, std::string>& metadata = {});

}  // namespace kava
