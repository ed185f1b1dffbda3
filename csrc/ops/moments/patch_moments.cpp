// CPU: patches of a group, tile by tile, are copied into panels and the panels multiplied.
//
// Small patches: chunks of them, each with results of its own that are added in order. Large ones,
// with results too large for one copy per thread: all threads work on the same tile.
#include "ops/moments/patch_moments.h"

#include "core/cpu/aligned.h"
#include "core/cpu/parallel.h"

namespace fisherfast {
namespace {

// Panels from which the threads share a tile: there are pairs of panels enough for them.
constexpr index_t kSharedPanels = 4;

// A thread is started for at least this many multiply-adds (about 100 us).
constexpr index_t kGrainOperations = 4'000'000;

template <typename T>
index_t patches(const PatchMomentsArgs<T>& args) {
  return args.samples * args.out[0] * args.out[1];
}

// What the threads of a team share.
template <typename T>
struct Panels {
  SimdLevel level;
  index_t panel;   // columns of a panel
  index_t panels;  // ceil(K / panel)
  AlignedArray<T> tile;

  Panels(SimdLevel simd, index_t width)
      : level(simd),
        panel(2 * simd_lanes<T>(simd)),
        panels(ceil_div(width, panel)),
        tile(aligned_array<T>(panels * panel * kPatchTileRows + 1)) {}

  T* at(index_t p) const { return tile.get() + p * panel * kPatchTileRows; }
};

// Adds patches [begin, end) of one group to sums [K] and the lower triangle of cross [K, K].
template <typename T>
void add_patches(const PatchMomentsArgs<T>& args, const Panels<T>& panels, index_t group,
                 index_t begin, index_t end, Team& team, index_t rank, double* sums,
                 double* cross) {
  const index_t pairs = panels.panels * (panels.panels + 1) / 2;
  for (index_t from = begin; from < end; from += kPatchTileRows) {
    const index_t count = std::min(kPatchTileRows, end - from);
    for (index_t p = rank; p < panels.panels; p += team.size()) {
      FF_CALL_SIMD(panels.level, patch_moments_pack<T>, args, group, from, count, p, panels.at(p),
                   sums);
    }
    team.wait();
    index_t e = 0;
    for (index_t row = 0; row < panels.panels; ++row) {
      for (index_t column = 0; column <= row; ++column, ++e) {
        if (e < team.begin(pairs, rank) || e >= team.end(pairs, rank)) continue;
        FF_CALL_SIMD(panels.level, patch_moments_products<T>, args.width, row, column,
                     panels.at(row), panels.at(column), count, cross);
      }
    }
    team.wait();
  }
}

template <typename T>
void moments_of_small_patches(const PatchMomentsArgs<T>& args, SimdLevel level, int threads) {
  const index_t K = args.width, size = K + K * K;
  const RowChunks chunks = row_chunks(patches(args), args.groups * size);
  std::vector<double> parts(args.groups * chunks.count * size, 0.0);
  const index_t operations = 1 + chunks.size * K * (K + 1) / 2;
  const index_t grain = ceil_div(kGrainOperations, operations);
  parallel_for(args.groups * chunks.count, grain, threads, [&](index_t begin, index_t end) {
    const Panels<T> panels(level, K);
    Team alone;
    for (index_t item = begin; item < end; ++item) {
      const index_t group = item / chunks.count, chunk = item % chunks.count;
      double* const sums = parts.data() + item * size;
      add_patches(args, panels, group, chunks.begin(chunk), chunks.end(chunk), alone, 0, sums,
                  sums + K);
    }
  });
  for (index_t item = 0; item < args.groups * chunks.count; ++item) {
    const index_t group = item / chunks.count;
    const double* const part = parts.data() + item * size;
    for (index_t i = 0; i < K; ++i) args.sums[group * K + i] += part[i];
    for (index_t i = 0; i < K * K; ++i) args.cross[group * K * K + i] += part[K + i];
  }
}

template <typename T>
void moments_of_large_patches(const PatchMomentsArgs<T>& args, SimdLevel level, int threads) {
  const Panels<T> panels(level, args.width);
  const index_t rows = patches(args);
  const index_t operations = rows * args.width * (args.width + 1) / 2;
  const index_t useful =
      std::clamp<index_t>(operations / kGrainOperations, 1, std::max(threads, 1));
  Team::run(useful, [&](Team& team, index_t rank) {
    for (index_t g = 0; g < args.groups; ++g) {
      add_patches(args, panels, g, 0, rows, team, rank, args.sums + g * args.width,
                  args.cross + g * args.width * args.width);
    }
  });
}

}  // namespace

template <typename T>
void patch_moments_cpu(const PatchMomentsArgs<T>& args, int threads) {
  const SimdLevel level = simd_level();
  const index_t K = args.width;
  std::fill_n(args.sums, args.groups * K, 0.0);
  std::fill_n(args.cross, args.groups * K * K, 0.0);
  if (ceil_div(K, 2 * simd_lanes<T>(level)) < kSharedPanels) {
    moments_of_small_patches(args, level, threads);
  } else {
    moments_of_large_patches(args, level, threads);
  }
  for (index_t g = 0; g < args.groups; ++g) {
    double* const cross = args.cross + g * K * K;
    for (index_t i = 0; i < K; ++i) {
      for (index_t j = 0; j < i; ++j) cross[j * K + i] = cross[i * K + j];
    }
  }
}

template void patch_moments_cpu(const PatchMomentsArgs<float>&, int);
template void patch_moments_cpu(const PatchMomentsArgs<double>&, int);

}  // namespace fisherfast
