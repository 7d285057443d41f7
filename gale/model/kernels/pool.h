// A thread pool in which nobody waits for a thread that the system has not given a processor: chunks of work are
// claimed one by one, the caller claims too, and is done when all claimed chunks are. On a busy machine the caller
// simply does everything. (An OpenMP region ends when every thread has been in it, which there takes milliseconds.)
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
inline void relax() { _mm_pause(); }
#else
inline void relax() { std::this_thread::yield(); }
#endif

namespace gale {

class Pool {
 public:
  // Calls work(chunk) once for each of the chunks, on at most `threads` threads, this one among them.
  template <class Work>
  static void run(int chunks, int threads, const Work& work) {
    if (chunks > 1 && threads > 1) {
      Pool& pool = instance();
      std::unique_lock<std::mutex> alone(pool.busy_, std::try_to_lock);
      if (alone.owns_lock()) {  // else another thread's kernels have the workers, and this one works alone
        pool.share(chunks, threads, [](const void* self, int chunk) { (*static_cast<const Work*>(self))(chunk); }, &work);
        return;
      }
    }
    for (int chunk = 0; chunk < chunks; ++chunk) work(chunk);
  }

 private:
  using Call = void (*)(const void*, int);
  static constexpr int kSpins = 20000;  // about half a millisecond: longer than Python needs between two kernels

  static Pool& instance() {
    static std::atomic<Pool*> current{nullptr};
    static std::mutex making;
    Pool* pool = current.load();
    if (pool && pool->process_ == getpid()) return *pool;
    std::lock_guard<std::mutex> lock(making);
    pool = current.load();
    // A forked process has the object but not its threads. The old one is left alone: its locks may be held.
    if (!pool || pool->process_ != getpid()) current.store(pool = new Pool);
    return *pool;
  }

  void share(int chunks, int threads, Call call, const void* work) {
    for (; workers_ < threads - 1; ++workers_) {
      try {
        std::thread([this, number = workers_] { serve(number); }).detach();
      } catch (const std::system_error&) {  // the system gives no more threads: fewer do it too
        break;
      }
    }
    call_ = call;
    work_ = work;
    chunks_ = chunks;
    helpers_ = threads - 1;
    unfinished_.store(chunks, std::memory_order_relaxed);
    // Upper half: which round; lower half: chunks that nobody has claimed.
    uint64_t round = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(round << 32 | uint32_t(chunks));
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    while (claim_one()) {
    }
    for (int spins = 0; unfinished_.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < kSpins) relax();
      else std::this_thread::yield();
    }
  }

  // A claimed chunk keeps the round from ending, so what belongs to the round may be read after claiming only.
  bool claim_one() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    do {
      if (uint32_t(ticket) == 0) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel));
    call_(work_, chunks_ - int(uint32_t(ticket)));
    unfinished_.fetch_sub(1, std::memory_order_release);
    return true;
  }

  void serve(int number) {
    for (;;) {
      for (int spins = 0; spins < kSpins; ++spins) {
        if (number < helpers_.load(std::memory_order_relaxed) && claim_one()) spins = 0;
        relax();
      }
      std::unique_lock<std::mutex> lock(sleep_);
      ++sleepers_;
      wake_.wait(lock, [this, number] { return uint32_t(ticket_.load()) > 0 && number < helpers_; });
      --sleepers_;
    }
  }

  const pid_t process_ = getpid();
  std::mutex busy_;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<int> helpers_{0};
  int workers_ = 0, chunks_ = 0;
  Call call_ = nullptr;
  const void* work_ = nullptr;
  std::mutex sleep_;
  std::condition_variable wake_;
};

// work(row) for rows of `size` numbers, so many at once that they are worth handing to another thread.
template <class Work>
void over_rows(int rows, int size, int threads, const Work& work) {
  const int at_once = std::max(1, 16384 / std::max(1, size));
  Pool::run((rows + at_once - 1) / at_once, threads, [&](int chunk) {
    for (int row = chunk * at_once; row < std::min(rows, (chunk + 1) * at_once); ++row) work(row);
  });
}

}  // namespace gale
