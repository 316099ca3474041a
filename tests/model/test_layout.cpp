// Where the rows of a step lie, judged by what a row may see and not by how its list was made.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <set>
#include <tuple>

#include "models/layout.h"

using namespace kava;

namespace {

Layout layout_of(const RunConfig& config, std::span<const Sample> samples, int64_t first_index) {
  return make_layout(config, recipe_of(config), samples, first_index);
}

// Questions, traces and answers of many lengths; every id says where it stands.
std::vector<Sample> samples_of_lengths() {
  const std::array<int32_t, 4> lengths[] = {
      {5, 8, 5, 3}, {3, 0, 6, 3}, {1, 3, 2, 0}, {4, 40, 7, 6}, {1, 0, 1, 0}};  // n_q, n_c, n_a, prompt
  std::vector<Sample> samples;
  for (const auto& [q, c, a, prompt] : lengths) {
    Sample s;
    for (int32_t i = 0; i < q; ++i) s.question.push_back(100 + i);
    for (int32_t i = 0; i < c; ++i) s.trace.push_back(200 + i);
    for (int32_t i = 0; i < a; ++i) s.answer.push_back(300 + i);
    s.prompt = prompt;
    samples.push_back(s);
  }
  return samples;
}

// What is known of a step row.
struct RowFacts {
  int64_t pass = 0;
  int32_t sample = 0, position = 0, id = 0;
  bool latent = false;  // fed, or the latent token
};
constexpr int32_t kFed = -4;

std::vector<RowFacts> facts_of(const Layout& layout, int64_t first_index) {
  std::vector<RowFacts> rows;
  for (std::size_t t = 0; t < layout.passes.size(); ++t) {
    const Pass& p = layout.passes[t];
    REQUIRE(p.begin == std::ssize(rows));
    REQUIRE(p.rows() == p.fed() + std::ssize(p.ids));
    REQUIRE(std::ssize(p.positions) == p.rows());
    REQUIRE(std::ssize(p.row_keys) == 2 * p.rows());
    for (int64_t r = 0; r < p.rows(); ++r) {
      const auto at = static_cast<std::size_t>(r);
      const int32_t id = r < p.fed() ? kFed : p.ids[at - static_cast<std::size_t>(p.fed())];
      rows.push_back({static_cast<int64_t>(t), p.row_keys[2 * at] - static_cast<int32_t>(first_index), p.positions[at], id,
                      id == kFed || id == kLatentId});
    }
  }
  REQUIRE(layout.rows == std::ssize(rows));
  return rows;
}

int64_t latent_rows(const Layout& layout, int64_t first_index = 0) {
  return std::ranges::count_if(facts_of(layout, first_index), &RowFacts::latent);
}

// The queries of a segment see their key list but for what follows their own row: every position up to their own exactly once, of their own
// sample, of this pass or an earlier one. Only the teacher's rows see the trace, only the student's the latents.
void check_sight(const Layout& layout, const std::vector<RowFacts>& rows, const Pass& p, int64_t pass, bool live) {
  const SegmentList& s = live ? p.live_segments : p.segments;
  std::vector<int32_t> query_rows;
  if (live) query_rows = p.live;
  else
    for (int64_t r = 0; r < p.rows(); ++r) query_rows.push_back(static_cast<int32_t>(r));
  std::vector<int> queried(query_rows.size(), 0);
  for (int64_t i = 0; i < s.count(); ++i) {
    const auto at = static_cast<std::size_t>(i);
    const std::span<const int32_t> keys(s.keys.data() + s.key_offsets[at], s.keys.data() + s.key_offsets[at + 1]);
    const int32_t n = s.query_count[at];
    REQUIRE(n >= 1);
    REQUIRE(n <= std::ssize(keys));
    CHECK(std::ssize(keys) <= s.most_keys);
    for (int32_t j = 0; j < n; ++j) {
      const auto query = static_cast<std::size_t>(s.query_begin[at] + j);
      ++queried[query];
      const auto row = static_cast<int32_t>(p.begin) + query_rows[query];
      const RowFacts& own = rows[static_cast<std::size_t>(row)];
      const std::span<const int32_t> seen = keys.first(keys.size() - static_cast<std::size_t>(n - 1 - j));
      CHECK(seen.back() == row);
      std::set<int32_t> positions;
      for (int32_t key : seen) {
        const RowFacts& k = rows[static_cast<std::size_t>(key)];
        CHECK(k.sample == own.sample);
        CHECK(k.pass <= pass);
        positions.insert(k.position);
        if (k.latent || k.id == kBotId) CHECK((own.latent || own.id < 0 || own.pass == std::ssize(layout.passes) - 1));
        if (k.id >= 200 && k.id < 300) CHECK((own.id >= 200 && !own.latent));
      }
      CHECK(std::ssize(positions) == std::ssize(seen));
      CHECK(*positions.begin() == 0);
      CHECK(*positions.rbegin() == own.position);
      CHECK(std::ssize(positions) == own.position + 1);
    }
  }
  CHECK(std::ranges::all_of(queried, [](int q) { return q == 1; }));
  CHECK(s.group_offsets.back() == s.count());
  CHECK(std::ssize(s.group_offsets) == layout.samples + 1);
}

RunConfig config_of(Method method, int64_t M, int64_t T, bool sharing, bool pruning) {
  RunConfig c;
  c.method = method, c.latent.count = M, c.latent.iterations = T, c.step.prefix_sharing = sharing, c.step.prune_latents = pruning;
  return c;
}

}  // namespace

