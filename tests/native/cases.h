// Calls of every CPU op on made-up numbers, large enough that eight threads have work to do.
//
// A case holds its inputs and gives its results as bytes: `run(threads)` may be called from several
// threads at once, which then share the inputs and nothing else.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <vector>

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

namespace fisherfast {

// The arrays that an op has written, zero before; compared bit for bit, so NaN equals itself.
class Results {
 public:
  template <typename T>
  T* array(index_t count) {
    arrays_.emplace_back(static_cast<std::size_t>(count) * sizeof(T));
    return reinterpret_cast<T*>(arrays_.back().data());
  }
  bool operator==(const Results& other) const { return arrays_ == other.arrays_; }

 private:
  std::list<std::vector<unsigned char>> arrays_;  // a list: growing it moves none of them
};

struct Case {
  std::string name;
  std::function<Results(int threads)> run;
};

// Numbers in [-1/2, 1/2), the same in every run (Knuth's MMIX generator).
template <typename T>
std::vector<T> numbers(index_t count) {
  std::uint64_t state = static_cast<std::uint64_t>(count);
  std::vector<T> out(count);
  for (T& number : out) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    number = static_cast<T>(static_cast<double>(state >> 11) * 0x1p-53 - 0.5);
  }
  return out;
}

// Diagonally dominant, hence positive definite.
template <typename T>
std::vector<T> covariances(index_t batch, index_t d) {
  std::vector<T> out = numbers<T>(batch * d * d);
  for (index_t b = 0; b < batch; ++b) {
    T* cov = out.data() + b * d * d;
    for (index_t i = 0; i < d; ++i) {
      for (index_t j = 0; j < i; ++j) cov[j * d + i] = cov[i * d + j];
      cov[i * d + i] = static_cast<T>(d);
    }
  }
  return out;
}

template <typename T>
Case solve_case(const std::string& name, index_t batch, index_t d, index_t P, bool with_inverse) {
  const auto cov = std::make_shared<std::vector<T>>(covariances<T>(batch, d));
  const auto deriv = std::make_shared<std::vector<T>>(numbers<T>(batch * d * P));
  return {name, [=](int threads) {
            Results out;
            const FisherSolveArgs<T> args{cov->data(),
                                          {d * d, d, 1},
                                          deriv->data(),
                                          {d * P, P, 1},
                                          out.array<T>(batch * P * P),
                                          out.array<T>(batch * d * P),
                                          out.array<std::int32_t>(batch),
                                          out.array<T>(batch),
                                          with_inverse ? out.array<T>(batch * d) : nullptr,
                                          out.array<T>(batch * d * P),
                                          batch,
                                          d,
                                          P,
                                          static_cast<T>(0.01)};
            fisher_solve_cpu(args, threads);
            return out;
          }};
}

template <typename T>
Case backward_case(index_t batch, index_t d, index_t P) {
  const auto grad = std::make_shared<std::vector<T>>(numbers<T>(batch * P * P));
  const auto solution = std::make_shared<std::vector<T>>(numbers<T>(batch * d * P));
  return {"fisher_solve_backward", [=](int threads) {
            Results out;
            const FisherSolveBackwardArgs<T> args{grad->data(),
                                                  solution->data(),
                                                  out.array<T>(batch * d * d),
                                                  out.array<T>(batch * d * P),
                                                  batch,
                                                  d,
                                                  P,
                                                  static_cast<T>(0.01)};
            fisher_solve_backward_cpu(args, threads);
            return out;
          }};
}

template <typename T>
Case moments_case(const std::string& name, index_t rows, index_t d, index_t groups) {
  const auto x = std::make_shared<std::vector<T>>(numbers<T>(rows * d));
  const auto pilot = std::make_shared<std::vector<T>>(numbers<T>(d));
  const auto group = std::make_shared<std::vector<index_t>>(rows);
  for (index_t n = 0; n < rows; ++n) (*group)[n] = n * 7 % groups;
  return {name, [=](int threads) {
            Results out;
            const MomentsArgs<T> args{x->data(),
                                      d,
                                      groups > 1 ? group->data() : nullptr,
                                      pilot->data(),
                                      out.array<index_t>(groups),
                                      out.array<double>(groups * d),
                                      out.array<double>(groups * d * d),
                                      nullptr,
                                      rows,
                                      d,
                                      groups};
            moments_cpu(args, threads);
            return out;
          }};
}

