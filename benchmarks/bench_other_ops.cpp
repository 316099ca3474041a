#include "benchmarks/bench_other_ops.h"

#include <fmt/core.h>

#include <numeric>
#include <vector>

#include "benchmarks/measuring.h"
#include "models/step_lists.h"

namespace kava {

namespace {

class OtherOps {
 public:
  OtherOps(Ops& ops, Arena& arena, const Shapes& shapes, const OpMeasure& measure)
      : ops_(ops), arena_(arena), shapes_(shapes), measure_(measure) {}

  void run() {
    ArenaScope scope(arena_);
    layers();
    turns();
    embeddings();
    rows();
    statistics();
    linears();
  }

 private:
  using Set = std::vector<Tensor>;

  Tensor random(DType type, int64_t rows, int64_t cols, double scale = 1) { return random_tensor(ops_, arena_, type, rows, cols, scale); }
  Tensor filled(DType type, int64_t rows, int64_t cols, double value) {
    const Tensor x = arena_.alloc(type, rows, cols);
    ops_.fill(x, value);
    return x;
  }
  Tensor wide() { return random(kBf16, n_, C_); }

  /// On one set of tensors like `first` after the other.
  void in_turn(const std::string& name, double bytes, const Set& first, const std::function<void(const Set&)>& body) {
    ArenaScope scope(arena_);
    std::vector<Set> sets{first};
    while (std::ssize(sets) < measure_.sets_of(bytes)) {
      Set& more = sets.emplace_back();
      for (const Tensor& x : first) ops_.copy(more.emplace_back(arena_.alloc(x.dtype, x.rows, x.cols)), x);
    }
    measure_.in_turn(name, bytes, std::ssize(sets), [&](std::size_t i) { body(sets[i]); });
  }

  void layers() {
    const double width = 2.0 * static_cast<double>(n_ * C_);
    ArenaScope scope(arena_);
    if (measure_.wanted("gelu_bwd"))
      in_turn("gelu_bwd", 3 * width, {wide(), wide(), wide()}, [&](const Set& s) { ops_.gelu_bwd(s[0], s[1], s[2], Gelu::erf); });
    const Tensor w = filled(kBf16, 1, C_, 1);
    if (measure_.wanted("add_layer_norm_fwd"))
      in_turn("add_layer_norm_fwd", 4 * width, {wide(), wide(), filled(kF32, n_, 1, 0), filled(kF32, n_, 1, 0), wide(), wide()},
              [&](const Set& s) { ops_.add_layer_norm_fwd(s[0], s[1], s[2], s[3], s[4], s[5], w, w, 1e-5); });
    if (measure_.wanted("layer_norm_bwd"))
      in_turn("layer_norm_bwd", 4 * width, {wide(), wide(), wide(), filled(kF32, n_, 1, 0), filled(kF32, n_, 1, 1)},
              [&](const Set& s) { ops_.layer_norm_bwd(arena_, s[0], {}, {}, s[1], s[2], s[3], s[4], w); });
  }

  void turns() {
    ArenaScope scope(arena_);
    const Tensor positions = upload_indices(ops_, arena_, std::vector<int32_t>(static_cast<std::size_t>(n_), 5)),
                 w = filled(kBf16, 1, D_, 1);
    const Tensor cosine = random(kF32, 64, D_ / 2), sine = random(kF32, 64, D_ / 2);
    const double queries = 2.0 * static_cast<double>(n_ * H_ * D_), keys = 2.0 * static_cast<double>(n_ * K_ * D_);
    const auto heads = [&] { return random(kBf16, n_, H_ * D_); };
    if (measure_.wanted("norm_rope_fwd"))
      in_turn("norm_rope_fwd", 2 * queries, {heads(), filled(kF32, n_, H_, 0), heads()},
              [&](const Set& s) { ops_.norm_rope_fwd(s[0], s[1], s[2], w, positions, cosine, sine, 1e-6); });
    if (measure_.wanted("norm_rope_bwd"))
      in_turn("norm_rope_bwd", 3 * queries, {heads(), heads(), heads(), filled(kF32, n_, H_, 1)},
              [&](const Set& s) { ops_.norm_rope_bwd(arena_, s[0], {}, s[1], s[2], s[3], w, positions, cosine, sine); });
    if (measure_.wanted("rope_bwd"))
      in_turn("rope_bwd", 2 * queries + 6 * keys,
              {random(kBf16, n_, (H_ + 2 * K_) * D_), random(kF32, n_, K_ * D_), random(kF32, n_, K_ * D_)},
              [&](const Set& s) { ops_.rope_bwd(s[0], s[0].col_range(0, H_ * D_), s[1], s[2], positions, cosine, sine, D_); });
  }

