// One random feature from its projection, as both lifts make it.
#pragma once

#include "core/types.h"

namespace fisherfast {

// leaky_relu(projected + bias) - pilot
template <typename T>
FF_HOST_DEVICE inline T lifted_feature(T projected, T bias, T slope, T pilot) {
  const T z = projected + bias;
  const T negative = slope * z;  // computed in any case: a select, where a branch would be a guess
  return (z > T(0) ? z : negative) - pilot;
}

}  // namespace fisherfast
