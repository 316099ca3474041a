#include "shadow.h"

namespace simt {

namespace {

constexpr std::int16_t kSeveral = -1;

// Blocks of a launch are never ordered, threads of a block only by its barriers.
bool unordered(std::uint32_t epoch, int thread, const Shadow::Now& now) {
  return epoch >= now.launch && (epoch < now.block || (epoch == now.epoch && thread != now.thread));
}

Shadow::Found earlier_write(const Shadow::Cell& c, Shadow::Clash clash) { return {clash, c.write_place, c.writer}; }

}  // namespace

Shadow::Found Shadow::read(Cell& c, const Now& now, bool shared) {
  if (c.copier >= 0) return {Clash::copy_under_way, c.write_place, c.copier};
  if (shared && c.write_epoch < now.block) return {Clash::unwritten, 0, 0};
  if (unordered(c.write_epoch, c.writer, now)) return earlier_write(c, Clash::write_read);
  if (c.read_epoch < now.block && c.read_epoch >= now.launch) c.read_by_blocks = true;
  c.reader = c.read_epoch == now.epoch && c.reader != now.thread ? kSeveral : static_cast<std::int16_t>(now.thread);
  c.read_epoch = now.epoch;
  c.read_place = now.place;
  return {};
}

Shadow::Found Shadow::write(Cell& c, const Now& now) {
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

Shadow::Found Shadow::copy(Cell& c, const Now& now) {
  const Found found = write(c, now);
  c.copier = static_cast<std::int16_t>(now.thread);
  return found;
}

void Shadow::copied(Cell& c, const Now& now) {
  c.copier = -1;
  c.write_epoch = now.epoch;
  c.writer = static_cast<std::int16_t>(now.thread);
  c.write_place = now.place;
}

}  // namespace simt
