// The parts in which a gradient leaves a rank.
#include <fmt/ranges.h>

#include <algorithm>

#include "models/buckets.h"
#include "tests/model/train_rig.h"

using namespace kava;

TEST_CASE("the parts of a gradient hold each of its elements once, and those of a layer come when it is done") {
  for (const std::vector<std::string>& sets : {std::vector<std::string>{},
                                               {"train.trainable=all"},
                                               {"kv.projection=true", "model.path=" + kGolden + "models/qwen2"},
                                               {"model.path=" + kGolden + "models/gpt2", "train.trainable=all"}}) {
    INFO(fmt::format("{}", fmt::join(sets, " ")));
    TinyRun run(sets);
    const Model& model = *run.model;
    const Tensor grad = model.parameters.grad();
    auto place = [&](const void* data) {
      return (static_cast<const char*>(data) - static_cast<const char*>(grad.data)) / size_of(grad.dtype);
    };
    for (const int64_t least : {int64_t{1}, int64_t{3000}, int64_t{1} << 40}) {
      INFO(least);
      const std::vector<Bucket> buckets = gradient_buckets(model, least);
      std::vector<int> held(static_cast<std::size_t>(grad.cols));
      for (std::size_t i = 0; i < buckets.size(); ++i) {
        if (i > 0) CHECK(buckets[i].layer < buckets[i - 1].layer);
        for (const Tensor& t : buckets[i].ranges)
          for (int64_t n = 0; n < t.cols; ++n) ++held[static_cast<std::size_t>(place(t.data) + n)];
        // Nothing of a lower layer is there yet; where no layer waits for others, all of its own is.
        for (const Parameter& p : model.parameters.all())
          for (int64_t l = 0; l <= buckets[i].layer; ++l) {
            if (p.name.find(model.shape.architecture().layer(l)) == std::string::npos) continue;
            const bool held_here = std::ranges::any_of(buckets[i].ranges, [&](const Tensor& t) {
              return p.offset < place(t.data) + t.cols && p.offset + p.rows * p.cols > place(t.data);
            });
            if (l < buckets[i].layer) CHECK_FALSE(held_here);
            else if (least == 1) CHECK(held_here);
          }
      }
      CHECK(buckets.back().layer == -1);
      CHECK(std::ranges::all_of(held, [](int n) { return n == 1; }));
      if (least == 1) CHECK(std::ssize(buckets) == model.shape.layers + 1);
      if (least > 1 << 30) CHECK(buckets.size() == 1);
    }
  }
}
