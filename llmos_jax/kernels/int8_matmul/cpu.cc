// Rows of float32 times a matrix in few bits, for one CPU, in whole numbers.
//
// m rows, K summed inputs, N made outputs, G groups of inputs. cpu.py compiles this file
// at first use and packs matrices for it.
//
// A row becomes int16 of at most `limit`, with one scale; `limit` is chosen so that no
// int32 sum overflows (cpu.py), so sums are exact in any order and a row gives the same
// bits alone and among others. Products of int16 pairs are one instruction everywhere
// (pmaddwd, vpdpwssd), and leave activations as many bits as float16 has.
//
// Where the CPU multiplies tiles (AMX), several rows go through those: a number of a row
// is 256 times one int8 plus another, and each is multiplied by itself. That is exact,
// too, and gives the same sums.
//
// Packed: outputs come in panels of 32. Of a panel, inputs come in pairs: a line of 64
// bytes holds, for each output, its weights of inputs 2j and 2j + 1. A line of int4
// holds two of those: the even pair in low halves, the odd one in high halves, each
// number plus 8. In a gated pair of matrices, the first 16 outputs of a panel are of the
// gate and the last 16 of the other: what comes out is act(gate) * other.
//
// Around the product, where they save a pass over memory: RMSNorm before; bias, gate and
// residual after. Matrices of all layers lie in one buffer, and `layer` says which.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "team.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define LLMOS_TILES 1
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int PANEL = 32;         // outputs packed together
constexpr int HALF = PANEL / 2;   // outputs of a Lanes
constexpr int LINE = 2 * PANEL;   // bytes: a pair of inputs of a panel

typedef float Floats __attribute__((vector_size(HALF * 4)));
typedef int32_t Integers __attribute__((vector_size(HALF * 4)));

inline Floats splat(float value) { return value - Floats{}; }

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline void store(float* to, const Floats& value) {
  std::memcpy(to, &value, sizeof(value));
}

inline Floats to_floats(Integers value) { return __builtin_convertvector(value, Floats); }

// bfloat16 to float32.
inline Floats load_bfloat16(const uint16_t* from) {
  typedef uint16_t Halves __attribute__((vector_size(HALF * 2)));
  Halves value;
  std::memcpy(&value, from, sizeof(value));
  const Integers bits = __builtin_convertvector(value, Integers) << 16;
  Floats out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// ------------------------------------------------- what differs between kinds of CPU
//
// Lanes: int32 sums of 16 outputs. Words: int16 pairs of 16 outputs. Bytes: a line.

#if defined(__AVX512F__) && defined(__AVX512BW__)

using Lanes = __m512i;
using Words = __m512i;
constexpr int ROWS = 12;          // 24 sums of 32 registers
constexpr int GROUPED_ROWS = 6;   // 12 sums of whole numbers, 12 of floats

inline Lanes zero() { return _mm512_setzero_si512(); }
inline Words widen(const int8_t* from) {  // 32 bytes: pairs of 16 outputs
  return _mm512_cvtepi8_epi16(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Words splat_pair(int32_t pair) { return _mm512_set1_epi32(pair); }
inline Lanes dot(Lanes sum, Words w, Words a) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, w, a);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(w, a));
#endif
}
inline Integers integers(Lanes sum) {
  Integers out;
  std::memcpy(&out, &sum, sizeof(out));
  return out;
}

#elif defined(__AVX2__)

struct Lanes {
  __m256i low, high;
};
using Words = Lanes;
constexpr int ROWS = 6;           // of one half of a panel: 12 sums of 16 registers
constexpr int GROUPED_ROWS = 2;

inline Lanes zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Words widen(const int8_t* from) {
  const __m128i* at = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(at)),
          _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 1))};
}
inline Words splat_pair(int32_t pair) {
  const __m256i all = _mm256_set1_epi32(pair);
  return {all, all};
}
inline Lanes dot(const Lanes& sum, const Words& w, const Words& a) {
  return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(w.low, a.low)),
          _mm256_add_epi32(sum.high, _mm256_madd_epi16(w.high, a.high))};
}
inline Integers integers(const Lanes& sum) {
  Integers out;
  std::memcpy(&out, &sum, sizeof(out));
  return out;
}

