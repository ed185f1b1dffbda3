// Where the patches of a feature map lie that the kernel of a convolution meets.
#pragma once

#include "core/types.h"

namespace fisherfast {

// Entry (c, ky, kx) of the patch at (oy, ox) is x[c, oy stride - padding + ky dilation, ...], zero
// outside. Pairs are of the height and the width. No member functions: the sources that read it are
// compiled several times.
struct PatchGeometry {
  index_t size[2];  // H, W of x
  index_t kernel[2];
  index_t stride[2];
  index_t padding[2];
  index_t dilation[2];
  index_t out[2];  // positions
};

}  // namespace fisherfast