template <typename T>
Case spatial_case(const std::string& name, index_t rows, index_t C, index_t H, index_t W,
                  bool channels_last) {
  const auto x = std::make_shared<std::vector<T>>(numbers<T>(rows * C * H * W));
  const auto pilot = std::make_shared<std::vector<T>>(numbers<T>(C * H * W));
  return {name, [=](int threads) {
            Results out;
            SpatialMomentsArgs<T> args{x->data(),
                                       {C * H * W, H * W, W, 1},
                                       pilot->data(),
                                       out.array<double>(H * W * C),
                                       out.array<double>(H * W * C * C),
                                       rows,
                                       C,
                                       H,
                                       W};
            if (channels_last) {
              args.strides[1] = 1;
              args.strides[2] = W * C;
              args.strides[3] = C;
            }
            spatial_moments_cpu(args, threads);
            return out;
          }};
}

// A convolution of 3 x 3 with margins of one.
template <typename T>
Case gradient_case(const std::string& name, index_t samples, index_t groups, index_t C, index_t M,
                   index_t H, index_t W) {
  const index_t in = groups * C, out = groups * M, area = H * W;
  const auto x = std::make_shared<std::vector<T>>(numbers<T>(samples * in * area));
  const auto g = std::make_shared<std::vector<T>>(numbers<T>(samples * out * area));
  return {name, [=](int threads) {
            Results results;
            const GradientSquaresArgs<T> args{x->data(),
                                              g->data(),
                                              {in * area, area, W, 1},
                                              {out * area, area, W, 1},
                                              results.array<double>(out * C * 9),
                                              nullptr,
                                              samples,
                                              groups,
                                              C,
                                              M,
                                              {H, W},
                                              {H, W},
                                              {3, 3},
                                              {1, 1},
                                              {1, 1},
                                              {1, 1}};
            gradient_squares_cpu(args, threads);
            return results;
          }};
}

template <typename T>
Case gradient_gram_case(const std::string& name, index_t rows, index_t columns, index_t positions,
                        index_t inputs, index_t outputs, bool symmetric) {
  const auto a = std::make_shared<std::vector<T>>(numbers<T>(rows * positions * inputs));
  const auto b = std::make_shared<std::vector<T>>(numbers<T>(rows * columns * positions * outputs));
  return {name, [=](int threads) {
            Results out;
            const GramSide<T> side{
                a->data(), {positions * inputs, inputs, 1},
                b->data(), {columns * positions * outputs, positions * outputs, outputs, 1},
                rows,      columns,
                positions};
            const GradientGramArgs<T> args{
                side,   side,    out.array<double>(rows * columns * rows * columns),
                inputs, outputs, symmetric};
            gradient_gram_cpu(args, threads);
            return out;
          }};
}

template <typename T>
Case patch_case(const std::string& name, index_t samples, index_t C, index_t H, index_t W,
                index_t groups) {
  const auto x = std::make_shared<std::vector<T>>(numbers<T>(samples * C * H * W));
  const index_t channels = C / groups, K = channels * 9;
  return {name, [=](int threads) {
            Results out;
            const PatchMomentsArgs<T> args{x->data(),
                                           {C * H * W, H * W, W, 1},
                                           {H, W},
                                           {3, 3},
                                           {1, 1},
                                           {1, 1},
                                           {1, 1},
                                           {H, W},
                                           out.array<double>(groups * K),
                                           out.array<double>(groups * K * K),
                                           nullptr,
                                           samples,
                                           channels,
                                           groups,
                                           K};
            patch_moments_cpu(args, threads);
            return out;
          }};
}

