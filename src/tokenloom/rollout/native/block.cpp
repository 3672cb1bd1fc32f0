// Few tokens through decoder layers, and matrix products of few rows, on AVX-512: in float32, or in bfloat16 with
// float32 sums where the processor has such products.
//
// A decode step is too small for calls of single operations: here layers one after another are one call. Their weights
// stream through the cores once, for all rows together. Everything works on raw pointers; `block.py` checks sizes and formats.
//
// T is the format of weights, of what goes into products, and of the cache.
//
// Letters: M rows (tokens), K inputs, N outputs, B sequences of up to n tokens each, H query heads, G key/value heads,
// D head size, S columns of the cache (a multiple of 32), of which U are in use.

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

namespace {

using bf16 = uint16_t;
constexpr int kPanel = 32;  // outputs that are summed together: two vectors of 16
constexpr int64_t kAhead = 128;  // inputs of a panel, 8 KB in bfloat16
constexpr int64_t kChunk = 256 * 1024;  // bytes of the rows that are read again for each panel

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }

inline void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }

inline void store_one(float* p, float x) { *p = x; }

#ifdef __AVX512BF16__
inline __m512 load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store(bf16* p, __m512 x) {
  const __m256bh half = _mm512_cvtneps_pbh(x);
  memcpy(p, &half, sizeof half);
}

