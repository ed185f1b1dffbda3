// CUDA kernels: a row in the registers of a warp or a block while its tangents pass by; wider rows
// are walked along by a block, the sums of primal and tangents together.
#include <cmath>

#include "core/cuda/cuda.cuh"
#include "core/cuda/row_team.cuh"
#include "core/cuda/vector.cuh"
#include "ops/dual/dual_norm.h"

namespace fisherfast {
namespace {

constexpr int kTangents = 4;  // of a long row that are summed together

// h = rate (d - shift) with d = u - mean. The mean is rounded to T; what it lacks is the shift, so
// that a mean far above the deviations costs no digit.
template <typename T>
struct Normal {
  T mean, shift, rate;
};

// From the sums of d and of d^2 over a row.
template <typename T, typename S>
__device__ Normal<T> normal_of(const DualNormArgs<T>& args, T mean, S sum, S squares) {
  const S width = static_cast<S>(args.width);
  const S shift = args.centre ? sum / width : S(0);
  const S variance = squares / width - shift * shift;
  const S positive = variance < S(0) ? S(0) : variance;  // a NaN stays
  const S rate = S(1) / std::sqrt(positive + static_cast<S>(args.eps));
  return {mean, static_cast<T>(shift), static_cast<T>(rate)};
}

// Neighbours j, j + 1, ... of the weight or the bias in row i; `otherwise` where there is none.
template <typename T>
__device__ Numbers<T> weights(const DualNormArgs<T>& args, const T* vector, T otherwise, index_t i,
                              index_t j) {
  constexpr int kCount = kVectorCount<T>;
  Numbers<T> loaded;
#pragma unroll
  for (int e = 0; e < kCount; ++e) loaded.entry[e] = otherwise;
  if (vector == nullptr) return loaded;
  const index_t first = i % args.groups * args.width + j, valid = args.width - j;
  if (args.inner == 1) return load_vector<kCount>(vector + first, valid);
  index_t entry = first / args.inner;
  index_t left = (entry + 1) * args.inner - first;  // neighbours that share this entry
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if (e < valid) loaded.entry[e] = vector[entry];
    if (--left == 0) {
      ++entry;
      left = args.inner;
    }
  }
  return loaded;
}

// What the tangents of a row lose: y = w rate (v - mean - h slope).
template <typename T>
struct TangentMeans {
  T mean, slope;  // of v (zero unless centred) and of h v
};

template <typename T>
__device__ Numbers<T> value_of(const DualNormArgs<T>& args, const Numbers<T>& h, index_t i,
                               index_t j) {
  const Numbers<T> w = weights(args, args.weight, T(1), i, j);
  Numbers<T> y = weights(args, args.bias, T(0), i, j);
#pragma unroll
  for (int e = 0; e < kVectorCount<T>; ++e) y.entry[e] += w.entry[e] * h.entry[e];
  return y;
}

template <typename T>
__device__ Numbers<T> tangent_of(const Numbers<T>& w, const Numbers<T>& h, const Numbers<T>& v,
                                 T rate, const TangentMeans<T>& means) {
  Numbers<T> y;
#pragma unroll
  for (int e = 0; e < kVectorCount<T>; ++e) {
    y.entry[e] = w.entry[e] * rate * (v.entry[e] - means.mean - h.entry[e] * means.slope);
  }
  return y;
}

// Team (warp or block): one row of the primal in registers, in turn, and one tangent after the
// other. Reads and writes are coalesced, 16 bytes a thread where aligned; moves 2 (1 + P) numbers
// for each primal number, and does about 4 + 6 P multiply-adds with them.
template <typename T, typename R>
__global__ void __launch_bounds__(kRowThreads) dual_norm_kernel(DualNormArgs<T> args) {
  const index_t width = args.width;
  for (index_t i = first_team_row(); i < args.rows; i += team_row_step()) {
    R h, v;
    h.load(args.x + i * width, width);
    T total[1] = {T(0)}, sums[2] = {T(0), T(0)};
    if (args.centre) {
      R::for_each(width, [&](int slot) { total[0] += h[slot]; });
      join_team<R::kTeam>(total, Add());
    }
    const T mean = total[0] / static_cast<T>(width);
    R::for_each(width, [&](int slot) {
      h[slot] -= mean;
      sums[0] += h[slot];
      sums[1] += h[slot] * h[slot];
    });
    join_team<R::kTeam>(sums, Add());
    const Normal<T> normal = normal_of(args, mean, sums[0], sums[1]);
    R::for_each(width, [&](int slot) { h[slot] = normal.rate * (h[slot] - normal.shift); });
    R::for_each_vector(width, [&](int k, index_t j) {
      store_vector(args.y + i * width + j, width - j, value_of(args, h.vector(k), i, j));
    });
    for (index_t p = 1; p <= args.tangents; ++p) {
      v.load(args.x + p * args.slice_stride + i * width, width);
      T products[2] = {T(0), T(0)};
      R::for_each(width, [&](int slot) {
        products[0] += v[slot];
        products[1] += h[slot] * v[slot];
      });
      join_team<R::kTeam>(products, Add());
      const T scale = T(1) / static_cast<T>(width);
      const TangentMeans<T> means{args.centre ? products[0] * scale : T(0), products[1] * scale};
      T* y = args.y + (p * args.rows + i) * width;
      R::for_each_vector(width, [&](int k, index_t j) {
        const Numbers<T> w = weights(args, args.weight, T(1), i, j);
        store_vector(y + j, width - j, tangent_of(w, h.vector(k), v.vector(k), normal.rate, means));
      });
    }
  }
}

// The sums of d, d^2, and of v and d v of kTangents tangents over a long row.
struct LongSums {
  double values[2 + 2 * kTangents];
};

template <typename T>
__device__ T long_mean(const DualNormArgs<T>& args, const T* u) {
  constexpr int kCount = kVectorCount<T>;
  double total[1] = {0.0};
  for (index_t j = threadIdx.x * kCount; j < args.width; j += kRowThreads * kCount) {
    const Numbers<T> own = load_vector<kCount>(u + j, args.width - j);
    T part = T(0);
#pragma unroll
    for (int e = 0; e < kCount; ++e) part += own.entry[e];
    total[0] += static_cast<double>(part);
  }
  join_team<kRowThreads>(total, Add());
  return static_cast<T>(total[0] / static_cast<double>(args.width));
}

// Numbers beyond the row are zero, and so are their deviations.
template <typename T>
__device__ Numbers<T> deviations(const T* u, index_t valid, T mean) {
  Numbers<T> d = load_vector<kVectorCount<T>>(u, valid);
#pragma unroll
  for (int e = 0; e < kVectorCount<T>; ++e) {
    if (e < valid) d.entry[e] -= mean;
  }
  return d;
}

// Sixteen bytes are summed in T, those sums in double.
template <typename T>
__device__ LongSums long_sums(const DualNormArgs<T>& args, const T* u, const T* v, T mean,
                              index_t tangents) {
  constexpr int kCount = kVectorCount<T>;
  LongSums sums{};
  for (index_t j = threadIdx.x * kCount; j < args.width; j += kRowThreads * kCount) {
    const index_t valid = args.width - j;
    const Numbers<T> d = deviations(u + j, valid, mean);
    T part = T(0), squares = T(0);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      part += d.entry[e];
      squares += d.entry[e] * d.entry[e];
    }
    sums.values[0] += static_cast<double>(part);
    sums.values[1] += static_cast<double>(squares);
#pragma unroll
    for (int p = 0; p < kTangents; ++p) {
      if (p >= tangents) break;
      const Numbers<T> own = load_vector<kCount>(v + p * args.slice_stride + j, valid);
      T sum = T(0), product = T(0);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        sum += own.entry[e];
        product += d.entry[e] * own.entry[e];
      }
      sums.values[2 + 2 * p] += static_cast<double>(sum);
      sums.values[3 + 2 * p] += static_cast<double>(product);
    }
  }
  join_team<kRowThreads>(sums.values, Add());
  return sums;
}

