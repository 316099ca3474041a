// The fronts of the ops on memory, rows and layers: what an op asks of its arguments, written once for all backends, and what its observers
// are told.
#include "engine/device/ops.h"

#include "engine/device/op_front.h"

namespace kava {

// ---- memory

namespace {
constexpr int64_t kDryRange = int64_t{1} << 52;
constexpr int64_t kDryAlign = 64;
}  // namespace

void* Ops::allocate(int64_t bytes) {
  KAVA_CHECK(bytes >= 0, "{} bytes", bytes);
  void* data = dry_ ? dry_addresses(bytes) : do_allocate(bytes);
  held_ += bytes;
  for (OpObserver* o : observers_) o->allocated(bytes);
  return data;
}

void* Ops::dry_addresses(int64_t bytes) {
  void* data = reinterpret_cast<void*>(next_dry_);
  next_dry_ += (bytes + kDryAlign - 1) / kDryAlign * kDryAlign;
  return data;
}

void Ops::release(void* data, int64_t bytes) {
  if (!dry_) do_release(data, bytes);
  held_ -= bytes;
}

AddressRange Ops::reserve() { return dry_ ? AddressRange{static_cast<char*>(dry_addresses(kDryRange)), kDryRange} : do_reserve(); }

void Ops::commit(void* data, int64_t bytes) {
  if (!dry_) do_commit(data, bytes);
  held_ += bytes;
  for (OpObserver* o : observers_) o->allocated(bytes);
}

void Ops::unreserve(const AddressRange& range, int64_t committed) {
  held_ -= committed;
  if (!dry_) return do_unreserve(range, committed);
  // The next arena may have them, so that they never run out.
  if (reinterpret_cast<int64_t>(range.begin) + range.bytes == next_dry_) next_dry_ -= range.bytes;
}

void Ops::in_use(void* data, int64_t bytes, bool used) {
  if (!dry_) do_in_use(data, bytes, used);
}

void Ops::pass(Arena& arena, int64_t key, const std::function<void()>& body) {
  if (dry_ || !observers_.empty()) body();
  else do_pass(arena, key, body);
}

void Ops::upload(const Tensor& y, const void* host) {
  if (y.count() == 0) return;
  compute("upload", {y}, {}, [&](Ops& ops, const auto& at) { ops.do_upload(at(y), host); });
}

void Ops::download(void* host, const Tensor& x) {
  if (x.count() == 0) return;
  call("download", {}, {x}, 0, [&](Ops& ops, const auto& at) {
    if (ops.dry_) std::memset(host, 0, static_cast<std::size_t>(x.count() * size_of(x.dtype)));
    else ops.do_download(host, at(x));
  });
}

void Ops::begin_download(const Tensor& x) {
  KAVA_CHECK(!downloading_, "a download that was not ended");
  require_contiguous("what is read", x);
  downloading_ = true;
  downloaded_.assign(static_cast<std::size_t>(x.count() * size_of(x.dtype)), 0);
  compute("begin_download", {}, {x}, [&](Ops& ops, const auto& at) { ops.do_begin_download(at(x)); });
}

void Ops::end_download(void* host) {
  KAVA_CHECK(downloading_, "no download was begun");
  downloading_ = false;
  if (dry_) std::memcpy(host, downloaded_.data(), downloaded_.size());
  else do_end_download(host, std::ssize(downloaded_));
}

namespace {

// Shapes and types of a group; n: rows of [x | xa].
void require_group(const LinearGroup& g, DType type) {
  require("joined", g.joined, g.joined.rows, g.joined.cols, type);
  KAVA_CHECK(g.in > 0 && g.ranks() >= 0 && static_cast<bool>(g.a) == (g.ranks() > 0), "[W | s B] of {} columns on {} inputs", g.joined.cols,
             g.in);
  require_if("bias", g.bias, 1, g.outs(), type);
  require_if("a", g.a, g.ranks(), g.in, type);
  for (const LinearPart& p : g.parts) {
    KAVA_CHECK(p.out_begin >= 0 && p.out_begin + p.outs <= g.outs() && p.rank_begin >= 0 && p.rank_begin + p.rank <= g.ranks(),
               "a part of rows {}+{} and ranks {}+{} of {} and {}", p.out_begin, p.outs, p.rank_begin, p.rank, g.outs(), g.ranks());
    if (p.rank > 0) require("b", p.b, p.outs, p.rank, type);
  }
}

void require_dropout(const Dropout& d, int64_t rows) {
  KAVA_CHECK(d.p >= 0 && d.p < 1, "dropout of {}", d.p);
  if (d.p > 0) require("row_keys", d.row_keys, rows, 2, DType::i32);
}

void require_attention(const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, const Segments& s,
                       int64_t heads, int64_t kv_heads) {
  KAVA_CHECK(kv_heads > 0 && heads % kv_heads == 0 && q.cols % heads == 0 && q.cols > 0, "q of {} columns, {}/{} heads", q.cols, heads,
             kv_heads);
  require_floating("q", q);
  require("o", o, q.rows, q.cols, q.dtype);
  require_if("lse", lse, q.rows, heads, sum_type(q.dtype));
  for (const Tensor& t : {k, v}) require("k or v", t, k.rows, q.cols / heads * kv_heads, q.dtype);
  require_index("key_offsets", s.key_offsets, s.count + 1);
  require_index("keys", s.keys, s.keys.cols);
  require_index("query_begin", s.query_begin, s.count);
  require_index("query_count", s.query_count, s.count);
  require_index("group_offsets", s.group_offsets, s.groups + 1);
}

void require_rope(const Tensor& positions, const Tensor& cosine, const Tensor& sine, int64_t rows, int64_t head_dim, DType type) {
  KAVA_CHECK(head_dim > 0 && head_dim % 2 == 0, "heads of {}", head_dim);
  require_index("positions", positions, rows);
  for (const Tensor& t : {cosine, sine}) require("cosine or sine", t, cosine.rows, head_dim / 2, sum_type(type));
}

double bytes_of_b(const LinearGroup& g) {
  double bytes = 0;
  for (const LinearPart& p : g.parts) bytes += bytes_of(p.b);
  return bytes;
}

std::vector<Tensor> with_group(std::vector<Tensor> all, const LinearGroup& g) {
  all.insert(all.end(), {g.joined, g.bias, g.a});
  for (const LinearPart& p : g.parts) all.push_back(p.b);
  return all;
}

}  // namespace

// ---- rows

void Ops::fill(const Tensor& y, double value) {
  compute("fill", {y}, {}, [&](Ops& ops, const auto& at) { ops.do_fill(at(y), value); });
}

void Ops::copy(const Tensor& y, const Tensor& x) {
  require_kin(y, x);
  require("y", y, x.rows, x.cols, y.dtype);
  compute("copy", {y}, {x}, [&](Ops& ops, const auto& at) { ops.do_copy(at(y), at(x)); });
}

void Ops::add(const Tensor& y, const Tensor& x) {
  require_floating("y", y);
  require_kin(y, x);
  require("y", y, x.rows, x.cols, y.dtype);
  compute("add", {y}, {y, x}, [&](Ops& ops, const auto& at) { ops.do_add(at(y), at(x)); });
}

void Ops::gather_rows(const Tensor& y, const Tensor& x, const Tensor& rows) {
  require_kin(y, x);
  require("y", y, rows.cols, x.cols, y.dtype);
  require_index("rows", rows, rows.cols);
  compute(
      "gather_rows", {y}, {x, rows}, [&](Ops& ops, const auto& at) { ops.do_gather_rows(at(y), at(x), at(rows)); }, beyond(x, rows.cols));
}

void Ops::scatter_rows(const Tensor& y, const Tensor& x, const Tensor& rows) {
  require_kin(y, x);
  require("x", x, rows.cols, y.cols, x.dtype);
  require_index("rows", rows, rows.cols);
  compute(
      "scatter_rows", {y}, {y, x, rows}, [&](Ops& ops, const auto& at) { ops.do_scatter_rows(at(y), at(x), at(rows)); },
      beyond(y, rows.cols));
}

void Ops::scatter_add_rows(const Tensor& y, const Tensor& x, const Tensor& rows) {
  require_floating("y", y);
  require_kin(y, x);
  require("x", x, rows.cols, y.cols, x.dtype);
  require_index("rows", rows, rows.cols);
  compute(
      "scatter_add_rows", {y}, {y, x, rows}, [&](Ops& ops, const auto& at) { ops.do_scatter_add_rows(at(y), at(x), at(rows)); },
      beyond(y, rows.cols));
}

void Ops::embed_fwd(const Tensor& x, const Tensor& table, const Tensor& extra, const Tensor& ids) {
  require_floating("x", x);
  require("table", table, table.rows, x.cols, x.dtype);
  require_if("extra", extra, extra.rows, x.cols, x.dtype);
  require_index("ids", ids, x.rows);
  compute(
      "embed_fwd", {x}, {table, extra, ids}, [&](Ops& ops, const auto& at) { ops.do_embed_fwd(at(x), at(table), at(extra), at(ids)); },
      beyond(table, x.rows) + bytes_of(extra));
}

void Ops::embed_bwd(const Tensor& dtable, const Tensor& dextra, const Tensor& dx, const Tensor& ids) {
  KAVA_CHECK(dx.dtype == DType::f32 || dx.dtype == DType::f64, "dx in {}", name_of(dx.dtype));
  for (const Tensor& t : {dtable, dextra}) require_if("dtable or dextra", t, t.rows, dx.cols, dx.dtype);
  require_index("ids", ids, dx.rows);
  compute(
      "embed_bwd", {dtable, dextra}, {dtable, dextra, dx, ids},
      [&](Ops& ops, const auto& at) { ops.do_embed_bwd(at(dtable), at(dextra), at(dx), at(ids)); },
      // Without a table only rows of new tokens are read, whose number is not known here: all of dx counts.
      beyond(dtable, dx.rows) + (dtable ? bytes_of(dextra) : 0));
}

// ---- layers

void Ops::add_rms_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& rstd, const Tensor& a, const Tensor& b, const Tensor& w,
                           double eps) {
  require_floating("y", y);
  KAVA_CHECK(sum || !b, "a sum without a place for it");
  require("a", a, y.rows, y.cols, y.dtype);
  for (const Tensor& t : {b, sum}) require_if("b or sum", t, y.rows, y.cols, y.dtype);
  require_if("rstd", rstd, y.rows, 1, sum_type(y.dtype));
  require("w", w, 1, y.cols, y.dtype);
  compute("add_rms_norm_fwd", {y, sum, rstd}, {a, b, w},
          [&](Ops& ops, const auto& at) { ops.do_add_rms_norm_fwd(at(y), at(sum), at(rstd), at(a), at(b), at(w), eps); });
}

