#include "benchmarks/bench_rivals.h"

#include <fmt/core.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <optional>

#include "benchmarks/cudnn_attention.h"
#include "benchmarks/measuring.h"
#include "engine/device/cuda_module.h"
#include "engine/device/host.h"
#include "models/transformer.h"

namespace kava {

namespace {

constexpr int64_t kLength = 100;
// From 9.15.1 on cuDNN's backward takes keys that are no multiple of 128 without a mask of their lengths: before, its own frontend (1.23,
// scaled_dot_product_flash_attention.h) adds one.
constexpr int64_t kOddKeys = 91501;

/// A library that is not there, or too old for what it is asked. One that is there and makes no plan, or fails, is a fault.
struct NoRival : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The root of the mean square of y - x, over that of x.
double relative_error(const std::vector<double>& y, const std::vector<double>& x) {
  double error = 0, square = 0;
  for (std::size_t i = 0; i < x.size(); ++i) error += (y[i] - x[i]) * (y[i] - x[i]), square += x[i] * x[i];
  return std::sqrt(error / square);
}

class Comparison {
 public:
  Comparison(Ops& ops, const Shapes& shapes, const std::function<bool(const std::string&)>& wanted)
      : ops_(ops), arena_(ops), shapes_(shapes), wanted_(wanted), on_gpu_(ops.name() == "cuda" || std::getenv("KAVA_EMULATED_RIVALS")) {}

  Rivals run() {
    products();
    attention();
    return std::move(found_);
  }

 private:
  Tensor random(int64_t rows, int64_t cols, double scale = 1) { return random_tensor(ops_, arena_, DType::bf16, rows, cols, scale); }

  void row(const std::string& name, double flops, const std::function<void()>& body) {
    if (wanted_(name)) found_.rows.push_back({name, time_of(ops_, body), flops});
  }

  void products() {
    const int64_t C = shapes_.hidden, F = shapes_.mlp, HD = shapes_.heads * shapes_.head_dim, KD = shapes_.kv_heads * shapes_.head_dim,
                  n = shapes_.rows;
    const CudaInside inside = cuda_inside(ops_);
    struct Linear {
      const char* name;
      int64_t outs, in;
    };
    bool any = false;
    for (const Linear& l : {Linear{"qkv", HD + 2 * KD, C}, {"o", C, HD}, {"gate, up", 2 * F, C}, {"down", C, F}}) {
      const std::string own = fmt::format("product {}, own kernel", l.name), rival = fmt::format("product {}, cuBLASLt", l.name);
      if (!wanted_(own) && !wanted_(rival)) continue;
      any = true;
      ArenaScope scope(arena_);
      const Tensor x = random(n, l.in), w = random(l.outs, l.in, 0.04), y = arena_.alloc(DType::bf16, n, l.outs);
      const LinearGroup linear = LinearGroup::plain(w);
      const double flops = 2.0 * static_cast<double>(n * l.outs * l.in);
      row(own, flops, [&] { ops_.linear_group_fwd(arena_, y, x, linear, Reads::streamed); });
      if (inside.cublaslt) row(rival, flops, [&] { ops_.linear_group_fwd(arena_, y, x, linear, Reads::tiled); });
    }
    if (any && !inside.cublaslt_fault.empty()) found_.wrong.push_back(inside.cublaslt_fault);
    else if (any && on_gpu_ && !inside.cublaslt) found_.missing.emplace_back("cuBLASLt is not there, so products have no rival");
  }

