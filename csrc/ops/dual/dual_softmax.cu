// CUDA kernels: a row in the registers of a warp or a block while its tangents pass by; wider rows
// are walked along by a block, and rows that are columns in memory by a thread each.
#include <cmath>
#include <limits>

#include "core/cuda/cuda.cuh"
#include "core/cuda/row_team.cuh"
#include "core/cuda/vector.cuh"
#include "ops/dual/dual_softmax.h"

namespace fisherfast {
namespace {

constexpr int kTangents = 4;  // that are summed together along a row that is walked

template <typename T>
constexpr T kBelowAll = -std::numeric_limits<T>::infinity();

// Team (warp or block): one row of the primal in registers, in turn, and one tangent after the
// other. Reads and writes are coalesced, 16 bytes a thread where aligned; moves 2 (1 + P) numbers
// for each primal number, with one exponential and about 3 P multiply-adds.
template <typename T, typename R>
__global__ void __launch_bounds__(kRowThreads) dual_softmax_kernel(DualSoftmaxArgs<T> args) {
  const index_t width = args.width;
  for (index_t i = first_team_row(); i < args.outer; i += team_row_step()) {
    R s, v;
    v.load(args.x + i * width, width);
    T largest[1] = {kBelowAll<T>}, sum[1] = {T(0)};
    R::for_each(width, [&](int slot) { largest[0] = Largest()(largest[0], v[slot]); });
    join_team<R::kTeam>(largest, Largest());
    R::for_each(width, [&](int slot) {
      v[slot] -= largest[0];
      s[slot] = std::exp(v[slot]);
      sum[0] += s[slot];
    });
    join_team<R::kTeam>(sum, Add());
    const T inverse = T(1) / sum[0], log_sum = std::log(sum[0]);
    R::for_each(width, [&](int slot) {
      s[slot] *= inverse;
      v[slot] = args.log ? v[slot] - log_sum : s[slot];
    });
    v.store(args.y + i * width, width);
    for (index_t p = 1; p <= args.tangents; ++p) {
      v.load(args.x + p * args.slice_stride + i * width, width);
      T product[1] = {T(0)};
      R::for_each(width, [&](int slot) { product[0] += s[slot] * v[slot]; });
      join_team<R::kTeam>(product, Add());
      R::for_each(width, [&](int slot) {
        const T difference = v[slot] - product[0];
        v[slot] = args.log ? difference : s[slot] * difference;
      });
      v.store(args.y + (p * args.outer + i) * width, width);
    }
  }
}

// How a thread walks along a row of numbers that lie `inner` apart: kCount neighbours (of a row
// with inner = 1) at j, j + step, ...
template <typename T, int kTeam, int kCount>
struct Walk {
  index_t width, inner;