void Ops::rms_norm_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                       const Tensor& w) {
  require_floating("x", x);
  require("dx", dx, x.rows, x.cols, x.dtype);
  require_if("dw", dw, 1, x.cols, sum_type(x.dtype));
  require_gradient("dy", dy, x.rows, x.cols, x.dtype);
  require("rstd", rstd, x.rows, 1, sum_type(x.dtype));
  require("w", w, 1, x.cols, x.dtype);
  call("rms_norm_bwd", {dx, dw}, {dx, dw, dy, x, rstd, w}, 0,
       [&](Ops& ops, const auto& at) { ops.do_rms_norm_bwd(at(arena), at(dx), at(dw), at(dy), at(x), at(rstd), at(w)); });
}

void Ops::linear_prepare(const LinearGroup& group) {
  require_group(group, group.joined.dtype);
  call(
      "linear_prepare", std::span(&group.joined, 1), with_group({}, group), 0,
      [&](Ops& ops, const auto& at) {
        if (!ops.dry_) ops.do_linear_prepare(at(group));
      },
      bytes_of(group.w()) + bytes_of(group.bias) + bytes_of(group.a));
}

void Ops::lora_fwd(Arena& arena, const Tensor& xx, const LinearGroup& group, const Dropout& dropout, Reads reads) {
  require("[x | xa]", xx, xx.rows, group.joined.cols, group.joined.dtype);
  require_group(group, xx.dtype);
  require_dropout(dropout, xx.rows);
  KAVA_CHECK(group.a, "no LoRA");
  call(
      "lora_fwd", std::span(&xx, 1), with_group({xx, dropout.row_keys}, group), product(xx.rows, group.ranks(), group.in),
      [&](Ops& ops, const auto& at) { ops.do_lora_fwd(at(arena), at(xx), at(group), at(dropout), reads); },
      bytes_of(group.joined) + bytes_of(group.bias) + bytes_of_b(group));
}

