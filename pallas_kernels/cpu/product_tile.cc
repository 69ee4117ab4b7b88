// A part of a product y = x W^T, for one kind of CPU: compiled with -DKIND=of it -DLANES=floats per
// vector.
//
// With few tokens each number is a dot product of rows as they are, and memory is what it waits for.
// With many a tile is some rows of the weight times two vectors of tokens: sums stay in registers, a
// number of the weight is broadcast, and so neither is transposed but x, once per call (Goto and van
// de Geijn, 2008, with the weight as their A). The weight is read from memory once, and its next rows
// are asked for while these are multiplied. All is float32: 16-bit weights are widened on their way,
// but for bfloat16 where the CPU has a matrix unit, which rounds x as well.
#include "product_tile.h"

#include <type_traits>

#include "matrix_unit.h"
#include "vectors.h"

namespace {

constexpr int SUMS = W == 16 ? 24 : 12;  // that registers hold beside their factors
constexpr int PANEL = 2 * W;             // tokens
constexpr int STRIDE = DEPTH + 2;        // of unpacked rows, which else share banks of the cache
constexpr int LINE = 64;                 // bytes
static_assert(PART_ROWS % SUMS == 0 && PART_ROWS % W == 0 && PART_TOKENS % PANEL == 0);
static_assert(MOST_ROWS * PART_TOKENS + SUMS * STRIDE <= SCRATCH);
static_assert(PART_ROWS % TILE == 0 && (!has_matrix_unit || PANEL == 2 * TILE));

// y of W / n rows and n tokens; rows at and behind `end` are not there.
template <int n, class T>
void dot_rows(const Product& p, const T* weight, int row, int end, int token) {
  constexpr int n_rows = W / n;
  const T* rows[n_rows];
  for (int r = 0; r < n_rows; ++r)
    rows[r] = weight + int64_t{row + r < end ? row + r : end - 1} * p.n_inputs;
  const float* x = (p.norm ? p.panels : p.x) + int64_t{token} * p.n_inputs;
  Vector sum[W] = {};
  const auto add = [&](int k, auto load_at) {
    Vector factors[n];
#pragma GCC unroll 16
    for (int t = 0; t < n; ++t) factors[t] = load_at(x + int64_t{t} * p.n_inputs, k);
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; ++r) {
      const Vector weights = load_at(rows[r], k);
      __builtin_prefetch(rows[r] + k + int64_t{n_rows} * p.n_inputs);
#pragma GCC unroll 16
      for (int t = 0; t < n; ++t) sum[r * n + t] += weights * factors[t];
    }
  };
  int k = 0;
  for (; k + W <= p.n_inputs; k += W) add(k, [](const auto* from, int k) { return load(from + k); });
  if (k < p.n_inputs)
    add(k, [&](const auto* from, int k) { return load_part(from, k, p.n_inputs); });
  const Vector dots = sums(sum);
  for (int r = 0; r < n_rows && row + r < end; ++r)
    for (int t = 0; t < n; ++t) {
      const int64_t place = int64_t{token + t} * p.n_outputs + row + r;
      p.y[place] = p.added ? p.added[place] + dots[r * n + t] : dots[r * n + t];
    }
}

// W rows at a time, so that they are near when all tokens want them.
template <int n, class T>
void dot(const Product& p, const T* weight, int first_row, int end, int token) {
  for (; p.n_tokens - token >= n; token += n)
    for (int row = first_row; row < end; row += W / n) dot_rows<n>(p, weight, row, end, token);
  if constexpr (n > 1)
    if (token < p.n_tokens) dot<n / 2>(p, weight, first_row, end, token);
}

int width_of(int n_tokens) { return n_tokens > W ? PANEL : W; }

// A panel has its tokens' inputs one after the other: "I PANEL", or "I W" where W tokens are left. For
// the matrix unit they are pairs.
float* panel_of(const Product& p, int token) { return p.panels + int64_t{token} * p.depth; }

// Those of W tokens that are before `end`, with what makes of each token's inputs its normalised ones.
struct Tokens {
  const Product& p;
  int first, n;
  float scales[W];

