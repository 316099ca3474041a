// kava_bench: the ops and the whole step of a backend against what the machine can do, measured in the same run.
#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <optional>

#include "benchmarks/bench_comm.h"
#include "benchmarks/bench_other_ops.h"
#include "benchmarks/bench_results.h"
#include "benchmarks/bench_rivals.h"
#include "benchmarks/bench_shapes.h"
#include "benchmarks/bench_step.h"
#include "benchmarks/bench_tokenizer.h"
#include "benchmarks/kernel_counts.h"
#include "benchmarks/measuring.h"
#include "engine/device/cuda_module.h"
#include "engine/device/host.h"
#include "engine/files/files.h"
#include "engine/files/json.h"
#include "engine/text/split_pattern.h"
#include "kernels/gpu_error.h"
#include "models/kava.h"
#include "tools/choice_option.h"
#include "tools/command.h"
#include "tools/device.h"
#include "tools/ranks.h"

namespace kava {

namespace {

class Bench {
 public:
  /// given: the filter is not empty; models: sizes of the steps that compare architectures; counts: by which ops are counted, null: timed.
  Bench(Ops& ops, const SplitPattern& filter, bool given, Recompute recompute, const Shapes& shapes, const Shapes& models,
        KernelCounts* counts)
      : ops_(ops), filter_(filter), given_(given), recompute_(recompute), shapes_(shapes), models_(models), counts_(counts) {
    found_.multiplier = ops.name() == "cpu" ? "oneDNN" : cuda_inside(ops).cublaslt ? "cuBLASLt" : "own kernel";
  }

  bool wanted(const std::string& name) const { return finds(filter_, name) && (any_ = true); }

  /// save: called where some of the results are there, so that a fault that ends the process leaves them.
  void run(const std::function<void()>& save = [] {}) {
    if (counts_) counts_->begin(shapes_.name);
    else measure_ceilings();
    rows();
    products();
    attention_ops();
    counts_ ? decoding(2, 300) : (decoding(128, 300), decoding(1, 8192));
    objective_ops();
    if (counts_) return;
    other_ops();
    save();
    // Another library's fault may end a device's use, and a device that has no room for the step has some for the rest.
    std::exception_ptr no_room;
    try {
      if (wanted("step")) step();
    } catch (const Error& e) {
      if (e.code() != Exit::preflight) throw;
      no_room = std::current_exception();
    } catch (const GpuError& e) {
      if (e.failure() != GpuFailure::memory) throw;
      no_room = std::current_exception();
    }
    save();
    if (ops_.name() != "cpu") measure_rivals();
    save();
    if (no_room) std::rethrow_exception(no_room);
    // Comparisons take minutes: only where they are asked for.
    if (asked("method", method_cases(shapes_))) methods();
    if (asked("model", model_cases(models_))) architectures();
    save();
    if (wanted("comm")) comm();
  }

  const BenchResults& found() const { return found_; }
  const Rivals& rivals() const { return rivals_; }
  bool any() const { return any_; }  // whether the filter found something

 private:
  Tensor tensor(DType t, int64_t rows, int64_t cols, double scale = 1) {
    return counts_ ? arena_.alloc(t, rows, cols) : random_tensor(ops_, arena_, t, rows, cols, scale);  // counts go by no value
  }

  // The same numbers once more: random ones take the host long.
  Tensor copies(const Tensor& x) {
    const Tensor y = arena_.alloc(x.dtype, x.rows, x.cols);
    if (!counts_) ops_.copy(y, x);
    return y;
  }

  Tensor scalars(int64_t n) {
    const Tensor x = arena_.alloc(DType::f64, 1, n);
    ops_.fill(x, 0);
    return x;
  }

  void record(const std::string& name, double amount, bool is_flops, const std::function<void()>& body) {
    if (!wanted(name)) return;
    if (counts_) return counts_->count(ops_, name, is_flops ? amount / kMmaFlops : 0, body);
    report(name, time_of(ops_, body), amount, is_flops ? "GFLOP/s" : "GB/s", is_flops ? found_.matrix_rate : found_.copy_rate);
  }

  void report(const std::string& name, double s, double amount, const char* unit, double ceiling) {
    const double rate = amount / s / 1e9;
    found_.rows.push_back({name, s, amount, unit, ceiling});
    fmt::print("{:<40} {:>10.3f} ms {:>9.1f} {:<8} {:>5.1f} %\n", name, s * 1e3, rate, unit, 100 * rate / ceiling);
  }