// Two neighbors, in all places.
inline __m512bh pair(const bf16* p) {
  int both;
  memcpy(&both, p, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}

inline void store_one(bf16* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {  // not a number stays one
    *p = static_cast<bf16>((bits >> 16) | 64);
  } else {
    *p = static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}
#endif

// exp(x) to about one unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
// Beyond 200 on either side it is 0 or infinite; what is not a number stays so.
inline __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(200.f), _mm512_max_ps(_mm512_set1_ps(-200.f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

enum Activation { kSilu = 0, kGeluTanh = 1 };

inline __m512 activated(__m512 x, int kind) {
  if (kind == kSilu) return _mm512_mul_ps(x, sigmoid(x));
  // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 u = _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, x);
  return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(_mm512_set1_ps(1.5957691216057308f), u)));
}

// -- products ----------------------------------------------------------------------------------------

// A stack of up to three matrices [rows, K] in float32; or, in bfloat16, what `pack` made of them, as the first part.
struct Weight {
  const void* part[3];
  int64_t rows[3];
  int64_t alternate;  // 16 outputs of the first, then 16 of the second, and so on
};

using Sums = __m512[14][2];  // for each of some rows of x

// 32 outputs of a weight.
template <class T>
struct Panel;

template <>
struct Panel<float> {
  static constexpr int kRows = 4;  // rows of x that are summed together
  const float* row[kPanel];        // null behind the last output

  Panel(const Weight& weight, int64_t p, int64_t K) {
    for (int j = 0; j < kPanel; ++j) {
      int64_t part = 0, i = p * kPanel + j;
      if (weight.alternate) {
        part = j / 16, i = p * 16 + j % 16;
      } else {
        while (part < 2 && i >= weight.rows[part]) i -= weight.rows[part++];
      }
      row[j] = i < weight.rows[part] ? static_cast<const float*>(weight.part[part]) + i * K : nullptr;
    }
  }
};

// Sums of R rows of x over one panel, each a vector of parts to be added up: weights are taken as they lie.
template <int R>
inline void sums(const float* x, int64_t K, const Panel<float>& panel, bool, Sums& sum) {
  alignas(64) float found[R][kPanel] = {};
  for (int j = 0; j < kPanel && panel.row[j]; j += 4) {
    __m512 s[R][4];
    const float* row[4];
#pragma GCC unroll 14
    for (int i = 0; i < 4; ++i) row[i] = panel.row[j + i] ? panel.row[j + i] : panel.row[j];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 14
      for (int i = 0; i < 4; ++i) s[r][i] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < K; k += 16) {
#pragma GCC unroll 14
      for (int r = 0; r < R; ++r) {
        const __m512 v = _mm512_loadu_ps(x + r * K + k);
#pragma GCC unroll 14
        for (int i = 0; i < 4; ++i) s[r][i] = _mm512_fmadd_ps(v, _mm512_loadu_ps(row[i] + k), s[r][i]);
      }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 14
      for (int i = 0; i < 4; ++i) found[r][j + i] = _mm512_reduce_add_ps(s[r][i]);
    }
  }
  for (int r = 0; r < R; ++r) sum[r][0] = _mm512_load_ps(found[r]), sum[r][1] = _mm512_load_ps(found[r] + 16);
}

#ifdef __AVX512BF16__
// It lies as [K / 2, 32 outputs, 2 inputs].
template <>
struct Panel<bf16> {
  static constexpr int kRows = 14;  // 28 of the 32 registers
  const bf16* at;

  Panel(const Weight& weight, int64_t p, int64_t K) : at(static_cast<const bf16*>(weight.part[0]) + p * kPanel * K) {}
};

template <int R>
inline void sums(const bf16* x, int64_t K, const Panel<bf16>& panel, bool again, Sums& sum) {
  __m512 s[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) s[r][0] = s[r][1] = _mm512_setzero_ps();
  const bf16* const weights = panel.at;
  for (int64_t from = 0; from < K; from += 32) {
    // The processor looks ahead too little to hide the memory behind so much arithmetic: the first rows ask for what
    // they need next themselves, further ones, for which all is there, for the next panel.
    const char* const next = reinterpret_cast<const char*>(weights + (from + (again ? K : kAhead)) * kPanel);
    if (again) {
      for (int i = 0; i < 32; ++i) _mm_prefetch(next + 64 * i, _MM_HINT_T1);
    } else {
      for (int i = 0; i < 32; ++i) _mm_prefetch(next + 64 * i, _MM_HINT_T0);
    }
    const int64_t to = std::min<int64_t>(from + 32, K);
    for (int64_t k = from; k < to; k += 2) {
      const __m512bh w0 = (__m512bh)_mm512_loadu_si512(weights + k * kPanel);
      const __m512bh w1 = (__m512bh)_mm512_loadu_si512(weights + k * kPanel + kPanel);
#pragma GCC unroll 14
      for (int r = 0; r < R; ++r) {
        const __m512bh both = pair(x + r * K + k);
        s[r][0] = _mm512_dpbf16_ps(s[r][0], both, w0);
        s[r][1] = _mm512_dpbf16_ps(s[r][1], both, w1);
      }
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) sum[r][0] = s[r][0], sum[r][1] = s[r][1];
}
#endif

template <int R, class T>
void some(int rows, const T* x, int64_t K, const Panel<T>& panel, bool again, Sums& sum) {
  if (rows == R) return sums<R>(x, K, panel, again, sum);
  if constexpr (R > 1) some<R - 1>(rows, x, K, panel, again, sum);
}

// A thread's share of `count` things.
inline void share(int64_t count, int64_t* begin, int64_t* end) {
  const int64_t threads = omp_get_num_threads(), own = omp_get_thread_num();
  *begin = count * own / threads;
  *end = count * (own + 1) / threads;
}

// For each panel of this thread and each block of rows: emit(row, panel, the 32 sums of the row).
template <class T, class Emit>
void products(const T* x, int64_t M, int64_t K, int64_t N, const Weight& weight, Emit emit) {
  int64_t first, last;
  share((N + kPanel - 1) / kPanel, &first, &last);
  Sums sum;
  // So many rows that they stay in the cache while all panels pass.
  constexpr int R = Panel<T>::kRows;
  const int64_t most = kChunk / static_cast<int64_t>(sizeof(T)), chunks = (M * K + most - 1) / most;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t top = M * c / chunks, rows = M * (c + 1) / chunks - top, blocks = (rows + R - 1) / R;
    for (int64_t p = first; p < last; ++p) {
      const Panel<T> panel(weight, p, K);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t from = top + rows * b / blocks, to = top + rows * (b + 1) / blocks;
        some<R, T>(static_cast<int>(to - from), x + from * K, K, panel, b > 0, sum);
        for (int64_t m = from; m < to; ++m) emit(m, p, sum[m - from]);
      }
    }
  }
}

// -- parts of a layer --------------------------------------------------------------------------------

// x / rms(x) * weight.
inline void rms_norm(const float* x, const float* weight, float eps, int64_t K, float* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 16) {
    const __m512 v = _mm512_loadu_ps(x + k);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const __m512 scale = _mm512_set1_ps(1.f / sqrtf(_mm512_reduce_add_ps(squares) / K + eps));
  for (int64_t k = 0; k < K; k += 16) {
    const __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + k), scale), _mm512_loadu_ps(weight + k));
    _mm512_storeu_ps(out + k, v);
  }
}

