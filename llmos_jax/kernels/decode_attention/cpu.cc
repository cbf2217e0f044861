// New tokens in, attention over a cache of keys and values out: one call a layer.
//
// m rows (tokens of any sequences), P pages of C tokens in the cache, B slots (sequences)
// of M pages each, S = M C tokens a slot, N query heads, K key/value heads, G = N/K, H head
// size (padded to whole vectors: Hp).
// cpu.py compiles this file at first use.
//
// First every row's keys and values are normed, rotated, quantized and written; then
// every row attends to its slot. A block is up to BLOCK rows (t, g) of one slot and one
// key/value head: one token when decoding, more of a prompt. It passes over its keys in
// spans, and in those by panels: a panel of keys is transposed (and made float32) once
// for the block, as is one of values. Integers stay unscaled there; scales of keys
// multiply scores, those of values weights.
//
// The law: what comes out for a row depends, bit for bit, on its own token, position and
// keys alone; not on its block, on other rows or on threads. So every product sums in
// ascending order with fused steps, whatever the tile (a key that is not seen adds an
// exact zero); spans begin at multiples of SPAN, each with a maximum of its own; and
// they are folded one after another, where a span without a key changes nothing.
// Exponentials are powers of two: queries carry the factor scale * log2(e).
//
// Where blocks are too few for all threads, spans are tasks of their own, and whoever
// ends last folds them.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;   // floats in a vector
constexpr int VECTORS = 4;  // vectors in a tile's row: 24 sums of 32 registers
#elif defined(__AVX__)
constexpr int WIDTH = 8;
constexpr int VECTORS = 2;  // 12 sums of 16 registers
#else
constexpr int WIDTH = 4;
constexpr int VECTORS = 4;  // NEON: 24 sums of 32 registers
#endif
constexpr int ROWS = 6;
constexpr int64_t PANEL = 64;        // keys made float32 together
constexpr int64_t SPAN = 4 * PANEL;  // keys under one maximum
constexpr int64_t BLOCK = 48;        // rows; their scores of a span take 48 KiB
constexpr int64_t LINE = 64;         // bytes that processors fetch together
constexpr int64_t FEW = 4;           // rows whose keys are written by the caller alone
constexpr int64_t WRITTEN = 8;       // rows that one task writes, otherwise

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Integers __attribute__((vector_size(WIDTH * 4)));

template <typename To = Vector, typename From>
inline To load(const From* from) {
  To value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// The first `count` of a vector, and zeros.
template <typename To, typename From>
inline To load_some(const From* from, int64_t count) {
  To value{};
  if (count * sizeof(From) >= sizeof(To)) return load<To>(from);
  std::memcpy(&value, from, count * sizeof(From));
  return value;
}

template <typename Value>
inline void store(float* to, Value value) {
  std::memcpy(to, &value, sizeof(value));
}

inline Vector splat(float value) { return value - Vector{}; }

inline Vector floats(Integers value) { return __builtin_convertvector(value, Vector); }

inline Vector load_floats(const float* from) { return load(from); }

inline Vector load_floats(const int8_t* from) {
#if defined(__AVX512F__)
  Integers whole;
  const __m512i wide = _mm512_cvtepi8_epi32(load<__m128i>(from));
  std::memcpy(&whole, &wide, sizeof(whole));
  return floats(whole);
#elif defined(__AVX2__)
  Integers whole;
  const __m256i wide = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load<int64_t>(from)));
  std::memcpy(&whole, &wide, sizeof(whole));
  return floats(whole);
#else
  Vector value;
  for (int i = 0; i < WIDTH; ++i) value[i] = static_cast<float>(from[i]);
  return value;
#endif
}

template <typename Join>
inline float joined(Vector value, Join join) {
  float lanes[WIDTH];
  store(lanes, value);
  for (int step = WIDTH / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] = join(lanes[i], lanes[i + step]);
  return lanes[0];
}

inline float sum(Vector x) {
  return joined(x, [](float a, float b) { return a + b; });
}
inline float largest(Vector x) {
  return joined(x, [](float a, float b) { return std::max(a, b); });
}

