// Lists of indices as the host makes them. A device cannot refuse one that is out of range: it is checked here, once, where it is made.
#pragma once
#include <cstdint>
#include <span>

namespace kava {

/// Every index is in least .. end-1.
void check_indices(std::span<const int32_t> indices, int64_t least, int64_t end);
/// Every index is in 0 .. end-1, none stands twice: what the scatters ask of their rows.
void check_distinct(std::span<const int32_t> indices, int64_t end);
/// Offsets of consecutive parts: from 0 to end, never falling.
void check_offsets(std::span<const int32_t> offsets, int64_t end);

}  // namespace kava
