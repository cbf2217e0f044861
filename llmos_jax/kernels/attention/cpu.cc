// Fused causal grouped-query attention for one CPU, float32, forward and backward.
//
// B sequences, T query tokens, S key tokens, N query heads, K key/value heads, G = N/K,
// H head size (padded to whole tiles: Hp). cpu.py compiles this file at first use.
//
// One task is one (b, k): its keys and values are packed once, and its T*G query rows,
// ordered (t, g), pass in blocks. Scores live in a block's buffer and never reach
// memory; the backward pass makes them again from the saved log-sum-exp
// (FlashAttention, arXiv 2205.14135). Every sum is taken in an order that does not
// depend on threads: results are the same bits with any number of them. Exponentials
// are powers of two: the packed queries carry the factor scale * log2(e).
//
// With a window a query at p sees the keys p - window + 1 to p; panels of keys that no
// row of a tile sees are not multiplied, and keys that no query sees are not packed.
//
// A tile product is C[m, :] += A[m, k] * B[k, :], with A's elements broadcast (so A may
// be read transposed) and B's rows in vectors; ROWS * VECTORS sums stay in registers.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

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
constexpr int TILE = WIDTH * VECTORS;
constexpr int PANEL = 64;          // keys packed together; a multiple of every TILE
constexpr int SPAN = 4 * PANEL;    // keys under one softmax step of the forward pass
constexpr int FORWARD_BLOCK = 48;  // query rows; their scores take 48 KiB
constexpr int BACKWARD_BLOCK = 96;
static_assert(PANEL % TILE == 0, "a panel is whole tiles");

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Integers __attribute__((vector_size(WIDTH * 4)));

inline Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof(value)); }

inline Vector splat(float value) { return value - Vector{}; }

inline float sum(Vector value) {
  float lanes[WIDTH];
  store(lanes, value);
  for (int step = WIDTH / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

inline float largest(Vector value) {
  float lanes[WIDTH];
  store(lanes, value);
  for (int step = WIDTH / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] = std::max(lanes[i], lanes[i + step]);
  return lanes[0];
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

inline Integers lane_numbers() {
  Integers lanes;
  for (int i = 0; i < WIDTH; ++i) lanes[i] = i;
  return lanes;
}

// A range of keys or columns, [begin, end); end may lie before begin if it is empty.
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
  const Integers begin = static_cast<int32_t>(seen.begin - s) - Integers{};
  const Integers end = static_cast<int32_t>(seen.end - s) - Integers{};
  const Integers lanes = lane_numbers();
  return ((lanes >= begin) & (lanes < end)) ? value : splat(otherwise);
}

template <int M, int V>
void tile(const float* a, int64_t a_row, int64_t a_depth, const float* b,
          int64_t b_depth, float* c, int64_t c_row, int64_t depth, bool add) {
  Vector sums[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j)
      sums[i][j] = add ? load(c + i * c_row + j * WIDTH) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) row[j] = load(b + k * b_depth + j * WIDTH);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vector factor = splat(a[i * a_row + k * a_depth]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) sums[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) store(c + i * c_row + j * WIDTH, sums[i][j]);
}

struct Product {
  const float* a;
  int64_t a_row, a_depth;
  const float* b;
  int64_t b_depth;
  float* c;
  int64_t c_row;
  int64_t depth;
  bool add;
};

template <int M, int V>
void tile_at(const Product& p, int64_t column) {
  tile<M, V>(p.a, p.a_row, p.a_depth, p.b + column, p.b_depth, p.c + column, p.c_row,
             p.depth, p.add);
}

template <int M>
void product_of_rows(const Product& p, int64_t width) {
  int64_t column = 0;
  for (; column + TILE <= width; column += TILE)
    tile_at<M, VECTORS>(p, column);
  const int64_t rest = (width - column + WIDTH - 1) / WIDTH;  // vectors: 0 .. VECTORS
  if (rest == 1) tile_at<M, 1>(p, column);
  if (rest == 2) tile_at<M, 2>(p, column);
  if (VECTORS > 2 && rest == 3) tile_at<M, 3>(p, column);
  if (VECTORS > 2 && rest == 4) tile_at<M, 4>(p, column);
}

// C = A B (or C += A B) for up to ROWS rows; width is rounded up to whole vectors.
void multiply(const Product& p, int64_t rows, int64_t width) {
  switch (rows) {
    case 6: return product_of_rows<6>(p, width);
    case 5: return product_of_rows<5>(p, width);
    case 4: return product_of_rows<4>(p, width);
    case 3: return product_of_rows<3>(p, width);
    case 2: return product_of_rows<2>(p, width);
    case 1: return product_of_rows<1>(p, width);
  }
}

// Scratch memory of one thread: blocks handed out in order, freed together.
class Scratch {
 public:
  float* take(int64_t count) {
    const std::size_t bytes = (count * sizeof(float) + 63) / 64 * 64 + 64;
    blocks_.emplace_back(new char[bytes]);
    const auto address = reinterpret_cast<std::uintptr_t>(blocks_.back().get());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }
  float* zeros(int64_t count) {
    float* memory = take(count);
    std::fill_n(memory, count, 0.0f);
    return memory;
  }

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
};

// Run body(0) .. body(count - 1) on XLA's threads and this one. A helper that starts
// late finds nothing left to do, so a busy pool delays nobody.
void in_parallel(ffi::ThreadPool& pool, int64_t count,
                 const std::function<void(int64_t)>& body) {
  struct Work {
    std::atomic<int64_t> next{0};
    int64_t count, finished = 0;
    const std::function<void(int64_t)>* body;
    std::mutex mutex;
    std::condition_variable all_finished;
    void help() {
      int64_t mine = 0;
      for (int64_t i; (i = next.fetch_add(1)) < count; ++mine) (*body)(i);
      if (mine == 0) return;
      std::lock_guard<std::mutex> lock(mutex);
      finished += mine;
      if (finished == count) all_finished.notify_all();
    }
  };
  auto work = std::make_shared<Work>();
  work->count = count;
  work->body = &body;
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->help(); });
  work->help();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->all_finished.wait(lock, [&] { return work->finished == work->count; });
}