// 2**x to 2e-7 relative, 2**-126 below that; x is at most a rounding above 0 here.
// Polynomial: least maximal relative error (7.5e-8) on [-1/2, 1/2].
inline Vector exp2(Vector x) {
  const Vector low = splat(-126.0f);
  x = x < low ? low : x;
  const Vector magic = splat(12582912.0f);  // 1.5 * 2**23: adding it rounds to a whole
  const Vector shifted = x + magic;
  const Vector f = x - (shifted - magic);
  Vector y = splat(1.3276471781642123e-3f);
  y = y * f + splat(9.675541332764026e-3f);
  y = y * f + splat(5.550713274150031e-2f);
  y = y * f + splat(0.24022119723882016f);
  y = y * f + splat(0.6931469670643613f);
  y = y * f + splat(1.0000000716546722f);
  Integers whole, bits;
  std::memcpy(&whole, &shifted, sizeof(whole));
  std::memcpy(&bits, &y, sizeof(bits));
  bits += whole << 23;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

// tanh(x) to 3e-7 relative. Near 0 a polynomial in x**2 (least maximal relative error,
// 5e-9, on [-0.625, 0.625]), for 1 - exp(-2x) would cancel there.
inline Vector tanh(Vector x) {
  const Vector one = splat(1.0f), square = x * x, size = x < Vector{} ? -x : x;
  Vector y = splat(-5.704985013372066e-3f);
  y = y * square + splat(2.0639085494957334e-2f);
  y = y * square + splat(-5.373971455399656e-2f);
  y = y * square + splat(0.13331442191804999f);
  y = y * square + splat(-0.33333281941773113f);
  const Vector near = x + x * square * y;
  const Vector fading = exp2(splat(-2.0f * LOG2_E) * size);
  const Vector far = (one - fading) / (one + fading);
  return size < splat(0.625f) ? near : (x < Vector{} ? -far : far);
}

// 2**x, and 1 where x is 0: what a sum is multiplied by when the maximum moves.
inline float fading(float x) { return x == 0.0f ? 1.0f : exp2(splat(x))[0]; }

// A range of keys, [begin, end); end may lie before begin if it is empty.
struct Range {
  int64_t begin, end;

  // What of it falls into the `size` columns from `first` on, numbered from there.
  Range within(int64_t first, int64_t size) const {
    const int64_t last = std::clamp<int64_t>(end - first, 0, size);
    return {std::clamp<int64_t>(begin - first, 0, last), last};
  }
  void widen(const Range& other) {
    begin = std::min(begin, other.begin);
    end = std::max(end, other.end);
  }
};

// Keep the lanes of the vector at column `s` that `seen` holds; `otherwise` elsewhere.
inline Vector keep(Vector value, int64_t s, const Range& seen, float otherwise) {
  if (seen.begin <= s && s + WIDTH <= seen.end) return value;
  Integers lanes;
  for (int i = 0; i < WIDTH; ++i) lanes[i] = i;
  const Integers begin = static_cast<int32_t>(seen.begin - s) - Integers{};
  const Integers end = static_cast<int32_t>(seen.end - s) - Integers{};
  return ((lanes >= begin) & (lanes < end)) ? value : splat(otherwise);
}

// ---------------------------------------------------------------------------- products

// What a product is followed by, asked for line by line at its steps: processors look
// ahead no further than a page, which a panel of int8 fills.
struct Next {
  const char* from = nullptr;
  int64_t last = 0;   // bytes up to its last line
  int64_t lines = 0;  // of each step; 0: nothing is asked for

  Next() = default;
  template <typename Stored>
  Next(const Stored* from, int64_t count, int64_t steps)
      : from(reinterpret_cast<const char*>(from)),
        last((count * static_cast<int64_t>(sizeof(Stored)) - 1) / LINE * LINE),
        lines(last / (LINE * steps) + 1) {}

  void ask(int64_t step) const {
    for (int64_t i = step * lines; i < (step + 1) * lines; ++i)
      __builtin_prefetch(from + std::min(i * LINE, last));
  }
};

// C += A B: A's elements are broadcast and B's rows are vectors. Each element of C is a
// chain of fused steps in the order of depth, so it is the same whatever M and V are.
template <typename From>
struct Product {
  const float* a;
  int64_t a_row;
  const From* b;
  int64_t b_depth;
  float* c;
  int64_t c_row;
  Next next;
};

template <int M, int V, bool ASKS = false, typename From>
void tile(const Product<From>& p, int64_t column, int64_t depth) {
  const From* b = p.b + column;
  float* c = p.c + column;
  Vector sums[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) sums[i][j] = load(c + i * p.c_row + j * WIDTH);
  const Next next = p.next;
  for (int64_t k = 0; k < depth; ++k) {
    if constexpr (ASKS) next.ask(k);
    Vector row[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) row[j] = load_floats(b + k * p.b_depth + j * WIDTH);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vector factor = splat(p.a[i * p.a_row + k]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) sums[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) store(c + i * p.c_row + j * WIDTH, sums[i][j]);
}

template <int M, typename From>
void product_of_rows(const Product<From>& p, int64_t width, int64_t depth) {
  constexpr int V = M <= 3 ? 4 : VECTORS;  // few rows leave registers for more columns
  int64_t column = 0;
  if (p.next.lines > 0 && width >= V * WIDTH) {
    tile<M, V, true>(p, 0, depth);
    column = V * WIDTH;
  }
  for (; column + V * WIDTH <= width; column += V * WIDTH) tile<M, V>(p, column, depth);
  const int64_t rest = (width - column + WIDTH - 1) / WIDTH;  // vectors: 0 .. V
  if (rest == 1) tile<M, 1>(p, column, depth);
  if (rest == 2) tile<M, 2>(p, column, depth);
  if (V > 2 && rest == 3) tile<M, V == 2 ? 2 : 3>(p, column, depth);
  if (V > 2 && rest == 4) tile<M, V>(p, column, depth);
}

// For up to ROWS rows; width is rounded up to whole vectors.
template <typename From>
void multiply(const Product<From>& p, int64_t rows, int64_t width, int64_t depth) {
  switch (rows) {
    case 6: return product_of_rows<6>(p, width, depth);
    case 5: return product_of_rows<5>(p, width, depth);
    case 4: return product_of_rows<4>(p, width, depth);
    case 3: return product_of_rows<3>(p, width, depth);
    case 2: return product_of_rows<2>(p, width, depth);
    case 1: return product_of_rows<1>(p, width, depth);
  }
}

// ------------------------------------------------------------------------------ panels

// Swap the elements (i, j + D) and (i + D, j) of all blocks of 2D x 2D.
template <int D, int... J>
inline void swap(Integers& a, Integers& b, std::integer_sequence<int, J...>) {
#if defined(__clang__)
  const Integers upper =
      __builtin_shufflevector(a, b, ((J & D) ? WIDTH + J - D : J)...);
  const Integers lower =
      __builtin_shufflevector(a, b, ((J & D) ? WIDTH + J : J + D)...);
#else
  const Integers upper =
      __builtin_shuffle(a, b, Integers{((J & D) ? WIDTH + J - D : J)...});
  const Integers lower =
      __builtin_shuffle(a, b, Integers{((J & D) ? WIDTH + J : J + D)...});
#endif
  a = upper;
  b = lower;
}

template <int D>
inline void transpose(Integers (&rows)[WIDTH]) {
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i)
    if ((i & D) == 0)
      swap<D>(rows[i], rows[i | D], std::make_integer_sequence<int, WIDTH>());
  if constexpr (D > 1) transpose<D / 2>(rows);
}

// WIDTH keys' values, of which `count` are there, from h on: as float32 columns
// [h .. , PANEL] of a panel. A vector holds PER values of one key.
template <typename Stored>
inline void pack_columns(const Stored* keys, int64_t H, int64_t count, int64_t h,
                         float* out) {
  constexpr int PER = 4 / sizeof(Stored);
  const int64_t there = std::min<int64_t>(WIDTH * PER, H - h);
  Integers rows[WIDTH];
  if (count >= WIDTH && there == WIDTH * PER) {
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) rows[i] = load<Integers>(keys + i * H + h);
  } else {
    for (int i = 0; i < WIDTH; ++i)
      rows[i] = i < count ? load_some<Integers>(keys + i * H + h, there) : Integers{};
  }
  transpose<WIDTH / 2>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i) {
    if (i * PER >= there) break;
    float* column = out + (h + i * PER) * PANEL;
    if constexpr (PER == 1) {
      store(column, rows[i]);
    } else {  // byte j of each: numbers of h + 4i + j (little-endian)
      store(column, floats((rows[i] << 24) >> 24));
      if (i * PER + 1 < there) store(column + PANEL, floats((rows[i] << 16) >> 24));
      if (i * PER + 2 < there) store(column + 2 * PANEL, floats((rows[i] << 8) >> 24));
      if (i * PER + 3 < there) store(column + 3 * PANEL, floats(rows[i] >> 24));
    }
  }
}

