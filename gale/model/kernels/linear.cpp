// Linear layers over packed weights (packed.h): bf16, or int8 and int4 with activations that are quantised token by token as
// they come.
//
// A row's result does not depend on how many rows there are. (Stock bf16 products differ between one row and several.)
// bf16 adds up input by input. Quantised is out[m][n] = a_scale[m] * sum_k a[m][k] * w[n][k] * w_scale, with a in -127..127
// and w stored without sign, which is what the multiply-add of VNNI takes (u8 x s8); sum_k a[m][k] takes the offset back
// out. Sums of int8 are exact, those of int4 go group by group.
#include <algorithm>
#include <cmath>
#include <vector>

#include "layers.h"
#include "packed.h"
#include "pool.h"

namespace gale {
namespace {

// The next rows of those that are left, at most `most`, in equal shares: 7 rows are 4 and 3, not 6 and 1.
int share(int left, int most) {
  int tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

GALE_INLINE int32_t unsigned_bits(bf16 x) { return x & 0x7fff; }
GALE_INLINE int32_t unsigned_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7fffffff;
}
template <class T>
GALE_INLINE float from_bits(int32_t bits) {
  if (sizeof(T) == 2) return widen(bf16(bits));
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// One token: s8 [inputs], their scale, the offset's share of the sums; for int4 that of each group of 32.
template <class T>
GALE_INLINE float quantise_row(const T* x, int inputs, int stored, int8_t* out, int32_t* sums, bool grouped) {
  int32_t most = 0;  // of what has no sign, bits are in the order of the numbers; compilers know what to do with integers
  for (int k = 0; k < inputs; ++k) most = std::max(most, unsigned_bits(x[k]));
  const float largest = from_bits<T>(most);
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

GALE_CLONES float quantise(const bf16* x, int inputs, int stored, int8_t* out, int32_t* sums, bool grouped) {
  return quantise_row(x, inputs, stored, out, sums, grouped);
}
GALE_CLONES float quantise(const float* x, int inputs, int stored, int8_t* out, int32_t* sums, bool grouped) {
  return quantise_row(x, inputs, stored, out, sums, grouped);
}

// Where few rows are multiplied, memory decides. So while a panel is multiplied, the next is fetched: evenly over all
// tiles of rows, `lines` cache lines at each step from `from` on, so that memory is never idle while there is work.
struct Ahead {
  const uint8_t* from;
  int lines;
};

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
GALE_VNNI void panel8_vnni(const uint8_t* w, Tokens a, int stored, int32_t* out, Ahead ahead) {
  for (int first = 0; first < 4; first += B) {
    __m512i sums[M][B];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) sums[m][b] = _mm512_set1_epi32(a.sums[m * a.sum_stride]);
    const uint8_t* packed = w + first * 64;
    for (int k = 0; k < stored; k += 4, packed += 256) {
      for (int line = 0; line < ahead.lines; ++line) _mm_prefetch((const char*)(ahead.from + line * 64), _MM_HINT_T1);
      ahead.from += ahead.lines * 64;
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
GALE_VNNI void panel4_vnni(const uint8_t* w, Tokens a, int stored, float* out, Ahead ahead) {
  const __m512i mask = _mm512_set1_epi8(15);
  for (int first = 0; first < 4; first += B) {
    __m512 total[M][B];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) total[m][b] = _mm512_setzero_ps();
    const uint8_t* packed = w + first * 64;
    for (int group = 0; group < stored / kGroup; ++group, packed += kGroupBytes) {
      for (int line = 0; first == 0 && line < ahead.lines; ++line)
        _mm_prefetch((const char*)(ahead.from + line * 64), _MM_HINT_T1);
      ahead.from += ahead.lines * 64;
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
                                                                                  float* out, Ahead ahead) {
  for (int first = 0; first < 4; first += B) {
    __m512 sums[M][B];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) sums[m][b] = _mm512_setzero_ps();
    const uint8_t* packed = w + first * 64;
    for (int k = 0; k < inputs; k += 2, packed += 256) {
      for (int line = 0; line < ahead.lines; ++line) _mm_prefetch((const char*)(ahead.from + line * 64), _MM_HINT_T1);
      ahead.from += ahead.lines * 64;
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
constexpr int kMostRows = 12;
int most_rows(int bits) { return bits == 16 ? 6 : level == kPlain ? 1 : level == kAvx2 ? 4 : bits == 8 ? 6 : kMostRows; }

void panel8(const uint8_t* w, Tokens a, int rows, int stored, int32_t* out, Ahead ahead) {
#if defined(__x86_64__)
  using Kernel = void (*)(const uint8_t*, Tokens, int, int32_t*);
  using Fetching = void (*)(const uint8_t*, Tokens, int, int32_t*, Ahead);
  static constexpr Fetching vnni[] = {panel8_vnni<1, 4>, panel8_vnni<2, 4>, panel8_vnni<3, 4>,
                                    panel8_vnni<4, 4>, panel8_vnni<5, 4>, panel8_vnni<6, 4>};
  static constexpr Kernel avx2[] = {panel8_avx2<1>, panel8_avx2<2>, panel8_avx2<3>, panel8_avx2<4>};
  if (level == kVnni) return vnni[rows - 1](w, a, stored, out, ahead);
  if (level == kAvx2) return avx2[rows - 1](w, a, stored, out);
#endif
  (void)ahead;
  panel8_plain(w, a, rows, stored, out);
}

void panel16(const uint8_t* w, const bf16* a, int rows, int inputs, float* out, Ahead ahead) {
#if defined(__x86_64__)
  using Kernel = void (*)(const uint8_t*, const bf16*, int, float*, Ahead);
  static constexpr Kernel kernels[] = {panel16_bf16<1, 4>, panel16_bf16<2, 4>, panel16_bf16<3, 4>,
                                       panel16_bf16<4, 4>, panel16_bf16<5, 4>, panel16_bf16<6, 4>};
  kernels[rows - 1](w, a, inputs, out, ahead);
#else
  (void)w, (void)a, (void)rows, (void)inputs, (void)out, (void)ahead;
#endif
}

void panel4(const uint8_t* w, Tokens a, int rows, int stored, float* out, Ahead ahead) {
#if defined(__x86_64__)
  using Kernel = void (*)(const uint8_t*, Tokens, int, float*);
  using Fetching = void (*)(const uint8_t*, Tokens, int, float*, Ahead);
  static constexpr Fetching vnni[] = {panel4_vnni<1, 4>, panel4_vnni<2, 4>, panel4_vnni<3, 4>,  panel4_vnni<4, 2>,
                                    panel4_vnni<5, 2>, panel4_vnni<6, 2>, panel4_vnni<7, 1>,  panel4_vnni<8, 1>,
                                    panel4_vnni<9, 1>, panel4_vnni<10, 1>, panel4_vnni<11, 1>, panel4_vnni<12, 1>};
  static constexpr Kernel avx2[] = {panel4_avx2<1>, panel4_avx2<2>, panel4_avx2<3>, panel4_avx2<4>};
  if (level == kVnni) return vnni[rows - 1](w, a, stored, out, ahead);
  if (level == kAvx2) return avx2[rows - 1](w, a, stored, out);
#endif
  (void)ahead;
  panel4_plain(w, a, rows, stored, out);
}

template <class Sum, class T>
GALE_INLINE void finish_row(const Sum* sums, float a_scale, const float* w_scales, const float* bias, T* out, int outputs,
                            bool add) {
  for (int n = 0; n < outputs; ++n) {
    float value = float(sums[n]) * (w_scales ? a_scale * w_scales[n] : a_scale);
    T rounded = as<T>(bias ? value + bias[n] : value);
    out[n] = add ? as<T>(widen(out[n]) + widen(rounded)) : rounded;
  }
}

#define GALE_FINISH(Sum, T)                                                                                       \
  GALE_CLONES void finish(const Sum* sums, float a_scale, const float* w_scales, const float* bias, T* out,       \
                          int outputs, bool add) {                                                                \
    finish_row(sums, a_scale, w_scales, bias, out, outputs, add);                                                 \
  }
GALE_FINISH(int32_t, bf16)
GALE_FINISH(int32_t, float)
GALE_FINISH(float, bf16)
GALE_FINISH(float, float)

// Panels [0, panels) in runs for threads to claim: long ones first, since claiming costs a little and the next in a row is
// what is fetched ahead; single ones at last, so that all are done at about the same time.
std::vector<int> runs_of(int panels, int threads) {
  std::vector<int> starts{0};
  while (starts.back() < panels) starts.push_back(starts.back() + std::max(1, std::min(8, (panels - starts.back()) / (2 * threads))));
  return starts;
}

// Rows as they are multiplied: rounded to int8, or for bf16 weights as they are.
struct Rounded {
  std::vector<int8_t> values;
  std::vector<int32_t> sums;
  std::vector<float> scales;

  void resize(long rows, long stored, long groups) {
    if (long(values.size()) < rows * stored) values.resize(rows * stored);
    if (long(sums.size()) < rows * groups) sums.resize(rows * groups);
    if (long(scales.size()) < rows) scales.resize(rows);
  }
};

template <class T>
void multiply_rows(const Product* products, int count, const T* x, int rows, const RowWork& before, bool add, int threads) {
  const int bits = products[0].matrix->bits, inputs = products[0].matrix->inputs;
  const int stored = bits == 16 ? inputs : padded(inputs, bits == 8 ? 4 : kGroup), groups = bits == 4 ? stored / kGroup : 1;
  thread_local Rounded memory;
  Rounded& rounded = memory;  // on another thread the name means another one
  if (bits != 16) rounded.resize(rows, stored, groups);
  auto prepare = [&](int row) {
    if (before) before(row);
    if (bits != 16)
      rounded.scales[row] = quantise(x + long(row) * inputs, inputs, stored, rounded.values.data() + long(row) * stored,
                                     rounded.sums.data() + long(row) * groups, bits == 4);
  };
  if (before || bits != 16) {
    const int at_once = std::max(1, std::min(16, rows / threads));
    Pool::run((rows + at_once - 1) / at_once, threads, [&](int chunk) {
      for (int row = chunk * at_once; row < std::min(rows, (chunk + 1) * at_once); ++row) prepare(row);
    });
  }
  const int most = most_rows(bits), tiles = (rows + most - 1) / most;
  const long steps = bits == 16 ? inputs / 2 : bits == 8 ? stored / 4 : groups, step_bytes = bits == 4 ? kGroupBytes : 4 * kPanel;
  const long panel_bytes = steps * step_bytes;
  auto panel_times_rows = [&](const Product& product, int panel) {
    alignas(64) int32_t integer[kMostRows * kPanel];
    alignas(64) float real[kMostRows * kPanel];
    const Matrix& matrix = *product.matrix;
    const uint8_t* w = matrix.packed + panel * panel_bytes;
    const int first = panel * kPanel, here = std::min(kPanel, matrix.outputs - first);
    const float *bias = matrix.bias ? matrix.bias + first : nullptr, *scales = bits == 8 ? matrix.scales + first : nullptr;
    for (int row = 0, tile = 0, now; row < rows; row += now, ++tile) {
      now = share(rows - row, most);
      // What is fetched during this tile: the same stream a little further on, or a share of the next panel; nothing where
      // so many rows wait that it does not matter.
      const long lines = (step_bytes / 64 + tiles - 1) / tiles;
      Ahead ahead{w + 4096, int(lines)};
      if (tiles > 8) ahead.lines = 0;
      else if (tiles > 1) ahead.from = w + panel_bytes + std::max(0l, std::min(tile * lines * 64 * steps, panel_bytes - lines * 64 * steps));
      Tokens a{rounded.values.data() + long(row) * stored, rounded.sums.data() + long(row) * groups, stored, groups};
      if constexpr (sizeof(T) == 2)
        if (bits == 16) panel16(w, x + long(row) * inputs, now, inputs, real, ahead);
      if (bits == 8) panel8(w, a, now, stored, integer, ahead);
      if (bits == 4) panel4(w, a, now, stored, real, ahead);
      for (int m = 0; m < now; ++m) {
        T* out = static_cast<T*>(product.out) + long(row + m) * matrix.outputs + first;
        const float a_scale = bits == 16 ? 1.0f : rounded.scales[row + m];
        if (bits == 8) finish(integer + m * kPanel, a_scale, scales, bias, out, here, add);
        else finish(real + m * kPanel, a_scale, nullptr, bias, out, here, add);
      }
    }
  };
  auto panels_of = [&](int product) { return (products[product].matrix->outputs + kPanel - 1) / kPanel; };
  int panels = 0;
  for (int product = 0; product < count; ++product) panels += panels_of(product);
  const std::vector<int> runs = runs_of(panels, threads);
  Pool::run(int(runs.size()) - 1, threads, [&](int run) {
    for (int place = runs[run]; place < runs[run + 1]; ++place) {
      int product = 0, panel = place;
      while (panel >= panels_of(product)) panel -= panels_of(product++);
      panel_times_rows(products[product], panel);
    }
  });
}

}  // namespace

void multiply(const Product* products, int count, const bf16* x, int rows, const RowWork& before, bool add, int threads) {
  multiply_rows(products, count, x, rows, before, add, threads);
}

}  // namespace gale

using namespace gale;

extern "C" {

// The best instructions that are used: 0 any processor's, 1 AVX2, 2 AVX-512 VNNI. `most` lowers it, for tests.
int gale_level(int most) {
  level = std::min<int>(best_level(), most);
  return level;
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

// out [rows, outputs] of x [rows, inputs], both bf16 or, unless the weights are bf16, both fp32.
void gale_linear(const Matrix* matrix, const void* x, bool wide, int rows, void* out, int threads) {
  const Product product{matrix, out};
  if (wide) multiply_rows(&product, 1, static_cast<const float*>(x), rows, nullptr, false, threads);
  else multiply_rows(&product, 1, static_cast<const bf16*>(x), rows, nullptr, false, threads);
}

}  // extern "C"