  void embeddings() {
    if (!measure_.wanted("embed_fwd") && !measure_.wanted("embed_bwd")) return;
    ArenaScope scope(arena_);
    std::vector<int32_t> tokens;
    for (int64_t i = 0; i < n_; ++i) tokens.push_back(static_cast<int32_t>(i * 7919 % shapes_.vocab));
    const Tensor ids = upload_indices(ops_, arena_, tokens);
    const double width = 2.0 * static_cast<double>(n_ * C_);
    if (measure_.wanted("embed_fwd")) {
      ArenaScope inner(arena_);
      const Tensor table = random(kBf16, shapes_.vocab, C_);
      in_turn("embed_fwd", 2 * width, {wide()}, [&](const Set& s) { ops_.embed_fwd(s[0], table, {}, ids); });
    }
    if (measure_.wanted("embed_bwd")) {
      const Tensor table = filled(kF32, shapes_.vocab, C_, 0);
      in_turn("embed_bwd", 6 * width, {random(kF32, n_, C_)}, [&](const Set& s) { ops_.embed_bwd(table, {}, s[0], ids); });
    }
  }

  void rows() {
    ArenaScope scope(arena_);
    const double width = 2.0 * static_cast<double>(n_ * C_);
    std::vector<int32_t> turned(static_cast<std::size_t>(n_));
    std::iota(turned.rbegin(), turned.rend(), 0);
    const Tensor order = upload_indices(ops_, arena_, turned);
    if (measure_.wanted("add_rows")) in_turn("add_rows", 3 * width, {wide(), wide()}, [&](const Set& s) { ops_.add(s[0], s[1]); });
    if (measure_.wanted("gather_rows"))
      in_turn("gather_rows", 2 * width, {wide(), wide()}, [&](const Set& s) { ops_.gather_rows(s[0], s[1], order); });
    if (measure_.wanted("scatter_rows"))
      in_turn("scatter_rows", 2 * width, {wide(), wide()}, [&](const Set& s) { ops_.scatter_rows(s[0], s[1], order); });
    if (measure_.wanted("scatter_add_rows"))
      in_turn("scatter_add_rows", 3 * width, {wide(), wide()}, [&](const Set& s) { ops_.scatter_add_rows(s[0], s[1], order); });
  }

  // Of the targets of a layer, four tensors at a time.
  void statistics() {
    if (!measure_.wanted("moments")) return;
    ArenaScope scope(arena_);
    const int64_t B = shapes_.batch, M = 24, width = K_ * D_, tensors = 4;
    const Tensor valid = upload_indices(ops_, arena_, std::vector<int32_t>(static_cast<std::size_t>(B), static_cast<int32_t>(M)));
    const Tensor found = filled(kF32, tensors, 3, 0), inverse = filled(kF32, 1, tensors, 0);
    Set targets;
    while (std::ssize(targets) < tensors) targets.push_back(random(kBf16, B * M, width));
    in_turn("moments, inverse_std", 2.0 * static_cast<double>(tensors * B * M * width), targets, [&](const Set& s) {
      ops_.moments(arena_, found, s, valid);
      ops_.inverse_std(inverse, found);
    });
  }

