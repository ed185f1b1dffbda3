// The threads of the CPU kernels, for ThreadSanitizer: every op, in every dtype, at every
// instruction set of this machine, on 1, 2, 3 and 8 threads, then on the threads of two callers at
// once. The same bits must come out. Exits with 1 on a difference.
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "cases.h"

using namespace fisherfast;

namespace {

constexpr int kThreads[] = {2, 3, 8};
constexpr int kCallerThreads = 3;

// Returns how many of the results of one case differ from those of one thread.
int count_differences(const Case& op) {
  int differences = 0;
  const auto compare = [&](bool same, const char* how, int threads) {
    if (same) return;
    ++differences;
    std::printf("%s, %s: %s on %d threads must give the bits of one thread, got others\n",
                simd_name(simd_level()), op.name.c_str(), how, threads);
  };
  const Results expected = op.run(1);
  for (const int threads : kThreads) compare(op.run(threads) == expected, "one caller", threads);

  Results other;
  std::thread caller([&] { other = op.run(kCallerThreads); });
  const Results own = op.run(kCallerThreads);
  caller.join();
  compare(own == expected && other == expected, "two callers", kCallerThreads);
  return differences;
}

}  // namespace

int main() {
  int differences = 0;
  std::size_t count = 0;
  for (const std::string& level : simd_names()) {
    use_simd(level);
    for (const auto& ops : {cases<float>(), cases<double>()}) {
      for (const Case& op : ops) differences += count_differences(op);
      count += ops.size();
    }
    std::printf("%s: done\n", level.c_str());
  }
  std::printf("%zu cases, %d differences\n", count, differences);
  return differences == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
