#include "simt.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "context.h"
#include "engine/cores.h"
#include "gpu_emulated.h"
#include "guarded_bytes.h"
#include "watcher.h"

namespace simt {

namespace {

Schedule g_schedule;

constexpr std::size_t kStackBytes = 256 << 10;
using Stack = std::unique_ptr<GuardedBytes>;

// Stacks are kept for the next launch.
class StackPool {
 public:
  Stack take() {
    std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<GuardedBytes>(kStackBytes);
    Stack s = std::move(free_.back());
    free_.pop_back();
    return s;
  }
  void give(Stack s) {
    std::lock_guard lock(mutex_);
    free_.push_back(std::move(s));
  }

 private:
  std::mutex mutex_;
  std::vector<Stack> free_;
} g_stacks;

struct Copy {
  std::uint32_t dst;
  const void* src;
  int bytes, bytes_read;
  Where where;
};

struct Thread {
  Dim3 index;
  Stack stack;
  Context context;
  bool started = false;
  std::vector<Copy> copies;         // not done yet
  std::vector<std::size_t> groups;  // ends of the committed groups in copies
};

// Of its lanes, a bit each: that did not return, that may run on, that wait for the others at a warp operation and at a barrier.
struct Warp {
  std::uint32_t live = 0, ready = 0, arrived = 0, at_barrier = 0;
  void* slots[32] = {};
  WarpOp op = nullptr;
  const void* code = nullptr;
  Where where;  // of the first to arrive
};

struct Launch {
  Dim3 grid, block;
  std::size_t smem;
  void (*body)(void*);
  void* arg;
  std::size_t arg_bytes;
  const void* kernel;
  std::atomic<std::size_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::exception_ptr error;
};

struct Block {
  Launch& launch;
  int size;
  std::unique_ptr<GuardedBytes> smem;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> order, turn;  // order[turn[t]] == t
  int live = 0, waiting = 0, current = 0;
  bool any = false, any_before = false;  // of the votes at the barrier that is filling, and at the last one
  Where barrier;
  Context main;
  std::unique_ptr<Watcher> watcher;

