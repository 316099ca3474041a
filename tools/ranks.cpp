#include "tools/ranks.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "engine/cli.h"
#include "engine/device/cuda_module.h"
#include "engine/error.h"

namespace kava {

namespace {

// All ranks know of it and end with its code.
struct AgreedRefusal {
  Error error;
  bool tell;  // on this rank
};

// One line for each key, its section in front.
std::vector<std::string> keys_and_values(const std::string& toml) {
  std::vector<std::string> lines;
  std::istringstream in(toml);
  std::string section;
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with('[')) section = line.substr(1, line.size() - 2) + ".";
    else if (!line.empty()) lines.push_back(section + line);
  }
  return lines;
}

void silence() {
  if (!std::freopen("/dev/null", "w", stdout)) throw Error(Exit::internal, "/dev/null", "cannot be opened");
}

}  // namespace

void add_rank_options(CLI::App& app, RankOptions& o) {
  const char* group = "Ranks (found from torchrun, mpirun or srun without these)";
  auto add = [&](const char* name, std::optional<std::string>& value, const char* text) {
    app.add_option(name, value, text)->group(group);
  };
  add("--rank", o.rank, "This process among the ranks, from 0");
  add("--world-size", o.world_size, "How many ranks there are");
  add("--local-rank", o.local_rank, "This process among those of its machine: the device that it takes");
  add("--rendezvous", o.rendezvous, "HOST:PORT where rank 0 listens and the others come");
  add("--rendezvous-timeout", o.rendezvous_timeout, "Seconds to wait for all ranks to come (default: 120)");
  add("--comm-timeout", o.comm_timeout, "Seconds that the ranks wait for each other later (default: 600)");
}

int on_ranks(const RankOptions& options, const DeviceOptions& device, const std::function<int(Comm& comm, const World& world)>& body) {
  const World world = find_world(options, [](const char* name) -> const char* { return std::getenv(name); });
  if (!world.note.empty()) print_note(world.note);
  const std::unique_ptr<Comm> comm = join(world, world.size > 1 && !takes_cuda(device));
  if (!comm->leads()) silence();
  try {
    require_same(*comm, "the program", release_text("kava"), Exit::usage);
    const int code = body(*comm, world);
    comm->close();
    return code;
  } catch (const AgreedRefusal& refusal) {
    // Said before any rank ends: the launcher then ends the others, whatever they are about to say.
    if (refusal.tell) print_note("error: " + escaped(refusal.error.what(), 16384));
    comm->close();
    return static_cast<int>(refusal.error.code());
  }
}

void together(Comm& comm, const char* what, const std::function<void()>& body) {
  if (comm.alone()) return body();
  std::string mine;
  Exit code = Exit::ok;
  try {
    body();
  } catch (const Error& e) {
    code = e.code(), mine = fmt::format("{} {}", static_cast<int>(code), e.what());
  }
  const std::vector<std::string> all = comm.gather(mine, what);
  const auto first = std::ranges::find_if(all, [](const std::string& text) { return !text.empty(); });
  if (first == all.end()) return;
  const std::size_t space = first->find(' ');
  const Exit agreed = static_cast<Exit>(std::atoi(first->c_str()));
  const auto rank = static_cast<int>(first - all.begin());
  const Error error(agreed, rank == 0 ? "" : fmt::format("rank {} of {}", rank, comm.size()), first->substr(space + 1));
  throw AgreedRefusal{error, rank == comm.rank()};
}

void require_same(Comm& comm, const char* what, std::string_view mine, Exit code) {
  if (comm.alone()) return;
  const std::vector<std::string> all = comm.gather(mine, what);
  for (std::size_t r = 1; r < all.size(); ++r)
    if (all[r] != all[0])
      throw AgreedRefusal{
          Error(code, what,
                fmt::format("is not the same on all ranks: rank {} has {}, rank 0 has {}", r, escaped(all[r], 200), escaped(all[0], 200)),
                "start all ranks with the same"),
          comm.leads()};
}

void require_same_config(Comm& comm, const RunConfig& config) {
  if (comm.alone()) return;
  RunConfig copy = config;
  copy.model.path.clear();
  for (std::string* path : {&copy.model.adapter, &copy.data.valid})
    if (!path->empty()) *path = "there";
  for (DataFile& file : copy.data.train) file.path = "there";
  const std::vector<std::string> all = comm.gather(to_toml(copy), "comparing configurations");
  const std::vector<std::string> zero = keys_and_values(all[0]);
  for (std::size_t r = 1; r < all.size(); ++r) {
    if (all[r] == all[0]) continue;
    const std::vector<std::string> other = keys_and_values(all[r]);
    const auto [a, b] = std::ranges::mismatch(zero, other);
    throw AgreedRefusal{
        Error(Exit::usage, "the configuration",
              fmt::format("is not the same on all ranks: rank {} has {}, rank 0 has {}", r,
                          b == other.end() ? "other keys" : escaped(*b, 200), a == zero.end() ? "other keys" : escaped(*a, 200)),
              "start all ranks with the same"),
        comm.leads()};
  }
}

int ranks_on_its_memory(Comm& comm, const Ops& ops) {
  if (comm.alone()) return 1;
  char host[256] = {};
  ::gethostname(host, sizeof host - 1);
  const std::string own = fmt::format("{} {}", host, device_address(ops));
  const std::vector<std::string> all = comm.gather(own, "counting the ranks of a machine or device");
  return static_cast<int>(std::ranges::count(all, own));
}

}  // namespace kava
