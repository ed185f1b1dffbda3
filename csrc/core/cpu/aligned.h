// Scratch memory on the boundary of a cache line, without initial values.
#pragma once

#include <memory>
#include <new>

#include "core/types.h"

namespace fisherfast {

inline constexpr std::size_t kCacheLine = 64;

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{kCacheLine}); }
};

template <typename T>
using AlignedArray = std::unique_ptr<T[], AlignedDelete>;

// Throws std::bad_alloc. T is a number: it has neither constructor nor destructor.
template <typename T>
AlignedArray<T> aligned_array(index_t size) {
  const std::size_t bytes = static_cast<std::size_t>(size) * sizeof(T);
  return AlignedArray<T>(static_cast<T*>(::operator new(bytes, std::align_val_t{kCacheLine})));
}

}  // namespace fisherfast
