// Small things that every kernel needs: bf16 numbers, and one function compiled for several processors.
#pragma once

#include <cstdint>
#include <cstring>

// The compiler makes one copy of the function for each of these, and the loader picks the best.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define GALE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GALE_CLONES
#endif
#define GALE_INLINE static inline __attribute__((always_inline))

namespace gale {

using bf16 = uint16_t;

GALE_INLINE float widen(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// To the nearest, ties to even. What is no number stays none (but for one with every bit set, which no operation makes).
GALE_INLINE bf16 narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

GALE_INLINE float widen(float x) { return x; }
GALE_INLINE float rounded(float x) { return widen(narrow(x)); }

template <class T>
GALE_INLINE T as(float x);
template <>
inline __attribute__((always_inline)) bf16 as<bf16>(float x) { return narrow(x); }
template <>
inline __attribute__((always_inline)) float as<float>(float x) { return x; }

}  // namespace gale
