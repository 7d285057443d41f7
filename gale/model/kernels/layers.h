// What the files offer each other, so that decoder.cpp can put whole layers together.
#pragma once

#include <cstdint>
#include <functional>

#include "rows.h"

namespace gale {

// Packed weights (packed.h) [outputs, inputs] of 16, 8 or 4 bits, with a bias in fp32 or null. A mirror stands in Python.
struct Matrix {
  const uint8_t* packed;
  const float *scales, *bias;
  int32_t bits, inputs, outputs, unused;
};

struct Product {
  const Matrix* matrix;
  void* out;  // [rows, outputs]
};

// What must be done to each row before it is read.
using RowWork = std::function<void(int)>;

// linear.cpp: products of the same x [rows, inputs], which are read and rounded once for all of them. Matrices are of one
// kind. `add`: what comes out is added to what is there, as two bf16 numbers are.
void multiply(const Product* products, int count, const bf16* x, int rows, const RowWork& before, bool add, int threads);

// A sequence of a batch: where its keys and values [layers, key heads, capacity, size] are, how many it holds, and
// which rows of the batch are its new tokens. A mirror stands in Python.
struct Sequence {
  bf16 *keys, *values;
  int64_t layer_stride, head_stride;
  int32_t length, first_row, count, unused;
};

struct Heads {
  const bf16 *q, *k, *v;  // [rows, heads, size], those of keys and values [rows, key heads, size]
  bf16* out;
  int layer, heads, key_heads, size, window;  // window 0: none
  float scale;
};

// attention.cpp: stores the new keys and values of one layer in their sequences' caches, then attends.
void attend(const Heads& heads, const Sequence* sequences, int count, int threads);

// rows.cpp: one row each; `out` may be where it came from.
void norm(const bf16* x, const bf16* weight, float eps, int size, bf16* out);
void rotate(bf16* x, const bf16* cos, const bf16* sin, int half);
void gate(const bf16* x, const bf16* up, int size, bf16* out);

}  // namespace gale
