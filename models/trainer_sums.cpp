// The part of a step that ranks share: the gradient and the sums of a batch, whichever rank makes a forward.
#include <algorithm>

#include "engine/device/ordered_sum.h"
#include "models/trainer.h"

namespace kava {

// The batch's gradient, and the sums of all its forwards; returns the fewest operations that they take.
double Trainer::gradients(std::span<const Sample> batch, const Recipe& recipe, std::span<const BatchTotals> forwards) {
  const bool own = comm_.link() || (comm_.alone() && forwards.size() == 1);
  model_.ops.fill(scalars_, 0);
  comm_.set_place(fmt::format("step {}", state_.step + 1));
  const double flops = own ? sum_own(batch, recipe, forwards) : sum_in_order(batch, recipe, forwards);
  return comm_.alone() ? flops : gather_sums(flops, own ? 0 : std::ssize(forwards));
}

// Forward by forward, as one rank does. While a rank's backend works as it is called, what the layers are done with leaves meanwhile.
double Trainer::sum_in_order(std::span<const Sample> batch, const Recipe& recipe, std::span<const BatchTotals> forwards) {
  const int64_t n = std::ssize(forwards), ranks = comm_.size();
  ParameterStore& parameters = model_.parameters;
  ArenaScope scope(arena_);
  OrderedSum sum(comm_, model_.ops, arena_, total_.tensor(), parameters.grad(), "adding gradients");
  double flops = 0;
  for (int64_t first = 0; first < n; first += ranks) {
    const int64_t mine = first + comm_.rank();
    parameters.zero_grad();
    sum.begin(static_cast<int>(std::min(ranks, n - first)), first == 0);
    left_ = 0;
    auto leave_layer = [&](int64_t layer) {
      leave(layer, [&](const Bucket& bucket) {
        for (const Tensor& range : bucket.ranges) sum.send(range);
      });
      sum.advance();
    };
    if (mine < n)
      flops += forward(batch, recipe, forwards, mine, model_.ops.queues() ? nullptr : std::function<void(int64_t)>(leave_layer));
    for (int64_t layer = model_.shape.layers - 1; layer >= -1; --layer) leave_layer(layer);
    sum.finish();
  }
  model_.ops.copy(parameters.grad(), total_.tensor());
  return flops;
}

// Each rank adds up its own forwards; while the last goes back through the layers, what they are done with leaves, the losses with the
// last. The sums of a forward that is another's are zero here, so theirs are exact.
double Trainer::sum_own(std::span<const Sample> batch, const Recipe& recipe, std::span<const BatchTotals> forwards) {
  const int64_t n = std::ssize(forwards), ranks = comm_.size();
  DeviceLink* link = comm_.link();
  if (link) link->wait();
  model_.parameters.zero_grad();
  left_ = 0;
  auto leave_layer = [&](int64_t layer) {
    leave(layer, [&](const Bucket& bucket) {
      std::vector<Tensor> parts = bucket.ranges;
      if (left_ == buckets_.size()) parts.push_back(scalars_);
      link->sum(parts, "adding gradients");
    });
  };
  double flops = 0;
  for (int64_t i = comm_.rank(); i < n; i += ranks) {
    const bool last = i + ranks >= n;
    flops += forward(batch, recipe, forwards, i, link && last ? std::function<void(int64_t)>(leave_layer) : nullptr);
  }
  if (!link) return flops;
  for (int64_t layer = model_.shape.layers - 1; layer >= -1; --layer) leave_layer(layer);
  link->join();
  return flops;
}

// Sends what is whole once `layer` is done, unless it is sent already.
void Trainer::leave(int64_t layer, const std::function<void(const Bucket&)>& send) {
  if (left_ == buckets_.size() || buckets_[left_].layer != layer) return;
  const Bucket& bucket = buckets_[left_++];
  send(bucket);
}

// The sums of the first n forwards, each from the rank that has made it; returns the flops of all ranks.
double Trainer::gather_sums(double flops, int64_t n) {
  const int64_t ranks = comm_.size(), each = ((n + ranks - 1) / ranks) * kStepSums + 1;
  std::vector<double> sums(static_cast<std::size_t>(n * kStepSums)), mine(static_cast<std::size_t>(each)),
      all(static_cast<std::size_t>(each * ranks));
  const Tensor scalars = scalars_.col_range(0, n * kStepSums);
  if (n > 0) model_.ops.download(sums.data(), scalars);
  auto copy = [&](std::vector<double>& from, int64_t at, std::vector<double>& to, int64_t place) {
    std::copy_n(from.begin() + at, kStepSums, to.begin() + place);
  };
  for (int64_t i = comm_.rank(); i < n; i += ranks) copy(sums, i * kStepSums, mine, i / ranks * kStepSums);
  mine.back() = flops;
  comm_.gather(all.data(), mine.data(), each * static_cast<int64_t>(sizeof(double)), "adding losses");
  for (int64_t i = 0; i < n; ++i) copy(all, i % ranks * each + i / ranks * kStepSums, sums, i * kStepSums);
  if (n > 0) model_.ops.upload(scalars, sums.data());
  double total = 0;
  for (int64_t r = 1; r <= ranks; ++r) total += all[static_cast<std::size_t>(r * each - 1)];
  return total;
}

}  // namespace kava
