// Packed weights: in panels of 64 outputs, in the order in which they are read, padded with what counts as zero.
//   bf16: for each 2 inputs 64 x 2 numbers.
//   int8: for each 4 inputs 64 x 4 bytes, stored without sign (+128); the 64 fp32 scales of each panel stand apart.
//   int4: for each group of 32 inputs 4 x 4 x 64 bytes, whose low halves are inputs 8j..8j+3 and whose high halves are
//         8j+4..8j+7, for 16 outputs each, stored without sign (+8); then the 64 fp16 scales of the group.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "rows.h"

namespace gale {

constexpr int kPanel = 64, kGroup = 32, kGroupBytes = kPanel * kGroup / 2 + kPanel * 2;

inline int padded(int size, int step) { return (size + step - 1) / step * step; }

GALE_INLINE float half_to_float(uint16_t half) {  // of finite ones
  uint32_t normal = ((half & 0x7fffu) << 13) + (112u << 23);
  float size;
  std::memcpy(&size, &normal, 4);
  size = half & 0x7c00 ? size : float(half & 0x3ff) * 0x1p-24f;
  return half & 0x8000 ? -size : size;
}

GALE_INLINE uint16_t float_to_half(float x) {  // to the nearest; what is too large becomes the largest
  uint32_t bits, small_bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t size = bits & 0x7fffffff;
  float small = std::fabs(x) + 0.5f;  // whose last bit is the last of the smallest halves
  std::memcpy(&small_bits, &small, 4);
  uint32_t half = ((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10);
  half = size < 113u << 23 ? small_bits - (126u << 23) : half;
  return uint16_t(std::min<uint32_t>(half, 0x7bff) | (bits >> 16 & 0x8000));
}

}  // namespace gale