  // The best rate seen of a large plain product of this backend, forward or backward: cuBLASLt's algorithm is chosen for these rows
  // backward alone. On a GPU a product of 8192^3, over and over for 5 s before it counts.
  void measure_matrix_rate() {
    ArenaScope scope(arena_);
    const int64_t n = side_, m = n >= 8192 ? n : 2 * n;
    const Tensor x = tensor(DType::bf16, m, n), w = tensor(DType::bf16, n, n), y = arena_.alloc(DType::bf16, m, n);
    const LinearGroup linear = LinearGroup::plain(w);
    const auto forward = [&] { ops_.linear_group_fwd(arena_, y, x, linear); };
    const auto backward = [&] { ops_.linear_group_bwd_input(arena_, y, {}, x, linear, {}); };
    if (ops_.name() == "cuda")
      for (const auto start = std::chrono::steady_clock::now(); seconds_since(start) < 5; ops_.finish())
        for (int i = 0; i < 20; ++i) forward();
    for (int i = 0; i < 3; ++i)
      for (const double seconds : {time_of(ops_, forward), time_of(ops_, backward)})
        found_.matrix_rate = std::max(found_.matrix_rate, 2.0 * static_cast<double>(m * n * n) / seconds / 1e9);
  }

  // And the rate of a copy that no cache holds.
  void measure_ceilings() {
    measure_matrix_rate();
    ArenaScope scope(arena_);
    const int64_t n = shapes_.copied;
    const Tensor a = arena_.alloc(DType::f32, n / 4096, 1024), b = arena_.alloc(DType::f32, n / 4096, 1024);
    ops_.fill(a, 1);
    ops_.fill(b, 1);
    found_.copy_rate = 2.0 * static_cast<double>(n) / time_of(ops_, [&] { ops_.copy(b, a); }) / 1e9;
    fmt::print("{:<40} {:>10} {:>12.1f} GFLOP/s\n{:<40} {:>10} {:>12.1f} GB/s\n",
               fmt::format("matrix rate ({}, {}x{}x{})", found_.multiplier, side_ >= 8192 ? side_ : 2 * side_, side_, side_), "",
               found_.matrix_rate, fmt::format("copy rate ({} {}, read and written)", n >> 20 ? n >> 20 : n >> 10, n >> 20 ? "MiB" : "KiB"),
               "", found_.copy_rate);
  }

  // At the rows of a pass, and on a device, whose cache may hold these, at those of the head.
  void rows() {
    rows_of(kRows, "");
    if (cold_) rows_of(shapes_.head_rows, fmt::format(", {} rows", shapes_.head_rows));
  }

  // An op that memory bounds. On a device: on so many sets of tensors in turn, beside a copy of the same bytes in the same way.
  void in_turn(const std::string& name, double bytes, int64_t sets, const std::function<void(std::size_t)>& body) {
    if (!wanted(name)) return;
    if (counts_) return counts_->count(ops_, name, 0, [&] { body(0); });
    std::size_t i = 0;
    const double seconds = time_of(ops_, [&] { body(i++ % static_cast<std::size_t>(sets)); });
    report(name, seconds, bytes, "GB/s", cold_ ? copy_rate_of(bytes) : found_.copy_rate);
  }

  // How many sets no cache holds together.
  int64_t sets_of(double bytes) const {
    return !cold_ ? 1 : std::max<int64_t>(1, std::llround(std::ceil(static_cast<double>(shapes_.copied) / bytes)));
  }

  // Of a copy that reads and writes so many bytes together, GB/s.
  double copy_rate_of(double bytes) {
    ArenaScope scope(arena_);
    const int64_t rows = std::max<int64_t>(1, std::llround(bytes / 8 / 64)), sets = sets_of(bytes);
    const Tensor from = arena_.alloc(DType::f32, sets * rows, 64), to = arena_.alloc(DType::f32, sets * rows, 64);
    ops_.fill(from, 1);
    ops_.fill(to, 1);
    int64_t i = 0;
    const double seconds = time_of(ops_, [&] {
      const int64_t begin = i++ % sets * rows;
      ops_.copy(to.row_range(begin, begin + rows), from.row_range(begin, begin + rows));
    });
    return 8.0 * 64 * static_cast<double>(rows) / seconds / 1e9;
  }

