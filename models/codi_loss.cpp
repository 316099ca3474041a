// L_CODI: the distance of the student's residuals at one token to the teacher's.
#include "engine/device/indices.h"
#include "models/step.h"

namespace kava {

namespace {
constexpr int64_t kSecondDraw = int64_t{1} << 30;  // beyond every index of a batch: the masks of a second forward
}

// The student's token lies in the last pass, the teacher's in pass 0.
void Step::read_states(std::vector<PassReads>& reads) {
  std::vector<int32_t> in_pass;
  for (int32_t r : layout_.codi_student_rows) in_pass.push_back(static_cast<int32_t>(r - layout_.passes.back().begin));
  check_distinct(in_pass, layout_.passes.back().rows());
  check_distinct(layout_.codi_teacher_rows, layout_.passes.front().end);
  codi_rows_ = indices(in_pass);
  for (std::vector<Tensor>* all : {&student_states_, &teacher_states_})
    for (std::size_t s = 0; s < embedded() + layer_count(); ++s) all->push_back(arena_.alloc(type_, B_, model_.shape.hidden));
  reads.back().states.push_back({codi_rows_, after_blocks(student_states_)});
  if (!separate_target()) reads.front().states.push_back({indices(layout_.codi_teacher_rows), after_blocks(teacher_states_)});
}

// The states that transformers do not take by themselves: what goes into the first layer, and what comes out of all.
void Step::gather_ends(std::span<const Tensor> to, const Transformer& from, const Tensor& rows, const Tensor& live) {
  if (embedded() > 0) ops_.gather_rows(to.front(), from.layers().front().residual.all, rows);
  ops_.gather_rows(to.back(), from.all_hidden(), live);
}

// Only dropout tells a second forward of the teacher from the first.
bool Step::separate_target() const {
  return config_.codi.target == CodiTarget::separate && options_.dropout && config_.train.trainable == Trainable::lora &&
         config_.lora.dropout > 0;
}

// Of a teacher that runs by itself, without gradient and with masks of its own.
void Step::run_separate_target() {
  ArenaScope scope(arena_);
  Recipe alone;
  alone.teacher = true;
  const Layout layout = make_layout(config_, alone, samples_, options_.first_index + kSecondDraw);
  Transformer teacher(model_, arena_, Keep::nothing, options_.step, true);
  teacher.allocate(layout.rows, layout.live_rows, layout.rows);
  const DevicePass d = upload_pass(ops_, arena_, layout.passes[0]);
  ops_.embed_fwd(teacher.inputs(d), model_.embedding, model_.new_tokens, d.ids);
  PassReads reads;
  const Tensor rows = indices(layout.codi_teacher_rows);
  reads.states.push_back({rows, after_blocks(teacher_states_)});
  teacher.forward(d, reads);
  std::vector<int32_t> live;
  for (int32_t row : layout.codi_teacher_rows) live.push_back(layout.live_of[static_cast<std::size_t>(row)]);
  gather_ends(teacher_states_, teacher, rows, indices(live));
}

// Of what goes into the first layer: the embedding and, where they are learned, the position.
void Step::input_gradient(const Tensor& d, const Tensor& rows) {
  ops_.scatter_add_rows(transformer_.dinput(), d, rows);
  if (model_.dpositions) ops_.embed_bwd(model_.dpositions, {}, d, indices(positions_of(layout_.codi_student_rows)));
}

void Step::codi_loss(const Tensor& loss) {
  const std::size_t first = embedded(), S = layer_count() + first;
  const int64_t C = model_.shape.hidden;
  const Tensor student = indices(layout_.codi_student_rows), teacher = indices(layout_.codi_teacher_rows);
  const Tensor student_live = live_indices(layout_.codi_student_rows), teacher_live = live_indices(layout_.codi_teacher_rows);
  std::vector<int32_t> ones(static_cast<std::size_t>(B_), 1);
  const Tensor valid = indices(ones), moments = arena_.alloc(sum_, static_cast<int64_t>(S), 3);
  const std::vector<Tensor>&x = student_states_, &target = teacher_states_;
  gather_ends(x, transformer_, student, student_live);
  if (separate_target()) run_separate_target();
  else gather_ends(target, transformer_, teacher, teacher_live);
  for (std::size_t s = 0; s < S; ++s) {
    const int64_t at = static_cast<int64_t>(s);
    ops_.moments(arena_, moments.row_range(at, at + 1), target[s], valid);
  }
  const int power = config_.codi.loss == Distance::mse ? static_cast<int>(config_.codi.mse_std) : 1;
  const Tensor global = config_.codi.std == Std::global ? inverse(moments, power) : Tensor{};
  const double factor = 1.0 / (static_cast<double>(totals_.samples) * static_cast<double>(C) * static_cast<double>(S));
  for (std::size_t s = 0; s < S; ++s) {
    const int64_t at = static_cast<int64_t>(s);
    const Tensor scale = config_.codi.std == Std::layer ? inverse(moments.row_range(at, at + 1), power) : global;
    const Tensor d = arena_.alloc(sum_, B_, C);
    ops_.distill(arena_, loss, d, x[s], target[s], valid, scale, config_.codi.loss, factor, config_.codi.weight);
    if (!options_.backward) continue;
    if (s + 1 == S) ops_.scatter_add_rows(transformer_.dhidden(), d, student_live);
    else if (s < first) input_gradient(d, student);
    else taps_.push_back({codi_rows_, d});
  }
  if (options_.dump) dump_codi();
}

}  // namespace kava
