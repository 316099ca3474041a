#include "watch.h"

#include <link.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <mutex>
#include <utility>

#include "gpu_emulated.h"
#include "watcher.h"

namespace simt {

thread_local Watcher* t_watcher = nullptr;

namespace {

Watched g_watched;
bool g_watching = false;
std::mutex g_mutex;
std::vector<LaunchCounts> g_counts;

std::string text_of(Shadow::Clash clash) {
  switch (clash) {
    case Shadow::Clash::unwritten:
      return "reads what was not written";
    case Shadow::Clash::copy_under_way:
      return "touches what a copy is under way to, since ";
    case Shadow::Clash::read_write:
      return "writes what was read without a barrier between, at ";
    case Shadow::Clash::write_read:
      return "reads what was written without a barrier between, at ";
    case Shadow::Clash::write_write:
      return "writes what was written without a barrier between, at ";
    case Shadow::Clash::none:
      break;
  }
  return {};
}

// Codes lie within 2 GiB of each other.
const char* code_base() { return reinterpret_cast<const char*>(&take_counts); }

}  // namespace

void set_watched(const Watched& watched) {
  g_watched = watched;
  g_watching = watched.counts || watched.races;
}
const Watched& watched() { return g_watched; }

void keep_counts(LaunchCounts counts) {
  const std::lock_guard lock(g_mutex);
  g_counts.push_back(std::move(counts));
}
std::vector<LaunchCounts> take_counts() {
  const std::lock_guard lock(g_mutex);
  return std::exchange(g_counts, {});
}

Watcher::Watcher(const Watched& watched, const WatchedLaunch& launch) : watched_(watched), launch_(launch) {
  if (watched_.races) shared_cells_.resize((launch.smem_bytes + Shadow::kGranule - 1) / Shadow::kGranule);
  events_.resize(static_cast<std::size_t>(launch.threads + 31) / 32);
  under_way_.resize(static_cast<std::size_t>(launch.threads));
  const auto add = [&](const void* begin, std::size_t bytes) {
    constant_.push_back({reinterpret_cast<std::uintptr_t>(begin), reinterpret_cast<std::uintptr_t>(begin) + bytes});
  };
  for (const Dim3* d : {&threadIdx, &blockIdx, &blockDim, &gridDim}) add(d, sizeof(Dim3));
  add(launch.params, launch.params_bytes);
  constant_.insert(constant_.end(), loaded_images().begin(), loaded_images().end());
  counts_.blocks = launch.blocks, counts_.threads = launch.threads, counts_.smem = launch.smem_bytes;
}

void Watcher::begin_block() {
  ++block_, ++counts_.counted;
  block_epoch_ = ++epoch_;
  std::ranges::fill(under_way_, std::size_t{0});
}

void Watcher::barrier() {
  settle();
  ++epoch_, ++counts_.barriers;
}

// Program and libraries as they lie in memory: what a kernel reads there is constant.
const std::vector<Watcher::Range>& Watcher::loaded_images() {
  static const std::vector<Range> images = [] {
    std::vector<Range> ranges;
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* to) {
          for (int i = 0; i < info->dlpi_phnum; ++i)
            if (const auto& header = info->dlpi_phdr[i]; header.p_type == PT_LOAD)
              static_cast<std::vector<Range>*>(to)->push_back(
                  {info->dlpi_addr + header.p_vaddr, info->dlpi_addr + header.p_vaddr + header.p_memsz});
          return 0;
        },
        &ranges);
    return ranges;
  }();
  return images;
}

bool Watcher::elsewhere(std::uintptr_t a) {
  const std::uintptr_t page = a / 4096;
  std::uintptr_t& seen = memory_pages_[page % memory_pages_.size()];
  if (seen == page) return false;
  bool memory_alone = true;
  for (const Range& r : constant_) {
    if (a >= r.begin && a < r.end) return true;
    memory_alone &= r.end <= page * 4096 || r.begin >= (page + 1) * 4096;
  }
  if (memory_alone) seen = page;
  return false;
}

// ---- races

std::uint32_t Watcher::place(const void* code) const {
  return static_cast<std::uint32_t>(static_cast<const char*>(code) - code_base() + (std::ptrdiff_t{1} << 31));
}
Shadow::Now Watcher::now(const void* code, int thread, bool shared) const {
  return {shared ? block_epoch_ : 1, block_epoch_, epoch_, thread, place(code)};
}

