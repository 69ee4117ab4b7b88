// y = x W^T as one XLA custom call: packs x, divides the work, multiplies.
#include <algorithm>

#include "kinds.h"
#include "matrix_unit.h"
#include "product_tile.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

void pack_any(const Product&, int, int);
void multiply_any(const Product&, const Part&, float*);
#if defined(__x86_64__)
void pack_avx2(const Product&, int, int);
void multiply_avx2(const Product&, const Part&, float*);
void pack_avx512(const Product&, int, int);
void multiply_avx512(const Product&, const Part&, float*);
void pack_avx512bf16(const Product&, int, int);
void multiply_avx512bf16(const Product&, const Part&, float*);
void pack_amx(const Product&, int, int);
void multiply_amx(const Product&, const Part&, float*);
#endif

namespace {

constexpr Pack PACK[] = OF_ALL_KINDS(pack);
constexpr Multiply MULTIPLY[] = OF_ALL_KINDS(multiply);
constexpr int64_t THREAD_COST = 1 << 18;   // multiplications that are worth another thread
constexpr int PARTS_PER_THREAD = 4;
constexpr int64_t PACKING_COST = 1 << 15;  // packed inputs that are

int divided(int n, int size) { return (n + size - 1) / size; }

// Long parts write long stretches of y, but every thread wants some.
int find_part_rows(const Product& p, int n_token_parts, int64_t n_threads) {
  const auto leaves_enough = [&](int n_rows) {
    return n_token_parts * divided(p.n_outputs, n_rows) >= PARTS_PER_THREAD * n_threads;
  };
  const int most = p.is_gated ? MOST_ROWS / 2 : MOST_ROWS;
  int n_rows = PART_ROWS;
  while (2 * n_rows <= most && leaves_enough(2 * n_rows)) n_rows *= 2;
  return n_rows;
}

void multiply(Product p, int kind, ffi::ThreadPool& pool) {
  const int64_t n_others = std::max<int64_t>(pool.num_threads(), 1) - 1;
  const int64_t size = int64_t{p.n_tokens} * p.n_inputs, cost = size * p.n_outputs;
  const int n_packed = p.depth || p.norm ? divided(p.n_tokens, PACKED_TOKENS) : 0;
  in_turns(pool, n_packed, std::min(n_others, size / PACKING_COST), [&](int i, int) {
    const int first = i * PACKED_TOKENS;
    PACK[kind](p, first, std::min(PACKED_TOKENS, p.n_tokens - first));
  });
  const int n_token_parts = divided(p.n_tokens, PART_TOKENS);
  p.part_rows = find_part_rows(p, n_token_parts, n_others + 1);
  const int n_parts = n_token_parts * divided(p.n_outputs, p.part_rows);
  in_turns(pool, n_parts, std::min(n_others, cost / THREAD_COST), [&](int i, int after) {
    alignas(64) static thread_local float scratch[SCRATCH];
    Part part;
    part.first_row = i / n_token_parts * p.part_rows;  // who come together read the same rows
    part.first_token = i % n_token_parts * PART_TOKENS;
    part.n_rows = std::min(p.part_rows, p.n_outputs - part.first_row);
    part.row_after = after / n_token_parts * p.part_rows;
    part.n_tokens = std::min(PART_TOKENS, p.n_tokens - part.first_token);
    MULTIPLY[kind](p, part, scratch);
  });
}

using Floats = ffi::Buffer<ffi::F32, 2>;

ffi::Error call_product(ffi::ThreadPool pool, Floats x, ffi::AnyBuffer weight,
                        ffi::Buffer<ffi::F32> norm, ffi::Buffer<ffi::F32> added,
                        ffi::Result<Floats> y, ffi::Result<ffi::Buffer<ffi::F32>> panels,
                        float eps, bool is_gated, int64_t wanted_kind) {
  const int kind = find_kind(wanted_kind);
  if (kind < 0) return ffi::Error::InvalidArgument("product: not for this kind of CPU");
  Product p{};
  switch (weight.element_type()) {
    case ffi::F32: p.stored = Stored::kFloat32; break;
    case ffi::BF16: p.stored = Stored::kBfloat16; break;
    case ffi::F16: p.stored = Stored::kFloat16; break;
    default: return ffi::Error::InvalidArgument("product: no such type of weights");
  }
  p.x = x.typed_data(), p.y = y->typed_data(), p.panels = panels->typed_data();
  if (norm.element_count()) p.norm = norm.typed_data(), p.eps = eps;
  if (added.element_count()) p.added = added.typed_data();
  p.weight = static_cast<const char*>(weight.untyped_data());
  p.n_tokens = x.dimensions()[0], p.n_inputs = x.dimensions()[1], p.n_outputs = y->dimensions()[1];
  p.in_tiles = kind == AMX && p.stored == Stored::kBfloat16;
  if (p.in_tiles) p.depth = divided(p.n_inputs, 2 * TILE) * TILE;
  else if (p.n_tokens > FEW_TOKENS) p.depth = p.n_inputs;
  const int64_t row_size = p.depth == 0 && p.norm ? p.n_inputs : p.depth;
  const int64_t n_packed = int64_t{divided(p.n_tokens, PACKED_TOKENS)} * PACKED_TOKENS * row_size;
  const auto shape = weight.dimensions();
  p.is_gated = is_gated;
  const int64_t n_rows = int64_t{p.n_outputs} * (is_gated ? 2 : 1);
  if (is_gated && p.depth == 0)
    return ffi::Error::InvalidArgument("product: of few tokens none is gated");
  if (shape.size() != 2 || shape[0] != n_rows || shape[1] != p.n_inputs ||
      (p.norm && int64_t(norm.element_count()) != p.n_inputs) ||
      (p.added && added.element_count() != y->element_count()) ||
      y->dimensions()[0] != p.n_tokens || int64_t(panels->element_count()) < n_packed)
    return ffi::Error::InvalidArgument("product: shapes do not fit together");
  multiply(p, kind, pool);
  return ffi::Error::Success();
}

}  // namespace

extern "C" int best_kind() { return find_kind(-1); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(product, call_product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()                     // x
                                  .Arg<ffi::AnyBuffer>()             // weight
                                  .Arg<ffi::Buffer<ffi::F32>>()      // norm, or nothing
                                  .Arg<ffi::Buffer<ffi::F32>>()      // what is added, or nothing
                                  .Ret<Floats>()                     // y
                                  .Ret<ffi::Buffer<ffi::F32>>()      // panels, of no further use
                                  .Attr<float>("eps")
                                  .Attr<bool>("is_gated")
                                  .Attr<int64_t>("kind"));
