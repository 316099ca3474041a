// Who read and wrote each two bytes of memory, and when: epochs are the stretches between barriers of a block, numbered through a launch.
// Within an epoch nothing orders the accesses of two threads: a shuffle or an mma of a warp is no fence.
#pragma once
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
    if (address / kPage != last_) {
      auto& page = pages_[last_ = address / kPage];
      if (!page) page = std::make_unique<Cell[]>(kPage / kGranule);
      cells_ = page.get();
    }
    return cells_[address % kPage / kGranule];
  }

 private:
  static constexpr std::uintptr_t kPage = 4096;
  std::unordered_map<std::uintptr_t, std::unique_ptr<Cell[]>> pages_;
  std::uintptr_t last_ = 0;  // page that was asked for last
  Cell* cells_ = nullptr;
};

}  // namespace simt