#else  // plain C++, which compilers turn into NEON's widening products

struct Lanes {
  int32_t of[HALF];
};
struct Words {
  int16_t of[2 * HALF];
};
constexpr int ROWS = 4;
constexpr int GROUPED_ROWS = 2;

inline Lanes zero() { return {}; }
inline Words widen(const int8_t* from) {
  Words out;
  for (int i = 0; i < 2 * HALF; ++i) out.of[i] = from[i];
  return out;
}
inline Words splat_pair(int32_t pair) {
  Words out;
  int16_t two[2];
  std::memcpy(two, &pair, sizeof(two));
  for (int i = 0; i < 2 * HALF; ++i) out.of[i] = two[i % 2];
  return out;
}
inline Lanes dot(const Lanes& sum, const Words& w, const Words& a) {
  Lanes out = sum;
  for (int i = 0; i < HALF; ++i)
    out.of[i] += int32_t{w.of[2 * i]} * a.of[2 * i] +
                 int32_t{w.of[2 * i + 1]} * a.of[2 * i + 1];
  return out;
}
inline Integers integers(const Lanes& sum) {
  Integers out;
  std::memcpy(&out, &sum, sizeof(out));
  return out;
}

#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int HALVES = 2;  // of a panel that the many-row product takes at once
#else
constexpr int HALVES = 1;
#endif

// Two lines of int8 from one of int4.
inline void unpack(const uint8_t* from, int8_t* low, int8_t* high) {
#if defined(__AVX2__)
  const __m256i mask = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
  for (int i = 0; i < LINE; i += 32) {
    const __m256i both =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    const __m256i a = _mm256_and_si256(both, mask);
    const __m256i b = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + i),
                        _mm256_sub_epi8(a, eight));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + i),
                        _mm256_sub_epi8(b, eight));
  }
#else
  for (int i = 0; i < LINE; ++i) {
    low[i] = static_cast<int8_t>((from[i] & 15) - 8);
    high[i] = static_cast<int8_t>((from[i] >> 4) - 8);
  }
#endif
}

// ------------------------------------------------------------------------ the product

// Sums of R rows and `Count` halves of a panel over pairs of inputs. `block` holds the
// rows' pairs, those of one pair of inputs beside each other: [pairs][R].
template <int R, int Count>
inline void add_pairs(const int8_t* lines, const int32_t* block, int64_t pairs,
                      Lanes (&sums)[R][Count]) {
  for (int64_t j = 0; j < pairs; ++j) {
    Words w[Count];
    for (int h = 0; h < Count; ++h) w[h] = widen(lines + j * LINE + h * LINE / 2);
    for (int r = 0; r < R; ++r) {
      const Words a = splat_pair(block[j * R + r]);
      for (int h = 0; h < Count; ++h) sums[r][h] = dot(sums[r][h], w[h], a);
    }
  }
}

// One scale for all inputs. `out`: float sums [R][PANEL], without scales.
template <int R, int Count>
void whole_rows(const int8_t* panel, const int32_t* block, int64_t pairs, float* out) {
  for (int from = 0; from < 2; from += Count) {
    const int8_t* lines = panel + from * LINE / 2;
    Lanes sums[R][Count];
    for (auto& row : sums)
      for (auto& sum : row) sum = zero();
    int64_t j = 0;
    if constexpr (R == 1) {  // two chains: one would wait for itself
      Lanes others[1][Count];
      for (auto& sum : others[0]) sum = zero();
      for (; j + 2 <= pairs; j += 2) {
        __builtin_prefetch(lines + (j + 24) * LINE);
        __builtin_prefetch(lines + (j + 25) * LINE);
        add_pairs<1, Count>(lines + j * LINE, block + j, 1, sums);
        add_pairs<1, Count>(lines + (j + 1) * LINE, block + j + 1, 1, others);
      }
      add_pairs<1, Count>(lines + j * LINE, block + j, pairs - j, sums);
      for (int h = 0; h < Count; ++h)
        store(out + (from + h) * HALF,
              to_floats(integers(sums[0][h]) + integers(others[0][h])));
      continue;
    }
    add_pairs<R, Count>(lines, block, pairs, sums);
    for (int r = 0; r < R; ++r)
      for (int h = 0; h < Count; ++h)
        store(out + r * PANEL + (from + h) * HALF, to_floats(integers(sums[r][h])));
  }
}

