// Ragged paged attention as one XLA custom call: writes the new cells, divides the work, attends.
//
// The plan is made from the call's own arrays, and whatever would lead out of bounds is an error of
// the step. Items of work are taken in turns by this thread and those of XLA's own pool; which one
// takes which changes no result.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "attention_tile.h"
#include "kinds.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

void attend_any(const Call&, const Item&, float*);
#if defined(__x86_64__)
void attend_avx2(const Call&, const Item&, float*);
void attend_avx512(const Call&, const Item&, float*);
void attend_avx512bf16(const Call&, const Item&, float*);
void attend_amx(const Call&, const Item&, float*);
#endif

namespace {

constexpr int MOST_ROWS = 96;           // of an item, unless one token has more
constexpr int FEWEST_KEYS = 256;        // of an item, where a long context is divided
constexpr int ITEMS_PER_THREAD = 8;     // at least, where there are long contexts
constexpr int WRITTEN_TOGETHER = 128;   // tokens
constexpr int64_t THREAD_COST = 1 << 18;  // rows * keys * H that are worth another thread

constexpr Attend ATTEND[] = OF_ALL_KINDS(attend);

struct Batch {
  const int32_t *slots, *block_tables, *seq_lens, *cu_q_lens;
  int n_seqs, max_seqs, table_width, n_tokens, n_blocks;
};

// What would lead out of bounds; empty: nothing.
std::string fault(const Batch& b, int n_cells) {
  if (b.n_seqs < 0 || b.n_seqs > b.max_seqs) return "n_seqs";
  if (b.cu_q_lens[0] != 0) return "cu_q_lens[0]";
  for (int s = 0; s < b.n_seqs; ++s) {
    const int n_new = b.cu_q_lens[s + 1] - b.cu_q_lens[s], length = b.seq_lens[s];
    const std::string at = "[" + std::to_string(s) + "]";
    if (n_new < 0 || b.cu_q_lens[s + 1] > b.n_tokens) return "cu_q_lens" + at;
    if (length < n_new || length > int64_t{b.table_width} * n_cells) return "seq_lens" + at;
    const int32_t* blocks = b.block_tables + int64_t{s} * b.table_width;
    for (int i = 0; i < (length + n_cells - 1) / n_cells; ++i)
      if (blocks[i] < 0 || blocks[i] >= b.n_blocks) return "block_tables" + at;
  }
  for (int t = 0; t < b.cu_q_lens[b.n_seqs]; ++t)
    if (b.slots[t] < 0 || b.slots[t] >= int64_t{b.n_blocks} * n_cells)
      return "slots[" + std::to_string(t) + "]";
  return "";
}

// An item whose keys were divided: its parts lie one after the other from `item.partial` on.
struct Divided {
  Item item;
  int n_parts;
};

struct Plan {
  std::vector<Item> items;  // the longest first
  std::vector<Divided> divided;
  int64_t n_partials = 0, cost = 0;
};

// One item per tile of queries and KV head, with all of its keys.
std::vector<Item> whole_items(const Call& call, const Batch& b) {
  std::vector<Item> items;
  const int most = std::max(1, MOST_ROWS / call.group_size);
  for (int s = 0; s < b.n_seqs; ++s) {
    const int end = b.cu_q_lens[s + 1], n_new = end - b.cu_q_lens[s];
    const int n_tiles = (n_new + most - 1) / most;
    for (int i = 0; i < n_tiles; ++i) {
      Item item{};
      item.first_token = end - n_new + int64_t{n_new} * i / n_tiles;
      item.n_tokens = end - n_new + int64_t{n_new} * (i + 1) / n_tiles - item.first_token;
      item.position = b.seq_lens[s] - (end - item.first_token);
      item.blocks = b.block_tables + int64_t{s} * b.table_width;
      item.first_key = call.window ? std::max(0, item.position - call.window + 1) : 0;
      item.end_key = item.position + item.n_tokens;
      item.has_sinks = call.sinks != nullptr;
      item.partial = -1;
      const int64_t n_rows = int64_t{item.n_tokens} * call.group_size;
      item.cost = n_rows * (item.end_key - item.first_key) * call.head_size;
      for (item.head = 0; item.head < call.n_kv_heads; ++item.head) items.push_back(item);
    }
  }
  return items;
}

Plan make_plan(const Call& call, const Batch& b, int n_threads) {
  Plan plan;
  const std::vector<Item> whole = whole_items(call, b);
  for (const Item& item : whole) plan.cost += item.cost;
  const int64_t limit = plan.cost / (int64_t{n_threads} * ITEMS_PER_THREAD) + 1;
  for (Item item : whole) {
    const int n_keys = item.end_key - item.first_key, end = item.end_key;
    const int64_t n_wanted = n_threads == 1 ? 1 : (item.cost + limit - 1) / limit;
    const int n = std::min<int64_t>(n_wanted, n_keys / FEWEST_KEYS);
    if (n < 2) {
      plan.items.push_back(item);
      continue;
    }
    const int64_t size = int64_t{item.n_tokens} * call.group_size * (call.head_size + 2);
    item.partial = plan.n_partials;
    plan.divided.push_back({item, n});
    item.cost /= n;
    for (int i = 0; i < n; ++i, item.has_sinks = false, item.partial += size) {
      item.end_key = end - int64_t{n_keys} * (n - 1 - i) / n;
      plan.items.push_back(item);
      item.first_key = item.end_key;
    }
    plan.n_partials += n * size;
  }
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [](const Item& a, const Item& b) { return a.cost > b.cost; });
  return plan;
}

