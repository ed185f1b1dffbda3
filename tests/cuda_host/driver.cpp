// Reads one case from standard input, runs it in every order asked for, writes the results to
// standard output. harness.py is the other end. Settings of a case, besides those of kernel_case.h:
//
//   orders NAME... | limit BYTES | grid X YZ
#include <cstdio>
#include <exception>
#include <iostream>

#include "core/cuda/cuda.cuh"
#include "cuda_host/faults.h"
#include "cuda_host/scheduler.h"
#include "ops/all.h"
#include "support/kernel_case.h"

namespace {

template <typename Args>
void run(const Case& call, void (*op)(const Args&, int, void*)) {
  constexpr int kDevice = 0;
  Run<Args> run(call);
  run.add_workspace();
  op(run.args, kDevice, nullptr);
  run.write(std::cout);
}

// False for an unknown op.
template <typename T>
bool run_op(const Case& call) {
#define FF_CASE(name)                      \
  if (call.op == #name) {                  \
    run(call, fisherfast::name##_cuda<T>); \
    return true;                           \
  }
  FF_FOR_EACH_OP(FF_CASE)
#undef FF_CASE
  return false;
}

void apply(const std::map<std::string, std::string>& settings) {
  for (const auto& [name, values] : settings) {
    std::istringstream words(values);
    int bytes = 0;
    if (name == "limit" && words >> bytes) cuda_host::set_dynamic_limit(bytes);
    if (name == "grid") words >> fisherfast::kMaxGridX >> fisherfast::kMaxGridYZ;
  }
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  try {
    Case call;
    call.read(std::cin);
    apply(call.settings);
    std::istringstream orders(call.settings.at("orders"));
    for (std::string order; orders >> order;) {
      cuda_host::set_order(order);
      const bool known = call.dtype == "float64" ? run_op<double>(call) : run_op<float>(call);
      if (known) continue;
      const auto fault = cuda_host::faults().find(call.op);
      if (fault == cuda_host::faults().end()) {
        std::cerr << "op must be known, got " << call.op << '\n';
        return 2;
      }
      run(call, fault->second);
    }
  } catch (const std::exception& error) {
    std::cerr << "raised: " << error.what() << '\n';
    return 2;
  }
  return 0;
}
