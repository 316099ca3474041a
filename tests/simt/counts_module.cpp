// What the emulated backend's module exports beside the backend: the counters of its launches, as JSON (benchmarks/kernel_counts.cpp).
#include "engine/files/json.h"
#include "watch.h"

extern "C" {
/// Launches from now on are counted, of each at most that many blocks; 0: none are.
void kava_emulated_count(int most_blocks);
/// The counts since the last call: an array, to be read before the next call.
const char* kava_emulated_counts();

void kava_emulated_count(int most_blocks) {
  simt::set_watched({.counts = most_blocks > 0, .most_blocks = static_cast<std::size_t>(most_blocks)});
}

const char* kava_emulated_counts() {
  auto traffic = [](const simt::Traffic& t) {
    return kava::Json{{"requests", t.requests}, {"sectors", t.sectors},       {"fewest_sectors", t.fewest_sectors},
                      {"accesses", t.accesses}, {"wavefronts", t.wavefronts}, {"fewest_wavefronts", t.fewest_wavefronts}};
  };
  kava::Json all = kava::Json::array();
  for (const simt::LaunchCounts& c : simt::take_counts()) {
    kava::Json lines = kava::Json::array();
    for (const auto& line : c.lines) {
      lines.push_back(traffic(line.traffic));
      lines.back()["place"] = line.place;
    }
    all.push_back(traffic(c.total));
    all.back().update({{"kernel", c.kernel},
                       {"blocks", c.blocks},
                       {"counted", c.counted},
                       {"threads", c.threads},
                       {"shared_bytes", c.smem},
                       {"bytes_moved", c.moved},
                       {"fewest_bytes", c.fewest},
                       {"mma", c.mma},
                       {"barriers", c.barriers},
                       {"copies", c.copies},
                       {"most_bytes_in_flight", c.most_in_flight},
                       {"lines", lines}});
  }
  static std::string text;
  text = all.dump();
  return text.c_str();
}
}