  void rows_of(int64_t n, const std::string& at) {
    const DType t = DType::bf16;
    const double width = 2.0 * static_cast<double>(n * C), wide = 2.0 * static_cast<double>(n * F);
    struct Norm {
      Tensor x, b, y, sum, rstd;
    };
    if (wanted("add_rms_norm_fwd" + at) || wanted("rms_norm_bwd" + at) || wanted("gelu_fwd" + at)) {
      ArenaScope scope(arena_);
      const Tensor x = tensor(t, n, C), w = tensor(t, 1, C);
      const int64_t sets = sets_of(4 * width);
      std::vector<Norm> s;
      for (int64_t i = 0; i < sets; ++i)
        s.push_back({copies(x), copies(x), arena_.alloc(t, n, C), arena_.alloc(t, n, C), arena_.alloc(DType::f32, n, 1)});
      in_turn("add_rms_norm_fwd" + at, 4 * width, sets,
              [&](std::size_t i) { ops_.add_rms_norm_fwd(s[i].y, s[i].sum, s[i].rstd, s[i].x, s[i].b, w, 1e-5); });
      for (const Norm& each : s) ops_.fill(each.y, 0), ops_.fill(each.rstd, 1);
      in_turn("rms_norm_bwd" + at, 4 * width, sets,
              [&](std::size_t i) { ops_.rms_norm_bwd(arena_, s[i].y, {}, s[i].b, s[i].x, s[i].rstd, w); });
      in_turn("gelu_fwd" + at, 2 * width, sets, [&](std::size_t i) { ops_.gelu_fwd(s[i].y, s[i].x, Gelu::erf); });
    }
    struct Gated {
      Tensor gate, up, act, dgate;
    };
    if (wanted("swiglu_fwd" + at) || wanted("swiglu_bwd" + at)) {
      ArenaScope scope(arena_);
      const Tensor gate = tensor(t, n, F);
      const int64_t sets = sets_of(3 * wide);
      std::vector<Gated> s;
      for (int64_t i = 0; i < sets; ++i) s.push_back({copies(gate), copies(gate), arena_.alloc(t, n, F), arena_.alloc(t, n, F)});
      in_turn("swiglu_fwd" + at, 3 * wide, sets, [&](std::size_t i) { ops_.swiglu_fwd(s[i].act, s[i].gate, s[i].up); });
      in_turn("swiglu_bwd" + at, 5 * wide, sets,
              [&](std::size_t i) { ops_.swiglu_bwd(s[i].dgate, s[i].act, s[i].up, s[i].gate, s[i].up); });
    }
  }

  void products() {
    ArenaScope scope(arena_);
    const DType t = DType::bf16;
    const int64_t R = shapes_.rank;
    const int64_t outs = H * D + 2 * K * D, ranks = 3 * R;
    const Tensor xx = tensor(t, kRows, C + ranks), qkv = arena_.alloc(t, kRows, outs), dxa = arena_.alloc(t, kRows, ranks),
                 dx = arena_.alloc(t, kRows, C);
    LinearGroup group{tensor(t, outs, C + ranks, 0.04), {}, tensor(t, ranks, C, 0.04), {}, C};
    LinearGroupGrad grad{.da = tensor(DType::f32, ranks, C)};
    for (int64_t out : {H * D, K * D, K * D}) {
      const int64_t begin = group.parts.empty() ? 0 : group.parts.back().out_begin + group.parts.back().outs;
      group.parts.push_back({begin, out, R * static_cast<int64_t>(group.parts.size()), R, 0.25, tensor(t, out, R, 0.04)});
      grad.db.push_back(tensor(DType::f32, out, R));
    }
    ops_.linear_prepare(group);
    std::vector<int32_t> keys;
    for (int32_t i = 0; i < kRows; ++i) keys.push_back(i / 96), keys.push_back(i % 96);
    Dropout dropout{0.1, 42, 0, 0, upload_indices(ops_, arena_, keys).reshape(kRows, 2)};
    const double base = 2.0 * static_cast<double>(kRows * C * outs), lora = 2.0 * static_cast<double>(kRows * R * (3 * C + outs));
    record("linear_group_fwd qkv, LoRA 128", base + lora, true, [&] {
      ops_.lora_fwd(arena_, xx, group, dropout);
      ops_.linear_group_fwd(arena_, qkv, xx, group);
    });
    record("linear_group_bwd_input qkv, LoRA 128", base + lora, true,
           [&] { ops_.linear_group_bwd_input(arena_, dx, dxa, qkv, group, dropout); });
    record("linear_group_bwd_params qkv, LoRA 128", lora, true,
           [&] { ops_.linear_group_bwd_params(arena_, grad, qkv, dxa, xx, group, dropout); });
    const Tensor gate_up = arena_.alloc(t, kRows, 2 * F), x = tensor(t, kRows, C);
    const LinearGroup mlp = LinearGroup::plain(tensor(t, 2 * F, C, 0.04));
    record("linear_group_fwd gate, up", 4.0 * static_cast<double>(kRows * C * F), true,
           [&] { ops_.linear_group_fwd(arena_, gate_up, x, mlp); });
    record("linear_group_bwd_input gate, up", 4.0 * static_cast<double>(kRows * C * F), true,
           [&] { ops_.linear_group_bwd_input(arena_, dx, {}, gate_up, mlp, {}); });
  }

