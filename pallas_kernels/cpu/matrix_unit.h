// The matrix unit of Intel's server CPUs: AMX, Intel 64 and IA-32 Architectures Software Developer's
// Manual, volume 1, chapter 18. What has one is compiled for it, see build.py.
#pragma once

#include <cstdint>
#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

constexpr int TILE = 16;  // rows, columns, pairs

namespace {

// Rows of pairs of bfloat16, each in the place of a float.
struct Factor {
  const void* data;
  int64_t stride;  // bytes
};

}  // namespace

#if defined(__AMX_BF16__)

namespace {

constexpr bool has_matrix_unit = true;

// This thread's, while it is in scope. Of its eight tiles of 16 rows of 64 bytes four are sums, two
// factors on the left, two on the right.
class MatrixUnit {
 public:
  ~MatrixUnit() {
    if (n_configured) _tile_release();
  }

  // c "n_rows, width" = or += a "n_rows, n_pairs" times b "n_pairs, width": a has pairs of neighbours
  // in a row, b of neighbours in a column. n_pairs and width are multiples of TILE; c_stride counts
  // floats. Rows that are `ahead`, with the stride of a, are wanted next and asked for meanwhile.
  void multiply(Factor a, int n_rows, Factor b, int n_pairs, int width, bool is_first, float* c,
                int64_t c_stride, const void* ahead = nullptr) {
    asm volatile("" ::: "memory");  // compilers know neither what tiles load nor what they store
    const Strides strides{a.stride, b.stride, 4 * c_stride};
    for (int row = 0; row < n_rows; row += 2 * TILE) {
      const int n = n_rows - row < 2 * TILE ? n_rows - row : 2 * TILE;
      configure(n);
      for (int column = 0; column < width; column += 2 * TILE) {
        const auto add_tiles = n > TILE ? width - column > TILE ? add<2, 2> : add<2, 1>
                                        : width - column > TILE ? add<1, 2> : add<1, 1>;
        add_tiles(static_cast<const char*>(a.data) + row * strides.a,
                  static_cast<const char*>(b.data) + column * 4, n_pairs, is_first,
                  reinterpret_cast<char*>(c + column) + row * strides.c, strides,
                  column == 0 ? static_cast<const char*>(ahead) : nullptr);
      }
    }
    asm volatile("" ::: "memory");
  }

 private:
  struct Strides { int64_t a, b, c; };  // bytes

  struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_size[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t n_rows[16] = {};
  };

  int n_configured = 0;  // rows of two tiles, of which the first is whole or the only one

  void configure(int n_rows) {
    if (n_rows == TILE) n_rows = 2 * TILE;
    if (n_rows == n_configured) return;
    n_configured = n_rows;
    const uint8_t first = n_rows < TILE ? n_rows : TILE, second = n_rows < TILE ? 1 : n_rows - TILE;
    const Configuration wanted{.n_rows = {first, first, second, second, first, second, TILE, TILE}};
    _tile_loadconfig(&wanted);
  }

  // m x n tiles of c.
  template <int m, int n>
  static void add(const char* a, const char* b, int n_pairs, bool is_first, char* c,
                  const Strides& strides, const char* ahead) {
    const char* below = a + TILE * strides.a;
    char* c_below = c + TILE * strides.c;
    if (is_first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, c, strides.c);
      if constexpr (n > 1) _tile_loadd(1, c + 64, strides.c);
      if constexpr (m > 1) _tile_loadd(2, c_below, strides.c);
      if constexpr (m > 1 && n > 1) _tile_loadd(3, c_below + 64, strides.c);
    }
    for (int k = 0; k < n_pairs; k += TILE, a += 64, below += 64, b += TILE * strides.b) {
      for (int r = 0; ahead && r < m * TILE; ++r) __builtin_prefetch(ahead + 4 * k + r * strides.a);
      _tile_loadd(4, a, strides.a);
      _tile_loadd(6, b, strides.b);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (n > 1) {
        _tile_loadd(7, b + 64, strides.b);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (m > 1) {
        _tile_loadd(5, below, strides.a);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (n > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, strides.c);
    if constexpr (n > 1) _tile_stored(1, c + 64, strides.c);
    if constexpr (m > 1) _tile_stored(2, c_below, strides.c);
    if constexpr (m > 1 && n > 1) _tile_stored(3, c_below + 64, strides.c);
  }
};

}  // namespace

#else

namespace {

constexpr bool has_matrix_unit = false;

struct MatrixUnit {
  void multiply(Factor, int, Factor, int, int, bool, float*, int64_t, const void* = nullptr) {}
};

}  // namespace

#endif
