// Row kernels for an owner's memory: gather, add up and step slices of rows in place, one pass over
// memory each. Plain C interface, called through ctypes, which lets other Python threads run: all
// slices of a row in one call, as every return to Python may wait for those, and they for it.
//
// A "slice" is w adjacent columns of a row; row r of a field starts at base + r * stride. Every row
// is worked on by one thread in a fixed order, so that the bits depend neither on the number of
// threads nor on the vector width of the machine (compiled without contraction).

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t LANES = 16;

inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest, ties to even, as torch does.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

inline void store(const float* from, void* out, bool bf16, int64_t at, int64_t w) {
  if (!bf16) {
    std::memcpy(static_cast<float*>(out) + at, from, w * sizeof(float));
    return;
  }
  uint16_t* target = static_cast<uint16_t*>(out) + at;
#pragma omp simd
  for (int64_t c = 0; c < w; ++c) target[c] = to_bf16(from[c]);
}

struct Gradient {
  const void* base;
  bool bf16;
  inline float at(int64_t i) const {
    return bf16 ? from_bf16(static_cast<const uint16_t*>(base)[i])
                : static_cast<const float*>(base)[i];
  }
};

// Sum of squares over LANES running sums, added up in order.
template <typename Read>
inline float sum_of_squares(Read read, int64_t w) {
  float lanes[LANES] = {0};
  int64_t c = 0;
  for (; c + LANES <= w; c += LANES) {
#pragma omp simd
    for (int64_t l = 0; l < LANES; ++l) {
      const float g = read(c + l);
      lanes[l] += g * g;
    }
  }
  float total = 0;
  for (int64_t l = 0; l < LANES; ++l) total += lanes[l];
  for (; c < w; ++c) {
    const float g = read(c);
    total += g * g;
  }
  return total;
}

enum Kind { ADAM = 0, ADAM_ROWWISE = 1, ADAGRAD_ROWWISE = 2 };

struct Step {
  int64_t kind, n, w;
  const int64_t* slots;
  float *weight, *first, *second;
  int64_t weight_stride, first_stride, second_stride;
  const void* grad;
  int64_t grad_bf16, grad_stride;
  float clip, beta1, beta2, eps, decay, lr;
  const float *step_size, *root_correction;
  void* out;
  int64_t out_bf16;
  const int64_t* out_places;
  // Slices that are stepped one after another: how far the next one's columns are, its gradient,
  // and where to count those that are done.
  int64_t parts, weight_next, first_next, second_next, out_next;
  const void* const* grads;
  int64_t* ready;
};

inline int64_t size_of(bool bf16) { return bf16 ? 2 : 4; }

// Tell whoever polls the counter that everything before is written.
inline void post(int64_t* ready, int64_t count) {
  if (ready) __atomic_store_n(ready, count, __ATOMIC_RELEASE);
}

