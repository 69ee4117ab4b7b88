// Attention of one item of work: a flash loop over tiles of keys, for one kind of CPU.
//
// Compiled with -DKIND=of CPU -DLANES=floats per vector. All sums are in float32; scores are in
// units of log2. With few rows (decodes) keys and values are read where they are, once, and each
// score is a dot product; with many a tile is unpacked first, keys transposed, and both products
// are sums of rows times a broadcast weight, or a matrix unit's. (float32 values need no unpacking.)
#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention_tile.h"
#include "matrix_unit.h"
#include "vectors.h"

namespace {

constexpr int FEW_ROWS = 8;   // with more, unpacking a tile pays

Vector tanh(Vector x) {
  x = x > 20.0f ? splat(20.0f) : x;
  x = x < -20.0f ? splat(-20.0f) : x;
  const Vector e = exp2(x * (2 * LOG2E));
  return (e - 1.0f) / (e + 1.0f);
}

template <int s, int... I>
Vector turned(Vector x, Lanes<I...>) {
  return PICK(x, x, (I ^ s)...);
}

template <int s = W / 2>
float total_of(Vector x) {
  x += turned<s>(x, AllLanes{});
  if constexpr (s > 1) return total_of<s / 2>(x);
  return x[0];
}

template <int s = W / 2>
float greatest_of(Vector x) {
  const Vector y = turned<s>(x, AllLanes{});
  x = x < y ? y : x;
  if constexpr (s > 1) return greatest_of<s / 2>(x);
  return x[0];
}

// The keys of one tile, or their values; row m is H cells at rows[m], unpacked or not.
template <class T>
struct Rows {
  const T* const* rows;
  Vector at(int m, int column) const { return load(rows[m] + column); }
};

struct Unpacked {
  const float* data;
  int stride;
  Vector at(int m, int column) const { return load(data + int64_t{m} * stride + column); }
};

// Rows 2 m and 2 m + 1 of bfloat16 values as pairs, and zeros for a row that is not there.
struct RowPairs {
  const Bfloat16* const* rows;
  int n_real;
  Vector at(int m, int column) const {
    const Integers even = widen(&rows[2 * m][column].bits);
    return (Vector)(2 * m + 1 < n_real ? even | widen(&rows[2 * m + 1][column].bits) << 16 : even);
  }
};

// The same, while `ahead` is asked for, which is wanted next: a line per W columns of two rows. Else
// decodes take 1.2 to 1.3 times as long.
struct HastyRowPairs {
  RowPairs pairs;
  const Bfloat16* const* ahead;
  Vector at(int m, int column) const {
    const int place = column % (2 * W);
    __builtin_prefetch(ahead[2 * m + place / W] + column - place, 0, Pairs::CACHE);
    return pairs.at(m, column);
  }
};

// c[r][column ..] += sum over m < depth of a[r][m] * b[m][column ..], for n_rows and n vectors.
template <class Lane, int n_rows, int n, class B>
void multiply_block(const float* a, int a_stride, const B& b, int depth, int column, float* c,
                    int c_stride) {
  Vector sum[n_rows][n];
#pragma GCC unroll 8
  for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) sum[r][j] = load(c + r * c_stride + column + j * W);
  for (int m = 0; m < depth; ++m) {
    Vector x[n];
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) x[j] = b.at(m, column + j * W);
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; ++r) {
      const Vector weight = splat(a[r * a_stride + m]);
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) sum[r][j] = Lane::add(sum[r][j], weight, x[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) store(c + r * c_stride + column + j * W, sum[r][j]);
}

// From `column` on: n vectors at once, then half as many.
template <class Lane, int n_rows, int n, class B>
void multiply_columns(const float* a, int a_stride, const B& b, int depth, int column, int width,
                      float* c, int c_stride) {
  for (; column + n * W <= width; column += n * W)
    multiply_block<Lane, n_rows, n>(a, a_stride, b, depth, column, c, c_stride);
  if constexpr (n > 1)
    multiply_columns<Lane, n_rows, n / 2>(a, a_stride, b, depth, column, width, c, c_stride);
}

template <class Lane, int n_rows, class B>
void multiply_rows(const float* a, int a_stride, const B& b, int depth, int width, float* c,
                   int c_stride) {
  // As many sums as registers hold; of few rows as many as additions are under way at once.
  constexpr int n = n_rows == 1 ? 8 : n_rows == 2 || W == 16 ? 4 : 2;
  multiply_columns<Lane, n_rows, n>(a, a_stride, b, depth, 0, width, c, c_stride);
}