  void linears() {
    ArenaScope scope(arena_);
    const int64_t R = shapes_.rank, F = shapes_.mlp, V = shapes_.vocab, B = shapes_.batch;
    lora("o", H_ * D_, R);
    lora("down", F, R);
    if (measure_.wanted("linear_group_bwd_params bias")) {
      ArenaScope inner(arena_);
      const int64_t outs = (H_ + 2 * K_) * D_;
      LinearGroup group = LinearGroup::plain(random(kBf16, outs, C_, 0.04));
      group.bias = filled(kBf16, 1, outs, 0);
      LinearGroupGrad grad;
      grad.dbias = filled(kF32, 1, outs, 0);
      const Tensor x = wide();
      in_turn("linear_group_bwd_params bias", 2.0 * static_cast<double>(n_ * outs), {random(kBf16, n_, outs)},
              [&](const Set& s) { ops_.linear_group_bwd_params(arena_, grad, s[0], {}, x, group, {}); });
    }
    if (measure_.wanted("head_argmax")) {
      ArenaScope inner(arena_);
      const Tensor h = random(kBf16, B, C_), w = random(kBf16, V, C_, 0.04), best = arena_.alloc(DType::i32, 1, B);
      measure_.product("head_argmax", 2.0 * static_cast<double>(B * C_ * V), [&] { ops_.head_argmax(arena_, best, h, w); });
    }
  }

  // A map of its own from `in` columns back to the model's width, with LoRA and dropout.
  void lora(const std::string& linear, int64_t in, int64_t R) {
    const std::string what = fmt::format("{}, LoRA {}", linear, R), fwd = "linear_group_fwd " + what,
                      bwd = "linear_group_bwd_input " + what, params = "linear_group_bwd_params " + what,
                      prepare = "linear_prepare " + what;
    if (!measure_.wanted(fwd) && !measure_.wanted(bwd) && !measure_.wanted(params) && !measure_.wanted(prepare)) return;
    ArenaScope scope(arena_);
    const Tensor xx = random(kBf16, n_, in + R), y = wide(), dx = arena_.alloc(kBf16, n_, in), dxa = filled(kBf16, n_, R, 0);
    LinearGroup group{random(kBf16, C_, in + R, 0.04), {}, random(kBf16, R, in, 0.04), {}, in};
    group.parts.push_back({0, C_, 0, R, 0.25, random(kBf16, C_, R, 0.04)});
    LinearGroupGrad grad{.da = filled(kF32, R, in, 0)};
    grad.db.push_back(filled(kF32, C_, R, 0));
    std::vector<int32_t> keys;
    for (int32_t i = 0; i < n_; ++i) keys.push_back(i / 96), keys.push_back(i % 96);
    const Dropout dropout{0.1, 42, 0, 0, upload_indices(ops_, arena_, keys).reshape(n_, 2)};
    const double base = 2.0 * static_cast<double>(n_ * in * C_), low = 2.0 * static_cast<double>(n_ * R * (in + C_));
    in_turn(prepare, 4.0 * static_cast<double>(C_ * R), {}, [&](const Set&) { ops_.linear_prepare(group); });
    measure_.product(fwd, base + low, [&] {
      ops_.lora_fwd(arena_, xx, group, dropout);
      ops_.linear_group_fwd(arena_, y, xx, group);
    });
    measure_.product(bwd, base + low, [&] { ops_.linear_group_bwd_input(arena_, dx, dxa, y, group, dropout); });
    measure_.product(params, low, [&] { ops_.linear_group_bwd_params(arena_, grad, y, dxa, xx, group, dropout); });
  }

  static constexpr DType kBf16 = DType::bf16, kF32 = DType::f32;
  Ops& ops_;
  Arena& arena_;
  const Shapes& shapes_;
  const OpMeasure& measure_;
  const int64_t n_ = shapes_.rows, C_ = shapes_.hidden, H_ = shapes_.heads, K_ = shapes_.kv_heads, D_ = shapes_.head_dim;
};

}  // namespace

void bench_other_ops(Ops& ops, Arena& arena, const Shapes& shapes, const OpMeasure& measure) {
  OtherOps(ops, arena, shapes, measure).run();
}

}  // namespace kava
