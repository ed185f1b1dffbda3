// The Python module `fisherfast._C`: the only file that knows Python.
//
// Tensors arrive as integers (data pointers) with their sizes; fisherfast/ops.py has checked them.
// Every op exists once a dtype, as <op>_<device>_<dtype>, and runs with the GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "core/cpu/threads.h"
#include "ops/dual/dual_activation.h"
#include "ops/dual/dual_norm.h"
#include "ops/dual/dual_pool.h"
#include "ops/dual/dual_softmax.h"
#include "ops/gradients/gradient_gram.h"
#include "ops/gradients/gradient_squares.h"
#include "ops/moments/lift.h"
#include "ops/moments/lift_moments.h"
#include "ops/moments/moments.h"
#include "ops/moments/patch_moments.h"
#include "ops/moments/spatial_moments.h"
#include "ops/solve/fisher_solve.h"
#include "ops/solve/fisher_solve_backward.h"

namespace py = pybind11;

namespace fisherfast {
namespace {

using Address = std::uintptr_t;
using Strides3 = std::array<index_t, 3>;
using Strides4 = std::array<index_t, 4>;
using Plane = std::array<index_t, 2>;
using PoolSizes = std::array<index_t, kPoolDims>;
using WithoutGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
FisherSolveArgs<T> fisher_solve_args(Address cov, Strides3 cov_strides, Address deriv,
                                     Strides3 deriv_strides, Address fisher, Address half,
                                     Address info, Address condition, Address inverse_rows,
                                     Address solution, index_t batch, index_t dim, index_t params,
                                     double ridge) {
  return {pointer<const T>(cov),
          {cov_strides[0], cov_strides[1], cov_strides[2]},
          pointer<const T>(deriv),
          {deriv_strides[0], deriv_strides[1], deriv_strides[2]},
          pointer<T>(fisher),
          pointer<T>(half),
          pointer<std::int32_t>(info),
          pointer<T>(condition),
          pointer<T>(inverse_rows),
          pointer<T>(solution),
          batch,
          dim,
          params,
          static_cast<T>(ridge)};
}

template <typename T>
FisherSolveBackwardArgs<T> fisher_solve_backward_args(Address grad_fisher, Address solution,
                                                      Address grad_cov, Address grad_deriv,
                                                      index_t batch, index_t dim, index_t params,
                                                      double ridge) {
  return {pointer<const T>(grad_fisher),
          pointer<const T>(solution),
          pointer<T>(grad_cov),
          pointer<T>(grad_deriv),
          batch,
          dim,
          params,
          static_cast<T>(ridge)};
}

template <typename T>
MomentsArgs<T> moments_args(Address x, index_t row_stride, Address group, Address pilot,
                            Address count, Address sums, Address cross, Address workspace,
                            index_t rows, index_t dim, index_t groups) {
  return {pointer<const T>(x),
          row_stride,
          pointer<const index_t>(group),
          pointer<const T>(pilot),
          pointer<index_t>(count),
          pointer<double>(sums),
          pointer<double>(cross),
          pointer<double>(workspace),
          rows,
          dim,
          groups};
}

template <typename T>
LiftArgs<T> lift_args(Address projected, index_t row_stride, Address bias, Address pilot,
                      Address features, Address sums, index_t rows, index_t dim, index_t groups,
                      index_t first, double slope) {
  return {pointer<const T>(projected),
          row_stride,
          pointer<const T>(bias),
          pointer<const T>(pilot),
          pointer<T>(features),
          pointer<double>(sums),
          rows,
          dim,
          groups,
          first,
          static_cast<T>(slope)};
}

template <typename T>
SpatialMomentsArgs<T> spatial_moments_args(Address x, std::array<index_t, 4> strides, Address pilot,
                                           Address sums, Address cross, index_t rows,
                                           index_t channels, index_t height, index_t width) {
  return {pointer<const T>(x),
          {strides[0], strides[1], strides[2], strides[3]},
          pointer<const T>(pilot),
          pointer<double>(sums),
          pointer<double>(cross),
          rows,
          channels,
          height,
          width};
}

template <typename T>
LiftMomentsArgs<T> lift_moments_args(Address z, index_t row_stride, Address weight, Address bias,
                                     Address pilot, Address offsets, Address sums, Address cross,
                                     Address workspace, index_t rows, index_t dim, index_t lifted,
                                     index_t folds, index_t halves, index_t start, index_t size,
                                     double slope) {
  return {pointer<const T>(z),
          row_stride,
          pointer<const T>(weight),
          pointer<const T>(bias),
          pointer<const T>(pilot),
          pointer<const index_t>(offsets),
          pointer<double>(sums),
          pointer<double>(cross),
          pointer<void>(workspace),
          rows,
          dim,
          lifted,
          folds,
          halves,
          start,
          size,
          static_cast<T>(slope)};
}

template <typename T>
DualActivationArgs<T> dual_activation_args(Address x, Address y, Address scale, Address shift,
                                           Address slope, index_t slice_stride,
                                           index_t output_stride, index_t tangents, index_t outer,
                                           index_t channels, index_t inner, int kind, double a,
                                           double b, double c) {
  return {pointer<const T>(x),
          pointer<T>(y),
          pointer<const T>(scale),
          pointer<const T>(shift),
          pointer<const T>(slope),
          slice_stride,
          output_stride,
          tangents,
          outer,
          channels,
          inner,
          static_cast<Activation>(kind),
          static_cast<T>(a),
          static_cast<T>(b),
          static_cast<T>(c)};
}

template <typename T>
DualNormArgs<T> dual_norm_args(Address x, Address y, Address weight, Address bias,
                               index_t slice_stride, index_t tangents, index_t rows, index_t width,
                               index_t groups, index_t inner, double eps, bool centre) {
  return {pointer<const T>(x),
          pointer<T>(y),
          pointer<const T>(weight),
          pointer<const T>(bias),
          slice_stride,
          tangents,
          rows,
          width,
          groups,
          inner,
          static_cast<T>(eps),
          centre};
}

template <typename T>
DualSoftmaxArgs<T> dual_softmax_args(Address x, Address y, index_t slice_stride, index_t tangents,
                                     index_t outer, index_t width, index_t inner, bool log) {
  return {pointer<const T>(x), pointer<T>(y), slice_stride, tangents, outer, width, inner, log};
}

template <typename T>
DualPoolArgs<T> dual_pool_args(Address x, Address y, index_t slice_stride, index_t tangents,
                               index_t outer, index_t inner, PoolSizes in, PoolSizes out,
                               PoolSizes kernel, PoolSizes stride, PoolSizes padding,
                               PoolSizes dilation) {
  return {pointer<const T>(x),
          pointer<T>(y),
          slice_stride,
          tangents,
          outer,
          inner,
          {in[0], in[1], in[2]},
          {out[0], out[1], out[2]},
          {kernel[0], kernel[1], kernel[2]},
          {stride[0], stride[1], stride[2]},
          {padding[0], padding[1], padding[2]},
          {dilation[0], dilation[1], dilation[2]}};
}

using Pair = std::array<index_t, 2>;

template <typename T>
PatchMomentsArgs<T> patch_moments_args(Address x, std::array<index_t, 4> strides, Pair size,
                                       Pair kernel, Pair stride, Pair padding, Pair dilation,
                                       Pair out, Address sums, Address cross, Address workspace,
                                       index_t samples, index_t channels, index_t groups) {
  return {pointer<const T>(x),
          {strides[0], strides[1], strides[2], strides[3]},
          {size[0], size[1]},
          {kernel[0], kernel[1]},
          {stride[0], stride[1]},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]},
          {out[0], out[1]},
          pointer<double>(sums),
          pointer<double>(cross),
          pointer<double>(workspace),
          samples,
          channels,
          groups,
          channels * kernel[0] * kernel[1]};
}

