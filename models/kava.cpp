#include "models/kava.h"

#include <algorithm>
#include <array>

#include "engine/device/host.h"
#include "engine/device/indices.h"
#include "models/flops.h"
#include "models/latent.h"

namespace kava {

namespace {

constexpr int64_t kSecondDraw = int64_t{1} << 30;  // beyond every index of a batch: the masks of a second forward

// Everything one forward of the batch owns, in the order in which it is made.
class Step {
 public:
  Step(Model& model, Arena& arena, std::span<const Sample> samples, const BatchTotals& totals, const StepOptions& options)
      : model_(model),
        ops_(model.ops),
        arena_(arena),
        config_(model.config),
        totals_(totals),
        options_(options),
        samples_(samples),
        recipe_(options.recipe.value_or(recipe_of(model.config))),
        layout_(make_layout(model.config, recipe_, samples, options.first_index)),
        transformer_(model, arena, Use::train, options.step, options.dropout) {
    B_ = layout_.samples, M_ = layout_.latents;
    KD_ = model.shape.kv_heads * model.shape.head_dim;
    type_ = model.storage, sum_ = sum_type(type_);
    const bool by_slots = config_.rkv.short_ == Short::zero;
    for (const Sample& s : samples)
      valid_.push_back(static_cast<int32_t>(by_slots ? M_ : std::min<int64_t>(M_, static_cast<int64_t>(s.trace.size()))));
    for (const Sample& s : samples) {
      const Lengths n = lengths_of(recipe_, s, options.first_index + static_cast<int64_t>(judged_.size()));
      judged_.push_back(recipe_.student ? n.student_tail : static_cast<int64_t>(s.answer.size()));
      before_judged_.push_back(recipe_.student ? 0 : n.teacher_tail - judged_.back());
    }
    int32_t last = 0;
    for (const Pass& p : layout_.passes)
      for (int32_t position : p.positions) last = std::max(last, position);
    model.ensure_positions(last + 1);
  }

  void run(const Tensor& sums) {
    if (options_.count_forced) correct_ = arena_.alloc(DType::i32, 1, B_);
    forward();
    if (options_.backward) transformer_.allocate_gradients(layout_.rows, layout_.live_rows);
    cross_entropy(sums.col_range(kStudentCe, kTeacherCe + 1));
    if (config_.kv.weight > 0) kv_loss(sums.col_range(kKv, kKv + 1));
    if (config_.codi.weight > 0) codi_loss(sums.col_range(kCodi, kCodi + 1));
    if (options_.dump && totals_.latents > 0) dump_latents();
    if (options_.flops)
      *options_.flops += has_fewest_rows(config_) ? minimum_flops(config_, model_.shape, layout_)
                                                  : minimum_flops(config_, recipe_, model_.shape, samples_);
    if (options_.backward) backward();
  }

  int64_t forced_correct() const {
    std::vector<int32_t> correct(static_cast<std::size_t>(B_));
    ops_.download(correct.data(), correct_);
    return std::ranges::count(correct, 1);
  }

 private:
  Tensor indices(std::span<const int32_t> host) { return upload_indices(ops_, arena_, host); }
  std::vector<double> host(const Tensor& t) const { return to_host(ops_, t); }
  void dump(const std::string& name, std::vector<int64_t> shape, std::vector<double> values, int axis) {
    DumpTensor d;
    d.shape = std::move(shape), d.values = std::move(values), d.axis = axis;
    options_.dump->emplace(name, std::move(d));
  }

  void forward() {
    int64_t most = 0;
    for (const Pass& p : layout_.passes) most = std::max(most, p.rows());
    transformer_.allocate(layout_.rows, layout_.live_rows, most);
    for (const Pass& p : layout_.passes) {
      passes_.push_back(upload_pass(ops_, arena_, p));
      feeds_.push_back(upload_feeds(ops_, arena_, layout_, p));
      const DevicePass& d = passes_.back();
      feed_latents(model_, arena_, transformer_, d, feeds_.back());
      check_indices(p.ids, kLatentId, model_.shape.vocab);
      if (d.ids.cols > 0) ops_.embed_fwd(transformer_.inputs(d).row_range(d.fed, d.rows()), model_.embedding, model_.new_tokens, d.ids);
      transformer_.forward(d);
    }
  }

