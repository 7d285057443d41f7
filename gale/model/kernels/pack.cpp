// Packing weights, and rounding them to 8 or 4 bits.
#include "packed.h"
#include "pool.h"
#include "rows.h"

namespace gale {
namespace {

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

}  // namespace
}  // namespace gale

using namespace gale;

extern "C" {

long gale_packed_bytes(int bits, int outputs, int inputs) {
  long panels = padded(outputs, kPanel) / kPanel;
  if (bits == 16) return panels * kPanel * padded(inputs, 2) * 2;
  return bits == 8 ? panels * kPanel * padded(inputs, 4) : panels * (padded(inputs, kGroup) / kGroup) * kGroupBytes;
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

}  // extern "C"
