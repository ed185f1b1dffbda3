// CPU kernel: rows are dealt into one panel a group; a full panel is multiplied with itself.
#include "ops/moments.h"

#include <algorithm>
#include <vector>

#include "core/parallel.h"

namespace fisherfast {
namespace {

// Rows whose products are added in one pass over the tile product.
constexpr index_t kUnroll = 4;
static_assert(kTileRows % kUnroll == 0, "a full panel must be a whole number of passes");

// The moments of one chunk of rows.
struct PartialMoments {
  std::vector<index_t> count;  // [G]
  std::vector<double> sums;    // [G, d]
  std::vector<double> cross;   // [G, d, d], lower triangle

  PartialMoments(index_t groups, index_t dim)
      : count(groups, 0), sums(groups * dim, 0.0), cross(groups * dim * dim, 0.0) {}
};

// The scratch of one thread: a panel of centred rows for every group.
template <typename T>
class Panels {
 public:
  explicit Panels(const MomentsArgs<T>& args)
      : args_(args),
        dim_(args.dim),
        filled_(args.groups, 0),
        panels_(args.groups * kTileRows * args.dim),
        product_(args.dim * args.dim) {}

  void add_rows(index_t begin, index_t end, PartialMoments& part) {
    for (index_t n = begin; n < end; ++n) add_row(n, part);
    for (index_t g = 0; g < args_.groups; ++g) multiply(g, part);
  }

 private:
  T* panel(index_t g) { return panels_.data() + g * kTileRows * dim_; }

  void add_row(index_t n, PartialMoments& part) {
    const index_t g = args_.group == nullptr ? 0 : args_.group[n];
    const T* x = args_.x + n * args_.row_stride;
    T* centred = panel(g) + filled_[g] * dim_;
    double* sum = part.sums.data() + g * dim_;
    for (index_t i = 0; i < dim_; ++i) {
      centred[i] = args_.pilot == nullptr ? x[i] : x[i] - args_.pilot[i];
      sum[i] += static_cast<double>(centred[i]);
    }
    ++part.count[g];
    if (++filled_[g] == kTileRows) multiply(g, part);
  }

  // cross_g += panel^T panel, and empties the panel.
  void multiply(index_t g, PartialMoments& part) {
    const index_t padded = ceil_div(filled_[g], kUnroll) * kUnroll;
    std::fill(panel(g) + filled_[g] * dim_, panel(g) + padded * dim_, T(0));
    std::fill(product_.begin(), product_.end(), T(0));
    for (index_t n = 0; n < padded; n += kUnroll) {
      const T* x0 = panel(g) + n * dim_;
      const T *x1 = x0 + dim_, *x2 = x1 + dim_, *x3 = x2 + dim_;
      for (index_t i = 0; i < dim_; ++i) {
        T* row = product_.data() + i * dim_;
        const T a0 = x0[i], a1 = x1[i], a2 = x2[i], a3 = x3[i];
        for (index_t j = 0; j <= i; ++j) {
          row[j] += (a0 * x0[j] + a1 * x1[j]) + (a2 * x2[j] + a3 * x3[j]);
        }
      }
    }
    double* cross = part.cross.data() + g * dim_ * dim_;
    for (index_t i = 0; i < dim_; ++i) {
      for (index_t j = 0; j <= i; ++j) {
        cross[i * dim_ + j] += static_cast<double>(product_[i * dim_ + j]);
      }
    }
    filled_[g] = 0;
  }

  const MomentsArgs<T>& args_;
  const index_t dim_;
  std::vector<index_t> filled_;  // [G] rows in each panel
  std::vector<T> panels_;        // [G, kTileRows, d]
  std::vector<T> product_;       // [d, d], lower triangle
};

template <typename T>
void fill_upper_triangles(const MomentsArgs<T>& args) {
  for (index_t g = 0; g < args.groups; ++g) {
    double* cross = args.cross + g * args.dim * args.dim;
    for (index_t i = 0; i < args.dim; ++i) {
      for (index_t j = 0; j < i; ++j) cross[j * args.dim + i] = cross[i * args.dim + j];
    }
  }
}

template <typename Number>
void add_to(const std::vector<Number>& part, Number* total) {
  for (std::size_t i = 0; i < part.size(); ++i) total[i] += part[i];
}

}  // namespace

template <typename T>
void moments_cpu(const MomentsArgs<T>& args, int threads) {
  const RowChunks chunks = row_chunks(args.rows, args.groups * (args.dim + 1) * (args.dim + 1));
  std::vector<PartialMoments> parts(chunks.count, PartialMoments(args.groups, args.dim));
  parallel_for(chunks.count, 1, threads, [&](index_t begin, index_t end) {
    Panels<T> panels(args);
    for (index_t c = begin; c < end; ++c) {
      panels.add_rows(chunks.begin(c), chunks.end(c), parts[c]);
    }
  });

  std::fill_n(args.count, args.groups, index_t{0});
  std::fill_n(args.sums, args.groups * args.dim, 0.0);
  std::fill_n(args.cross, args.groups * args.dim * args.dim, 0.0);
  for (const PartialMoments& part : parts) {
    add_to(part.count, args.count);
    add_to(part.sums, args.sums);
    add_to(part.cross, args.cross);
  }
  fill_upper_triangles(args);
}

template void moments_cpu(const MomentsArgs<float>&, int);
template void moments_cpu(const MomentsArgs<double>&, int);

}  // namespace fisherfast