  // Rows of the head's product: the student's, then the teacher's.
  struct HeadRows {
    std::vector<int32_t> live, targets, classes, owners;
  };
  HeadRows head_rows() const {
    HeadRows all;
    for (int32_t teacher : {0, 1}) {
      if (teacher ? !recipe_.teacher : !recipe_.student) continue;
      const Supervised& rows = teacher ? layout_.teacher : layout_.student;
      all.live.insert(all.live.end(), rows.live_rows.begin(), rows.live_rows.end());
      all.targets.insert(all.targets.end(), rows.targets.begin(), rows.targets.end());
      all.classes.insert(all.classes.end(), rows.targets.size(), teacher);
      // A sample is judged by the student's predictions, or by the teacher's where it is alone.
      const bool judged = teacher == 0 || !recipe_.student;
      for (std::size_t b = 0; b < judged_.size() && judged; ++b) {
        all.owners.insert(all.owners.end(), static_cast<std::size_t>(before_judged_[b]), -1);
        all.owners.insert(all.owners.end(), static_cast<std::size_t>(judged_[b]), static_cast<int32_t>(b));
      }
      all.owners.resize(all.targets.size(), -1);
    }
    check_distinct(all.live, layout_.live_rows);
    check_indices(all.targets, 0, model_.shape.vocab);
    return all;
  }

  // Weighted means over all supervised tokens of the optimiser batch.
  void cross_entropy(const Tensor& sums) {
    ArenaScope scope(arena_);
    const HeadRows rows = head_rows();
    const int64_t n = static_cast<int64_t>(rows.targets.size()), C = model_.shape.hidden, V = model_.shape.vocab;
    const Tensor live = indices(rows.live), targets = indices(rows.targets), classes = indices(rows.classes), owners = indices(rows.owners);
    const Tensor h = arena_.alloc(type_, n, C);
    ops_.gather_rows(h, transformer_.all_hidden(), live);
    const std::array weights{config_.loss.student / static_cast<double>(std::max<int64_t>(totals_.student_tokens, 1)),
                             config_.loss.teacher / static_cast<double>(std::max<int64_t>(totals_.teacher_tokens, 1))};
    const bool backward = options_.backward && (config_.loss.student > 0 || config_.loss.teacher > 0);
    const Tensor dh = backward ? arena_.alloc(sum_, n, C) : Tensor{};
    const Tensor logits = options_.dump ? arena_.alloc(sum_, n, V) : Tensor{};
    ops_.head_cross_entropy(arena_, sums, dh, backward ? model_.dhead : Tensor{}, correct_, logits, h, model_.head, targets, classes,
                            owners, weights);
    if (backward) ops_.scatter_add_rows(transformer_.dhidden(), dh, live);
    if (!options_.dump) return;
    const int64_t teacher = std::ranges::count(rows.classes, 1);
    if (n > teacher) dump("logits.student", {n - teacher, V}, host(logits.row_range(0, n - teacher)), 0);
    if (teacher > 0) dump("logits.teacher", {teacher, V}, host(logits.row_range(n - teacher, n)), 0);
  }

  std::size_t layer_count() const { return transformer_.layers().size(); }
  Tensor live_indices(std::span<const int32_t> rows) {
    std::vector<int32_t> live;
    for (int32_t r : rows) live.push_back(layout_.live_of[static_cast<std::size_t>(r)]);
    check_distinct(live, layout_.live_rows);
    return indices(live);
  }
  std::vector<int32_t> positions_of(std::span<const int32_t> rows) const {
    std::vector<int32_t> all;
    for (const Pass& p : layout_.passes) all.insert(all.end(), p.positions.begin(), p.positions.end());
    std::vector<int32_t> out;
    for (int32_t r : rows) out.push_back(all[static_cast<std::size_t>(r)]);
    return out;
  }