  // Samples of 70 queries on themselves, as the first pass has them.
  void attention_ops() {
    if (!wanted("attention_fwd") && !wanted("attention_bwd") && !wanted("rope")) return;
    ArenaScope scope(arena_);
    const DType t = DType::bf16;
    const int32_t length = 70, count = std::max(1, static_cast<int32_t>(kRows / length));
    int64_t n = int64_t{length} * count;
    SegmentList list;
    for (int32_t s = 0; s < count; ++s) {
      list.add({}, s * length, length, s * length, length);
      list.end_group();
    }
    const double pairs = count * 0.5 * length * (length + 1), scale = 0.125;
    double forward = 4.0 * pairs * static_cast<double>(H * D), backward = 2.5 * forward;
    if (counts_) {
      CountedAttention counted(H, K, D);
      list = counted.segments, n = counted.rows, forward = counted.fewest_forward * kMmaFlops,
      backward = counted.fewest_backward * kMmaFlops;
    }
    Pass pass;
    pass.end = n;
    pass.segments = list;
    pass.positions.assign(static_cast<std::size_t>(n), 5);
    pass.row_keys.assign(static_cast<std::size_t>(2 * n), 0);
    const DevicePass device = upload_pass(ops_, arena_, pass);
    const Tensor q = tensor(t, n, H * D), k = tensor(t, n, K * D), v = tensor(t, n, K * D), o = arena_.alloc(t, n, H * D),
                 lse = arena_.alloc(DType::f32, n, H);
    const Tensor dq = arena_.alloc(t, n, H * D), dk = tensor(DType::f32, n, K * D), dv = tensor(DType::f32, n, K * D),
                 g = tensor(t, n, H * D);
    record("attention_fwd", forward, true, [&] { ops_.attention_fwd(arena_, o, lse, q, k, v, device.segments, H, K, scale); });
    record("attention_bwd", backward, true,
           [&] { ops_.attention_bwd(arena_, dq, dk, dv, g, o, lse, q, k, v, device.segments, H, K, scale); });
    const Tensor cosine = tensor(DType::f32, 64, D / 2), sine = tensor(DType::f32, 64, D / 2);
    const double turned = 4.0 * static_cast<double>(n * H * D);
    std::vector<Tensor> turns;
    while (std::ssize(turns) < sets_of(turned)) turns.push_back(copies(q));
    in_turn("rope", turned, std::ssize(turns), [&](std::size_t i) { ops_.rope_fwd(turns[i], device.positions, cosine, sine, D, false); });
  }

  // Attention of the next token of so many answers, each on as many keys; the keys and values are read once.
  void decoding(int32_t answers, int32_t keys) {
    const std::string name = fmt::format("attention_fwd decoding, {} on {} keys", answers, keys);
    if (!wanted(name)) return;
    ArenaScope scope(arena_);
    const DType t = DType::bf16;
    Pass pass;
    pass.end = int64_t{answers} * keys, pass.begin = pass.end - answers;
    for (int32_t a = 0; a < answers; ++a) {
      std::vector<int32_t> before(static_cast<std::size_t>(keys - 1));
      std::iota(before.begin(), before.end(), a * (keys - 1));
      pass.segments.add(before, static_cast<int32_t>(pass.begin) + a, 1, a, 1);
      pass.segments.end_group();
    }
    pass.positions.assign(static_cast<std::size_t>(answers), 5);
    pass.row_keys.assign(static_cast<std::size_t>(2 * answers), 0);
    const DevicePass device = upload_pass(ops_, arena_, pass);
    const double bytes = 4.0 * static_cast<double>(pass.end * K * D);
    const Tensor q = tensor(t, answers, H * D), o = arena_.alloc(t, answers, H * D), lse = arena_.alloc(DType::f32, answers, H);
    std::vector<std::pair<Tensor, Tensor>> caches{{tensor(t, pass.end, K * D), tensor(t, pass.end, K * D)}};
    while (std::ssize(caches) < sets_of(bytes)) caches.emplace_back(copies(caches[0].first), copies(caches[0].second));
    in_turn(name, bytes, std::ssize(caches),
            [&](std::size_t i) { ops_.attention_fwd(arena_, o, lse, q, caches[i].first, caches[i].second, device.segments, H, K, 0.125); });
  }

