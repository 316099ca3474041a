#include "tests/ops/op_rig.h"
#include "tests/ops/segment_layout.h"

using namespace kava;
using namespace kava::test;

namespace {
// Two samples: a question with a branch that sees some of its rows in another order, a single latent, and a lone row.
const Layout kTree = {
    {{{0, 1, 2, 3}, 0, 4}, {{0, 2, 8, 4, 5}, 4, 2}, {{1, 9}, 6, 1}, {{12}, 7, 1}, {{12, 19, 13, 14, 15}, 8, 3}}, {0, 3, 5}, 20, 11};

Layout long_layout() {
  Layout l{{}, {0, 1, 2}, 90, 90};
  SegmentSpec a{{}, 0, 70}, b{{}, 70, 20};
  for (int i = 0; i < 70; ++i) a.keys.push_back(i);
  for (int i = 70; i < 90; ++i) b.keys.push_back(i);
  l.segments = {a, b};
  return l;
}

Segments place(Rig& rig, const Layout& l) {
  std::vector<int> offsets = {0}, keys, begin, count;
  Segments s;
  for (const SegmentSpec& spec : l.segments) {
    keys.insert(keys.end(), spec.keys.begin(), spec.keys.end());
    offsets.push_back(int(keys.size()));
    begin.push_back(spec.query_begin);
    count.push_back(spec.queries);
    s.most_keys = std::max(s.most_keys, std::ssize(spec.keys));
    s.most_queries = std::max<int64_t>(s.most_queries, spec.queries);
    s.fewest_queries = begin.size() == 1 ? spec.queries : std::min<int64_t>(s.fewest_queries, spec.queries);
  }
  auto index = [&](const std::vector<int>& v) { return rig.in(row_of(v), Kind::i32); };
  s.key_offsets = index(offsets), s.keys = index(keys), s.query_begin = index(begin), s.query_count = index(count);
  s.group_offsets = index(l.group_offsets);
  s.count = int64_t(l.segments.size()), s.groups = int64_t(l.group_offsets.size()) - 1;
  return s;
}

OpRun attention_fwd(const Layout& l, Heads h) {
  return [=](Rig& rig, const Matrices& m) {
    Tensor q = rig.in(m[0]), k = rig.in(m[1]), v = rig.in(m[2]);
    Tensor o = rig.out(m[0].rows, m[0].cols), lse = rig.out(m[0].rows, h.heads, Kind::sum);
    rig.ops.attention_fwd(rig.arena, o, lse, q, k, v, place(rig, l), h.heads, h.kv_heads, h.scale());
    return std::vector<Tensor>{o, lse};
  };
}

// in: q, k, v, do, dk before, dv before
OpRun attention_bwd(const Layout& l, Heads h) {
  return [=](Rig& rig, const Matrices& m) {
    Tensor q = rig.in(m[0]), k = rig.in(m[1]), v = rig.in(m[2]), dout = rig.in(m[3]);
    Tensor dk = rig.in_out(m[4], Kind::sum), dv = rig.in_out(m[5], Kind::sum);
    Tensor o = rig.out(m[0].rows, m[0].cols), lse = rig.out(m[0].rows, h.heads, Kind::sum), dq = rig.out(m[0].rows, m[0].cols);
    const Segments s = place(rig, l);
    rig.ops.attention_fwd(rig.arena, o, lse, q, k, v, s, h.heads, h.kv_heads, h.scale());
    rig.round(o);
    rig.round(lse);
    rig.ops.attention_bwd(rig.arena, dq, dk, dv, dout, o, lse, q, k, v, s, h.heads, h.kv_heads, h.scale());
    return std::vector<Tensor>{dq, dk, dv};
  };
}

Matrix naive_attention(const Matrices& m, const Layout& l, Heads h) {
  Matrix o(m[0].rows, m[0].cols);
  for (const SegmentSpec& s : l.segments)
    for (int i = 0; i < s.queries; ++i)
      for (int64_t head = 0; head < h.heads; ++head) {
        const int64_t kv = head / (h.heads / h.kv_heads), row = s.query_begin + i;
        const std::size_t seen = s.keys.size() - std::size_t(s.queries - 1 - i);
        std::vector<double> p(seen);
        double sum = 0;
        for (std::size_t j = 0; j < seen; ++j) {
          for (int64_t d = 0; d < h.dim; ++d) p[j] += h.scale() * m[0](row, head * h.dim + d) * m[1](s.keys[j], kv * h.dim + d);
          sum += p[j] = std::exp(p[j]);
        }
        for (std::size_t j = 0; j < seen; ++j)
          for (int64_t d = 0; d < h.dim; ++d) o(row, head * h.dim + d) += p[j] / sum * m[2](s.keys[j], kv * h.dim + d);
      }
  return o;
}
}  // namespace