  Tokens(const Product& p, int first, int end)
      : p(p), first(first), n(end - first < W ? end - first : W) {
    if (!p.norm) return;
    Vector squares[W] = {};
    for (int column = 0; column < p.n_inputs; column += W)
      for (int i = 0; i < n; ++i) {
        const Vector x = load_part(row(i), column, p.n_inputs);
        squares[i] += x * x;
      }
    const Vector total = sums(squares);
    for (int i = 0; i < W; ++i) scales[i] = 1.0f / sqrtf(total[i] / p.n_inputs + p.eps);
  }

  const float* row(int i) const { return p.x + int64_t{first + i} * p.n_inputs; }

  // W inputs, or zeros behind the last one.
  Vector inputs(int i, int column) const {
    const Vector x = load_part(row(i), column, p.n_inputs);
    return p.norm ? x * scales[i] * load_part(p.norm, column, p.n_inputs) : x;
  }
};

void pack_rows(const Tokens& tokens, float* rows) {
  const int size = tokens.p.n_inputs;
  for (int i = 0; i < tokens.n; ++i)
    for (int column = 0; column < size; column += W)
      store_part(rows + int64_t{i} * size, column, size, tokens.inputs(i, column));
}

// As columns of a panel, with zeros behind the last token.
void pack_columns(const Tokens& tokens, float* panel, int width) {
  const int size = tokens.p.n_inputs;
  for (int column = 0; column < size; column += W) {
    Vector x[W] = {};
    for (int i = 0; i < tokens.n; ++i) x[i] = tokens.inputs(i, column);
    transpose(x);
    for (int i = 0; i < W && column + i < size; ++i)
      store(panel + int64_t{column + i} * width, x[i]);
  }
}

// The same as pairs of bfloat16, with zeros behind the last one.
void pack_pairs(const Tokens& tokens, float* panel, int width) {
  for (int column = 0; column < tokens.p.n_inputs; column += 2 * W, panel += W * width) {
    Vector x[W] = {};
    for (int i = 0; i < tokens.n; ++i)
      x[i] = Pairs::pack(tokens.inputs(i, column), tokens.inputs(i, column + W));
    transpose(x);
    for (int i = 0; i < W; ++i) store(panel + i * width, x[i]);
  }
}

template <class T>
void unpack(const T* weight, int64_t row_size, int n_rows, int depth, float* rows) {
  for (int r = 0; r < n_rows; ++r)
    for (int k = 0; k < depth; k += W)
      store(rows + r * STRIDE + k, load_part(weight + r * row_size, k, depth));
}

struct Rows {
  const float* data;
  int64_t stride;

  Rows from(int row) const { return {data + row * stride, stride}; }
};

// Rows of the weight that are wanted next, n of them in one tile's time. Without, a product of 32
// tokens takes half as long again.
template <class T>
struct Ahead {
  const T* rows;
  int64_t row_size;
  int n;
};