struct Shape {
  int64_t B, T, S, N, K, G, H, Hp;
  bool rotary;
  int64_t window;
  float scale, softcap;  // softcap: infinite if scores stay as they are

  // In powers of two, as scores are.
  float cap() const { return LOG2_E * softcap; }
  bool capped() const { return std::isfinite(softcap); }
};

struct Inputs {
  const float *q, *k, *v;
  const int32_t* position;
  const float *cos, *sin;
};

// out = factor * rotate(x), or a copy where there are no angles.
void rotate(const float* __restrict x, const float* __restrict cos,
            const float* __restrict sin, float factor, int64_t H,
            float* __restrict out) {
  if (cos == nullptr) {
    for (int64_t h = 0; h < H; ++h) out[h] = factor * x[h];
    return;
  }
  const int64_t half = H / 2;
  for (int64_t h = 0; h < half; ++h) {
    const float first = x[h], second = x[h + half];
    out[h] = factor * (first * cos[h] - second * sin[h]);
    out[h + half] = factor * (second * cos[h] + first * sin[h]);
  }
}

// The transpose of `rotate`: turns a gradient back.
void rotate_back(const float* __restrict x, const float* __restrict cos,
                 const float* __restrict sin, float factor, int64_t H,
                 float* __restrict out) {
  if (cos == nullptr) return rotate(x, nullptr, nullptr, factor, H, out);
  const int64_t half = H / 2;
  for (int64_t h = 0; h < half; ++h) {
    const float first = x[h], second = x[h + half];
    out[h] = factor * (first * cos[h] + second * sin[h]);
    out[h + half] = factor * (second * cos[h] - first * sin[h]);
  }
}

// One (b, k): its keys, values and query rows, row = t * G + g. Keys are numbered from
// the first that some query of this sequence sees.
struct Group {
  const Shape& shape;
  const Inputs& in;
  int64_t b, k, rows;
  int64_t first_key;
  int64_t seen;  // keys from there to the last that some query sees

  Group(const Shape& shape, const Inputs& in, int64_t index)
      : shape(shape), in(in), b(index / shape.K), k(index % shape.K),
        rows(shape.T * shape.G), first_key(0), seen(0) {
    Range all{shape.S, 0};
    for (int64_t row = 0; row < rows; row += shape.G) all.widen(visible(row));
    first_key = std::min(all.begin, all.end);
    seen = all.end - first_key;
  }