  // f(offset from the first number of the row, numbers that are left there)
  template <typename Function>
  __device__ void for_each(Function f) const {
    for (index_t j = threadIdx.x * kCount; j < width; j += kTeam * kCount) f(j * inner, width - j);
  }
};

template <typename T, int kTeam, int kCount>
__device__ T largest_of(const Walk<T, kTeam, kCount>& walk, const T* u) {
  T largest[1] = {kBelowAll<T>};
  walk.for_each([&](index_t offset, index_t valid) {
    const Vector<T, kCount> own = load_vector<kCount>(u + offset, valid);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (e < valid) largest[0] = Largest()(largest[0], own.entry[e]);
    }
  });
  join_team<kTeam>(largest, Largest());
  return largest[0];
}

// exp(u - largest); zero after the end of the row.
template <typename T, int kCount>
__device__ Vector<T, kCount> exponentials(const T* u, index_t valid, T largest) {
  Vector<T, kCount> e = load_vector<kCount>(u, valid);
#pragma unroll
  for (int k = 0; k < kCount; ++k) e.entry[k] = k < valid ? std::exp(e.entry[k] - largest) : T(0);
  return e;
}

// The sums of e = exp(u - largest) and of e v for kTangents tangents.
struct Sums {
  double values[1 + kTangents];
};

// Sixteen bytes are summed in T, those sums in double.
template <typename T, int kTeam, int kCount>
__device__ Sums sums_of(const Walk<T, kTeam, kCount>& walk, const T* u, const T* v,
                        index_t slice_stride, T largest, index_t tangents) {
  Sums sums{};
  walk.for_each([&](index_t offset, index_t valid) {
    const Vector<T, kCount> e = exponentials<T, kCount>(u + offset, valid, largest);
    T part = T(0);
#pragma unroll
    for (int k = 0; k < kCount; ++k) part += e.entry[k];
    sums.values[0] += static_cast<double>(part);
#pragma unroll
    for (int p = 0; p < kTangents; ++p) {
      if (p >= tangents) break;
      const Vector<T, kCount> own = load_vector<kCount>(v + p * slice_stride + offset, valid);
      T product = T(0);
#pragma unroll
      for (int k = 0; k < kCount; ++k) product += e.entry[k] * own.entry[k];
      sums.values[1 + p] += static_cast<double>(product);
    }
  });
  join_team<kTeam>(sums.values, Add());
  return sums;
}

// Writes tangents [begin, begin + tangents) of the row at `start`, and the value with the last of
// them: until then the primal is read again, also when y is x.
template <typename T, int kTeam, int kCount>
__device__ void write_row(const DualSoftmaxArgs<T>& args, const Walk<T, kTeam, kCount>& walk,
                          index_t start, index_t begin, index_t tangents, T largest,
                          const Sums& sums) {
  const index_t size = args.outer * args.width * args.inner;
  const T inverse = static_cast<T>(1.0 / sums.values[0]);
  const T log_sum = static_cast<T>(std::log(sums.values[0]));
  T means[kTangents];
#pragma unroll
  for (int p = 0; p < kTangents; ++p) {
    means[p] = static_cast<T>(sums.values[1 + p] / sums.values[0]);
  }
  walk.for_each([&](index_t offset, index_t valid) {
    const index_t place = start + offset;
    Vector<T, kCount> s = exponentials<T, kCount>(args.x + place, valid, largest);
#pragma unroll
    for (int k = 0; k < kCount; ++k) s.entry[k] *= inverse;
#pragma unroll
    for (int p = 0; p < kTangents; ++p) {
      if (p >= tangents) break;
      const index_t slice = 1 + begin + p;
      Vector<T, kCount> v = load_vector<kCount>(args.x + slice * args.slice_stride + place, valid);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const T difference = v.entry[k] - means[p];
        v.entry[k] = args.log ? difference : s.entry[k] * difference;
      }
      store_vector(args.y + slice * size + place, valid, v);
    }
    if (begin + tangents < args.tangents) return;
    if (args.log) {
      s = load_vector<kCount>(args.x + place, valid);
#pragma unroll
      for (int k = 0; k < kCount; ++k) s.entry[k] = s.entry[k] - largest - log_sum;
    }
    store_vector(args.y + place, valid, s);
  });
}

// Team: one row, in turn; a block along a row that is contiguous (kCount numbers of it in 16
// bytes), or a thread along one whose numbers lie inner > 1 apart, neighbouring threads on
// neighbouring rows. Either way reads and writes are coalesced. A row is read once for its largest
// number and twice more for every kTangents tangents (sums, results), which are read twice: for
// P <= 4 that moves 3 + 2 P + (1 + P) numbers for each primal number, what is read again mostly
// through the cache, with two exponentials. A thread reads what it writes and nothing else.
template <typename T, int kTeam, int kCount>
__global__ void __launch_bounds__(kRowThreads) dual_softmax_walk_kernel(DualSoftmaxArgs<T> args) {
  const Walk<T, kTeam, kCount> walk{args.width, args.inner};
  for (index_t i = first_team_row(); i < args.outer * args.inner; i += team_row_step()) {
    const index_t o = i / args.inner;
    const index_t start = o * args.width * args.inner + (i - o * args.inner);
    const T* u = args.x + start;
    const T largest = largest_of(walk, u);
    for (index_t begin = 0; begin == 0 || begin < args.tangents; begin += kTangents) {
      const index_t rest = args.tangents - begin, tangents = rest < kTangents ? rest : kTangents;
      const Sums sums = sums_of(walk, u, u + (1 + begin) * args.slice_stride, args.slice_stride,
                                largest, tangents);
      write_row(args, walk, start, begin, tangents, largest, sums);
    }
  }
}

template <typename T, int kTeam, int kCount>
void launch_walk(const DualSoftmaxArgs<T>& args, void* stream) {
  FF_LAUNCH((dual_softmax_walk_kernel<T, kTeam, kCount>), team_grid<kTeam>(args.outer * args.inner),
            team_block<kTeam>(), 0, stream, args);
}

}  // namespace

template <typename T>
void dual_softmax_cuda(const DualSoftmaxArgs<T>& args, int device, void* stream) {
  if (args.outer * args.width * args.inner == 0) return;
  const DeviceGuard guard(device);
  if (args.inner > 1) return launch_walk<T, 1, 1>(args, stream);
  const bool held = with_row_in_registers<T>(args.width, [&](auto row) {
    using R = decltype(row);
    FF_LAUNCH((dual_softmax_kernel<T, R>), team_grid<R::kTeam>(args.outer), team_block<R::kTeam>(),
              0, stream, args);
  });
  if (!held) launch_walk<T, kRowThreads, kVectorCount<T>>(args, stream);
}

template void dual_softmax_cuda(const DualSoftmaxArgs<float>&, int, void*);
template void dual_softmax_cuda(const DualSoftmaxArgs<double>&, int, void*);

}  // namespace fisherfast
