// All layers of a dense decoder in one call: what Decoder.forward of gale/model/transformer.py does module by module, with
// the same kernels in the same order and rounded at the same places, so to the same bits. Between two kernels nothing
// happens but what is written here.
#include <vector>

#include "layers.h"
#include "pool.h"

namespace gale {
namespace {

// One layer, and the model. Mirrors stand in gale/model/native.py.
struct Block {
  const bf16 *input_norm, *q_norm, *k_norm, *mlp_norm;  // those of queries and keys null where there are none
  Matrix q, k, v, o, gate, up, down;
  int64_t window;  // 0: none
};

struct Decoder {
  const Block* blocks;
  const bf16* norm;
  float eps, scale;  // of norms; of scores
  int32_t layers, hidden, intermediate, heads, key_heads, size;
};

}  // namespace
}  // namespace gale

using namespace gale;

extern "C" {

// The embedded tokens x [rows, hidden] of the sequences through all layers, into out, likewise, normalised at last; x is
// changed. Row n stands at positions[n], for which there is a row in cos and sin [.., size].
void gale_decode(const Decoder* decoder, const Sequence* sequences, int count, bf16* x, int rows, const int64_t* positions,
                 const bf16* cos, const bf16* sin, bf16* out, int threads) {
  const Decoder& d = *decoder;
  const long queries = d.heads * d.size, keys = d.key_heads * d.size;
  thread_local std::vector<bf16> memory;
  const size_t wanted = rows * (d.hidden + 2 * queries + 2 * keys + 2l * d.intermediate);
  if (memory.size() < wanted) memory.resize(wanted);
  bf16 *normed = memory.data(), *q = normed + rows * d.hidden, *k = q + rows * queries, *v = k + rows * keys;
  bf16 *attended = v + rows * keys, *gated = attended + rows * queries, *up = gated + rows * d.intermediate;
  auto normalise = [&](const bf16* weight, bf16* to) {
    return [=, &d](int row) { norm(x + long(row) * d.hidden, weight, d.eps, d.hidden, to + long(row) * d.hidden); };
  };
  for (int layer = 0; layer < d.layers; ++layer) {
    const Block& b = d.blocks[layer];
    const Product inputs[] = {{&b.q, q}, {&b.k, k}, {&b.v, v}};
    multiply(inputs, 3, normed, rows, normalise(b.input_norm, normed), false, threads);
    over_rows(rows, int(queries + keys), threads, [&](long row) {
      for (int head = 0; head < d.heads + d.key_heads; ++head) {
        const bool query = head < d.heads;
        bf16* at = query ? q + row * queries + head * d.size : k + row * keys + (head - d.heads) * d.size;
        if (const bf16* weight = query ? b.q_norm : b.k_norm) norm(at, weight, d.eps, d.size, at);
        rotate(at, cos + positions[row] * d.size, sin + positions[row] * d.size, d.size / 2);
      }
    });
    attend(Heads{q, k, v, attended, layer, d.heads, d.key_heads, d.size, int(b.window), d.scale}, sequences, count, threads);
    const Product output{&b.o, x};
    multiply(&output, 1, attended, rows, nullptr, true, threads);
    const Product inner[] = {{&b.gate, gated}, {&b.up, up}};
    multiply(inner, 2, normed, rows, normalise(b.mlp_norm, normed), false, threads);
    const Product down{&b.down, x};
    multiply(&down, 1, gated, rows, [&](int row) {
      bf16* here = gated + long(row) * d.intermediate;
      gate(here, up + long(row) * d.intermediate, d.intermediate, here);
    }, true, threads);
  }
  over_rows(rows, d.hidden, threads, normalise(d.norm, out));
}

}  // extern "C"