  int64_t panels() const { return (seen + PANEL - 1) / PANEL; }
  int64_t query(int64_t row) const {
    return ((b * shape.T + row / shape.G) * shape.N + k * shape.G + row % shape.G) *
           shape.H;
  }
  int64_t statistic(int64_t row) const {  // of [B, N, T]
    return (b * shape.N + k * shape.G + row % shape.G) * shape.T + row / shape.G;
  }
  int64_t key(int64_t s) const {
    return ((b * shape.S + first_key + s) * shape.K + k) * shape.H;
  }
  const float* angle(const float* table, int64_t t) const {
    return shape.rotary ? table + (b * shape.T + t) * (shape.H / 2) : nullptr;
  }
  const float* key_angle(const float* table, int64_t s) const {
    return angle(table, first_key + s);
  }
  // The keys that a row sees.
  Range visible(int64_t row) const {
    const int64_t end = int64_t{in.position[b * shape.T + row / shape.G]} + 1;
    return {std::clamp<int64_t>(end - shape.window, 0, shape.S) - first_key,
            std::clamp<int64_t>(end, 0, shape.S) - first_key};
  }

  // Rows of keys or values, [panels * PANEL, Hp] with zeros around.
  void pack_keys(float* out) const {
    for (int64_t s = 0; s < seen; ++s)
      rotate(in.k + key(s), key_angle(in.cos, s), key_angle(in.sin, s), 1.0f, shape.H,
             out + s * shape.Hp);
  }
  void pack_values(float* out) const {
    for (int64_t s = 0; s < seen; ++s)
      std::copy_n(in.v + key(s), shape.H, out + s * shape.Hp);
  }
  // [panels * PANEL, Hp] -> [panels, H, PANEL].
  void transpose(const float* x, float* out) const {
    for (int64_t p = 0; p < panels(); ++p)
      for (int64_t s0 = 0; s0 < PANEL; s0 += 8)
        for (int64_t h = 0; h < shape.H; ++h)
          for (int64_t s = s0; s < s0 + 8; ++s)
            out[(p * shape.H + h) * PANEL + s] = x[(p * PANEL + s) * shape.Hp + h];
  }
  // Rotated and scaled query rows from `first` on, [count, Hp].
  void pack_queries(int64_t first, int64_t count, float* out) const {
    const float factor = LOG2_E * shape.scale;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = (first + r) / shape.G;
      rotate(in.q + query(first + r), angle(in.cos, t), angle(in.sin, t), factor,
             shape.H, out + r * shape.Hp);
    }
  }
};

// What each row, and each ROWS rows, of a block see.
struct Limits {
  Range row[BACKWARD_BLOCK], tile[BACKWARD_BLOCK / ROWS], all;
  Limits(const Group& group, int64_t first, int64_t count) : all{group.seen, 0} {
    std::fill(std::begin(tile), std::end(tile), all);
    for (int64_t r = 0; r < count; ++r) {
      row[r] = group.visible(first + r);
      tile[r / ROWS].widen(row[r]);
      all.widen(row[r]);
    }
  }
  // The first panel with a key that the block sees.
  int64_t first_panel() const { return all.begin / PANEL * PANEL; }
  // Columns to compute of a panel for a tile of rows: none before its window.
  int64_t width(int64_t r, int64_t s) const {
    const Range& rows = tile[r / ROWS];
    if (rows.begin >= s + PANEL) return 0;
    return std::clamp<int64_t>(rows.end - s, 0, PANEL);
  }
};

// ----------------------------------------------------------------------------- forward

void cap_scores(float* scores, const Range& seen, float cap) {
  for (int64_t s = seen.begin / WIDTH * WIDTH; s < seen.end; s += WIDTH)
    store(scores + s, splat(cap) * tanh(load(scores + s) / splat(cap)));
}

// Turn one row's scores of a span into weights; rescale what was summed before.
// `zeros_to`: columns up to here are read by the product with the values.
void softmax_step(float* scores, const Range& seen, int64_t zeros_to, float* top,
                  float* total, float* out, int64_t Hp) {
  const int64_t start = seen.begin / WIDTH * WIDTH;
  Vector tops = splat(*top);
  for (int64_t s = start; s < seen.end; s += WIDTH) {
    const Vector x = keep(load(scores + s), s, seen, *top);
    tops = x > tops ? x : tops;
  }
  const float new_top = largest(tops);
  const Vector shift = splat(new_top);
  Vector sums = {};
  int64_t s = 0;
  for (; s < start; s += WIDTH) store(scores + s, Vector{});
  for (; s < seen.end; s += WIDTH) {
    const Vector p = keep(exp2(load(scores + s) - shift), s, seen, 0.0f);
    store(scores + s, p);
    sums += p;
  }
  for (; s < zeros_to; s += WIDTH) store(scores + s, Vector{});
  if (new_top > *top && *total > 0.0f) {
    const float shrink = std::exp2(*top - new_top);
    *total *= shrink;
    for (int64_t h = 0; h < Hp; ++h) out[h] *= shrink;
  }
  *top = new_top;
  *total += sum(sums);
}

