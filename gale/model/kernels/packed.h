// Packed weights: in panels of 64 outputs, in the order in which they are read, padded with what counts as zero.
//   bf16: for each 2 inputs 64 x 2 numbers.
//   int8: for each 4 inputs 64 x 4 bytes, stored without sign (+128); the 64 fp32 scales of each panel stand apart.
//   int4: for each group of 32 inputs 4 x 4 x 64 bytes, whose low halves are inputs 8j..8j+3 and whose high halves are
//         8j+4..8j+7, for 16 outputs each, stored without sign (+8); then the 64 fp16 scales of the group.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace gale {

constexpr int kPanel = 64, kGroup = 32, kGroupBytes = kPanel * kGroup / 2 + kPanel * 2;

inline int padded(int size, int step) { return (size + step - 1) / step * step; }

inline float half_to_float(uint16_t half) {  // of finite ones
  uint32_t exponent = half >> 10 & 31, fraction = half & 0x3ff;
  float size = exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(fraction | 0x400), int(exponent) - 25);
  return half & 0x8000 ? -size : size;
}

inline uint16_t float_to_half(float x) {  // to the nearest; what is too large becomes the largest
  int exponent;
  std::frexp(x, &exponent);  // |x| = f * 2^exponent with f in [0.5, 1)
  float size = std::fabs(x);
  uint32_t bits = 0x7bff;
  if (exponent < -13) bits = uint32_t(std::nearbyint(std::ldexp(size, 24)));
  else if (exponent <= 16) bits = uint32_t(exponent + 13) * 1024 + uint32_t(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return uint16_t(std::min<uint32_t>(bits, 0x7bff) | (x < 0 ? 0x8000 : 0));
}

}  // namespace gale