struct Groups {
  const uint16_t* scales;  // bfloat16 [G][PANEL] of a panel
  int64_t pairs;           // of a group; the last may have fewer
  bool four_bits;
};

// A scale for each group of inputs.
template <int R>
void grouped_rows(const int8_t* panel, const Groups& groups, const int32_t* block,
                  int64_t pairs, float* out) {
  Floats totals[R][2] = {};
  for (int64_t first = 0, g = 0; first < pairs; first += groups.pairs, ++g) {
    const int64_t count = std::min(groups.pairs, pairs - first);
    Lanes sums[R][2];
    for (auto& row : sums)
      for (auto& sum : row) sum = zero();
    if (groups.four_bits) {
      alignas(64) int8_t two[2][LINE];
      for (int64_t j = 0; j < count; j += 2) {
        const auto* packed =
            reinterpret_cast<const uint8_t*>(panel) + (first + j) / 2 * LINE;
        __builtin_prefetch(packed + 16 * LINE);
        unpack(packed, two[0], two[1]);
        add_pairs<R, 2>(two[0], block + (first + j) * R, 2, sums);
      }
    } else {
      add_pairs<R, 2>(panel + first * LINE, block + first * R, count, sums);
    }
    for (int h = 0; h < 2; ++h) {
      const Floats scale = load_bfloat16(groups.scales + g * PANEL + h * HALF);
      for (int r = 0; r < R; ++r)
        totals[r][h] += to_floats(integers(sums[r][h])) * scale;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < 2; ++h) store(out + r * PANEL + h * HALF, totals[r][h]);
}

template <int R>
void panel_rows(const int8_t* panel, const Groups* groups, const int32_t* block,
                int64_t count, int64_t pairs, float* out) {
  if constexpr (R > 1) {
    if (count < R) return panel_rows<R - 1>(panel, groups, block, count, pairs, out);
  }
  if (groups != nullptr) {
    if constexpr (R <= GROUPED_ROWS) grouped_rows<R>(panel, *groups, block, pairs, out);
  } else if constexpr (R <= 2) {
    whole_rows<R, 2>(panel, block, pairs, out);
  } else {
    whole_rows<R, HALVES>(panel, block, pairs, out);
  }
}

// ------------------------------------------------------------------ before and after

// exp for any float, within 2 units in the last place; Cephes' polynomial for 2**f.
inline Floats exp(Floats x) {
  const Floats low = splat(-87.0f), high = splat(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Floats n_half = x * splat(1.44269504088896341f) +
                        (x < Floats{} ? splat(-0.5f) : splat(0.5f));
  const Integers n = __builtin_convertvector(n_half, Integers);
  const Floats nf = to_floats(n);
  const Floats f = (x - nf * splat(0.693359375f)) - nf * splat(-2.12194440e-4f);
  Floats p = splat(1.9875691500e-4f);
  p = p * f + splat(1.3981999507e-3f);
  p = p * f + splat(8.3334519073e-3f);
  p = p * f + splat(4.1665795894e-2f);
  p = p * f + splat(1.6666665459e-1f);
  p = p * f + splat(5.0000001201e-1f);
  p = p * f * f + f + splat(1.0f);
  const Integers power = (n + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return p * scale;
}

inline Floats silu(Floats x) { return x / (splat(1.0f) + exp(-x)); }

// x/2 (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): gelu's tanh form.
inline Floats gelu(Floats x) {
  const Floats u = splat(0.797884560802865356f) * (x + splat(0.044715f) * x * x * x);
  return x / (splat(1.0f) + exp(splat(-2.0f) * u));
}

float sum(Floats v) {
  float lanes[HALF];
  store(lanes, v);
  for (int step = HALF / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

float max(Floats v) {
  float lanes[HALF];
  store(lanes, v);
  for (int step = HALF / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] = std::max(lanes[i], lanes[i + step]);
  return lanes[0];
}

struct Rows {
  const float* x;      // [m, K]
  const float* norm;   // [K] multipliers after RMSNorm; null: none
  float epsilon;
  int64_t K, padded;   // inputs, and int16 of a row
  float limit;
};

// RMSNorm of one row: x / rms(x) * norm.
void normalize(const float* x, const float* norm, float epsilon, int64_t K, float* out) {
  Floats squares = {};
  int64_t k = 0;
  for (; k + HALF <= K; k += HALF) squares += load(x + k) * load(x + k);
  float total = sum(squares);
  for (; k < K; ++k) total += x[k] * x[k];
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(K) + epsilon);
  for (k = 0; k < K; ++k) out[k] = x[k] * factor * norm[k];
}

// One row into int16, its scale returned.
float quantize(const Rows& in, int64_t row, float* scratch, int16_t* out) {
  const float* x = in.x + row * in.K;
  const int64_t K = in.K;
  if (in.norm != nullptr) {
    normalize(x, in.norm, in.epsilon, K, scratch);
    x = scratch;
  }
  Floats tops = {}, nothing = {};  // `nothing` stays 0 but for infinities and NaN
  int64_t k = 0;
  for (; k + HALF <= K; k += HALF) {
    const Floats v = load(x + k), size = v < Floats{} ? -v : v;
    tops = size > tops ? size : tops;
    nothing += v * Floats{};
  }
  float largest = max(tops), rest = sum(nothing);
  for (; k < K; ++k) {
    largest = std::max(largest, std::fabs(x[k]));
    rest += x[k] * 0.0f;
  }
  if (rest != 0.0f) {  // not a number in, not a number out
    std::fill_n(out, in.padded, int16_t{0});
    std::fill_n(out, 1, int16_t{1});
    return NAN;
  }
  const float factor = largest > 0.0f ? in.limit / largest : 1.0f;
  for (k = 0; k < K; ++k) {
    // Adding 1.5 * 2^23 rounds to the nearest whole number, ties to even.
    const float shifted = x[k] * factor + 12582912.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    out[k] = static_cast<int16_t>(bits - 0x4B400000);
  }
  std::fill(out + K, out + in.padded, int16_t{0});
  return largest > 0.0f ? largest / in.limit : 1.0f;
}

int64_t split(int64_t count, int64_t size) { return (count + size - 1) / size; }

enum class Gate : int32_t { kNone = 0, kSilu = 1, kGelu = 2 };

struct After {
  const float* scale;     // [panels * PANEL] of each output
  const float* bias;      // [N] or null
  const float* residual;  // [m, made] or null
  Gate gate;
  int64_t made;           // outputs of a row
  float* y;               // [m, made]
};

void finish(const After& after, int64_t panel, int64_t row, float row_scale,
            const float* sums) {
  const int width = after.gate == Gate::kNone ? PANEL : HALF;
  alignas(64) float out[PANEL];
  const float* scale = after.scale + panel * PANEL;
  const Floats by_row = splat(row_scale);
  Floats low = load(sums) * by_row * load(scale);
  Floats high = load(sums + HALF) * by_row * load(scale + HALF);
  if (after.gate == Gate::kSilu) low = silu(low) * high;
  if (after.gate == Gate::kGelu) low = gelu(low) * high;
  store(out, low);
  store(out + HALF, high);
  const int64_t first = panel * width;
  const int64_t count = std::min<int64_t>(width, after.made - first);
  float* y = after.y + row * after.made + first;
  if (after.bias != nullptr)
    for (int64_t i = 0; i < count; ++i) out[i] += after.bias[first + i];
  if (after.residual != nullptr) {
    const float* residual = after.residual + row * after.made + first;
    for (int64_t i = 0; i < count; ++i) out[i] += residual[i];
  }
  if (count == PANEL) {
    store(y, load(out));
    store(y + HALF, load(out + HALF));
  } else {
    std::copy_n(out, count, y);
  }
}

// ----------------------------------------------------------------------------- tiles

#if defined(LLMOS_TILES)

constexpr int64_t TILE_ROWS = 16;
constexpr int64_t TILE_INPUTS = 64;
constexpr int64_t TILE = TILE_ROWS * TILE_INPUTS;  // bytes
constexpr int64_t FEWEST_TILED = 5;  // rows; fewer wait for memory either way

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  TileShapes() {
    std::fill_n(row_bytes, 8, uint16_t{64});
    std::fill_n(rows, 8, uint8_t{16});
  }
};

// Tiles of this thread, for as long as it lives. Linux hands them out on request.
class Tiles {
 public:
  static bool granted() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h
    static const bool is_granted =
        syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return is_granted;
  }
  Tiles() {
    static const TileShapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
};

// A row of int16 as its high and low int8, at its place in a block of TILE_ROWS rows:
// [2][blocks of inputs][TILE_ROWS][TILE_INPUTS].
void split_digits(const int16_t* row, int64_t count, int64_t input_blocks, int64_t r,
                  int8_t* block) {
  int8_t* const low = block + input_blocks * TILE;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t at = k / TILE_INPUTS * TILE + r * TILE_INPUTS + k % TILE_INPUTS;
    const int high_digit = (row[k] + 128) >> 8;
    block[at] = static_cast<int8_t>(high_digit);
    low[at] = static_cast<int8_t>(row[k] - 256 * high_digit);
  }
}

// A panel as tiles wants it: four inputs of an output beside each other. Of each 8
// outputs the first 4 go to the even tiles, the others to the odd ones.
void interleave(const int8_t* panel, int64_t pairs, int64_t input_blocks, int8_t* out) {
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t i = 0; i < input_blocks * TILE_ROWS; ++i) {
    const int8_t* line = panel + 2 * i * LINE;
    const __m512i a = 2 * i < pairs ? _mm512_loadu_si512(line) : zero;
    const __m512i b = 2 * i + 1 < pairs ? _mm512_loadu_si512(line + LINE) : zero;
    __builtin_prefetch(line + 32 * LINE);
    __builtin_prefetch(line + 33 * LINE);
    int8_t* const to = out + i / TILE_ROWS * 2 * TILE + i % TILE_ROWS * LINE;
    _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(to + TILE, _mm512_unpackhi_epi16(a, b));
  }
}

// Float sums [count][PANEL] of a block of rows and an interleaved panel.
void tiled_rows(const int8_t* block, const int8_t* panel, int64_t input_blocks,
                bool has_high, int64_t count, float* out) {
  alignas(64) int32_t sums[4][TILE_ROWS][16];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int8_t* const low = block + input_blocks * TILE;
  for (int64_t b = 0; b < input_blocks; ++b) {
    _tile_loadd(4, panel + 2 * b * TILE, 64);
    _tile_loadd(5, panel + (2 * b + 1) * TILE, 64);
    _tile_loadd(6, low + b * TILE, 64);
    _tile_dpbssd(0, 6, 4);
    _tile_dpbssd(1, 6, 5);
    if (has_high) {
      _tile_loadd(7, block + b * TILE, 64);
      _tile_dpbssd(2, 7, 4);
      _tile_dpbssd(3, 7, 5);
    }
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  const __m512i first =
      _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t r = 0; r < count; ++r) {
    const auto whole = [&](int half) {
      const __m512i high = _mm512_slli_epi32(_mm512_load_si512(sums[2 + half][r]), 8);
      return _mm512_add_epi32(high, _mm512_load_si512(sums[half][r]));
    };
    const __m512i even = whole(0), odd = whole(1);
    store(out + r * PANEL,
          to_floats(integers(_mm512_permutex2var_epi32(even, first, odd))));
    store(out + r * PANEL + HALF,
          to_floats(integers(_mm512_permutex2var_epi32(even, second, odd))));
  }
}

// Memory of one thread that begins at a cache line; grows, and is kept.
int8_t* aligned(std::vector<int8_t>& memory, int64_t bytes) {
  memory.resize(bytes + 64);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return memory.data() + (64 - address % 64) % 64;
}

// Rows times panels, many rows at a time.
void project_tiled(ffi::ThreadPool& pool, const Rows& in, const After& after, int64_t m,
                   const int8_t* weights, int64_t panels, int64_t panel_bytes) {
  const int64_t pairs = panel_bytes / LINE;
  const int64_t input_blocks = split(in.K, TILE_INPUTS);
  const int64_t block_bytes = 2 * input_blocks * TILE;
  const int64_t blocks = split(m, TILE_ROWS);
  const bool has_high = in.limit > 127.0f;
  thread_local std::vector<int8_t> all_digits;
  thread_local std::vector<float> all_scales;
  int8_t* const digits = aligned(all_digits, blocks * block_bytes);
  all_scales.resize(m);
  float* const scales = all_scales.data();
  constexpr int64_t kRowsAtOnce = 4;
  llmos::Team::run(pool, split(m, kRowsAtOnce), [&](int64_t task) {
    thread_local std::vector<float> scratch;
    thread_local std::vector<int16_t> row16;
    scratch.resize(in.K);
    row16.assign(input_blocks * TILE_INPUTS, 0);
    const int64_t last = std::min(m, (task + 1) * kRowsAtOnce);
    for (int64_t row = task * kRowsAtOnce; row < last; ++row) {
      scales[row] = quantize(in, row, scratch.data(), row16.data());
      split_digits(row16.data(), input_blocks * TILE_INPUTS, input_blocks,
                   row % TILE_ROWS, digits + row / TILE_ROWS * block_bytes);
    }
  });
  const int64_t chunk = std::max<int64_t>(1, panels / (8 * pool.num_threads()));
  llmos::Team::run(pool, split(panels, chunk), [&](int64_t task) {
    thread_local std::vector<int8_t> memory;
    int8_t* const interleaved = aligned(memory, 2 * input_blocks * TILE);
    alignas(64) float sums[TILE_ROWS * PANEL];
    const Tiles tiles;
    const int64_t last = std::min(panels, (task + 1) * chunk);
    for (int64_t p = task * chunk; p < last; ++p) {
      interleave(weights + p * panel_bytes, pairs, input_blocks, interleaved);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * TILE_ROWS;
        const int64_t count = std::min(TILE_ROWS, m - first);
        tiled_rows(digits + block * block_bytes, interleaved, input_blocks, has_high,
                   count, sums);
        for (int64_t r = 0; r < count; ++r)
          finish(after, p, first + r, scales[first + r], sums + r * PANEL);
      }
    }
  });
}