void Watcher::report(const Shadow::Found& found, const void* code, std::uintptr_t address, bool shared) {
  if (!problem_.empty()) return;
  const bool was_quiet = std::exchange(quiet, true);  // the linker may take the strings' functions from a kernel's object
  const void* earlier = code_base() + static_cast<std::ptrdiff_t>(found.place) - (std::ptrdiff_t{1} << 31);
  const bool first = found.clash == Shadow::Clash::unwritten;
  const std::vector<std::string> places = places_of(first ? std::vector{code} : std::vector{code, earlier});
  problem_ = "simt: race in " + kernel_name(launch_.kernel) + ", block (" + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) +
             "," + std::to_string(blockIdx.z) + "): thread " + std::to_string(thread_) + " at " + places[0] + " " + text_of(found.clash) +
             (first ? ""
                    : places[1] + " by " +
                          (found.thread < 0                ? "several threads"
                           : found.thread == Shadow::kWarp ? "a warp"
                                                           : "thread " + std::to_string(found.thread)));
  problem_ +=
      shared ? ", shared address " + std::to_string(address - reinterpret_cast<std::uintptr_t>(launch_.smem)) : ", in global memory";
  quiet = was_quiet;
}

void Watcher::settle_doubtful() {
  const auto& d = doubtful_;
  if (std::memcmp(d.before, reinterpret_cast<const void*>(d.address), d.bytes) != 0) report(d.found, d.code, d.address, d.shared);
  doubtful_.code = nullptr;
}

const std::string& Watcher::problem() {
  settle();
  return problem_;
}

template <bool write, bool shared>
void Watcher::check(const void* code, std::uintptr_t address, unsigned bytes, int thread) {
  const std::uintptr_t base = shared ? reinterpret_cast<std::uintptr_t>(launch_.smem) : 0;
  const Shadow::Now at = now(code, thread, shared);
  for (std::uintptr_t a = (address - base) / Shadow::kGranule * Shadow::kGranule; a < address - base + bytes; a += Shadow::kGranule) {
    Shadow::Cell& cell = shared ? shared_cells_[a / Shadow::kGranule] : global_cells_.at(a);
    const Shadow::Found found = write ? Shadow::write(cell, at) : Shadow::read(cell, at, shared);
    if (found.clash == Shadow::Clash::none) continue;
    if (found.clash != Shadow::Clash::write_write || bytes > sizeof(doubtful_.before)) {
      report(found, code, address, shared);
    } else if (!doubtful_.code) {
      doubtful_ = {found, code, address, bytes, shared, {}};
      std::memcpy(doubtful_.before, reinterpret_cast<const void*>(address), bytes);
    }
  }
}

template <bool write>
void Watcher::access(const void* code, std::uintptr_t address, unsigned bytes) {
  if (quiet || address - stack_ < launch_.stack_bytes) return;
  const bool shared = address - reinterpret_cast<std::uintptr_t>(launch_.smem) < launch_.smem_bytes;
  if (!shared && elsewhere(address)) return;
  if (watched_.races) {
    settle();
    if (shared) check<write, true>(code, address, bytes, thread_);
    else check<write, false>(code, address, bytes, thread_);
  }
  if (!watched_.counts) return;
  log(code, address, bytes, shared);
  if (!shared) touch(address, bytes, write);
}

void Watcher::ldmatrix(const void* code, const std::uint32_t (&rows)[32]) {
  const std::uintptr_t smem = reinterpret_cast<std::uintptr_t>(launch_.smem);
  if (watched_.races) {
    settle();
    for (const std::uint32_t row : rows) check<false, true>(code, smem + row, 16, Shadow::kWarp);
  }
  if (!watched_.counts) return;
  for (unsigned lane = 0; lane < 32; ++lane)
    events_[static_cast<std::size_t>(thread_ / 32)].push_back({code, smem + rows[lane], static_cast<unsigned char>(lane), 16, true});
}

void Watcher::copy(const void* code, std::uint32_t dst, const void* src, int bytes, int bytes_read) {
  const std::uintptr_t to = reinterpret_cast<std::uintptr_t>(launch_.smem) + dst, from = reinterpret_cast<std::uintptr_t>(src);
  if (watched_.races) {
    settle();
    if (bytes_read > 0) check<false, false>(code, from, static_cast<unsigned>(bytes_read), thread_);
    for (std::uint32_t i = 0; i < static_cast<std::uint32_t>(bytes); i += Shadow::kGranule)
      if (const Shadow::Found found = Shadow::copy(shared_cells_[(dst + i) / Shadow::kGranule], now(code, thread_, true));
          found.clash != Shadow::Clash::none)
        report(found, code, to, true);
  }
  ++counts_.copies;
  if (!watched_.counts) return;
  log(code, to, static_cast<unsigned>(bytes), true);
  if (bytes_read == 0) return;
  log(code, from, static_cast<unsigned>(bytes_read), false);
  touch(from, static_cast<unsigned>(bytes_read), false);
}

