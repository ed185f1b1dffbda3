// The launchers of csrc/ops, called with the arrays of a case.
#include "case.h"
#include "ops/fisher_solve.h"
#include "ops/fisher_solve_backward.h"
#include "ops/lift.h"
#include "ops/lift_moments.h"
#include "ops/moments.h"
#include "ops/spatial_moments.h"

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
  args.sums = call.updated<double>("sums");
  args.cross = call.updated<double>("cross");
  args.rows = call.number("rows");
  args.dim = call.number("dim");
  args.lifted = call.number("lifted");
  args.folds = call.number("folds");
  args.halves = call.number("halves");
  args.first = call.number("first");
  args.start = call.number("start");
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
bool run(Case& call) {
  static const std::map<std::string, void (*)(Case&)> ops = {
      {"fisher_solve", fisher_solve<T>},
      {"fisher_solve_backward", fisher_solve_backward<T>},
      {"moments", moments<T>},
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
