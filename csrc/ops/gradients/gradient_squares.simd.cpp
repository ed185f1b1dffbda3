// One tile of results: for each sample the gradients g of the tile's rows are copied into panels
// [position, row], rows being the lanes. Patches are not copied: the numbers of a column of the
// patch, one position after another, are read in place from x (or from a copy of the sample with
// its margins of zeros) and multiply the lanes. kColumns columns by one or two vectors
// of rows are summed in registers over all positions, squared, and added to sums that stay in the
// caches.
//
// A group of few rows (depthwise) would leave most lanes empty. There positions are the lanes: g is
// spread over the area of x, so that any column of the patch is one run of memory.
#include "ops/gradients/gradient_squares.h"

#include "core/simd/simd.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

template <typename T>
constexpr index_t kPanel = 2 * kLanes<T>;

// Two vectors by kColumns numbers: 16 accumulators where there are 32 registers, 8 where there are
// 16.
constexpr int kColumns = FF_SIMD_BYTES == 64 ? 8 : 4;
static_assert(kGradientRound % kColumns == 0 && kGradientRound % kPanel<float> == 0);

// The layout of one sample of x: strides of channels, rows and columns of the image.
template <typename T>
struct Image {
  const T* at;
  index_t channel, row, column;
};

// --- layout --------------------------------------------------------------------------------------

template <typename T>
void find_positions(const GradientSquaresArgs<T>& args, const Image<T>& image, index_t* position) {
  for (index_t h = 0; h < args.out[0]; ++h) {
    for (index_t w = 0; w < args.out[1]; ++w) {
      *position++ = h * args.stride[0] * image.row + w * args.stride[1] * image.column;
    }
  }
}

// The columns of the tile; those beyond the last, up to a whole block, repeat it.
template <typename T>
void find_columns(const GradientSquaresArgs<T>& args, const GradientTile& tile,
                  const Image<T>& image, index_t* column) {
  const index_t taps = args.kernel[0] * args.kernel[1];
  for (index_t d = 0; d < tile.columns; ++d) {
    const index_t c = (tile.column + d) / taps - tile.channel, tap = (tile.column + d) % taps;
    column[d] = c * image.channel + tap / args.kernel[1] * args.dilation[0] * image.row +
                tap % args.kernel[1] * args.dilation[1] * image.column;
  }
  for (index_t d = tile.columns; d % kColumns != 0; ++d) column[d] = column[d - 1];
}

// --- x with its margins --------------------------------------------------------------------------

// The layout of the copy: channels last where they are last in x and lanes are not positions.
template <typename T>
Image<T> padded_image(const GradientSquaresArgs<T>& args, const GradientTile& tile, const T* copy,
                      bool lanes) {
  const index_t height = args.in[0] + 2 * args.padding[0], width = args.in[1] + 2 * args.padding[1];
  if (lanes) return {copy, height * width + kGradientRound, width, 1};
  if (args.x_strides[1] < args.x_strides[3]) {
    return {copy, 1, width * tile.channels, tile.channels};
  }
  return {copy, height * width, width, 1};
}

template <typename T>
FF_INLINE void copy_run(const T* from, index_t stride, T* to, index_t count) {
  index_t i = 0;
  if (stride == 1) {
    for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(from + i));
  }
  for (; i < count; ++i) to[i] = from[i * stride];
}

// Copies the inside; the margins stay.
template <typename T>
void copy_image(const GradientSquaresArgs<T>& args, const GradientTile& tile, const Image<T>& image,
                const T* sample, T* copy) {
  const index_t* const from = args.x_strides;
  T* const inside = copy + args.padding[0] * image.row + args.padding[1] * image.column;
  if (image.channel == 1) {
    for (index_t h = 0; h < args.in[0]; ++h) {
      for (index_t w = 0; w < args.in[1]; ++w) {
        copy_run(sample + h * from[2] + w * from[3], from[1],
                 inside + h * image.row + w * image.column, tile.channels);
      }
    }
    return;
  }
  for (index_t c = 0; c < tile.channels; ++c) {
    for (index_t h = 0; h < args.in[0]; ++h) {
      copy_run(sample + c * from[1] + h * from[2], from[3],
               inside + c * image.channel + h * image.row, args.in[1]);
    }
  }
}

// --- g in panels ---------------------------------------------------------------------------------

// One vector of rows whose positions are neighbours in memory, transposed.
template <typename T>
FF_INLINE void pack_transposed(const T* g, index_t row_stride, index_t positions, T* to) {
  constexpr int W = kLanes<T>;
  index_t t = 0;
  for (; t + W <= positions; t += W) {
    Vec<T> square[W];
    for (int r = 0; r < W; ++r) square[r] = load(g + r * row_stride + t);
    transpose<T>(square);
    for (int e = 0; e < W; ++e) store(to + (t + e) * kPanel<T>, square[e]);
  }
  for (; t < positions; ++t) {
    for (int r = 0; r < W; ++r) to[t * kPanel<T> + r] = g[r * row_stride + t];
  }
}