void Watcher::copied(std::uint32_t dst, int bytes) {
  if (!watched_.races) return;
  for (std::uint32_t i = 0; i < static_cast<std::uint32_t>(bytes); i += Shadow::kGranule) {
    Shadow::Cell& cell = shared_cells_[(dst + i) / Shadow::kGranule];
    Shadow::Now at = now(nullptr, thread_, true);
    at.place = cell.write_place;
    Shadow::copied(cell, at);
  }
}

void Watcher::waited(std::size_t bytes_left) {
  std::size_t& most = under_way_[static_cast<std::size_t>(thread_)];
  most = std::max(most, bytes_left);
  std::int64_t sum = 0;
  for (const std::size_t bytes : under_way_) sum += static_cast<std::int64_t>(bytes);
  counts_.most_in_flight = std::max(counts_.most_in_flight, sum);
}

// ---- counts

void Watcher::log(const void* code, std::uintptr_t address, unsigned bytes, bool shared) {
  events_[static_cast<std::size_t>(thread_ / 32)].push_back(
      {code, address, static_cast<unsigned char>(thread_ % 32), static_cast<unsigned char>(bytes), shared});
}

void Watcher::touch(std::uintptr_t address, unsigned bytes, bool write) {
  for (std::uintptr_t a = address; a < address + bytes; ++a) {
    auto& page = pages_[a / 4096];
    if (!page) page = std::make_unique<Page>();
    std::uint32_t& block = (write ? page->written_by : page->read_by)[a % 4096 / 32];
    if (block != block_) counts_.moved += 32, block = block_;
    (write ? page->written : page->read)[a % 4096 / 64] |= std::uint64_t{1} << a % 64;
  }
}

void Watcher::together(int warp) {
  std::vector<Event>& events = events_[static_cast<std::size_t>(warp)];
  if (events.empty()) return;
  std::ranges::stable_sort(events, {}, [](const Event& e) { return std::pair(e.code, e.shared); });
  for (std::size_t begin = 0, end; begin < events.size(); begin = end) {
    std::array<std::size_t, 32> times{};
    std::vector<std::vector<const Event*>> requests;
    for (end = begin; end < events.size() && events[end].code == events[begin].code && events[end].shared == events[begin].shared; ++end) {
      const std::size_t k = times[events[end].lane]++;
      if (k >= requests.size()) requests.emplace_back();
      requests[k].push_back(&events[end]);
    }
    for (const auto& request : requests) count(request);
  }
  events.clear();
}

void Watcher::count(const std::vector<const Event*>& request) {
  Traffic& line = lines_[request[0]->code];
  if (!request[0]->shared) {
    std::vector<std::uintptr_t> sectors;
    std::vector<std::pair<std::uintptr_t, std::uintptr_t>> spans;
    for (const Event* e : request) {
      for (std::uintptr_t s = e->address / 32; s <= (e->address + e->bytes - 1) / 32; ++s) sectors.push_back(s);
      spans.emplace_back(e->address, e->address + e->bytes);
    }
    std::ranges::sort(sectors);
    std::ranges::sort(spans);
    std::uintptr_t covered = 0, distinct = 0;
    for (const auto& [begin, end] : spans) {
      const std::uintptr_t from = std::max(begin, covered);
      if (end > from) distinct += end - from, covered = end;
    }
    ++line.requests;
    line.sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
    line.fewest_sectors += static_cast<std::int64_t>((distinct + 31) / 32);
    return;
  }
  unsigned bytes = 0;
  for (const Event* e : request) bytes = std::max<unsigned>(bytes, e->bytes);
  const unsigned lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  ++line.accesses;
  for (unsigned first = 0; first < 32; first += lanes) {
    std::vector<std::uintptr_t> words;
    for (const Event* e : request)
      if (e->lane / lanes == first / lanes)
        for (std::uintptr_t w = e->address / 4; w <= (e->address + e->bytes - 1) / 4; ++w) words.push_back(w);
    if (words.empty()) continue;
    std::ranges::sort(words);
    std::array<int, 32> banks{};
    for (auto w = words.begin(), end = std::unique(words.begin(), words.end()); w != end; ++w) ++banks[*w % 32];
    line.wavefronts += *std::ranges::max_element(banks);
    ++line.fewest_wavefronts;
  }
}