template <typename T>
GradientGramArgs<T> gradient_gram_args(Address a, Strides3 a_strides, Address b,
                                       std::array<index_t, 4> b_strides, Address other_a,
                                       Strides3 other_a_strides, Address other_b,
                                       std::array<index_t, 4> other_b_strides, Address gram,
                                       std::array<index_t, 4> b_shape,
                                       std::array<index_t, 4> other_b_shape, index_t inputs,
                                       bool symmetric) {
  const auto side = [](Address inputs_of, const Strides3& n, Address gradients,
                       const std::array<index_t, 4>& m, const std::array<index_t, 4>& shape) {
    return GramSide<T>{pointer<const T>(inputs_of),
                       {n[0], n[1], n[2]},
                       pointer<const T>(gradients),
                       {m[0], m[1], m[2], m[3]},
                       shape[0],
                       shape[1],
                       shape[2]};
  };
  return {side(a, a_strides, b, b_strides, b_shape),
          side(other_a, other_a_strides, other_b, other_b_strides, other_b_shape),
          pointer<double>(gram),
          inputs,
          b_shape[3],
          symmetric};
}

template <typename T>
GradientSquaresArgs<T> gradient_squares_args(Address x, Address g, Strides4 x_strides,
                                             Strides4 g_strides, Address squares, Address workspace,
                                             index_t samples, index_t groups, index_t inputs,
                                             index_t outputs, Plane in, Plane out, Plane kernel,
                                             Plane stride, Plane padding, Plane dilation) {
  return {pointer<const T>(x),
          pointer<const T>(g),
          {x_strides[0], x_strides[1], x_strides[2], x_strides[3]},
          {g_strides[0], g_strides[1], g_strides[2], g_strides[3]},
          pointer<double>(squares),
          pointer<double>(workspace),
          samples,
          groups,
          inputs,
          outputs,
          {in[0], in[1]},
          {out[0], out[1]},
          {kernel[0], kernel[1]},
          {stride[0], stride[1]},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]}};
}

// Binds launch(make_args(numbers...), threads) as name(numbers..., threads).
template <typename Args, typename... Numbers>
void bind_cpu(py::module_& module, const std::string& name, Args (*make_args)(Numbers...),
              void (*launch)(const Args&, int)) {
  module.def(
      name.c_str(),
      [=](Numbers... numbers, int threads) { launch(make_args(numbers...), threads); },
      WithoutGil());
}

