// cuDNN's graphs of operations, as far as comparisons need them. It is looked for and loaded at run time: nothing of it is needed to build,
// and nothing but benchmarks and tests knows it.
#pragma once
#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct CUstream_st;

namespace kava {

/// A call that failed, with cuDNN's own words.
struct CudnnError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Numbers of cuDNN's interface, as cudnn_graph.h of 9.19 has them.
enum class CudnnType { f32 = 0, i32 = 4, bf16 = 9, boolean = 11 };
enum class CudnnPointwise { add = 0, mul = 1, div = 6, sub = 9, exp = 13, log = 15, cmp_ge = 303, gen_index = 501, select = 601 };
enum class CudnnReduction { add = 0, max = 3 };

/// The library, and on a GPU its handle.
class Cudnn {
 public:
  /// Null where there is no libcudnn.so.9 that can be used; `why` says it in a line.
  static std::unique_ptr<Cudnn> open(std::string& why);
  ~Cudnn();
  Cudnn(const Cudnn&) = delete;
  Cudnn& operator=(const Cudnn&) = delete;

  int64_t version() const { return version_; }  // 91900 for 9.19
  /// For the device of this thread and its stream; graphs that are built from then on can be run.
  void use(CUstream_st* stream);

 private:
  friend class CudnnGraph;
  Cudnn() = default;
  void check(int status, const char* call) const;

  struct Api {
    std::size_t (*GetVersion)();
    void (*GetLastErrorString)(char*, std::size_t);
    int (*Create)(void**);
    int (*Destroy)(void*);
    int (*SetStream)(void*, CUstream_st*);
    int (*BackendCreateDescriptor)(int, void**);
    int (*BackendDestroyDescriptor)(void*);
    int (*BackendSetAttribute)(void*, int, int, int64_t, const void*);
    int (*BackendGetAttribute)(void*, int, int, int64_t, int64_t*, void*);
    int (*BackendFinalize)(void*);
    int (*BackendExecute)(void*, void*, void*);
  } api_{};
  int64_t version_ = 0;
  void* handle_ = nullptr;
};

/// Operations on tensors of four dimensions, which cuDNN computes as one. What lies between two operations is virtual: it has no memory.
class CudnnGraph {
 public:
  using Dims = std::array<int64_t, 4>;
  using Tensor = void*;

  explicit CudnnGraph(Cudnn& cudnn) : cudnn_(cudnn) {}
  ~CudnnGraph();
  CudnnGraph(const CudnnGraph&) = delete;
  CudnnGraph& operator=(const CudnnGraph&) = delete;

  /// A tensor in memory, which run() is given under this number.
  Tensor in_memory(int64_t number, const Dims& dims, const Dims& strides, CudnnType type);
  /// A number of f32 that run() is given a host's pointer to.
  Tensor scalar(int64_t number);
  /// One between two operations; strides empty: packed, the last dimension the nearest.
  Tensor between(const Dims& dims, CudnnType type = CudnnType::f32);
  Tensor between(const Dims& dims, const Dims& strides, CudnnType type);

  void matmul(Tensor a, Tensor b, Tensor c);
  /// y = x, or x and b; y = x where t holds and else b, for select.
  void pointwise(CudnnPointwise mode, Tensor x, Tensor b, Tensor y, Tensor t = nullptr);
  /// y = the number of x's place along a dimension.
  void gen_index(int64_t axis, Tensor x, Tensor y);
  void reduce(CudnnReduction op, Tensor x, Tensor y);
  /// y = x, seen with other strides.
  void reshape(Tensor x, Tensor y);

  /// No more operations.
  void finish();
  /// How many configurations its heuristics name for the device that a JSON text describes, before they ask whether they can run here.
  int64_t candidates(const std::string& device);
  /// The plans of the configurations that can run on the device in use; none is a CudnnError.
  int64_t make_plans();
  int64_t workspace_bytes(int64_t plan) const { return plans_[static_cast<std::size_t>(plan)].workspace; }
  /// What run() takes, for as long as the graph lives. tensors: numbers and addresses.
  void* pack(std::span<const std::pair<int64_t, void*>> tensors, void* workspace);
  /// Queues it on the stream.
  void run(int64_t plan, void* pack);

 private:
  struct Plan {
    void* descriptor;
    int64_t workspace;
  };
  void* make(int type);
  void finalize(void* descriptor, const char* what) const;
  void set(void* descriptor, int attribute, int type, int64_t count, const void* values) const;
  void set(void* descriptor, int attribute, void* of) const;
  void set_ints(void* descriptor, int attribute, std::span<const int64_t> values) const;
  Tensor tensor(int64_t number, const Dims& dims, const Dims& strides, CudnnType type, bool is_virtual, bool by_value);
  void pointwise(CudnnPointwise mode, int64_t axis, Tensor x, Tensor b, Tensor y, Tensor t);
  void* heuristics(void* device);

  Cudnn& cudnn_;
  std::vector<void*> made_, operations_;
  void* graph_ = nullptr;
  int64_t next_ = 1000;  // numbers of tensors without memory
  std::vector<Plan> plans_;
};

}  // namespace kava