// sums "SUMS / n, n W" = or += rows "SUMS / n, depth" times panel "depth n W". Where few tiles share
// what is ahead, it is asked for line by line: many at once would keep what this tile loads waiting.
template <int n, bool are_few, class T>
void multiply_tile(Rows rows, const float* __restrict panel, int depth, bool is_first,
                   const Ahead<T>& ahead, float* __restrict sums) {
  constexpr int STEPS = LINE / sizeof(float), ROWS = SUMS / n, AT_ONCE = (ROWS + STEPS - 1) / STEPS;
  static_assert(ROWS % 3 == 0);
  if (!are_few || n == 1) rows.stride = STRIDE;  // as it is; constants are faster
  const float* thirds[ROWS / 3];                 // the rows between are a stride or two away
  for (int i = 0; i < ROWS / 3; ++i) thirds[i] = rows.from(3 * i).data;
  Vector sum[ROWS][n] = {};
  for (int first = 0; first < depth; first += STEPS) {
    const T* wanted = ahead.rows + first;
    int n_wanted = ahead.n;
    const auto ask = [&](int at_most) {
      for (int i = 0; i < at_most && n_wanted > 0; ++i, --n_wanted, wanted += ahead.row_size)
        __builtin_prefetch(wanted, 0, 2);
    };
    if (!are_few) ask(n_wanted);
    const int end = first + STEPS < depth ? first + STEPS : depth;
    for (int k = first; k < end; ++k) {
      if (are_few) ask(AT_ONCE);
      Vector x[n];
#pragma GCC unroll 2
      for (int j = 0; j < n; ++j) x[j] = load(panel + (k * n + j) * W);
#pragma GCC unroll 24
      for (int r = 0; r < ROWS; ++r) {
        const Vector weight = splat(thirds[r / 3][k + r % 3 * rows.stride]);
#pragma GCC unroll 2
        for (int j = 0; j < n; ++j) sum[r][j] += weight * x[j];
      }
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < n; ++j, sums += W)
      store(sums, is_first ? sum[r][j] : load(sums) + sum[r][j]);
}

Vector silu(Vector x) {
  const Vector power = x * -LOG2E;
  return power > 127.0f ? Vector{} : x / (exp2(power) + 1.0f);
}

// Sums "rows, width" of some tokens become their outputs.
void put(const Product& p, const float* sums, int width, int token, int n_tokens, int first_row,
         int n_rows) {
  for (int lane = 0; lane < n_tokens; lane += W)
    for (int row = 0; row < n_rows; row += W) {
      Vector x[W];
      for (int i = 0; i < W; ++i) {
        const float* from = sums + (row + i) * width + lane;
        x[i] = p.is_gated ? silu(load(from)) * load(from + p.part_rows * width) : load(from);
      }
      transpose(x);
      for (int i = 0; i < W && lane + i < n_tokens; ++i) {
        const int64_t place = int64_t{token + lane + i} * p.n_outputs + first_row;
        if (p.added) x[i] += load_part(p.added + place, row, n_rows);
        store_part(p.y + place, row, n_rows, x[i]);
      }
    }
}

// Of one of a product's weights: "rows, width" of each panel.
struct Sums {
  float* data;
  int panel_rows;  // of all weights
  int first_row;   // of this one
  float* of(int panel, int row, int width) const {
    return data + panel * panel_rows * PANEL + (first_row + row) * width;
  }
};

// By the matrix unit, which takes rows of the weight from where they are.
void multiply_in_tiles(const Product& p, const Part& part, Sums sums) {
  const auto weight = reinterpret_cast<const Bfloat16*>(p.weight);
  const int end = part.first_row + part.n_rows, n_panels = (part.n_tokens + PANEL - 1) / PANEL;
  const int most = n_panels > 1 ? DEPTH : p.n_inputs;
  MatrixUnit unit;
  for (int row = part.first_row; row < end; row += 2 * TILE) {
    const int n_rows = end - row < 2 * TILE ? end - row : 2 * TILE;
    const int row_after = row + n_rows < end ? row + n_rows : part.row_after;
    for (int first = 0; first < p.n_inputs; first += most) {
      const Bfloat16* strip = weight + int64_t{row} * p.n_inputs + first;
      const void* ahead = n_panels == 1 ? weight + int64_t{row_after} * p.n_inputs : nullptr;
      const int depth = p.n_inputs - first < most ? p.n_inputs - first : most;
      const int n_left = depth % (2 * TILE), n_pairs = (depth - n_left) / 2;
      alignas(64) Bfloat16 ends[2 * TILE][2 * TILE] = {};  // what is left of rows, and zeros
      for (int r = 0; n_left && r < n_rows; ++r)
        memcpy(ends[r], strip + int64_t{r} * p.n_inputs + 2 * n_pairs, n_left * sizeof(Bfloat16));
      for (int j = 0; j < n_panels; ++j) {
        const int width = width_of(part.n_tokens - j * PANEL);
        const float* panel = panel_of(p, part.first_token + j * PANEL) + int64_t{first} / 2 * width;
        float* to = sums.of(j, row - part.first_row, width);
        unit.multiply({strip, 2 * p.n_inputs}, n_rows, {panel, 4 * width}, n_pairs, width, first == 0,
                      to, width, ahead);
        if (n_left)
          unit.multiply({ends, sizeof ends[0]}, n_rows, {panel + int64_t{n_pairs} * width, 4 * width},
                        TILE, width, false, to, width);
      }
    }
  }
}

// Floats are multiplied where they are, if two tiles want them; else copies in order are faster.
template <class T>
void multiply_strips(const Product& p, const Part& part, Sums sums, float* copies) {
  const T* weight = reinterpret_cast<const T*>(p.weight) + int64_t{part.first_row} * p.n_inputs;
  const int n_panels = (part.n_tokens + PANEL - 1) / PANEL;
  const int n_tiles = 2 * n_panels - (width_of(part.n_tokens - (n_panels - 1) * PANEL) == W);
  for (int first = 0; first < p.n_inputs; first += DEPTH) {
    const int depth = p.n_inputs - first < DEPTH ? p.n_inputs - first : DEPTH;
    for (int row = 0; row < part.n_rows; row += SUMS) {
      const T* strip = weight + int64_t{row} * p.n_inputs + first;
      const int n_rows = part.n_rows - row < SUMS ? part.n_rows - row : SUMS;
      Rows rows{copies, STRIDE};
      if (std::is_same_v<T, float> && n_tiles == 2 && n_rows == SUMS)
        rows = {reinterpret_cast<const float*>(strip), p.n_inputs};
      else
        unpack(strip, p.n_inputs, n_rows, depth, copies);
      const bool is_last = row + SUMS >= part.n_rows;
      Ahead<T> ahead{is_last ? weight + first + DEPTH : strip + int64_t{SUMS} * p.n_inputs,
                     p.n_inputs, 0};
      for (int tile = 0; tile < n_tiles; ++tile) {  // two share a wide panel
        const int j = tile / 2, width = width_of(part.n_tokens - j * PANEL);
        const int half = width == W ? 0 : tile % 2 * (SUMS / 2);
        const float* panel = panel_of(p, part.first_token + j * PANEL) + int64_t{first} * width;
        ahead.rows += int64_t{ahead.n} * p.n_inputs;
        ahead.n = SUMS * (tile + 1) / n_tiles - SUMS * tile / n_tiles;
        const bool are_few = n_tiles <= 2;
        const auto multiply =
            width == W ? are_few ? multiply_tile<1, true, T> : multiply_tile<1, false, T>
                       : are_few ? multiply_tile<2, true, T> : multiply_tile<2, false, T>;
        multiply(rows.from(half), panel, depth, first == 0, ahead, sums.of(j, row + half, width));
      }
    }
  }
}

template <class T>
void multiply_part(const Product& p, const Part& part, float* scratch) {
  if (p.depth == 0) {
    const int end = part.first_row + part.n_rows;
    for (int row = part.first_row; row < end; row += W)
      dot<4>(p, reinterpret_cast<const T*>(p.weight), row, row + W < end ? row + W : end, 0);
    return;
  }
  const int panel_rows = p.is_gated ? 2 * p.part_rows : p.part_rows;
  for (int row = 0; row < panel_rows; row += p.part_rows) {
    Part own = part;
    if (row > 0) own.first_row += p.n_outputs;
    else if (p.is_gated) own.row_after = part.first_row + p.n_outputs;
    const Sums sums{scratch, panel_rows, row};
    if (p.in_tiles) multiply_in_tiles(p, own, sums);
    else multiply_strips<T>(p, own, sums, scratch + MOST_ROWS * PART_TOKENS);
  }
  for (int token = 0; token < part.n_tokens; token += PANEL) {
    const int n_tokens = part.n_tokens - token < PANEL ? part.n_tokens - token : PANEL;
    put(p, scratch + panel_rows * token, width_of(n_tokens), part.first_token + token, n_tokens,
        part.first_row, part.n_rows);
  }
}

}  // namespace

void OF_KIND(pack)(const Product& p, int first_token, int n_tokens) {
  const int end = first_token + n_tokens;
  for (int token = first_token; token < end; token += W) {
    const Tokens tokens(p, token, end);
    if (p.depth == 0) {
      pack_rows(tokens, p.panels + int64_t{token} * p.n_inputs);
      continue;
    }
    const int panel = token / PANEL * PANEL, width = width_of(end - panel);
    float* to = panel_of(p, panel) + token - panel;
    if (p.in_tiles) pack_pairs(tokens, to, width);
    else pack_columns(tokens, to, width);
  }
}

void OF_KIND(multiply)(const Product& p, const Part& part, float* scratch) {
  switch (p.stored) {
    case Stored::kFloat32: return multiply_part<float>(p, part, scratch);
    case Stored::kBfloat16: return multiply_part<Bfloat16>(p, part, scratch);
    case Stored::kFloat16: return multiply_part<Float16>(p, part, scratch);
  }
}