void merge(const Call& call, const Divided& d) {
  const int n_rows = d.item.n_tokens * call.group_size, size = call.head_size;
  for (int r = 0; r < n_rows; ++r) {
    const float* parts = call.partials + d.item.partial;
    const int64_t part_size = int64_t{n_rows} * (size + 2), top_at = int64_t{n_rows} * size + r;
    float top = -INFINITY, total = 0;
    for (int i = 0; i < d.n_parts; ++i) {
      const float other = parts[i * part_size + top_at];
      top = other <= top ? top : other;  // NaN stays
    }
    const int64_t token = d.item.first_token + r / call.group_size;
    const int head = d.item.head * call.group_size + r % call.group_size;
    float* out = call.out + (token * call.n_kv_heads * call.group_size + head) * size;
    for (int h = 0; h < size; ++h) out[h] = 0;
    for (int i = 0; i < d.n_parts; ++i) {
      const float* part = parts + i * part_size;
      const float factor = part[top_at + n_rows] == 0 ? 0 : std::exp2(part[top_at] - top);
      total += part[top_at + n_rows] * factor;
      for (int h = 0; h < size; ++h) out[h] += part[int64_t{r} * size + h] * factor;
    }
    for (int h = 0; h < size; ++h) out[h] /= total == 0 ? 1 : total;
  }
}

void attend(Attend attend_item, const Call& shared, const Batch& batch, ffi::ThreadPool& pool) {
  const int n_threads = std::clamp<int64_t>(pool.num_threads(), 1, 1024);
  Plan plan = make_plan(shared, batch, n_threads);
  std::vector<float> partials(plan.n_partials);
  Call call = shared;
  call.partials = partials.data();
  const int64_t size = (call.head_size + ALIGN - 1) / ALIGN * ALIGN;
  in_turns(pool, plan.items.size(), std::min<int64_t>(n_threads - 1, plan.cost / THREAD_COST),
           [&](int i, int) {
             thread_local std::vector<float> scratch;
             const int64_t n = int64_t{plan.items[i].n_tokens} * call.group_size;
             const size_t wanted = 2 * size * (n + KEYS) + n * (KEYS + 2) + ALIGN;
             if (scratch.size() < wanted) scratch.resize(wanted);
             const auto place = reinterpret_cast<uintptr_t>(scratch.data());
             const auto aligned = place + (0 - place) % (ALIGN * sizeof(float));
             attend_item(call, plan.items[i], reinterpret_cast<float*>(aligned));
           });
  for (const Divided& d : plan.divided) merge(call, d);
}

// Puts each token's rows "T K H" of cells, and "T K" of scales, where its slot says.
void write(const Batch& b, const Call& call, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
           const float* k_scales, const float* v_scales, char* cache, float* scales,
           ffi::ThreadPool& pool) {
  const int n_tokens = b.cu_q_lens[b.n_seqs], n_heads = call.n_kv_heads;
  const size_t row_size = call.head_size * ffi::ByteWidth(k.element_type());
  const char* rows[] = {static_cast<const char*>(k.untyped_data()),
                        static_cast<const char*>(v.untyped_data())};
  const float* row_scales[] = {k_scales, v_scales};
  const int n = (n_tokens + WRITTEN_TOGETHER - 1) / WRITTEN_TOGETHER;
  in_turns(pool, n, std::max<int64_t>(pool.num_threads(), 1) - 1, [&](int i, int) {
    const int end = std::min(n_tokens, (i + 1) * WRITTEN_TOGETHER);
    for (int t = i * WRITTEN_TOGETHER; t < end; ++t)
      for (int head = 0; head < n_heads; ++head)
        for (int is_value = 0; is_value < 2; ++is_value) {
          const int64_t block = b.slots[t] / call.n_cells, from = int64_t{t} * n_heads + head;
          const int64_t line = (block * n_heads + head) * 2 + is_value;
          const int64_t to = line * call.n_cells + b.slots[t] % call.n_cells;
          memcpy(cache + to * row_size, rows[is_value] + from * row_size, row_size);
          if (scales) scales[to] = row_scales[is_value][from];
        }
  });
}