TEST_CASE("attention over key lists is softmax attention and has the gradients of central differences", "[device][ops]") {
  Random random(24);
  for (const Layout& l : {kTree, long_layout()})
    for (Heads h : {Heads{1, 1, 5}, Heads{6, 2, 16}, Heads{4, 4, 3}, Heads{3, 1, 64}}) {
      INFO("heads " << h.heads << "/" << h.kv_heads << " of " << h.dim);
      const int64_t width = h.heads * h.dim, kv_width = h.kv_heads * h.dim;
      const Matrices in = {random.normal(l.query_rows, width), random.normal(l.step_rows, kv_width), random.normal(l.step_rows, kv_width)};
      check_op("attention_fwd", in, attention_fwd(l, h), true);
      const Matrix got = run_f64(attention_fwd(l, h), in)[0], want = naive_attention(in, l, h);
      for (std::size_t i = 0; i < want.at.size(); ++i) REQUIRE(std::fabs(got.at[i] - want.at[i]) < 1e-12);
      Matrices back = in;
      back.push_back(random.normal(l.query_rows, width));
      back.push_back(Matrix(l.step_rows, kv_width));
      back.push_back(Matrix(l.step_rows, kv_width));
      check_op("attention_bwd", back, attention_bwd(l, h), true);
      const Matrices gradient = run_f64(attention_bwd(l, h), back);
      if (l.step_rows < 50)
        check_gradient(
            "attention", back, [&](const Matrices& m) { return weighted({naive_attention(m, l, h)}, {back[3]}); }, {0, 1, 2}, gradient);
      Matrices twice = back;
      twice[4] = gradient[1], twice[5] = gradient[2];
      const Matrices added = run_f64(attention_bwd(l, h), twice);
      for (std::size_t i : {1u, 2u})
        for (std::size_t e = 0; e < added[i].at.size(); ++e) REQUIRE(std::fabs(added[i].at[e] - 2 * gradient[i].at[e]) < 1e-12);
    }
}

TEST_CASE("attention of many keys, few rows and large heads is as exact on a device as in the emulator", "[device][ops]") {
  if (!tests_device() || !emulated_cuda()) SKIP("tests/kernels run these forms in the emulator: KAVA_TEST_DEVICE=cuda asks for a device");
  Random random(26);
  Layout l{{}, {0, 1, 2, 3}, 0, 0};
  for (auto [keys, queries] : {std::pair{150, 1}, {300, 2}, {140, 120}}) {
    SegmentSpec s{{}, int(l.query_rows), queries};
    for (int i = 0; i < keys; ++i) s.keys.push_back(int(l.step_rows) + i);
    l.segments.push_back(s), l.step_rows += keys, l.query_rows += queries;
  }
  for (Heads h : {Heads{2, 1, 128}, Heads{3, 1, 64}})
    for (DType type : {DType::f32, DType::bf16}) {
      INFO("heads " << h.heads << "/" << h.kv_heads << " of " << h.dim << " in " << name_of(type));
      const int64_t width = h.heads * h.dim, kv_width = h.kv_heads * h.dim;
      const Matrices in = {random.normal(l.query_rows, width), random.normal(l.step_rows, kv_width), random.normal(l.step_rows, kv_width),
                           random.normal(l.query_rows, width), Matrix(l.step_rows, kv_width),        Matrix(l.step_rows, kv_width)};
      for (const OpRun& op : {attention_fwd(l, h), attention_bwd(l, h)}) {
        Rig device(*tested_cuda(), type, type, 0), emulated(*emulated_cuda(), type, type, 0);
        const Matrices got = read_all(device, op(device, in));
        REQUIRE(device.guards_hold());
        check_errors(got, run_f64(op, in), read_all(emulated, op(emulated, in)), 1e-12);
      }
    }
}

TEST_CASE("attention adds the gradients of keys and values to sums alone, of the keys' rows") {
  Rig rig(1, DType::bf16, DType::bf16, 0);
  const Layout& l = kTree;
  const Tensor q = rig.in(Matrix(l.query_rows, 4, 1)), kv = rig.in(Matrix(l.step_rows, 4, 1)), o = rig.out(l.query_rows, 4);
  const Tensor lse = rig.out(l.query_rows, 1, Kind::sum), dq = rig.out(l.query_rows, 4);
  const Tensor sums = rig.in_out(Matrix(l.step_rows, 4), Kind::sum), narrow = rig.in_out(Matrix(l.step_rows, 4)),
               few = rig.in_out(Matrix(l.step_rows - 1, 4), Kind::sum);
  const Segments s = place(rig, l);
  rig.ops.attention_fwd(rig.arena, o, lse, q, kv, kv, s, 1, 1, 0.5);
  const auto backward = [&](const Tensor& dk, const Tensor& dv) {
    rig.ops.attention_bwd(rig.arena, dq, dk, dv, q, o, lse, q, kv, kv, s, 1, 1, 0.5);
  };
  backward(sums, sums);
  for (const Tensor& wrong : {narrow, few}) {
    REQUIRE_THROWS_AS(backward(wrong, sums), Error);
    REQUIRE_THROWS_AS(backward(sums, wrong), Error);
  }
}

