// Linear layers: with bf16 weights, packed so that they are read in one stream; or with int8 or int4 weights and
// activations that are quantised token by token as they come.
//
// A row's result does not depend on how many rows there are. (Stock bf16 products differ between one row and several.)
// bf16 adds up input by input. Quantised is out[m][n] = a_scale[m] * sum_k a[m][k] * w[n][k] * w_scale, with a in -127..127 and w stored without sign (+128 or +8),
// which is what the multiply-add of VNNI takes (u8 x s8); sum_k a[m][k] takes the offset back out. Sums of int8 are exact,
// those of int4 go group by group.
//
// Weights are packed in panels of 64 outputs, in the order in which they are read, padded with what counts as zero:
//   bf16: for each 2 inputs 64 x 2 numbers.
//   int8: for each 4 inputs 64 x 4 bytes; the 64 fp32 scales of each output stand apart.
//   int4: for each group of 32 inputs 4 x 4 x 64 bytes, whose low halves are inputs 8j..8j+3 and whose high halves are
//         8j+4..8j+7, for 16 outputs each; then the 64 fp16 scales of the group.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "rows.h"

namespace gale {
namespace {

constexpr int kPanel = 64, kGroup = 32, kGroupBytes = kPanel * kGroup / 2 + kPanel * 2;

// The next rows of those that are left, at most `most`, in equal shares: 7 rows are 4 and 3, not 6 and 1.
int share(int left, int most) {
  int tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

int padded(int size, int step) { return (size + step - 1) / step * step; }

float half_to_float(uint16_t half) {  // of finite ones
  uint32_t exponent = half >> 10 & 31, fraction = half & 0x3ff;
  float size = exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(fraction | 0x400), int(exponent) - 25);
  return half & 0x8000 ? -size : size;
}

uint16_t float_to_half(float x) {  // to the nearest; what is too large becomes the largest
  int exponent;
  std::frexp(x, &exponent);  // |x| = f * 2^exponent with f in [0.5, 1)
  float size = std::fabs(x);
  uint32_t bits = 0x7bff;
  if (exponent < -13) bits = uint32_t(std::nearbyint(std::ldexp(size, 24)));
  else if (exponent <= 16) bits = uint32_t(exponent + 13) * 1024 + uint32_t(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return uint16_t(std::min<uint32_t>(bits, 0x7bff) | (x < 0 ? 0x8000 : 0));
}

// The scale that rounds 32 numbers to -8..7 with the least squared error: the one furthest out becomes -8, or is
// cut a little so that the others are finer.
GALE_CLONES uint16_t best_scale(const float* values) {
  float furthest = 0, best_error = HUGE_VALF;
  for (int k = 0; k < kGroup; ++k)
    if (std::fabs(values[k]) > std::fabs(furthest)) furthest = values[k];
  uint16_t best = 0;
  for (int step = 0; step < 12 && furthest != 0; ++step) {
    uint16_t half = float_to_half(furthest / (-9.0f + 0.25f * step));  // to -9..-6.25
    float scale = half_to_float(half), inverse = scale != 0 ? 1.0f / scale : 0.0f, error = 0;
    for (int k = 0; k < kGroup; ++k) {
      float q = std::min(7.0f, std::max(-8.0f, std::nearbyint(values[k] * inverse)));
      error += (q * scale - values[k]) * (q * scale - values[k]);
    }
    if (error < best_error) best_error = error, best = half;
  }
  return best;
}

// One token: s8 [inputs], their scale, the offset's share of the sums; for int4 that of each group of 32.
template <class T>
GALE_INLINE float quantise_row(const T* x, int inputs, int stored, int8_t* out, int32_t* sums, bool grouped) {
  float largest = 0;
  for (int k = 0; k < inputs; ++k) largest = std::max(largest, std::fabs(widen(x[k])));
  float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  int32_t sum = 0;
  for (int k = 0; k < inputs; ++k) {
    int32_t q = int32_t(std::nearbyint(widen(x[k]) * inverse));
    out[k] = int8_t(q);
    sum += q;
  }
  for (int k = inputs; k < stored; ++k) out[k] = 0;
  if (grouped) {
    for (int group = 0; group < stored / kGroup; ++group) {
      int32_t part = 0;
      for (int k = 0; k < kGroup; ++k) part += out[group * kGroup + k];
      sums[group] = -8 * part;
    }
  } else {
    sums[0] = -128 * sum;
  }
  return largest / 127.0f;
}

GALE_CLONES float quantise_bf16(const bf16* x, int inputs, int stored, int8_t* out, int32_t* sums, bool grouped) {
  return quantise_row(x, inputs, stored, out, sums, grouped);
}
GALE_CLONES float quantise_fp32(const float* x, int inputs, int stored, int8_t* out, int32_t* sums, bool grouped) {
  return quantise_row(x, inputs, stored, out, sums, grouped);
}

// What a panel is multiplied with: `rows` tokens, each `stride` bytes from the last.
struct Tokens {
  const int8_t* values;
  const int32_t* sums;
  long stride, sum_stride;
};

// ---- Any processor.

void panel8_plain(const uint8_t* w, Tokens a, int rows, int stored, int32_t* out) {
  for (int m = 0; m < rows; ++m, out += kPanel) {
    for (int n = 0; n < kPanel; ++n) out[n] = a.sums[m * a.sum_stride];
    for (int k = 0; k < stored; k += 4)
      for (int n = 0; n < kPanel; ++n)
        for (int i = 0; i < 4; ++i) out[n] += a.values[m * a.stride + k + i] * int32_t(w[k * kPanel + n * 4 + i]);
  }
}

void panel4_plain(const uint8_t* w, Tokens a, int rows, int stored, float* out) {
  for (int m = 0; m < rows; ++m, out += kPanel) {
    for (int n = 0; n < kPanel; ++n) out[n] = 0;
    const uint8_t* packed = w;
    for (int group = 0; group < stored / kGroup; ++group, packed += kGroupBytes) {
      const int8_t* x = a.values + m * a.stride + group * kGroup;
      const uint8_t* scales = packed + kPanel * kGroup / 2;
      for (int n = 0; n < kPanel; ++n) {
        int32_t sum = a.sums[m * a.sum_stride + group];
        for (int k = 0; k < kGroup; ++k) {
          uint8_t both = packed[(k / 8 * 4 + n / 16) * 64 + n % 16 * 4 + k % 4];
          sum += x[k] * int32_t(k % 8 < 4 ? both & 15 : both >> 4);
        }
        uint16_t half;
        std::memcpy(&half, scales + 2 * n, 2);
        out[n] = std::fma(float(sum), half_to_float(half), out[n]);
      }
    }
  }
}

#if defined(__x86_64__)

// ---- AVX2: bytes are widened to 16 bits, since the u8 x s8 product of AVX2 saturates.

#define GALE_AVX2 __attribute__((target("avx2,fma,f16c")))

GALE_AVX2 inline __m256i dot_avx2(__m256i sum, __m256i w_low, __m256i w_high, int32_t four) {
  __m256i x = _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
  // Each output's four products come out as two sums of two; hadd joins them and mixes the order of the halves.
  __m256i pairs = _mm256_hadd_epi32(_mm256_madd_epi16(w_low, x), _mm256_madd_epi16(w_high, x));
  return _mm256_add_epi32(sum, _mm256_permute4x64_epi64(pairs, 0xd8));
}

GALE_AVX2 inline void widen_avx2(const __m256i bytes, __m256i& low, __m256i& high) {
  low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes));
  high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(bytes, 1));
}

