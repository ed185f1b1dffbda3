// The threads of the CPU kernels, for ThreadSanitizer: `threads CASES` reads a file of cases
// (tests/support/kernel_case.h) and runs each at every instruction set of this machine, on 1, 2, 3
// and 8 threads, then on the threads of two callers at once. The same bits must come out. Exits
// with 1 on a difference.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "core/simd/dispatch.h"
#include "ops/all.h"
#include "support/kernel_case.h"

using namespace fisherfast;

namespace {

constexpr int kThreads[] = {2, 3, 8};
constexpr int kCallerThreads = 3;

template <typename Args>
std::string results(const Case& call, void (*op)(const Args&, int), int threads) {
  Run<Args> run(call);
  op(run.args, threads);
  std::ostringstream bytes;
  run.write(bytes);
  return bytes.str();
}

template <typename T>
std::string results(const Case& call, int threads) {
#define FF_CASE(name) \
  if (call.op == #name) return results(call, name##_cpu<T>, threads);
  FF_FOR_EACH_OP(FF_CASE)
#undef FF_CASE
  return "unknown op";
}

std::string results(const Case& call, int threads) {
  return call.dtype == "float64" ? results<double>(call, threads) : results<float>(call, threads);
}

// Returns how many of the results of one case differ from those of one thread.
int count_differences(const Case& call) {
  int differences = 0;
  const auto compare = [&](bool same, const char* how, int threads) {
    if (same) return;
    ++differences;
    std::printf("%s, %s: %s on %d threads must give the bits of one thread, got others\n",
                simd_name(simd_level()), call.op.c_str(), how, threads);
  };
  const std::string expected = results(call, 1);
  for (const int threads : kThreads) {
    compare(results(call, threads) == expected, "one caller", threads);
  }
  std::string other;
  std::thread caller([&] { other = results(call, kCallerThreads); });
  const std::string own = results(call, kCallerThreads);
  caller.join();
  compare(own == expected && other == expected, "two callers", kCallerThreads);
  return differences;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return EXIT_FAILURE;
  std::ifstream cases(argv[1], std::ios::binary);
  int differences = 0, count = 0;
  for (Case call; call.read(cases); ++count) {
    for (const std::string& level : simd_names()) {
      use_simd(level);
      differences += count_differences(call);
    }
  }
  std::printf("%d cases, %d differences\n", count, differences);
  return differences == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