void Ops::linear_group_fwd(Arena& arena, const Tensor& y, const Tensor& xx, const LinearGroup& group, Reads reads) {
  require("[x | xa]", xx, xx.rows, group.joined.cols, group.joined.dtype);
  require_group(group, xx.dtype);
  require("y", y, xx.rows, group.outs(), xx.dtype);
  call(
      "linear_group_fwd", std::span(&y, 1), with_group({xx}, group), product(xx.rows, group.outs(), xx.cols),
      [&](Ops& ops, const auto& at) { ops.do_linear_group_fwd(at(arena), at(y), at(xx), at(group), reads); },
      bytes_of(group.a) + bytes_of_b(group));
}

void Ops::linear_group_bwd_input(Arena& arena, const Tensor& dx, const Tensor& dxa, const Tensor& dy, const LinearGroup& group,
                                 const Dropout& dropout) {
  require_group(group, dy.dtype);
  require("dy", dy, dy.rows, group.outs(), dy.dtype);
  require_if("dx", dx, dy.rows, group.in, dy.dtype);
  if (group.ranks() > 0) {
    require("dxa", dxa, dy.rows, group.ranks(), dy.dtype);
    require_dropout(dropout, dy.rows);
  }
  const int64_t ranks = group.ranks(), n = dy.rows;
  const double to_x = dx ? product(n, group.outs(), group.in) + product(n, ranks, group.in) : 0;
  call(
      "linear_group_bwd_input", std::vector{dx, dxa}, with_group({dy, dropout.row_keys}, group), to_x + product(n, group.outs(), ranks),
      [&](Ops& ops, const auto& at) { ops.do_linear_group_bwd_input(at(arena), at(dx), at(dxa), at(dy), at(group), at(dropout)); },
      bytes_of(group.bias) + bytes_of_b(group) + (dx ? 0 : bytes_of(group.w()) + bytes_of(group.a)));
}

