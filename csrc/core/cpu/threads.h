// The threads of a kernel: torch's own OpenMP pool where it is libgomp, elsewhere threads started
// for the call.
//
// A second pool would compete with the first one for the cores: the workers of libgomp spin for
// milliseconds after each region of torch. Its functions are looked up in the library that torch
// has loaded (nothing is linked), the number of threads comes with every call, and no setting is
// changed. A forked child has no workers: there the pool is not used.
#pragma once

#include <system_error>
#include <thread>
#include <vector>

#include "core/types.h"

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <string>
#endif

namespace fisherfast {

// The three functions of libgomp that are used; null without it.
struct BorrowedPool {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*rank)() = nullptr;
  int (*size)() = nullptr;

  explicit operator bool() const { return parallel != nullptr; }
};

inline BorrowedPool& borrowed_pool() {
  static BorrowedPool pool;
  return pool;
}

#ifdef __linux__
// The path of a loaded libgomp, that of torch first; empty without one.
inline std::string loaded_libgomp() {
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* object, std::size_t, void* found) {
        const std::string name = object->dlpi_name;
        std::string& best = *static_cast<std::string*>(found);
        if (name.find("libgomp") == std::string::npos) return 0;
        if (best.empty() || name.find("torch") != std::string::npos) best = name;
        return 0;
      },
      &path);
  return path;
}

// Called once, when the module is imported after torch. Returns whether there is a pool now.
inline bool borrow_threads() {
  const std::string path = loaded_libgomp();
  void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return false;
  BorrowedPool pool;
  pool.parallel = reinterpret_cast<decltype(pool.parallel)>(dlsym(library, "GOMP_parallel"));
  pool.rank = reinterpret_cast<decltype(pool.rank)>(dlsym(library, "omp_get_thread_num"));
  pool.size = reinterpret_cast<decltype(pool.size)>(dlsym(library, "omp_get_num_threads"));
  if (pool.parallel == nullptr || pool.rank == nullptr || pool.size == nullptr) return false;
  if (pthread_atfork(nullptr, nullptr, [] { borrowed_pool() = BorrowedPool(); }) != 0) return false;
  borrowed_pool() = pool;
  return true;
}
#else
inline bool borrow_threads() { return false; }
#endif

// Calls body() on up to `threads` threads at once, this one among them; it must not throw.
template <typename Body>
void run_on_threads(index_t threads, const Body& body) {
  if (threads <= 1) {
    body();
    return;
  }
  if (const BorrowedPool pool = borrowed_pool()) {
    const auto call = [](void* data) { (*static_cast<const Body*>(data))(); };
    pool.parallel(call, const_cast<Body*>(&body), static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> workers;
  workers.reserve(threads - 1);
  try {
    for (index_t i = 1; i < threads; ++i) workers.emplace_back([&body]() noexcept { body(); });
  } catch (const std::system_error&) {  // no more threads: the ones started do the work
  }
  body();
  for (std::thread& worker : workers) worker.join();
}

}  // namespace fisherfast