bool find_cell(ffi::DataType type, Cell& cell) {
  switch (type) {
    case ffi::F32: cell = Cell::kFloat32; return true;
    case ffi::U16:
    case ffi::BF16: cell = Cell::kBfloat16; return true;
    case ffi::F16: cell = Cell::kFloat16; return true;
    case ffi::S8: cell = Cell::kInt8; return true;
    case ffi::U8:
    case ffi::F8E4M3FN: cell = Cell::kFloat8; return true;
    default: return false;
  }
}

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;

const float* unless_empty(const Floats& x) {
  return x.element_count() ? x.typed_data() : nullptr;
}

ffi::Error call_attention(ffi::ThreadPool pool, Floats q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                          Floats k_scales, Floats v_scales, ffi::AnyBuffer, Floats, Integers slots,
                          Integers block_tables, Integers seq_lens, Integers cu_q_lens,
                          Integers n_seqs, Floats slopes, Floats sinks, ffi::Result<Floats> out,
                          ffi::Result<ffi::AnyBuffer> cache, ffi::Result<Floats> scales,
                          float scale, float soft_cap, int64_t window, int64_t kind) {
  const int found = find_kind(kind);
  if (found < 0) return ffi::Error::InvalidArgument("attention: not for this kind of CPU");
  Call call{};
  const auto shape = cache->dimensions();  // B K 2 C H
  if (!find_cell(cache->element_type(), call.cell) || k.element_type() != cache->element_type())
    return ffi::Error::InvalidArgument("attention: no such type of cells");
  Batch batch{};
  batch.slots = slots.typed_data(), batch.block_tables = block_tables.typed_data();
  batch.seq_lens = seq_lens.typed_data(), batch.cu_q_lens = cu_q_lens.typed_data();
  batch.n_seqs = *n_seqs.typed_data();
  batch.max_seqs = block_tables.dimensions()[0], batch.table_width = block_tables.dimensions()[1];
  batch.n_tokens = q.dimensions()[0], batch.n_blocks = shape[0];
  call.n_kv_heads = shape[1], call.n_cells = shape[3], call.head_size = shape[4];
  call.group_size = q.dimensions()[1] / shape[1];
  call.q = q.typed_data(), call.out = out->typed_data();
  call.cache = static_cast<const char*>(cache->untyped_data());
  call.scales = unless_empty(*scales);
  call.slopes = unless_empty(slopes), call.sinks = unless_empty(sinks);
  call.scale = scale, call.soft_cap = soft_cap, call.window = window;
  const std::string where = fault(batch, call.n_cells);
  if (!where.empty())
    return ffi::Error::InvalidArgument("attention: the batch's " + where + " is out of bounds");
  float* written_scales = call.scales ? scales->typed_data() : nullptr;
  write(batch, call, k, v, k_scales.typed_data(), v_scales.typed_data(),
        static_cast<char*>(cache->untyped_data()), written_scales, pool);
  attend(ATTEND[found], call, batch, pool);
  const size_t row = q.dimensions()[1] * q.dimensions()[2];
  const size_t n_real = batch.cu_q_lens[batch.n_seqs];
  std::fill(call.out + n_real * row, call.out + batch.n_tokens * row, 0.0f);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ragged_paged_attention, call_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()          // q
                                  .Arg<ffi::AnyBuffer>()  // k
                                  .Arg<ffi::AnyBuffer>()  // v
                                  .Arg<Floats>()          // scales of k
                                  .Arg<Floats>()          // scales of v
                                  .Arg<ffi::AnyBuffer>()  // cache: the result is the same memory
                                  .Arg<Floats>()          // its scales: so are they
                                  .Arg<Integers>()        // slots
                                  .Arg<Integers>()        // block_tables
                                  .Arg<Integers>()        // seq_lens
                                  .Arg<Integers>()        // cu_q_lens
                                  .Arg<Integers>()        // n_seqs
                                  .Arg<Floats>()          // slopes
                                  .Arg<Floats>()          // sinks
                                  .Ret<Floats>()          // out
                                  .Ret<ffi::AnyBuffer>()  // cache
                                  .Ret<Floats>()          // scales
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("kind"));