  // Keys as they are matched: as they lie in the cache, or turned back.
  void unrotate(const Tensor& k, const Tensor& positions) {
    if (config_.kv.keys == Keys::pre_rope) ops_.rope_fwd(k, positions, model_.cosine, model_.sine, model_.shape.head_dim, true);
  }

  // Kept teacher pairs, and the students' K and V of pass T as they are matched.
  struct KvLayer {
    Tensor target[2], student[2], projected[2];
  };

  void kv_loss(const Tensor& loss) {
    const std::size_t L = layer_count();
    const int64_t n = B_ * M_;
    const Tensor trace = indices(layout_.trace_rows), trace_offsets = indices(layout_.trace_offsets);
    const Tensor queries = indices(layout_.query_rows), queries_live = live_indices(layout_.query_rows),
                 query_offsets = indices(layout_.query_offsets);
    const Tensor trace_positions = indices(positions_of(layout_.trace_rows)), latent_positions = indices(positions_of(layout_.latent_rows));
    check_distinct(layout_.latent_rows, layout_.rows);
    check_indices(layout_.trace_rows, 0, layout_.rows);
    check_indices(layout_.query_rows, 0, layout_.rows);
    check_offsets(layout_.trace_offsets, std::ssize(layout_.trace_rows));
    check_offsets(layout_.query_offsets, std::ssize(layout_.query_rows));
    check_indices(valid_, 0, M_ + 1);
    latent_rows_ = indices(layout_.latent_rows);
    const Tensor valid = indices(valid_);
    sample_index_ = indices(layout_.sample_index);
    const Tensor moments[2] = {arena_.alloc(sum_, static_cast<int64_t>(L), 3), arena_.alloc(sum_, static_cast<int64_t>(L), 3)};
    std::vector<KvLayer> layers(L);
    RkvDump rkv;
    for (std::size_t l = 0; l < L; ++l) {
      KvLayer& k = layers[l];
      for (Tensor& t : k.target) t = arena_.alloc(type_, n, KD_);
      for (Tensor& t : k.student) t = arena_.alloc(type_, n, KD_);
      select(l, k, trace, trace_offsets, l + 1 == L ? queries_live : queries, query_offsets, trace_positions, rkv);
      ops_.gather_rows(k.student[0], transformer_.layers()[l].k, latent_rows_);
      ops_.gather_rows(k.student[1], transformer_.layers()[l].v, latent_rows_);
      unrotate(k.student[0], latent_positions);
      for (int i = 0; i < 2; ++i) {
        k.projected[i] = k.student[i];
        if (const TrainedGroup* map = kv_map(l, i)) {
          k.projected[i] = arena_.alloc(type_, n, KD_);
          ops_.linear_group_fwd(arena_, by_head(k.projected[i]), by_head(k.student[i]), map->map);
        }
        ops_.moments(arena_, moments[i].row_range(static_cast<int64_t>(l), static_cast<int64_t>(l) + 1), k.target[i], valid);
      }
    }
    const double mean = totals_.kv_slots > 0 ? 1.0 / static_cast<double>(totals_.kv_slots) : 0;
    const double all = static_cast<double>(L) * static_cast<double>(KD_);
    const double factor = 0.5 * (config_.kv.reduction == KvReduction::slot_sum ? mean : mean / all);
    for (int i = 0; i < 2; ++i) {
      const Tensor global = config_.kv.std == Std::global ? inverse(moments[i]) : Tensor{};
      for (std::size_t l = 0; l < L; ++l) {
        const int64_t at = static_cast<int64_t>(l);
        const Tensor scale = config_.kv.std == Std::layer ? inverse(moments[i].row_range(at, at + 1)) : global;
        distill_kv(l, i, layers[l], valid, scale, factor, loss, latent_positions);
      }
    }
    if (options_.dump) dump_kv(layers, rkv);
  }