// One vector of rows, `count` of them there, from any strides.
template <typename T>
FF_INLINE void pack_rows(const GradientSquaresArgs<T>& args, const T* g, index_t count, T* to) {
  constexpr int W = kLanes<T>;
  const index_t* const strides = args.g_strides;
  for (index_t h = 0; h < args.out[0]; ++h) {
    for (index_t w = 0; w < args.out[1]; ++w, to += kPanel<T>) {
      const T* const from = g + h * strides[2] + w * strides[3];
      if (count == W && strides[1] == 1) {
        store(to, load(from));
        continue;
      }
      for (int r = 0; r < W; ++r) to[r] = r < count ? from[r * strides[1]] : T(0);
    }
  }
}

// The rows of the tile of one sample, in panels of two vectors.
template <typename T>
void pack_gradients(const GradientSquaresArgs<T>& args, const GradientTile& tile, const T* g,
                    T* panels) {
  constexpr int W = kLanes<T>;
  const index_t* const strides = args.g_strides;
  const index_t positions = args.out[0] * args.out[1];
  const bool neighbours = strides[3] == 1 && (strides[2] == args.out[1] || args.out[0] == 1);
  for (index_t row = 0; row < tile.rows; row += W) {
    const index_t left = tile.rows - row, count = left < W ? left : W;
    T* const to = panels + row / kPanel<T> * kPanel<T> * positions + row % kPanel<T>;
    const T* const from = g + row * strides[1];
    if (neighbours && count == W) {
      pack_transposed(from, strides[1], positions, to);
    } else {
      pack_rows(args, from, count, to);
    }
  }
}

// --- products ------------------------------------------------------------------------------------

// sums[column][row] += (sum over positions of panel row times column of the patch)^2 for kColumns
// columns.
template <typename T, int kVectors>
FF_INLINE void add_squares(const T* panel, const T* x, const index_t* position, index_t positions,
                           const index_t* column, T* sums) {
  Vec<T> whole[kColumns][kVectors] = {};
  index_t offset[kColumns];
  for (int c = 0; c < kColumns; ++c) offset[c] = column[c];
  for (index_t t = 0; t < positions;) {
    const index_t end = t + kGradientPositions < positions ? t + kGradientPositions : positions;
    Vec<T> part[kColumns][kVectors] = {};
    for (; t < end; ++t) {
      const T* const at = x + position[t];
      Vec<T> rows[kVectors];
      FF_UNROLL
      for (int v = 0; v < kVectors; ++v) rows[v] = load(panel + t * kPanel<T> + v * kLanes<T>);
      FF_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const T factor = at[offset[c]];
        FF_UNROLL
        for (int v = 0; v < kVectors; ++v) part[c][v] += rows[v] * factor;
      }
    }
    FF_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      FF_UNROLL
      for (int v = 0; v < kVectors; ++v) whole[c][v] += part[c][v];
    }
  }
  FF_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    FF_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      T* const to = sums + c * kPanel<T> + v * kLanes<T>;
      store(to, load(to) + whole[c][v] * whole[c][v]);
    }
  }
}

template <typename T>
void add_sample(const GradientTile& tile, const GradientScratch<T>& scratch, const T* x,
                index_t positions) {
  const index_t width = (tile.columns + kColumns - 1) / kColumns * kColumns;
  for (index_t row = 0; row < tile.rows; row += kPanel<T>) {
    const T* const panel = scratch.g + row * positions;
    T* const sums = scratch.sums + row * width;
    for (index_t d = 0; d < width; d += kColumns) {
      T* const to = sums + d * kPanel<T>;
      if (tile.rows - row <= kLanes<T>) {
        add_squares<T, 1>(panel, x, scratch.position, positions, scratch.column + d, to);
      } else {
        add_squares<T, 2>(panel, x, scratch.position, positions, scratch.column + d, to);
      }
    }
  }
}

// --- groups of few rows --------------------------------------------------------------------------

// Numbers of a row of g that is spread over the area of x, whole vectors.
template <typename T>
FF_INLINE index_t spread_size(const GradientSquaresArgs<T>& args, const Image<T>& image) {
  const index_t last = (args.out[0] - 1) * args.stride[0] * image.row +
                       (args.out[1] - 1) * args.stride[1] * image.column;
  return (last + kLanes<T>) / kLanes<T> * kLanes<T>;
}

// g at the places where its windows begin; between these there are zeros.
template <typename T>
void spread_gradients(const GradientSquaresArgs<T>& args, const GradientTile& tile, const T* g,
                      const index_t* position, index_t size, T* spread) {
  const index_t* const strides = args.g_strides;
  for (index_t row = 0; row < tile.rows; ++row) {
    const index_t* at = position;
    for (index_t h = 0; h < args.out[0]; ++h) {
      const T* const from = g + row * strides[1] + h * strides[2];
      for (index_t w = 0; w < args.out[1]; ++w) {
        spread[row * size + *at++] = from[w * strides[3]];
      }
    }
  }
}

