// What must hold between steps: latents against a sequence that grows without a cache, the plain form against sharing and pruning, a sample
// in other company, eviction at its limits, and the same bytes from the same step.
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <functional>
#include <numeric>
#include <set>

#include "models/layout.h"
#include "models/transformer.h"
#include "tests/model/step_rig.h"

using namespace kava;
using namespace kava::test;

namespace {

using Sets = std::vector<std::string>;
using Vector = std::vector<double>;

Sets joined(Sets a, const Sets& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// y = W x + b on the host.
Vector linear(const Vector& w, const Vector& b, const Vector& x) {
  Vector y = b;
  for (std::size_t i = 0; i < y.size(); ++i)
    for (std::size_t j = 0; j < x.size(); ++j) y[i] += w[i * x.size() + j] * x[j];
  return y;
}

// CODI's loop over one sample, written apart: the sequence grows by one latent at a time, everything is run again each time as one causal
// pass of plain embeddings, and the projection is computed here.
class GrowingLoop {
 public:
  GrowingLoop(StepRig& rig, const Sample& s) : rig_(rig), C_(static_cast<std::size_t>(rig.text.shape.hidden)) {
    rig.model->ensure_positions(std::ssize(s.question) + rig.config.latent.count + std::ssize(s.answer) + 2);
    const Vector table = to_host(*rig.ops, rig.model->embedding), new_tokens = rig.value("new_tokens.weight");
    auto row = [&](const Vector& of, int64_t i) { return Vector(of.begin() + i * at(C_), of.begin() + (i + 1) * at(C_)); };
    for (int32_t id : s.question) inputs_.push_back(row(table, id));
    inputs_.push_back(row(new_tokens, 0));
    first_latent_ = inputs_.size();
    for (int64_t i = 0; i < rig.config.latent.count; ++i) {
      run();
      Vector e = project(hidden_.back());
      if (rig.config.latent.update == Update::residual)
        for (std::size_t c = 0; c < C_; ++c) e[c] += inputs_.back()[c];
      inputs_.push_back(e);
    }
    const std::size_t eot = inputs_.size();
    inputs_.push_back(row(new_tokens, 1));
    for (int32_t id : s.answer) inputs_.push_back(row(table, id));
    run();
    const Vector head = to_host(*rig.ops, rig.model->head);
    const Vector zero(static_cast<std::size_t>(rig.text.shape.vocab), 0.0);
    for (std::size_t r = eot; r + 1 < inputs_.size(); ++r) {
      const Vector y = linear(head, zero, hidden_[r]);
      logits.insert(logits.end(), y.begin(), y.end());
    }
  }

  /// Input of latent i.
  const Vector& input(std::size_t i) const { return inputs_[first_latent_ + i]; }
  /// Keys (which = 0) or values of latent i in layer l, [K*D].
  Vector pair(int which, std::size_t l, std::size_t i) const {
    const Vector& x = pairs_[l][which];
    const auto width = static_cast<int64_t>(x.size() / inputs_.size()), from = at(first_latent_ + i) * width;
    return Vector(x.begin() + from, x.begin() + from + width);
  }
  Vector logits;  // of the rows that predict the answer

 private:
  static int64_t at(std::size_t i) { return static_cast<int64_t>(i); }

  void run() {
    Pass p;
    const auto n = static_cast<int32_t>(inputs_.size());
    p.end = p.live_end = n;
    for (int32_t i = 0; i < n; ++i) {
      p.positions.push_back(i);
      p.live.push_back(i);
      p.row_keys.insert(p.row_keys.end(), {0, i});
    }
    p.segments.add({}, 0, n, 0, n);
    p.segments.end_group();
    p.live_segments = p.segments;
    ArenaScope scope(*rig_.arena);
    Transformer transformer(*rig_.model, *rig_.arena, Keep::nothing, 0, false);
    transformer.allocate(n, n, n);
    const DevicePass d = upload_pass(*rig_.ops, *rig_.arena, p);
    Vector flat;
    for (const Vector& x : inputs_) flat.insert(flat.end(), x.begin(), x.end());
    rig_.ops->upload(transformer.inputs(d), flat.data());
    transformer.forward(d);
    const Vector h = to_host(*rig_.ops, transformer.all_hidden());
    hidden_.clear();
    for (std::size_t r = 0; r < inputs_.size(); ++r) hidden_.emplace_back(h.begin() + at(r * C_), h.begin() + at((r + 1) * C_));
    pairs_.clear();
    for (const LayerKept& s : transformer.layers()) pairs_.push_back({to_host(*rig_.ops, s.k), to_host(*rig_.ops, s.v)});
  }

  // Linear, GELU, Linear, LayerNorm.
  Vector project(const Vector& h) const {
    if (!rig_.config.latent.projection) return h;
    auto of = [&](const char* name) { return rig_.value(std::string("latent_projection.") + name); };
    Vector x = linear(of("linear1.weight"), of("linear1.bias"), h);
    for (double& v : x) v = v / 2 * (1 + std::erf(v / std::sqrt(2.0)));
    x = linear(of("linear2.weight"), of("linear2.bias"), x);
    double mean = 0, variance = 0;
    for (double v : x) mean += v / static_cast<double>(C_);
    for (double v : x) variance += (v - mean) * (v - mean) / static_cast<double>(C_);
    const Vector gain = of("norm.weight"), bias = of("norm.bias");
    for (std::size_t c = 0; c < C_; ++c) x[c] = (x[c] - mean) / std::sqrt(variance + 1e-5) * gain[c] + bias[c];
    return x;
  }

  StepRig& rig_;
  std::size_t C_, first_latent_ = 0;
  std::vector<Vector> inputs_, hidden_;
  std::vector<std::array<Vector, 2>> pairs_;
};

// Slots 0..slots-1 of sample b: K and V of pass T, [2, L, slots, K*D].
Vector latent_pairs(const Dump& dump, int64_t b, int64_t slots) {
  Vector out;
  for (const char* name : {"latent.k", "latent.v"}) {
    const DumpTensor& t = dump.at(name);
    const auto& n = t.shape;  // [L, B, K, M, D]
    for (int64_t l = 0; l < n[0]; ++l)
      for (int64_t m = 0; m < slots; ++m)
        for (int64_t k = 0; k < n[2]; ++k) {
          const auto from = t.values.begin() + (((l * n[1] + b) * n[2] + k) * n[3] + m) * n[4];
          out.insert(out.end(), from, from + n[4]);
        }
  }
  return out;
}
Vector latent_pairs(const GrowingLoop& loop, std::size_t layers, std::size_t slots) {
  Vector out;
  for (int which : {0, 1})
    for (std::size_t l = 0; l < layers; ++l)
      for (std::size_t m = 0; m < slots; ++m) {
        const Vector x = loop.pair(which, l, m);
        out.insert(out.end(), x.begin(), x.end());
      }
  return out;
}

// latent.inputs of pass t, sample b, slots first..end-1.
Vector latent_inputs(const Dump& dump, int64_t t, int64_t b, int64_t first, int64_t end) {
  const DumpTensor& x = dump.at("latent.inputs");
  const auto& n = x.shape;  // [T+1, B, M, C]
  const auto row = (t * n[1] + b) * n[2];
  return Vector(x.values.begin() + (row + first) * n[3], x.values.begin() + (row + end) * n[3]);
}

void check_equal(const StepRun& a, const StepRun& b, const std::set<std::string>& but = {}, double limit = 1e-11) {
  const double x[4] = {a.losses.student_ce, a.losses.teacher_ce, a.losses.kv, a.losses.codi};
  const double y[4] = {b.losses.student_ce, b.losses.teacher_ce, b.losses.kv, b.losses.codi};
  for (int i = 0; i < 4; ++i) CHECK(std::abs(x[i] - y[i]) <= 1e-13 * y[i]);
  for (const auto& [name, g] : b.gradients) {
    INFO("gradient of " << name);
    CHECK(relative_error(a.gradients.at(name), g) <= limit);
  }
  REQUIRE(a.dump.size() == b.dump.size());
  for (const auto& [name, t] : b.dump) {
    if (but.contains(name)) continue;
    INFO(name);
    CHECK(a.dump.at(name).shape == t.shape);
    CHECK(a.dump.at(name).indices == t.indices);
    CHECK(relative_error(a.dump.at(name).values, t.values) <= limit);
  }
}

bool same_bytes(const StepRun& a, const StepRun& b) { return a.total == b.total && a.gradients == b.gradients && same(a.dump, b.dump); }

}  // namespace

TEST_CASE("as many passes as latents are CODI's sequential loop") {
  const Sets form = GENERATE(Sets{}, Sets{"step.prefix_sharing=false", "step.prune_latents=false"}, Sets{"latent.update=residual"},
                             Sets{"latent.projection=false"}, Sets{"model.path=../models/qwen2", "step.prune_latents=false"},
                             Sets{"model.path=../models/llama_scaled", "latent.update=residual"});
  CAPTURE(form);
  StepRig rig(joined({"latent.iterations=5"}, form));
  const StepRun step = rig.run();
  int64_t predicted = 0;
  for (std::size_t b = 0; b < rig.samples.size(); ++b) {
    const GrowingLoop loop(rig, rig.samples[b]);
    const auto sample = static_cast<int64_t>(b);
    for (int64_t i = 0; i < 5; ++i) {
      // Pruned, latent i is final from pass i+1 on and not fed again.
      const int64_t pass = rig.config.step.prune_latents ? i + 1 : 5;
      CHECK(relative_error(latent_inputs(step.dump, pass, sample, i, i + 1), loop.input(static_cast<std::size_t>(i))) < 1e-11);
    }
    CHECK(relative_error(latent_pairs(step.dump, sample, 5), latent_pairs(loop, rig.model->layers.size(), 5)) < 1e-11);
    const Vector& all = step.dump.at("logits.student").values;
    CHECK(relative_error(Vector(all.begin() + predicted, all.begin() + predicted + std::ssize(loop.logits)), loop.logits) < 1e-11);
    predicted += std::ssize(loop.logits);
  }
  CHECK(predicted == std::ssize(step.dump.at("logits.student").values));
}

TEST_CASE("with fewer passes than latents the first T slots are those of the sequential loop, and no others") {
  const int64_t T = GENERATE(1, 2, 4);
  const std::string prune = GENERATE("true", "false");
  CAPTURE(T, prune);
  StepRig rig({"latent.iterations=" + std::to_string(T), "step.prune_latents=" + prune});
  const StepRun step = rig.run();
  for (std::size_t b = 0; b < rig.samples.size(); ++b) {
    const GrowingLoop loop(rig, rig.samples[b]);
    const auto sample = static_cast<int64_t>(b);
    CHECK(relative_error(latent_pairs(step.dump, sample, T), latent_pairs(loop, rig.model->layers.size(), static_cast<std::size_t>(T))) <
          1e-11);
    CHECK(relative_error(latent_pairs(step.dump, sample, 5), latent_pairs(loop, rig.model->layers.size(), 5)) > 1e-3);
    if (rig.config.step.prune_latents) continue;
    for (int64_t i = 0; i < 5; ++i) {
      const double error = relative_error(latent_inputs(step.dump, T, sample, i, i + 1), loop.input(static_cast<std::size_t>(i)));
      CHECK((i < T ? error < 1e-11 : error > 1e-3));
    }
  }
}

TEST_CASE("more passes than latents change nothing") {
  const std::string prune = GENERATE("true", "false"), update = GENERATE("replace", "residual");
  CAPTURE(prune, update);
  const Sets sets = {"latent.count=3", "step.prune_latents=" + prune, "latent.update=" + update};
  const StepRun at_m = StepRig(joined(sets, {"latent.iterations=3"})).run(), beyond = StepRig(joined(sets, {"latent.iterations=5"})).run();
  check_equal(beyond, at_m, {"latent.inputs"});
}

TEST_CASE("sharing the question and pruning latents change neither losses nor gradients nor what is matched") {
  const char* T = GENERATE("0", "1", "2", "5");
  const Sets model = GENERATE(Sets{}, Sets{"model.path=../models/qwen2", "kv.keys=pre_rope", "latent.update=residual"},
                              Sets{"train.trainable=all", "rkv.order=score"}, Sets{"method=pccot"});
  CAPTURE(T, model);
  const Sets sets = joined(model, {std::string("latent.iterations=") + T});
  const StepRun plain = StepRig(joined(sets, {"step.prefix_sharing=false", "step.prune_latents=false"})).run();
  for (const Sets& form : {Sets{}, Sets{"step.prefix_sharing=false"}, Sets{"step.prune_latents=false"}}) {
    CAPTURE(form);
    StepRig rig(joined(sets, form));
    const StepRun run = rig.run();
    check_equal(run, plain, {"latent.inputs"});
    // Pruned rows are zero, the others those of the plain form.
    const Vector &x = run.dump.at("latent.inputs").values, &y = plain.dump.at("latent.inputs").values;
    REQUIRE(x.size() == y.size());
    const auto C = static_cast<std::size_t>(rig.text.shape.hidden);
    std::size_t computed = 0;
    for (std::size_t r = 0; r < x.size(); r += C) {
      const auto from = static_cast<int64_t>(r), end = static_cast<int64_t>(r + C);
      const Vector row(x.begin() + from, x.begin() + end);
      if (norm(row) == 0) continue;
      ++computed;
      CHECK(relative_error(row, Vector(y.begin() + from, y.begin() + end)) < 1e-11);
    }
    const int64_t t = rig.config.latent.iterations, M = 5;
    int64_t rows = (t + 1) * M;
    // Reachability leaves t fewer in pass 0, t-1 in pass 1 ..., and latent j is final from pass j+1 on.
    if (rig.config.step.prune_latents) rows -= t * (t + 1) / 2 + t * (t - 1) / 2;
    CHECK(static_cast<int64_t>(computed) == rows * std::ssize(rig.samples));
  }
}

TEST_CASE("what is computed for a sample is the same bytes whatever else is in the batch and in whatever order") {
  const std::string dtype = GENERATE("model.dtype=f64", "model.dtype=f32", "model.dtype=bf16");
  const Sets more = GENERATE(Sets{}, Sets{"rkv.policy=random", "kv.projection=true"}, Sets{"method=full_cot"}, Sets{"method=no_cot"});
  CAPTURE(dtype, more);
  StepRig rig(joined({dtype, "lora.dropout=0.3"}, more), 2);
  StepOptions options;
  options.step = 3;
  auto dump_of = [&](std::span<const Sample> batch, int64_t first, bool dropout) {
    options.first_index = first, options.dropout = dropout;
    return rig.run(batch, options).dump;
  };
  const std::span<const Sample> all = rig.samples;
  // With dropout, and where numbers are drawn, the place in the batch is a coordinate of the numbers.
  const Dump whole = dump_of(all, 0, true);
  Dump alone;
  for (std::size_t b = 0; b < all.size(); ++b) join(alone, dump_of(all.subspan(b, 1), static_cast<int64_t>(b), true));
  CHECK(same(alone, whole));
  if (rig.config.rkv.policy == Policy::random) return;
  std::vector<Sample> reversed(rig.samples.rbegin(), rig.samples.rend());
  Dump backwards;
  for (const Sample& s : reversed) join(backwards, dump_of({&s, 1}, 0, false));
  CHECK(same(backwards, dump_of(reversed, 0, false)));
  CHECK_FALSE(same(alone, dump_of(all, 0, false)));
}

TEST_CASE("a batch cut into forwards has the gradients of the whole, with the same dropout masks") {
  const char* dropout = GENERATE("0.0", "0.3");
  CAPTURE(dropout);
  StepRig rig({"kv.std=none", "codi.std=none", std::string("lora.dropout=") + dropout});
  const BatchTotals totals = batch_totals(rig.config, recipe_of(rig.config), rig.samples);
  const StepRun whole = rig.run();
  for (const std::vector<std::size_t>& cut : {std::vector<std::size_t>{2, 3}, {1, 1, 1, 1, 1}, {4, 1}}) {
    StepRun sum;
    std::size_t first = 0;
    REQUIRE(std::accumulate(cut.begin(), cut.end(), std::size_t{0}) == rig.samples.size());
    for (std::size_t n : cut) {
      StepOptions options;
      options.first_index = static_cast<int64_t>(first);
      const StepRun part = rig.run(std::span(rig.samples).subspan(first, n), totals, options);
      first += n;
      sum.losses += part.losses;
      join(sum.dump, part.dump);
      for (const auto& [name, g] : part.gradients) {
        Vector& to = sum.gradients[name];
        to.resize(g.size());
        for (std::size_t i = 0; i < g.size(); ++i) to[i] += g[i];
      }
    }
    check_equal(sum, whole);
  }
  if (dropout == std::string("0.0")) return;
  StepOptions other;
  other.step = 1;
  CHECK(std::abs(rig.run(rig.samples, other).total - whole.total) > 1e-6);
}

TEST_CASE("lambda 0 and 1 are the policies cosine and attention") {
  for (const auto& [lambda, policy, part] :
       {std::array{"0.0", "cosine", "rkv.redundancy"}, std::array{"1.0", "attention", "rkv.importance"}}) {
    INFO(policy);
    const StepRun limit = StepRig({std::string("rkv.lambda=") + lambda}).run(),
                  named = StepRig({std::string("rkv.policy=") + policy}).run();
    CHECK(same_bytes(limit, named));
    CHECK(limit.dump.at("rkv.score").values == limit.dump.at(part).values);
    CHECK(limit.dump.at("rkv.kept").indices != StepRig(Sets{}).run().dump.at("rkv.kept").indices);
  }
}

TEST_CASE("the M best trace tokens are kept in their order, and all of a short trace") {
  const std::string order = GENERATE("time", "score"), policy = GENERATE("rkv", "cosine", "attention");
  CAPTURE(order, policy);
  StepRig rig({"rkv.order=" + order, "rkv.policy=" + policy});
  const StepRun run = rig.run();
  const DumpTensor &score = run.dump.at("rkv.score"), &kept = run.dump.at("rkv.kept"), &k = run.dump.at("target.k"),
                   &v = run.dump.at("target.v");
  const int64_t L = kept.shape[1], K = kept.shape[2], M = kept.shape[3], B = kept.shape[0], D = k.shape[4], tokens = score.shape[2];
  int64_t begin = 0;
  for (int64_t b = 0; b < B; ++b) {
    const auto n = std::ssize(rig.samples[static_cast<std::size_t>(b)].trace);
    for (int64_t l = 0; l < L; ++l)
      for (int64_t h = 0; h < K; ++h) {
        const double* s = score.values.data() + (l * K + h) * tokens + begin;
        std::vector<int32_t> best(static_cast<std::size_t>(n));
        std::iota(best.begin(), best.end(), 0);
        std::ranges::stable_sort(best, [&](int32_t i, int32_t j) { return s[i] > s[j]; });
        best.resize(static_cast<std::size_t>(std::min(n, M)));
        if (order == "time") std::ranges::sort(best);
        best.resize(static_cast<std::size_t>(M), -1);
        const int32_t* found = kept.indices.data() + ((b * L + l) * K + h) * M;
        CHECK(std::vector<int32_t>(found, found + M) == best);
        for (int64_t m = 0; m < M; ++m)
          for (int64_t d = 0; d < D; ++d) {
            const auto at = static_cast<std::size_t>((((l * B + b) * K + h) * M + m) * D + d);
            CHECK((k.values[at] == 0 && v.values[at] == 0) == (m >= n));
          }
      }
    begin += n;
  }
  CHECK(begin == tokens);
}

TEST_CASE("a batch without any trace has no KV loss and finite gradients") {
  const Sets more = GENERATE(Sets{}, Sets{"rkv.short=zero"}, Sets{"kv.std=global"}, Sets{"codi.std=global", "kv.projection=true"});
  CAPTURE(more);
  StepRig rig(more);
  std::vector<Sample> empty = rig.samples;
  for (Sample& s : empty) s.trace.clear();
  for (std::size_t n : {std::size_t{1}, std::size_t{3}}) {
    const StepRun run = rig.run(std::span(empty).first(n));
    CHECK(run.losses.kv == 0);
    CHECK(run.losses.codi > 0);
    for (const auto& [name, g] : run.gradients) {
      INFO(name);
      CHECK(std::isfinite(norm(g)));
      CHECK((norm(g) > 0) == !name.starts_with("kv_projection."));
    }
  }
}

TEST_CASE("empty slots do not enter the KV loss, or enter it as zeros") {
  // Rows without a trace change no term of the masked loss. Where empty slots are zeros and nothing is divided, they add the student's own.
  const Sets plain = {"kv.std=none", "kv.loss=mse"};
  StepRig masked(plain), zero(joined(plain, {"rkv.short=zero"}));
  std::vector<Sample> with_trace;
  for (const Sample& s : masked.samples)
    if (!s.trace.empty()) with_trace.push_back(s);
  CHECK(masked.run().losses.kv == masked.run(with_trace).losses.kv);
  CHECK(zero.run().losses.kv != zero.run(with_trace).losses.kv);
  std::vector<Sample> empty = {masked.samples[1]};
  REQUIRE(empty[0].trace.empty());
  const StepRun run = zero.run(empty);
  double square = 0;
  for (const char* name : {"latent.k", "latent.v"})
    for (double x : run.dump.at(name).values) square += x * x;
  CHECK(std::abs(run.losses.kv - square / 2 / static_cast<double>(run.dump.at("latent.k").values.size())) <= 1e-13);
}

TEST_CASE("a step gives the same bytes twice and with any number of threads") {
  const std::string dtype = GENERATE("model.dtype=f32", "model.dtype=bf16");
  const Sets more = GENERATE(Sets{"lora.dropout=0.3", "rkv.policy=random"}, Sets{"train.trainable=all"});
  CAPTURE(dtype, more);
  TempFolder folder;
  write_random_model(folder);
  const Sets sets = random_model(folder, joined({dtype, "lora.rank=8"}, more));
  StepRig first(sets, 1, 0.05);
  std::vector<Sample> samples;  // more rows than one tile of a product or one piece of a sum
  for (int i = 0; i < 6; ++i) samples.insert(samples.end(), first.samples.begin(), first.samples.end());
  const StepRun run = first.run(samples);
  CHECK(std::isfinite(run.total));
  CHECK(same_bytes(run, first.run(samples)));
  for (int threads : {2, 3}) CHECK(same_bytes(run, StepRig(sets, threads, 0.05).run(samples)));
}

TEST_CASE("bf16 is as near to f64 as its rounding") {
  // Each stored tensor adds a relative error of at most u = 2^-8, half of it on average and of random sign: after the n tensors on the
  // longest way through a step some sqrt(n) u. A layer stores about 12 on its way, in each of the T + 1 passes.
  const Sets sets =
      GENERATE(Sets{"rkv.policy=crop"}, Sets{"rkv.policy=crop", "train.trainable=all"}, Sets{"method=full_cot"}, Sets{"method=no_cot"});
  CAPTURE(sets);
  TempFolder folder;
  write_random_model(folder);
  StepRig exact(random_model(folder, joined({"lora.rank=8"}, sets)), 1, 0.05);
  StepRig rounded(random_model(folder, joined({"lora.rank=8", "model.dtype=bf16"}, sets)), 1, 0.05);
  const StepRun a = rounded.run(), b = exact.run();
  const int64_t passes = recipe_of(exact.config).markers ? exact.config.latent.iterations + 1 : 1;
  const double bound = std::sqrt(static_cast<double>(passes * exact.text.shape.layers * 12)) / 256;
  const double x[4] = {a.losses.student_ce, a.losses.teacher_ce, a.losses.kv, a.losses.codi};
  const double y[4] = {b.losses.student_ce, b.losses.teacher_ce, b.losses.kv, b.losses.codi};
  for (int i = 0; i < 4; ++i) CHECK(std::abs(x[i] - y[i]) <= bound * y[i]);
  CHECK(a.total != b.total);
  for (const auto& [name, g] : b.gradients) {
    const Vector& f = a.gradients.at(name);
    double product = 0;
    for (std::size_t i = 0; i < g.size(); ++i) product += f[i] * g[i];
    INFO(name);
    CHECK(product > 0.99 * norm(f) * norm(g));
  }
}

TEST_CASE("a step whose lists lead outside is refused before a device reads them") {
  for (const char* method : {"method=kava", "method=full_cot", "method=no_cot"})
    for (int list = 0; list < 2; ++list) {
      StepRig rig({method});
      CHECK_NOTHROW(rig.run());
      (list == 0 ? rig.samples[0].question : rig.samples[0].answer)[0] = static_cast<int32_t>(rig.model->shape.vocab);
      CHECK_THROWS_AS(rig.run(), Error);
    }
  StepRig rig({});
  rig.run();  // makes room for its positions
  const Pass good = make_layout(rig.config, recipe_of(rig.config), rig.samples, 0).passes[0];
  CHECK_NOTHROW(check_pass(*rig.model, good));
  Arena arena(*rig.ops);
  CHECK_NOTHROW(upload_pass(*rig.ops, arena, good));
  const std::function<void(Pass&)> faults[] = {[](Pass& p) { p.segments.keys[0] = static_cast<int32_t>(p.end); },
                                               [](Pass& p) { p.segments.key_offsets.back() += 1; },
                                               [](Pass& p) { p.segments.group_offsets.back() += 1; }};
  for (const auto& fault : faults) {
    Pass wrong = good;
    fault(wrong);
    CHECK_THROWS_AS(upload_pass(*rig.ops, arena, wrong), Error);
  }
}
