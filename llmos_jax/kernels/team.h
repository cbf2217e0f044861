// Threads that share one kernel's work, on XLA's own pool.
//
// The caller always works, and never waits for a task that has not begun: a pool that
// is busy (or is the one that the caller came from) delays nobody. A helper that has
// joined stays for a while and spins for the next job, because a decode step is a
// hundred short kernels and waking a thread costs as much as one of them.

#ifndef LLMOS_JAX_KERNELS_TEAM_H_
#define LLMOS_JAX_KERNELS_TEAM_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define LLMOS_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define LLMOS_PAUSE() asm volatile("yield")
#else
#define LLMOS_PAUSE()
#endif

namespace llmos {

class Team {
 public:
  // Run body(0) .. body(count - 1), each once, and return when all are done. Tasks
  // are handed out in order, one by one.
  template <typename Body>
  static void run(xla::ffi::ThreadPool& pool, int64_t count, const Body& body) {
    // More threads than cores would only wait for each other.
    static const int64_t cores = std::thread::hardware_concurrency();
    const int64_t threads = std::min(pool.num_threads(), std::max<int64_t>(cores, 1));
    Team& team = instance();
    // One job at a time: a second caller works alone, which is right where calls run
    // side by side already.
    if (count <= 1 || threads <= 1 || !team.busy_.try_lock()) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    std::lock_guard<std::mutex> lock(team.busy_, std::adopt_lock);
    team.lead(pool, threads - 1, count, &body,
              [](const void* what, int64_t i) { (*static_cast<const Body*>(what))(i); });
  }

 private:
  using Call = void (*)(const void*, int64_t);
  static constexpr int64_t kStayNs = 200000;
  static constexpr int64_t kMostHelpers = 63;

  static Team& instance() {
    static Team* team = new Team;  // never destroyed: helpers may outlive main()
    return *team;
  }

  void lead(xla::ffi::ThreadPool& pool, int64_t wanted, int64_t count, const void* body,
            Call call) {
    body_ = body;
    call_ = call;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    open_.store(true, std::memory_order_seq_cst);  // publishes the job
    jobs_.fetch_add(1, std::memory_order_release);
    if (wanted > kMostHelpers) wanted = kMostHelpers;
    for (int64_t there = present_.load(std::memory_order_relaxed); there < wanted; ++there) {
      present_.fetch_add(1, std::memory_order_relaxed);
      pool.Schedule([this] { help(); });
    }
    work();
    // No helper may enter any more; wait for those inside, who all have work.
    open_.store(false, std::memory_order_seq_cst);
    for (int spins = 0; inside_.load(std::memory_order_seq_cst) != 0; ++spins) {
      LLMOS_PAUSE();
      if (spins > 10000) std::this_thread::yield();  // its helper lost the core
    }
  }

  void work() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;)
      call_(body_, i);
  }

  void help() {
    using Clock = std::chrono::steady_clock;
    uint64_t seen = 0;
    auto last = Clock::now();
    for (;;) {
      const uint64_t job = jobs_.load(std::memory_order_acquire);
      if (job != seen) {
        seen = job;
        inside_.fetch_add(1, std::memory_order_seq_cst);
        if (open_.load(std::memory_order_seq_cst)) work();
        inside_.fetch_sub(1, std::memory_order_seq_cst);
        last = Clock::now();
        continue;
      }
      for (int i = 0; i < 32 && jobs_.load(std::memory_order_relaxed) == seen; ++i)
        LLMOS_PAUSE();
      if (Clock::now() - last > std::chrono::nanoseconds(kStayNs)) break;
    }
    present_.fetch_sub(1, std::memory_order_relaxed);
  }

  std::mutex busy_;
  const void* body_ = nullptr;
  Call call_ = nullptr;
  int64_t count_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint64_t> jobs_{0};
  alignas(64) std::atomic<bool> open_{false};
  alignas(64) std::atomic<int64_t> inside_{0};
  alignas(64) std::atomic<int64_t> present_{0};
};

}  // namespace llmos

#endif  // LLMOS_JAX_KERNELS_TEAM_H_
