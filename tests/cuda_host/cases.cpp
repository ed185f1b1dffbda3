// The launchers of csrc/ops, called with the arrays of a case.
#include "case.h"
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

namespace cuda_host {
namespace {

using namespace fisherfast;

constexpr int kDevice = 0;

template <typename T>
void fisher_solve(Case& call) {
  const index_t B = call.number("batch"), d = call.number("dim"), P = call.number("params");
  FisherSolveArgs<T> args{};
  args.cov = call.input<T>("cov");
  args.deriv = call.input<T>("deriv");
  for (int i = 0; i < 3; ++i) {
    args.cov_strides[i] = call.number("cov_stride" + std::to_string(i));
    args.deriv_strides[i] = call.number("deriv_stride" + std::to_string(i));
  }
  args.fisher = call.output<T>("fisher", B * P * P);
  args.half = call.output<T>("half", B * d * P);
  args.info = call.output<std::int32_t>("info", B);
  args.condition = call.output<T>("condition", B);
  if (call.flag("inverse_rows")) args.inverse_rows = call.output<T>("inverse_rows", B * d);
  if (call.flag("solution")) args.solution = call.output<T>("solution", B * d * P);
  args.batch = B;
  args.dim = d;
  args.params = P;
  args.ridge = static_cast<T>(call.numbers.at("ridge"));
  fisher_solve_cuda(args, kDevice, nullptr);
}

template <typename T>
void fisher_solve_backward(Case& call) {
  const index_t B = call.number("batch"), d = call.number("dim"), P = call.number("params");
  FisherSolveBackwardArgs<T> args{};
  args.grad_fisher = call.input<T>("grad_fisher");
  args.solution = call.input<T>("solution");
  args.grad_cov = call.output<T>("grad_cov", B * d * d);
  args.grad_deriv = call.output<T>("grad_deriv", B * d * P);
  args.batch = B;
  args.dim = d;
  args.params = P;
  args.ridge = static_cast<T>(call.numbers.at("ridge"));
  fisher_solve_backward_cuda(args, kDevice, nullptr);
}

template <typename T>
void moments(Case& call) {
  const index_t N = call.number("rows"), d = call.number("dim"), G = call.number("groups");
  MomentsArgs<T> args{};
  args.x = call.input<T>("x");
  args.row_stride = call.number("row_stride");
  args.group = call.input<index_t>("group");
  args.pilot = call.input<T>("pilot");
  args.count = call.output<index_t>("count", G);
  args.sums = call.output<double>("sums", G * d);
  args.cross = call.output<double>("cross", G * d * d);
  const std::unique_ptr<double[]> workspace(new double[moments_workspace(N, d, G)]);
  std::memset(workspace.get(), 0xff, moments_workspace(N, d, G) * sizeof(double));
  args.workspace = workspace.get();
  args.rows = N;
  args.dim = d;
  args.groups = G;
  moments_cuda(args, kDevice, nullptr);
}

template <typename T>
void lift(Case& call) {
  const index_t n = call.number("rows"), k = call.number("dim"), G = call.number("groups");
  LiftArgs<T> args{};
  args.projected = call.input<T>("projected");
  args.row_stride = call.number("row_stride");
  args.bias = call.input<T>("bias");
  args.pilot = call.input<T>("pilot");
  args.features = call.output<T>("features", n * k);
  args.sums = call.output<double>("sums", G * k);
  args.rows = n;
  args.dim = k;
  args.groups = G;
  args.first = call.number("first");
  args.slope = static_cast<T>(call.numbers.at("slope"));
  lift_cuda(args, kDevice, nullptr);
}

template <typename T>
void lift_moments(Case& call) {
  LiftMomentsArgs<T> args{};
  args.z = call.input<T>("z");
  args.row_stride = call.number("row_stride");
  args.weight = call.input<T>("weight");
  args.bias = call.input<T>("bias");
  args.pilot = call.input<T>("pilot");
  args.offsets = call.input<index_t>("offsets");
  args.sums = call.updated<double>("sums");
  args.cross = call.updated<double>("cross");
  args.rows = call.number("rows");
  args.dim = call.number("dim");
  args.lifted = call.number("lifted");
  args.folds = call.number("folds");
  args.halves = call.number("halves");
  args.start = call.number("start");
  args.size = call.number("size");
  args.slope = static_cast<T>(call.numbers.at("slope"));
  const index_t bytes =
      lift_moments_workspace<T>(args.rows, args.dim, args.lifted, args.folds, args.halves);
  const std::unique_ptr<char[]> workspace(new char[bytes]);
  std::memset(workspace.get(), 0xff, bytes);
  args.workspace = workspace.get();
  lift_moments_cuda(args, kDevice, nullptr);
}

template <typename T>
void spatial_moments(Case& call) {
  SpatialMomentsArgs<T> args{};
  args.x = call.input<T>("x");
  for (int i = 0; i < 4; ++i) args.strides[i] = call.number("stride" + std::to_string(i));
  args.pilot = call.input<T>("pilot");
  args.rows = call.number("rows");
  args.channels = call.number("channels");
  args.height = call.number("height");
  args.width = call.number("width");
  const index_t sums = args.height * args.width * args.channels;
  args.sums = call.output<double>("sums", sums);
  args.cross = call.output<double>("cross", sums * args.channels);
  spatial_moments_cuda(args, kDevice, nullptr);
}

template <typename T>
void gradient_squares(Case& call) {
  GradientSquaresArgs<T> args{};
  args.x = call.input<T>("x");
  args.g = call.input<T>("g");
  for (int i = 0; i < 4; ++i) {
    args.x_strides[i] = call.number("x_stride" + std::to_string(i));
    args.g_strides[i] = call.number("g_stride" + std::to_string(i));
  }
  args.samples = call.number("samples");
  args.groups = call.number("groups");
  args.inputs = call.number("group_inputs");
  args.outputs = call.number("group_outputs");
  for (int i = 0; i < 2; ++i) {
    const std::string axis = std::to_string(i);
    args.in[i] = call.number("in" + axis);
    args.out[i] = call.number("out" + axis);
    args.kernel[i] = call.number("kernel" + axis);
    args.stride[i] = call.number("stride" + axis);
    args.padding[i] = call.number("padding" + axis);
    args.dilation[i] = call.number("dilation" + axis);
  }
  const index_t columns = args.inputs * args.kernel[0] * args.kernel[1];
  args.squares = call.output<double>("squares", args.groups * args.outputs * columns);
  const index_t doubles =
      gradient_squares_workspace(args.samples, args.groups, args.outputs, columns);
  const std::unique_ptr<double[]> workspace(new double[doubles]);
  std::memset(workspace.get(), 0xff, doubles * sizeof(double));
  args.workspace = workspace.get();
  gradient_squares_cuda(args, kDevice, nullptr);
}

// x and y of a dual op: apart, or y in the place of a copy of x.
template <typename T, typename Args>
void dual_buffers(Case& call, Args& args, index_t numbers) {
  args.x = call.input<T>("x");
  if (call.flag("in_place")) {
    args.y = call.updated<T>("x");
    args.x = args.y;
  } else {
    args.y = call.output<T>("y", numbers);
  }
  args.slice_stride = call.number("slice_stride");
  args.tangents = call.number("tangents");
}

template <typename T>
void dual_activation(Case& call) {
  DualActivationArgs<T> args{};
  args.outer = call.number("outer");
  args.channels = call.number("channels");
  args.inner = call.number("inner");
  args.output_stride = call.number("output_stride");
  const index_t size = args.outer * args.channels * args.inner;
  dual_buffers<T>(call, args, call.number("tangents") * args.output_stride + size);
  args.scale = call.input<T>("scale");
  args.shift = call.input<T>("shift");
  args.slope = call.input<T>("slope");
  args.kind = static_cast<Activation>(call.number("kind"));
  args.a = static_cast<T>(call.numbers.at("a"));
  args.b = static_cast<T>(call.numbers.at("b"));
  args.c = static_cast<T>(call.numbers.at("c"));
  dual_activation_cuda(args, kDevice, nullptr);
}

template <typename T>
void dual_norm(Case& call) {
  DualNormArgs<T> args{};
  args.rows = call.number("rows");
  args.width = call.number("width");
  dual_buffers<T>(call, args, (1 + call.number("tangents")) * args.rows * args.width);
  args.weight = call.input<T>("weight");
  args.bias = call.input<T>("bias");
  args.groups = call.number("groups");
  args.inner = call.number("inner");
  args.eps = static_cast<T>(call.numbers.at("eps"));
  args.centre = call.flag("centre");
  dual_norm_cuda(args, kDevice, nullptr);
}

template <typename T>
void dual_softmax(Case& call) {
  DualSoftmaxArgs<T> args{};
  args.outer = call.number("outer");
  args.width = call.number("width");
  args.inner = call.number("inner");
  dual_buffers<T>(call, args, (1 + call.number("tangents")) * args.outer * args.width * args.inner);
  args.log = call.flag("log");
  dual_softmax_cuda(args, kDevice, nullptr);
}

template <typename T>
void dual_pool(Case& call) {
  DualPoolArgs<T> args{};
  args.outer = call.number("outer");
  args.inner = call.number("inner");
  index_t pooled = args.outer * args.inner;
  for (int i = 0; i < kPoolDims; ++i) {
    const std::string dim = std::to_string(i);
    args.in[i] = call.number("in" + dim);
    args.out[i] = call.number("out" + dim);
    args.kernel[i] = call.number("kernel" + dim);
    args.stride[i] = call.number("stride" + dim);
    args.padding[i] = call.number("padding" + dim);
    args.dilation[i] = call.number("dilation" + dim);
    pooled *= args.out[i];
  }
  dual_buffers<T>(call, args, (1 + call.number("tangents")) * pooled);
  dual_pool_cuda(args, kDevice, nullptr);
}

template <typename T>
GramSide<T> gram_side(Case& call, const std::string& name) {
  GramSide<T> side{};
  side.a = call.input<T>(name + "_a");
  side.b = call.input<T>(name + "_b");
  for (int i = 0; i < 3; ++i) side.a_strides[i] = call.number(name + "_a" + std::to_string(i));
  for (int i = 0; i < 4; ++i) side.b_strides[i] = call.number(name + "_b" + std::to_string(i));
  side.rows = call.number(name + "_rows");
  side.columns = call.number(name + "_columns");
  side.positions = call.number(name + "_positions");
  return side;
}

template <typename T>
void gradient_gram(Case& call) {
  GradientGramArgs<T> args{};
  args.left = gram_side<T>(call, "left");
  args.right = gram_side<T>(call, "right");
  args.inputs = call.number("D");
  args.outputs = call.number("M");
  args.symmetric = call.flag("symmetric");
  args.gram = call.output<double>(
      "gram", args.left.rows * args.left.columns * args.right.rows * args.right.columns);
  gradient_gram_cuda(args, kDevice, nullptr);
}

template <typename T>
void patch_moments(Case& call) {
  PatchMomentsArgs<T> args{};
  args.x = call.input<T>("x");
  for (int i = 0; i < 4; ++i) args.strides[i] = call.number("stride" + std::to_string(i));
  for (int i = 0; i < 2; ++i) {
    const std::string dim = std::to_string(i);
    args.size[i] = call.number("size" + dim);
    args.kernel[i] = call.number("kernel" + dim);
    args.stride[i] = call.number("step" + dim);
    args.padding[i] = call.number("padding" + dim);
    args.dilation[i] = call.number("dilation" + dim);
    args.out[i] = call.number("out" + dim);
  }
  args.samples = call.number("samples");
  args.channels = call.number("channels");
  args.groups = call.number("groups");
  args.width = args.channels * args.kernel[0] * args.kernel[1];
  args.sums = call.output<double>("sums", args.groups * args.width);
  args.cross = call.output<double>("cross", args.groups * args.width * args.width);
  const index_t rows = args.samples * args.out[0] * args.out[1];
  const index_t doubles = patch_moments_workspace(rows, args.width, args.groups);
  const std::unique_ptr<double[]> workspace(new double[doubles]);
  std::memset(workspace.get(), 0xff, doubles * sizeof(double));
  args.workspace = workspace.get();
  patch_moments_cuda(args, kDevice, nullptr);
}

template <typename T>
bool run(Case& call) {
  static const std::map<std::string, void (*)(Case&)> ops = {
      {"dual_activation", dual_activation<T>},
      {"dual_norm", dual_norm<T>},
      {"dual_pool", dual_pool<T>},
      {"dual_softmax", dual_softmax<T>},
      {"fisher_solve", fisher_solve<T>},
      {"fisher_solve_backward", fisher_solve_backward<T>},
      {"gradient_gram", gradient_gram<T>},
      {"gradient_squares", gradient_squares<T>},
      {"moments", moments<T>},
      {"patch_moments", patch_moments<T>},
      {"spatial_moments", spatial_moments<T>},
      {"lift", lift<T>},
      {"lift_moments", lift_moments<T>}};
  const auto op = ops.find(call.op);
  if (op == ops.end()) return false;
  op->second(call);
  return true;
}

}  // namespace

bool run_op(Case& call) { return call.dtype == "float64" ? run<double>(call) : run<float>(call); }

}  // namespace cuda_host
