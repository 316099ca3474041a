// What the emulator sees of a kernel's accesses to memory. The kernels are compiled with the calls that -fsanitize=thread puts before every
// load and store; here they lead to Watch, which counts what a GPU would have to move, and finds accesses that no barrier orders. Where a
// compiler cannot put them (watchable() is false) the emulator runs as ever.
//
// A request is what one instruction asks for by all lanes of a warp: the k-th time that each lane passes a place in the machine code since
// the warp was last together. A lane that skipped the place within that stretch is taken for one that comes later: the sum stays right, the
// grouping may not.
//   global   sectors of 32 bytes that a request touches, over the fewest that could hold its bytes
//   shared   wavefronts: 32 banks of 4 bytes; 8-byte requests go by half warps, 16-byte ones, ldmatrix and the writing side of
//            asynchronous copies by quarters; over one for each of these parts
//   moved    sectors that each block touches, once for each block that does (its later accesses meet the block's cache)
//   fewest   bytes that the counted blocks touch: each that is read once and each that is written once
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

struct Watched {
  bool counts = false, races = false;
  std::size_t most_blocks = 0;  // that run, spread evenly over a launch, whose results are then void; 0: all
};
/// Of the launches from now on. A watched launch runs on one thread, its copies late.
void set_watched(const Watched& watched);
/// Whether this build's kernels tell their accesses.
bool watchable();

struct Traffic {
  std::int64_t requests = 0, sectors = 0, fewest_sectors = 0;        // of global memory
  std::int64_t accesses = 0, wavefronts = 0, fewest_wavefronts = 0;  // of shared memory
};

struct LaunchCounts {
  std::string kernel;
  std::size_t blocks = 0, counted = 0;  // of the grid, and those that ran
  int threads = 0;
  std::size_t smem = 0;
  Traffic total;
  std::int64_t moved = 0, fewest = 0;           // bytes of global memory
  std::int64_t mma = 0, barriers = 0;           // barriers: of blocks
  std::int64_t copies = 0, most_in_flight = 0;  // asynchronous, of 16 bytes; bytes that a block has under way while it computes
  struct Line {
    std::string place;  // "chunks.h:38 in norm.cu:71": the line, and that of the kernel's own file which it was inlined into
    Traffic traffic;
  };
  std::vector<Line> lines;  // by how much they exceed the fewest
};
/// Of the counted launches since the last call, in order.
std::vector<LaunchCounts> take_counts();

/// "FILE:LINE" of an address of code, and of what it was inlined into; the kernel's name without namespaces and parameters.
std::vector<std::string> places_of(const std::vector<const void*>& code);
std::string kernel_name(const void* kernel);

}  // namespace simt
