// CUDA for a host compiler, for tests alone: the words of the language, the thread's own indices,
// barriers, warp exchanges and the small part of the runtime that csrc/ uses. A .cu file compiled
// with -DFISHERFAST_CUDA_HOST finds this file in place of the toolkit's; scheduler.cpp runs its
// kernels block by block.
//
// What stands for the memory of a block:
//   __shared__ x            a thread-local variable: the executable has no other ones, so that the
//                           harness finds all of them in one piece and fills it before each block
//   FF_DYNAMIC_SHARED(x)    a heap allocation of exactly the bytes of the launch
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

// --- words of the language -----------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct __align__(8) float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct __align__(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

extern uint3 threadIdx, blockIdx;  // of the thread that runs now
extern dim3 blockDim, gridDim;

using std::max;
using std::min;
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}

// One thread runs at a time, so that plain additions are atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T former = *address;
  *address += value;
  return former;
}

// --- barriers and warp exchanges -----------------------------------------------------------------

namespace cuda_host {

constexpr unsigned kWarp = 32;
constexpr std::size_t kLargestValue = 16;  // bytes that one exchange carries

unsigned lane();
unsigned char* dynamic_shared();

// Ends the turn of the thread until every thread of the block waits at this line.
void barrier(int line);

// Ends the turn of the lane until all lanes of `mask` wait at this line; then `received` holds what
// the lane `source` sent, and the bits of the lanes whose vote is true are returned.
unsigned exchange(int line, unsigned mask, unsigned source, const void* sent, void* received,
                  std::size_t bytes, bool vote);

// The operations that need their line in the source: what threads wait for has to be the same.
class Line {
 public:
  explicit Line(int line) : line_(line) {}

  void sync_warp(unsigned mask = 0xffffffffu) const { vote(mask, false); }
  unsigned ballot(unsigned mask, bool predicate) const { return vote(mask, predicate); }
  bool any(unsigned mask, bool predicate) const { return vote(mask, predicate) != 0; }
  bool all(unsigned mask, bool predicate) const { return vote(mask, predicate) == mask; }

  template <typename T>
  T shuffle(unsigned mask, T value, int source, int width = kWarp) const {
    return take(mask, value, first(width) + source % width);
  }
  template <typename T>
  T shuffle_up(unsigned mask, T value, unsigned delta, int width = kWarp) const {
    return take(mask, value, lane() >= first(width) + delta ? lane() - delta : lane());
  }
  template <typename T>
  T shuffle_down(unsigned mask, T value, unsigned delta, int width = kWarp) const {
    return take(mask, value, lane() + delta < first(width) + width ? lane() + delta : lane());
  }
  template <typename T>
  T shuffle_xor(unsigned mask, T value, unsigned bits, int width = kWarp) const {
    const unsigned source = lane() ^ bits;
    return take(mask, value, source < first(width) + width ? source : lane());
  }

 private:
  static unsigned first(int width) { return lane() / width * width; }
  unsigned vote(unsigned mask, bool predicate) const {
    return exchange(line_, mask, lane(), nullptr, nullptr, 0, predicate);
  }
  template <typename T>
  T take(unsigned mask, T value, unsigned source) const {
    static_assert(sizeof(T) <= kLargestValue && std::is_trivially_copyable_v<T>);
    T received;
    exchange(line_, mask, source, &value, &received, sizeof(T), false);
    return received;
  }
  int line_;
};

// Runs `thread` once for every thread of every block. Throws std::runtime_error, with the name of
// the kernel, when threads wait for each other in vain. A launch that a card would refuse does not
// run; cudaGetLastError tells.
void launch(const char* kernel, const void* function, dim3 grid, dim3 block, std::size_t bytes,
            const std::function<void()>& thread);

}  // namespace cuda_host

#define __syncthreads() ::cuda_host::barrier(__LINE__)
#define __syncwarp(...) ::cuda_host::Line(__LINE__).sync_warp(__VA_ARGS__)
#define __ballot_sync(...) ::cuda_host::Line(__LINE__).ballot(__VA_ARGS__)
#define __any_sync(...) ::cuda_host::Line(__LINE__).any(__VA_ARGS__)
#define __all_sync(...) ::cuda_host::Line(__LINE__).all(__VA_ARGS__)
#define __shfl_sync(...) ::cuda_host::Line(__LINE__).shuffle(__VA_ARGS__)
#define __shfl_up_sync(...) ::cuda_host::Line(__LINE__).shuffle_up(__VA_ARGS__)
#define __shfl_down_sync(...) ::cuda_host::Line(__LINE__).shuffle_down(__VA_ARGS__)
#define __shfl_xor_sync(...) ::cuda_host::Line(__LINE__).shuffle_xor(__VA_ARGS__)

// --- the runtime ---------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMultiProcessorCount
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct CudaHostStream*;

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* address, int byte, std::size_t bytes, cudaStream_t stream);
cudaError_t cuda_host_set_attribute(const void* function, cudaFuncAttribute attribute, int value);

template <typename Function>
cudaError_t cudaFuncSetAttribute(Function* function, cudaFuncAttribute attribute, int value) {
  return cuda_host_set_attribute(reinterpret_cast<const void*>(function), attribute, value);
}