template <int M>
GALE_AVX2 void panel8_avx2(const uint8_t* w, Tokens a, int stored, int32_t* out) {
  for (int part = 0; part < 8; ++part) {  // 8 outputs
    __m256i sums[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sums[m] = _mm256_set1_epi32(a.sums[m * a.sum_stride]);
    for (int k = 0; k < stored; k += 4) {
      __m256i low, high;
      widen_avx2(_mm256_loadu_si256((const __m256i*)(w + k * kPanel + part * 32)), low, high);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        int32_t four;
        std::memcpy(&four, a.values + m * a.stride + k, 4);
        sums[m] = dot_avx2(sums[m], low, high, four);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) _mm256_storeu_si256((__m256i*)(out + m * kPanel + part * 8), sums[m]);
  }
}

template <int M>
GALE_AVX2 void panel4_avx2(const uint8_t* w, Tokens a, int stored, float* out) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int part = 0; part < 8; ++part) {
    __m256 total[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) total[m] = _mm256_setzero_ps();
    for (int group = 0; group < stored / kGroup; ++group) {
      const uint8_t* packed = w + long(group) * kGroupBytes;
      __m256i sums[M];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sums[m] = _mm256_set1_epi32(a.sums[m * a.sum_stride + group]);
#pragma GCC unroll 16
      for (int j = 0; j < 4; ++j) {
        __m256i both = _mm256_loadu_si256((const __m256i*)(packed + j * 256 + part * 32));
        __m256i low, high, low4, high4;
        widen_avx2(_mm256_and_si256(both, mask), low, high);
        widen_avx2(_mm256_and_si256(_mm256_srli_epi16(both, 4), mask), low4, high4);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          int32_t fours[2];
          std::memcpy(fours, a.values + m * a.stride + group * kGroup + j * 8, 8);
          sums[m] = dot_avx2(dot_avx2(sums[m], low, high, fours[0]), low4, high4, fours[1]);
        }
      }
      __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(packed + kPanel * kGroup / 2 + part * 16)));
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) total[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m]), scale, total[m]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) _mm256_storeu_ps(out + m * kPanel + part * 8, total[m]);
  }
}