template <bool BF16>
void step_row(const Step& s, int64_t i) {
  const int64_t w = s.w, slot = s.slots[i];
  const Gradient gradient{s.grad, BF16};
  const int64_t from = i * s.grad_stride;
  float* weight = s.weight + slot * s.weight_stride;
  float* second = s.second + slot * s.second_stride;
  const float clip = s.clip, decay = s.decay;
  if (s.kind == ADAGRAD_ROWWISE) {
    const auto read = [&](int64_t c) { return gradient.at(from + c) * clip; };
    second[0] += sum_of_squares(read, w) / static_cast<float>(w);
    const float denominator = std::sqrt(second[0]) + s.eps, lr = -s.lr;
#pragma omp simd
    for (int64_t c = 0; c < w; ++c)
      weight[c] = weight[c] * decay + gradient.at(from + c) * clip * lr / denominator;
  } else {
    float* first = s.first + slot * s.first_stride;
    const float beta2 = s.beta2, keep = 1.0f - s.beta1, fresh = 1.0f - s.beta2;
    const float size = s.step_size[i], correction = s.root_correction[i], eps = s.eps;
    if (s.kind == ADAM_ROWWISE) {
      const auto read = [&](int64_t c) { return gradient.at(from + c) * clip; };
      const float mean = sum_of_squares(read, w) / static_cast<float>(w);
      second[0] = second[0] * beta2 + mean * fresh;
      const float denominator = std::sqrt(second[0]) / correction + eps;
#pragma omp simd
      for (int64_t c = 0; c < w; ++c) {
        const float g = gradient.at(from + c) * clip;
        const float m = first[c] + keep * (g - first[c]);
        first[c] = m;
        weight[c] = weight[c] * decay + m * size / denominator;
      }
    } else {
#pragma omp simd
      for (int64_t c = 0; c < w; ++c) {
        const float g = gradient.at(from + c) * clip;
        const float m = first[c] + keep * (g - first[c]);
        const float v = second[c] * beta2 + g * g * fresh;
        first[c] = m;
        second[c] = v;
        weight[c] = weight[c] * decay + m * size / (std::sqrt(v) / correction + eps);
      }
    }
  }
  if (s.out && s.out_places[i] >= 0) store(weight, s.out, s.out_bf16 != 0, s.out_places[i] * w, w);
}

}  // namespace

extern "C" {

// Of `parts` slices side by side, one after another: out[places[i]] = source[slots[i]] for n rows;
// without places, out[i]. The output's slices are `out_next` numbers apart.
void rows_gather(const float* source, int64_t stride, const int64_t* slots, int64_t n, int64_t w,
                 int64_t parts, void* out, int64_t out_bf16, int64_t out_next,
                 const int64_t* places, int64_t* ready, int64_t threads) {
  for (int64_t k = 0; k < parts; ++k) {
    void* target = static_cast<char*>(out) + k * out_next * size_of(out_bf16 != 0);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; ++i)
      store(source + slots[i] * stride + k * w, target, out_bf16 != 0,
            (places ? places[i] : i) * w, w);
    post(ready, k + 1);
  }
}

// total[places[i]] += grad[i], or = where fresh[i]; squares[places[i]] = sum of squares of the row.
void rows_add(float* total, const int64_t* places, const uint8_t* fresh, int64_t n, int64_t w,
              const void* grad, int64_t grad_bf16, int64_t grad_stride, float* squares,
              int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) {
    float* row = total + places[i] * w;
    const Gradient gradient{grad, grad_bf16 != 0};
    const int64_t from = i * grad_stride;
    if (fresh[i]) {
#pragma omp simd
      for (int64_t c = 0; c < w; ++c) row[c] = gradient.at(from + c);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < w; ++c) row[c] += gradient.at(from + c);
    }
    squares[places[i]] = sum_of_squares([row](int64_t c) { return row[c]; }, w);
  }
}

// sums[i] = sum of words[places[i] * width + c] * factors[c] over c < width - 1, modulo 2^64.
void rows_checksum(const uint64_t* words, int64_t width, const int64_t* places, int64_t n,
                   const uint64_t* factors, uint64_t* sums, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t* row = words + places[i] * width;
    uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < width - 1; ++c) sum += row[c] * factors[c];
    sums[i] = sum;
  }
}

// Step n distinct rows in place, slice by slice, and where asked write their new weights for
// transport.
void rows_step(const Step* step, int64_t threads) {
  for (int64_t k = 0; k < step->parts; ++k) {
    Step s = *step;
    s.weight += k * s.weight_next;
    s.first += k * s.first_next;
    s.second += k * s.second_next;
    s.grad = s.grads[k];
    if (s.out) s.out = static_cast<char*>(s.out) + k * s.out_next * size_of(s.out_bf16 != 0);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < s.n; ++i) {
      if (s.grad_bf16)
        step_row<true>(s, i);
      else
        step_row<false>(s, i);
    }
    post(s.ready, k + 1);
  }
}
}