  Tensor inverse(const Tensor& moments, int power = 1) {
    Tensor t = arena_.alloc(sum_, 1, 1);
    ops_.inverse_std(t, moments, power);
    return t;
  }

  const TrainedGroup* kv_map(std::size_t l, int i) const {
    if (model_.kv_projection.empty()) return nullptr;
    return i == 0 ? &model_.kv_projection[l].k : &model_.kv_projection[l].v;
  }
  Tensor by_head(const Tensor& t) const { return t.reshape(t.rows * model_.shape.kv_heads, model_.shape.head_dim); }

  struct RkvDump {
    std::vector<double> importance, redundancy, score;
    std::vector<std::vector<int32_t>> kept;  // per layer [B*M, K]
  };

  void select(std::size_t l, const KvLayer& out, const Tensor& trace, const Tensor& trace_offsets, const Tensor& queries,
              const Tensor& query_offsets, const Tensor& trace_positions, RkvDump& rkv) {
    ArenaScope scope(arena_);
    const LayerState& s = transformer_.layers()[l];
    const int64_t tokens = trace.cols, K = model_.shape.kv_heads;
    Tensor match;
    if (config_.kv.keys == Keys::pre_rope) {
      match = arena_.alloc(type_, tokens, KD_);
      ops_.gather_rows(match, s.k, trace);
      unrotate(match, trace_positions);
    }
    RkvOptions o;
    o.policy = config_.rkv.policy, o.group = config_.rkv.group, o.lambda = config_.rkv.lambda;
    o.order_by_score = config_.rkv.order == Order::score;
    o.latents = M_, o.heads = model_.shape.heads, o.kv_heads = K;
    o.seed = static_cast<uint64_t>(config_.seed), o.step = options_.step, o.layer = static_cast<uint32_t>(l);
    o.samples = sample_index_;
    const Tensor kept = arena_.alloc(DType::i32, B_ * M_, K);
    Tensor scores[3];
    if (options_.dump)
      for (Tensor& t : scores) t = arena_.alloc(sum_, K, tokens);
    ops_.rkv_select(arena_, out.target[0], out.target[1], kept, scores[0], scores[1], scores[2], s.q, queries, query_offsets, s.k, s.v,
                    trace, trace_offsets, match, o);
    if (!options_.dump) return;
    auto append = [](std::vector<double>& to, const std::vector<double>& x) { to.insert(to.end(), x.begin(), x.end()); };
    append(rkv.importance, host(scores[0]));
    append(rkv.redundancy, host(scores[1]));
    append(rkv.score, host(scores[2]));
    rkv.kept.emplace_back(static_cast<std::size_t>(kept.count()));
    if (kept.count() > 0) ops_.download(rkv.kept.back().data(), kept);
  }

  // One of K (i = 0) and V of one layer: its part of the loss, and the gradient to the latents' rows.
  void distill_kv(std::size_t l, int i, const KvLayer& k, const Tensor& valid, const Tensor& inverse, double factor, const Tensor& loss,
                  const Tensor& positions) {
    ArenaScope scope(arena_);
    const int64_t n = B_ * M_;
    const Tensor d = arena_.alloc(sum_, n, KD_);
    ops_.distill(arena_, loss, d, k.projected[i], k.target[i], valid, inverse, config_.kv.loss, factor, config_.kv.weight);
    if (!options_.backward) return;
    Tensor dstudent = d;
    if (const TrainedGroup* map = kv_map(l, i)) {
      const Tensor dy = arena_.alloc(type_, n, KD_), dx = arena_.alloc(type_, n, KD_);
      ops_.copy(dy, d);
      ops_.linear_group_bwd_input(arena_, by_head(dx), {}, by_head(dy), map->map, {});
      ops_.linear_group_bwd_params(arena_, map->grad, by_head(dy), {}, by_head(k.student[i]), map->map, {});
      ops_.copy(dstudent, dx);
    }
    if (i == 0 && config_.kv.keys == Keys::pre_rope)
      ops_.rope_fwd(dstudent, positions, model_.cosine, model_.sine, model_.shape.head_dim, false);
    LayerState& s = transformer_.layers()[l];
    ops_.scatter_add_rows(i == 0 ? s.dk : s.dv, dstudent, latent_rows_);
  }