// ---- AVX-512 with VNNI.

#define GALE_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,f16c")))

GALE_VNNI inline __m512i four_of(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

template <int M, int B>  // B x 16 outputs at a time, so that all sums stay in registers
GALE_VNNI void panel8_vnni(const uint8_t* w, Tokens a, int stored, int32_t* out) {
  for (int first = 0; first < 4; first += B) {
    __m512i sums[M][B];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) sums[m][b] = _mm512_set1_epi32(a.sums[m * a.sum_stride]);
    const uint8_t* packed = w + first * 64;
    for (int k = 0; k < stored; k += 4, packed += 256) {
      if (M <= 4)  // memory decides; its stream is fetched further ahead than the processor does by itself
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) _mm_prefetch((const char*)(packed + 4096 + b * 64), _MM_HINT_T0);
      __m512i weights[B];
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) weights[b] = _mm512_loadu_si512(packed + b * 64);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        __m512i x = four_of(a.values + m * a.stride + k);
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) sums[m][b] = _mm512_dpbusd_epi32(sums[m][b], weights[b], x);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) _mm512_storeu_si512(out + m * kPanel + (first + b) * 16, sums[m][b]);
  }
}

template <int M, int B>  // B x 16 outputs at a time, so that sums of both kinds stay in registers
GALE_VNNI void panel4_vnni(const uint8_t* w, Tokens a, int stored, float* out) {
  const __m512i mask = _mm512_set1_epi8(15);
  for (int first = 0; first < 4; first += B) {
    __m512 total[M][B];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) total[m][b] = _mm512_setzero_ps();
    const uint8_t* packed = w + first * 64;
    for (int group = 0; group < stored / kGroup; ++group, packed += kGroupBytes) {
        for (int line = 0; line < kGroupBytes; line += 64) _mm_prefetch((const char*)(packed + 4608 + line), _MM_HINT_T0);
      __m512i sums[M][B];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) sums[m][b] = _mm512_set1_epi32(a.sums[m * a.sum_stride + group]);
#pragma GCC unroll 16
      for (int j = 0; j < 4; ++j) {
        __m512i low[B], high[B];
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) {
          __m512i both = _mm512_loadu_si512(packed + j * 256 + b * 64);
          low[b] = _mm512_and_si512(both, mask);
          high[b] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const int8_t* x = a.values + m * a.stride + group * kGroup + j * 8;
          __m512i x_low = four_of(x), x_high = four_of(x + 4);
#pragma GCC unroll 16
          for (int b = 0; b < B; ++b) {
            sums[m][b] = _mm512_dpbusd_epi32(sums[m][b], low[b], x_low);
            sums[m][b] = _mm512_dpbusd_epi32(sums[m][b], high[b], x_high);
          }
        }
      }
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) {
        __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(packed - first * 64 + 1024 + (first + b) * 32)));
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) total[m][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[m][b]), scale, total[m][b]);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) _mm512_storeu_ps(out + m * kPanel + (first + b) * 16, total[m][b]);
  }
}

// ---- AVX512-BF16.

