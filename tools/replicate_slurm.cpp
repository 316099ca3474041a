#include "tools/replicate_slurm.h"

#include <fmt/ranges.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <map>

#include "engine/error.h"
#include "engine/files/files.h"
#include "tools/replicate_run.h"
#include "tools/say.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

const TableRow& root_of(const ReplicaTable& table, std::size_t row) {
  const TableRow* root = &table.rows[row];
  while (const TableRow* start = table.find(root->start)) root = start;
  return *root;
}

// For each work its task; -1 for the data, which every task has.
std::vector<int64_t> tasks_of(const ReplicaTable& table, const std::vector<Work>& works) {
  std::map<std::pair<int64_t, std::string>, int64_t> numbers;
  std::vector<int64_t> out;
  for (const Work& work : works)
    out.push_back(work.kind == WorkKind::data
                      ? -1
                      : numbers.emplace(std::pair(work.seed, root_of(table, work.row).name), numbers.size()).first->second);
  return out;
}

std::string quoted(const std::string& word) {
  std::string out = "'";
  for (char c : word) out += c == '\'' ? "'\\''" : std::string(1, c);
  return out + "'";
}

// As sbatch takes it: in the folder's own name nothing is a pattern.
std::string log_pattern(const fs::path& out) {
  std::string text = "\"";
  for (char c : out.string()) {
    if (c == '"' || c == '\\') text += '\\';
    text += c == '%' ? "%%" : std::string(1, c);
  }
  return text + "/slurm_%A_%a.log\"";
}

}  // namespace

std::vector<Work> task_works(const ReplicaTable& table, const std::vector<Work>& works, int64_t task) {
  const std::vector<int64_t> tasks = tasks_of(table, works);
  if (std::ranges::find(tasks, task) == tasks.end())
    throw Error(Exit::usage, "--task", fmt::format("{} is beyond the last", task), "see replicate --slurm");
  std::vector<Work> out;
  std::map<std::size_t, std::size_t> index;
  for (std::size_t i = 0; i < works.size(); ++i) {
    if (tasks[i] != task && tasks[i] != -1) continue;
    index[i] = out.size();
    out.push_back(works[i]);
    for (std::size_t& need : out.back().needs) need = index.at(need);
  }
  return out;
}

int submit_to_slurm(const ReplicaTable& table, const std::vector<Work>& works, const fs::path& out,
                    const std::vector<std::string>& options) {
  const std::vector<int64_t> tasks = tasks_of(table, works);
  const int64_t last = *std::ranges::max_element(tasks);
  // The data comes first, here: tasks would make it side by side.
  std::vector<Work> data;
  std::ranges::copy_if(works, std::back_inserter(data), [](const Work& w) { return w.kind == WorkKind::data; });
  if (const int code = run_works(table, data, out, {}); code != 0) return code;
  std::string arguments;
  for (const std::string& option : options) arguments += " " + quoted(option);
  const std::string script = fmt::format(
      "#!/bin/sh\n#SBATCH --job-name={}\n#SBATCH --array=0-{}\n#SBATCH --requeue\n#SBATCH --open-mode=append\n#SBATCH --signal=B:TERM@120\n"
      "#SBATCH --output={}\n"
      "# A signal of the job is passed on, so that each run writes a checkpoint. 75: stopped, to be gone on with; without a signal the\n"
      "# budget is over, and a job that ends with 75 may be queued again by Slurm itself.\n"
      "{} {} --out {} --task \"$SLURM_ARRAY_TASK_ID\"{} &\n"
      "child=$! told=\ntrap 'told=yes; kill -TERM $child' TERM INT USR1\n"
      "while :; do wait $child; code=$?; kill -0 $child 2>/dev/null || break; done\n"
      "[ $code -ne 75 ] || [ -n \"$told\" ] || code=1\n"
      "[ $code -ne 75 ] || scontrol requeue \"$SLURM_ARRAY_JOB_ID\"_\"$SLURM_ARRAY_TASK_ID\"\nexit $code\n",
      quoted(table.name), last, log_pattern(out), quoted((program_folder() / "replicate").string()), quoted(table.file.string()),
      quoted(out.string()), arguments);
  const std::string file = (out / "replicate.sbatch").string();
  write_file(file, script);
  std::fflush(stdout);
  const int status = std::system(fmt::format("command -v sbatch >/dev/null || exit 127; exec sbatch {}", quoted(file)).c_str());
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
    throw Error(Exit::preflight, "--slurm",
                WIFEXITED(status) && WEXITSTATUS(status) == 127 ? "there is no sbatch" : "sbatch refused the job",
                "submit " + shown_path(file) + " where Slurm is");
  return 0;
}

}  // namespace kava