  void objective_ops() {
    ArenaScope scope(arena_);
    const DType t = DType::bf16;
    const int64_t n = shapes_.head_rows;
    if (wanted("head_cross_entropy")) {
      const Tensor h = tensor(t, n, C), w = tensor(t, V, C, 0.04), dh = arena_.alloc(DType::f32, n, C);
      const Tensor targets = upload_indices(ops_, arena_, std::vector<int32_t>(static_cast<std::size_t>(n), 7)),
                   classes = upload_indices(ops_, arena_, std::vector<int32_t>(static_cast<std::size_t>(n), 0)), losses = scalars(2);
      record("head_cross_entropy", 4.0 * static_cast<double>(n * C * V), true, [&] {
        ops_.head_cross_entropy(arena_, losses, dh, {}, {}, {}, h, w, targets, classes, {}, {1.0 / static_cast<double>(n), 0});
      });
    }
    const int64_t B = shapes_.batch, M = 24, trace = 13, answers = 6;
    if (wanted("head_draw")) {
      const Tensor h = tensor(t, B, C), w = tensor(t, V, C, 0.04), drawn = arena_.alloc(DType::i32, 1, B);
      const Tensor numbers = upload_indices(ops_, arena_, std::vector<int32_t>(static_cast<std::size_t>(2 * B), 1 << 30));
      record("head_draw", 2.0 * static_cast<double>(B * C * V), true, [&] { ops_.head_draw(arena_, drawn, h, w, numbers, 0.7, 0.95); });
    }
    std::vector<int32_t> q_offsets{0}, k_offsets{0}, valid, samples, q_rows(static_cast<std::size_t>(B * answers)),
        k_rows(static_cast<std::size_t>(B * trace));
    std::iota(q_rows.begin(), q_rows.end(), 0);
    std::iota(k_rows.begin(), k_rows.end(), 0);
    for (int32_t b = 0; b < B; ++b) {
      q_offsets.push_back(static_cast<int32_t>((b + 1) * answers));
      k_offsets.push_back(static_cast<int32_t>((b + 1) * trace));
      valid.push_back(static_cast<int32_t>(trace)), samples.push_back(b);
    }
    const Tensor qo = upload_indices(ops_, arena_, q_offsets), ko = upload_indices(ops_, arena_, k_offsets),
                 ok = upload_indices(ops_, arena_, valid), qr = upload_indices(ops_, arena_, q_rows),
                 kr = upload_indices(ops_, arena_, k_rows);
    // The queries, the trace's keys and values, and the targets, once each.
    const double selected = 2.0 * static_cast<double>(B * (answers * H + 2 * trace * K + 2 * M * K) * D);
    struct Selection {
      Tensor q, k, v, target_k, target_v;
    };
    std::vector<Selection> selections;
    const Tensor q = tensor(t, B * answers, H * D), k = tensor(t, B * trace, K * D);
    while (std::ssize(selections) < sets_of(selected))
      selections.push_back({copies(q), copies(k), copies(k), arena_.alloc(t, B * M, K * D), arena_.alloc(t, B * M, K * D)});
    const Tensor kept = arena_.alloc(DType::i32, B * M, K);
    RkvOptions options;
    options.latents = M, options.heads = H, options.kv_heads = K, options.samples = upload_indices(ops_, arena_, samples);
    in_turn("rkv_select", selected, std::ssize(selections), [&](std::size_t i) {
      const Selection& s = selections[i];
      ops_.rkv_select(arena_, s.target_k, s.target_v, kept, {}, {}, {}, s.q, qr, qo, s.k, s.v, kr, ko, {}, options);
    });
    // Latents and targets of the slots that hold a token are read, every slot's gradient is written.
    const double distilled = 4.0 * static_cast<double>(B * (M + trace) * K * D);
    const Tensor loss = scalars(1);
    struct Slots {
      Tensor x, target, dx;
    };
    const Tensor target = tensor(t, B * M, K * D);
    std::vector<Slots> slots{{tensor(t, B * M, K * D), target, arena_.alloc(DType::f32, B * M, K * D)}};
    while (std::ssize(slots) < sets_of(distilled))
      slots.push_back({copies(slots[0].x), copies(target), arena_.alloc(DType::f32, B * M, K * D)});
    in_turn("distill", distilled, std::ssize(slots), [&](std::size_t i) {
      ops_.distill(arena_, loss, slots[i].dx, slots[i].x, slots[i].target, ok, {}, Distance::smooth_l1, 1, 1);
    });
    const int64_t params = shapes_.params;
    const Tensor value = tensor(DType::f32, 1, params), m = tensor(DType::f32, 1, params), s = arena_.alloc(DType::f32, 1, params),
                 g = tensor(DType::f32, 1, params);
    ops_.fill(s, 1);
    const Tensor square = arena_.alloc(DType::f64, 1, 1);
    record("sum_squares", 4.0 * static_cast<double>(params), false, [&] { ops_.sum_squares(arena_, square, g); });
    ops_.fill(square, 1);
    const Tensor updates = arena_.alloc(DType::i32, 1, 1);
    ops_.fill(updates, 1);
    record("adamw", 28.0 * static_cast<double>(params), false, [&] {
      ops_.adamw(value, m, s, {}, g, square, updates, {1e-4, 0.9, 0.999, 1e-8, 0.1, 2});
    });
  }

