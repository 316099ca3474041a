// L_CODI: the distance of the student's residuals at one token to the teacher's.
#include "engine/device/indices.h"
#include "models/step.h"

namespace kava {

namespace {
constexpr int64_t kSecondDraw = int64_t{1} << 30;  // beyond every index of a batch: the masks of a second forward
}

// The student's token lies in the last pass, the teacher's in pass 0.
void Step::plan_codi(IndexBlock& block) {
  std::vector<int32_t> in_pass;
  for (int32_t r : layout_.codi_student_rows) in_pass.push_back(static_cast<int32_t>(r - layout_.passes.back().begin));
  check_distinct(in_pass, layout_.passes.back().rows());
  check_distinct(layout_.codi_teacher_rows, layout_.passes.front().end);
  block.add(codi_.student, layout_.codi_student_rows);
  block.add(codi_.student_in_pass, in_pass);
  block.add(codi_.student_live, live_of(layout_.codi_student_rows));
  block.add(codi_.student_positions, positions_of(layout_.codi_student_rows));
  block.add(codi_.teacher, layout_.codi_teacher_rows);
  block.add(codi_.teacher_live, live_of(layout_.codi_teacher_rows));
  block.add(codi_.valid, std::vector<int32_t>(static_cast<std::size_t>(B_), 1));
  if (!separate_target()) return;
  Recipe recipe;
  recipe.teacher = true;
  alone_.layout = make_layout(config_, recipe, samples_, options_.first_index + kSecondDraw);
  check_pass(model_, alone_.layout.passes[0]);
  add_pass(block, alone_.pass, alone_.layout.passes[0]);
  check_indices(alone_.layout.codi_teacher_rows, 0, alone_.layout.rows);
  block.add(alone_.rows, alone_.layout.codi_teacher_rows);
  std::vector<int32_t> live;
  for (int32_t row : alone_.layout.codi_teacher_rows) live.push_back(alone_.layout.live_of[static_cast<std::size_t>(row)]);
  check_indices(live, 0, alone_.layout.rows);  // -1 for a row that is not live
  block.add(alone_.live, live);
}

void Step::read_states(std::vector<PassReads>& reads) {
  for (std::vector<Tensor>* all : {&student_states_, &teacher_states_})
    for (std::size_t s = 0; s < embedded() + layer_count(); ++s) all->push_back(arena_.alloc(type_, B_, model_.shape.hidden));
  reads.back().states.push_back({codi_.student_in_pass, after_blocks(student_states_), input_of(student_states_)});
  if (!separate_target()) reads.front().states.push_back({codi_.teacher, after_blocks(teacher_states_), input_of(teacher_states_)});
}

// Only dropout tells a second forward of the teacher from the first.
bool Step::separate_target() const {
  return config_.codi.target == CodiTarget::separate && options_.dropout && config_.train.trainable == Trainable::lora &&
         config_.lora.dropout > 0;
}

// Of a teacher that runs by itself, without gradient and with masks of its own.
void Step::run_separate_target() {
  ArenaScope scope(arena_);
  Transformer teacher(model_, arena_, Keep::nothing, options_.step, true);
  teacher.allocate(alone_.layout.rows, alone_.layout.live_rows, alone_.layout.rows);
  ops_.embed_fwd(teacher.inputs(alone_.pass), model_.embedding, model_.new_tokens, alone_.pass.ids);
  PassReads reads;
  reads.states.push_back({alone_.rows, after_blocks(teacher_states_), input_of(teacher_states_)});
  teacher.forward(alone_.pass, reads);
  ops_.gather_rows(teacher_states_.back(), teacher.all_hidden(), alone_.live);
}

// Of what goes into the first layer: the embedding and, where they are learned, the position.
void Step::input_gradient(const Tensor& d) {
  ops_.scatter_add_rows(transformer_.dinput(), d, codi_.student);
  if (model_.dpositions) ops_.embed_bwd(model_.dpositions, {}, d, codi_.student_positions);
}

void Step::codi_loss(const Tensor& loss) {
  const std::size_t first = embedded(), S = layer_count() + first;
  const int64_t C = model_.shape.hidden;
  const Tensor moments = arena_.alloc(sum_, static_cast<int64_t>(S), 3);
  const std::vector<Tensor>&x = student_states_, &target = teacher_states_;
  ops_.gather_rows(x.back(), transformer_.all_hidden(), codi_.student_live);
  if (separate_target()) run_separate_target();
  else ops_.gather_rows(target.back(), transformer_.all_hidden(), codi_.teacher_live);
  if (config_.codi.std != Std::none) ops_.moments(arena_, moments, target, codi_.valid);
  const int power = config_.codi.loss == Distance::mse ? static_cast<int>(config_.codi.mse_std) : 1;
  const Tensor scale = inverse(config_.codi.std, moments, power);
  const double factor = 1.0 / (static_cast<double>(totals_.samples) * static_cast<double>(C) * static_cast<double>(S));
  for (std::size_t s = 0; s < S; ++s) {
    const Tensor d = arena_.alloc(sum_, B_, C);
    ops_.distill(arena_, loss, d, x[s], target[s], codi_.valid, of_layer(scale, s), config_.codi.loss, factor, config_.codi.weight);
    if (!options_.backward) continue;
    if (s + 1 == S) ops_.scatter_add_rows(transformer_.dhidden(), d, codi_.student_live);
    else if (s < first) input_gradient(d);
    else taps_.push_back({codi_.student_in_pass, d});
  }
  if (options_.dump) dump_codi();
}

}  // namespace kava
