// Vectors of LANES floats, and what stored numbers become in them. Included once by each file that is
// compiled per kind of CPU, and all its own: see attention_tile.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define JOINED(name, kind) name##_##kind
#define JOIN(name, kind) JOINED(name, kind)
#define OF_KIND(name) JOIN(name, KIND)  // attend of avx2: attend_avx2

namespace {

constexpr int W = LANES;

typedef float Vector __attribute__((vector_size(4 * W)));
typedef int32_t Integers __attribute__((vector_size(4 * W)));
typedef float LooseVector __attribute__((vector_size(4 * W), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * W), aligned(2)));
typedef int8_t Bytes __attribute__((vector_size(W), aligned(1)));
typedef uint8_t UnsignedBytes __attribute__((vector_size(W), aligned(1)));

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
struct Float8 { uint8_t bits; };  // e4m3fn

Vector splat(float x) { return x - Vector{}; }  // which compilers know to be x, bit for bit

Vector load(const float* p) { return *reinterpret_cast<const LooseVector*>(p); }

void store(float* p, Vector x) { *reinterpret_cast<LooseVector*>(p) = x; }

// One instruction where gcc makes five of __builtin_convertvector.
Integers widen(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Integers)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Integers)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Integers);
#endif
}

Vector load(const Bfloat16* p) { return (Vector)(widen(&p->bits) << 16); }

Vector load(const int8_t* p) {
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Vector);
}

// Floats of `exponent` and `mantissa` bits, with subnormals. Not by a float32 subnormal times a
// power of two: XLA's threads flush those to zero.
template <int exponent, int mantissa>
Vector small_floats(Integers bits) {
  constexpr int bias = (1 << (exponent - 1)) - 1;
  const Integers size = bits & ((1 << (exponent + mantissa)) - 1);
  const Integers sign = (bits >> (exponent + mantissa)) << 31;
  const Vector normal = (Vector)((size << (23 - mantissa)) + ((127 - bias) << 23));
  const Vector subnormal = __builtin_convertvector(size, Vector) *
                           (1.0f / (int64_t{1} << (bias - 1 + mantissa)));
  return (Vector)((Integers)(size < (1 << mantissa) ? subnormal : normal) | sign);
}

Vector load(const Float16* p) {
  const Integers bits = widen(&p->bits);
  const Integers special = ((bits & 0x3ff) << 13) | ((bits >> 15) << 31) | 0x7f800000;
  return (bits & 0x7c00) == 0x7c00 ? (Vector)special : small_floats<5, 10>(bits);
}

Vector load(const Float8* p) {
  const auto bits =
      __builtin_convertvector(*reinterpret_cast<const UnsignedBytes*>(p), Integers);
  const Vector nan = splat(NAN);
  return (bits & 0x7f) == 0x7f ? nan : small_floats<4, 3>(bits);
}

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif
template <int... I> struct Lanes {};
template <int n, int... I> struct Count : Count<n - 1, n - 1, I...> {};
template <int... I> struct Count<0, I...> { using type = Lanes<I...>; };
using AllLanes = typename Count<W>::type;

// Lane i: a[i], but b[i ^ s] where bit s of i is set. With `other`, what is left over.
template <int s, bool other, int... I>
Vector swapped(Vector a, Vector b, Lanes<I...>) {
  if constexpr (other) return PICK(a, b, ((I & s) ? W + I : I ^ s)...);
  return PICK(a, b, ((I & s) ? W + (I ^ s) : I)...);
}

template <int s = W / 2>
inline __attribute__((always_inline)) void transpose(Vector (&x)[W]) {
  for (int i = 0; i < W; ++i) {
    if (i & s) continue;
    const Vector a = x[i], b = x[i | s];
    x[i] = swapped<s, false>(a, b, AllLanes{});
    x[i | s] = swapped<s, true>(a, b, AllLanes{});
  }
  if constexpr (s > 1) transpose<s / 2>(x);
}

// Lane i: the sum of the lanes of x[i].
template <int s = W / 2>
inline __attribute__((always_inline)) Vector sums(Vector (&x)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < s; ++i) {
    const Vector a = x[i], b = x[i | s];
    // Where bit s of the lane is set the sum is of b's lanes.
    x[i] = swapped<s, false>(a, b, AllLanes{}) + swapped<s, true>(a, b, AllLanes{});
  }
  if constexpr (s > 1) return sums<s / 2>(x);
  return x[0];
}

// W cells of a row, or zeros behind its end.
template <class T>
Vector load_part(const T* row, int column, int size) {
  if (column + W <= size) return load(row + column);
  T part[W] = {};
  if (column < size) memcpy(part, row + column, (size - column) * sizeof(T));
  return load(part);
}

void store_part(float* row, int column, int size, Vector x) {
  if (column + W <= size) return store(row + column, x);
  if (column < size) memcpy(row + column, &x, (size - column) * sizeof(float));
}

constexpr float LOG2E = 1.44269504f;

// 2^x to 1e-7, and 0 below -127; NaN stays NaN. x <= 127.
Vector exp2(Vector x) {
  const Vector kept = x < -127.0f ? splat(-127.0f) : x;
  const Vector magic = splat(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded
  const Vector whole = (kept + magic) - magic;
  const Vector f = kept - whole;  // -0.5 .. 0.5
  Vector y = splat(1.54035304e-4f);
  y = y * f + 1.33335581e-3f;
  y = y * f + 9.61812911e-3f;
  y = y * f + 5.55041087e-2f;
  y = y * f + 2.40226507e-1f;
  y = y * f + 6.93147181e-1f;
  y = y * f + 1.0f;
  const Integers power = (__builtin_convertvector(whole, Integers) + 127) << 23;  // 0 of -127
  return y * (Vector)power;
}

// What a lane of both factors is: a float, or two bfloat16 whose products are summed.
struct Floats {
  static constexpr int CACHE = 3;  // that what is wanted next had better come to: the first
  static Vector add(Vector sum, Vector a, Vector b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int CACHE = 2;  // the second: the first has too few places for lines on their way
  static Vector add(Vector sum, Vector a, Vector b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static Vector pack(Vector low, Vector high) {
    return (Vector)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }
};
constexpr bool has_pairs = true;
#else
struct Pairs : Floats {
  static Vector pack(Vector low, Vector) { return low; }
};
constexpr bool has_pairs = false;
#endif

}  // namespace
