// The threads of the CPU kernels, for ThreadSanitizer: `threads CASES` reads a file of cases
// (tests/support/kernel_case.h) and runs each on one thread, then on three threads of two callers
// at once; the instruction sets of this machine take turns. The same bits must come out. Exits with
// 1 on a difference.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "core/simd/dispatch.h"
#include "ops/all.h"
#include "support/kernel_case.h"

using namespace fisherfast;

namespace {

constexpr int kThreads = 3;

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

// Whether two callers, each with a team of threads, get the results of one thread.
bool same_bits(const Case& call) {
  const std::string expected = results(call, 1);
  std::string other;
  std::thread caller([&] { other = results(call, kThreads); });
  const std::string own = results(call, kThreads);
  caller.join();
  if (own == expected && other == expected) return true;
  std::printf("%s, %s: %d threads must give the bits of one thread, got others\n",
              simd_name(simd_level()), call.op.c_str(), kThreads);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return EXIT_FAILURE;
  std::ifstream cases(argv[1], std::ios::binary);
  const std::vector<std::string> levels = simd_names();
  int differences = 0, count = 0;
  for (Case call; call.read(cases); ++count) {
    use_simd(levels[(count + (call.dtype == "float64")) % levels.size()]);
    differences += same_bits(call) ? 0 : 1;
  }
  std::printf("%d cases, %d differences\n", count, differences);
  return differences == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
