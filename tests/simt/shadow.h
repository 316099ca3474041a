// Who read and wrote each two bytes of memory, and when: epochs are the stretches between barriers of a block, numbered through a launch.
// Within an epoch nothing orders the accesses of two threads: a shuffle or an mma of a warp is no fence.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace simt {

class Shadow {
 public:
  enum class Clash { none, unwritten, copy_under_way, read_write, write_read, write_write };
  struct Found {
    Clash clash = Clash::none;
    std::uint32_t place = 0;  // of the earlier access
    int thread = 0;           // that made it, -1: several
  };
  struct Now {
    std::uint32_t launch, block, epoch;  // first epochs of the launch and of the block; this epoch
    int thread;
    std::uint32_t place;
  };
  static constexpr unsigned kGranule = 2;
  static constexpr int kWarp = 0x7ffe;  // a reader: all lanes of a warp

  struct Cell {
    std::uint32_t write_epoch = 0, read_epoch = 0, write_place = 0, read_place = 0;
    std::int16_t writer = 0, reader = 0, copier = -1;
    bool read_by_blocks = false;  // by another block of this launch too, before the last reader
  };
  // Defined here, so that what nearly all of them find is handed on in no memory.
  /// shared: what was not written since the block began may not be read.
  static Found read(Cell& c, const Now& now, bool shared) {
    if (c.copier >= 0) return {Clash::copy_under_way, c.write_place, c.copier};
    if (shared && c.write_epoch < now.block) return {Clash::unwritten, 0, 0};
    if (unordered(c.write_epoch, c.writer, now)) return earlier_write(c, Clash::write_read);
    if (c.read_epoch < now.block && c.read_epoch >= now.launch) c.read_by_blocks = true;
    c.reader = c.read_epoch == now.epoch && c.reader != now.thread ? kSeveral : static_cast<std::int16_t>(now.thread);
    c.read_epoch = now.epoch;
    c.read_place = now.place;
    return {};
  }

  static Found write(Cell& c, const Now& now) {
    Found found;
    if (c.copier >= 0) found = {Clash::copy_under_way, c.write_place, c.copier};
    else if (unordered(c.write_epoch, c.writer, now)) found = earlier_write(c, Clash::write_write);
    else if (unordered(c.read_epoch, c.reader, now) || (c.read_by_blocks && c.read_epoch >= now.launch))
      found = {Clash::read_write, c.read_place, c.reader};
    c.write_epoch = now.epoch;
    c.writer = static_cast<std::int16_t>(now.thread);
    c.write_place = now.place;
    return found;
  }

  /// A copy begins and ends: nobody may touch the cell between.
  static Found copy(Cell& c, const Now& now) {
    const Found found = write(c, now);
    c.copier = static_cast<std::int16_t>(now.thread);
    return found;
  }

  static void copied(Cell& c, const Now& now) {
    c.copier = -1;
    c.write_epoch = now.epoch;
    c.writer = static_cast<std::int16_t>(now.thread);
    c.write_place = now.place;
  }

  /// The cell of a global address.
  Cell& at(std::uintptr_t address) {
    Kept& kept = kept_[address / kPage % kept_.size()];
    if (address / kPage != kept.page) {
      auto& cells = pages_[address / kPage];
      if (!cells) cells = std::make_unique<Cell[]>(kPage / kGranule);
      kept = {address / kPage, cells.get()};
    }
    return kept.cells[address % kPage / kGranule];
  }

 private:
  static constexpr std::int16_t kSeveral = -1;

  // Blocks of a launch are never ordered, threads of a block only by its barriers.
  static bool unordered(std::uint32_t epoch, int thread, const Now& now) {
    return epoch >= now.launch && (epoch < now.block || (epoch == now.epoch && thread != now.thread));
  }

  static Found earlier_write(const Cell& c, Clash clash) { return {clash, c.write_place, c.writer}; }

  static constexpr std::uintptr_t kPage = 4096;
  std::unordered_map<std::uintptr_t, std::unique_ptr<Cell[]>> pages_;
  struct Kept {
    std::uintptr_t page = 0;
    Cell* cells = nullptr;
  };
  std::array<Kept, 256> kept_;  // pages that were asked for last, by the ends of their numbers
};

}  // namespace simt
