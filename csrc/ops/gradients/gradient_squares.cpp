// CPU: splits the results into tiles, one thread each; no two threads write the same number, and no
// number depends on how they are split.
#include "ops/gradients/gradient_squares.h"

#include "core/cpu/aligned.h"
#include "core/cpu/parallel.h"

namespace fisherfast {
namespace {

// A thread is started for at least this many multiply-adds (about 50 us).
constexpr index_t kGrainOperations = 1'000'000;

// A tile's sums stay in the second level of the caches: 128 KiB in float32. Rows first: each column
// of a patch is read once for all of them.
constexpr index_t kTileRows = 128;
constexpr index_t kTileColumns = 256;

index_t rounded(index_t count) { return ceil_div(count, kGradientRound) * kGradientRound; }

// How the results are cut into tiles.
struct Cut {
  index_t rows, columns;            // of a tile
  index_t row_tiles, column_tiles;  // of a group
  index_t tiles;                    // of all groups

  template <typename T>
  Cut(const GradientSquaresArgs<T>& args, index_t threads) {
    const index_t patch = args.inputs * args.kernel[0] * args.kernel[1];
    rows = std::min(kTileRows, args.outputs);
    row_tiles = ceil_div(args.outputs, rows);
    const index_t wanted = threads == 1 ? 1 : threads * kPartsOfAThread;
    const index_t share = ceil_div(patch, ceil_div(wanted, args.groups * row_tiles));
    columns = std::min(kTileColumns, rounded(share));
    column_tiles = ceil_div(patch, columns);
    tiles = args.groups * row_tiles * column_tiles;
  }

  template <typename T>
  GradientTile tile(const GradientSquaresArgs<T>& args, index_t index) const {
    const index_t taps = args.kernel[0] * args.kernel[1], patch = args.inputs * taps;
    GradientTile tile;
    tile.column = index % column_tiles * columns;
    tile.columns = std::min(columns, patch - tile.column);
    tile.row = index / column_tiles % row_tiles * rows;
    tile.rows = std::min(rows, args.outputs - tile.row);
    tile.group = index / column_tiles / row_tiles;
    tile.channel = tile.column / taps;
    tile.channels = (tile.column + tile.columns - 1) / taps - tile.channel + 1;
    return tile;
  }
};

// The memory of one thread, for every tile.
template <typename T>
class Memory {
 public:
  Memory(const GradientSquaresArgs<T>& args, const Cut& cut)
      : positions_are_lanes_(args.groups > 1 && args.outputs <= kGradientFewRows),
        g_(aligned_array<T>(gradients(args, cut))),
        sums_(aligned_array<T>(rounded(cut.rows) * rounded(cut.columns))),
        position_(aligned_array<index_t>(positions(args))),
        column_(aligned_array<index_t>(rounded(cut.columns))) {
    if (args.padding[0] == 0 && args.padding[1] == 0 && !positions_are_lanes_) return;
    const index_t taps = args.kernel[0] * args.kernel[1];
    const index_t channels = std::min(args.inputs, cut.columns / taps + 2);
    padded_ = aligned_array<T>(channels * (area(args) + kGradientRound));
  }

  GradientScratch<T> scratch() const {
    return {g_.get(),      sums_.get(),   position_.get(),
            column_.get(), padded_.get(), positions_are_lanes_};
  }

 private:
  static index_t area(const GradientSquaresArgs<T>& args) {
    return (args.in[0] + 2 * args.padding[0]) * (args.in[1] + 2 * args.padding[1]);
  }

  // Numbers of g of one sample: lanes are rows, or positions spread over the area of x.
  index_t gradients(const GradientSquaresArgs<T>& args, const Cut& cut) const {
    if (!positions_are_lanes_) return rounded(cut.rows) * positions(args);
    return cut.rows * rounded(area(args));
  }

  static index_t positions(const GradientSquaresArgs<T>& args) { return args.out[0] * args.out[1]; }

  bool positions_are_lanes_;
  AlignedArray<T> g_, sums_;
  AlignedArray<index_t> position_, column_;
  AlignedArray<T> padded_;
};

}  // namespace

template <typename T>
void gradient_squares_cpu(const GradientSquaresArgs<T>& args, int threads) {
  const index_t patch = args.inputs * args.kernel[0] * args.kernel[1];
  if (args.groups * args.outputs * patch == 0) return;
  const SimdLevel level = simd_level();
  const index_t work =
      args.samples * args.groups * args.outputs * patch * args.out[0] * args.out[1];
  const index_t useful = std::max<index_t>(1, work / kGrainOperations);
  const Cut cut(args, std::min<index_t>(threads, useful));
  const index_t grain = ceil_div(kGrainOperations, 1 + work / cut.tiles);
  parallel_for(cut.tiles, grain, threads, [&](index_t begin, index_t end) {
    const Memory<T> memory(args, cut);
    for (index_t index = begin; index < end; ++index) {
      const GradientTile tile = cut.tile(args, index);
      FF_CALL_SIMD(level, gradient_squares_tile<T>, args, tile, memory.scratch());
    }
  });
}

template void gradient_squares_cpu(const GradientSquaresArgs<float>&, int);
template void gradient_squares_cpu(const GradientSquaresArgs<double>&, int);

}  // namespace fisherfast
