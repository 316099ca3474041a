// The objective of a step: all passes of the method over some samples, every loss term, and the gradients of all trainables.
//   L = w_s CE_student + w_t CE_teacher + a1 L_CODI + a2 L_KV        (docs/method.md section 5)
#pragma once
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "models/model.h"
#include "models/recipe.h"
#include "models/transformer.h"

namespace kava {

/// What the means run over: the whole optimiser batch, however it is cut into forwards.
struct BatchTotals {
  int64_t samples = 0, student_tokens = 0, teacher_tokens = 0, kv_slots = 0;
  int64_t latents = 0, iterations = 0;  // of the sample with the most
  int64_t rest = 0;                     // tokens of the traces that the student still writes
  int64_t forwards = 0;                 // > 0: the cross-entropies are means over as many forwards of each one's own mean
};
/// micro: samples of a forward; 0: the whole batch is one.
BatchTotals batch_totals(const RunConfig& config, const Recipe& recipe, std::span<const Sample> batch, int64_t micro = 0);

/// By what each forward of a batch, of `micro` samples, is divided: the batch's totals, but where its cross-entropies are means of its own,
/// its own tokens times the number of forwards.
std::vector<BatchTotals> totals_of_forwards(const RunConfig& config, const Recipe& recipe, const BatchTotals& totals,
                                            std::span<const Sample> batch, int64_t micro);

/// Unweighted terms of some forwards of a batch; those of all its forwards add up to the batch's.
struct StepLosses {
  double student_ce = 0, teacher_ce = 0, kv = 0, codi = 0;
  int64_t forced_correct = 0;  // samples whose answer chunk is the argmax throughout, prompt included; where they are counted
  double total(const RunConfig& config) const;
  StepLosses& operator+=(const StepLosses& o);
};

/// A tensor written out by `kava_inspect step`: values as f64, or indices.
struct DumpTensor {
  std::vector<int64_t> shape;
  std::vector<double> values;
  std::vector<int32_t> indices;
  bool is_index = false;
  int axis = 0;  // along which the forwards of a batch are joined
};
using Dump = std::map<std::string, DumpTensor>;
/// Joins the dumps of consecutive forwards along each tensor's axis.
void join(Dump& to, const Dump& next);

/// Sums on the device that forwards of a batch add to, f64 [1, kStepSums]. Cross-entropies are sums over tokens, kv and codi the terms;
/// behind them the latents' inputs of the last pass: the sum of their squares and how many numbers they are.
enum StepSum : int64_t { kStudentCe, kTeacherCe, kKv, kCodi, kLatentSquares, kLatentNumbers, kStepSums };

struct StepOptions {
  std::optional<Recipe> recipe;  // absent: that of stage 0
  int64_t first_index = 0;       // of samples[0] in the optimiser batch
  uint32_t step = 0;
  bool dropout = true;   // as configured; off where a model is judged and not trained
  bool backward = true;  // gradients are added to the parameters'
  bool count_forced = false;
  /// Told of each layer, from the last to the first, whose parameters' gradients get nothing more from this backward; may be empty.
  std::function<void(int64_t layer)> layer_done;
  std::optional<StepSum> only;  // one of the four terms: the others have weight 0
  double* flops = nullptr;      // added to: the fewest operations that this forward and its backward take (models/flops.h)
  Dump* dump = nullptr;         // everything of docs/formats.md section 6 but ids, loss and grad
};

/// The terms that the sums of a whole batch, or of forwards that belong to it, stand for.
StepLosses losses_of(std::span<const double> sums, const BatchTotals& totals);

/// One forward (and backward) over `samples`, whose terms are added to `sums`. Waits for nothing, unless there is a dump.
void add_step(Model& model, Arena& arena, std::span<const Sample> samples, const BatchTotals& totals, const StepOptions& options,
              const Tensor& sums);
/// The same, with its terms read back.
StepLosses run_step(Model& model, Arena& arena, std::span<const Sample> samples, const BatchTotals& totals, const StepOptions& options);

}  // namespace kava