LaunchCounts Watcher::take() {
  for (const auto& [number, page] : pages_)
    for (int i = 0; i < 64; ++i) counts_.fewest += std::popcount(page->read[i]) + std::popcount(page->written[i]);
  std::vector<const void*> codes;
  for (const auto& [code, traffic] : lines_) codes.push_back(code);
  const std::vector<std::string> places = places_of(codes);
  auto add = [](Traffic& to, const Traffic& t) {
    to.requests += t.requests, to.sectors += t.sectors, to.fewest_sectors += t.fewest_sectors;
    to.accesses += t.accesses, to.wavefronts += t.wavefronts, to.fewest_wavefronts += t.fewest_wavefronts;
  };
  std::unordered_map<std::string, Traffic> by_place;
  for (std::size_t i = 0; i < codes.size(); ++i) add(by_place[places[i]], lines_[codes[i]]), add(counts_.total, lines_[codes[i]]);
  for (const auto& [where, traffic] : by_place) counts_.lines.push_back({where, traffic});
  auto excess = [](const LaunchCounts::Line& l) {
    return l.traffic.fewest_sectors - l.traffic.sectors + l.traffic.fewest_wavefronts - l.traffic.wavefronts;
  };
  std::ranges::sort(counts_.lines, {}, [&](const LaunchCounts::Line& l) { return std::pair(excess(l), l.place); });
  counts_.kernel = kernel_name(launch_.kernel);
  return std::move(counts_);
}

}  // namespace simt

// ---- what the compiler calls before every access of a kernel

#if defined(KAVA_WATCHABLE)
namespace simt {
bool watchable() { return true; }
}  // namespace simt

namespace {
template <bool write>
[[gnu::noinline]] void watch(const void* address, unsigned bytes, const void* code) {
  if (simt::Watcher* w = simt::t_watcher) w->access<write>(code, reinterpret_cast<std::uintptr_t>(address), bytes);
}
template <bool write>
inline void access(const void* address, unsigned bytes, const void* code) {
  if (simt::g_watching) watch<write>(address, bytes, code);
}
}  // namespace

#define KAVA_ACCESS(name, bytes, write) \
  extern "C" void name(void* address);  \
  extern "C" void name(void* address) { access<write>(address, bytes, __builtin_return_address(0)); }
KAVA_ACCESS(__tsan_read1, 1, false)
KAVA_ACCESS(__tsan_read2, 2, false)
KAVA_ACCESS(__tsan_read4, 4, false)
KAVA_ACCESS(__tsan_read8, 8, false)
KAVA_ACCESS(__tsan_read16, 16, false)
KAVA_ACCESS(__tsan_write1, 1, true)
KAVA_ACCESS(__tsan_write2, 2, true)
KAVA_ACCESS(__tsan_write4, 4, true)
KAVA_ACCESS(__tsan_write8, 8, true)
KAVA_ACCESS(__tsan_write16, 16, true)
KAVA_ACCESS(__tsan_unaligned_read2, 2, false)
KAVA_ACCESS(__tsan_unaligned_read4, 4, false)
KAVA_ACCESS(__tsan_unaligned_read8, 8, false)
KAVA_ACCESS(__tsan_unaligned_read16, 16, false)
KAVA_ACCESS(__tsan_unaligned_write2, 2, true)
KAVA_ACCESS(__tsan_unaligned_write4, 4, true)
KAVA_ACCESS(__tsan_unaligned_write8, 8, true)
KAVA_ACCESS(__tsan_unaligned_write16, 16, true)
#undef KAVA_ACCESS
extern "C" {
void __tsan_init();
void __tsan_func_entry(void* caller);
void __tsan_func_exit();
void __tsan_vptr_update(void** at, void* value);
void __tsan_vptr_read(void** at);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, unsigned long bytes) {
  access<false>(address, static_cast<unsigned>(bytes), __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
  access<true>(address, static_cast<unsigned>(bytes), __builtin_return_address(0));
}
}
#else
namespace simt {
bool watchable() { return false; }
}  // namespace simt
#endif