#endif

// ------------------------------------------------------------------------ entry point

using FloatBuffer = ffi::Buffer<ffi::F32>;

const float* or_null(const FloatBuffer& buffer, int64_t layer) {
  const int64_t width = buffer.dimensions().back();
  return width == 0 ? nullptr : buffer.typed_data() + layer * width;
}

ffi::Error project(ffi::ThreadPool pool, FloatBuffer x, FloatBuffer norm,
                   ffi::Buffer<ffi::U8> packed, FloatBuffer scale,
                   ffi::Buffer<ffi::U16> group_scale, FloatBuffer bias,
                   FloatBuffer residual, ffi::Buffer<ffi::S32> layers, float epsilon,
                   float limit, int64_t group, bool four_bits, int32_t gate,
                   ffi::Result<FloatBuffer> y) {
  const int64_t m = x.dimensions()[0], K = x.dimensions()[1];
  const int64_t layer = layers.typed_data()[0];
  const int64_t panels = scale.dimensions()[1] / PANEL;
  const int64_t layer_bytes = packed.dimensions()[1];
  const int64_t panel_bytes = layer_bytes / panels;
  const int64_t pairs = panel_bytes / LINE * (four_bits ? 2 : 1);
  const int64_t num_groups = group_scale.dimensions()[1] / (panels * PANEL);
  const auto* weights =
      reinterpret_cast<const int8_t*>(packed.typed_data()) + layer * layer_bytes;
  const Rows in{x.typed_data(), or_null(norm, layer), epsilon, K, 2 * pairs, limit};
  const After after{scale.typed_data() + layer * panels * PANEL,
                    or_null(bias, layer),
                    residual.dimensions()[1] == 0 ? nullptr : residual.typed_data(),
                    static_cast<Gate>(gate),
                    y->dimensions()[1],
                    y->typed_data()};

#if defined(LLMOS_TILES)
  if (num_groups == 0 && m >= FEWEST_TILED && Tiles::granted()) {
    project_tiled(pool, in, after, m, weights, panels, panel_bytes);
    return ffi::Error::Success();
  }
#endif

  // Rows are multiplied in blocks of like size; the last may have fewer.
  const int64_t most = num_groups > 0 ? GROUPED_ROWS : ROWS;
  const int64_t at_once = split(m, split(m, most));
  const int64_t blocks = split(m, at_once);
  thread_local std::vector<int32_t> all_pairs;
  thread_local std::vector<float> all_scales;
  all_pairs.resize(m * pairs);
  all_scales.resize(m);
  int32_t* const block_pairs = all_pairs.data();
  float* const scales = all_scales.data();
  llmos::Team::run(pool, blocks, [&](int64_t block) {
    thread_local std::vector<float> scratch;
    thread_local std::vector<int16_t> row16;
    scratch.resize(K);
    row16.resize(in.padded);
    const int64_t first = block * at_once, count = std::min(at_once, m - first);
    int32_t* const to = block_pairs + first * pairs;
    for (int64_t r = 0; r < count; ++r) {
      scales[first + r] = quantize(in, first + r, scratch.data(), row16.data());
      for (int64_t j = 0; j < pairs; ++j)
        std::memcpy(to + j * count + r, row16.data() + 2 * j, sizeof(int32_t));
    }
  });

  // Enough tasks to even threads out, and few enough to be worth handing out.
  const int64_t chunk = std::max<int64_t>(1, panels / (8 * pool.num_threads()));
  const auto multiply_some = [&](int64_t task) {
    alignas(64) float sums[ROWS * PANEL];
    const int64_t last = std::min(panels, (task + 1) * chunk);
    for (int64_t first = 0; first < m; first += at_once) {
      const int64_t count = std::min(at_once, m - first);
      const int32_t* const block = block_pairs + first * pairs;
      for (int64_t p = task * chunk; p < last; ++p) {
        const int8_t* panel = weights + p * panel_bytes;
        const Groups groups{
            group_scale.typed_data() + (layer * panels + p) * num_groups * PANEL,
            group / 2, four_bits};
        panel_rows<ROWS>(panel, num_groups > 0 ? &groups : nullptr, block, count, pairs,
                         sums);
        for (int64_t r = 0; r < count; ++r)
          finish(after, p, first + r, scales[first + r], sums + r * PANEL);
      }
    }
  };
  llmos::Team::run(pool, split(panels, chunk), multiply_some);
  return ffi::Error::Success();
}