template <int M, int B>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) void panel16_bf16(const uint8_t* w, const bf16* a, int inputs,
                                                                                  float* out) {
  for (int first = 0; first < 4; first += B) {
    __m512 sums[M][B];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) sums[m][b] = _mm512_setzero_ps();
    const uint8_t* packed = w + first * 64;
    for (int k = 0; k < inputs; k += 2, packed += 256) {
      if (M <= 4)
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) _mm_prefetch((const char*)(packed + 4096 + b * 64), _MM_HINT_T0);
      __m512bh weights[B];
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) weights[b] = (__m512bh)_mm512_loadu_si512(packed + b * 64);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        int32_t two;
        std::memcpy(&two, a + long(m) * inputs + k, 4);
        __m512bh x = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) sums[m][b] = _mm512_dpbf16_ps(sums[m][b], weights[b], x);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) _mm512_storeu_ps(out + m * kPanel + (first + b) * 16, sums[m][b]);
  }
}

#endif

enum Level { kPlain, kAvx2, kVnni };

Level best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    return kVnni;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPlain;
}

int level = best_level();

// Tokens that are multiplied with a panel at once, and the sums of `rows` of them.
int most_rows(int bits) { return level == kPlain ? 1 : level == kAvx2 ? 4 : bits == 8 ? 6 : 12; }

void panel8(const uint8_t* w, Tokens a, int rows, int stored, int32_t* out) {
#if defined(__x86_64__)
  using Kernel = void (*)(const uint8_t*, Tokens, int, int32_t*);
  static constexpr Kernel vnni[] = {panel8_vnni<1, 4>, panel8_vnni<2, 4>, panel8_vnni<3, 4>,
                                    panel8_vnni<4, 4>, panel8_vnni<5, 4>, panel8_vnni<6, 4>};
  static constexpr Kernel avx2[] = {panel8_avx2<1>, panel8_avx2<2>, panel8_avx2<3>, panel8_avx2<4>};
  if (level == kVnni) return vnni[rows - 1](w, a, stored, out);
  if (level == kAvx2) return avx2[rows - 1](w, a, stored, out);
#endif
  panel8_plain(w, a, rows, stored, out);
}

void panel16(const uint8_t* w, const bf16* a, int rows, int inputs, float* out) {
#if defined(__x86_64__)
  using Kernel = void (*)(const uint8_t*, const bf16*, int, float*);
  static constexpr Kernel kernels[] = {panel16_bf16<1, 4>, panel16_bf16<2, 4>, panel16_bf16<3, 4>,
                                       panel16_bf16<4, 4>, panel16_bf16<5, 4>, panel16_bf16<6, 4>};
  kernels[rows - 1](w, a, inputs, out);
#else
  (void)w, (void)a, (void)rows, (void)inputs, (void)out;
#endif
}

void panel4(const uint8_t* w, Tokens a, int rows, int stored, float* out) {
#if defined(__x86_64__)
  using Kernel = void (*)(const uint8_t*, Tokens, int, float*);
  static constexpr Kernel vnni[] = {panel4_vnni<1, 4>, panel4_vnni<2, 4>, panel4_vnni<3, 4>,  panel4_vnni<4, 2>,
                                    panel4_vnni<5, 2>, panel4_vnni<6, 2>, panel4_vnni<7, 1>,  panel4_vnni<8, 1>,
                                    panel4_vnni<9, 1>, panel4_vnni<10, 1>, panel4_vnni<11, 1>, panel4_vnni<12, 1>};
  static constexpr Kernel avx2[] = {panel4_avx2<1>, panel4_avx2<2>, panel4_avx2<3>, panel4_avx2<4>};
  if (level == kVnni) return vnni[rows - 1](w, a, stored, out);
  if (level == kAvx2) return avx2[rows - 1](w, a, stored, out);
#endif
  panel4_plain(w, a, rows, stored, out);
}

template <class Sum, class T>
GALE_INLINE void finish(const Sum* sums, float a_scale, const float* w_scales, const float* bias, T* out, int outputs) {
  for (int n = 0; n < outputs; ++n) {
    float value = float(sums[n]) * (w_scales ? a_scale * w_scales[n] : a_scale);
    out[n] = as<T>(bias ? value + bias[n] : value);
  }
}

#define GALE_FINISH(name, Sum, T)                                                                            \
  GALE_CLONES void name(const Sum* sums, float a_scale, const float* w_scales, const float* bias, T* out, int outputs) { \
    finish(sums, a_scale, w_scales, bias, out, outputs);                                                       \
  }