template <class T>
void normed_rows(const float* x, const int64_t* at, int64_t M, int64_t K, const float* weight, float eps, T* out) {
  thread_local std::vector<float> row;
  row.resize(K);
  int64_t first, last;
  share(M, &first, &last);
  for (int64_t m = first; m < last; ++m) {
    rms_norm(x + at[m] * K, weight, eps, K, row.data());
    for (int64_t k = 0; k < K; k += 16) store(out + m * K + k, _mm512_loadu_ps(row.data() + k));
  }
}

// Rotary positions: the two halves of a head are the coordinates of each plane.
inline void turn(float* x, const float* cos, const float* sin, int64_t D) {
  const int64_t half = D / 2;
  for (int64_t d = 0; d < half; d += 16) {
    const __m512 a = _mm512_loadu_ps(x + d), b = _mm512_loadu_ps(x + half + d);
    const __m512 c0 = _mm512_loadu_ps(cos + d), c1 = _mm512_loadu_ps(cos + half + d);
    const __m512 s0 = _mm512_loadu_ps(sin + d), s1 = _mm512_loadu_ps(sin + half + d);
    _mm512_storeu_ps(x + d, _mm512_fnmadd_ps(b, s0, _mm512_mul_ps(a, c0)));
    _mm512_storeu_ps(x + half + d, _mm512_fmadd_ps(a, s1, _mm512_mul_ps(b, c1)));
  }
}

constexpr int kTogether = 6;  // queries that are summed for together

// out [R, 32] = a [R, K] times b [K, 32]; the rows of each lie `by_a`, `by_b` and `by_out` numbers apart.
template <int R>
inline void mixed(const float* a, int64_t by_a, const float* b, int64_t by_b, int64_t K, float* out, int64_t by_out) {
  __m512 s[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) s[r][0] = s[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; ++k) {
    const __m512 b0 = load(b + k * by_b), b1 = load(b + k * by_b + 16);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const __m512 v = _mm512_set1_ps(a[r * by_a + k]);
      s[r][0] = _mm512_fmadd_ps(v, b0, s[r][0]);
      s[r][1] = _mm512_fmadd_ps(v, b1, s[r][1]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
    store(out + r * by_out, s[r][0]);
    store(out + r * by_out + 16, s[r][1]);
  }
}

#ifdef __AVX512BF16__
// K is even: two rows of b are multiplied and added at a time.
template <int R>
inline void mixed(const bf16* a, int64_t by_a, const bf16* b, int64_t by_b, int64_t K, float* out, int64_t by_out) {
  __m512 s[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) s[r][0] = s[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 2) {
    const __m512i row = _mm512_loadu_si512(b + k * by_b), next = _mm512_loadu_si512(b + (k + 1) * by_b);
    // Within each quarter of a vector the first four columns, and the last four.
    const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(row, next);
    const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(row, next);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const __m512bh both = pair(a + r * by_a + k);
      s[r][0] = _mm512_dpbf16_ps(s[r][0], both, low);
      s[r][1] = _mm512_dpbf16_ps(s[r][1], both, high);
    }
  }
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
    store(out + r * by_out, _mm512_permutex2var_ps(s[r][0], first, s[r][1]));
    store(out + r * by_out + 16, _mm512_permutex2var_ps(s[r][0], second, s[r][1]));
  }
}
#endif

template <int R, class T>
void mixed_some(
    int rows, const T* a, int64_t by_a, const T* b, int64_t by_b, int64_t K, float* out, int64_t by_out) {
  if (rows == R) return mixed<R>(a, by_a, b, by_b, K, out, by_out);
  if constexpr (R > 1) mixed_some<R - 1>(rows, a, by_a, b, by_b, K, out, by_out);
}

// Asks for 32 numbers of each of `rows` rows, `by` numbers apart, to be there soon.
template <class T>
inline void fetch(const T* from, int64_t rows, int64_t by) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t n = 0; n < 32; n += 64 / static_cast<int64_t>(sizeof(T))) _mm_prefetch(from + i * by + n, _MM_HINT_T1);
  }
}

// exp(scores scaling + mask) up to a factor, and the sum of these, of S scores.
template <class T>
inline float masses(float* scores, const T* mask, float scaling, int64_t S, T* out) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t s = 0; s < S; s += 16) {
    const __m512 v = _mm512_fmadd_ps(_mm512_loadu_ps(scores + s), _mm512_set1_ps(scaling), load(mask + s));
    _mm512_storeu_ps(scores + s, v);
    most = _mm512_max_ps(most, v);
  }
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t s = 0; s < S; s += 16) {
    const __m512 v = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + s), top));
    store(out + s, v);
    sum = _mm512_add_ps(sum, v);
  }
  return _mm512_reduce_add_ps(sum);
}