template <class Lane, int most, class B>
void multiply(const float* a, int a_stride, int n_rows, const B& b, int depth, int width, float* c,
              int c_stride) {
  for (; n_rows >= most; n_rows -= most, a += most * a_stride, c += most * c_stride)
    multiply_rows<Lane, most>(a, a_stride, b, depth, width, c, c_stride);
  if constexpr (most > 1)
    if (n_rows > 0) multiply<Lane, most - 1>(a, a_stride, n_rows, b, depth, width, c, c_stride);
}

// scores[r][m] = q[r] . key m of n_real, n_rows queries at once. The values, `to_values` elements
// behind their keys, are wanted next and asked for meanwhile: from memory all takes 1.3 to 1.4 times
// as long without in float32, and 1.1 to 1.2 in bfloat16.
template <class Lane, int n_rows, class T>
void dot_rows(const float* q, int q_stride, const T* const* keys, int n_real, int64_t to_values,
              int head_size, float* scores) {
  constexpr int n = W / n_rows >= 8 ? 8 : W / n_rows >= 4 ? 4 : W / n_rows >= 2 ? 2 : 1;
  for (int m = 0; m < n_real; m += n) {
    Vector sum[W] = {};
    const T* rows[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = keys[m + i < n_real ? m + i : n_real - 1];
    for (int column = 0; column < head_size; column += W)
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        const Vector key = load(rows[i] + column);
        __builtin_prefetch(rows[i] + column + to_values, 0, Lane::CACHE);
#pragma GCC unroll 16
        for (int r = 0; r < n_rows; ++r)
          sum[r * n + i] = Lane::add(sum[r * n + i], load(q + r * q_stride + column), key);
      }
    const Vector dots = sums(sum);
    float lanes[W];
    memcpy(lanes, &dots, sizeof lanes);
    for (int r = 0; r < n_rows; ++r) memcpy(scores + r * KEYS + m, lanes + r * n, 4 * n);
  }
}

template <class Lane, class T>
void dot(const float* q, int q_stride, int n_rows, const T* const* keys, int n_real,
         int64_t to_values, int head_size, float* scores) {
  for (; n_rows >= 4; n_rows -= 4, q += 4 * q_stride, scores += 4 * KEYS)
    dot_rows<Lane, 4>(q, q_stride, keys, n_real, to_values, head_size, scores);
  if (n_rows == 3) dot_rows<Lane, 3>(q, q_stride, keys, n_real, to_values, head_size, scores);
  if (n_rows == 2) dot_rows<Lane, 2>(q, q_stride, keys, n_real, to_values, head_size, scores);
  if (n_rows == 1) dot_rows<Lane, 1>(q, q_stride, keys, n_real, to_values, head_size, scores);
}

// Keys "H KEYS", and zeros for those that are not there.
template <class T>
void unpack_transposed(const T* const* rows, int n_real, int head_size, int width, float* out) {
  for (int column = 0; column < width; column += W)
    for (int m = 0; m < n_real; m += W) {
      Vector x[W] = {};
      for (int i = 0; i < W && m + i < n_real; ++i)
        x[i] = load_part(rows[m + i], column, head_size);
      transpose(x);
      for (int i = 0; i < W; ++i) store(out + (column + i) * KEYS + m, x[i]);
    }
}

template <class T>
void unpack(const T* const* rows, int n_real, int head_size, int width, float* out) {
  for (int m = 0; m < n_real; ++m)
    for (int column = 0; column < width; column += W)
      store(out + m * width + column, load_part(rows[m], column, head_size));
}

int round_up(int n) { return (n + W - 1) / W * W; }

// Where keys and their values are, and what they are to be multiplied by. Keys that are not there
// count nothing, and are where one may read.
template <class T>
struct Tile {
  int n_keys;
  const T *keys[KEYS], *values[KEYS];
  float key_scales[KEYS], value_scales[KEYS];
};

// One item's rows: queries, sums and softmax so far. All of it lies in the scratch.
template <class T>
struct Flash {
  const Call& call;
  const Item& item;
  const int n_rows, width;  // width: H in whole vectors
  const int64_t to_values;  // from a key to its value
  float *q, *acc, *scores, *tops, *totals, *keys, *values;
  Tile<T> tiles[2], *tile = tiles;