GALE_CLONES void finish_16(const float* sums, const float* bias, bf16* out, int outputs) {
  for (int n = 0; n < outputs; ++n) out[n] = narrow(bias ? sums[n] + bias[n] : sums[n]);
}
GALE_FINISH(finish_8_bf16, int32_t, bf16)
GALE_FINISH(finish_8_fp32, int32_t, float)
GALE_FINISH(finish_4_bf16, float, bf16)
GALE_FINISH(finish_4_fp32, float, float)

}  // namespace
}  // namespace gale

using namespace gale;

extern "C" {

// The best instructions that are used: 0 any processor's, 1 AVX2, 2 AVX-512 VNNI. `most` lowers it, for tests.
int gale_level(int most) {
  level = std::min<int>(best_level(), most);
  return level;
}

long gale_packed_bytes(int bits, int outputs, int inputs) {
  long panels = padded(outputs, kPanel) / kPanel;
  if (bits == 16) return panels * kPanel * padded(inputs, 2) * 2;
  return bits == 8 ? panels * kPanel * padded(inputs, 4) : panels * (padded(inputs, kGroup) / kGroup) * kGroupBytes;
}

// Whether bf16 weights are served here: `inputs` must be even then.
int gale_has_bf16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
#else
  return 0;
#endif
}

// Packs bf16 weights [outputs, inputs] as they are.
void gale_pack_bf16(const bf16* weights, int outputs, int inputs, bf16* packed, int threads) {
  int panels = padded(outputs, kPanel) / kPanel;
  Pool::run(panels, threads, [&](int panel) {
    bf16* to = packed + long(panel) * kPanel * inputs;
    for (int n = 0; n < kPanel; ++n) {
      const bf16* row = weights + (long(panel) * kPanel + n) * inputs;
      for (int k = 0; k < inputs; k += 2) {
        bool inside = panel * kPanel + n < outputs;
        to[long(k) * kPanel + n * 2] = inside ? row[k] : 0;
        to[long(k) * kPanel + n * 2 + 1] = inside ? row[k + 1] : 0;
      }
    }
  });
}

// Quantises weights [outputs, inputs] (fp32 rows) and packs them; int8 also fills scales [padded outputs].
void gale_pack(int bits, const float* weights, int outputs, int inputs, uint8_t* packed, float* scales, int threads) {
  int panels = padded(outputs, kPanel) / kPanel;
  Pool::run(panels, threads, [&](int panel) {
    int first = panel * kPanel;
    if (bits == 8) {
      int stored = padded(inputs, 4);
      uint8_t* to = packed + long(panel) * kPanel * stored;
      for (int n = 0; n < kPanel; ++n) {
        const float* row = weights + long(first + n) * inputs;
        float largest = 0;
        if (first + n < outputs)
          for (int k = 0; k < inputs; ++k) largest = std::max(largest, std::fabs(row[k]));
        scales[first + n] = largest / 127.0f;
        float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        for (int k = 0; k < stored; ++k) {
          bool inside = first + n < outputs && k < inputs;
          to[long(k / 4) * 256 + n * 4 + k % 4] = uint8_t(128 + (inside ? int(std::nearbyint(row[k] * inverse)) : 0));
        }
      }
      return;
    }
    int groups = padded(inputs, kGroup) / kGroup;
    for (int group = 0; group < groups; ++group) {
      uint8_t* to = packed + (long(panel) * groups + group) * kGroupBytes;
      std::memset(to, 0, kPanel * kGroup / 2);
      for (int n = 0; n < kPanel; ++n) {
        float values[kGroup];
        for (int k = 0; k < kGroup; ++k) {
          int input = group * kGroup + k;
          values[k] = first + n < outputs && input < inputs ? weights[long(first + n) * inputs + input] : 0.0f;
        }
        uint16_t half = best_scale(values);
        float scale = half_to_float(half), inverse = scale != 0 ? 1.0f / scale : 0.0f;
        std::memcpy(to + kPanel * kGroup / 2 + 2 * n, &half, 2);
        for (int k = 0; k < kGroup; ++k) {
          int q = std::min(7, std::max(-8, int(std::nearbyint(values[k] * inverse)))) + 8;
          to[(k / 8 * 4 + n / 16) * 64 + n % 16 * 4 + k % 4] |= uint8_t(k % 8 < 4 ? q : q << 4);
        }
      }
    }
  });
}

