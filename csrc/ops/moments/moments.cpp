// CPU: the rows of a group, tile by tile, are copied into panels and the panels multiplied.
//
// A few columns: chunks of rows, each with results of its own that are added in order. Many
// columns, with results too large for one copy per thread: all threads work on the same tile.
#include "ops/moments/moments.h"

#include <numeric>

#include "core/cpu/aligned.h"
#include "core/cpu/parallel.h"

namespace fisherfast {
namespace {

// Panels from which the threads share a tile: there are pairs of panels enough for them.
constexpr index_t kSharedPanels = 4;

// A thread is started for at least this many multiply-adds (about 100 us).
constexpr index_t kGrainOperations = 4'000'000;

// The moments of one chunk of rows.
struct PartialMoments {
  std::vector<index_t> count;  // [G]
  std::vector<double> sums;    // [G, d]
  std::vector<double> cross;   // [G, d, d], lower triangle

  PartialMoments(index_t groups, index_t dim)
      : count(groups, 0), sums(groups * dim, 0.0), cross(groups * dim * dim, 0.0) {}
};

// Rows [begin, end) in the order of their groups.
struct GroupedRows {
  std::vector<index_t> list;   // empty when there is one group
  std::vector<index_t> start;  // [G + 1] where each group starts in the list
  index_t begin;

  template <typename T>
  GroupedRows(const MomentsArgs<T>& args, index_t first, index_t last)
      : start(args.groups + 1, 0), begin(first) {
    if (args.group == nullptr) {
      start[1] = last - first;
      return;
    }
    list.resize(last - first);
    for (index_t n = first; n < last; ++n) ++start[args.group[n] + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    std::vector<index_t> next(start.begin(), start.end() - 1);
    for (index_t n = first; n < last; ++n) list[next[args.group[n]]++] = n;
  }

  index_t count(index_t group) const { return start[group + 1] - start[group]; }
  RowList rows(index_t group, index_t from, index_t count) const {
    if (list.empty()) return {nullptr, begin + from, count};
    return {list.data(), start[group] + from, count};
  }
};

// What the threads of a team share.
template <typename T>
struct Panels {
  SimdLevel level;
  index_t panel;   // columns of a panel
  index_t panels;  // ceil(d / panel)
  AlignedArray<T> tile;

  Panels(SimdLevel simd, index_t dim)
      : level(simd),
        panel(2 * simd_lanes<T>(simd)),
        panels(ceil_div(dim, panel)),
        tile(aligned_array<T>(panels * panel * kMomentsTileRows + 1)) {}

  T* at(index_t p) const { return tile.get() + p * panel * kMomentsTileRows; }
};

// Adds the rows of one group to sums [d] and cross [d, d]. Pair e of panels, e = 0, 1, ..., is
// (row, column) = (0, 0), (1, 0), (1, 1), (2, 0), ...
template <typename T>
void add_group(const MomentsArgs<T>& args, const Panels<T>& panels, const GroupedRows& rows,
               index_t group, Team& team, index_t rank, double* sums, double* cross) {
  const index_t pairs = panels.panels * (panels.panels + 1) / 2;
  for (index_t from = 0; from < rows.count(group); from += kMomentsTileRows) {
    const index_t count = std::min(kMomentsTileRows, rows.count(group) - from);
    const RowList list = rows.rows(group, from, count);
    for (index_t p = rank; p < panels.panels; p += team.size()) {
      FF_CALL_SIMD(panels.level, moments_centre<T>, args, list, p, panels.at(p), sums);
    }
    team.wait();
    index_t e = 0;
    for (index_t row = 0; row < panels.panels; ++row) {
      for (index_t column = 0; column <= row; ++column, ++e) {
        if (e < team.begin(pairs, rank) || e >= team.end(pairs, rank)) continue;
        FF_CALL_SIMD(panels.level, moments_products<T>, args.dim, row, column, panels.at(row),
                     panels.at(column), count, cross);
      }
    }
    team.wait();
  }
}

template <typename T>
void moments_of_few_columns(const MomentsArgs<T>& args, SimdLevel level, int threads) {
  const RowChunks chunks = row_chunks(args.rows, args.groups * (args.dim + 1) * (args.dim + 1));
  std::vector<PartialMoments> parts(chunks.count, PartialMoments(args.groups, args.dim));
  parallel_for(chunks.count, 1, threads, [&](index_t begin, index_t end) {
    const Panels<T> panels(level, args.dim);
    Team alone;
    for (index_t c = begin; c < end; ++c) {
      const GroupedRows rows(args, chunks.begin(c), chunks.end(c));
      for (index_t g = 0; g < args.groups; ++g) {
        parts[c].count[g] = rows.count(g);
        add_group(args, panels, rows, g, alone, 0, parts[c].sums.data() + g * args.dim,
                  parts[c].cross.data() + g * args.dim * args.dim);
      }
    }
  });
  const auto add_to = [](const auto& part, auto* total) {
    for (std::size_t i = 0; i < part.size(); ++i) total[i] += part[i];
  };
  for (const PartialMoments& part : parts) {
    add_to(part.count, args.count);
    add_to(part.sums, args.sums);
    add_to(part.cross, args.cross);
  }
}

template <typename T>
void moments_of_many_columns(const MomentsArgs<T>& args, SimdLevel level, int threads) {
  const Panels<T> panels(level, args.dim);
  const GroupedRows rows(args, 0, args.rows);
  const index_t operations = args.rows * args.dim * (args.dim + 1) / 2;
  const index_t useful =
      std::clamp<index_t>(operations / kGrainOperations, 1, std::max(threads, 1));
  for (index_t g = 0; g < args.groups; ++g) args.count[g] = rows.count(g);
  Team::run(useful, [&](Team& team, index_t rank) {
    for (index_t g = 0; g < args.groups; ++g) {
      add_group(args, panels, rows, g, team, rank, args.sums + g * args.dim,
                args.cross + g * args.dim * args.dim);
    }
  });
}

template <typename T>
void fill_upper_triangles(const MomentsArgs<T>& args) {
  for (index_t g = 0; g < args.groups; ++g) {
    double* cross = args.cross + g * args.dim * args.dim;
    for (index_t i = 0; i < args.dim; ++i) {
      for (index_t j = 0; j < i; ++j) cross[j * args.dim + i] = cross[i * args.dim + j];
    }
  }
}

}  // namespace

template <typename T>
void moments_cpu(const MomentsArgs<T>& args, int threads) {
  const SimdLevel level = simd_level();
  std::fill_n(args.count, args.groups, index_t{0});
  std::fill_n(args.sums, args.groups * args.dim, 0.0);
  std::fill_n(args.cross, args.groups * args.dim * args.dim, 0.0);
  if (ceil_div(args.dim, 2 * simd_lanes<T>(level)) < kSharedPanels) {
    moments_of_few_columns(args, level, threads);
  } else {
    moments_of_many_columns(args, level, threads);
  }
  fill_upper_triangles(args);
}

template void moments_cpu(const MomentsArgs<float>&, int);
template void moments_cpu(const MomentsArgs<double>&, int);

}  // namespace fisherfast