struct Layer {
  int64_t width, heads, groups, size, inner, activation;
  float first_eps, second_eps, query_eps, key_eps, scaling;
  const float *first_norm, *second_norm, *query_norm, *key_norm;  // [K]; the last two [D] or null
  const float *qkv_bias, *out_bias;                               // [N] or null
  Weight qkv, out, gated, down;
};

struct Step {
  int64_t rows, tokens, columns, used;                // B, n, S (a multiple of 32), U (of 16)
  const float *cos, *sin;                             // [B or 1, n, D]
  const void* mask;                                   // T [B or 1, n or 1, S], added to the scores
  const int64_t* places;                              // [B, n]: columns of the new tokens
  const int64_t* starts;                              // [B + 1]: tokens that count, of the sequences before each
  const int64_t* at;                                  // [M]: where the tokens that count stand among the B n
  int64_t angles_by_row, mask_by_row, mask_by_token;  // 0 where all rows, or tokens, have the same
  const float* last_norm;                             // [K], of an RMS norm behind the last layer, or null
  float last_eps;
};

// out [M, N], float32 = x [M, K] times the weight's transpose; rows of zeros are not multiplied.
template <class T>
void linear(const T* x, int64_t M, int64_t K, int64_t N, const Weight& weight, float* out, int64_t threads) {
  thread_local std::vector<int64_t> places;
  thread_local std::vector<T> dense;
  places.clear();
  for (int64_t m = 0; m < M; ++m) {
    const T* const row = x + m * K;
    if (std::any_of(row, row + K, [](T v) { return v != 0; })) {
      places.push_back(m);
    } else {
      memset(out + m * N, 0, N * sizeof(float));
    }
  }
  const int64_t count = static_cast<int64_t>(places.size()), *const at = places.data();
  if (count < M) {
    dense.resize(count * K);
    for (int64_t i = 0; i < count; ++i) memcpy(dense.data() + i * K, x + at[i] * K, K * sizeof(T));
    x = dense.data();
  }
#pragma omp parallel num_threads(threads)
  products(x, count, K, N, weight, [&](int64_t m, int64_t p, __m512* sum) {
    for (int half = 0; half < 2; ++half) {
      const int64_t n = p * kPanel + 16 * half;
      if (n < N) _mm512_mask_storeu_ps(out + at[m] * N + n, N - n < 16 ? (1u << (N - n)) - 1 : 0xffff, sum[half]);
    }
  });
}

// What the threads of a layer share: rows of its products' inputs, and queries, keys and values.
template <class T>
struct Rows {
  T *normed, *mix, *inner;
  float* qkv;
};

// hidden [B n, K] becomes what the layer makes of it, where tokens count; keys [B G, D, S] and values [B G, S, D] get
// the new tokens. All threads call it.
template <class T>
void block(const Layer& l, const Step& t, float* hidden, T* keys, T* values, const Rows<T>& rows) {
  const int64_t n = t.tokens, M = t.starts[t.rows], K = l.width, D = l.size, S = t.columns, shared = l.heads / l.groups;
  const int64_t all = (l.heads + 2 * l.groups) * D, own = l.heads * D;
  const int64_t U = t.used, padded = (U + 31) / 32 * 32;
  T *const normed_at = rows.normed, *const mix_at = rows.mix, *const inner_at = rows.inner;
  float* const qkv_at = rows.qkv;
  int64_t first, last;

  normed_rows(hidden, t.at, M, K, l.first_norm, l.first_eps, normed_at);
#pragma omp barrier
  products(normed_at, M, K, all, l.qkv, [&](int64_t m, int64_t p, __m512* sum) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = p * kPanel + 16 * half;
      if (at >= all) continue;
      const __m512 bias = l.qkv_bias ? _mm512_loadu_ps(l.qkv_bias + at) : _mm512_setzero_ps();
      _mm512_storeu_ps(qkv_at + m * all + at, _mm512_add_ps(sum[half], bias));
    }
  });