template <typename T>
void bind_cpu_ops(py::module_& module, const std::string& dtype) {
  bind_cpu(module, "fisher_solve_cpu_" + dtype, fisher_solve_args<T>, fisher_solve_cpu<T>);
  bind_cpu(module, "fisher_solve_backward_cpu_" + dtype, fisher_solve_backward_args<T>,
           fisher_solve_backward_cpu<T>);
  bind_cpu(module, "gradient_squares_cpu_" + dtype, gradient_squares_args<T>,
           gradient_squares_cpu<T>);
  bind_cpu(module, "moments_cpu_" + dtype, moments_args<T>, moments_cpu<T>);
  bind_cpu(module, "spatial_moments_cpu_" + dtype, spatial_moments_args<T>, spatial_moments_cpu<T>);
  bind_cpu(module, "lift_cpu_" + dtype, lift_args<T>, lift_cpu<T>);
  bind_cpu(module, "lift_moments_cpu_" + dtype, lift_moments_args<T>, lift_moments_cpu<T>);
  bind_cpu(module, "dual_activation_cpu_" + dtype, dual_activation_args<T>, dual_activation_cpu<T>);
  bind_cpu(module, "dual_norm_cpu_" + dtype, dual_norm_args<T>, dual_norm_cpu<T>);
  bind_cpu(module, "dual_softmax_cpu_" + dtype, dual_softmax_args<T>, dual_softmax_cpu<T>);
  bind_cpu(module, "dual_pool_cpu_" + dtype, dual_pool_args<T>, dual_pool_cpu<T>);
  bind_cpu(module, "gradient_gram_cpu_" + dtype, gradient_gram_args<T>, gradient_gram_cpu<T>);
  bind_cpu(module, "patch_moments_cpu_" + dtype, patch_moments_args<T>, patch_moments_cpu<T>);
}

#ifdef FISHERFAST_WITH_CUDA
// Binds launch(make_args(numbers...), device, stream) as name(numbers..., device, stream).
template <typename Args, typename... Numbers>
void bind_cuda(py::module_& module, const std::string& name, Args (*make_args)(Numbers...),
               void (*launch)(const Args&, int, void*)) {
  module.def(
      name.c_str(),
      [=](Numbers... numbers, int device, Address stream) {
        launch(make_args(numbers...), device, pointer<void>(stream));
      },
      WithoutGil());
}

template <typename T>
void bind_cuda_ops(py::module_& module, const std::string& dtype) {
  bind_cuda(module, "fisher_solve_cuda_" + dtype, fisher_solve_args<T>, fisher_solve_cuda<T>);
  bind_cuda(module, "fisher_solve_backward_cuda_" + dtype, fisher_solve_backward_args<T>,
            fisher_solve_backward_cuda<T>);
  bind_cuda(module, "gradient_squares_cuda_" + dtype, gradient_squares_args<T>,
            gradient_squares_cuda<T>);
  bind_cuda(module, "moments_cuda_" + dtype, moments_args<T>, moments_cuda<T>);
  bind_cuda(module, "spatial_moments_cuda_" + dtype, spatial_moments_args<T>,
            spatial_moments_cuda<T>);
  bind_cuda(module, "lift_cuda_" + dtype, lift_args<T>, lift_cuda<T>);
  bind_cuda(module, "lift_moments_cuda_" + dtype, lift_moments_args<T>, lift_moments_cuda<T>);
  bind_cuda(module, "dual_activation_cuda_" + dtype, dual_activation_args<T>,
            dual_activation_cuda<T>);
  bind_cuda(module, "dual_norm_cuda_" + dtype, dual_norm_args<T>, dual_norm_cuda<T>);
  bind_cuda(module, "dual_softmax_cuda_" + dtype, dual_softmax_args<T>, dual_softmax_cuda<T>);
  bind_cuda(module, "dual_pool_cuda_" + dtype, dual_pool_args<T>, dual_pool_cuda<T>);
  bind_cuda(module, "gradient_gram_cuda_" + dtype, gradient_gram_args<T>, gradient_gram_cuda<T>);
  bind_cuda(module, "patch_moments_cuda_" + dtype, patch_moments_args<T>, patch_moments_cuda<T>);
  // Bytes of the workspaces.
  module.def(("moments_workspace_" + dtype).c_str(), [](index_t rows, index_t dim, index_t groups) {
    return moments_workspace(rows, dim, groups) * static_cast<index_t>(sizeof(double));
  });
  module.def(("gradient_squares_workspace_" + dtype).c_str(),
             [](index_t samples, index_t groups, index_t outputs, index_t columns) {
               return gradient_squares_workspace(samples, groups, outputs, columns) *
                      static_cast<index_t>(sizeof(double));
             });
  module.def(("patch_moments_workspace_" + dtype).c_str(), [](index_t rows, index_t width,
                                                              index_t groups) {
    return patch_moments_workspace(rows, width, groups) * static_cast<index_t>(sizeof(double));
  });
  module.def(("lift_moments_workspace_" + dtype).c_str(), &lift_moments_workspace<T>);
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
