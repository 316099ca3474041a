// One forward of a batch, with its losses and its backward, in the order in which it is made. kava.h is what others call.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "engine/device/host.h"
#include "models/kava.h"
#include "models/latent.h"
#include "models/layout.h"

namespace kava {

class Step {
 public:
  Step(Model& model, Arena& arena, std::span<const Sample> samples, const BatchTotals& totals, const StepOptions& options);

  /// Adds the terms to sums (StepSum).
  void run(const Tensor& sums);
  /// Where options.count_forced.
  int64_t forced_correct() const;

 private:
  Tensor indices(std::span<const int32_t> host) { return upload_indices(ops_, arena_, host); }
  std::vector<int32_t> live_of(std::span<const int32_t> rows) const;
  std::vector<int32_t> positions_of(std::span<const int32_t> rows) const;
  std::size_t layer_count() const { return transformer_.layers().size(); }

  // All lists of the forward and its backward, which are sent before the first op.
  void plan();
  void forward();
  void backward();
  void backward(std::size_t pass, const std::function<void(int64_t)>& layer_done);

  // Rows of the head's product: the student's, then the teacher's.
  struct Head {
    Tensor live, targets, classes, owners;
    int64_t teacher_rows = 0;
  };
  void plan_head(IndexBlock& block);
  void cross_entropy(const Tensor& sums);
  // Sets the two sums of the latents' inputs.
  void measure_latents(const Tensor& sums);

  // ---- L_KV (kv_loss.cpp). Kept teacher pairs, and the students' K and V of pass T as they are matched.
  struct KvLayer {
    Tensor target[2], student[2], projected[2];
  };
  struct RkvDump {
    std::vector<double> importance, redundancy, score;
    std::vector<std::vector<int32_t>> kept;  // per layer [B*M, K]
  };
  struct KvLists {
    Tensor queries, queries_live;  // rows whose queries are taken, and
    Tensor taken, query_offsets;   // those rows where they then lie
    Tensor trace, trace_offsets, trace_positions, latents, latent_positions, valid, samples;
  };
  void plan_kv(IndexBlock& block);
  bool turned_back() const { return config_.kv.keys == Keys::pre_rope && model_.shape.architecture().rotary(); }
  void unrotate(const Tensor& k, const Tensor& positions);
  void kv_loss(const Tensor& loss);
  void select(std::size_t l, const KvLayer& out, RkvDump& rkv);
  void distill_kv(std::size_t l, int i, const KvLayer& k, const Tensor& inverse, double factor, const Tensor& loss);
  /// [1, count]: of each of count equal parts of the moments, as the configuration's std says: of every one, of all, or nothing.
  Tensor inverse(Std std, const Tensor& moments, int power = 1) {
    if (std == Std::none) return {};
    const Tensor t = arena_.alloc(sum_, 1, std == Std::layer ? moments.rows : 1);
    ops_.inverse_std(t, moments, power);
    return t;
  }
  /// What of that scales layer l.
  static Tensor of_layer(const Tensor& inverse, std::size_t l) {
    const int64_t at = inverse.cols > 1 ? static_cast<int64_t>(l) : 0;
    return inverse ? inverse.col_range(at, at + 1) : inverse;
  }
  const TrainedGroup* kv_map(std::size_t l, int i) const {
    if (model_.kv_projection.empty()) return nullptr;
    return i == 0 ? &model_.kv_projection[l].k : &model_.kv_projection[l].v;
  }
  Tensor by_head(const Tensor& t) const { return t.reshape(t.rows * model_.shape.kv_heads, model_.shape.head_dim); }

  // ---- L_CODI (codi_loss.cpp). With codi.states = "all" the first state is what goes into the first layer; the last one is that after the
  // final norm.
  std::size_t embedded() const { return config_.codi.states == CodiStates::all ? 1 : 0; }
  Tensor input_of(std::span<const Tensor> states) const { return embedded() > 0 ? states.front() : Tensor{}; }
  std::span<const Tensor> after_blocks(std::span<const Tensor> states) const { return states.subspan(embedded(), layer_count() - 1); }
  struct CodiLists {
    Tensor student, student_in_pass, student_live, student_positions;  // in_pass: counted from the last pass's begin
    Tensor teacher, teacher_live, valid;
  };
  // A teacher that runs by itself, with masks of its own.
  struct Alone {
    Layout layout;
    DevicePass pass;
    Tensor rows, live;
  };
  void plan_codi(IndexBlock& block);
  void read_states(std::vector<PassReads>& reads);
  bool separate_target() const;
  void run_separate_target();
  void input_gradient(const Tensor& d);
  void codi_loss(const Tensor& loss);

  // ---- what kava_inspect step writes (step_dump.cpp)
  std::vector<double> host(const Tensor& t) const { return to_host(ops_, t); }
  void dump(const std::string& name, std::vector<int64_t> shape, std::vector<double> values, int axis);
  std::vector<double> by_layer(const std::vector<Tensor>& layers) const;
  void dump_by_layer(const std::string& name, const std::vector<Tensor>& layers);
  void dump_kv(const std::vector<KvLayer>& layers, RkvDump& rkv);
  void dump_codi();
  void dump_latents();
  void dump_latent_pairs(const char* name, int i, std::span<const int32_t> real);

  Model& model_;
  Ops& ops_;
  Arena& arena_;
  const RunConfig config_;
  const BatchTotals& totals_;
  const StepOptions& options_;
  std::span<const Sample> samples_;
  const Recipe recipe_;
  Layout layout_;
  Transformer transformer_;
  int64_t B_ = 0, M_ = 0, KD_ = 0;
  DType type_ = DType::f32, sum_ = DType::f32;
  std::vector<int32_t> valid_;
  std::vector<int64_t> judged_, before_judged_;  // supervised tokens of each sample that have to be right, and before them
  std::vector<DevicePass> passes_;
  std::vector<FeedState> feeds_;
  std::vector<Tap> taps_;
  std::vector<Tensor> student_states_, teacher_states_;  // [B, C] each, of L_CODI
  Head head_;
  KvLists kv_;
  CodiLists codi_;
  Alone alone_;
  Tensor correct_;
};

}  // namespace kava