template <typename T>
Case lift_case(index_t rows, index_t k, index_t groups) {
  const auto projected = std::make_shared<std::vector<T>>(numbers<T>(rows * k));
  const auto bias = std::make_shared<std::vector<T>>(numbers<T>(k));
  return {"lift", [=](int threads) {
            Results out;
            const LiftArgs<T> args{projected->data(),
                                   k,
                                   bias->data(),
                                   bias->data(),
                                   out.array<T>(rows * k),
                                   out.array<double>(groups * k),
                                   rows,
                                   k,
                                   groups,
                                   3,
                                   static_cast<T>(0.7)};
            lift_cpu(args, threads);
            return out;
          }};
}

template <typename T>
Case lift_moments_case(const std::string& name, index_t rows, index_t d, index_t k, index_t folds,
                       index_t halves, index_t start) {
  const auto z = std::make_shared<std::vector<T>>(numbers<T>(rows * d));
  const auto weight = std::make_shared<std::vector<T>>(numbers<T>(k * d));
  const auto bias = std::make_shared<std::vector<T>>(numbers<T>(k));
  const auto offsets = std::make_shared<std::vector<index_t>>();
  for (index_t s = 0; s <= folds; ++s) offsets->push_back(s * rows / folds);
  const index_t K = d + k;
  return {name, [=](int threads) {
            Results out;
            const LiftMomentsArgs<T> args{z->data(),
                                          d,
                                          weight->data(),
                                          bias->data(),
                                          bias->data(),
                                          offsets->data(),
                                          out.array<double>(folds * K),
                                          out.array<double>(halves * K * K),
                                          nullptr,
                                          rows,
                                          d,
                                          k,
                                          folds,
                                          halves,
                                          start,
                                          K,
                                          static_cast<T>(0.7)};
            lift_moments_cpu(args, threads);
            return out;
          }};
}

template <typename T>
Case activation_case(const std::string& name, Activation kind, index_t outer, index_t C,
                     index_t inner) {
  constexpr index_t kTangents = 3;
  const index_t size = outer * C * inner;
  const auto x = std::make_shared<std::vector<T>>(numbers<T>((1 + kTangents) * size));
  const auto scale = std::make_shared<std::vector<T>>(numbers<T>(C));
  return {name, [=](int threads) {
            Results out;
            const bool by_channel = kind == Activation::kPrelu;
            const DualActivationArgs<T> args{x->data(),
                                             out.array<T>((1 + kTangents) * size),
                                             scale->data(),
                                             scale->data(),
                                             by_channel ? scale->data() : nullptr,
                                             size,
                                             size,
                                             kTangents,
                                             outer,
                                             C,
                                             inner,
                                             kind,
                                             1,
                                             1,
                                             1};
            dual_activation_cpu(args, threads);
            return out;
          }};
}

// In place: the results start as a copy of the input.
template <typename T>
Case dual_norm_case(index_t rows, index_t width, index_t tangents) {
  const index_t size = (1 + tangents) * rows * width;
  const auto x = std::make_shared<std::vector<T>>(numbers<T>(size));
  const auto weight = std::make_shared<std::vector<T>>(numbers<T>(width));
  return {
      "dual_norm", [=](int threads) {
        Results out;
        T* const y = out.array<T>(size);
        for (index_t i = 0; i < size; ++i) y[i] = (*x)[i];
        const DualNormArgs<T> args{
            y,       y,   weight->data(), weight->data(), rows * width, tangents, rows, width, 1, 1,
            T(1e-5), true};
        dual_norm_cpu(args, threads);
        return out;
      }};
}

template <typename T>
Case dual_softmax_case(const std::string& name, index_t outer, index_t width, index_t inner,
                       index_t tangents, bool log) {
  const index_t slice = outer * width * inner;
  const auto x = std::make_shared<std::vector<T>>(numbers<T>((1 + tangents) * slice));
  return {name, [=](int threads) {
            Results out;
            const DualSoftmaxArgs<T> args{x->data(), out.array<T>((1 + tangents) * slice),
                                          slice,     tangents,
                                          outer,     width,
                                          inner,     log};
            dual_softmax_cpu(args, threads);
            return out;
          }};
}