#pragma omp barrier
  share(M * l.groups, &first, &last);
  for (int64_t item = first; item < last; ++item) {
    const int64_t m = item / l.groups, g = item % l.groups, b = t.at[m] / n, column = t.places[t.at[m]];
    const int64_t angle = (t.angles_by_row ? t.at[m] : t.at[m] % n) * D;
    if (item + 1 < last) {
      const int64_t later = t.at[(item + 1) / l.groups], pair = later / n * l.groups + (item + 1) % l.groups;
      const T* const column_of = keys + pair * D * S + t.places[later];
      for (int64_t d = 0; d < D; ++d) _mm_prefetch(column_of + d * S, _MM_HINT_T0);
    }
    float* const row = qkv_at + m * all;
    for (int64_t h = g * shared; h < (g + 1) * shared; ++h) {
      float* const q = row + h * D;
      if (l.query_norm) rms_norm(q, l.query_norm, l.query_eps, D, q);
      turn(q, t.cos + angle, t.sin + angle, D);
    }
    float *const k = row + (l.heads + g) * D, *const v = k + l.groups * D;
    if (l.key_norm) rms_norm(k, l.key_norm, l.key_eps, D, k);
    turn(k, t.cos + angle, t.sin + angle, D);
    T *const key = keys + (b * l.groups + g) * D * S, *const value = values + (b * l.groups + g) * S * D;
    for (int64_t d = 0; d < D; ++d) store_one(key + d * S + column, k[d]);
    for (int64_t d = 0; d < D; d += 16) store(value + column * D + d, _mm512_loadu_ps(v + d));
  }
#pragma omp barrier
  thread_local std::vector<T> query, chances;
  thread_local std::vector<float> scores, mixture;
  query.resize(kTogether * D), chances.resize(kTogether * U);
  scores.resize(kTogether * padded), mixture.resize(kTogether * D);
  const int64_t parts = (shared * n + kTogether - 1) / kTogether;  // of the queries of a sequence and head
  share(t.rows * l.groups * parts, &first, &last);
  for (int64_t item = first; item < last; ++item) {
    const int64_t pair = item / parts, b = pair / l.groups, g = pair % l.groups;
    const int64_t start = t.starts[b], m = t.starts[b + 1] - start;
    const int64_t from = item % parts * kTogether, count = std::min<int64_t>(kTogether, shared * m - from);
    if (count <= 0) continue;
    const T *const key = keys + pair * D * S, *const value = values + pair * S * D;
    const bool ahead = from == 0 && item + parts < last;  // the next ones are this thread's too
    for (int64_t i = 0; i < count; ++i) {
      const int64_t h = (from + i) / m, token = (from + i) % m;
      const float* const q = qkv_at + (start + token) * all + (g * shared + h) * D;
      for (int64_t d = 0; d < D; d += 16) store(query.data() + i * D + d, _mm512_loadu_ps(q + d));
    }
    const int together = static_cast<int>(count);
    float *const here = scores.data(), *const out = mixture.data();
    for (int64_t s = 0; s < padded; s += 32) {
      // Short stretches far apart: the processor does not see by itself what comes next.
      if (ahead) fetch(key + D * S + s, D, S);
      mixed_some<kTogether>(together, query.data(), D, key + s, S, D, here + s, padded);
    }
    float inverse[kTogether];
    for (int i = 0; i < together; ++i) {
      const int64_t token = (from + i) % m;
      const T* const mask =
          static_cast<const T*>(t.mask) + (t.mask_by_row * b * (t.mask_by_token ? n : 1) + t.mask_by_token * token) * S;
      inverse[i] = 1.f / masses(here + i * padded, mask, l.scaling, U, chances.data() + i * U);
    }
    for (int64_t d = 0; d < D; d += 32) {
      if (ahead) fetch(value + D * S + d, U, D);
      mixed_some<kTogether>(together, chances.data(), U, value + d, D, U, out + d, D);
    }
    for (int i = 0; i < together; ++i) {
      const int64_t h = (from + i) / m, token = (from + i) % m;
      T* const to = mix_at + (start + token) * own + (g * shared + h) * D;
      for (int64_t d = 0; d < D; d += 16) {
        store(to + d, _mm512_mul_ps(_mm512_loadu_ps(out + i * D + d), _mm512_set1_ps(inverse[i])));
      }
    }
  }
#pragma omp barrier
  const auto added = [&](int64_t m, int64_t p, __m512* sum, const float* bias) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = p * kPanel + 16 * half;
      if (at >= K) continue;
      float* const to = hidden + t.at[m] * K + at;
      if (bias) sum[half] = _mm512_add_ps(sum[half], _mm512_loadu_ps(bias + at));
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[half]));
    }
  };
  products(mix_at, M, own, K, l.out, [&](int64_t m, int64_t p, __m512* s) { added(m, p, s, l.out_bias); });