// [count, H] to float32 [H, PANEL], with zeros up to a whole vector.
template <typename Stored>
void pack_keys(const Stored* keys, int64_t H, int64_t count, float* out) {
  for (int64_t s = 0; s < count; s += WIDTH)
    for (int64_t h = 0; h < H; h += WIDTH * 4 / sizeof(Stored))
      pack_columns(keys + s * H, H, count - s, h, out + s);
}

// [count, H] to float32 [count, Hp]; what lies between is of no account.
template <typename Stored>
void pack_values(const Stored* values, int64_t H, int64_t Hp, int64_t count, float* out) {
  for (int64_t s = 0; s < count; ++s, values += H, out += Hp) {
    int64_t h = 0;
    for (; h + WIDTH <= H; h += WIDTH) store(out + h, load_floats(values + h));
    for (; h < H; ++h) out[h] = static_cast<float>(values[h]);
  }
}

// -------------------------------------------------------------------- what is asked for

template <typename Stored>
struct Call {
  int64_t m, B, S, P, C, N, K, G, H, Hp;
  const float *qkv, *cos, *sin, *q_norm, *k_norm;  // norms: null without
  const int32_t *slot, *position;
  const int32_t* table;      // [B, S/C]: which page holds the places of a slot
  Stored *k, *v;             // of this layer: [P, K, C, H]
  float *k_scale, *v_scale;  // [P, K, C]; null where numbers are float32
  float* out;               // [m, N, H]
  int64_t window;
  float scale, softcap, epsilon;  // softcap: infinite if scores stay as they are
  bool rotate_keys, written;  // written: these rows' keys and values lie there already

