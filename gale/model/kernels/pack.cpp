// Packing weights, and rounding them to 8 or 4 bits on the way.
//
// In a panel the same word of all 64 rows stands side by side (packed.h). So 16 rows change places with their inputs, 32 of
// these at a time, and all that follows is done to 16 rows at once.
#include "packed.h"
#include "pool.h"

namespace gale {
namespace {

constexpr int kRows = 16, kWords = 16;

// Weights [outputs, inputs] in rows of bf16 or, if wide, of fp32.
struct Weights {
  const uint8_t* values;
  bool wide;
  int outputs, inputs;
};

// Words [word][row] from `first` on, zero beyond the end.
GALE_INLINE void read_words(const Weights& weights, int row, int first, uint32_t (*out)[kRows]) {
  uint32_t rows[kRows][kWords] = {};
  const long row_bytes = weights.inputs * (weights.wide ? 4l : 2l), left = row_bytes - 4l * first;
  for (int n = 0; n < kRows && row + n < weights.outputs; ++n) {
    const uint8_t* from = weights.values + (row + n) * row_bytes + 4l * first;
    if (left >= long(sizeof rows[n])) std::memcpy(rows[n], from, sizeof rows[n]);
    else if (left > 0) std::memcpy(rows[n], from, left);
  }
  for (int word = 0; word < kWords; ++word)
    for (int n = 0; n < kRows; ++n) out[word][n] = rows[n][word];
}

// A group of 32 inputs as numbers [input][row].
GALE_INLINE void read_group(const Weights& weights, int row, int group, float (*out)[kRows]) {
  uint32_t words[kGroup][kRows];
  if (weights.wide) {
    for (int half = 0; half < 2; ++half) read_words(weights, row, group * kGroup + half * kWords, words + half * kWords);
  } else {
    read_words(weights, row, group * kWords, words + kWords);
    for (int word = 0; word < kWords; ++word)
      for (int n = 0; n < kRows; ++n) {
        const uint32_t two = words[kWords + word][n];
        words[2 * word][n] = two << 16;
        words[2 * word + 1][n] = two & 0xffff0000;
      }
  }
  std::memcpy(out, words, sizeof words);
}

GALE_INLINE float round4(float value, float inverse) {
  return std::min(7.0f, std::max(-8.0f, std::nearbyint(value * inverse)));
}

// The scale that rounds a row's 32 numbers with the least squared error, and what to multiply with for it: the one furthest
// out becomes -8, or is cut a little so that the others are finer.
GALE_INLINE void best_scales(const float (*values)[kRows], uint16_t* best, float* best_inverses) {
  float furthest[kRows] = {}, least[kRows];
  for (int k = 0; k < kGroup; ++k)
    for (int n = 0; n < kRows; ++n) furthest[n] = std::fabs(values[k][n]) > std::fabs(furthest[n]) ? values[k][n] : furthest[n];
  for (int n = 0; n < kRows; ++n) least[n] = HUGE_VALF, best[n] = 0, best_inverses[n] = 0;
  for (int step = 0; step < 12; ++step) {
    uint16_t halves[kRows];
    float scales[kRows], inverses[kRows], errors[kGroup / 2][kRows];
    for (int n = 0; n < kRows; ++n) {
      halves[n] = float_to_half(furthest[n] / (-9.0f + 0.25f * step));  // to -9..-6.25
      scales[n] = half_to_float(halves[n]);
      inverses[n] = scales[n] != 0 ? 1.0f / scales[n] : 0.0f;
    }
    for (int k = 0; k < kGroup / 2; ++k)
      for (int n = 0; n < kRows; ++n) {
        const float one = values[k][n], other = values[k + kGroup / 2][n];
        const float error = round4(one, inverses[n]) * scales[n] - one, further = round4(other, inverses[n]) * scales[n] - other;
        errors[k][n] = error * error + further * further;
      }
    for (int half = kGroup / 4; half > 0; half /= 2)
      for (int k = 0; k < half; ++k)
        for (int n = 0; n < kRows; ++n) errors[k][n] += errors[k + half][n];
    for (int n = 0; n < kRows; ++n) {
      const bool better = errors[0][n] < least[n] && furthest[n] != 0;
      least[n] = better ? errors[0][n] : least[n];
      best[n] = better ? halves[n] : best[n];
      best_inverses[n] = better ? inverses[n] : best_inverses[n];
    }
  }
}

// Scales of whole rows, and what to multiply with to round them to int8.
GALE_INLINE void row_scales(const Weights& weights, int first, float* scales, float* inverses) {
  float values[kGroup][kRows], largest[kRows] = {};
  for (int group = 0; group * kGroup < weights.inputs; ++group) {
    read_group(weights, first, group, values);
    for (int k = 0; k < kGroup; ++k)
      for (int n = 0; n < kRows; ++n) largest[n] = std::max(largest[n], std::fabs(values[k][n]));
  }
  for (int n = 0; n < kRows; ++n) {
    scales[n] = largest[n] / 127.0f;
    inverses[n] = largest[n] > 0 ? 127.0f / largest[n] : 0.0f;
  }
}

// 16 rows of a panel from `within` on, which are the weights' from `first` on.
GALE_CLONES void pack_rows(int bits, const Weights& weights, int first, uint8_t* panel, int within, float* scales) {
  const int words = bits == 16 ? weights.inputs / 2 : padded(weights.inputs, bits == 8 ? 4 : kGroup) * bits / 32;
  float values[kGroup][kRows], inverses[kRows];
  uint32_t packed[kWords][kRows];
  if (bits == 8) row_scales(weights, first, scales, inverses);
  for (int group = 0; group * bits < words; ++group) {  // a group of 32 inputs has `bits` words
    uint8_t* to = panel + group * (bits == 4 ? long(kGroupBytes) : bits * 4l * kPanel);
    if (bits == 16) read_words(weights, first, group * kWords, packed);
    else read_group(weights, first, group, values);
    if (bits == 8) {
      for (int word = 0; word < 8; ++word)
        for (int n = 0; n < kRows; ++n) {
          packed[word][n] = 0;
          for (int k = 0; k < 4; ++k)
            packed[word][n] |= uint32_t(uint8_t(128 + int(std::nearbyint(values[4 * word + k][n] * inverses[n])))) << 8 * k;
        }
    }
    if (bits == 4) {
      uint16_t halves[kRows];
      best_scales(values, halves, inverses);
      std::memcpy(to + kPanel * kGroup / 2 + 2 * within, halves, sizeof halves);
      for (int word = 0; word < 4; ++word)
        for (int n = 0; n < kRows; ++n) {
          packed[word][n] = 0;
          for (int k = 0; k < 8; ++k)
            packed[word][n] |= uint32_t(int(round4(values[8 * word + k][n], inverses[n])) + 8) << (8 * (k % 4) + k / 4 * 4);
        }
    }
    for (int word = 0; word < std::min(bits, words - group * bits); ++word)
      std::memcpy(to + 4 * (word * kPanel + within), packed[word], sizeof packed[word]);
  }
}

}  // namespace
}  // namespace gale

using namespace gale;

extern "C" {

long gale_packed_bytes(int bits, int outputs, int inputs) {
  long panels = padded(outputs, kPanel) / kPanel;
  if (bits == 16) return panels * kPanel * padded(inputs, 2) * 2;
  return bits == 8 ? panels * kPanel * padded(inputs, 4) : panels * (padded(inputs, kGroup) / kGroup) * kGroupBytes;
}

// Packs weights [outputs, inputs] of bf16 or, if wide, of fp32: 16 bits as they are (bf16, an even number of inputs), 8 and
// 4 rounded; int8 also fills scales [padded outputs].
void gale_pack(int bits, const void* weights, bool wide, int outputs, int inputs, uint8_t* packed, float* scales, int threads) {
  const Weights given{static_cast<const uint8_t*>(weights), wide, outputs, inputs};
  const int panels = padded(outputs, kPanel) / kPanel;
  const long panel_bytes = gale_packed_bytes(bits, kPanel, inputs);
  Pool::run(panels, threads, [&](int panel) {
    for (int within = 0; within < kPanel; within += kRows) {
      const int first = panel * kPanel + within;
      pack_rows(bits, given, first, packed + panel * panel_bytes, within, scales + first);
    }
  });
}

}  // extern "C"