  void gather_states(std::span<const Tensor> to, const Transformer& from, const Tensor& rows, const Tensor& live) {
    const std::size_t embedded = to.size() - layer_count();
    for (std::size_t s = 0; s + 1 < to.size(); ++s)
      ops_.gather_rows(to[s], s < embedded ? from.all_inputs() : from.layers()[s + 1 - embedded].residual1, rows);
    ops_.gather_rows(to.back(), from.all_hidden(), live);
  }

  // Only dropout tells a second forward of the teacher from the first.
  bool separate_target() const {
    return config_.codi.target == CodiTarget::separate && options_.dropout && config_.train.trainable == Trainable::lora &&
           config_.lora.dropout > 0;
  }

  // Of a teacher that runs by itself, without gradient and with masks of its own.
  void gather_separate_states(std::span<const Tensor> to) {
    ArenaScope scope(arena_);
    Recipe alone;
    alone.teacher = true;
    const Layout layout = make_layout(config_, alone, samples_, options_.first_index + kSecondDraw);
    Transformer teacher(model_, arena_, Use::train, options_.step);
    teacher.allocate(layout.rows, layout.live_rows, layout.rows);
    const DevicePass d = upload_pass(ops_, arena_, layout.passes[0]);
    ops_.embed_fwd(teacher.inputs(d), model_.embedding, model_.new_tokens, d.ids);
    teacher.forward(d);
    std::vector<int32_t> live;
    for (int32_t row : layout.codi_teacher_rows) live.push_back(layout.live_of[static_cast<std::size_t>(row)]);
    gather_states(to, teacher, indices(layout.codi_teacher_rows), indices(live));
  }

  // States are those after the blocks, the last one after the final norm; with codi.states = "all" the first is the embedding's output.
  void codi_loss(const Tensor& loss) {
    const std::size_t first = config_.codi.states == CodiStates::all ? 1 : 0, S = layer_count() + first;
    const int64_t C = model_.shape.hidden;
    const Tensor student = indices(layout_.codi_student_rows), teacher = indices(layout_.codi_teacher_rows);
    const Tensor student_live = live_indices(layout_.codi_student_rows), teacher_live = live_indices(layout_.codi_teacher_rows);
    std::vector<int32_t> ones(static_cast<std::size_t>(B_), 1);
    const Tensor valid = indices(ones), moments = arena_.alloc(sum_, static_cast<int64_t>(S), 3);
    std::vector<int32_t> in_pass;
    for (int32_t r : layout_.codi_student_rows) in_pass.push_back(static_cast<int32_t>(r - layout_.passes.back().begin));
    check_distinct(in_pass, layout_.passes.back().rows());
    const Tensor tap_rows = indices(in_pass);
    std::vector<Tensor> x(S), target(S);
    for (std::size_t s = 0; s < S; ++s) x[s] = arena_.alloc(type_, B_, C), target[s] = arena_.alloc(type_, B_, C);
    gather_states(x, transformer_, student, student_live);
    if (separate_target()) gather_separate_states(target);
    else gather_states(target, transformer_, teacher, teacher_live);
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
      else if (s < first) ops_.scatter_add_rows(transformer_.dinput(), d, student);
      else taps_.push_back({tap_rows, d});
    }
    if (options_.dump) {
      std::vector<double> of_student, of_teacher;
      for (std::size_t s = 0; s < S; ++s) {
        const std::vector<double> a = host(x[s]), b = host(target[s]);
        of_student.insert(of_student.end(), a.begin(), a.end());
        of_teacher.insert(of_teacher.end(), b.begin(), b.end());
      }
      dump("codi.student", {static_cast<int64_t>(S), B_, C}, std::move(of_student), 1);
      dump("codi.teacher", {static_cast<int64_t>(S), B_, C}, std::move(of_teacher), 1);
    }
  }