  const float* head(int64_t row, int64_t index) const {  // q heads, k heads, v heads
    return qkv + (row * (N + 2 * K) + index) * H;
  }
  int64_t page(int64_t row, int64_t s) const { return table[(slot[row] * S + s) / C]; }
  // Place s of a row's slot in [P, K, C]; some other place where it has no page.
  int64_t cached(int64_t row, int64_t head, int64_t s) const {
    const int64_t known = std::clamp<int64_t>(page(row, s), 0, P - 1);
    return (known * K + head) * C + s % C;
  }
  // A row without a place (padding) is not written, and gets zeros.
  bool has_place(int64_t row) const {
    if (slot[row] < 0 || slot[row] >= B || position[row] < 0 || position[row] >= S)
      return false;
    const int64_t mine = page(row, position[row]);
    return mine >= 0 && mine < P;
  }
  Range visible(int64_t row) const {
    const int64_t end = int64_t{position[row]} + 1;
    return {std::max<int64_t>(end - window, 0), end};
  }
};

// ------------------------------------------------------------------- heads on their way

// x / rms(x) * scale.
void norm(float* x, const float* scale, float epsilon, int64_t H) {
  Vector squares{};
  int64_t h = 0;
  for (; h + WIDTH <= H; h += WIDTH) squares += load(x + h) * load(x + h);
  float total = sum(squares);
  for (; h < H; ++h) total += x[h] * x[h];
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(H) + epsilon);
  for (h = 0; h < H; ++h) x[h] = x[h] * factor * scale[h];
}

// Turn each pair (h, h + H/2) by its angle.
void rotate(float* __restrict x, const float* __restrict cos,
            const float* __restrict sin, int64_t H) {
  const int64_t half = H / 2;
  for (int64_t h = 0; h < half; ++h) {
    const float first = x[h], second = x[h + half];
    x[h] = first * cos[h] - second * sin[h];
    x[h + half] = second * cos[h] + first * sin[h];
  }
}

// Times the orthonormal Hadamard matrix of size H, a power of two (Sylvester's).
void hadamard(float* x, int64_t H) {
  for (int64_t step = 1; step < H; step *= 2)
    for (int64_t h = 0; h < H; h += 2 * step)
      for (int64_t i = h; i < h + step; ++i) {
        const float first = x[i], second = x[i + step];
        x[i] = first + second;
        x[i + step] = first - second;
      }
  const float factor = 1.0f / std::sqrt(static_cast<float>(H));
  for (int64_t h = 0; h < H; ++h) x[h] *= factor;
}

// A query or key of a row as attention wants it, times `factor`.
template <typename Stored>
void prepare(const Call<Stored>& call, int64_t row, int64_t index, const float* scale,
             float factor, float* out) {
  const int64_t H = call.H, half = H / 2;
  std::copy_n(call.head(row, index), H, out);
  if (scale != nullptr) norm(out, scale, call.epsilon, H);
  rotate(out, call.cos + row * half, call.sin + row * half, H);
  if (call.rotate_keys) hadamard(out, H);
  if (factor != 1.0f)
    for (int64_t h = 0; h < H; ++h) out[h] *= factor;
}

void write(const float* x, int64_t H, float* to, float*, int64_t at) {
  std::copy_n(x, H, to + at * H);
}

// scale = absmax / 127; numbers are rounded to nearest, ties to even.
void write(const float* x, int64_t H, int8_t* to, float* scales, int64_t at) {
  Vector tops{};
  for (int64_t h = 0; h < H; h += WIDTH) {
    const Vector some = h + WIDTH <= H ? load(x + h) : load_some<Vector>(x + h, H - h);
    const Vector size = some < Vector{} ? -some : some;
    tops = size > tops ? size : tops;
  }
  float scale = largest(tops) / 127.0f;
  if (scale == 0.0f) scale = 1.0f;
  scales[at] = scale;
  constexpr float magic = 12582912.0f;  // 1.5 * 2**23: adding it rounds to a whole
  for (int64_t h = 0; h < H; ++h) {
    const float whole = (x[h] / scale + magic) - magic;
    to[at * H + h] = static_cast<int8_t>(
        static_cast<int32_t>(std::min(std::max(whole, -127.0f), 127.0f)));
  }
}

// ------------------------------------------------------------------------------- blocks

// Some consecutive rows of one slot.
struct Block {
  int64_t row, count;
  Range keys;  // that any of them sees

  int64_t first_span() const { return keys.begin / SPAN; }
  int64_t spans() const { return (keys.end + SPAN - 1) / SPAN - first_span(); }
};