TEST_CASE("pruning runs 87 of the 96 latent rows of 24 latents in 3 iterations") {
  const std::vector<Sample> samples = samples_of_lengths();
  const auto one = std::span(samples).first(1);
  CHECK(latent_rows(layout_of(config_of(Method::kava, 24, 3, true, false), one, 0)) == 96);
  CHECK(latent_rows(layout_of(config_of(Method::kava, 24, 3, true, true), one, 0)) == 87);
  CHECK(latent_rows(layout_of(config_of(Method::kava, 24, 3, true, true), samples, 7), 7) == 87 * std::ssize(samples));
  CHECK(latent_rows(layout_of(config_of(Method::kava, 24, 0, true, true), one, 0)) == 24);
  CHECK(latent_rows(layout_of(config_of(Method::kava, 24, 24, true, true), one, 0)) == 24);
  CHECK(latent_rows(layout_of(config_of(Method::kava, 24, 30, true, true), one, 0)) == 24);
}

TEST_CASE("every row of a step sees each position up to its own once, and has its own dropout key") {
  const Method method = GENERATE(Method::kava, Method::full_cot, Method::no_cot);
  const auto [M, T] = GENERATE(std::pair(5, 3), std::pair(5, 0), std::pair(5, 5), std::pair(3, 5), std::pair(1, 1), std::pair(24, 3));
  const bool sharing = GENERATE(true, false), pruning = GENERATE(true, false);
  CAPTURE(name_of(method), M, T, sharing, pruning);
  const std::vector<Sample> samples = samples_of_lengths();
  const RunConfig config = config_of(method, M, T, sharing, pruning);
  const Layout layout = layout_of(config, samples, 3);
  const std::vector<RowFacts> rows = facts_of(layout, 3);
  for (std::size_t t = 0; t < layout.passes.size(); ++t) {
    check_sight(layout, rows, layout.passes[t], static_cast<int64_t>(t), false);
    check_sight(layout, rows, layout.passes[t], static_cast<int64_t>(t), true);
  }
  std::set<std::pair<int32_t, int32_t>> keys;
  for (const Pass& p : layout.passes)
    for (std::size_t r = 0; r < p.row_keys.size(); r += 2) keys.insert({p.row_keys[r], p.row_keys[r + 1]});
  CHECK(std::ssize(keys) == layout.rows);
  CHECK(layout.sample_index == std::vector<int32_t>{3, 4, 5, 6, 7});
}

