// Causal attention of new tokens over each sequence's cached keys and values, bf16 in and out, fp32 between.
//
// Each query's result is made by the same operations in the same order whoever stands beside it: alone or in a batch, in
// one chunk of a prompt or another, as one token or as a draft that is checked. So answers never depend on scheduling.
//
// A task is a key head of a sequence with up to 32 of its queries (token and head of the group). Keys are taken 16 at
// once and transposed to pairs of dimensions, so that one instruction of AVX512-BF16 adds two products to 16 scores;
// what is loaded serves up to 8 queries at once.
#include <algorithm>
#include <cmath>
#include <vector>

#include "layers.h"
#include "pool.h"

namespace gale {
namespace {

constexpr int kTask = 32, kKeys = 16, kDots = 4, kMix = 8;

#if defined(__x86_64__)
#define GALE_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

// Numbers that a transposed block of keys takes.
constexpr int pairs_of(int size) { return (size + 31) / 32 * 256; }

// 16 keys of `size` numbers, `size` apart -> [size / 2][16] pairs. Keys from `there` on are not read.
GALE_BF16 void transpose(const bf16* keys, int size, int there, int32_t* out) {
  for (int part = 0; part * 32 < size; ++part) {  // a 16 x 16 transposition of 32-bit pairs
    const __mmask16 inside = size - part * 32 >= 32 ? 0xffff : (1 << (size - part * 32) / 2) - 1;
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) 
      r[i] = _mm512_maskz_loadu_epi32(inside, keys + long(std::min(i, there - 1)) * size + part * 32);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // r[i], r[i + 4], ...: column i + 4 * lane of 4 keys each
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    int32_t* to = out + part * 256;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm512_storeu_si512(to + (i) * 16, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
      _mm512_storeu_si512(to + (i + 4) * 16, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
      _mm512_storeu_si512(to + (i + 8) * 16, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
      _mm512_storeu_si512(to + (i + 12) * 16, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
    }
  }
}

// Scores of Q queries with B x 16 keys each.
template <int Q, int B>
GALE_BF16 void dots(const bf16* const* queries, const int32_t* keys, int size, float scale, float* scores, long stride) {
  __m512 sums[Q][B][2];  // of even and of odd pairs, so that a sum needs not wait for the one before it
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) sums[q][b][0] = sums[q][b][1] = _mm512_setzero_ps();
  for (int pair = 0; pair < size / 2; pair += 2) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      __m512bh key[B];
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) key[b] = (__m512bh)_mm512_loadu_si512(keys + pairs_of(size) * b + (pair + odd) * kKeys);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        int32_t both;
        std::memcpy(&both, queries[q] + 2 * (pair + odd), 4);
        const __m512bh query = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 2
        for (int b = 0; b < B; ++b) sums[q][b][odd] = _mm512_dpbf16_ps(sums[q][b][odd], key[b], query);
      }
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b)
      _mm512_storeu_ps(scores + q * stride + b * kKeys,
                       _mm512_mul_ps(_mm512_add_ps(sums[q][b][0], sums[q][b][1]), _mm512_set1_ps(scale)));
}

GALE_BF16 inline __m512 exponential(__m512 x) {  // as in rows.cpp
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Scores of the keys [low, high) -> weights in bf16, at the beginning of where they were; all else of [start, end) becomes
// 0. Both are multiples of 16.
GALE_BF16 void softmax(float* scores, int start, int end, int low, int high) {
  const __m512 never = _mm512_set1_ps(-INFINITY);
  __m512 largest = never;
  for (int t = start; t < end; t += kKeys) {
    __m512i place = _mm512_add_epi32(_mm512_set1_epi32(t), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    __mmask16 seen = _mm512_cmpge_epi32_mask(place, _mm512_set1_epi32(low)) & _mm512_cmplt_epi32_mask(place, _mm512_set1_epi32(high));
    __m512 value = _mm512_mask_loadu_ps(never, seen, scores + t - start);
    _mm512_storeu_ps(scores + t - start, value);
    largest = _mm512_max_ps(largest, value);
  }
  const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  __m512 sums = _mm512_setzero_ps();
  for (int t = start; t < end; t += kKeys) {
    __m512 value = _mm512_loadu_ps(scores + t - start);
    __mmask16 seen = _mm512_cmpneq_ps_mask(value, never);
    value = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(value, most)));
    _mm512_storeu_ps(scores + t - start, value);
    sums = _mm512_add_ps(sums, value);
  }
  const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sums));
  for (int t = start; t < end; t += kKeys)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(scores) + (t - start) / kKeys,
                        (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(scores + t - start), share)));
}