  void other_ops() {
    bench_other_ops(ops_, arena_, shapes_,
                    {[&](const std::string& name) { return wanted(name); }, [&](double bytes) { return sets_of(bytes); },
                     [&](const auto& name, double bytes, int64_t sets, const auto& body) { in_turn(name, bytes, sets, body); },
                     [&](const auto& name, double flops, const auto& body) { record(name, flops, true, body); }});
  }

  void measure_rivals() {
    rivals_ = bench_rivals(ops_, shapes_, [&](const std::string& name) { return wanted(name); });
    for (const Rivals::Row& r : rivals_.rows) report(r.name, r.seconds, r.flops, "GFLOP/s", found_.matrix_rate);
  }

  void step() {
    StepCase what{fmt::format("{}'s shape", shapes_.name == "smollm2" ? "SmolLM2-135M" : shapes_.name), bench_config(Method::kava, shapes_),
                  shapes_.model(), bench_samples(V, shapes_.batch)};
    what.config.train.recompute = recompute_;
    room_.emplace(ops_);                     // the ops' own memory is given back: the step's may take all
    const bool gpu = ops_.name() == "cuda";  // whose clocks sink while it is busy, as they do in products of 5 s
    const MeasuredStep step = measure_step(ops_, what, gpu ? 20 : 3, stdout, gpu ? 5 : 0);
    if (!step.one_by_one.empty())
      fmt::print("the fastest step: {:.3f} ms, kernels launched one by one: {:.3f} ms\n", step.fastest() * 1e3,
                 *std::ranges::min_element(step.one_by_one) * 1e3);
    print_ops(step, ops_.name() == "cpu");
    const OpCounter::Counts& asked = step.asked;
    const CudaInside graphs = cuda_inside(ops_);
    if (ops_.name() != "cpu")
      fmt::print("passes as graphs: {} recorded, {} of these by an update, {} kernel by kernel\n", graphs.recorded, graphs.updated,
                 graphs.fallbacks);
    fmt::print("asked for in a step: {} launches, {} calls of ops, {} uploads, {} reads, {} allocations\n", asked.launches, asked.calls,
               asked.uploads, asked.reads, asked.allocations);
    measure_matrix_rate();  // again: the machine may have been busier before
    rusage use{};
    getrusage(RUSAGE_SELF, &use);
    found_.step = {step, share_of(step, step.median()), found_.matrix_rate, {}};
    if (ops_.name() != "cpu") found_.step->graphs = graphs;
    fmt::print("memory: step {:.2f} GB, process {:.2f} GB at most\n", static_cast<double>(step.peak_bytes) / 1e9,
               static_cast<double>(use.ru_maxrss) / 1e6);
    fmt::print("{:.0f} GFLOP/s of {:.0f}\nstep share: {:.0f} %\n", step.flops / step.median() / 1e9, found_.matrix_rate,
               100 * found_.step->share);
  }

  double share_of(const MeasuredStep& step, double seconds) const { return step.flops / seconds / 1e9 / found_.matrix_rate; }

