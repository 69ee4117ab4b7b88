// What one item of work of ragged paged attention is, and who computes it.
//
// Dim letters as in contract.py: T tokens, N query heads, K KV heads, G = N / K, H head size,
// B blocks in the pool, C cells per block. Nothing here may be an inline function of external
// linkage: attention_tile.cc is compiled once per kind of CPU, and the linker keeps any one of such copies.
#pragma once

#include <cstdint>

constexpr int KEYS = 64;   // of a tile
constexpr int ALIGN = 16;  // floats of the longest vector

enum class Cell { kFloat32, kBfloat16, kFloat16, kInt8, kFloat8 };

// What all items of a call share.
struct Call {
  const float* q;        // T N H
  const char* cache;     // B K 2 C H
  const float* scales;   // B K 2 C; null unless cells are quantised
  const float* slopes;   // N, or null
  const float* sinks;    // N, or null
  float* out;            // T N H
  float* partials;       // where items leave their parts of a softmax
  Cell cell;
  int n_kv_heads, group_size, head_size, n_cells;
  float scale, soft_cap;  // 0: no cap
  int window;             // 0: none
};

// Consecutive tokens of one sequence, one KV head and its queries of them, a range of keys.
struct Item {
  int first_token, n_tokens, head;
  int position;            // of the first token in its sequence
  const int32_t* blocks;   // of the sequence
  int first_key, end_key;  // each is seen by one of the tokens at least
  bool has_sinks;          // its softmax begins with them
  int64_t partial;         // -1: `out` is written; else a place for its rows' sums, tops, totals
  int64_t cost;
};

// Computes an item of n = n_tokens * G rows. `scratch` has place for 2 * H * (n + KEYS) +
// n * (KEYS + 2) floats, H rounded up to ALIGN; a part is n * (H + 2).
using Attend = void (*)(const Call&, const Item&, float* scratch);