void Ops::linear_group_bwd_params(Arena& arena, const LinearGroupGrad& grad, const Tensor& dy, const Tensor& dxa, const Tensor& xx,
                                  const LinearGroup& group, const Dropout& dropout) {
  require_group(group, dy.dtype);
  const DType sum = sum_type(dy.dtype);
  const int64_t n = dy.rows, ranks = group.ranks();
  require("dy", dy, n, group.outs(), dy.dtype);
  require("[x | xa]", xx, n, group.joined.cols, dy.dtype);
  require_if("dw", grad.dw, group.outs(), group.in, sum);
  require_if("dbias", grad.dbias, 1, group.outs(), sum);
  require_if("da", grad.da, ranks, group.in, sum);
  KAVA_CHECK(grad.db.empty() || grad.db.size() == group.parts.size(), "{} gradients of {} parts", grad.db.size(), group.parts.size());
  if (ranks > 0) {
    require("dxa", dxa, n, ranks, dy.dtype);
    require_dropout(dropout, n);
  }
  double flops = (grad.dw ? product(n, group.outs(), group.in) : 0) + (grad.da ? product(n, ranks, group.in) : 0);
  std::vector<Tensor> out{grad.dw, grad.dbias, grad.da};
  for (std::size_t j = 0; j < grad.db.size(); ++j) {
    require_if("db", grad.db[j], group.parts[j].outs, group.parts[j].rank, sum);
    if (grad.db[j]) flops += product(n, group.parts[j].outs, group.parts[j].rank);
    out.push_back(grad.db[j]);
  }
  std::vector<Tensor> in = out;
  in.insert(in.end(), {dy, dxa, xx, dropout.row_keys});
  call(
      "linear_group_bwd_params", out, with_group(std::move(in), group), flops,
      [&](Ops& ops, const auto& at) {
        ops.do_linear_group_bwd_params(at(arena), at(grad), at(dy), at(dxa), at(xx), at(group), at(dropout));
      },
      bytes_of(group.joined) + bytes_of(group.bias) + bytes_of(group.a) + bytes_of_b(group));
}

void Ops::rope_fwd(const Tensor& x, const Tensor& positions, const Tensor& cosine, const Tensor& sine, int64_t head_dim, bool inverse) {
  require_floating("x", x);
  require_rope(positions, cosine, sine, x.rows, head_dim, x.dtype);
  KAVA_CHECK(x.cols % head_dim == 0, "{} columns in heads of {}", x.cols, head_dim);
  compute(
      "rope_fwd", {x}, {x, positions, cosine, sine},
      [&](Ops& ops, const auto& at) { ops.do_rope_fwd(at(x), at(positions), at(cosine), at(sine), head_dim, inverse); },
      2 * beyond(cosine, x.rows));
}

