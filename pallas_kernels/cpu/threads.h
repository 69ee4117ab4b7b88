// Work that is shared with the threads of XLA's own pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace {

// How often a thread asks whether the last items are done before it sleeps, from which it would wake
// some 50 us late.
constexpr int PATIENCE = 200;

// Runs work(i, after) for each i < n: here, and on threads of the pool that come before all is taken;
// `after` is what the same thread will do next, n for nothing. It waits for items that are taken only,
// never for a thread to come: a pool of one thread, or one whose threads all wait like this one, gets
// through as well.
template <class Work>
void in_turns(xla::ffi::ThreadPool& pool, int n, int64_t n_helpers, const Work& work) {
  struct Shared {
    std::atomic<int> next{0}, n_done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto help = [shared, n, &work] {  // who comes late finds nothing to do, and `work` may be gone
    const auto take = [&] { return std::min(shared->next.fetch_add(1), n); };
    for (int i = take(), after; i < n; i = after) {
      after = take();
      work(i, after);
      if (shared->n_done.fetch_add(1) + 1 == n) shared->n_done.notify_all();
    }
  };
  n_helpers = std::min<int64_t>(n_helpers, n - 1);
  for (int64_t i = 0; i < n_helpers; ++i) pool.Schedule(decltype(help)(help));
  help();
  for (int i = 0; i < PATIENCE && shared->n_done.load() < n; ++i) std::this_thread::yield();
  for (int done; (done = shared->n_done.load()) < n;) shared->n_done.wait(done);
}

}  // namespace