// out [rows, outputs] of x [rows, inputs], both bf16 or, unless the weights are bf16, both fp32; bias [outputs] fp32 or null.
void gale_linear(int bits, const void* x, bool wide, int rows, int inputs, const uint8_t* packed, const float* scales,
                 const float* bias, void* out, int outputs, int threads) {
  int stored = padded(inputs, bits == 8 ? 4 : kGroup), groups = bits == 8 ? 1 : stored / kGroup;
  thread_local std::vector<int8_t> values_memory;
  thread_local std::vector<int32_t> sums_memory;
  thread_local std::vector<float> scale_memory;
  if (long(values_memory.size()) < long(rows) * stored) values_memory.resize(long(rows) * stored);
  if (long(sums_memory.size()) < long(rows) * groups) sums_memory.resize(long(rows) * groups);
  if (int(scale_memory.size()) < rows) scale_memory.resize(rows);
  int8_t* values = values_memory.data();  // thread_local names mean another memory on another thread
  int32_t* sums = sums_memory.data();
  float* a_scales = scale_memory.data();
  const int panels = padded(outputs, kPanel) / kPanel, most = most_rows(bits);
  const long panel_bytes = bits == 16 ? long(kPanel) * inputs * 2 : bits == 8 ? long(kPanel) * stored : long(groups) * kGroupBytes;
  // A panel is claimed whole, several of them where they are so small that claiming would cost.
  const int at_once = std::max<long>(1, std::min<long>(32768 / (panel_bytes * std::max(1, rows / 8)), panels / (2 * threads)));
  const int chunks = (panels + at_once - 1) / at_once;
  if (bits == 16) {
    Pool::run(chunks, threads, [&](int chunk) {
      alignas(64) float sums[6 * kPanel];
      for (int panel = chunk * at_once; panel < std::min(panels, (chunk + 1) * at_once); ++panel) {
        int first = panel * kPanel, here = std::min(kPanel, outputs - first);
        for (int row = 0, now; row < rows; row += now) {
          now = share(rows - row, 6);
          panel16(packed + panel * panel_bytes, (const bf16*)x + long(row) * inputs, now, inputs, sums);
          for (int m = 0; m < now; ++m)
            finish_16(sums + m * kPanel, bias ? bias + first : nullptr, (bf16*)out + long(row + m) * outputs + first, here);
        }
      }
    });
    return;
  }
  auto quantise = [&](int row) {
    int8_t* to = values + long(row) * stored;
    a_scales[row] = wide ? quantise_fp32((const float*)x + long(row) * inputs, inputs, stored, to, sums + long(row) * groups, bits == 4)
                         : quantise_bf16((const bf16*)x + long(row) * inputs, inputs, stored, to, sums + long(row) * groups, bits == 4);
  };
  constexpr int kRowsAtOnce = 16;
  Pool::run((rows + kRowsAtOnce - 1) / kRowsAtOnce, threads, [&](int chunk) {
    for (int row = chunk * kRowsAtOnce; row < std::min(rows, (chunk + 1) * kRowsAtOnce); ++row) quantise(row);
  });
  Pool::run(chunks, threads, [&](int chunk) {
    alignas(64) int32_t integer[12 * kPanel];
    alignas(64) float real[12 * kPanel];
    for (int panel = chunk * at_once; panel < std::min(panels, (chunk + 1) * at_once); ++panel) {
      const uint8_t* w = packed + panel * panel_bytes;
      int first = panel * kPanel, here = std::min(kPanel, outputs - first);
      for (int row = 0, now; row < rows; row += now) {
        now = share(rows - row, most);
        Tokens a{values + long(row) * stored, sums + long(row) * groups, stored, groups};
        if (bits == 8) panel8(w, a, now, stored, integer);
        else panel4(w, a, now, stored, real);
        for (int m = 0; m < now; ++m) {
          float a_scale = a_scales[row + m];
          const float* b = bias ? bias + first : nullptr;
          long at = long(row + m) * outputs + first;
          if (bits == 8 && wide) finish_8_fp32(integer + m * kPanel, a_scale, scales + first, b, (float*)out + at, here);
          else if (bits == 8) finish_8_bf16(integer + m * kPanel, a_scale, scales + first, b, (bf16*)out + at, here);
          else if (wide) finish_4_fp32(real + m * kPanel, a_scale, nullptr, b, (float*)out + at, here);
          else finish_4_bf16(real + m * kPanel, a_scale, nullptr, b, (bf16*)out + at, here);
        }
      }
    }
  });
}

}  // extern "C"