void Ops::rope_bwd(const Tensor& dqkv, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& positions, const Tensor& cosine,
                   const Tensor& sine, int64_t head_dim) {
  require_floating("dqkv", dqkv);
  const int64_t n = dqkv.rows, q_cols = dq ? dq.cols : 0, k_cols = dk ? dk.cols : 0;
  require_rope(positions, cosine, sine, n, head_dim, dqkv.dtype);
  KAVA_CHECK(q_cols % head_dim == 0 && k_cols % head_dim == 0 && dqkv.cols == q_cols + 2 * k_cols &&
                 static_cast<bool>(dk) == static_cast<bool>(dv),
             "{} columns of dq and {} of dk in {} of heads of {}", q_cols, k_cols, dqkv.cols, head_dim);
  require_if("dq", dq, n, q_cols, dqkv.dtype);
  for (const Tensor& t : {dk, dv}) require_if("dk or dv", t, n, k_cols, sum_type(dqkv.dtype));
  compute(
      "rope_bwd", {dqkv}, {dq, dk, dv, positions, cosine, sine},
      [&](Ops& ops, const auto& at) { ops.do_rope_bwd(at(dqkv), at(dq), at(dk), at(dv), at(positions), at(cosine), at(sine), head_dim); },
      2 * beyond(cosine, n));
}

void Ops::norm_rope_fwd(const Tensor& y, const Tensor& rstd, const Tensor& x, const Tensor& w, const Tensor& positions,
                        const Tensor& cosine, const Tensor& sine, double eps) {
  require_floating("y", y);
  const int64_t head_dim = w.cols;
  require_rope(positions, cosine, sine, y.rows, head_dim, y.dtype);
  KAVA_CHECK(y.cols % head_dim == 0, "{} columns in heads of {}", y.cols, head_dim);
  require("x", x, y.rows, y.cols, y.dtype);
  require_if("rstd", rstd, y.rows, y.cols / head_dim, sum_type(y.dtype));
  require("w", w, 1, head_dim, y.dtype);
  compute(
      "norm_rope_fwd", {y, rstd}, {x, w, positions, cosine, sine},
      [&](Ops& ops, const auto& at) { ops.do_norm_rope_fwd(at(y), at(rstd), at(x), at(w), at(positions), at(cosine), at(sine), eps); },
      2 * beyond(cosine, y.rows));
}

void Ops::norm_rope_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                        const Tensor& w, const Tensor& positions, const Tensor& cosine, const Tensor& sine) {
  require_floating("x", x);
  const int64_t head_dim = w.cols;
  require_rope(positions, cosine, sine, x.rows, head_dim, x.dtype);
  KAVA_CHECK(x.cols % head_dim == 0, "{} columns in heads of {}", x.cols, head_dim);
  require("dx", dx, x.rows, x.cols, x.dtype);
  require_if("dw", dw, 1, head_dim, sum_type(x.dtype));
  require_gradient("dy", dy, x.rows, x.cols, x.dtype);
  require("rstd", rstd, x.rows, x.cols / head_dim, sum_type(x.dtype));
  require("w", w, 1, head_dim, x.dtype);
  call(
      "norm_rope_bwd", {dx, dw}, {dw, dy, x, rstd, w, positions, cosine, sine}, 0,
      [&](Ops& ops, const auto& at) {
        ops.do_norm_rope_bwd(at(arena), at(dx), at(dw), at(dy), at(x), at(rstd), at(w), at(positions), at(cosine), at(sine));
      },
      2 * beyond(cosine, x.rows));
}

void Ops::attention_fwd(Arena& arena, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Segments& segments, int64_t heads, int64_t kv_heads, double scale) {
  require_attention(o, lse, q, k, v, segments, heads, kv_heads);
  const Segments& s = segments;
  call(
      "attention_fwd", {o, lse}, {q, k, v, s.key_offsets, s.keys, s.query_begin, s.query_count, s.group_offsets}, 0,
      [&](Ops& ops, const auto& at) {
        ops.do_attention_fwd(at(arena), at(o), at(lse), at(q), at(k), at(v), at(segments), heads, kv_heads, scale);
      },
      2 * beyond(k, s.keys.cols));
}

