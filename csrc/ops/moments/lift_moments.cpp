// CPU: a team of threads fills a tile of features panel by panel, waits, and multiplies pairs of
// panels. Every number of the results belongs to one thread, which adds to it row by row.
#include "ops/moments/lift_moments.h"

#include "core/cpu/aligned.h"
#include "core/cpu/parallel.h"

namespace fisherfast {
namespace {

// A thread is started for at least this many multiply-adds (about 100 us).
constexpr index_t kGrainOperations = 4'000'000;

// A tile of features holds about as many numbers (1 MiB of float32): it stays in the caches.
constexpr index_t kTileNumbers = index_t{1} << 18;
constexpr index_t kMaxTileRows = 16 * kLiftTileRows;  // between two waits of the team

struct PanelPair {
  index_t row, column;
};

// The pairs of panels whose product reaches a row from `start` on, column by column, so that
// neighbours share a panel.
std::vector<PanelPair> panel_pairs(index_t panels, index_t first) {
  std::vector<PanelPair> pairs;
  for (index_t column = 0; column < panels; ++column) {
    for (index_t row = std::max(first, column); row < panels; ++row) pairs.push_back({row, column});
  }
  return pairs;
}

template <typename T>
index_t useful_threads(const LiftMomentsArgs<T>& args, int threads) {
  const index_t size = args.dim + args.lifted;
  const index_t operations =
      args.rows * ((size - args.start) * (size + args.start) / 2 + size + args.lifted * args.dim);
  return std::clamp<index_t>(operations / kGrainOperations, 1, std::max(threads, 1));
}

}  // namespace

template <typename T>
void lift_moments_cpu(const LiftMomentsArgs<T>& args, int threads) {
  const index_t size = args.dim + args.lifted;
  if (args.rows == 0 || args.start >= size) return;
  const SimdLevel level = simd_level();
  const index_t panel = 2 * simd_lanes<T>(level), panels = ceil_div(size, panel);
  const index_t lifted_from = args.dim / panel;  // panels before hold raw activations alone
  const index_t affordable = kTileNumbers / (panels * panel) / kLiftTileRows * kLiftTileRows;
  const index_t tile = std::min(args.rows, std::clamp(affordable, kLiftTileRows, kMaxTileRows));
  const std::vector<PanelPair> pairs = panel_pairs(panels, args.start / panel);
  const AlignedArray<T> features = aligned_array<T>(panels * tile * panel);
  const AlignedArray<T> weights = aligned_array<T>((panels - lifted_from) * args.dim * panel + 1);
  const auto packed = [&](index_t p) {
    return weights.get() + std::max<index_t>(p - lifted_from, 0) * args.dim * panel;
  };

  Team::run(useful_threads(args, threads), [&](Team& team, index_t rank) {
    for (index_t p = lifted_from + rank; p < panels; p += team.size()) {
      FF_CALL_SIMD(level, lift_pack_weights<T>, args, p, packed(p));
    }
    team.wait();
    for (index_t half = 0; half < args.halves; ++half) {
      const RowRange own = rows_of_half(args.offsets, args.folds, half, args.halves, args.rows);
      for (index_t row = own.begin; row < own.end; row += tile) {
        const index_t count = std::min(tile, own.end - row);
        for (index_t p = rank; p < panels; p += team.size()) {
          T* const to = features.get() + p * tile * panel;
          FF_CALL_SIMD(level, lift_features<T>, args, p, packed(p), row, count, to);
        }
        team.wait();
        const index_t total = static_cast<index_t>(pairs.size());
        for (index_t e = team.begin(total, rank); e < team.end(total, rank); ++e) {
          for (index_t n = 0; n < count; n += kLiftTileRows) {
            const T* left = features.get() + (pairs[e].row * tile + n) * panel;
            const T* right = features.get() + (pairs[e].column * tile + n) * panel;
            FF_CALL_SIMD(level, lift_products<T>, args, half, pairs[e].row, pairs[e].column, left,
                         right, std::min(kLiftTileRows, count - n));
          }
        }
        team.wait();
      }
    }
  });
}

template void lift_moments_cpu(const LiftMomentsArgs<float>&, int);
template void lift_moments_cpu(const LiftMomentsArgs<double>&, int);

}  // namespace fisherfast
