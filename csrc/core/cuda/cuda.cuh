// What every launcher needs: device guard, error check, the one launch macro, thread indices.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/types.h"

namespace fisherfast {

// Throws std::runtime_error with the name of the call and the text of the CUDA error.
inline void check_cuda(cudaError_t error, const char* call) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(call) + " must succeed, got " + cudaGetErrorString(error));
  }
}

// Makes `device` current, and the former device again at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&former_), "cudaGetDevice");
    if (device != former_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != former_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

// Largest grids: CUDA C++ Programming Guide, compute capabilities. Tests on a host compiler lower
// them, so that a block has to take several turns.
#ifdef FISHERFAST_CUDA_HOST
inline index_t kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;
#else
constexpr index_t kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;
#endif

inline unsigned grid_x(index_t blocks) {
  return static_cast<unsigned>(std::min(blocks, kMaxGridX));
}
inline unsigned grid_yz(index_t blocks) {
  return static_cast<unsigned>(std::min(blocks, kMaxGridYZ));
}

__device__ inline index_t global_thread() {
  return static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline index_t global_threads() { return static_cast<index_t>(gridDim.x) * blockDim.x; }
__device__ inline index_t thread_in_block() {
  return static_cast<index_t>(threadIdx.y) * blockDim.x + threadIdx.x;
}
__device__ inline index_t threads_in_block() {
  return static_cast<index_t>(blockDim.x) * blockDim.y;
}

}  // namespace fisherfast

// Every kernel of the library is launched here:
//   FF_LAUNCH((kernel<T>), grid, block, shared_bytes, stream, arguments...);
// `stream` is the void* that came from Python. Throws when the launch fails. A kernel names its
// dynamic shared memory with FF_DYNAMIC_SHARED(name): bytes, aligned to 16.
//
// FISHERFAST_CUDA_HOST is set by tests that run the kernels on a host compiler's threads.
#ifdef FISHERFAST_CUDA_HOST
#define FF_RUN(kernel, grid, block, shared_bytes, stream, ...)                         \
  ::cuda_host::launch(#kernel, reinterpret_cast<const void*>(kernel), (grid), (block), \
                      (shared_bytes), [&] { (kernel)(__VA_ARGS__); });                 \
  static_cast<void>(stream)
#define FF_DYNAMIC_SHARED(name) unsigned char* const name = ::cuda_host::dynamic_shared()
#else
#define FF_RUN(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define FF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#define FF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)       \
  do {                                                                  \
    FF_RUN(kernel, grid, block, shared_bytes, stream, __VA_ARGS__);     \
    ::fisherfast::check_cuda(cudaGetLastError(), "launch of " #kernel); \
  } while (false)