void Ops::attention_bwd(Arena& arena, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout, const Tensor& o,
                        const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, int64_t heads,
                        int64_t kv_heads, double scale) {
  require_attention(o, lse, q, k, v, segments, heads, kv_heads);
  require("lse", lse, q.rows, heads, sum_type(q.dtype));
  for (const Tensor& t : {dq, dout}) require("dq or dout", t, q.rows, q.cols, q.dtype);
  for (const Tensor& t : {dk, dv}) require("dk or dv", t, k.rows, k.cols, sum_type(q.dtype));
  const Segments& s = segments;
  call(
      "attention_bwd", {dq, dk, dv}, {dk, dv, dout, o, lse, q, k, v, s.key_offsets, s.keys, s.query_begin, s.query_count, s.group_offsets},
      0,
      [&](Ops& ops, const auto& at) {
        ops.do_attention_bwd(at(arena), at(dq), at(dk), at(dv), at(dout), at(o), at(lse), at(q), at(k), at(v), at(segments), heads,
                             kv_heads, scale);
      },
      2 * (beyond(k, s.keys.cols) + beyond(dk, s.keys.cols)));
}

void Ops::swiglu_fwd(const Tensor& y, const Tensor& gate, const Tensor& up) {
  require_floating("y", y);
  for (const Tensor& t : {gate, up}) require("gate or up", t, y.rows, y.cols, y.dtype);
  compute("swiglu_fwd", {y}, {gate, up}, [&](Ops& ops, const auto& at) { ops.do_swiglu_fwd(at(y), at(gate), at(up)); });
}

void Ops::swiglu_bwd(const Tensor& dgate, const Tensor& dup, const Tensor& dy, const Tensor& gate, const Tensor& up) {
  require_floating("dy", dy);
  for (const Tensor& t : {dgate, dup, gate, up}) require("dgate, dup, gate or up", t, dy.rows, dy.cols, dy.dtype);
  compute("swiglu_bwd", {dgate, dup}, {dy, gate, up},
          [&](Ops& ops, const auto& at) { ops.do_swiglu_bwd(at(dgate), at(dup), at(dy), at(gate), at(up)); });
}

void Ops::gelu_fwd(const Tensor& y, const Tensor& x, Gelu form) {
  require_floating("y", y);
  require("x", x, y.rows, y.cols, y.dtype);
  compute("gelu_fwd", {y}, {x}, [&](Ops& ops, const auto& at) { ops.do_gelu_fwd(at(y), at(x), form); });
}

void Ops::gelu_bwd(const Tensor& dx, const Tensor& dy, const Tensor& x, Gelu form) {
  require_floating("x", x);
  require("dx", dx, x.rows, x.cols, x.dtype);
  require_gradient("dy", dy, x.rows, x.cols, x.dtype);
  compute("gelu_bwd", {dx}, {dy, x}, [&](Ops& ops, const auto& at) { ops.do_gelu_bwd(at(dx), at(dy), at(x), form); });
}

void Ops::add_layer_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& mean, const Tensor& rstd, const Tensor& a, const Tensor& b,
                             const Tensor& w, const Tensor& bias, double eps) {
  require_floating("y", y);
  KAVA_CHECK(sum || !b, "a sum without a place for it");
  require("a", a, y.rows, y.cols, y.dtype);
  for (const Tensor& t : {b, sum}) require_if("b or sum", t, y.rows, y.cols, y.dtype);
  for (const Tensor& t : {mean, rstd}) require("mean or rstd", t, y.rows, 1, sum_type(y.dtype));
  for (const Tensor& t : {w, bias}) require("w or bias", t, 1, y.cols, y.dtype);
  compute("add_layer_norm_fwd", {y, sum, mean, rstd}, {a, b, w, bias}, [&](Ops& ops, const auto& at) {
    ops.do_add_layer_norm_fwd(at(y), at(sum), at(mean), at(rstd), at(a), at(b), at(w), at(bias), eps);
  });
}

void Ops::layer_norm_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& db, const Tensor& dy, const Tensor& x,
                         const Tensor& mean, const Tensor& rstd, const Tensor& w) {
  require_floating("x", x);
  require("dx", dx, x.rows, x.cols, x.dtype);
  for (const Tensor& t : {dw, db}) require_if("dw or db", t, 1, x.cols, sum_type(x.dtype));
  require_gradient("dy", dy, x.rows, x.cols, x.dtype);
  for (const Tensor& t : {mean, rstd}) require("mean or rstd", t, x.rows, 1, sum_type(x.dtype));
  require("w", w, 1, x.cols, x.dtype);
  call("layer_norm_bwd", {dx, dw, db}, {dx, dw, db, dy, x, mean, rstd, w}, 0, [&](Ops& ops, const auto& at) {
    ops.do_layer_norm_bwd(at(arena), at(dx), at(dw), at(db), at(dy), at(x), at(mean), at(rstd), at(w));
  });
}

}  // namespace kava