TEST_CASE("attention of a sample has the same bytes whatever samples stand beside it") {
  Random random(25);
  const Heads h{6, 2, 16};
  const Matrices in = {random.normal(11, 96), random.normal(20, 32), random.normal(20, 32)};
  Layout alone = kTree;
  alone.segments.erase(alone.segments.begin(), alone.segments.begin() + 3);
  for (SegmentSpec& s : alone.segments) s.query_begin -= 7;
  alone.group_offsets = {0, 2};
  Matrices part = in;
  part[0].rows = 4;
  part[0].at.erase(part[0].at.begin(), part[0].at.begin() + 7 * 96);
  for (DType type : {DType::f32, DType::bf16, DType::f64}) {
    Rig both(2, type, type, 0), one(2, type, type, 0);
    const Matrix all = both.read(attention_fwd(kTree, h)(both, in)[0]), some = one.read(attention_fwd(alone, h)(one, part)[0]);
    REQUIRE(std::vector<double>(all.at.begin() + 7 * 96, all.at.end()) == some.at);
  }
}

TEST_CASE("attention of heads that the cuda backend has no kernels for ends with a line, in a dry run too", "[device][ops]") {
  const Heads h{1, 1, 129};
  const Matrices in = {Matrix(11, 129), Matrix(20, 129), Matrix(20, 129)};
  Rig on_cpu(1, DType::f32, DType::f32, 0);
  REQUIRE_NOTHROW(attention_fwd(kTree, h)(on_cpu, in));
  if (!tested_cuda()) SKIP(kNoTestedCuda);
  const auto dry = tested_cuda()->dry_twin();
  for (Ops* ops : {tested_cuda(), dry.get()}) {
    Rig rig(*ops, DType::f32, DType::f32, 0);
    try {
      attention_fwd(kTree, h)(rig, in);
      FAIL("it took them");
    } catch (const Error& e) {
      REQUIRE(e.code() == Exit::preflight);
      REQUIRE(std::string(e.what()).find("heads of 129 numbers, 128 at most") != std::string::npos);
    }
  }
}

TEST_CASE("attention survives logits of any size", "[device][ops]") {
  for (auto [ops, type] : every_backend()) {
    INFO(ops->name() << ", " << name_of(type));
    Rig rig(*ops, type, type, 0);
    const Matrices in = {Matrix(11, 4, 100), Matrix(20, 4, 100), Matrix(20, 4, 3)};
    Matrices opposite = in;
    for (int64_t r = 0; r < 20; r += 2)
      for (int64_t c = 0; c < 4; ++c) opposite[1](r, c) = -100;
    for (const Matrices& m : {in, opposite})
      for (double v : rig.read(attention_fwd(kTree, {1, 1, 4})(rig, m)[0]).at) REQUIRE(std::fabs(v - 3) < 1e-5);
  }
}

TEST_CASE("attention that one key takes all of has no gradient to queries and keys", "[device][ops]") {
  Random random(42);
  const Heads h{2, 1, 16};
  const Layout l{{{{0, 1, 2, 3, 4, 5}, 0, 6}, {{7}, 6, 1}}, {0, 1, 2}, 8, 7};
  Matrices in = {random.normal(7, 32), random.normal(8, 16), random.normal(8, 16), random.normal(7, 32), Matrix(8, 16), Matrix(8, 16)};
  // Every query follows (1, 1, ..), and so does key 0, but no other key of its segment.
  for (double& v : in[0].at) v = 10 + v;
  for (int64_t r = 0; r < 8; ++r)
    for (int64_t c = 0; c < 16; ++c) in[1](r, c) += r == 0 ? 30 : -30;
  for (auto [ops, type] : every_backend()) {
    INFO(ops->name() << ", " << name_of(type));
    Rig rig(*ops, type, type, 0);
    const Matrices out = read_all(rig, attention_bwd(l, h)(rig, in));
    // Kernels in bf16 sum dp in tensor cores and o . do outside: sums of 16 equal products of at most 9, each to 2^-22 of that, differ by
    // 7e-5 at most, which times a scale of 1/4, keys of 33 and queries of 14 in 14 rows stays below this; weights off by 2^-9 make it 100
    // times more.
    const double most = type == DType::bf16 && ops->name() != "cpu" ? 4e-3 : 0;
    for (std::size_t i : {0u, 1u})
      for (double v : out[i].at) REQUIRE(std::fabs(v) <= most);
    for (int64_t c = 0; c < 16; ++c) REQUIRE(out[2](0, c) != 0);
  }
}
