// Kernels with one planted fault each, by name.
#pragma once

#include <map>
#include <string>

#include "core/fields.h"

namespace cuda_host {

struct FaultArgs {
  const float* x;  // [rows]
  float* y;        // out [rows]
  fisherfast::index_t rows;

  FF_FIELDS(x, y, rows)
};

using Fault = void (*)(const FaultArgs& args, int device, void* stream);
const std::map<std::string, Fault>& faults();

}  // namespace cuda_host
