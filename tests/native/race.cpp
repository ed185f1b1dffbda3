// A planted race that ThreadSanitizer must catch: `race LEVEL shared` lets two callers of
// lift_moments, whose contract forbids it, add to the same sums. `race LEVEL own` is the same
// without the fault. Exits with 0, for a test to see, when nothing stops it.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "ops/moments/lift_moments.h"

using namespace fisherfast;

namespace {

constexpr int kNotHere = 77;  // the machine lacks the instruction set
constexpr index_t kRows = 600, kRaw = 5, kLifted = 30, kSize = kRaw + kLifted;
constexpr index_t kOffsets[] = {0, kRows};

struct Sums {
  std::vector<double> sums = std::vector<double>(kSize);
  std::vector<double> cross = std::vector<double>(kSize * kSize);
};

void add(const std::vector<float>& z, const std::vector<float>& weight, Sums& to) {
  LiftMomentsArgs<float> args{};
  args.z = z.data();
  args.row_stride = args.dim = kRaw;
  args.weight = weight.data();
  args.bias = args.pilot = z.data();
  args.offsets = kOffsets;
  args.sums = to.sums.data();
  args.cross = to.cross.data();
  args.rows = kRows;
  args.lifted = kLifted;
  args.size = kSize;
  args.folds = args.halves = 1;
  lift_moments_cpu(args, 1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return EXIT_FAILURE;
  const std::vector<std::string> levels = simd_names();
  if (std::find(levels.begin(), levels.end(), argv[1]) == levels.end()) return kNotHere;
  use_simd(argv[1]);
  const bool shared = argv[2] == std::string("shared");
  const std::vector<float> z(kRows * kRaw, 0.5f), weight(kSize * kRaw, 0.25f);
  Sums first, second;
  std::thread other([&] { add(z, weight, shared ? first : second); });
  add(z, weight, first);
  other.join();
  std::printf("%g\n", first.sums[0] + second.sums[0]);
  return EXIT_SUCCESS;
}