#pragma omp barrier
  normed_rows(hidden, t.at, M, K, l.second_norm, l.second_eps, normed_at);
#pragma omp barrier
  products(normed_at, M, K, 2 * l.inner, l.gated, [&](int64_t m, int64_t p, __m512* sum) {
    store(inner_at + m * l.inner + 16 * p, _mm512_mul_ps(activated(sum[0], static_cast<int>(l.activation)), sum[1]));
  });
#pragma omp barrier
  products(inner_at, M, l.inner, K, l.down, [&](int64_t m, int64_t p, __m512* s) { added(m, p, s, nullptr); });
}

// Layers one after another, all over the same step; keys and values are of each.
template <class T>
void blocks(
    const Layer* const* layers, int64_t count, const Step& t, float* hidden, T* const* keys, T* const* values,
    int64_t threads) {
  const int64_t M = t.starts[t.rows];
  int64_t width = 0, own = 0, inner = 0, all = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Layer& l = *layers[i];
    width = std::max(width, l.width), own = std::max(own, l.heads * l.size), inner = std::max(inner, l.inner);
    all = std::max(all, (l.heads + 2 * l.groups) * l.size);
  }
  thread_local std::vector<T> normed, mix, gated;
  thread_local std::vector<float> qkv;
  normed.resize(M * width), mix.resize(M * own), gated.resize(M * inner), qkv.resize(M * all);
  const Rows<T> rows{normed.data(), mix.data(), gated.data(), qkv.data()};
#pragma omp parallel num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    block(*layers[i], t, hidden, keys[i], values[i], rows);
#pragma omp barrier
  }
  for (int64_t m = 0; t.last_norm && m < M; ++m) {
    float* const row = hidden + t.at[m] * width;
    rms_norm(row, t.last_norm, t.last_eps, width, row);
  }
}

}  // namespace

extern "C" {

void linear_float32(
    const float* x, int64_t M, int64_t K, int64_t N, const Weight* weight, float* out, int64_t threads) {
  linear(x, M, K, N, *weight, out, threads);
}

void blocks_float32(
    const Layer* const* layers, int64_t count, const Step* step, float* hidden, float* const* keys,
    float* const* values, int64_t threads) {
  blocks(layers, count, *step, hidden, keys, values, threads);
}

#ifdef __AVX512BF16__
// weight [N, K] in float32 as panels; with `other`, 16 outputs of each take turns. K is a multiple of 16.
void pack(const float* weight, const float* other, int64_t N, int64_t K, bf16* out, int64_t threads) {
  const int64_t half = kPanel / 2, from_each = other ? half : kPanel;
  const int64_t panels = (N + from_each - 1) / from_each;
#pragma omp parallel for num_threads(threads)
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t side = 0; side < 2; ++side) {
      const float* const source = other && side ? other : weight;
      const int64_t row = p * from_each + (other ? 0 : side * half);
      bf16* const panel = out + p * kPanel * K + side * kPanel;
      for (int64_t k = 0; k < K; k += 16) {
        // Eight pairs of inputs of each output become eight vectors of all 16 outputs.
        alignas(64) uint32_t pairs[16][8];
        for (int64_t j = 0; j < half; ++j) {
          const __m512 v = row + j < N ? _mm512_loadu_ps(source + (row + j) * K + k) : _mm512_setzero_ps();
          store(reinterpret_cast<bf16*>(pairs[j]), v);
        }
        const __m512i at = _mm512_mullo_epi32(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(8));
        for (int64_t i = 0; i < 8; ++i) {
          _mm512_storeu_si512(panel + (k / 2 + i) * 2 * kPanel, _mm512_i32gather_epi32(at, &pairs[0][i], 4));
        }
      }
    }
  }
}

void linear_bfloat16(
    const bf16* x, int64_t M, int64_t K, int64_t N, const Weight* weight, float* out, int64_t threads) {
  linear(x, M, K, N, *weight, out, threads);
}

void blocks_bfloat16(
    const Layer* const* layers, int64_t count, const Step* step, float* hidden, bf16* const* keys, bf16* const* values,
    int64_t threads) {
  blocks(layers, count, *step, hidden, keys, values, threads);
}
#endif

}  // extern "C"