void forward_group(const Group& group, int64_t start, int64_t stride, float* out,
                   float* statistics) {
  const Shape& shape = group.shape;
  const int64_t Hp = shape.Hp, slots = group.panels() * PANEL;
  Scratch scratch;
  float* keys = scratch.take(slots * shape.H);
  float* values = scratch.zeros(slots * Hp);
  group.pack_keys(values);
  group.transpose(values, keys);
  group.pack_values(values);
  float* queries = scratch.zeros(FORWARD_BLOCK * Hp);
  float* sums = scratch.take(FORWARD_BLOCK * Hp);
  float* scores = scratch.take(FORWARD_BLOCK * SPAN);

  for (int64_t first = start * FORWARD_BLOCK; first < group.rows;
       first += stride * FORWARD_BLOCK) {
    const int64_t count = std::min<int64_t>(FORWARD_BLOCK, group.rows - first);
    const Limits limits(group, first, count);
    group.pack_queries(first, count, queries);
    std::fill_n(sums, count * Hp, 0.0f);
    float top[FORWARD_BLOCK], total[FORWARD_BLOCK];
    std::fill_n(top, count, -INFINITY);
    std::fill_n(total, count, 0.0f);

    for (int64_t span = limits.first_panel(); span < limits.all.end; span += SPAN) {
      const int64_t end = std::min<int64_t>(limits.all.end, span + SPAN);
      for (int64_t s = span; s < end; s += PANEL)
        for (int64_t r = 0; r < count; r += ROWS) {
          const int64_t width = limits.width(r, s);
          if (width == 0) continue;
          multiply({queries + r * Hp, Hp, 1, keys + s * shape.H, PANEL,
                    scores + r * SPAN + (s - span), SPAN, shape.H, false},
                   std::min<int64_t>(ROWS, count - r), width);
        }
      for (int64_t r = 0; r < count; ++r) {
        const Range seen = limits.row[r].within(span, SPAN);
        if (shape.capped()) cap_scores(scores + r * SPAN, seen, shape.cap());
        softmax_step(scores + r * SPAN, seen,
                     limits.tile[r / ROWS].within(span, SPAN).end, top + r, total + r,
                     sums + r * Hp, Hp);
      }
      for (int64_t s = span; s < end; s += PANEL)
        for (int64_t r = 0; r < count; r += ROWS) {
          const int64_t depth = limits.width(r, s);
          if (depth == 0) continue;
          multiply({scores + r * SPAN + (s - span), SPAN, 1, values + s * Hp, Hp,
                    sums + r * Hp, Hp, depth, true},
                   std::min<int64_t>(ROWS, count - r), Hp);
        }
    }
    for (int64_t r = 0; r < count; ++r) {
      const bool sees = limits.row[r].begin < limits.row[r].end;
      const float scale = sees ? 1.0f / total[r] : 0.0f;
      float* to = out + group.query(first + r);
      for (int64_t h = 0; h < shape.H; ++h) to[h] = scale * sums[r * Hp + h];
      statistics[group.statistic(first + r)] =
          sees ? top[r] + std::log2(total[r]) : 0.0f;
    }
  }
}

// ---------------------------------------------------------------------------- backward

// One row of one panel: scores -> weights, weights' gradients -> scores' gradients.
template <bool CAPPED>
void weights_and_gradients(float* scores, float* gradients, const Range& seen,
                           float statistic, float mean, float cap) {
  const Vector shift = splat(statistic), centre = splat(mean);
  for (int64_t s = 0; s < PANEL; s += WIDTH) {
    if (s + WIDTH <= seen.begin || s >= seen.end) {
      store(scores + s, Vector{});
      store(gradients + s, Vector{});
      continue;
    }
    Vector x = load(scores + s), slope = splat(1.0f);
    if (CAPPED) {
      const Vector y = tanh(x / splat(cap));
      x = splat(cap) * y;
      slope -= y * y;
    }
    const Vector p = exp2(x - shift);
    Vector ds = p * (load(gradients + s) - centre);
    if (CAPPED) ds *= slope;
    store(scores + s, keep(p, s, seen, 0.0f));
    store(gradients + s, keep(ds, s, seen, 0.0f));
  }
}