TEST_CASE("rows whose hidden state is read are live, and a question's others are not") {
  const auto [M, T] = GENERATE(std::pair(5, 3), std::pair(5, 0), std::pair(3, 3), std::pair(24, 3));
  const bool sharing = GENERATE(true, false), pruning = GENERATE(true, false);
  CAPTURE(M, T, sharing, pruning);
  const std::vector<Sample> samples = samples_of_lengths();
  const Layout layout = layout_of(config_of(Method::kava, M, T, sharing, pruning), samples, 0);
  const std::vector<RowFacts> rows = facts_of(layout, 0);
  // Live rows are numbered in the order of rows, pass by pass.
  int32_t live = 0;
  for (int32_t number : layout.live_of)
    if (number >= 0) CHECK(number == live++);
  CHECK(live == layout.live_rows);
  auto is_live = [&](int32_t row) { return layout.live_of[static_cast<std::size_t>(row)] >= 0; };
  for (const Pass& p : layout.passes) {
    CHECK(p.live_rows() == std::ssize(p.live));
    for (std::size_t i = 0; i < p.live.size(); ++i)
      CHECK(layout.live_of[static_cast<std::size_t>(p.begin + p.live[i])] == p.live_begin + std::ssize(std::span(p.live).first(i)));
    for (const Feed& f : p.feeds)
      if (f.hidden_row >= 0) CHECK(is_live(f.hidden_row));
  }
  for (const auto* read : {&layout.query_rows, &layout.codi_student_rows, &layout.codi_teacher_rows})
    for (int32_t row : *read) CHECK(is_live(row));
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const bool question = rows[r].id >= 100 && rows[r].id < 200;
    const bool last = question && rows[r].id - 100 + 1 == std::ssize(samples[static_cast<std::size_t>(rows[r].sample)].question);
    if (question && !last) CHECK_FALSE(is_live(static_cast<int32_t>(r)));
  }
}

