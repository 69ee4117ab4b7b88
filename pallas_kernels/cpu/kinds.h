// Kinds of CPU, numbered as build.py orders them; the last one that this CPU is of is the best.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
constexpr int N_KINDS = 4;
#define OF_ALL_KINDS(name) {name##_any, name##_avx2, name##_avx512, name##_avx512bf16}
#else
constexpr int N_KINDS = 1;
#define OF_ALL_KINDS(name) {name##_any}
#endif

namespace {

bool is_of_kind(int kind) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (kind == 1) return has_avx2;
  if (kind == 2) return has_avx512;
  if (kind == 3) return has_avx512 && __builtin_cpu_supports("avx512bf16");
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
