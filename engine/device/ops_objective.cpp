// The fronts of the ops of the objective and the update.
#include "engine/device/op_front.h"
#include "kernels/draw.h"

namespace kava {

namespace {
void require_valid(const Tensor& x, const Tensor& valid) {
  require_floating("x", x);
  require_index("valid", valid, valid.cols);
  KAVA_CHECK(valid.cols > 0 ? x.rows % valid.cols == 0 : x.rows == 0, "{} rows in {} groups", x.rows, valid.cols);
}
}  // namespace

// ---- objective

void Ops::head_cross_entropy(Arena& arena, const Tensor& losses, const Tensor& dh, const Tensor& dw, const Tensor& correct,
                             const Tensor& logits, const Tensor& h, const Tensor& w, const Tensor& targets, const Tensor& classes,
                             const Tensor& owners, const std::array<double, 2>& weights) {
  require_floating("h", h);
  const DType sum = sum_type(h.dtype);
  require("losses", losses, 1, 2, DType::f64);
  require("w", w, w.rows, h.cols, h.dtype);
  require_if("dh", dh, h.rows, h.cols, sum);
  require_if("dw", dw, w.rows, w.cols, sum);
  require_if("logits", logits, h.rows, w.rows, sum);
  for (const Tensor& t : {targets, classes}) require_index("targets or classes", t, h.rows);
  if (correct) {
    require_index("correct", correct, correct.cols);
    require_index("owners", owners, h.rows);
  }
  const int products = 1 + (dh ? 1 : 0) + (dw ? 1 : 0);
  call("head_cross_entropy", {losses, dh, dw, correct, logits}, {losses, dw, h, w, targets, classes, owners},
       products * product(h.rows, w.rows, h.cols), [&](Ops& ops, const auto& at) {
         ops.do_head_cross_entropy(at(arena), at(losses), at(dh), at(dw), at(correct), at(logits), at(h), at(w), at(targets), at(classes),
                                   at(owners), weights);
       });
}

void Ops::head_argmax(Arena& arena, const Tensor& best, const Tensor& h, const Tensor& w) {
  require_floating("h", h);
  require("w", w, w.rows, h.cols, h.dtype);
  require_index("best", best, h.rows);
  call("head_argmax", {best}, {h, w}, product(h.rows, w.rows, h.cols),
       [&](Ops& ops, const auto& at) { ops.do_head_argmax(at(arena), at(best), at(h), at(w)); });
}

void Ops::head_draw(Arena& arena, const Tensor& drawn, const Tensor& h, const Tensor& w, const Tensor& numbers, double temperature,
                    double top_p) {
  require_floating("h", h);
  require("w", w, w.rows, h.cols, h.dtype);
  require_index("drawn", drawn, h.rows);
  require_index("numbers", numbers, 2 * h.rows);
  KAVA_CHECK(w.rows <= kMostDrawn && temperature > 0 && top_p > 0, "a draw from {} tokens at temperature {}, top-p {}", w.rows, temperature,
             top_p);
  call("head_draw", {drawn}, {h, w, numbers}, product(h.rows, w.rows, h.cols),
       [&](Ops& ops, const auto& at) { ops.do_head_draw(at(arena), at(drawn), at(h), at(w), at(numbers), temperature, top_p); });
}

void Ops::rkv_select(Arena& arena, const Tensor& target_k, const Tensor& target_v, const Tensor& kept, const Tensor& importance,
                     const Tensor& redundancy, const Tensor& score, const Tensor& q, const Tensor& q_rows, const Tensor& q_offsets,
                     const Tensor& k, const Tensor& v, const Tensor& k_rows, const Tensor& k_offsets, const Tensor& match_k,
                     const RkvOptions& o) {
  KAVA_CHECK(o.kv_heads > 0 && o.heads % o.kv_heads == 0 && o.latents > 0 && k.cols % o.kv_heads == 0,
             "{} heads, {} K/V heads, {} latents, keys of {}", o.heads, o.kv_heads, o.latents, k.cols);
  require_floating("k", k);
  require_index("k_offsets", k_offsets, k_offsets.cols);
  const int64_t samples = k_offsets.cols - 1, tokens = k_rows.cols;
  require_index("q_offsets", q_offsets, samples + 1);
  require_index("q_rows", q_rows, q_rows.cols);
  require_index("k_rows", k_rows, tokens);
  require("q", q, q.rows, k.cols / o.kv_heads * o.heads, k.dtype);
  require("v", v, k.rows, k.cols, k.dtype);
  require_if("match_k", match_k, tokens, k.cols, k.dtype);
  for (const Tensor& t : {target_k, target_v}) require("target_k or target_v", t, samples * o.latents, k.cols, k.dtype);
  require("kept", kept, samples * o.latents, o.kv_heads, DType::i32);
  for (const Tensor& t : {importance, redundancy, score})
    require_if("importance, redundancy or score", t, o.kv_heads, tokens, sum_type(k.dtype));
  if (o.policy == Policy::random) require_index("samples", o.samples, samples);
  call(
      "rkv_select", {target_k, target_v, kept, importance, redundancy, score},
      {q, q_rows, q_offsets, k, v, k_rows, k_offsets, match_k, o.samples}, 0,
      [&](Ops& ops, const auto& at) {
        ops.do_rkv_select(at(arena), at(target_k), at(target_v), at(kept), at(importance), at(redundancy), at(score), at(q), at(q_rows),
                          at(q_offsets), at(k), at(v), at(k_rows), at(k_offsets), at(match_k), at(o));
      },
      beyond(q, q_rows.cols) + 2 * beyond(k, tokens));
}

void Ops::moments(Arena& arena, const Tensor& moments, std::span<const Tensor> xs, const Tensor& valid) {
  KAVA_CHECK(!xs.empty(), "moments of nothing");
  const Tensor& first = xs[0];
  require_valid(first, valid);
  for (const Tensor& x : xs) require("x", x, first.rows, first.cols, first.dtype);
  require("moments", moments, std::ssize(xs), 3, sum_type(first.dtype));
  std::vector<Tensor> inputs(xs.begin(), xs.end());
  inputs.push_back(valid);
  call("moments", std::span(&moments, 1), inputs, 0, [&](Ops& ops, const auto& at) {
    std::vector<Tensor> there;
    for (const Tensor& x : xs) there.push_back(at(x));
    ops.do_moments(at(arena), at(moments), there, at(valid));
  });
}

void Ops::inverse_std(const Tensor& inverse, const Tensor& moments, int power) {
  KAVA_CHECK(power == 1 || power == 2, "a power of {}", power);
  KAVA_CHECK(moments.dtype == DType::f32 || moments.dtype == DType::f64, "moments in {}", name_of(moments.dtype));
  require("moments", moments, moments.rows, 3, moments.dtype);
  require("inverse", inverse, 1, inverse.cols, moments.dtype);
  KAVA_CHECK(inverse.cols > 0 && moments.rows % inverse.cols == 0, "{} moments in {} parts", moments.rows, inverse.cols);
  compute("inverse_std", {inverse}, {moments}, [&](Ops& ops, const auto& at) { ops.do_inverse_std(at(inverse), at(moments), power); });
}

void Ops::distill(Arena& arena, const Tensor& loss, const Tensor& dx, const Tensor& x, const Tensor& target, const Tensor& valid,
                  const Tensor& inverse, Distance distance, double factor, double weight) {
  require_valid(x, valid);
  require("loss", loss, 1, 1, DType::f64);
  require_if("dx", dx, x.rows, x.cols, sum_type(x.dtype));
  require("target", target, x.rows, x.cols, x.dtype);
  require_if("inverse", inverse, 1, 1, sum_type(x.dtype));
  call("distill", {loss, dx}, {loss, x, target, valid, inverse}, 0, [&](Ops& ops, const auto& at) {
    ops.do_distill(at(arena), at(loss), at(dx), at(x), at(target), at(valid), at(inverse), distance, factor, weight);
  });
}

// ---- update

void Ops::sum_squares(Arena& arena, const Tensor& out, const Tensor& x) {
  require_floating("x", x);
  require_contiguous("x", x);
  require("out", out, 1, 1, DType::f64);
  call("sum_squares", {out}, {x}, 0, [&](Ops& ops, const auto& at) { ops.do_sum_squares(at(arena), at(out), at(x)); });
}

void Ops::count_update(const Tensor& updates, const Tensor& grad_square, const Tensor& losses) {
  require_index("updates", updates, 1);
  require("grad_square", grad_square, 1, 1, DType::f64);
  require("losses", losses, 1, losses.cols, DType::f64);
  compute("count_update", {updates, grad_square}, {updates, grad_square, losses},
          [&](Ops& ops, const auto& at) { ops.do_count_update(at(updates), at(grad_square), at(losses)); });
}

void Ops::adamw(const Tensor& value, const Tensor& m, const Tensor& v, const Tensor& half, const Tensor& grad, const Tensor& grad_square,
                const Tensor& updates, const AdamwOptions& options) {
  KAVA_CHECK(value.dtype == DType::f32 || value.dtype == DType::f64, "parameters in {}", name_of(value.dtype));
  for (const Tensor& t : {value, m, v, grad}) require("m, v or grad", t, value.rows, value.cols, value.dtype);
  if (half) {
    require_kin(half, value);
    require("half", half, value.rows, value.cols, half.dtype);
  }
  for (const Tensor& t : {value, m, v, half, grad}) require_contiguous("a parameter's tensor", t);
  require("grad_square", grad_square, 1, 1, DType::f64);
  require_index("updates", updates, 1);
  compute("adamw", {value, m, v, half}, {value, m, v, grad, grad_square, updates}, [&](Ops& ops, const auto& at) {
    ops.do_adamw(at(value), at(m), at(v), at(half), at(grad), at(grad_square), at(updates), options);
  });
}

}  // namespace kava