TEST_CASE("predictions, matched rows and queries are those of the method") {
  const auto [M, T] = GENERATE(std::pair(5, 3), std::pair(5, 0), std::pair(3, 3));
  const bool sharing = GENERATE(true, false), pruning = GENERATE(true, false);
  const Queries queries = GENERATE(Queries::answer, Queries::prompt_and_answer);
  CAPTURE(M, T, sharing, pruning, name_of(queries));
  const std::vector<Sample> samples = samples_of_lengths();
  RunConfig config = config_of(Method::kava, M, T, sharing, pruning);
  config.rkv.queries = queries;
  const Layout layout = layout_of(config, samples, 0);
  const std::vector<RowFacts> rows = facts_of(layout, 0);
  std::vector<int32_t> row_of_live(static_cast<std::size_t>(layout.live_rows));
  for (std::size_t r = 0; r < rows.size(); ++r)
    if (layout.live_of[r] >= 0) row_of_live[static_cast<std::size_t>(layout.live_of[r])] = static_cast<int32_t>(r);
  auto facts = [&](int32_t row) { return rows.at(static_cast<std::size_t>(row)); };

  std::size_t student = 0, teacher = 0;
  for (std::size_t b = 0; b < samples.size(); ++b) {
    const Sample& s = samples[b];
    const auto sample = static_cast<int32_t>(b), n_q = static_cast<int32_t>(s.question.size()), n_c = static_cast<int32_t>(s.trace.size());
    // The id before each target predicts it.
    auto check_predictions = [&](const Supervised& from, std::size_t& at, int32_t first_id, int32_t first_position,
                                 std::vector<int32_t> targets) {
      for (std::size_t i = 0; i < targets.size(); ++i, ++at) {
        const RowFacts f = facts(row_of_live[static_cast<std::size_t>(from.live_rows[at])]);
        CHECK(from.targets[at] == targets[i]);
        CHECK(std::tuple(f.sample, f.id, f.position) ==
              std::tuple(sample, i == 0 ? first_id : targets[i - 1], first_position + static_cast<int32_t>(i)));
      }
    };
    check_predictions(layout.student, student, kEotId, n_q + 1 + M, s.answer);
    std::vector<int32_t> tail = s.trace;
    tail.insert(tail.end(), s.answer.begin(), s.answer.end());
    check_predictions(layout.teacher, teacher, s.question.back(), n_q - 1, tail);

    CHECK(layout.trace_offsets[b + 1] - layout.trace_offsets[b] == n_c);
    for (int32_t i = 0; i < n_c; ++i) {
      const RowFacts f = facts(layout.trace_rows[static_cast<std::size_t>(layout.trace_offsets[b] + i)]);
      CHECK(std::tuple(f.sample, f.id, f.position) == std::tuple(sample, 200 + i, n_q + i));
    }
    const int32_t skipped = queries == Queries::answer ? s.prompt : 0;
    CHECK(layout.query_offsets[b + 1] - layout.query_offsets[b] == std::ssize(s.answer) - skipped);
    for (int32_t i = layout.query_offsets[b]; i < layout.query_offsets[b + 1]; ++i) {
      const RowFacts f = facts(layout.query_rows[static_cast<std::size_t>(i)]);
      const int32_t token = skipped + i - layout.query_offsets[b];
      CHECK(std::tuple(f.sample, f.id, f.position) == std::tuple(sample, 300 + token, n_q + n_c + token));
    }
    // The last token before the answer: of the prompt, else eot there and the last of trace or question here.
    const RowFacts x = facts(layout.codi_student_rows[b]), y = facts(layout.codi_teacher_rows[b]);
    CHECK(std::tuple(x.sample, x.id, x.position) == std::tuple(sample, s.prompt > 0 ? 300 + s.prompt - 1 : kEotId, n_q + 1 + M + s.prompt));
    CHECK(std::tuple(y.sample, y.id, y.position) == std::tuple(sample,
                                                               s.prompt > 0 ? 300 + s.prompt - 1
                                                               : n_c > 0    ? 200 + n_c - 1
                                                                            : 100 + n_q - 1,
                                                               n_q + n_c + s.prompt - 1));
    for (int32_t i = 0; i < M; ++i) {
      const RowFacts f = facts(layout.latent_rows[b * static_cast<std::size_t>(M) + static_cast<std::size_t>(i)]);
      CHECK(f.latent);
      CHECK(std::tuple(f.sample, f.position) == std::tuple(sample, n_q + 1 + i));
      // Pruned, latent i is final from pass i+1 on.
      CHECK(f.pass == (pruning ? std::min(i + 1, T) : T));
    }
  }
  CHECK(student == layout.student.targets.size());
  CHECK(teacher == layout.teacher.targets.size());
}

TEST_CASE("with as many passes as latents, each attends the one row of every latent before it") {
  constexpr std::size_t kLatents = 1024;
  RunConfig config;
  config.latent.count = config.latent.iterations = kLatents;
  const std::vector<Sample> samples(1, samples_of_lengths()[0]);
  const Layout layout = layout_of(config, samples, 0);
  REQUIRE(layout.latents == kLatents);
  std::vector<int32_t> rows;
  for (std::size_t t = 1; t < kLatents; ++t) {  // the answer lies in the last pass too
    const Pass& pass = layout.passes[t];
    REQUIRE(pass.rows() == 1);
    rows.push_back(static_cast<int32_t>(pass.begin));
    const std::vector<int32_t>& keys = pass.segments.keys;
    REQUIRE(keys.size() == samples[0].question.size() + 1 + t);
    REQUIRE(std::equal(rows.begin(), rows.end(), keys.end() - static_cast<int64_t>(t)));
  }
}