  explicit Block(Launch& l) : launch(l), size(static_cast<int>(l.block.x * l.block.y * l.block.z)) {}
};
thread_local Block* t_block = nullptr;

std::string text(const Where& w) { return std::string(w.file_name()) + ":" + std::to_string(w.line()); }
bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

[[noreturn]] void fail(const std::string& what) {
  throw Error("simt: " + what + ", block (" + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," +
              std::to_string(blockIdx.z) + ") thread " + std::to_string(t_block->current));
}

void set_current(Block& b, int t) {
  b.current = t;
  const Thread& thread = b.threads[static_cast<std::size_t>(t)];
  threadIdx = thread.index;
  if (b.watcher) b.watcher->thread(t, thread.stack->data());
}

Warp& warp_of(Block& b, int t) { return b.warps[static_cast<std::size_t>(t / 32)]; }
std::uint32_t bit_of(int t) { return std::uint32_t{1} << t % 32; }

int next_runnable(Block& b) {
  if (g_schedule.greedy_warps)
    if (const std::uint32_t ready = warp_of(b, b.current).ready) return b.current / 32 * 32 + std::countr_zero(ready);
  const int turn = b.turn[static_cast<std::size_t>(b.current)];
  for (int k = 1; k <= b.size; ++k) {
    const int next = turn + k, t = b.order[static_cast<std::size_t>(next < b.size ? next : next - b.size)];
    if (warp_of(b, t).ready & bit_of(t)) return t;
  }
  return -1;
}

void release_barrier(Block& b) {
  for (Warp& w : b.warps) w.ready |= std::exchange(w.at_barrier, 0);
  b.waiting = 0;
  b.any_before = b.any, b.any = false;
  if (!b.watcher) return;
  for (int w = 0; w < static_cast<int>(b.warps.size()); ++w) b.watcher->together(w);
  b.watcher->barrier();
}

void fiber_main();

// Leaves `from` and runs thread t.
void run_thread(Block& b, Context& from, int t, bool leave_for_good = false) {
  Thread& to = b.threads[static_cast<std::size_t>(t)];
  if (!std::exchange(to.started, true)) {
    to.stack = g_stacks.take();
    to.context.prepare(to.stack->data(), kStackBytes, fiber_main);
  }
  set_current(b, t);
  Context::jump(from, to.context, leave_for_good);
}

[[noreturn]] void fail_deadlock(const Block& b) {
  for (const Warp& w : b.warps)
    if (w.arrived) fail("deadlock: a lane waits for its warp at " + text(w.where) + " and the others cannot come");
  fail("deadlock: threads wait at a barrier that not all reach, " + text(b.barrier));
}

// The running thread may not run on; others may.
void suspend(Block& b) {
  Thread& me = b.threads[static_cast<std::size_t>(b.current)];
  const int t = next_runnable(b);
  if (t < 0) fail_deadlock(b);
  run_thread(b, me.context, t);
}

void thread_ends(Block& b) {
  Thread& me = b.threads[static_cast<std::size_t>(b.current)];
  me.copies.clear();
  me.groups.clear();
  --b.live;
  Warp& w = warp_of(b, b.current);
  w.live &= ~bit_of(b.current);
  w.ready &= ~bit_of(b.current);
  if (w.arrived) fail("a thread returned while lanes of its warp wait for it at " + text(w.where));
  if (b.watcher && !w.live) b.watcher->together(b.current / 32);
  if (b.waiting && b.waiting == b.live) release_barrier(b);
  if (b.live && next_runnable(b) < 0) fail_deadlock(b);
}

// One thread after the other that was not started yet, on one stack, until one that has its own stack is next.
void fiber_main() {
  Context::arrived();
  Block& b = *t_block;
  for (;;) {
    try {
      b.launch.body(b.launch.arg);
      thread_ends(b);
    } catch (...) {
      std::lock_guard lock(b.launch.mutex);
      if (!b.launch.error) b.launch.error = std::current_exception();
      b.launch.failed = true;
    }
    // The stack and the context of a thread that is done live on in its Thread until the block ends.
    Thread& me = b.threads[static_cast<std::size_t>(b.current)];
    const int t = b.launch.failed ? -1 : next_runnable(b);
    if (t < 0) Context::jump(me.context, b.main, true);
    Thread& next = b.threads[static_cast<std::size_t>(t)];
    if (!std::exchange(next.started, true)) {
      next.stack = std::move(me.stack);
      set_current(b, t);
    } else {
      run_thread(b, me.context, t, true);
    }
  }
}

void start_block(Block& b, std::size_t id) {
  const Dim3 grid = b.launch.grid;
  blockIdx = Dim3(static_cast<unsigned>(id % grid.x), static_cast<unsigned>(id / grid.x % grid.y),
                  static_cast<unsigned>(id / (std::size_t{grid.x} * grid.y)));
  blockDim = b.launch.block;
  gridDim = grid;
  std::iota(b.order.begin(), b.order.end(), 0);
  if (g_schedule.order == Schedule::Order::reverse) std::reverse(b.order.begin(), b.order.end());
  if (g_schedule.order == Schedule::Order::random)
    std::shuffle(b.order.begin(), b.order.end(), std::mt19937(g_schedule.seed + static_cast<unsigned>(id)));
  for (int k = 0; k < b.size; ++k) b.turn[static_cast<std::size_t>(b.order[static_cast<std::size_t>(k)])] = k;
  std::memset(b.smem->data(), 0xff, b.smem->size());
  if (b.watcher) b.watcher->begin_block();
  b.live = b.size;
  b.waiting = 0;
  b.any = false;
  for (int w = 0; w < static_cast<int>(b.warps.size()); ++w) {
    const int lanes = b.size - 32 * w;
    Warp& warp = b.warps[static_cast<std::size_t>(w)];
    warp = Warp();
    warp.live = warp.ready = lanes >= 32 ? ~0u : (1u << lanes) - 1;
  }
}

void end_block(Block& b) {
  for (Thread& t : b.threads) {
    if (t.stack) g_stacks.give(std::move(t.stack));
    t.started = false;
  }
}

void run_blocks(Launch& launch, std::size_t count) {
  Block b(launch);
  b.threads.resize(static_cast<std::size_t>(b.size));
  const Dim3 dims = launch.block;
  for (unsigned t = 0; t < b.threads.size(); ++t) b.threads[t].index = Dim3(t % dims.x, t / dims.x % dims.y, t / (dims.x * dims.y));
  b.warps.resize(static_cast<std::size_t>((b.size + 31) / 32));
  b.order.resize(b.threads.size());
  b.turn.resize(b.threads.size());
  b.smem = std::make_unique<GuardedBytes>(launch.smem, 16);  // as a GPU's begins
  const std::size_t most = watched().most_blocks, ran = watching() && most > 0 ? std::min(most, count) : count;
  if (watching()) {
    b.watcher = std::make_unique<Watcher>(
        watched(), WatchedLaunch{launch.kernel, launch.arg, launch.arg_bytes, count, b.size, kStackBytes, launch.smem, b.smem->data()});
    t_watcher = b.watcher.get();
  }
  t_block = &b;
  for (std::size_t i; !launch.failed && (i = launch.next++) < ran;) {
    const std::size_t id = ran == count ? i : (2 * i + 1) * count / (2 * ran);
    start_block(b, g_schedule.order == Schedule::Order::reverse ? count - 1 - id : id);
    run_thread(b, b.main, b.order[0]);
    end_block(b);
    if (!b.watcher || launch.failed || b.watcher->problem().empty()) continue;
    launch.error = std::make_exception_ptr(Error(b.watcher->problem()));
    launch.failed = true;
  }
  t_block = nullptr;
  t_watcher = nullptr;
  if (b.watcher && watched().counts && !launch.failed) keep_counts(b.watcher->take());
}

void do_copy(const Copy& c) {
  unsigned char* dst = smem_at(c.dst, static_cast<std::size_t>(c.bytes), c.where);
  std::memcpy(dst, c.src, static_cast<std::size_t>(c.bytes_read));
  std::memset(dst + c.bytes_read, 0, static_cast<std::size_t>(c.bytes - c.bytes_read));
}

}  // namespace

void set_schedule(const Schedule& schedule) { g_schedule = schedule; }

bool supported() {
#if defined(KAVA_TSAN)
  return false;
#else
  return true;
#endif
}

void run(Dim3 grid, Dim3 block, std::size_t smem_bytes, void (*body)(void*), void* arg, std::size_t arg_bytes, const void* kernel) {
  if (t_block) fail("a launch inside a kernel");
  const std::size_t count = std::size_t{grid.x} * grid.y * grid.z, size = std::size_t{block.x} * block.y * block.z;
  constexpr std::size_t kMostShared = 99 * 1024, kMostYZ = 65535;  // the least of the GPUs compiled for: 99 KiB on sm_120
  if (count == 0 || size == 0 || size > 1024 || smem_bytes > kMostShared || grid.y > kMostYZ || grid.z > kMostYZ)
    throw Error("simt: no GPU takes a launch of " + std::to_string(grid.x) + "x" + std::to_string(grid.y) + "x" + std::to_string(grid.z) +
                " blocks of " + std::to_string(size) + " threads with " + std::to_string(smem_bytes) + " bytes of shared memory");
  Launch launch{grid, block, smem_bytes, body, arg, arg_bytes, kernel, {}, {}, {}, {}};
  {
    static const unsigned usable = static_cast<unsigned>(kava::usable_cores());
    const unsigned cores = watching() ? 1 : usable;
    const std::size_t workers =
        std::min<std::size_t>(g_schedule.workers > 0 && !watching() ? static_cast<unsigned>(g_schedule.workers) : cores, count);
    std::vector<std::jthread> pool;
    for (std::size_t i = 1; i < workers; ++i) pool.emplace_back([&] { run_blocks(launch, count); });
    run_blocks(launch, count);
  }
  if (launch.error) std::rethrow_exception(launch.error);
}

void block_barrier(const Where& where) {
  Block& b = *t_block;
  if (b.waiting && !same(where, b.barrier)) fail("divergent __syncthreads: " + text(b.barrier) + " and " + text(where));
  b.barrier = where;
  if (++b.waiting == b.live) {
    release_barrier(b);
    return;
  }
  Warp& w = warp_of(b, b.current);
  w.ready &= ~bit_of(b.current);
  w.at_barrier |= bit_of(b.current);
  suspend(b);
}

bool block_any(bool value, const Where& where) {
  t_block->any |= value;
  block_barrier(where);
  return t_block->any_before;
}

void warp_meet(std::uint32_t mask, void* slot, WarpOp op, const Where& where) {
  Block& b = *t_block;
  const unsigned me = lane();
  Warp& w = warp_of(b, b.current);
  if (!(mask >> me & 1)) fail("a lane is not in its own mask at " + text(where));
  if (mask & ~w.live) fail("the mask at " + text(where) + " names lanes that returned or do not exist");
  if (w.arrived && (w.op != op || !same(where, w.where))) fail("divergent warp operations: " + text(w.where) + " and " + text(where));
  w.op = op;
  w.code = __builtin_return_address(0);
  w.where = where;
  w.slots[me] = slot;
  w.arrived |= 1u << me;
  if ((w.arrived & mask) != mask) {
    w.ready &= ~(1u << me);
    suspend(b);
    return;
  }
  if (w.arrived != mask) fail("lanes with different masks at " + text(where));
  if (b.watcher) b.watcher->quiet = true;
  op(w.slots);
  if (b.watcher) {
    b.watcher->quiet = false;
    if (mask == w.live) b.watcher->together(b.current / 32);
  }
  std::ranges::fill(w.slots, nullptr);
  w.ready |= std::exchange(w.arrived, 0);
}

void misaligned(const Where& where) { fail("a misaligned address at " + text(where)); }
void bad_shuffle(unsigned source) {
  fail("a shuffle reads lane " + std::to_string(source) + ", which its mask does not name, at " +
       text(warp_of(*t_block, t_block->current).where));
}
unsigned lane() { return static_cast<unsigned>(t_block->current) % 32; }
unsigned char* smem_base() { return t_block->smem->data(); }

unsigned char* smem_at(std::uint32_t addr, std::size_t bytes, const Where& where) {
  if (addr + bytes > t_block->smem->size())
    fail("shared address " + std::to_string(addr) + " is beyond the " + std::to_string(t_block->smem->size()) + " bytes at " + text(where));
  if (addr % bytes != 0) fail("shared address " + std::to_string(addr) + " is misaligned at " + text(where));
  return smem_base() + addr;
}

void copy_async(std::uint32_t dst, const void* src, int bytes, int bytes_read, const Where& where) {
  const Copy copy{dst, src, bytes, bytes_read, where};
  if (bytes_read < 0 || bytes_read > bytes)
    fail("a copy of " + std::to_string(bytes) + " bytes that reads " + std::to_string(bytes_read) + " at " + text(where));
  if (reinterpret_cast<std::uintptr_t>(src) % static_cast<unsigned>(bytes) != 0) fail("a misaligned global address at " + text(where));
  if (t_watcher) t_watcher->copy(__builtin_return_address(0), dst, src, bytes, bytes_read);
  if (g_schedule.eager_copies && !t_watcher) do_copy(copy);
  else t_block->threads[static_cast<std::size_t>(t_block->current)].copies.push_back(copy);
}

void commit_copies() {
  Thread& t = t_block->threads[static_cast<std::size_t>(t_block->current)];
  t.groups.push_back(t.copies.size());
}

void wait_copies(int pending) {
  Thread& t = t_block->threads[static_cast<std::size_t>(t_block->current)];
  const int due = static_cast<int>(t.groups.size()) - pending;
  if (due <= 0) {
    if (t_watcher) t_watcher->waited(t.copies.size() * 16);
    return;
  }
  const std::size_t done = t.groups[static_cast<std::size_t>(due) - 1];
  for (std::size_t i = 0; i < done; ++i) {
    do_copy(t.copies[i]);
    if (t_watcher) t_watcher->copied(t.copies[i].dst, t.copies[i].bytes);
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + static_cast<std::ptrdiff_t>(done));
  t.groups.erase(t.groups.begin(), t.groups.begin() + due);
  for (std::size_t& end : t.groups) end -= done;
  if (t_watcher) t_watcher->waited(t.copies.size() * 16);
}

void saw_ldmatrix(const std::uint32_t (&rows)[32]) {
  if (t_watcher) t_watcher->ldmatrix(warp_of(*t_block, t_block->current).code, rows);
}
void saw_mma() {
  if (t_watcher) t_watcher->mma();
}

}  // namespace simt
