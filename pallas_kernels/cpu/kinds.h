// Kinds of CPU, numbered as build.py orders them; the last one that this CPU is of is the best.
#pragma once

#include <cstdint>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
constexpr int N_KINDS = 5;
#define OF_ALL_KINDS(name) \
  {name##_any, name##_avx2, name##_avx512, name##_avx512bf16, name##_amx}
#else
constexpr int N_KINDS = 1;
#define OF_ALL_KINDS(name) {name##_any}
#endif

constexpr int AMX = 4;

namespace {

// Whether the CPU has the matrix unit for bfloat16, and Linux lets this process use it.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM: Documentation/arch/x86/xstate.rst
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool has_tiles = d >> 24 & 1, has_bfloat16 = d >> 22 & 1;
  return has_tiles && has_bfloat16 && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}

bool is_of_kind(int kind) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (kind == 1) return has_avx2;
  if (kind == 2) return has_avx512;
  const bool has_bfloat16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (kind == 3) return has_bfloat16;
  if (kind == AMX) return has_bfloat16 && has_amx();
#endif
  return kind == 0;
}

// The kind asked for, with -1 the best one here; -1: this CPU is not of it.
int find_kind(int64_t wanted) {
  static const int best = [] {
    int kind = N_KINDS - 1;
    while (!is_of_kind(kind)) --kind;
    return kind;
  }();
  if (wanted == -1) return best;
  return wanted >= 0 && wanted < N_KINDS && is_of_kind(wanted) ? wanted : -1;
}

}  // namespace
