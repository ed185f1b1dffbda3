// Loads and stores of 16 bytes a thread, where the address allows it.
#pragma once

#include "core/cuda/cuda.cuh"

namespace fisherfast {

// kCount neighbours that move as one: 16 bytes at a time where the address is aligned to 16.
template <typename T, int kCount>
struct __align__(kCount == 1 ? sizeof(T) : 16) Vector {
  T entry[kCount];
};

// Numbers in 16 bytes, and these 16 bytes as a thread owns them.
template <typename T>
constexpr int kVectorCount = 16 / static_cast<int>(sizeof(T));
template <typename T>
using Numbers = Vector<T, kVectorCount<T>>;

template <int kCount, typename T>
__device__ inline Vector<T, kCount>& as_vector(T* address) {
  return *reinterpret_cast<Vector<T, kCount>*>(address);
}

template <typename T>
__device__ inline bool aligned_to_vector(const T* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

// `kCount` neighbours of a row of `valid` more entries; those outside are zero.
template <int kCount, typename T>
__device__ inline Vector<T, kCount> load_vector(const T* address, index_t valid) {
  if (kCount > 1 && valid >= kCount && aligned_to_vector(address)) {
    return as_vector<kCount>(const_cast<T*>(address));
  }
  Vector<T, kCount> loaded;
#pragma unroll
  for (int e = 0; e < kCount; ++e) loaded.entry[e] = e < valid ? address[e] : T(0);
  return loaded;
}

// Writes those of `kCount` neighbours that lie in a row of `valid` more entries.
template <int kCount, typename T>
__device__ inline void store_vector(T* address, index_t valid, const Vector<T, kCount>& stored) {
  if (kCount > 1 && valid >= kCount && aligned_to_vector(address)) {
    as_vector<kCount>(address) = stored;
    return;
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if (e < valid) address[e] = stored.entry[e];
  }
}

}  // namespace fisherfast
