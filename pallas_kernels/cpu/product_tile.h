// What a part of a product y = x W^T is, and who computes it.
//
// T tokens, I inputs, O outputs. A gated product has two weights, one after the other, and makes
// y = silu(x G^T) * (x U^T). Nothing here may be an inline function of external linkage: see
// attention_tile.h.
#pragma once

#include <cstdint>

constexpr int PACKED_TOKENS = 32;  // at a time: two of the longest vectors
constexpr int FEW_TOKENS = 8;      // of which none is packed
constexpr int PART_TOKENS = 128;   // at most in a part
constexpr int PART_ROWS = 48;      // of the weight, of which a part has a multiple
constexpr int MOST_ROWS = 192;     // of a part, of both weights
constexpr int DEPTH = 256;         // inputs that are multiplied before sums are put down
constexpr int SCRATCH = MOST_ROWS * PART_TOKENS + 24 * (DEPTH + 2);  // floats

enum class Stored { kFloat32, kBfloat16, kFloat16 };

struct Product {
  const float* x;      // T I
  const char* weight;  // O I, or 2 O I
  float* y;            // T O
  float* panels;       // x as tiles want it: T, rounded up to PACKED_TOKENS, times `depth`
  Stored stored;       // what the weight is
  int n_tokens, n_inputs, n_outputs;
  int part_rows;  // of a weight; the last part has what is left
  int depth;      // numbers of a token in a panel; 0: of few tokens none is packed
  bool is_gated;
  bool in_tiles;  // by a matrix unit, for which x is rounded to pairs of bfloat16
};

// From a multiple of PART_TOKENS on, and one of the product's part_rows.
struct Part {
  int first_token, n_tokens, first_row, n_rows;
  int row_after;  // with which this thread will go on
};

// Makes panels of PACKED_TOKENS, or the last, tokens.
using Pack = void (*)(const Product&, int first_token, int n_tokens);
using Multiply = void (*)(const Product&, const Part&, float* scratch);