  void attention() {
    const std::string forward = fmt::format("attention_fwd causal {}", kLength), backward = fmt::format("attention_bwd causal {}", kLength);
    const auto asked = [&](const std::string& name) { return wanted_(name) || wanted_(name + ", cuDNN"); };
    if (!asked(forward) && !asked(backward)) return;
    ArenaScope scope(arena_);
    const int64_t H = shapes_.heads, K = shapes_.kv_heads, D = shapes_.head_dim;
    const AttentionSizes sizes{std::max<int64_t>(1, shapes_.rows / kLength), kLength, H, K, D};
    const int64_t n = sizes.segments * kLength;
    const DevicePass pass = segments_of(sizes);
    const double scale = 1 / std::sqrt(static_cast<double>(D)), pairs = static_cast<double>(sizes.segments * kLength * (kLength + 1)) / 2,
                 flops = 4 * pairs * static_cast<double>(H * D);
    const Tensor q = random(n, H * D), k = random(n, K * D), v = random(n, K * D), dout = random(n, H * D);
    const Tensor o = arena_.alloc(DType::bf16, n, H * D), lse = arena_.alloc(DType::f32, n, H), dq = arena_.alloc(DType::bf16, n, H * D),
                 dk = arena_.alloc(DType::f32, n, K * D), dv = arena_.alloc(DType::f32, n, K * D);
    ops_.fill(dk, 0), ops_.fill(dv, 0);
    const auto fwd = [&] { ops_.attention_fwd(arena_, o, lse, q, k, v, pass.segments, H, K, scale); };
    const auto bwd = [&] { ops_.attention_bwd(arena_, dq, dk, dv, dout, o, lse, q, k, v, pass.segments, H, K, scale); };
    fwd(), bwd();
    if (on_gpu_) {
      // Before the times of the own: those add to dk and dv.
      const auto like = [&](const Tensor& t) { return arena_.alloc(DType::bf16, t.rows, t.cols); };
      const Tensor ro = like(o), rdq = like(dq), rdk = like(dk), rdv = like(dv), dkh = like(q), dvh = like(q),
                   stats = arena_.alloc(DType::f32, n, H);
      scale_ = static_cast<float>(scale);
      try {
        std::string why;
        if (!cudnn_ && !(cudnn_ = Cudnn::open(why))) throw NoRival("cuDNN: " + why);
        cudnn_->use(cuda_inside(ops_).stream);
        const std::vector<Given> inputs{{kQ, q.data},         {kK, k.data},        {kKColumns, k.data},
                                        {kV, v.data},         {kVColumns, v.data}, {kO, ro.data},
                                        {kStats, stats.data}, {kScale, &scale_},   {kMinusInfinity, &minus_infinity_}};
        rival(forward, flops, *cudnn_attention_fwd(*cudnn_, sizes), without(inputs, {kK, kVColumns}));
        same(forward, {{"o", o, ro}});
        if (cudnn_->version() < kOddKeys)
          throw NoRival(fmt::format("cuDNN {} gives no gradients over {} keys without a mask of lengths", cudnn_->version(), kLength));
        std::vector<Given> all = inputs;
        all.insert(all.end(), {{kDout, dout.data}, {kDq, rdq.data}, {kDk, rdk.data}, {kDv, rdv.data}});
        if (H != K) all.insert(all.end(), {{kDkOfHeads, dkh.data}, {kDvOfHeads, dvh.data}});
        rival(backward, 2.5 * flops, *cudnn_attention_bwd(*cudnn_, sizes), without(all, {kV}));
        same(backward, {{"dq", dq, rdq}, {"dk", dk, rdk}, {"dv", dv, rdv}});
      } catch (const NoRival& e) {
        found_.missing.emplace_back(e.what());
      } catch (const CudnnError& e) {
        found_.wrong.emplace_back(e.what());
      }
    }
    row(forward, flops, fwd);
    row(backward, 2.5 * flops, bwd);
  }

  using Given = std::pair<int64_t, void*>;
  static std::vector<Given> without(std::vector<Given> given, std::initializer_list<int64_t> numbers) {
    for (int64_t number : numbers) std::erase_if(given, [&](const Given& g) { return g.first == number; });
    return given;
  }

  DevicePass segments_of(const AttentionSizes& sizes) {
    SegmentList list;
    for (int64_t s = 0; s < sizes.segments; ++s) {
      const auto begin = static_cast<int32_t>(s * kLength), length = static_cast<int32_t>(kLength);
      list.add({}, begin, length, begin, length);
      list.end_group();
    }
    Pass pass;
    pass.end = sizes.segments * kLength;
    pass.segments = list;
    pass.positions.assign(static_cast<std::size_t>(pass.end), 0);
    pass.row_keys.assign(static_cast<std::size_t>(2 * pass.end), 0);
    return upload_pass(ops_, arena_, pass);
  }

  /// The fastest of the plans that run.
  void rival(const std::string& name, double flops, CudnnGraph& graph, const std::vector<Given>& given) {
    double best = std::numeric_limits<double>::infinity();
    std::string last;
    const int64_t plans = graph.make_plans();
    for (int64_t plan = 0; plan < plans; ++plan) {
      ArenaScope scope(arena_);
      const int64_t bytes = graph.workspace_bytes(plan);
      const Tensor room = arena_.alloc(DType::f32, 1, (bytes + 3) / 4);
      try {
        void* const pack = graph.pack(given, room.data);  // once: made in each call it could take the host longer than the device
        best = std::min(best, time_of(ops_, [&] { graph.run(plan, pack); }));
      } catch (const CudnnError& e) {
        last = e.what();
      }
    }
    if (std::isinf(best)) throw CudnnError(last);
    if (wanted_(name + ", cuDNN")) found_.rows.push_back({name + ", cuDNN", best, flops});
  }

  struct Pair {
    const char* name;
    Tensor own, rival;
  };
  /// Both round weights and results to bf16, a few 2^-9 of each; a mask or a head that is not the same is off by far more.
  void same(const std::string& op, std::initializer_list<Pair> pairs) {
    constexpr double kMost = 0x1p-5;
    for (const Pair& p : pairs) {
      const double error = relative_error(to_host(ops_, p.own), to_host(ops_, p.rival));
      if (!(error <= kMost)) found_.wrong.push_back(fmt::format("{}: {} is {:.3g} away from cuDNN's", op, p.name, error));
    }
  }

  Ops& ops_;
  Arena arena_;
  const Shapes& shapes_;
  const std::function<bool(const std::string&)>& wanted_;
  const bool on_gpu_;
  std::unique_ptr<Cudnn> cudnn_;
  float scale_ = 0, minus_infinity_ = std::numeric_limits<float>::lowest();
  Rivals found_;
};

}  // namespace

Rivals bench_rivals(Ops& ops, const Shapes& shapes, const std::function<bool(const std::string& name)>& wanted) {
  return Comparison(ops, shapes, wanted).run();
}

}  // namespace kava