  void backward() {
    for (std::size_t i = passes_.size(); i-- > 0;) {
      const DevicePass& p = passes_[i];
      const bool last = i + 1 == passes_.size();  // the student's answer, and so the taps, lie in the last pass
      transformer_.backward(p, last ? std::span<const Tap>(taps_) : std::span<const Tap>());
      feed_latents_backward(model_, arena_, transformer_, p, feeds_[i]);
      if (p.ids.cols > 0 && (model_.dembedding || model_.dnew_tokens))
        ops_.embed_bwd(model_.dembedding, model_.dnew_tokens, transformer_.dinput().row_range(p.begin + p.fed, p.end), p.ids);
    }
  }

  // [B*M rows, K*D] of every layer as [L, B, K, M, D].
  std::vector<double> by_layer(const std::vector<Tensor>& layers) const {
    const int64_t K = model_.shape.kv_heads, D = model_.shape.head_dim;
    std::vector<double> out;
    for (const Tensor& t : layers) {
      const std::vector<double> x = host(t);
      for (int64_t b = 0; b < B_; ++b)
        for (int64_t k = 0; k < K; ++k)
          for (int64_t m = 0; m < M_; ++m)
            for (int64_t d = 0; d < D; ++d) out.push_back(x[static_cast<std::size_t>((b * M_ + m) * KD_ + k * D + d)]);
    }
    return out;
  }

  void dump_by_layer(const std::string& name, const std::vector<Tensor>& layers) {
    const ModelConfig& m = model_.shape;
    dump(name, {m.layers, B_, m.kv_heads, M_, m.head_dim}, by_layer(layers), 1);
  }

  void dump_kv(const std::vector<KvLayer>& layers, RkvDump& rkv) {
    const int64_t L = model_.shape.layers, K = model_.shape.kv_heads, tokens = static_cast<int64_t>(layout_.trace_rows.size());
    std::vector<Tensor> t;
    for (const char* name : {"target.k", "target.v", "latent.k", "latent.v"}) {
      t.clear();
      const int i = name[std::string_view(name).size() - 1] == 'v';
      for (const KvLayer& k : layers) t.push_back(name[0] == 't' ? k.target[i] : k.projected[i]);
      dump_by_layer(name, t);
    }
    dump("rkv.importance", {L, K, tokens}, std::move(rkv.importance), 2);
    dump("rkv.redundancy", {L, K, tokens}, std::move(rkv.redundancy), 2);
    dump("rkv.score", {L, K, tokens}, std::move(rkv.score), 2);
    DumpTensor kept;
    kept.shape = {B_, L, K, M_}, kept.is_index = true;
    for (int64_t b = 0; b < B_; ++b)
      for (int64_t l = 0; l < L; ++l)
        for (int64_t k = 0; k < K; ++k)
          for (int64_t m = 0; m < M_; ++m)
            kept.indices.push_back(rkv.kept[static_cast<std::size_t>(l)][static_cast<std::size_t>((b * M_ + m) * K + k)]);
    options_.dump->emplace("rkv.kept", std::move(kept));
  }

  // The batch may hold samples with more latents and passes than this forward.
  void dump_latents() {
    const int64_t C = model_.shape.hidden, N = totals_.latents, T = totals_.iterations;
    const std::vector<double> inputs = host(transformer_.all_inputs());
    std::vector<double> out;
    for (int64_t t = 0; t <= T; ++t)
      for (int64_t b = 0; b < B_; ++b)
        for (int64_t i = 0; i < N; ++i) {
          const bool here = t <= layout_.iterations && i < M_;
          const int64_t row = here ? layout_.latent_input_rows[static_cast<std::size_t>((t * B_ + b) * M_ + i)] : -1;
          if (row < 0) out.insert(out.end(), static_cast<std::size_t>(C), 0.0);
          else out.insert(out.end(), inputs.begin() + row * C, inputs.begin() + (row + 1) * C);
        }
    dump("latent.inputs", {T + 1, B_, N, C}, std::move(out), 1);
    if (config_.kv.weight > 0) return;  // written with their targets
    std::vector<int32_t> real = layout_.latent_rows;
    std::erase(real, -1);
    for (int i = 0; i < 2; ++i) dump_latent_pairs(i == 0 ? "latent.k" : "latent.v", i, real);
  }