  // Whole steps in turn, each by its own fewest operations, beside the first of them.
  std::vector<MeasuredStep> side_by_side(const char* kind, const Shapes& shapes, const std::vector<StepCase>& cases) {
    fmt::print("\n{}'s sizes, bf16, batch {}: each the fastest of its steps, as share of the matrix rate and of the first one's share\n",
               shapes.name, cases[0].samples.size());
    std::vector<MeasuredStep> steps = measure_in_turn(ops_, cases, 2);
    measure_matrix_rate();
    for (std::size_t i = 0; i < cases.size(); ++i) {
      const double share = share_of(steps[i], steps[i].fastest()), of_first = share / share_of(steps[0], steps[0].fastest());
      const std::string name = fmt::format("{} {}", kind, cases[i].name);
      fmt::print("{:<40} {:>10.3f} ms {:>9.1f} GFLOP/s  {:>5.1f} % {:>6.3f} of {}\n", name, steps[i].fastest() * 1e3,
                 steps[i].flops / steps[i].fastest() / 1e9, 100 * share, of_first, cases[0].name);
      found_.compared.push_back({name, shapes.name, share, of_first});
    }
    return steps;
  }

  bool asked(const char* kind, const std::vector<StepCase>& cases) const {
    return given_ && std::ranges::any_of(cases, [&](const StepCase& c) { return wanted(fmt::format("{} {}", kind, c.name)); });
  }

  void methods() {
    const std::vector<StepCase> cases = method_cases(shapes_);
    const std::vector<MeasuredStep> steps = side_by_side("method", shapes_, cases);
    // What the first step of coconut's last stage takes more than the others of it, with moments set to zero.
    constexpr double kStepsOfAnEpoch = 385620.0 / 128;
    const double more = std::max(0.0, steps[1].after_change - steps[1].median());
    fmt::print("a stage change: {:.3f} ms, {:.4f} % of an epoch of {:.0f} such steps\n", more * 1e3,
               100 * more / (kStepsOfAnEpoch * steps[1].fastest()), kStepsOfAnEpoch);
  }

  // What norms of q and k cost is what their turn takes more than the bare turn of the other block.
  void architectures() {
    const std::vector<StepCase> cases = model_cases(models_);
    const std::vector<MeasuredStep> steps = side_by_side("model", models_, cases);
    auto turning = [](const MeasuredStep& s) {
      double sum = 0;
      for (const auto& [op, seconds] : s.ops)
        if (op.find("rope") != std::string::npos) sum += seconds;
      return sum;
    };
    fmt::print("norms of q and k: {:.2f} % of the step\n", 100 * (turning(steps[1]) - turning(steps[0])) / steps[1].fastest());
  }

  void comm() {
    std::string why;
    for (const CommRate& r : bench_comm_here(ops_.name() != "cpu", why)) {
      found_.rows.push_back({r.name, r.seconds, r.rate * r.seconds * 1e9, "GB/s", 0});
      fmt::print("{}\n", text_of(r));
    }
    if (!why.empty()) fmt::print("comm: {}\n", why);
  }