// Adds weights[q][t] * values[t] and weights[q][t + 1] * values[t + 1] to the sums of 32 P numbers, of which those behind
// `inside` are not read; nor is the second token where it is not `there`.
template <int Q, int P>
GALE_BF16 inline void mix_pair(const bf16* weights, long stride, const bf16* values, int size, bool there, const __mmask32* inside,
                               __m512 (*sums)[2 * P]) {
  __m512i low[P], high[P];  // numbers of both tokens side by side: 0 to 3 and 4 to 7 of each 8
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    const __m512i first = _mm512_maskz_loadu_epi16(inside[p], values + 32 * p);
    const __m512i second = _mm512_maskz_loadu_epi16(there ? inside[p] : 0, values + size + 32 * p);
    low[p] = _mm512_unpacklo_epi16(first, second);
    high[p] = _mm512_unpackhi_epi16(first, second);
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
    int32_t both;
    std::memcpy(&both, weights + q * stride, 4);
    const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      sums[q][2 * p] = _mm512_dpbf16_ps(sums[q][2 * p], (__m512bh)low[p], weight);
      sums[q][2 * p + 1] = _mm512_dpbf16_ps(sums[q][2 * p + 1], (__m512bh)high[p], weight);
    }
  }
}

// out[q][at..at + 32 P) = sum over t in [0, tokens) of weights[q][t] * values[t][at..at + 32 P)
template <int Q, int P>
GALE_BF16 void mix(const bf16* weights, long stride, const bf16* values, int size, int tokens, bf16* const* out, int at) {
  __mmask32 inside[P];
  __m512 sums[Q][2 * P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    const int left = size - at - 32 * p;
    inside[p] = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) sums[q][2 * p] = sums[q][2 * p + 1] = _mm512_setzero_ps();
  }
  int t = 0;
  for (; t + 1 < tokens; t += 2) mix_pair<Q, P>(weights + t, stride, values + long(t) * size + at, size, true, inside, sums);
  if (t < tokens) mix_pair<Q, P>(weights + t, stride, values + long(t) * size + at, size, false, inside, sums);
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      __m512 first = _mm512_shuffle_f32x4(sums[q][2 * p], sums[q][2 * p + 1], 0x44);   // low 0, low 1, high 0, high 1
      __m512 second = _mm512_shuffle_f32x4(sums[q][2 * p], sums[q][2 * p + 1], 0xee);  // low 2, low 3, high 2, high 3
      first = _mm512_shuffle_f32x4(first, first, 0xd8);
      second = _mm512_shuffle_f32x4(second, second, 0xd8);
      _mm512_mask_storeu_epi16(out[q] + at + 32 * p, inside[p], (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
}

inline void fetch(const bf16* from, int numbers) {
  for (int i = 0; i < numbers; i += 32) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
}

// The first keys and values of a head, which for short sequences are all.
void fetch_first(const Heads& l, const Sequence& s, int key_head) {
  const long at = l.layer * s.layer_stride + key_head * s.head_stride;
  const int numbers = std::min(s.length + s.count, 3 * kKeys) * l.size;
  fetch(s.keys + at, numbers);
  fetch(s.values + at, numbers);
}

void attend_task(const Heads& l, const Sequence& s, int key_head, int first, int count) {
  using Dots = void (*)(const bf16* const*, const int32_t*, int, float, float*, long);
  using Mix = void (*)(const bf16*, long, const bf16*, int, int, bf16* const*, int);
  static constexpr Dots dots_of[2][kDots] = {{dots<1, 1>, dots<2, 1>, dots<3, 1>, dots<4, 1>},
                                             {dots<1, 2>, dots<2, 2>, dots<3, 2>, dots<4, 2>}};
  // Few queries take more dimensions at once, so that there are always sums enough to be busy with.
  static constexpr Mix mix_of[] = {mix<1, 4>, mix<2, 4>, mix<3, 2>, mix<4, 2>, mix<5, 1>, mix<6, 1>, mix<7, 1>, mix<8, 1>};
  static constexpr int parts_of[] = {4, 4, 2, 2, 1, 1, 1, 1};
  const int group = l.heads / l.key_heads;
  thread_local std::vector<float> scores;
  thread_local std::vector<int32_t> pairs;
  const bf16* queries[kTask];
  bf16* out[kTask];
  int last[kTask];  // the place behind the last key that the query sees
  for (int q = 0; q < count; ++q) {
    int token = (first + q) / group, head = key_head * group + (first + q) % group;
    long at = (long(s.first_row + token) * l.heads + head) * l.size;
    queries[q] = l.q + at;
    out[q] = l.out + at;
    last[q] = s.length + token + 1;
  }
  const int tokens = last[count - 1], end = (tokens + kKeys - 1) / kKeys * kKeys;
  const int begin = l.window ? std::max(0, last[0] - l.window) / kKeys * kKeys : 0;
  const long stride = end - begin;
  if (long(scores.size()) < count * stride) scores.resize(count * stride);
  if (int(pairs.size()) < 2 * pairs_of(l.size)) pairs.resize(2 * pairs_of(l.size));
  const long at = l.layer * s.layer_stride + key_head * s.head_stride;
  const bf16 *keys = s.keys + at, *values = s.values + at;
  for (int t = begin, blocks; t < end; t += blocks * kKeys) {
    blocks = std::min(2, (end - t) / kKeys);
    for (int block = 0; block < blocks; ++block) {
      const int here = t + block * kKeys;
      fetch(keys + long(here + 2 * kKeys) * l.size, std::min(kKeys, tokens - here - 2 * kKeys) * l.size);
      fetch(values + long(here) * l.size, std::min(kKeys, tokens - here) * l.size);
      transpose(keys + long(here) * l.size, l.size, std::min(kKeys, tokens - here), pairs.data() + block * pairs_of(l.size));
    }
    for (int q = 0; q < count; q += kDots)
      if (last[std::min(count, q + kDots) - 1] > t)
        dots_of[blocks - 1][std::min(kDots, count - q) - 1](queries + q, pairs.data(), l.size, l.scale,
                                                            scores.data() + q * stride + t - begin, stride);
  }
  for (int q = 0; q < count; ++q)
    softmax(scores.data() + q * stride, begin, end, l.window ? std::max(0, last[q] - l.window) : 0, last[q]);
  const bf16* weights = reinterpret_cast<const bf16*>(scores.data());
  for (int q = 0; q < count; q += kMix) {
    const int now = std::min(kMix, count - q);
    for (int part = 0; part < l.size; part += 32 * parts_of[now - 1])
      mix_of[now - 1](weights + 2 * q * stride, 2 * stride, values + long(begin) * l.size, l.size, last[q + now - 1] - begin,
                      out + q, part);
  }
}

// Puts the new keys and values of a head where they belong.
void store(const Heads& l, const Sequence& s, int key_head) {
  long at = l.layer * s.layer_stride + key_head * s.head_stride + long(s.length) * l.size;
  for (int token = 0; token < s.count; ++token, at += l.size) {
    const long from = (long(s.first_row + token) * l.key_heads + key_head) * l.size;
    std::memcpy(s.keys + at, l.k + from, l.size * sizeof(bf16));
    std::memcpy(s.values + at, l.v + from, l.size * sizeof(bf16));
  }
}

#endif

}  // namespace