// residual + RMSNorm of rows.
ffi::Error add_normed(FloatBuffer x, FloatBuffer norm, FloatBuffer residual,
                      ffi::Buffer<ffi::S32> layers, float epsilon,
                      ffi::Result<FloatBuffer> y) {
  const int64_t m = x.dimensions()[0], K = x.dimensions()[1];
  const float* scale = norm.typed_data() + layers.typed_data()[0] * K;
  for (int64_t row = 0; row < m; ++row) {
    float* out = y->typed_data() + row * K;
    normalize(x.typed_data() + row * K, scale, epsilon, K, out);
    const float* add = residual.typed_data() + row * K;
    for (int64_t k = 0; k < K; ++k) out[k] += add[k];
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(llmos_int8_add_normed, add_normed,
                              ffi::Ffi::Bind()
                                  .Arg<FloatBuffer>()            // x
                                  .Arg<FloatBuffer>()            // norm
                                  .Arg<FloatBuffer>()            // residual
                                  .Arg<ffi::Buffer<ffi::S32>>()  // layer
                                  .Attr<float>("epsilon")
                                  .Ret<FloatBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(llmos_int8_project, project,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<FloatBuffer>()           // x
                                  .Arg<FloatBuffer>()           // norm
                                  .Arg<ffi::Buffer<ffi::U8>>()  // packed
                                  .Arg<FloatBuffer>()           // scale
                                  .Arg<ffi::Buffer<ffi::U16>>() // group_scale
                                  .Arg<FloatBuffer>()           // bias
                                  .Arg<FloatBuffer>()           // residual
                                  .Arg<ffi::Buffer<ffi::S32>>() // layer
                                  .Attr<float>("epsilon")
                                  .Attr<float>("limit")
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("four_bits")
                                  .Attr<int32_t>("gate")
                                  .Ret<FloatBuffer>());
