// Planted faults that AddressSanitizer and UndefinedBehaviorSanitizer must catch: `overrun heap`
// writes one number past the scratch memory of a kernel, on a thread of a kernel; `overrun sum`
// adds past the largest index. Exits with 0, for a test to see, when nothing stops it.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>

#include "core/cpu/aligned.h"
#include "core/cpu/parallel.h"

using namespace fisherfast;

namespace {

constexpr index_t kNumbers = 1000;

void write_past_the_scratch_memory(index_t extra) {
  const AlignedArray<float> scratch = aligned_array<float>(kNumbers);
  parallel_for(kNumbers + extra, 100, 2, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) scratch[i] = static_cast<float>(i);
  });
  std::printf("%g\n", static_cast<double>(scratch[kNumbers / 2]));
}

void add_past_the_largest_index(index_t extra) {
  const index_t sum = std::numeric_limits<index_t>::max() - 1 + extra;
  std::printf("%lld\n", static_cast<long long>(sum));
}

}  // namespace

// overrun FAULT EXTRA: nothing is wrong with EXTRA = 0 (heap) or 1 (sum), one more is a fault.
int main(int argc, char** argv) {
  if (argc != 3) return EXIT_FAILURE;
  const index_t extra = std::atoll(argv[2]);
  if (argv[1] == std::string("heap")) {
    write_past_the_scratch_memory(extra);
  } else {
    add_past_the_largest_index(extra);
  }
  return EXIT_SUCCESS;
}
