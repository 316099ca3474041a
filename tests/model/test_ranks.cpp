// Training on several ranks, as threads: any number of them gives the bytes of one.
#include <algorithm>
#include <cmath>

#include "tests/model/train_rig.h"
#include "tests/rank_threads.h"

using namespace kava;

namespace {

struct TrainedRank {
  std::vector<double> values, m, v;
  std::vector<double> reports;  // of all steps
  bool operator==(const TrainedRank&) const = default;
};

TrainedRank train(Comm& comm, const std::vector<std::string>& sets, int64_t steps) {
  TinyRun run(sets);
  Trainer trainer(*run.model, run.samples, {}, &comm);
  TrainedRank t;
  for (int64_t i = 0; i < steps; ++i) {
    const StepReport r = trainer.step();
    for (double x : {r.losses.student_ce, r.losses.teacher_ce, r.losses.kv, r.losses.codi, r.loss, r.grad_norm, r.lr, r.flops})
      t.reports.push_back(x);
  }
  const ParameterStore& p = run.model->parameters;
  t.values = p.get(p.value()), t.m = p.get(p.m()), t.v = p.get(p.v());
  return t;
}

}  // namespace

TEST_CASE("any number of ranks trains to the bytes of one") {
  // Five samples in batches of four: two forwards or four, and a last batch of one, where most ranks have nothing to do.
  for (const std::vector<std::string>& sets :
       {std::vector<std::string>{"train.batch=4", "train.micro_batch=1", "train.max_steps=8"},
        {"train.batch=5", "train.micro_batch=2", "train.max_steps=8", "model.dtype=bf16"},
        {"train.batch=4", "train.micro_batch=1", "train.max_steps=8", "train.trainable=all", "method=codi", "latent.count=3"},
        {"train.batch=4", "train.micro_batch=1", "train.max_steps=8", "method=coconut", "loss.mean=forward", "latent.token_init="}}) {
    INFO(fmt::format("{}", fmt::join(sets, " ")));
    Comm alone;
    const TrainedRank one = train(alone, sets, 5);
    for (int n : {2, 3, 4}) {
      INFO(n);
      std::vector<TrainedRank> ranks(static_cast<std::size_t>(n));
      for (const std::string& failed :
           on_rank_threads(n, 60, [&](Comm& comm) { ranks[static_cast<std::size_t>(comm.rank())] = train(comm, sets, 5); }))
        CHECK(failed == "");
      for (const TrainedRank& r : ranks) CHECK(r == one);
    }
  }
}

TEST_CASE("what one rank is asked, all do: they stop after the same step, with one checkpoint") {
  TempFolder folder;
  std::vector<int64_t> steps(3);
  const auto failed = on_rank_threads(3, 60, [&](Comm& comm) {
    TinyRun run({"train.batch=4", "train.micro_batch=1", "train.max_steps=50", "train.checkpoint_every=100"});
    Trainer trainer(*run.model, run.samples, {}, &comm);
    std::optional<RunFolder> out;
    if (comm.leads()) out.emplace(folder.path() / "run"), out->open(run.config, {});
    TrainingHooks hooks;
    hooks.stop = [&] { return comm.rank() == 2 && trainer.state().step == 5; };
    hooks.checkpoint = [&] { return comm.rank() == 1 && trainer.state().step == 2; };
    if (trainer.run(out ? &*out : nullptr, hooks)) throw Error(Exit::internal, "", "was not stopped");
    steps[static_cast<std::size_t>(comm.rank())] = trainer.state().step;
  });
  for (const std::string& f : failed) CHECK(f == "");
  CHECK(steps == std::vector<int64_t>{5, 5, 5});
  CHECK(verify_checkpoint(folder.path() / "run/checkpoints/step_2").step == 2);
  CHECK(verify_checkpoint(folder.path() / "run/checkpoints/step_5").step == 5);
}

TEST_CASE("every rank of a step that is not finite names the same samples, each having looked at its part") {
  // A head of its own: the embedding's row is read where its token is fed alone.
  const std::vector<std::string> sets{"train.batch=5", "train.micro_batch=1", "train.max_steps=2",
                                      "model.path=" + kGolden + "models/llama_scaled"};
  const auto named = [&](Comm& comm) {
    TinyRun run(sets);
    for (const std::size_t guilty : {1, 3, 4}) {
      const int32_t token = run.samples[guilty].question.back();
      run.ops->fill(run.model->embedding.row_range(token, token + 1), std::nan(""));
    }
    Trainer trainer(*run.model, run.samples, {}, &comm);
    std::vector<int64_t> rows;
    for (const Sample* s : trainer.step().not_finite) rows.push_back(s->row);
    return rows;
  };
  Comm alone;
  const std::vector<int64_t> one = named(alone);
  CHECK(one.size() >= 3);
  std::vector<std::vector<int64_t>> all(2);
  for (const std::string& f : on_rank_threads(2, 60, [&](Comm& comm) { all[static_cast<std::size_t>(comm.rank())] = named(comm); }))
    CHECK(f == "");
  CHECK((all[0] == one && all[1] == one));
}

TEST_CASE("ranks that hold different weights write no checkpoint") {
  TempFolder folder;
  const auto failed = on_rank_threads(2, 60, [&](Comm& comm) {
    TinyRun run({"train.batch=4", "train.micro_batch=1", "train.max_steps=2"});
    if (comm.rank() == 1) run.model->parameters.set("new_tokens.weight", std::vector<double>(3 * 16, 0.5));
    Trainer trainer(*run.model, run.samples, {}, &comm);
    std::optional<RunFolder> out;
    if (comm.leads()) out.emplace(folder.path() / "run"), out->open(run.config, {});
    trainer.run(out ? &*out : nullptr, {});
  });
  for (const std::string& f : failed) CHECK(f.find("6 step 2: rank 1 holds other weights than rank 0") == 0);
  CHECK(!std::filesystem::exists(folder.path() / "run/checkpoints"));
}
