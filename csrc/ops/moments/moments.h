// Moments of rows by group, about a pilot m:
//
//   count_g = #{n : group_n = g}
//   sums_g  = sum_{group_n = g} (x_n - m)
//   cross_g = sum_{group_n = g} (x_n - m) (x_n - m)^T
//
// The difference x - m is taken in T. Products of T are summed in T over a tile of rows (at most
// kMomentsTileRows on the CPU, 64 on the device) and then in double.
#pragma once

#include "core/fields.h"
#include "core/simd/dispatch.h"
#include "core/types.h"

namespace fisherfast {

template <typename T>
struct MomentsArgs {
  const T* x;            // [N, d], unit column stride
  index_t row_stride;    // of x, in elements
  const index_t* group;  // [N] in [0, G), checked by the caller; or null: all rows in group 0
  const T* pilot;        // [d], or null: zero
  index_t* count;        // out [G]
  double* sums;          // out [G, d]
  double* cross;         // out [G, d, d], both triangles
  double* workspace;     // device only: workspace_bytes(), aligned to 16 bytes
  index_t rows;          // N
  index_t dim;           // d
  index_t groups;        // G

  FF_FIELDS(x, row_stride, group, pilot, count, sums, cross, workspace, rows, dim, groups)
};  // outputs and workspace alias nothing

// Rows whose products are summed in T. The error of a float32 sum of 256 products is at most
// 256 * 2^-24 = 2e-5 of the sum of their magnitudes, 1e-6 typically.
constexpr index_t kMomentsTileRows = 256;

// Cost: N d (d + 1) / 2 multiply-adds. Same bits for any number of threads.
template <typename T>
void moments_cpu(const MomentsArgs<T>& args, int threads);

// The device sums splits of the rows into partial results, then adds these in order.
constexpr index_t kRowsPerSplit = 4096;
constexpr index_t kMaxSplits = 64;

inline index_t moments_splits(index_t rows) {
  const index_t splits = ceil_div(rows, kRowsPerSplit);
  return splits < 1 ? 1 : (splits < kMaxSplits ? splits : kMaxSplits);
}

// One [d + 1, d + 1] matrix of double for every split and group.
template <typename T>
index_t workspace_bytes(const MomentsArgs<T>& args) {
  const index_t width = args.dim + 1, doubles = args.groups * width * width;
  return moments_splits(args.rows) * doubles * static_cast<index_t>(sizeof(double));
}

// CPU, one instruction set: the rows of a list (or first, first + 1, ... without a list), in panels
// of two vectors of columns about the pilot, with their sums; and the product of two panels.
struct RowList {
  const index_t* list;
  index_t first;
  index_t count;
};
FF_DECLARE_SIMD(template <typename T>
                void moments_centre(const MomentsArgs<T>& args, const RowList& rows, index_t panel,
                                    T* centred, double* sums);
                template <typename T>
                void moments_products(index_t dim, index_t row_panel, index_t column_panel,
                                      const T* left, const T* right, index_t count, double* cross);)

template <typename T>
void moments_cuda(const MomentsArgs<T>& args, int device, void* stream);

}  // namespace fisherfast