  Flash(const Call& call, const Item& item, float* scratch)
      : call(call), item(item), n_rows(item.n_tokens * call.group_size),
        width(round_up(call.head_size)), to_values(int64_t{call.n_cells} * call.head_size) {
    q = scratch;
    acc = q + n_rows * width;
    scores = acc + n_rows * width;
    keys = scores + n_rows * KEYS;
    values = keys + width * KEYS;
    tops = values + width * KEYS;
    totals = tops + n_rows;
  }

  // Row r is query head r % G of token r / G.
  int head_of(int r) const { return item.head * call.group_size + r % call.group_size; }

  int64_t place(int r) const {
    const int64_t token = item.first_token + r / call.group_size;
    return (token * call.n_kv_heads * call.group_size + head_of(r)) * call.head_size;
  }

  void run() {
    start();
    if constexpr (has_pairs && std::is_same_v<T, Bfloat16>)
      if (call.head_size % 2 == 0) return run_paired();
    const bool is_whole = width == call.head_size, is_direct = n_rows <= FEW_ROWS && is_whole;
    const bool reads_values = is_direct || (std::is_same_v<T, float> && is_whole);
    for (int key = item.first_key; key < item.end_key; key += KEYS) {
      const int n_keys = find(key, *tile);
      const auto [first, n] = seeing(key, n_keys);
      float *own_scores = scores + first * KEYS, *own_acc = acc + first * width;
      if (is_direct) {
        dot<Floats>(q + first * width, width, n, tile->keys, n_keys, to_values, width, own_scores);
      } else {
        unpack_transposed(tile->keys, n_keys, call.head_size, width, keys);
        multiply_keys<Floats>(q + first * width, width, n, width, n_keys, own_scores);
      }
      weigh(first, n, key, n_keys);
      if (reads_values) {
        multiply<Floats, 6>(own_scores, KEYS, n, Rows<T>{tile->values}, n_keys, width, own_acc,
                            width);
      } else {
        unpack(tile->values, n_keys, call.head_size, width, values);
        multiply<Floats, 6>(own_scores, KEYS, n, Unpacked{values, width}, n_keys, width, own_acc,
                            width);
      }
    }
    finish();
  }

  // The same with products of pairs of bfloat16: of a key's neighbours, and of neighbouring values.
  // Of many rows they are the matrix unit's, if there is one.
  void run_paired() {
    const int n_pairs = call.head_size / 2, stride = round_up(n_pairs);
    const bool is_direct = n_rows <= FEW_ROWS && stride == n_pairs;
    MatrixUnit unit;
    pack(q, n_rows, width, stride, width);
    find(item.first_key, *tile);
    for (int key = item.first_key; key < item.end_key; key += KEYS) {
      Tile<T>& next = tiles[tile == tiles];
      find(key + KEYS, next);
      const int n_keys = tile->n_keys, depth = (n_keys + 1) / 2;
      const auto paired_keys = reinterpret_cast<const float* const*>(tile->keys);
      const auto [first, n] = seeing(key, n_keys);
      const float* own_q = q + first * stride;
      float *own_scores = scores + first * KEYS, *own_acc = acc + first * width;
      if (is_direct) {
        dot<Pairs>(own_q, stride, n, paired_keys, n_keys, to_values / 2, stride, own_scores);
      } else {
        unpack_transposed(paired_keys, n_keys, n_pairs, stride, keys);
        if constexpr (has_matrix_unit)
          unit.multiply({own_q, 4 * stride}, n, {keys, 4 * KEYS}, stride, round_up(n_keys), true,
                        own_scores, KEYS);
        else
          multiply_keys<Pairs>(own_q, stride, n, stride, n_keys, own_scores);
      }
      weigh(first, n, key, n_keys);
      pack(own_scores, n, KEYS, KEYS, round_up(n_keys));  // and zeros up to a multiple of TILE pairs
      const RowPairs pairs{reinterpret_cast<const Bfloat16* const*>(tile->values), n_keys};
      tile = &next;
      if (is_direct) {
        const HastyRowPairs hasty{pairs, reinterpret_cast<const Bfloat16* const*>(next.keys)};
        multiply<Pairs, 6>(own_scores, KEYS, n, hasty, depth, width, own_acc, width);
        continue;
      }
      unpack_pairs(pairs, depth);
      if constexpr (has_matrix_unit) {
        const int whole = round_up(depth);
        memset(values + depth * width, 0, sizeof(float) * (whole - depth) * width);
        unit.multiply({own_scores, 4 * KEYS}, n, {values, 4 * width}, whole, width, false, own_acc,
                      width);
      } else {
        multiply<Pairs, 6>(own_scores, KEYS, n, Unpacked{values, width}, depth, width, own_acc, width);
      }
    }
    finish();
  }

