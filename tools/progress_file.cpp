#include "tools/progress_file.h"

#include <fstream>

#include "engine/files/parts.h"

namespace kava {

namespace {
constexpr auto kPause = std::chrono::seconds(5);
}

ProgressFile::ProgressFile(const std::filesystem::path& run, int64_t first_step, int64_t total_steps)
    : path_(run / "progress.json"),
      first_step_(first_step),
      total_steps_(total_steps),
      start_(std::chrono::steady_clock::now()),
      written_(start_ - kPause) {}

void ProgressFile::validation(int64_t step, const Validation& validation, bool writes) {
  validation_ = validation.values;
  validation_["step"] = step;
  if (writes && last_) write();
}

void ProgressFile::end() {
  if (last_ && last_->first.step != written_step_) write();
}

void ProgressFile::step(const StepReport& report, const Speed& speed) {
  last_.emplace(report, speed);
  if (std::chrono::steady_clock::now() - written_ >= kPause || report.step == total_steps_) write();
}

// Neither flushed nor through the calls that a run's safety rests on: a progress that is lost costs nothing, and none may stop a run.
void ProgressFile::write() {
  const auto& [r, speed] = *last_;
  written_ = std::chrono::steady_clock::now(), written_step_ = r.step;
  const double seconds = std::chrono::duration<double>(written_ - start_).count();
  const auto done = static_cast<double>(r.step - first_step_);
  Json json = {{"step", r.step},
               {"total_steps", total_steps_},
               {"percent", 100.0 * static_cast<double>(r.step) / static_cast<double>(std::max<int64_t>(1, total_steps_))},
               {"eta_s", done > 0 ? Json(seconds / done * static_cast<double>(total_steps_ - r.step)) : Json()},
               {"metrics", Json(step_metrics(r, speed))}};
  if (!validation_.is_null()) json["metrics"]["valid"] = validation_;
  std::error_code ignored;
  const std::filesystem::path part = part_beside(path_);
  {
    std::ofstream out(part, std::ios::binary);
    out << json.dump(1) << "\n";
    if (!out.flush()) return (void)std::filesystem::remove(part, ignored);
  }
  std::error_code failed;
  std::filesystem::rename(part, path_, failed);
  if (failed) std::filesystem::remove(part, ignored);
}

}  // namespace kava
