// How the driver steers the scheduler of scheduler.cpp.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace cuda_host {

// "forward", "reverse", or the seed of a random order.
void set_order(const std::string& name);

// The largest dynamic shared memory of a block, as cudaDeviceGetAttribute reports it.
void set_dynamic_limit(int bytes);

}  // namespace cuda_host