struct Cotangents {
  const float *out, *statistics, *dout;
  float *dq, *dk, *dv;
};

void backward_group(const Group& group, const Cotangents& c) {
  const Shape& shape = group.shape;
  const int64_t H = shape.H, Hp = shape.Hp, slots = group.panels() * PANEL;
  const auto pull = shape.capped() ? weights_and_gradients<true>
                                   : weights_and_gradients<false>;
  Scratch scratch;
  float* keys = scratch.zeros(slots * Hp);
  float* keys_by_h = scratch.take(slots * H);
  float* values_by_h = scratch.take(slots * H);
  float* dk = scratch.zeros(slots * Hp);
  float* dv = scratch.zeros(slots * Hp);
  group.pack_values(keys);
  group.transpose(keys, values_by_h);
  group.pack_keys(keys);
  group.transpose(keys, keys_by_h);
  float* queries = scratch.zeros(BACKWARD_BLOCK * Hp);
  float* dout = scratch.zeros(BACKWARD_BLOCK * Hp);
  float* dq = scratch.take(BACKWARD_BLOCK * Hp);
  float* scores = scratch.take(BACKWARD_BLOCK * PANEL);
  float* gradients = scratch.take(BACKWARD_BLOCK * PANEL);

  for (int64_t first = 0; first < group.rows; first += BACKWARD_BLOCK) {
    const int64_t count = std::min<int64_t>(BACKWARD_BLOCK, group.rows - first);
    const Limits limits(group, first, count);
    group.pack_queries(first, count, queries);
    std::fill_n(dq, count * Hp, 0.0f);
    float statistic[BACKWARD_BLOCK], mean[BACKWARD_BLOCK];
    for (int64_t r = 0; r < count; ++r) {
      std::copy_n(c.dout + group.query(first + r), H, dout + r * Hp);
      statistic[r] = c.statistics[group.statistic(first + r)];
      const float* out = c.out + group.query(first + r);
      Vector sums = {};
      int64_t h = 0;
      for (; h + WIDTH <= H; h += WIDTH)
        sums += load(out + h) * load(dout + r * Hp + h);
      mean[r] = sum(sums);
      for (; h < H; ++h) mean[r] += out[h] * dout[r * Hp + h];
    }

    for (int64_t s = limits.first_panel(); s < limits.all.end; s += PANEL) {
      for (int64_t r = 0; r < count; r += ROWS) {
        const int64_t rows = std::min<int64_t>(ROWS, count - r);
        const int64_t width = limits.width(r, s);
        float* p = scores + r * PANEL;
        float* ds = gradients + r * PANEL;
        if (width > 0) {
          multiply({queries + r * Hp, Hp, 1, keys_by_h + s * H, PANEL, p, PANEL, H,
                    false},
                   rows, width);
          multiply({dout + r * Hp, Hp, 1, values_by_h + s * H, PANEL, ds, PANEL, H,
                    false},
                   rows, width);
        }
        for (int64_t i = 0; i < rows; ++i)
          pull(p + i * PANEL, ds + i * PANEL, limits.row[r + i].within(s, PANEL),
               statistic[r + i], mean[r + i], shape.cap());
        if (width > 0)
          multiply({ds, PANEL, 1, keys + s * Hp, Hp, dq + r * Hp, Hp, width, true},
                   rows, Hp);
      }
      const int64_t end = std::min<int64_t>(PANEL, limits.all.end - s);
      for (int64_t m = 0; m < end; m += ROWS) {
        const int64_t rows = std::min<int64_t>(ROWS, end - m);
        // Only rows from the first to the last that see one of these keys contribute.
        const auto sees_none = [&](const Range& row) {
          return row.end <= s + m || row.begin >= s + m + rows;
        };
        int64_t low = 0, high = count;
        while (low < high && sees_none(limits.row[low])) ++low;
        while (high > low && sees_none(limits.row[high - 1])) --high;
        multiply({scores + low * PANEL + m, 1, PANEL, dout + low * Hp, Hp,
                  dv + (s + m) * Hp, Hp, high - low, true},
                 rows, Hp);
        multiply({gradients + low * PANEL + m, 1, PANEL, queries + low * Hp, Hp,
                  dk + (s + m) * Hp, Hp, high - low, true},
                 rows, Hp);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = (first + r) / shape.G;
      rotate_back(dq + r * Hp, group.angle(group.in.cos, t),
                  group.angle(group.in.sin, t), shape.scale, H,
                  c.dq + group.query(first + r));
    }
  }
  for (int64_t s = -group.first_key; s < shape.S - group.first_key; ++s) {
    float* to_k = c.dk + group.key(s);
    float* to_v = c.dv + group.key(s);
    if (s < 0 || s >= group.seen) {
      std::fill_n(to_k, H, 0.0f);
      std::fill_n(to_v, H, 0.0f);
      continue;
    }
    rotate_back(dk + s * Hp, group.key_angle(group.in.cos, s),
                group.key_angle(group.in.sin, s), LN_2, H, to_k);
    std::copy_n(dv + s * Hp, H, to_v);
  }
}

// ------------------------------------------------------------------------ entry points

using Floats = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Floats>;

Shape shape_of(const Floats& q, const Floats& k, const Floats& cos, int64_t window,
               float softcap, float scale) {
  Shape shape;
  shape.window = window;
  shape.softcap = softcap;
  shape.scale = scale;
  shape.B = q.dimensions()[0];
  shape.T = q.dimensions()[1];
  shape.N = q.dimensions()[2];
  shape.H = q.dimensions()[3];
  shape.S = k.dimensions()[1];
  shape.K = k.dimensions()[2];
  shape.G = shape.N / shape.K;
  shape.Hp = (shape.H + WIDTH - 1) / WIDTH * WIDTH;
  shape.rotary = cos.dimensions()[2] > 0;
  return shape;
}

ffi::Error forward(ffi::ThreadPool pool, Floats q, Floats k, Floats v,
                   ffi::Buffer<ffi::S32> position, Floats cos, Floats sin,
                   int64_t window, float softcap, float scale, Result out,
                   Result statistics) {
  const Shape shape = shape_of(q, k, cos, window, softcap, scale);
  const Inputs in{q.typed_data(),        k.typed_data(),   v.typed_data(),
                  position.typed_data(), cos.typed_data(), sin.typed_data()};
  // Few groups are split by query blocks, which share nothing but the packed keys.
  const int64_t groups = shape.B * shape.K, threads = pool.num_threads();
  const int64_t blocks = (shape.T * shape.G + FORWARD_BLOCK - 1) / FORWARD_BLOCK;
  const int64_t wanted = std::min(blocks, groups > 0 ? threads / groups : 1);
  const int64_t parts = std::max<int64_t>(wanted, 1);
  in_parallel(pool, groups * parts, [&](int64_t task) {
    forward_group(Group(shape, in, task / parts), task % parts, parts,
                  out->typed_data(), statistics->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Floats q, Floats k, Floats v,
                    ffi::Buffer<ffi::S32> position, Floats cos, Floats sin, Floats out,
                    Floats statistics, Floats dout, int64_t window, float softcap,
                    float scale, Result dq, Result dk, Result dv) {
  const Shape shape = shape_of(q, k, cos, window, softcap, scale);
  const Inputs in{q.typed_data(),        k.typed_data(),   v.typed_data(),
                  position.typed_data(), cos.typed_data(), sin.typed_data()};
  const Cotangents cotangents{out.typed_data(),  statistics.typed_data(),
                              dout.typed_data(), dq->typed_data(),
                              dk->typed_data(),  dv->typed_data()};
  in_parallel(pool, shape.B * shape.K, [&](int64_t task) {
    backward_group(Group(shape, in, task), cotangents);
  });
  return ffi::Error::Success();
}

}  // namespace

#define FLOATS Arg<Floats>()
#define SCORE \
  Attr<int64_t>("window").Attr<float>("softcap").Attr<float>("scale")

XLA_FFI_DEFINE_HANDLER_SYMBOL(llmos_attention_forward, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .FLOATS.FLOATS.FLOATS  // q, k, v
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .FLOATS.FLOATS  // cos, sin
                                  .SCORE
                                  .Ret<Floats>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(llmos_attention_backward, backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .FLOATS.FLOATS.FLOATS  // q, k, v
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .FLOATS.FLOATS          // cos, sin
                                  .FLOATS.FLOATS.FLOATS  // out, statistics, dout
                                  .SCORE
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