// Memory of one thread, kept from call to call.
class Scratch {
 public:
  float* take(int64_t count) {
    float* memory = next_;
    next_ += (count + 15) / 16 * 16;
    return memory;
  }
  // What was taken before is lost.
  void reserve(int64_t count) {
    if (count > size_) {
      memory_.reset(new float[count + 16]);
      size_ = count;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    next_ = reinterpret_cast<float*>((address + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<float[]> memory_;
  int64_t size_ = 0;
  float* next_ = nullptr;
};

// Softmax under way: of each row the maximum, the sum of weights and that of values.
struct State {
  float *top, *total, *out;

  static int64_t size(int64_t rows, int64_t Hp) { return rows * (Hp + 2) + 48; }
  static State take(Scratch& scratch, int64_t rows, int64_t Hp) {
    return {scratch.take(rows), scratch.take(rows), scratch.take(rows * Hp)};
  }
  static State at(float* memory, int64_t rows) {
    return {memory, memory + rows, memory + 2 * rows};
  }
  void clear(int64_t rows, int64_t Hp) const {
    std::fill_n(top, rows, NOTHING);
    std::fill_n(total, rows, 0.0f);
    std::fill_n(out, rows * Hp, 0.0f);
  }
  // Add the next span's.
  void fold(const State& part, int64_t rows, int64_t Hp) const {
    for (int64_t r = 0; r < rows; ++r) {
      if (part.top[r] == NOTHING) continue;
      const float most = std::max(top[r], part.top[r]);
      const float old = top[r] == NOTHING ? 0.0f : fading(top[r] - most);
      const float fresh = fading(part.top[r] - most);
      top[r] = most;
      total[r] = total[r] * old + part.total[r] * fresh;
      for (int64_t h = 0; h < Hp; h += WIDTH) {
        float* to = out + r * Hp + h;
        store(to, load(to) * splat(old) + load(part.out + r * Hp + h) * splat(fresh));
      }
    }
  }
};

// One block and one key/value head: rows r = t * G + g.
template <typename Stored>
struct Group {
  const Call<Stored>& call;
  const Block& block;
  int64_t head, rows;

  Group(const Call<Stored>& call, const Block& block, int64_t head)
      : call(call), block(block), head(head), rows(block.count * call.G) {}

  int64_t token(int64_t r) const { return block.row + r / call.G; }
  int64_t query(int64_t r) const { return head * call.G + r % call.G; }

  void pack_queries(float* q) const {
    for (int64_t r = 0; r < rows; ++r)
      prepare(call, token(r), query(r), call.q_norm, LOG2_E * call.scale,
              q + r * call.Hp);
  }

  void finish(const State& state) const {
    for (int64_t r = 0; r < rows; ++r) {
      float* to = call.out + (token(r) * call.N + query(r)) * call.H;
      const float factor = 1.0f / state.total[r];
      for (int64_t h = 0; h < call.H; ++h) to[h] = state.out[r * call.Hp + h] * factor;
    }
  }

  // What rows r to r + count - 1 see.
  Range visible(int64_t r, int64_t count) const {
    Range all = call.visible(token(r));
    for (int64_t i = 1; i < count; ++i) all.widen(call.visible(token(r + i)));
    return all;
  }

  // Attend to the keys from `first`, a multiple of SPAN, to first + SPAN - 1.
  void attend(int64_t first, const float* q, float* scores, float* panel,
              const State& part) const {
    const Range keys = block.keys.within(first, SPAN);
    const Range columns{keys.begin / PANEL * PANEL, keys.end};
    part.clear(rows, call.Hp);
    for (int64_t s = columns.begin; s < columns.end; s += PANEL)
      score(first, columns, s, q, scores, panel);
    weigh(first, columns, scores, part);
    for (int64_t s = columns.begin; s < columns.end; s += PANEL)
      add_values(first, columns, s, scores, panel, part.out);
  }

 private:
  // Where place s of this block's slot lies; so do those up to the end of its panel.
  int64_t place(int64_t s) const { return call.cached(block.row, head, s); }

  // Scores of the panel of keys at column `s`.
  void score(int64_t first, const Range& columns, int64_t s, const float* q,
             float* scores, float* panel) const {
    const int64_t H = call.H, Hp = call.Hp, count = std::min(PANEL, columns.end - s);
    pack_keys(call.k + place(first + s) * H, H, count, panel);
    const Next next = after_keys(first, columns, s);
    for (int64_t r = 0; r < rows; r += ROWS) {
      const int64_t some = std::min<int64_t>(ROWS, rows - r);
      const Range seen = visible(r, some).within(first + s, PANEL);
      if (seen.begin == seen.end) continue;
      float* to = scores + r * SPAN + s;
      for (int64_t i = 0; i < some; ++i) std::fill_n(to + i * SPAN, PANEL, 0.0f);
      multiply(Product<float>{q + r * Hp, Hp, panel, PANEL, to, SPAN, next},
               some, seen.end, H);
    }
  }

  // Add the panel of values at column `s`, times their weights.
  void add_values(int64_t first, const Range& columns, int64_t s, const float* weights,
                  float* panel, float* out) const {
    const int64_t H = call.H, Hp = call.Hp, count = std::min(PANEL, columns.end - s);
    const Stored* values = call.v + place(first + s) * H;
    // Values that one tile reads are made float32 on the way.
    const bool direct = H == Hp && (rows <= ROWS || sizeof(Stored) == sizeof(float));
    if (!direct) pack_values(values, H, Hp, count, panel);
    const Next next = after_values(first, columns, s);
    for (int64_t r = 0; r < rows; r += ROWS) {
      const int64_t some = std::min<int64_t>(ROWS, rows - r);
      const Range seen = visible(r, some).within(first + s, count);
      if (seen.begin == seen.end) continue;
      const float* from = weights + r * SPAN + s;
      float* to = out + r * Hp;
      if (direct)
        multiply(Product<Stored>{from, SPAN, values, H, to, Hp, next}, some, H,
                 seen.end);
      else
        multiply(Product<float>{from, SPAN, panel, Hp, to, Hp, next}, some, Hp,
                 seen.end);
    }
  }

  // Where one tile holds all rows, memory is what they wait for: decoding. After a
  // panel of keys comes another, or the first of values.
  Next after_keys(int64_t first, const Range& columns, int64_t s) const {
    if (rows > ROWS) return {};
    const int64_t left = columns.end - s - PANEL;
    if (left > 0) return panel(call.k, place(first + s + PANEL), left, call.H);
    const int64_t count = columns.end - columns.begin;
    return panel(call.v, place(first + columns.begin), count, call.H);
  }

  // Another panel of values, or keys: of the next span, or of the next head.
  Next after_values(int64_t first, const Range& columns, int64_t s) const {
    if (rows > ROWS) return {};
    const int64_t steps = std::min(PANEL, columns.end - s), end = block.keys.end;
    const int64_t left = columns.end - s - PANEL;
    if (left > 0) return panel(call.v, place(first + s + PANEL), left, steps);
    if (end > first + SPAN)
      return panel(call.k, place(first + SPAN), end - first - SPAN, steps);
    if (head + 1 == call.K) return {};
    const int64_t begin = block.keys.begin / PANEL * PANEL;
    return panel(call.k, call.cached(block.row, head + 1, begin), end - begin, steps);
  }

  Next panel(const Stored* all, int64_t at, int64_t count, int64_t steps) const {
    return {all + at * call.H, std::min(PANEL, count) * call.H, steps};
  }

  // Turn scores into weights, zero where a row does not see; `columns` were computed.
  void weigh(int64_t first, const Range& columns, float* scores,
             const State& part) const {
    float k_scale[SPAN] = {}, v_scale[SPAN] = {};
    if (call.k_scale != nullptr) {
      for (int64_t s = columns.begin; s < columns.end; s += PANEL) {
        const int64_t count = std::min(PANEL, columns.end - s), at = place(first + s);
        std::copy_n(call.k_scale + at, count, k_scale + s);
        std::copy_n(call.v_scale + at, count, v_scale + s);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Range seen = call.visible(token(r)).within(first, SPAN);
      const int64_t start = seen.begin / WIDTH * WIDTH;
      const int64_t stop = (seen.end + WIDTH - 1) / WIDTH * WIDTH;
      float* row = scores + r * SPAN;
      if (seen.begin == seen.end) {
        std::fill(row + columns.begin, row + columns.end, 0.0f);
        continue;
      }
      softmax(row, seen, start, stop, k_scale, v_scale, &part.top[r], &part.total[r]);
      std::fill(row + columns.begin, row + std::max(columns.begin, start), 0.0f);
      if (stop < columns.end) std::fill(row + stop, row + columns.end, 0.0f);
    }
  }

  void softmax(float* row, const Range& seen, int64_t start, int64_t stop,
               const float* k_scale, const float* v_scale, float* top,
               float* total) const {
    const bool scaled = call.k_scale != nullptr, capped = std::isfinite(call.softcap);
    const Vector cap = splat(LOG2_E * call.softcap);
    Vector tops = splat(NOTHING), sums{};
    for (int64_t s = start; s < stop; s += WIDTH) {
      Vector x = load(row + s);
      if (scaled) x *= load(k_scale + s);
      if (capped) x = cap * tanh(x / cap);
      x = keep(x, s, seen, NOTHING);
      store(row + s, x);
      tops = x > tops ? x : tops;
    }
    *top = largest(tops);
    for (int64_t s = start; s < stop; s += WIDTH) {
      Vector weight = keep(exp2(load(row + s) - splat(*top)), s, seen, 0.0f);
      sums += weight;
      if (scaled) weight *= load(v_scale + s);
      store(row + s, weight);
    }
    *total = sum(sums);
  }
};

template <typename Stored>
class Attention {
 public:
  Attention(const Call<Stored>& call, ffi::ThreadPool& pool) : call_(call), pool_(pool) {}

  void run() {
    write_rows();
    find_blocks();
    const int64_t groups = static_cast<int64_t>(blocks().size()) * call_.K;
    int64_t spans = 1;
    for (const Block& block : blocks()) spans = std::max(spans, block.spans());
    if (spans > 1 && groups < 2 * static_cast<int64_t>(pool_.num_threads()))
      run_spans(groups, spans);
    else
      llmos::Team::run(pool_, groups, [&](int64_t i) { whole(group(i)); });
  }

 private:
  static std::vector<Block>& blocks() {
    thread_local std::vector<Block> kept;
    return kept;
  }
  static Scratch& scratch() {
    thread_local Scratch kept;
    return kept;
  }

  void write_rows() {
    if (call_.m <= FEW) {
      for (int64_t row = 0; row < call_.m; ++row) write_row(row);
      return;
    }
    llmos::Team::run(pool_, (call_.m + WRITTEN - 1) / WRITTEN, [&](int64_t i) {
      const int64_t end = std::min(call_.m, (i + 1) * WRITTEN);
      for (int64_t row = i * WRITTEN; row < end; ++row) write_row(row);
    });
  }

  void write_row(int64_t row) {
    if (!call_.has_place(row)) {
      std::fill_n(call_.out + row * call_.N * call_.H, call_.N * call_.H, 0.0f);
      return;
    }
    if (call_.written) return;
    Scratch& memory = scratch();
    memory.reserve(call_.H + 16);
    float* key = memory.take(call_.H);
    for (int64_t k = 0; k < call_.K; ++k) {
      const int64_t at = call_.cached(row, k, call_.position[row]);
      prepare(call_, row, call_.N + k, call_.k_norm, 1.0f, key);
      write(key, call_.H, call_.k, call_.k_scale, at);
      write(call_.head(row, call_.N + call_.K + k), call_.H, call_.v, call_.v_scale, at);
    }
  }

  void find_blocks() {
    const int64_t most = std::max<int64_t>(1, BLOCK / call_.G);
    std::vector<Block>& found = blocks();
    found.clear();
    bool open = false;
    for (int64_t row = 0; row < call_.m; ++row) {
      if (!call_.has_place(row)) {
        open = false;
        continue;
      }
      const Range seen = call_.visible(row);
      if (open && found.back().count < most &&
          call_.slot[row] == call_.slot[found.back().row]) {
        ++found.back().count;
        found.back().keys.widen(seen);
      } else {
        found.push_back({row, 1, seen});
      }
      open = true;
    }
  }

  int64_t rows_at_most() const { return std::max(call_.G, BLOCK / call_.G * call_.G); }

  // Room for one group's queries, scores and panel, and two states.
  struct Room {
    float *q, *scores, *panel;
    State state, part;
  };
  Room room() const {
    const int64_t rows = rows_at_most(), Hp = call_.Hp;
    const int64_t panel = std::max(call_.H * PANEL, PANEL * Hp);
    Scratch& memory = scratch();
    memory.reserve(rows * Hp + rows * SPAN + panel + 2 * State::size(rows, Hp) + 48);
    return {memory.take(rows * Hp), memory.take(rows * SPAN), memory.take(panel),
            State::take(memory, rows, Hp), State::take(memory, rows, Hp)};
  }

  // Later blocks of a prompt see more keys: they come first.
  Group<Stored> group(int64_t i) const {
    return {call_, (*found_)[found_->size() - 1 - i / call_.K], i % call_.K};
  }

  // All spans of a group, one after another.
  void whole(const Group<Stored>& group) const {
    const Room here = room();
    group.pack_queries(here.q);
    here.state.clear(group.rows, call_.Hp);
    for (int64_t i = 0; i < group.block.spans(); ++i) {
      group.attend((group.block.first_span() + i) * SPAN, here.q, here.scores, here.panel,
                   here.part);
      here.state.fold(here.part, group.rows, call_.Hp);
    }
    group.finish(here.state);
  }

  // Each span of each group is a task; the last of a group to end folds them.
  void run_spans(int64_t groups, int64_t spans) {
    thread_local std::vector<float> parts;
    thread_local std::vector<std::atomic<int64_t>> counters;
    const int64_t size = State::size(rows_at_most(), call_.Hp);
    if (static_cast<int64_t>(parts.size()) < groups * spans * size)
      parts.resize(groups * spans * size);
    if (static_cast<int64_t>(counters.size()) < groups)
      counters = std::vector<std::atomic<int64_t>>(groups);
    float* const memory = parts.data();
    std::atomic<int64_t>* const missing = counters.data();
    for (int64_t i = 0; i < groups; ++i)
      missing[i].store(group(i).block.spans(), std::memory_order_relaxed);
    llmos::Team::run(pool_, groups * spans, [&, memory, missing](int64_t task) {
      const int64_t i = task / spans, number = task % spans;
      const Group<Stored> mine = group(i);
      if (number >= mine.block.spans()) return;
      const auto part = [&](int64_t number) {
        return State::at(memory + (i * spans + number) * size, mine.rows);
      };
      const Room here = room();
      mine.pack_queries(here.q);
      mine.attend((mine.block.first_span() + number) * SPAN, here.q, here.scores,
                  here.panel, part(number));
      if (missing[i].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
      here.state.clear(mine.rows, call_.Hp);
      for (int64_t span = 0; span < mine.block.spans(); ++span)
        here.state.fold(part(span), mine.rows, call_.Hp);
      mine.finish(here.state);
    });
  }

  const Call<Stored>& call_;
  ffi::ThreadPool& pool_;
  const std::vector<Block>* found_ = &blocks();  // the caller's, for helpers to read
};

// ----------------------------------------------------------------------------- handlers

using Floats = ffi::Buffer<ffi::F32>;
using Whole = ffi::Buffer<ffi::S32>;

template <typename Stored>
ffi::Error attend(ffi::ThreadPool& pool, const Floats& qkv, const Floats& cos,
                  const Floats& sin, const Floats& q_norm, const Floats& k_norm,
                  const Whole& slot, const Whole& position, const Whole& layer,
                  const Whole& window, const Whole& table, int64_t num_heads,
                  float softcap, float scale,
                  float epsilon, bool rotate_keys, bool written, Floats& out,
                  ffi::Span<const int64_t> shape, Stored* k, Stored* v, float* k_scale,
                  float* v_scale) {
  const int64_t P = shape[1], K = shape[2], C = shape[3], H = shape[4];
  const int64_t B = table.dimensions()[0], S = table.dimensions()[1] * C;
  if (S != C && C % PANEL != 0)
    return ffi::Error::InvalidArgument("decode attention: pages must hold whole panels");
  const int64_t index = layer.typed_data()[0];
  if (index < 0 || index >= shape[0])
    return ffi::Error::InvalidArgument("decode attention: no such layer in the cache");
  const int64_t before = index * P * K * C;
  Call<Stored> call{
      qkv.dimensions()[0], B, S, P, C, num_heads, K, num_heads / K, H,
      (H + WIDTH - 1) / WIDTH * WIDTH,
      qkv.typed_data(), cos.typed_data(), sin.typed_data(),
      q_norm.element_count() ? q_norm.typed_data() : nullptr,
      k_norm.element_count() ? k_norm.typed_data() : nullptr,
      slot.typed_data(), position.typed_data(), table.typed_data(),
      k + before * H, v + before * H,
      k_scale ? k_scale + before : nullptr, v_scale ? v_scale + before : nullptr,
      out.typed_data(), window.typed_data()[0], scale, softcap, epsilon, rotate_keys,
      written};
  Attention<Stored>(call, pool).run();
  return ffi::Error::Success();
}

#define ASKED                                                                        \
  ffi::ThreadPool pool, Floats qkv, Floats cos, Floats sin, Floats q_norm,           \
      Floats k_norm, Whole slot, Whole position, Whole layer, Whole window, Whole table
#define GIVEN                                                                        \
  pool, qkv, cos, sin, q_norm, k_norm, slot, position, layer, window, table,         \
      num_heads, softcap, scale, epsilon, rotate_keys, written, *out, k->dimensions(),          \
      k->typed_data(), v->typed_data()
#define NUMBERS                                                                      \
  int64_t num_heads, float softcap, float scale, float epsilon, bool rotate_keys,    \
      bool written

ffi::Error attend_float(ASKED, Floats, Floats, NUMBERS, ffi::Result<Floats> out,
                        ffi::Result<Floats> k, ffi::Result<Floats> v) {
  return attend<float>(GIVEN, nullptr, nullptr);
}

using Int8s = ffi::Buffer<ffi::S8>;

ffi::Error attend_int8(ASKED, Int8s, Int8s, Floats, Floats, NUMBERS,
                       ffi::Result<Floats> out, ffi::Result<Int8s> k,
                       ffi::Result<Int8s> v, ffi::Result<Floats> k_scale,
                       ffi::Result<Floats> v_scale) {
  return attend<int8_t>(GIVEN, k_scale->typed_data(), v_scale->typed_data());
}

}  // namespace

#define BOUND                                                                        \
  ffi::Ffi::Bind()                                                                   \
      .Ctx<ffi::ThreadPool>()                                                        \
      .Arg<Floats>().Arg<Floats>().Arg<Floats>() /* qkv, cos, sin */                 \
      .Arg<Floats>().Arg<Floats>()               /* norms of q and k */              \
      .Arg<Whole>().Arg<Whole>()                 /* slot, position */                \
      .Arg<Whole>().Arg<Whole>().Arg<Whole>()    /* layer, window, table */
#define ATTRIBUTES                                                                   \
  Attr<int64_t>("num_heads").Attr<float>("softcap").Attr<float>("scale")             \
      .Attr<float>("epsilon").Attr<bool>("rotate_keys").Attr<bool>("written")

XLA_FFI_DEFINE_HANDLER_SYMBOL(llmos_attend_rows_float, attend_float,
                              BOUND.Arg<Floats>().Arg<Floats>()  // k, v
                                  .ATTRIBUTES.Ret<Floats>()
                                  .Ret<Floats>().Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(llmos_attend_rows_int8, attend_int8,
                              BOUND.Arg<Int8s>().Arg<Int8s>()  // k, v
                                  .Arg<Floats>().Arg<Floats>()  // their scales
                                  .ATTRIBUTES.Ret<Floats>()
                                  .Ret<Int8s>().Ret<Int8s>()
                                  .Ret<Floats>().Ret<Floats>());
