// Trainable parameters: one flat buffer each for values, gradients and the two moments, so that there is one norm, one update, one
// all-reduce.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "engine/device/buffer.h"

namespace kava {

struct Parameter {
  std::string name;  // in its adapter file or checkpoint
  int64_t rows = 0, cols = 0;
  bool vector = false;      // one-dimensional in files; rows = 1
  bool decay = false;       // weight decay applies
  bool joined = false;      // lies without a gap behind the one of the same decay before it
  bool transposed = false;  // [cols, rows] in files
  Tensor value;             // sum type; storage type for inference
  Tensor grad;              // sum type; empty for inference
  Tensor compute;           // what the products read: value itself, or its copy in storage type where they differ
  int64_t offset = 0;       // elements from the start of the flat buffers

  std::vector<int64_t> file_shape() const {
    return vector ? std::vector{cols} : transposed ? std::vector{cols, rows} : std::vector{rows, cols};
  }
};

/// Inference keeps values in storage type alone: no gradients, no moments, no second copy.
enum class ModelUse { training, inference };

class ParameterStore {
 public:
  ParameterStore(Ops& ops, DType storage, ModelUse use) : ops_(ops), storage_(storage), use_(use) {}
  ParameterStore(const ParameterStore&) = delete;
  ParameterStore& operator=(const ParameterStore&) = delete;

  /// Before allocate(). Names are unique.
  void add(std::string name, int64_t rows, int64_t cols, bool vector, bool decay, bool joined = false, bool transposed = false);
  /// Lays the parameters out, the decayed ones first. For training all buffers are zero, for inference the values are whatever they are.
  void allocate();

  const std::vector<Parameter>& all() const { return parameters_; }  // in the order of add()
  const Parameter& at(const std::string& name) const;
  const Parameter* find(const std::string& name) const;
  int64_t count() const;  // of elements, without the gaps between parameters

  /// Host values of `value`, rounded to it; refreshes nothing: call refresh() after the last.
  void set(const std::string& name, const std::vector<double>& host);
  std::vector<double> get(const Tensor& x) const;
  /// The elements of a parameter's value, gradient or moment in the order of files, each rounded once to T (float or double). What lies in
  /// another order or type is turned a part at a time.
  template <class T>
  void download_as_stored(const Parameter& p, const Tensor& x, T* out) const;
  std::vector<double> get_as_stored(const Parameter& p, const Tensor& x) const;
  /// compute = value rounded to the storage type, and what the groups hold of it is written anew.
  void refresh();
  /// A group that reads parameters: it is prepared by every refresh and update.
  void prepare(const LinearGroup& group) { groups_.push_back(group); }
  void zero_grad();
  /// A buffer like grad(), of which nothing is set.
  Buffer like_grad() const { return {ops_, grad().dtype, 1, size_}; }
  /// Of everything that is stored here.
  int64_t bytes() const;
  /// Both moments are zero again.
  void reset_moments();

  const Tensor& grad() const { return grad_.tensor(); }
  const Tensor& m() const { return m_.tensor(); }
  const Tensor& v() const { return v_.tensor(); }
  const Tensor& value() const { return value_.tensor(); }
  /// The part of a parameter in the flat moments, for checkpoints.
  Tensor part(const Tensor& flat, const Parameter& p) const;

  /// One AdamW step over everything, made on the device and not waited for. grad_square [1, 1] f64 gets the square of the gradient's norm
  /// before clipping; where it, or one of losses [1, n] f64, is not finite, it gets NaN and nothing is changed. weight_decay applies to the
  /// decayed part only.
  void update(Arena& arena, AdamwOptions options, const Tensor& grad_square, const Tensor& losses);
  /// Updates made so far, as the bias corrections of AdamW count them.
  void set_updates(int64_t count);
  /// The name of a parameter with a value that is not finite; "" where there is none.
  std::string find_not_finite(Arena& arena);

 private:
  Buffer zeroed(DType dtype);
  void prepare_groups();

  Ops& ops_;
  DType storage_;
  ModelUse use_;
  std::vector<Parameter> parameters_;
  std::map<std::string, std::size_t> index_;
  std::vector<LinearGroup> groups_;
  int64_t size_ = 0, decayed_ = 0;
  Buffer value_, grad_, m_, v_, half_, updates_;
};

}  // namespace kava
