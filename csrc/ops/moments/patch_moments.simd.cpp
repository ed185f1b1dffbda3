// Panels of patches, and the products of two panels. One entry of all patches is a row of x but for
// stride and border: a few patches at a time, each entry is copied into a line, and the lines are
// transposed into the panel.
#include "ops/moments/patch_moments.h"

#include "core/simd/panels.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

constexpr index_t kLine = 64;  // patches at a time: lines of a panel fill at most half of a cache

// Patches one after another in one row of positions of one sample.
struct Run {
  index_t sample, oy, ox;
  index_t count;
};

template <typename T>
FF_INLINE Run run_from(const PatchMomentsArgs<T>& args, index_t patch, index_t most) {
  const index_t area = args.out[0] * args.out[1];
  const index_t sample = patch / area, position = patch - sample * area;
  const index_t oy = position / args.out[1], ox = position - oy * args.out[1];
  const index_t left = args.out[1] - ox;
  return {sample, oy, ox, left < most ? left : most};
}

// ceil(numerator / stride), between 0 and most; stride >= 1.
FF_INLINE index_t positions_below(index_t numerator, index_t stride, index_t most) {
  if (numerator <= 0) return 0;
  const index_t count = (numerator + stride - 1) / stride;
  return count < most ? count : most;
}

// One entry of a run of patches: row is x[sample, channel, iy], shift its place for ox = 0.
template <typename T>
FF_INLINE void copy_run(const PatchMomentsArgs<T>& args, const T* row, index_t shift,
                        const Run& run, T* to) {
  const index_t step = args.strides[3], stride = args.stride[1];
  const index_t first = shift + run.ox * stride;  // of the run, may lie outside
  const index_t begin = positions_below(-first, stride, run.count);
  const index_t end = positions_below(args.size[1] - first, stride, run.count);
  index_t i = 0;
  for (; i < begin; ++i) to[i] = 0;
  const T* const from = row + first * step;
  const index_t jump = stride * step;
  if (jump == 1) {
    for (; i + kLanes<T> <= end; i += kLanes<T>) store(to + i, load(from + i));
  }
  for (; i < end; ++i) to[i] = from[i * jump];
  for (; i < run.count; ++i) to[i] = 0;
}

// Entry (channel, ky, kx) of `count` patches from `patch` on.
template <typename T>
FF_INLINE void fill_line(const PatchMomentsArgs<T>& args, index_t channel, index_t ky, index_t kx,
                         index_t patch, index_t count, T* line) {
  const index_t shift = kx * args.dilation[1] - args.padding[1];
  for (index_t done = 0; done < count;) {
    const Run run = run_from(args, patch + done, count - done);
    const index_t iy = run.oy * args.stride[0] - args.padding[0] + ky * args.dilation[0];
    if (iy < 0 || iy >= args.size[0]) {
      for (index_t i = 0; i < run.count; ++i) line[done + i] = 0;
    } else {
      const T* const row =
          args.x + run.sample * args.strides[0] + channel * args.strides[1] + iy * args.strides[2];
      copy_run(args, row, shift, run, line + done);
    }
    done += run.count;
  }
}

}  // namespace

template <typename T>
void patch_moments_pack(const PatchMomentsArgs<T>& args, index_t group, index_t first,
                        index_t count, index_t panel, T* to, double* sums) {
  constexpr int W = kLanes<T>;
  alignas(64) T lines[kPanel<T> * kLine];
  const index_t taps = args.kernel[0] * args.kernel[1];
  const index_t start = panel * kPanel<T>;
  const index_t used = args.width - start < kPanel<T> ? args.width - start : kPanel<T>;
  for (index_t i = 0; i < kPanel<T> * kLine; ++i) lines[i] = 0;
  for (index_t done = 0; done < count; done += kLine) {
    const index_t rows = count - done < kLine ? count - done : kLine;
    for (index_t c = 0; c < used; ++c) {
      const index_t entry = start + c, channel = entry / taps, tap = entry - channel * taps;
      const index_t ky = tap / args.kernel[1], kx = tap - ky * args.kernel[1];
      fill_line(args, group * args.channels + channel, ky, kx, first + done, rows,
                lines + c * kLine);
    }
    Vec<T> total[2] = {};
    for (index_t row = 0; row < rows; row += W) {
      const index_t here = rows - row < W ? rows - row : W;
      for (int half = 0; half < 2; ++half) {
        Vec<T> square[W];
        for (int c = 0; c < W; ++c) square[c] = load(lines + (half * W + c) * kLine + row);
        transpose<T>(square);
        for (index_t r = 0; r < here; ++r) {
          store(to + (done + row + r) * kPanel<T> + half * W, square[r]);
          total[half] += square[r];
        }
      }
    }
    for (index_t c = 0; c < used; ++c) sums[start + c] += static_cast<double>(total[c / W][c % W]);
  }
}

template <typename T>
void patch_moments_products(index_t width, index_t row_panel, index_t column_panel, const T* left,
                            const T* right, index_t count, double* cross) {
  add_panel_product<T>(Triangle{cross, width, 0, width}, row_panel, column_panel, left, right,
                       count);
}

#define FF_INSTANTIATE(T)                                                                          \
  template void patch_moments_pack(const PatchMomentsArgs<T>&, index_t, index_t, index_t, index_t, \
                                   T*, double*);                                                   \
  template void patch_moments_products(index_t, index_t, index_t, const T*, const T*, index_t,     \
                                       double*);
FF_INSTANTIATE(float)
FF_INSTANTIATE(double)
#undef FF_INSTANTIATE

}  // namespace fisherfast::FF_SIMD_NAMESPACE
