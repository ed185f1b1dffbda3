// The Python module `fisherfast._C`: the only file that uses Python's API.
//
// Tensors arrive as integers (data pointers) with their sizes; fisherfast/ops has checked them.
// Each op exists once per device and dtype, as <op>_<device>_<dtype>, takes the fields of its
// argument struct by name, and runs with the GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>

#include "core/cpu/threads.h"
#include "ops/all.h"

namespace py = pybind11;

namespace fisherfast {
namespace {

using Address = std::uintptr_t;

// Fields of an argument struct from Python's values: an address or None, numbers, or a number.
template <typename T>
void set_field(T*& field, const py::handle& value) {
  field = value.is_none() ? nullptr : reinterpret_cast<T*>(value.cast<Address>());
}
template <typename T, std::size_t n>
void set_field(T (&field)[n], const py::handle& value) {
  const auto numbers = value.cast<std::array<T, n>>();
  std::copy(numbers.begin(), numbers.end(), field);
}
template <typename T>
void set_field(T& field, const py::handle& value) {
  field = value.cast<T>();
}
void set_field(Activation& field, const py::handle& value) {
  field = static_cast<Activation>(value.cast<int>());
}

// The argument struct of an op from its fields by name: all of them and no others.
template <typename Args>
Args args_from(const py::kwargs& given) {
  const auto check = [&](bool named) {
    FF_CHECK(named, "the fields must be " << Args::kFields << ", got "
                                          << std::string(py::str(py::list(given))));
  };
  Args args{};
  std::size_t count = 0;
  for_each_field(args, [&](const std::string& name, auto& field) {
    const py::handle value = PyDict_GetItemString(given.ptr(), name.c_str());
    check(value.ptr() != nullptr);
    set_field(field, value);
    ++count;
  });
  check(given.size() == count);
  return args;
}

// Binds an op as name(threads, field=value, ...).
template <typename Args>
void bind_cpu(py::module_& module, const std::string& name, void (*op)(const Args&, int)) {
  module.def(name.c_str(), [op](int threads, const py::kwargs& fields) {
    const Args args = args_from<Args>(fields);
    const py::gil_scoped_release without_gil;
    op(args, threads);
  });
}

template <typename T>
void bind_cpu_ops(py::module_& module, const std::string& dtype) {
#define FF_BIND(op) bind_cpu(module, #op "_cpu_" + dtype, op##_cpu<T>);
  FF_FOR_EACH_OP(FF_BIND)
#undef FF_BIND
}

#ifdef FISHERFAST_WITH_CUDA
// Binds an op as name(device, stream, field=value, ...), and the bytes of its workspace.
template <typename Args>
void bind_cuda(py::module_& module, const std::string& name, const std::string& workspace,
               void (*op)(const Args&, int, void*)) {
  module.def(name.c_str(), [op](int device, Address stream, const py::kwargs& fields) {
    const Args args = args_from<Args>(fields);
    const py::gil_scoped_release without_gil;
    op(args, device, reinterpret_cast<void*>(stream));
  });
  module.def(workspace.c_str(),
             [](const py::kwargs& fields) { return workspace_bytes(args_from<Args>(fields)); });
}

template <typename T>
void bind_cuda_ops(py::module_& module, const std::string& dtype) {
#define FF_BIND(op) \
  bind_cuda(module, #op "_cuda_" + dtype, #op "_workspace_" + dtype, op##_cuda<T>);
  FF_FOR_EACH_OP(FF_BIND)
#undef FF_BIND
  module.def(("fisher_solve_shared_bytes_" + dtype).c_str(), &fisher_solve_shared_bytes<T>);
}
#endif

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = FISHERFAST_VERSION;
  info["compiler"] = compiler();
  info["simd"] = simd_name(simd_level());
  info["simd_available"] = simd_names();
  info["threads"] = borrowed_pool() ? "of torch (libgomp)" : "started for each call";
#ifdef FISHERFAST_WITH_CUDA
  info["cuda"] = true;
  info["nvcc"] = FISHERFAST_NVCC_VERSION;
  info["cuda_architectures"] = FISHERFAST_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["nvcc"] = "";
  info["cuda_architectures"] = "";
#endif
  return info;
}

}  // namespace
}  // namespace fisherfast

PYBIND11_MODULE(_C, module) {
  using namespace fisherfast;
  module.doc() = "Native kernels of fisherfast; call them through fisherfast.ops.";
  module.attr("__version__") = FISHERFAST_VERSION;
  module.def("build_info", &build_info, "Facts about this build, as a dict.");
  module.def("borrow_threads", &borrow_threads, "Uses the OpenMP threads of torch, if it has any.");
  module.def("use_simd", &use_simd, "Chooses the instruction set of the CPU kernels by name.");
  bind_cpu_ops<float>(module, "float32");
  bind_cpu_ops<double>(module, "float64");
#ifdef FISHERFAST_WITH_CUDA
  module.def("shared_bytes_limit", &shared_bytes_limit);
  bind_cuda_ops<float>(module, "float32");
  bind_cuda_ops<double>(module, "float64");
#endif
}
