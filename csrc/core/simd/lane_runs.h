// Runs of neighbouring numbers, one run a system, to and from vectors with a system a lane. For the
// sources that are compiled once per instruction set.
//
// G describes the systems of the lanes: Number (type of the runs), first, count (later lanes repeat
// the last system), system(lane), batch() systems in all, and `ahead`, how many groups in advance
// numbers are prefetched (0: none).
#pragma once

#include "core/simd/simd.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

// Calls run.template operator()<L>() for the power of two L = length < W, if it is one.
template <typename T, typename Run>
FF_INLINE bool with_short_length(index_t length, const Run& run) {
  constexpr int W = kLanes<T>;
  if (length == 1) return run(std::integral_constant<int, 1>{}), true;
  if (W > 2 && length == 2) return run(std::integral_constant<int, 2>{}), true;
  if (W > 4 && length == 4) return run(std::integral_constant<int, 4>{}), true;
  if (W > 8 && length == 8) return run(std::integral_constant<int, 8>{}), true;
  return false;
}

// Reads W neighbouring numbers from each system and hands number e < length to put(e, vector); asks
// for those of the group `ahead` groups later.
template <typename T, typename Put>
FF_INLINE void read_square(const T* first, index_t stride, index_t start, index_t length,
                           index_t ahead, const Put& put) {
  constexpr int W = kLanes<T>;
  Vec<T> square[W];
  for (int lane = 0; lane < W; ++lane) {
    square[lane] = load(first + lane * stride + start);
    if (ahead > 0) __builtin_prefetch(first + (lane + ahead * W) * stride + start, 0, 2);
  }
  transpose<T>(square);
  const int count = static_cast<int>(length - start < W ? length - start : W);
  FF_UNROLL
  for (int e = 0; e < W; ++e) {
    if (e < count) put(start + e, square[e]);
  }
}

// Hands each of the `length` neighbouring numbers of every system to put(e, vector), some twice.
template <typename G, typename Put>
FF_INLINE void read_run(const G& group, const typename G::Number* base, index_t stride,
                        index_t length, const Put& put) {
  using T = typename G::Number;
  constexpr int W = kLanes<T>;
  const T* first = base + group.first * stride;
  if (group.count == W) {
    for (index_t start = 0; start + W <= length; start += W) {
      read_square(first, stride, start, length, group.ahead, put);
    }
    if (length % W == 0) return;
    if (length > W) return read_square(first, stride, length - W, length, group.ahead, put);
    const auto unzip_all = [&](auto count) {
      Vec<T> vectors[count];
      for (int e = 0; e < count; ++e) vectors[e] = load(first + e * W);
      unzip<T, count>(vectors);
      for (int e = 0; e < count; ++e) put(e, vectors[e]);
    };
    if (stride == length && with_short_length<T>(length, unzip_all)) return;
    // a whole vector from each system, where later systems cover the overrun
    const index_t last = (group.batch() - 1) * stride + length;
    if ((group.first + W - 1) * stride + W <= last) {
      return read_square(first, stride, 0, length, group.ahead, put);
    }
  }
  for (index_t e = 0; e < length; ++e) {
    Vec<T> lanes;
    for (int lane = 0; lane < W; ++lane) lanes[lane] = base[group.system(lane) * stride + e];
    put(e, lanes);
  }
}

// Writes `length` numbers a system, contiguous; number e comes from get(e). `run` holds
// W (W + 1) numbers.
template <typename G, typename Get>
FF_INLINE void write_run(const G& group, typename G::Number* out, index_t length,
                         typename G::Number* run, const Get& get) {
  using T = typename G::Number;
  constexpr int W = kLanes<T>;
  const auto square_of = [&](index_t start, Vec<T>(&square)[W]) {
    for (int e = 0; e < W; ++e) square[e] = get(start + e < length ? start + e : length - 1);
    transpose<T>(square);
  };
  T* const to = out + group.first * length;
  const auto zip_all = [&](auto count) {
    Vec<T> vectors[count];
    for (int e = 0; e < count; ++e) vectors[e] = get(e);
    zip<T, count>(vectors);
    for (int e = 0; e < count; ++e) store(to + e * W, vectors[e]);
  };
  if (group.count == W && with_short_length<T>(length, zip_all)) return;
  Vec<T> square[W];
  if (length < W) {  // each row overwrites what the one before wrote too much
    square_of(0, square);
    for (int lane = 0; lane < W; ++lane) store(run + lane * length, square[lane]);
    const index_t total = group.count * length;
    index_t e = 0;
    for (; e + W <= total; e += W) store(to + e, load(run + e));
    for (; e < total; ++e) to[e] = run[e];
    return;
  }
  for (index_t start = 0; start < length; start += W) {
    const index_t begin = start + W <= length ? start : length - W;
    square_of(begin, square);
    for (int lane = 0; lane < group.count; ++lane) {
      store(to + lane * length + begin, square[lane]);
    }
  }
}

template <typename G>
FF_INLINE void write_lanes(const G& group, typename G::Number* out, Vec<typename G::Number> value) {
  using T = typename G::Number;
  if (group.count == kLanes<T>) {
    store(out + group.first, value);
  } else {
    for (int lane = 0; lane < group.count; ++lane) out[group.first + lane] = value[lane];
  }
}

}  // namespace
}  // namespace fisherfast::FF_SIMD_NAMESPACE
