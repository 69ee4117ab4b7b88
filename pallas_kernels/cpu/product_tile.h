// What a part of a product y = x W^T is, and who computes it.
//
// T tokens, I inputs, O outputs. A gated product has two weights, one after the other, and makes
// y = silu(x G^T) * (x U^T). x may be normalised first, and something added to y. Nothing here may be
// an inline function of external linkage: see attention_tile.h.
#pragma once

#include <cstdint>

constexpr int PACKED_TOKENS = 32;  // at a time: two of the longest vectors
constexpr int FEW_TOKENS = 8;      // that stay rows
constexpr int PART_TOKENS = 128;   // at most in a part
constexpr int PART_ROWS = 48;      // of the weight, of which a part has a multiple
constexpr int MOST_ROWS = 192;     // of a part, of both weights
constexpr int DEPTH = 256;         // inputs that are multiplied before sums are put down
constexpr int SCRATCH = MOST_ROWS * PART_TOKENS + 24 * (DEPTH + 2);  // floats

enum class Stored { kFloat32, kBfloat16, kFloat16 };

struct Product {
  const float* x;      // T I
  const float* norm;   // I, or null; with it x is x / sqrt(mean(x^2) + eps) * norm
  const char* weight;  // O I, or 2 O I
  const float* added;  // T O, which may be y itself, or null
  float* y;            // T O
  float* panels;       // x as tiles want it: T, rounded up to PACKED_TOKENS, times `depth`
  float eps;
  Stored stored;  // what the weight is
  int n_tokens, n_inputs, n_outputs;
  int part_rows;  // of a weight; the last part has what is left
  int depth;      // numbers of a token in a panel; 0: few tokens stay rows
  bool is_gated;
  bool in_tiles;  // by a matrix unit, for which x is rounded to pairs of bfloat16
};

// From a multiple of PART_TOKENS on, and one of the product's part_rows.
struct Part {
  int first_token, n_tokens, first_row, n_rows;
  int row_after;  // with which this thread will go on
};

// Makes panels of PACKED_TOKENS, or the last, tokens; rows, if these are few and have a norm.
using Pack = void (*)(const Product&, int first_token, int n_tokens);
using Multiply = void (*)(const Product&, const Part&, float* scratch);