  template <class Lane>
  void multiply_keys(const float* q, int stride, int n, int depth, int n_keys, float* to) {
    memset(to, 0, sizeof(float) * n * KEYS);
    multiply<Lane, 6>(q, stride, n, Unpacked{keys, KEYS}, depth, round_up(n_keys), to, KEYS);
  }

  // Rows of `size` floats become rows of pairs, in place.
  void pack(float* rows, int n, int from_stride, int to_stride, int size) {
    for (int r = 0; r < n; ++r)
      for (int i = 0; i < size; i += 2 * W) {
        const float* from = rows + r * from_stride;
        const Vector low = load_part(from, i, size), high = load_part(from, i + W, size);
        store(rows + r * to_stride + i / 2, Pairs::pack(low, high));
      }
  }

  void unpack_pairs(const RowPairs& pairs, int depth) {
    for (int m = 0; m < depth; ++m)
      for (int column = 0; column < width; column += W) {
        if (column + W <= call.head_size) {
          store(values + m * width + column, pairs.at(m, column));
          continue;
        }
        Bfloat16 ends[2][W] = {};
        const Bfloat16* const rows[2] = {ends[0], ends[1]};
        for (int i = 0; i < 2 && 2 * m + i < pairs.n_real; ++i)
          memcpy(ends[i], pairs.rows[2 * m + i] + column, 2 * (call.head_size - column));
        store(values + m * width + column, RowPairs{rows, 2}.at(0, 0));
      }
  }

  void start() {
    const float factor = call.scale * (call.soft_cap > 0 ? 1 / call.soft_cap : LOG2E);
    memset(acc, 0, sizeof(float) * n_rows * width);
    for (int r = 0; r < n_rows; ++r) {
      const float* row = call.q + place(r);
      for (int h = 0; h < width; h += W)
        store(q + r * width + h, load_part(row, h, call.head_size) * factor);
      const bool has_sink = item.has_sinks;
      tops[r] = has_sink ? call.sinks[head_of(r)] * LOG2E : -INFINITY;
      totals[r] = has_sink ? 1 : 0;
    }
  }

  // The tile at `first`, which may be behind the last key.
  int find(int first, Tile<T>& found) {
    const T* const cache = reinterpret_cast<const T*>(call.cache);
    const int n_left = first < item.end_key ? item.end_key - first : 0;
    const int n_keys = found.n_keys = n_left < KEYS ? n_left : KEYS;
    const int32_t* block = item.blocks + first / call.n_cells;
    int cell = first % call.n_cells;
    for (int m = 0, end; m < n_keys; ++block, cell = 0) {
      int64_t row = (int64_t{*block} * call.n_kv_heads + item.head) * 2 * call.n_cells + cell;
      const T* key = cache + row * call.head_size;
      end = m + call.n_cells - cell < n_keys ? m + call.n_cells - cell : n_keys;
      for (; m < end; ++m, ++row, key += call.head_size) {
        found.keys[m] = key;
        found.values[m] = key + to_values;
        if (!call.scales) continue;
        found.key_scales[m] = call.scales[row];
        found.value_scales[m] = call.scales[row + call.n_cells];
      }
    }
    for (int m = n_keys; m < KEYS; ++m) {
      found.keys[m] = cache;
      found.key_scales[m] = found.value_scales[m] = 0;
    }
    return n_keys;
  }

  // The rows that see a key of the tile at `key`: those of neighbouring tokens.
  struct Seeing { int first, n; };
  Seeing seeing(int key, int n_keys) const {
    const int oldest = key - item.position, latest = oldest + n_keys - 1;  // from the first token
    const int begin = oldest > 0 ? oldest : 0;
    const bool has_end = call.window && item.n_tokens - latest > call.window;
    const int end = has_end ? latest + call.window : item.n_tokens;
    return {begin * call.group_size, (end - begin) * call.group_size};
  }