// Windows of 3 x 3, a stride of 2, a padding of 1.
template <typename T>
Case dual_pool_case(const std::string& name, index_t outer, index_t height, index_t width,
                    index_t inner, index_t tangents) {
  const index_t slice = outer * height * width * inner;
  const index_t rows = (height + 1) / 2, columns = (width + 1) / 2;
  const auto x = std::make_shared<std::vector<T>>(numbers<T>((1 + tangents) * slice));
  return {name, [=](int threads) {
            Results out;
            const DualPoolArgs<T> args{
                x->data(),
                out.array<T>((1 + tangents) * outer * rows * columns * inner),
                slice,
                tangents,
                outer,
                inner,
                {1, height, width},
                {1, rows, columns},
                {1, 3, 3},
                {1, 2, 2},
                {0, 1, 1},
                {1, 1, 1}};
            dual_pool_cpu(args, threads);
            return out;
          }};
}

// Every op, each way that its source file distinguishes. A thread is started for about 1e6
// multiply-adds in fisher_solve, spatial_moments and gradient_squares, 1e5 numbers in the backward
// pass, 1024 rows in lift and in moments of few columns, 32 KiB of a slice in dual_activation, 1e5
// numbers in the other dual ops, 4e6 multiply-adds in the others: each case has 8 times that.
template <typename T>
std::vector<Case> cases() {
  return {solve_case<T>("fisher_solve, lanes", 2400, 24, 3, false),
          solve_case<T>("fisher_solve, blocks", 600, 40, 3, true),
          solve_case<T>("fisher_solve, more threads than systems", 2, 200, 3, false),
          backward_case<T>(500, 40, 5),
          moments_case<T>("moments, few columns", 20'000, 10, 1),
          moments_case<T>("moments, few columns in groups", 20'000, 10, 16),
          moments_case<T>("moments, many columns", 4000, 130, 1),
          moments_case<T>("moments, many columns in groups", 4000, 130, 3),
          spatial_case<T>("spatial_moments", 70, 12, 30, 33, false),
          spatial_case<T>("spatial_moments, channels last", 70, 17, 30, 33, true),
          gradient_gram_case<T>("gradient_gram", 20, 3, 33, 50, 17, false),
          gradient_gram_case<T>("gradient_gram, symmetric", 6, 1, 300, 27, 33, true),
          gradient_case<T>("gradient_squares", 5, 1, 19, 150, 6, 7),
          gradient_case<T>("gradient_squares, depthwise", 30, 40, 1, 1, 29, 30),
          patch_case<T>("patch_moments, small patches", 20, 2, 40, 40, 1),
          patch_case<T>("patch_moments, large patches", 20, 16, 30, 30, 1),
          patch_case<T>("patch_moments, groups", 40, 20, 40, 40, 20),
          lift_case<T>(9000, 20, 4),
          dual_norm_case<T>(1000, 170, 5),
          dual_softmax_case<T>("dual_softmax", 1000, 170, 1, 5, false),
          dual_softmax_case<T>("dual_softmax, not last", 50, 50, 70, 5, true),
          dual_pool_case<T>("dual_pool", 50, 31, 70, 1, 5),
          dual_pool_case<T>("dual_pool, channels last", 5, 31, 33, 37, 5),
          lift_moments_case<T>("lift_moments", 3500, 10, 120, 4, 2, 0),
          lift_moments_case<T>("lift_moments, new columns", 3500, 40, 100, 16, 1, 37),
          activation_case<T>("dual_activation", Activation::kGelu, 40, 7, 501),
          activation_case<T>("dual_activation, channels last", Activation::kPrelu, 5010, 28, 1),
          activation_case<T>("dual_activation, past the caches", Activation::kRelu, 75, 5, 3003)};
}

}  // namespace fisherfast
