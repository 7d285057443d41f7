// What a layer does to each token by itself: normalise, rotate, gate. In bf16, rounded where torch rounds.
#include <algorithm>
#include <cmath>

#include "layers.h"
#include "pool.h"

namespace gale {
namespace {

// exp(x) for x <= 88, within 2e-7 of its value: 2^n times a polynomial; unlike the library's it is vectorised.
GALE_INLINE float exponential(float x) {
  x = std::max(x, -87.0f);
  float n = std::nearbyint(x * 1.44269504f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

}  // namespace

GALE_CLONES void norm(const bf16* x, const bf16* weight, float eps, int size, bf16* out) {
  float squares = 0;
  for (int i = 0; i < size; ++i) squares += widen(x[i]) * widen(x[i]);
  float scale = 1.0f / std::sqrt(squares / float(size) + eps);
  for (int i = 0; i < size; ++i) out[i] = narrow(rounded(widen(x[i]) * scale) * widen(weight[i]));
}

// Each pair (i, i + half) by the angle of its place.
GALE_CLONES void rotate(bf16* x, const bf16* cos, const bf16* sin, int half) {
  for (int i = 0; i < half; ++i) {
    float first = widen(x[i]), second = widen(x[i + half]);
    x[i] = narrow(rounded(first * widen(cos[i])) + rounded(-second * widen(sin[i])));
    x[i + half] = narrow(rounded(second * widen(cos[i + half])) + rounded(first * widen(sin[i + half])));
  }
}

GALE_CLONES void gate(const bf16* x, const bf16* up, int size, bf16* out) {
  for (int i = 0; i < size; ++i) {
    float value = widen(x[i]);
    out[i] = narrow(rounded(value / (1.0f + exponential(std::min(-value, 88.0f)))) * widen(up[i]));
  }
}

namespace {

// A number in the order of the bf16 number that it stands for.
GALE_INLINE int16_t order(bf16 x) {
  int16_t bits = int16_t(x);
  if (bits < 0) bits = int16_t(bits ^ 0x7fff);
  return bits == -1 ? 0 : bits;  // both zeros are equal
}

GALE_CLONES long likeliest(const bf16* x, int size) {
  int16_t most = INT16_MIN;
  int first = 0;  // of the piece with the largest
  for (int low = 0; low < size; low += 256) {
    const int high = std::min(size, low + 256);
    int16_t here = INT16_MIN;
    for (int i = low; i < high; ++i) here = std::max(here, order(x[i]));
    if (here > most) most = here, first = low;
  }
  while (first < size - 1 && order(x[first]) != most) ++first;
  return first;
}

}  // namespace
}  // namespace gale

using namespace gale;

extern "C" {

// RMSNorm of x [rows, size] with weight [size].
void gale_norm(const bf16* x, const bf16* weight, float eps, int rows, int size, bf16* out, int threads) {
  over_rows(rows, size, threads, [&](long row) { norm(x + row * size, weight, eps, size, out + row * size); });
}

// Heads of x [rows, heads, size]: RMSNorm with weight [size] where there is one, then RoPE with cos and sin [rows, size].
void gale_norm_rotate(const bf16* x, const bf16* weight, float eps, const bf16* cos, const bf16* sin, int rows, int heads,
                      int size, bf16* out, int threads) {
  over_rows(rows, heads * size, threads, [&](long row) {
    for (int head = 0; head < heads; ++head) {
      long at = (row * heads + head) * size;
      if (weight) norm(x + at, weight, eps, size, out + at);
      else std::copy(x + at, x + at + size, out + at);
      rotate(out + at, cos + row * size, sin + row * size, size / 2);
    }
  });
}

// Where the largest number of each row of x [rows, size] is, the first of them.
void gale_likeliest(const bf16* x, int rows, int size, int64_t* out, int threads) {
  over_rows(rows, size, threads, [&](long row) { out[row] = likeliest(x + row * size, size); });
}

// silu(x) * up, each [rows, size].
void gale_silu_gate(const bf16* x, const bf16* up, int rows, int size, bf16* out, int threads) {
  over_rows(rows, size, threads, [&](long row) { gate(x + row * size, up + row * size, size, out + row * size); });
}

}  // extern "C"
