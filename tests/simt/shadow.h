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
  /// shared: what was not written since the block began may not be read.
  static Found read(Cell& cell, const Now& now, bool shared);
  static Found write(Cell& cell, const Now& now);
  /// A copy begins and ends: nobody may touch the cell between.
  static Found copy(Cell& cell, const Now& now);
  static void copied(Cell& cell, const Now& now);

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
  static constexpr std::uintptr_t kPage = 4096;
  std::unordered_map<std::uintptr_t, std::unique_ptr<Cell[]>> pages_;
  struct Kept {
    std::uintptr_t page = 0;
    Cell* cells = nullptr;
  };
  std::array<Kept, 256> kept_;  // pages that were asked for last, by the ends of their numbers
};

}  // namespace simt
