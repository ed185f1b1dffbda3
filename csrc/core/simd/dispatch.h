// The instruction set of the CPU kernels: read from the processor once, overridden by a name.
//
// A kernel source x.simd.cpp is compiled once per level, each copy in the namespace of its level.
// Its functions are declared with FF_DECLARE_SIMD and called with FF_CALL_SIMD, which picks the
// copy at run time.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "core/cpu/check.h"
#include "core/types.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FF_X86_LEVELS 1
#endif

namespace fisherfast {

enum class SimdLevel { kBaseline, kAvx2, kAvx512 };

inline const char* simd_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::kAvx512:
      return "avx512";
    case SimdLevel::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

// The levels that this processor runs, the widest last.
inline std::vector<SimdLevel> simd_levels() {
  std::vector<SimdLevel> levels{SimdLevel::kBaseline};
#ifdef FF_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    levels.push_back(SimdLevel::kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
      levels.push_back(SimdLevel::kAvx512);
    }
  }
#endif
  return levels;
}

// The level in use. A change while another thread runs a kernel reaches its next call.
inline std::atomic<SimdLevel>& simd_level_in_use() {
  static std::atomic<SimdLevel> level{simd_levels().back()};
  return level;
}
inline SimdLevel simd_level() { return simd_level_in_use().load(std::memory_order_relaxed); }

inline std::vector<std::string> simd_names() {
  std::vector<std::string> names;
  for (const SimdLevel level : simd_levels()) names.push_back(simd_name(level));
  return names;
}

// Throws std::invalid_argument for a name that this processor does not run.
inline void use_simd(const std::string& name) {
  std::string choices;
  for (const SimdLevel level : simd_levels()) {
    if (name == simd_name(level)) {
      simd_level_in_use().store(level);
      return;
    }
    choices += std::string(choices.empty() ? "" : ", ") + simd_name(level);
  }
  FF_CHECK(false, "the instruction set must be one of " << choices << " here, got " << name);
}

// Lanes of T in a vector of a level.
template <typename T>
index_t simd_lanes(SimdLevel level) {
  constexpr index_t kBaselineBytes = 16;  // SSE2, NEON
  return (kBaselineBytes << static_cast<int>(level)) / static_cast<index_t>(sizeof(T));
}

}  // namespace fisherfast

#ifdef FF_X86_LEVELS
// FF_DECLARE_SIMD(template <typename T> void f(T*);)
#define FF_DECLARE_SIMD(...) \
  namespace baseline {       \
  __VA_ARGS__                \
  }                          \
  namespace avx2 {           \
  __VA_ARGS__                \
  }                          \
  namespace avx512 {         \
  __VA_ARGS__                \
  }
// FF_CALL_SIMD(level, f<T>, argument, ...)
#define FF_CALL_SIMD(level, function, ...)                \
  ((level) == ::fisherfast::SimdLevel::kAvx512            \
       ? ::fisherfast::avx512::function(__VA_ARGS__)      \
       : ((level) == ::fisherfast::SimdLevel::kAvx2       \
              ? ::fisherfast::avx2::function(__VA_ARGS__) \
              : ::fisherfast::baseline::function(__VA_ARGS__)))
#else
#define FF_DECLARE_SIMD(...) \
  namespace baseline {       \
  __VA_ARGS__                \
  }
#define FF_CALL_SIMD(level, function, ...) ::fisherfast::baseline::function(__VA_ARGS__)
#endif