  Ops& ops_;
  std::optional<Arena> room_{std::in_place, ops_};
  Arena& arena_ = *room_;
  const SplitPattern& filter_;
  bool given_;
  Recompute recompute_;
  const Shapes shapes_, models_;
  KernelCounts* counts_;
  const bool cold_ = !counts_ && ops_.name() != "cpu";
  const int64_t kRows = shapes_.rows, C = shapes_.hidden, F = shapes_.mlp, H = shapes_.heads, K = shapes_.kv_heads, D = shapes_.head_dim,
                V = shapes_.vocab, side_ = ops_.name() == "cuda" ? std::max<int64_t>(shapes_.product, 8192) : shapes_.product;
  BenchResults found_;
  Rivals rivals_;
  mutable bool any_ = false;
};

struct BenchCommand {
  std::string filter, tokenizer, text;
  std::optional<std::string> json, recompute, shape;
  DeviceOptions device;
};

int bench(const BenchCommand& command, Comm& comm, const World& world) {
  const SplitPattern filter = filter_of(command.filter);
  const Shapes rank_shapes = shapes_of(command.shape.value_or("smollm2"), "smollm2");
  if (!comm.alone())
    return bench_ranks(comm, world, command.device, {finds(filter, "comm"), finds(filter, "step"), &rank_shapes, command.json});
  if (!command.tokenizer.empty()) {
    bench_tokenizer(stdout, command.tokenizer, command.text);
    return 0;
  }
  const Recompute recompute = choice_option<Recompute>("--recompute", command.recompute).value_or(Recompute::none);
  const std::unique_ptr<Ops> ops = make_ops(command.device);
  const bool emulated = cuda_is_emulated() && ops->name() == cuda_name();
  const std::string by_default = ops->name() == "cpu" ? "smollm2" : "llama1b";
  const Shapes shapes = shapes_of(emulated ? "tiny" : command.shape.value_or(by_default), by_default);
  Shapes model_shapes = command.shape || emulated ? shapes : shapes_of("qwen3_06b", by_default);
  if (ops->name() == "cpu") model_shapes.batch = std::min<int64_t>(model_shapes.batch, 8);
  if (command.json) {
    require_no_input("--json", *command.json, {command.shape.value_or("")});
    require_writable("--json", *command.json);
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what ends the process by force leaves the lines before
  if (emulated) fmt::print("emulated: this shows that everything runs; times and rates say nothing of a GPU\n");
  fmt::print("{}, {} threads\n{:<40} {:>13} {:>17} {:>8}\n", ops->name(), thread_count(command.device), "", "time", "rate", "of ceiling");
  std::optional<KernelCounts> counts;
  Bench bench(*ops, filter, !command.filter.empty(), recompute, shapes, model_shapes, nullptr);
  bool any = false;
  const auto write_results = [&] {
    if (!command.json || !(any || bench.any())) return;
    require_printed();
    Json out = json_of(bench.found(), ops->name(), shapes.name);
    if (counts)
      for (const Json& of : counts->results()) out.push_back(of);
    write_file(*command.json, out.dump(2) + "\n");
  };
  try {
    if (emulated) {
      counts.emplace();
      const std::vector<std::string> counted =
          command.shape ? std::vector{*command.shape} : std::vector<std::string>{"llama1b", "qwen05b", "llama3b"};
      for (const std::string& name : counted) {
        const Shapes at = shapes_of(name, by_default);
        Bench of_counts(*ops, filter, true, recompute, at, at, &*counts);
        of_counts.run();
        any = any || of_counts.any();
      }
    }
    bench.run(write_results);
  } catch (...) {
    try {
      // What was measured before the fault, which is the one to tell.
      if (bench.found().copy_rate > 0 || (counts && !counts->results().empty())) write_results();
    } catch (const std::exception&) {
    }
    throw;
  }
  if (!any && !bench.any())
    throw Error(Exit::usage, "--filter", "\"" + escaped(command.filter) + "\" finds no benchmark",
                "give a part of a name, such as rms_norm, attention, linear, head, adamw, step or comm");
  write_results();
  const auto& [rows, missing, wrong] = bench.rivals();
  if (!wrong.empty()) throw Error(Exit::numeric, "values", fmt::format("{}", fmt::join(wrong, "; ")), "run the tests on this device");
  if (missing.empty()) return 0;
  throw Error(Exit::preflight, "rivals", fmt::format("{}", fmt::join(missing, "; ")),
              "install cuBLASLt of CUDA 13 and cuDNN 9.15.1 or newer");
}

}  // namespace

}  // namespace kava

int main(int argc, char** argv) {
  CLI::App app("Measures the main ops and the whole step against the machine's own rates", "kava_bench");
  app.footer("Examples:\n  kava_bench --device cpu --filter rms_norm\n  kava_bench --device cpu --filter step");
  kava::BenchCommand command;
  app.add_option(
      "--filter", command.filter,
      "Only benchmarks whose name this regular expression finds; \"method\" and \"model\" compare whole steps, and only where they "
      "are asked for");
  auto* tokenizer =
      app.add_option("--tokenizer", command.tokenizer, "Measure the tokenizer of this model folder alone, on the lines of --text");
  auto* text = app.add_option("--text", command.text, "A text file in UTF-8");
  tokenizer->needs(text);
  text->needs(tokenizer);
  app.add_option("--recompute", command.recompute, "train.recompute of the step: none (default), cheap or block");
  app.add_option("--shape", command.shape, kava::shapes_help());
  app.add_option("--json", command.json, "Also write the results to this file");
  kava::add_device_options(app, command.device);
  return kava::command_main(argc, argv, app, [&] {
    return kava::on_ranks({}, command.device,
                          [&](kava::Comm& comm, const kava::World& world) { return kava::bench(command, comm, world); });
  });
}