void attend(const Heads& l, const Sequence* sequences, int count, int threads) {
#if defined(__x86_64__)
  const int group = l.heads / l.key_heads;
  auto tiles_of = [&](const Sequence& s) { return (s.count * group + kTask - 1) / kTask; };
  thread_local std::vector<int> starts_memory;
  std::vector<int>& starts = starts_memory;
  starts.assign(1, 0);
  long work = 0;
  for (int i = 0; i < count; ++i) {
    const Sequence& s = sequences[i];
    starts.push_back(starts.back() + l.key_heads * tiles_of(s));
    work += long(s.count) * (s.length + s.count) * l.heads * l.size;
    if (tiles_of(s) > 1) Pool::run(l.key_heads, threads, [&](int head) { store(l, s, head); });  // for all tiles to see
  }
  const int tasks = starts.back();
  if (work < 100000) threads = 1;  // little work is done sooner than handed over
  const int at_once = int(std::max(1l, std::min(tasks / (8l * threads), 200000 * tasks / work)));
  Pool::run((tasks + at_once - 1) / at_once, threads, [&](int chunk) {
    const int first = chunk * at_once, end = std::min(tasks, first + at_once);
    int i = int(std::upper_bound(starts.begin(), starts.end(), first) - starts.begin()) - 1;
    for (int task = first; task < end; ++task) {
      if (task == starts[i + 1]) ++i;
      const Sequence& s = sequences[i];
      const int tiles = tiles_of(s), place = task - starts[i], head = place / tiles, query = place % tiles * kTask;
      const int next = task + 1 == starts[i + 1] ? i + 1 : i;
      if (task + 1 < end) fetch_first(l, sequences[next], (task + 1 - starts[next]) / tiles_of(sequences[next]));
      if (tiles == 1) store(l, s, head);
      attend_task(l, s, head, query, std::min(kTask, s.count * group - query));
    }
  });
#else
  (void)l, (void)sequences, (void)count, (void)threads;
#endif
}

}  // namespace gale

using namespace gale;

extern "C" {

// Whether this processor has what attending needs.
int gale_can_attend() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
#else
  return 0;
#endif
}

// Stores the new keys and values k, v [rows, key heads, size] of one layer in their sequences' caches, then
// out [rows, heads, size] of q, likewise. `size` is a multiple of 4. `window` 0 means that all is seen.
void gale_attend(const Sequence* sequences, int count, int layer, const bf16* q, const bf16* k, const bf16* v, bf16* out,
                 int heads, int key_heads, int size, int window, float scale, int threads) {
  attend(Heads{q, k, v, out, layer, heads, key_heads, size, window, scale}, sequences, count, threads);
}

}  // extern "C"
