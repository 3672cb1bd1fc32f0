// What a decode does besides forwards: the largest of a row of scores, keys and values that change their columns, and
// memory for weights.
//
// Letters: N rows, V scores of a row, k of them wanted; R pairs of row and key/value head, D head size, S columns of
// the cache, m tokens that move.

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

namespace {

// What is not a number is larger than all that are.
inline bool larger(float a, float b) { return a > b || (a != a && b == b); }

// The k largest of scores [V] in order, and where they stand; of equal ones the first. k <= V.
void largest(const float* scores, int64_t V, int64_t k, float* values, int64_t* places) {
  int64_t held = 0;
  const auto insert = [&](float value, int64_t place) {
    int64_t at = std::min(held, k - 1);
    for (; at > 0 && larger(value, values[at - 1]); --at) values[at] = values[at - 1], places[at] = places[at - 1];
    values[at] = value, places[at] = place;
    held = std::min(held + 1, k);
  };
  int64_t v = 0;
  for (; v < k; ++v) insert(scores[v], v);
  while (v < V) {
    // Nearly all stretches of 64 hold none of the largest.
    const __m512 least = _mm512_set1_ps(values[k - 1]);
    for (; v + 64 <= V; v += 64) {
      const __mmask16 a = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + v), least, _CMP_NLE_UQ);
      const __mmask16 b = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + v + 16), least, _CMP_NLE_UQ);
      const __mmask16 c = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + v + 32), least, _CMP_NLE_UQ);
      const __mmask16 d = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + v + 48), least, _CMP_NLE_UQ);
      if (a | b | c | d) break;
    }
    for (const int64_t end = std::min(v + 64, V); v < end; ++v) {
      if (larger(scores[v], values[k - 1])) insert(scores[v], v);
    }
  }
}

// Columns source[i] to columns target[i] of keys [D, S] and values [S, D].
template <class T>
void moved(T* keys, T* values, int64_t D, int64_t S, const int64_t* source, const int64_t* target, int64_t m) {
  for (int64_t i = 0; i < m; ++i) {
    if (source[i] == target[i]) continue;
    for (int64_t d = 0; d < D; ++d) keys[d * S + target[i]] = keys[d * S + source[i]];
    memcpy(values + target[i] * D, values + source[i] * D, D * sizeof(T));
  }
}

template <class T>
void move(
    T* const* keys, T* const* values, int64_t layers, int64_t R, int64_t heads, int64_t D, int64_t S,
    const int64_t* source, const int64_t* target, int64_t m, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t item = 0; item < layers * R; ++item) {
    const int64_t layer = item / R, r = item % R, row = r / heads;
    moved(keys[layer] + r * D * S, values[layer] + r * S * D, D, S, source + row * m, target + row * m, m);
  }
}

}  // namespace

extern "C" {

// values [N, k] and places [N, k] of the largest of scores [N, V].
void largest_scores(
    const float* scores, int64_t N, int64_t V, int64_t k, float* values, int64_t* places, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (N > 1)
  for (int64_t n = 0; n < N; ++n) largest(scores + n * V, V, k, values + n * k, places + n * k);
}

// In all layers, keys [R, D, S] and values [R, S, D]: columns source [rows, m] to columns target [rows, m], one after
// another; each row has `heads` of the R.
void move_float32(
    float* const* keys, float* const* values, int64_t layers, int64_t R, int64_t heads, int64_t D, int64_t S,
    const int64_t* source, const int64_t* target, int64_t m, int64_t threads) {
  move(keys, values, layers, R, heads, D, S, source, target, m, threads);
}

void move_bfloat16(
    uint16_t* const* keys, uint16_t* const* values, int64_t layers, int64_t R, int64_t heads, int64_t D, int64_t S,
    const int64_t* source, const int64_t* target, int64_t m, int64_t threads) {
  move(keys, values, layers, R, heads, D, S, source, target, m, threads);
}

// Asks for large pages where memory has not been touched yet; without them it is merely slower.
void large_pages(void* from, int64_t bytes, int64_t) { madvise(from, bytes, MADV_HUGEPAGE); }

}  // extern "C"