// Writes kTangents tangents of row i, and the value with the last of them: until then the primal
// is read again, also when y is x.
template <typename T>
__device__ void write_long(const DualNormArgs<T>& args, index_t i, index_t begin, index_t tangents,
                           const Normal<T>& normal, const LongSums& sums) {
  constexpr int kCount = kVectorCount<T>;
  const double width = static_cast<double>(args.width);
  TangentMeans<T> means[kTangents];
#pragma unroll
  for (int p = 0; p < kTangents; ++p) {
    const double mean = args.centre ? sums.values[2 + 2 * p] / width : 0.0;
    const double product = sums.values[3 + 2 * p] / width - normal.shift * mean;
    means[p] = {static_cast<T>(mean), static_cast<T>(normal.rate * product)};
  }
  for (index_t j = threadIdx.x * kCount; j < args.width; j += kRowThreads * kCount) {
    const index_t valid = args.width - j, place = i * args.width + j;
    Numbers<T> h = deviations(args.x + place, valid, normal.mean);
#pragma unroll
    for (int e = 0; e < kCount; ++e) h.entry[e] = normal.rate * (h.entry[e] - normal.shift);
    const Numbers<T> w = weights(args, args.weight, T(1), i, j);
#pragma unroll
    for (int p = 0; p < kTangents; ++p) {
      if (p >= tangents) break;
      const index_t slice = 1 + begin + p;
      const Numbers<T> v = load_vector<kCount>(args.x + slice * args.slice_stride + place, valid);
      store_vector(args.y + slice * args.rows * args.width + place, valid,
                   tangent_of(w, h, v, normal.rate, means[p]));
    }
    if (begin + tangents == args.tangents) {
      store_vector(args.y + place, valid, value_of(args, h, i, j));
    }
  }
}

