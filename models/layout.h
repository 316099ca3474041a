// Where everything of a step lies: the packed rows of its passes, the attention segments, and the rows that the objective reads. Host data.
//
// A step computes T+1 passes over one set of key/value rows. Pass 0 holds for each sample [Q, bot, latents] and the teacher's tail
// [C, prompt, A, EOS] on the same Q; pass t the latents that can still reach the result and are not final yet; pass T also the student's
// tail [eot, rest, prompt, A, EOS]. N and T are each sample's own: one with fewer passes ends in an earlier one. Within a pass the fed
// latents of all samples come first, then the rows that come from token ids, sample by sample.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "engine/config/config.h"
#include "engine/data/data.h"
#include "models/recipe.h"

namespace kava {

/// Ids of the three new tokens among a step's row ids: row -1-id of new_tokens.weight.
constexpr int32_t kBotId = -1, kEotId = -2, kLatentId = -3;

struct SegmentList {
  std::vector<int32_t> key_offsets{0}, keys, query_begin, query_count, group_offsets{0};
  int64_t most_keys = 0, most_queries = 0, fewest_queries = 0;
  int64_t count() const { return static_cast<int64_t>(query_begin.size()); }
  /// keys: all key rows, the queries' own last.
  void add(std::span<const int32_t> before, int32_t own_begin, int32_t own_count, int32_t first_query, int32_t queries);
  void end_group() { group_offsets.push_back(static_cast<int32_t>(count())); }
};

/// Input of a fed latent row. Rows are step rows.
struct Feed {
  int32_t hidden_row = -1;  // its input is prj(final hidden state of this row) (+ that row's input, for update = residual)
  int32_t copy_row = -1;    // or the input of this row: slot 0 is fixed
};

struct Pass {
  int64_t begin = 0, end = 0;            // rows of the step; the first feeds.size() are fed
  int64_t live_begin = 0, live_end = 0;  // the same for live rows: those whose final hidden state somebody reads
  std::vector<Feed> feeds;
  std::vector<int32_t> ids;        // of the token rows: >= 0 a row of the embedding, < 0 a new token
  std::vector<int32_t> positions;  // of all rows
  std::vector<int32_t> row_keys;   // of all rows: (sample in the optimiser batch, row within the sample), for dropout
  std::vector<int32_t> live;       // live rows, counted from begin
  SegmentList segments, live_segments;
  int64_t rows() const { return end - begin; }
  int64_t live_rows() const { return live_end - live_begin; }
  int64_t fed() const { return static_cast<int64_t>(feeds.size()); }
};

/// Rows that predict supervised tokens, in sample order, and what they predict.
struct Supervised {
  std::vector<int32_t> live_rows, targets;
};

struct Layout {
  int64_t samples = 0, latents = 0, iterations = 0;  // N and T of the sample with the most, whether all of the T are run or not
  int64_t rows = 0, live_rows = 0;
  std::vector<Pass> passes;
  std::vector<int32_t> live_of;  // step row -> live row, -1 where it is not live
  Supervised student, teacher;
  std::vector<int32_t> trace_rows, trace_offsets{0};  // the teacher's trace tokens (step rows, all of pass 0)
  std::vector<int32_t> query_rows, query_offsets{0};  // the teacher's answer tokens whose queries score the trace
  std::vector<int32_t> latent_rows;        // [B, M]: the step rows that hold the final K,V of each latent, -1 where there is none
  std::vector<int32_t> latent_input_rows;  // [T+1, B, M]: the step row fed with it, -1 where it was not computed
  std::vector<int32_t> codi_student_rows, codi_teacher_rows;  // [B]
  std::vector<int32_t> sample_index;                          // [B]: index in the optimiser batch
};

/// Passes behind pass 0 that are run for a sample: with pruning no more than it has latents, since then every one is final.
int32_t iterations_run(const RunConfig& config, const Cut& cut);

/// The layout of one forward of the recipe over `samples`; first_index: index of the first of them in the optimiser batch. latents_live:
/// the final hidden states of pass T's latents are wanted too, which no row of the step reads.
Layout make_layout(const RunConfig& config, const Recipe& recipe, std::span<const Sample> samples, int64_t first_index,
                   bool latents_live = false);

}  // namespace kava
