// Products of few rows with a large matrix, x W^T + b: as fast as W can be read, which is what limits them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 8;
constexpr int WIDTH = 2 * LANES;  // outputs of a panel
constexpr int MOST_ROWS = 6;      // whose sums fit into the registers beside a line of the panel
constexpr int64_t LEAST_WORK = 1 << 17;  // products worth another thread

using Floats = float __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));

// A line of a panel, WIDTH weights.
struct Line {
  Floats left, right;
};

inline Line load(const float* from) {
  Line line;
  std::memcpy(&line.left, from, sizeof line.left);
  std::memcpy(&line.right, from + LANES, sizeof line.right);
  return line;
}

// The upper halves of floats, those of the left outputs in the lower halves of words: two shifts, no shuffle.
inline Line load(const c10::BFloat16* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return {reinterpret_cast<Floats>(words << 16), reinterpret_cast<Floats>(words & 0xffff0000u)};
}

// ROWS rows x [ROWS, K] times a panel [K, WIDTH] -> y [ROWS, WIDTH]. Sums of UNROLL neighbouring k are kept apart, so
// that one need not wait for the other.
template <int ROWS, int UNROLL, class Weight>
void multiply(const float* x, const Weight* panel, int64_t K, const float* bias, float* y, int64_t stride) {
  Line sums[UNROLL][ROWS] = {};
  int64_t k = 0;
  auto add = [&](int u) {
    const Line line = load(panel + (k + u) * WIDTH);
    for (int row = 0; row < ROWS; row++) {
      const float scale = x[row * K + k + u];
      sums[u][row].left += scale * line.left;
      sums[u][row].right += scale * line.right;
    }
  };
  for (; k + UNROLL <= K; k += UNROLL) {
    __builtin_prefetch(panel + k * WIDTH + 1024);
    for (int u = 0; u < UNROLL; u++) add(u);
  }
  for (; k < K; k++) add(0);
  const Line start = load(bias);
  for (int row = 0; row < ROWS; row++) {
    Line sum = start;
    for (int u = 0; u < UNROLL; u++) {
      sum.left += sums[u][row].left;
      sum.right += sums[u][row].right;
    }
    std::memcpy(y + row * stride, &sum.left, sizeof sum.left);
    std::memcpy(y + row * stride + LANES, &sum.right, sizeof sum.right);
  }
}

template <class Weight>
using Multiply = void (*)(const float*, const Weight*, int64_t, const float*, float*, int64_t);

template <class Weight>
constexpr Multiply<Weight> BY_ROWS[MOST_ROWS + 1] = {
    nullptr,
    multiply<1, 4, Weight>,
    multiply<2, 2, Weight>,
    multiply<3, 2, Weight>,
    multiply<4, 1, Weight>,
    multiply<5, 1, Weight>,
    multiply<6, 1, Weight>,
};

template <class Weight>
void multiply_panels(const at::Tensor& x, const at::Tensor& panels, const at::Tensor& bias, at::Tensor& y) {
  const int64_t K = x.size(-1), N = y.size(-1), rows = y.numel() / N, groups = (rows + MOST_ROWS - 1) / MOST_ROWS;
  const float *from = x.const_data_ptr<float>(), *biases = bias.const_data_ptr<float>();
  const Weight* weights = panels.const_data_ptr<Weight>();
  float* to = y.mutable_data_ptr<float>();
  auto some = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      const int64_t first = p * WIDTH, width = std::min<int64_t>(WIDTH, N - first);
      for (int64_t group = 0; group < groups; group++) {
        const int64_t low = group * rows / groups, count = (group + 1) * rows / groups - low;
        float last[MOST_ROWS * WIDTH];  // the last panel may be wider than y
        float* target = width == WIDTH ? to + low * N + first : last;
        const int64_t stride = width == WIDTH ? N : WIDTH;
        BY_ROWS<Weight>[count](from + low * K, weights + first * K, K, biases + first, target, stride);
        for (int64_t row = 0; width < WIDTH && row < count; row++)
          std::copy_n(last + row * WIDTH, width, to + (low + row) * N + first);
      }
    }
  };
  const int64_t grain = std::max<int64_t>(1, LEAST_WORK / std::max<int64_t>(1, K * WIDTH * rows));
  at::parallel_for(0, panels.size(0), grain, some);
}

// x [..., K] and panels [P, K, WIDTH] with a bias [P * WIDTH] -> [..., outputs].
at::Tensor few_rows(const at::Tensor& x, const at::Tensor& panels, const at::Tensor& bias, int64_t outputs) {
  TORCH_CHECK(
      x.dim() > 0 && x.size(-1) == panels.size(1) && panels.size(2) == WIDTH,
      "few_rows: x ", x.sizes(), " does not fit panels ", panels.sizes());
  TORCH_CHECK(
      panels.is_contiguous() && bias.is_contiguous() && bias.numel() == panels.size(0) * WIDTH &&
          outputs > bias.numel() - WIDTH && outputs <= bias.numel(),
      "few_rows: panels ", panels.sizes(), " and bias ", bias.sizes(), " are not of ", outputs, " outputs");
  const at::Tensor rows = x.contiguous();
  std::vector<int64_t> shape = rows.sizes().vec();
  shape.back() = outputs;
  at::Tensor y = at::empty(shape, rows.options());
  if (panels.scalar_type() == at::kBFloat16)
    multiply_panels<c10::BFloat16>(rows, panels, bias, y);
  else
    multiply_panels<float>(rows, panels, bias, y);
  return y;
}

}  // namespace

TORCH_LIBRARY(flowsteer, library) { library.def("few_rows(Tensor x, Tensor panels, Tensor bias, int outputs) -> Tensor"); }
TORCH_LIBRARY_IMPL(flowsteer, CPU, library) { library.impl("few_rows", few_rows); }
