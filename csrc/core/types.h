// Types and markers shared by host and device code.
#pragma once

#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define FF_HOST_DEVICE __host__ __device__
#else
#define FF_HOST_DEVICE
#endif

namespace fisherfast {

// Every size, stride and offset. 64 bits: [B, d, d] passes 2^31 elements easily.
using index_t = std::int64_t;

// std::numeric_limits as constants: device code may read these, but not call the functions.
template <typename T>
inline constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
template <typename T>
inline constexpr T kLargest = std::numeric_limits<T>::max();

FF_HOST_DEVICE constexpr index_t ceil_div(index_t numerator, index_t denominator) {
  return (numerator + denominator - 1) / denominator;
}

}  // namespace fisherfast