  // Scores of n rows from r on, of the tile at `key`, become weights.
  void weigh(int r, int n, int key, int n_keys) {
    for (int i = 0; i < n; ++i) complete(r + i, key, n_keys);
    for (; n > 1; n -= 2, r += 2) weigh_rows<2>(r, n_keys);
    if (n > 0) weigh_rows<1>(r, n_keys);
  }

  // Scores of row r become those that its softmax takes: -inf for keys that it does not see.
  void complete(int r, int first, int n_keys) {
    float* row = scores + r * KEYS;
    const int position = item.position + r / call.group_size;
    const int end = position + 1 - first < n_keys ? position + 1 - first : n_keys;
    const int begin = call.window ? position - call.window + 1 - first : 0;
    const bool is_plain = !call.scales && !call.slopes && call.soft_cap == 0;
    const int n = round_up(n_keys);
    if (is_plain && begin <= 0 && end == n) return;
    Integers lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    const float slope = call.slopes ? call.slopes[head_of(r)] * LOG2E : 0;
    for (int m = 0; m < n; m += W) {
      const Integers key = lane + m;
      Vector s = load(row + m);
      if (call.scales) s *= load(tile->key_scales + m);
      if (call.soft_cap > 0) s = tanh(s) * (call.soft_cap * LOG2E);
      if (call.slopes) s += __builtin_convertvector(key + (first - position), Vector) * slope;
      store(row + m, (key >= begin) & (key < end) ? s : splat(-INFINITY));
    }
  }

  // Scores become weights; sums shrink to the new tops. A row alone would mostly wait for itself,
  // and more than two do not fit into registers.
  template <int n>
  void weigh_rows(int r, int n_keys) {
    float* rows = scores + r * KEYS;
    const int n_lanes = round_up(n_keys);
    const float* factors = call.scales ? tile->value_scales : nullptr;
    Vector tops_of_lanes[n], total[n] = {};
    float top[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) tops_of_lanes[i] = splat(tops[r + i]);
    for (int m = 0; m < n_lanes; m += W)
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) {
        const Vector s = load(rows + i * KEYS + m);
        tops_of_lanes[i] = tops_of_lanes[i] < s ? s : tops_of_lanes[i];
      }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) top[i] = greatest_of(tops_of_lanes[i]);
    for (int m = 0; m < n_lanes; m += W)
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) {
        const Vector weight = exp2(load(rows + i * KEYS + m) - top[i]);
        total[i] += weight;
        store(rows + i * KEYS + m, factors ? weight * load(factors + m) : weight);
      }
    for (int i = 0; i < n; ++i) {
      float& top_so_far = tops[r + i];
      if (top[i] != top_so_far) {
        const float shrink = exp2(splat(top_so_far - top[i]))[0];
        float* row = acc + (r + i) * width;
        totals[r + i] *= shrink;
        for (int h = 0; h < width; h += W) store(row + h, load(row + h) * shrink);
        top_so_far = top[i];
      }
      totals[r + i] += total_of(total[i]);
    }
  }

  void finish() {
    const int size = call.head_size;
    float* part = item.partial < 0 ? nullptr : call.partials + item.partial;
    for (int r = 0; r < n_rows; ++r) {
      float* to = part ? part + int64_t{r} * size : call.out + place(r);
      const float factor = part || totals[r] == 0 ? 1 : 1 / totals[r];
      for (int h = 0; h < size; h += W) store_part(to, h, size, load(acc + r * width + h) * factor);
    }
    if (!part) return;
    memcpy(part + n_rows * size, tops, sizeof(float) * n_rows);
    memcpy(part + n_rows * (size + 1), totals, sizeof(float) * n_rows);
  }
};

}  // namespace

void OF_KIND(attend)(const Call& call, const Item& item, float* scratch) {
  switch (call.cell) {
    case Cell::kFloat32: return Flash<float>(call, item, scratch).run();
    case Cell::kBfloat16: return Flash<Bfloat16>(call, item, scratch).run();
    case Cell::kFloat16: return Flash<Float16>(call, item, scratch).run();
    case Cell::kInt8: return Flash<int8_t>(call, item, scratch).run();
    case Cell::kFloat8: return Flash<Float8>(call, item, scratch).run();
  }
}