// Block: one row, in turn; it is read once for the mean and twice more for every kTangents tangents
// (deviations and products, results), which are read twice. Reads and writes are coalesced, 16
// bytes a thread where aligned; for P <= 4 moves 3 + 2 P + (1 + P) numbers for each primal number,
// what is read again mostly through the cache. A thread reads what it writes and nothing else.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) dual_norm_long_kernel(DualNormArgs<T> args) {
  for (index_t i = first_team_row(); i < args.rows; i += team_row_step()) {
    const T* u = args.x + i * args.width;
    const T mean = args.centre ? long_mean(args, u) : T(0);
    for (index_t begin = 0; begin == 0 || begin < args.tangents; begin += kTangents) {
      const index_t rest = args.tangents - begin, tangents = rest < kTangents ? rest : kTangents;
      const LongSums sums = long_sums(args, u, u + (1 + begin) * args.slice_stride, mean, tangents);
      const Normal<T> normal = normal_of(args, mean, sums.values[0], sums.values[1]);
      write_long(args, i, begin, tangents, normal, sums);
    }
  }
}

}  // namespace

template <typename T>
void dual_norm_cuda(const DualNormArgs<T>& args, int device, void* stream) {
  if (args.rows == 0 || args.width == 0) return;
  const DeviceGuard guard(device);
  const bool held = with_row_in_registers<T>(args.width, [&](auto row) {
    using R = decltype(row);
    FF_LAUNCH((dual_norm_kernel<T, R>), team_grid<R::kTeam>(args.rows), team_block<R::kTeam>(), 0,
              stream, args);
  });
  if (held) return;
  FF_LAUNCH(dual_norm_long_kernel<T>, team_grid<kRowThreads>(args.rows), team_block<kRowThreads>(),
            0, stream, args);
}

template void dual_norm_cuda(const DualNormArgs<float>&, int, void*);
template void dual_norm_cuda(const DualNormArgs<double>&, int, void*);

}  // namespace fisherfast