  // K (i = 0) or V of the latents' final rows, zero where a sample has fewer than the batch's most.
  void dump_latent_pairs(const char* name, int i, std::span<const int32_t> real) {
    const ModelConfig& m = model_.shape;
    const int64_t n = static_cast<int64_t>(real.size()), N = totals_.latents, D = m.head_dim;
    std::vector<double> out;
    for (std::size_t l = 0; l < layer_count(); ++l) {
      ArenaScope scope(arena_);
      const LayerState& s = transformer_.layers()[l];
      const Tensor x = arena_.alloc(type_, n, KD_), y = arena_.alloc(type_, n, KD_);
      if (n > 0) ops_.gather_rows(x, i == 0 ? s.k : s.v, indices(real));
      if (i == 0 && n > 0) unrotate(x, indices(positions_of(real)));
      const TrainedGroup* map = kv_map(l, i);
      if (map && n > 0) ops_.linear_group_fwd(arena_, by_head(y), by_head(x), map->map);
      const std::vector<double> rows = n > 0 ? host(map ? y : x) : std::vector<double>{};
      std::vector<int64_t> at(static_cast<std::size_t>(B_ * N), -1);
      for (int64_t slot = 0, next = 0; slot < B_ * M_; ++slot)
        if (layout_.latent_rows[static_cast<std::size_t>(slot)] >= 0) at[static_cast<std::size_t>(slot / M_ * N + slot % M_)] = next++;
      for (int64_t b = 0; b < B_; ++b)
        for (int64_t k = 0; k < m.kv_heads; ++k)
          for (int64_t j = 0; j < N; ++j)
            for (int64_t d = 0; d < D; ++d) {
              const int64_t row = at[static_cast<std::size_t>(b * N + j)];
              out.push_back(row < 0 ? 0.0 : rows[static_cast<std::size_t>(row * KD_ + k * D + d)]);
            }
    }
    dump(name, {m.layers, B_, m.kv_heads, N, D}, std::move(out), 1);
  }

  Model& model_;
  Ops& ops_;
  Arena& arena_;
  const RunConfig& config_;
  const BatchTotals& totals_;
  const StepOptions& options_;
  std::span<const Sample> samples_;
  const Recipe recipe_;
  Layout layout_;
  Transformer transformer_;
  int64_t B_ = 0, M_ = 0, KD_ = 0;
  DType type_ = DType::f32, sum_ = DType::f32;
  std::vector<int32_t> valid_;
  std::vector<int64_t> judged_, before_judged_;  // supervised tokens of each sample that have to be right, and before them
  std::vector<DevicePass> passes_;
  std::vector<FeedState> feeds_;
  std::vector<Tap> taps_;
  Tensor latent_rows_, sample_index_, correct_;
};

}  // namespace

void add_step(Model& model, Arena& arena, std::span<const Sample> samples, const BatchTotals& totals, const StepOptions& options,
              const Tensor& sums) {
  ArenaScope scope(arena);
  Step(model, arena, samples, totals, options).run(sums);
}

StepLosses run_step(Model& model, Arena& arena, std::span<const Sample> samples, const BatchTotals& totals, const StepOptions& options) {
  ArenaScope scope(arena);
  const Tensor sums = arena.alloc(DType::f64, 1, kStepSums);
  model.ops.fill(sums, 0);
  Step step(model, arena, samples, totals, options);
  step.run(sums);
  StepLosses losses = losses_of(to_host(model.ops, sums), totals);
  if (options.count_forced) losses.forced_correct = step.forced_correct();
  return losses;
}

}  // namespace kava
