// What the means of a step run over, and how the terms and dumps of its forwards come together.
#include <algorithm>

#include "models/kava.h"

namespace kava {

BatchTotals batch_totals(const RunConfig& config, const Recipe& recipe, std::span<const Sample> batch, int64_t micro) {
  BatchTotals t;
  const int64_t size = static_cast<int64_t>(batch.size());
  if (config.loss.mean == LossMean::forward) t.forwards = micro > 0 ? (size + micro - 1) / micro : 1;
  for (const Sample& s : batch) {
    const Cut cut = cut_of(recipe, s, t.samples);
    const Lengths n = lengths_of(recipe, s, cut);
    ++t.samples;
    t.latents = std::max<int64_t>(t.latents, cut.latents), t.iterations = std::max<int64_t>(t.iterations, cut.iterations);
    t.rest += n.rest;
    t.student_tokens += n.student_tail, t.teacher_tokens += n.teacher_tail;
    t.kv_slots += config.rkv.short_ == Short::zero ? n.latents : std::min(static_cast<int64_t>(s.trace.size()), n.latents);
  }
  return t;
}

std::vector<BatchTotals> totals_of_forwards(const RunConfig& config, const Recipe& recipe, const BatchTotals& totals,
                                            std::span<const Sample> batch, int64_t micro) {
  std::vector<BatchTotals> all;
  const std::size_t each = micro > 0 ? static_cast<std::size_t>(micro) : batch.size();
  for (std::size_t first = 0; first < batch.size(); first += each) {
    BatchTotals& t = all.emplace_back(totals);
    if (config.loss.mean == LossMean::batch) continue;
    t.student_tokens = t.teacher_tokens = 0;
    for (std::size_t i = first; i < std::min(batch.size(), first + each); ++i) {
      const Lengths n = lengths_of(recipe, batch[i], static_cast<int64_t>(i));
      t.student_tokens += n.student_tail * totals.forwards, t.teacher_tokens += n.teacher_tail * totals.forwards;
    }
  }
  return all;
}

double StepLosses::total(const RunConfig& c) const {
  return c.loss.student * student_ce + c.loss.teacher * teacher_ce + c.codi.weight * codi + c.kv.weight * kv;
}

StepLosses& StepLosses::operator+=(const StepLosses& o) {
  student_ce += o.student_ce, teacher_ce += o.teacher_ce, kv += o.kv, codi += o.codi;
  forced_correct += o.forced_correct;
  return *this;
}

StepLosses losses_of(std::span<const double> sums, const BatchTotals& totals) {
  StepLosses l;
  if (totals.student_tokens > 0) l.student_ce = sums[kStudentCe] / static_cast<double>(totals.student_tokens);
  if (totals.teacher_tokens > 0) l.teacher_ce = sums[kTeacherCe] / static_cast<double>(totals.teacher_tokens);
  l.kv = sums[kKv], l.codi = sums[kCodi];
  return l;
}

void join(Dump& to, const Dump& next) {
  for (const auto& [name, piece] : next) {
    auto [it, fresh] = to.emplace(name, piece);
    if (fresh) continue;
    DumpTensor& all = it->second;
    const auto axis = static_cast<std::size_t>(piece.axis);
    int64_t outer = 1, inner = 1;
    for (std::size_t i = 0; i < axis; ++i) outer *= piece.shape[i];
    for (std::size_t i = axis + 1; i < piece.shape.size(); ++i) inner *= piece.shape[i];
    auto merge = [&](auto& a, const auto& b) {
      std::remove_reference_t<decltype(a)> joined;
      const int64_t wa = all.shape[axis] * inner, wb = piece.shape[axis] * inner;
      for (int64_t o = 0; o < outer; ++o) {
        joined.insert(joined.end(), a.begin() + o * wa, a.begin() + (o + 1) * wa);
        joined.insert(joined.end(), b.begin() + o * wb, b.begin() + (o + 1) * wb);
      }
      a = std::move(joined);
    };
    if (all.is_index) merge(all.indices, piece.indices);
    else merge(all.values, piece.values);
    all.shape[axis] += piece.shape[axis];
  }
}

}  // namespace kava