template <typename T>
FF_INLINE T sum_of_lanes(Vec<T> vector) {
  T lanes[kLanes<T>];
  store(lanes, vector);
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// sums[column][row] += (sum of a row of g times a column of the patch, over the area of x)^2.
template <typename T>
void add_spread_sample(const GradientTile& tile, const GradientScratch<T>& scratch, const T* x,
                       index_t size) {
  for (index_t row = 0; row < tile.rows; ++row) {
    const T* const g = scratch.g + row * size;
    for (index_t d = 0; d < tile.columns; d += kColumns) {
      Vec<T> part[kColumns] = {};
      index_t offset[kColumns];
      for (int c = 0; c < kColumns; ++c) offset[c] = scratch.column[d + c];
      for (index_t u = 0; u < size; u += kLanes<T>) {
        const Vec<T> lanes = load(g + u);
        FF_UNROLL
        for (int c = 0; c < kColumns; ++c) part[c] += lanes * load(x + offset[c] + u);
      }
      for (int c = 0; c < kColumns; ++c) {
        const T sum = sum_of_lanes<T>(part[c]);
        scratch.sums[(d + c) * kPanel<T> + row] += sum * sum;
      }
    }
  }
}

// --- a tile --------------------------------------------------------------------------------------

// Adds the sums to the results, and clears them.
template <typename T>
void flush(const GradientSquaresArgs<T>& args, const GradientTile& tile, T* sums) {
  const index_t width = (tile.columns + kColumns - 1) / kColumns * kColumns;
  const index_t patch = args.inputs * args.kernel[0] * args.kernel[1];
  for (index_t row = 0; row < tile.rows; ++row) {
    T* from = sums + row / kPanel<T> * kPanel<T> * width + row % kPanel<T>;
    double* const to = args.squares + (tile.group * args.outputs + tile.row + row) * patch;
    for (index_t d = 0; d < tile.columns; ++d, from += kPanel<T>) {
      to[tile.column + d] += static_cast<double>(*from);
    }
  }
}

template <typename T>
FF_INLINE void clear(T* numbers, index_t count) {
  for (index_t i = 0; i < count; ++i) numbers[i] = T(0);
}

}  // namespace

template <typename T>
void gradient_squares_tile(const GradientSquaresArgs<T>& args, const GradientTile& tile,
                           const GradientScratch<T>& scratch) {
  const index_t patch = args.inputs * args.kernel[0] * args.kernel[1];
  const index_t positions = args.out[0] * args.out[1];
  const index_t width = (tile.columns + kColumns - 1) / kColumns * kColumns;
  const index_t height = (tile.rows + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
  const T* const x = args.x + (tile.group * args.inputs + tile.channel) * args.x_strides[1];
  const T* const g = args.g + (tile.group * args.outputs + tile.row) * args.g_strides[1];
  Image<T> image{x, args.x_strides[1], args.x_strides[2], args.x_strides[3]};
  if (scratch.padded != nullptr) {
    image = padded_image<T>(args, tile, scratch.padded, scratch.positions_are_lanes);
    const index_t area = (args.in[0] + 2 * args.padding[0]) * (args.in[1] + 2 * args.padding[1]);
    clear(scratch.padded, tile.channels * (area + kGradientRound));
  }
  const index_t spread = spread_size(args, image);
  if (scratch.positions_are_lanes) clear(scratch.g, tile.rows * spread);
  find_positions(args, image, scratch.position);
  find_columns(args, tile, image, scratch.column);
  for (index_t row = 0; row < tile.rows; ++row) {
    clear(args.squares + (tile.group * args.outputs + tile.row + row) * patch + tile.column,
          tile.columns);
  }
  for (index_t n = 0; n < args.samples; ++n) {
    if (n % kGradientSamples == 0) clear(scratch.sums, height * width);
    const T* sample = x + n * args.x_strides[0];
    if (scratch.padded != nullptr) {
      copy_image(args, tile, image, sample, scratch.padded);
      sample = scratch.padded;
    }
    const T* const gradients = g + n * args.g_strides[0];
    if (scratch.positions_are_lanes) {
      spread_gradients(args, tile, gradients, scratch.position, spread, scratch.g);
      add_spread_sample(tile, scratch, sample, spread);
    } else {
      pack_gradients(args, tile, gradients, scratch.g);
      add_sample(tile, scratch, sample, positions);
    }
    if ((n + 1) % kGradientSamples == 0 || n + 1 == args.samples) flush(args, tile, scratch.sums);
  }
}

template void gradient_squares_tile(const GradientSquaresArgs<float>&, const GradientTile&,
                                    const GradientScratch<float>&);
template void gradient_squares_tile(const GradientSquaresArgs<double>&, const GradientTile&,
                                    const GradientScratch<double>&);

}  // namespace fisherfast::FF_SIMD_NAMESPACE
