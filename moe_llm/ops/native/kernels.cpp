// The elementwise parts of a training step on a CPU, each in one pass over memory, in fp32 inside.
//
// Plain C++ behind a C interface: no header of torch's, so that it compiles in seconds on the user's machine.
// Rows are independent, and what is summed over rows is summed in runs that the number of rows alone decides: results do
// not depend on the number of threads. T is float or bf16; every pointer is to contiguous memory.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "products.h"

// sum = x + delta (rounded to T; delta may be null, then sum is not written), y = T(sum / rms) * weight.
template <typename T>
static void norm_forward(const T* x, const T* delta, const T* weight, T* sum, T* y, float* scale, i64 rows, i64 width,
                         float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 row = 0; row < rows; row++) {
        const T* in = x + row * width;
        T* out = y + row * width;
        float square = 0;
        if (delta) {
            const T* other = delta + row * width;
            T* total = sum + row * width;
#pragma omp simd reduction(+ : square)
            for (i64 i = 0; i < width; i++) {
                float value = rounded<T>(get(in, i) + get(other, i));
                put(total, i, value);
                square += value * value;
            }
            in = total;
        } else {
#pragma omp simd reduction(+ : square)
            for (i64 i = 0; i < width; i++) square += get(in, i) * get(in, i);
        }
        float s = 1.0f / std::sqrt(square / width + eps);
        scale[row] = s;
#pragma omp simd
        for (i64 i = 0; i < width; i++) put(out, i, rounded<T>(get(in, i) * s) * get(weight, i));
    }
}

// grad_x = the norm's gradient plus grad_sum (may be null); partial: (runs, width), their sum is the weight's.
template <typename T>
static void norm_backward(const T* grad, const T* x, const T* weight, const float* scale, const T* grad_sum, T* grad_x,
                          float* partial, i64 runs, i64 rows, i64 width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 run = 0; run < runs; run++) {
        float* own = partial + run * width;
        std::vector<float> buffer(width);
        float* g = buffer.data();
        for (i64 i = 0; i < width; i++) own[i] = 0;
        for (i64 row = rows * run / runs; row < rows * (run + 1) / runs; row++) {
            const T *in = x + row * width, *gy = grad + row * width;
            float s = scale[row], dot = 0;
#pragma omp simd reduction(+ : dot)
            for (i64 i = 0; i < width; i++) {
                float normed = get(in, i) * s, gradient = get(gy, i);
                own[i] += gradient * normed;
                g[i] = gradient * get(weight, i);
                dot += g[i] * normed;
            }
            float mean = dot / width * s;
            T* out = grad_x + row * width;
            if (grad_sum) {
                const T* other = grad_sum + row * width;
#pragma omp simd
                for (i64 i = 0; i < width; i++) put(out, i, get(other, i) + s * (g[i] - get(in, i) * mean));
            } else {
#pragma omp simd
                for (i64 i = 0; i < width; i++) put(out, i, s * (g[i] - get(in, i) * mean));
            }
        }
    }
}

// hidden = silu(gate) * up, times the row's weight (may be null), of rows `from` to `to`. gate_up: (rows, 2 width).
template <typename T>
static void swiglu_forward_rows(const T* gate_up, const float* weight, T* hidden, i64 from, i64 to, i64 width) {
    for (i64 row = from; row < to; row++) {
        const T *gate = gate_up + row * 2 * width, *up = gate + width;
        T* out = hidden + row * width;
        float w = weight ? weight[row] : 1.0f;
        over(0, width, [&](i64 i, i64 n) INLINE {
            lanes x = load(gate + i, n);
            store(out + i, n, x * sigmoid(x) * load(up + i, n) * w);
        });
    }
}

// From the gradient of the unweighted hidden activations' product: hidden again (weighted), the gradients of gate and
// up, and of the row's weight (both may be null), of rows `from` to `to`. hidden may be grad_hidden, and grad_gate_up
// gate_up.
template <typename T>
static void swiglu_backward_rows(const T* gate_up, const T* grad_hidden, const float* weight, T* hidden,
                                 T* grad_gate_up, float* grad_weight, i64 from, i64 to, i64 width) {
    for (i64 row = from; row < to; row++) {
        const T *gate = gate_up + row * 2 * width, *up = gate + width, *grad = grad_hidden + row * width;
        T *out = hidden + row * width, *grad_gate = grad_gate_up + row * 2 * width, *grad_up = grad_gate + width;
        float w = weight ? weight[row] : 1.0f;
        lanes dot = {};
        over(0, width, [&](i64 i, i64 n) INLINE {
            lanes x = load(gate + i, n), u = load(up + i, n), g = load(grad + i, n);
            lanes s = sigmoid(x), silu = x * s, h = silu * u;
            dot += g * h;
            g *= w;
            store(out + i, n, h * w);
            store(grad_up + i, n, g * silu);
            store(grad_gate + i, n, g * u * s * (1.0f + x * (1.0f - s)));
        });
        if (grad_weight) grad_weight[row] = sum(dot);
    }
}

template <typename T>
static void swiglu_forward(const T* gate_up, const float* weight, T* hidden, i64 rows, i64 width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 row = 0; row < rows; row++) swiglu_forward_rows(gate_up, weight, hidden, row, row + 1, width);
}

template <typename T>
static void swiglu_backward(const T* gate_up, const T* grad_hidden, const float* weight, T* hidden, T* grad_gate_up,
                            float* grad_weight, i64 rows, i64 width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 row = 0; row < rows; row++)
        swiglu_backward_rows(gate_up, grad_hidden, weight, hidden, grad_gate_up, grad_weight, row, row + 1, width);
}

// losses[row] = log sum exp(logits) - logits[label], 0 where the label is negative; where `gradient` is set the
// logits become softmax minus one at the label (0 where the label is negative).
template <typename T>
static void cross_entropy(T* logits, const i64* labels, float* losses, i64 rows, i64 width, int gradient,
                          int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffer(width);
        float* e = buffer.data();
#pragma omp for schedule(static)
        for (i64 row = 0; row < rows; row++) {
            T* x = logits + row * width;
            i64 label = labels[row];
            if (label < 0) {
                losses[row] = 0;
                if (gradient) memset(static_cast<void*>(x), 0, width * sizeof(T));
                continue;
            }
            float chosen = get(x, label);
            lanes tops = lanes{} - INFINITY, sums = {};
            over(0, width, [&](i64 i, i64 n) INLINE { tops = at_least(load(x + i, n, -INFINITY), tops); });
            float top = largest(tops);
            over(0, width, [&](i64 i, i64 n) INLINE {
                lanes power = exponential(load(x + i, n, -INFINITY) - top);
                store(e + i, n, power);
                sums += power;
            });
            float total = sum(sums), inverse = 1.0f / total;
            losses[row] = top + std::log(total) - chosen;
            if (gradient) {
                e[label] -= total;
                over(0, width, [&](i64 i, i64 n) INLINE { store(x + i, n, load(e + i, n) * inverse); });
            }
        }
    }
}

// Rows of scores become probabilities in place. Row (n, h, q) of `scores` (sequences, heads, queries, keys) is that of
// query first_query + q, and its column c that of key first_key + c; the query sees the keys from starts[n / groups]
// [its position] to itself. log_sums (sequences, heads, length) is written if `fresh`, and read if not.
template <typename T>
static void probabilities(T* scores, float* log_sums, const int32_t* starts, i64 sequences, i64 groups, i64 heads,
                          i64 queries, i64 keys, i64 first_query, i64 first_key, i64 length, float scale, int fresh,
                          int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffer(keys);
        float* e = buffer.data();
#pragma omp for schedule(static)
        for (i64 line = 0; line < sequences * heads * queries; line++) {
            i64 q = first_query + line % queries, nh = line / queries, n = nh / heads;
            T* row = scores + line * keys;
            i64 begin = (starts ? starts[n / groups * length + q] : 0) - first_key, end = q + 1 - first_key;
            float* log_sum = log_sums + nh * length + q;
            // unseen keys as far as whole lanes go: parts of lanes take longer
            i64 from = begin / LANES * LANES, to = std::min(keys, (end + LANES - 1) / LANES * LANES);
            for (i64 i = from; i < begin; i++) put(row, i, -INFINITY);
            for (i64 i = end; i < to; i++) put(row, i, -INFINITY);
            if (fresh) {
                lanes tops = lanes{} - INFINITY, sums = {};
                over(from, to, [&](i64 i, i64 n) INLINE { tops = at_least(load(row + i, n, -INFINITY), tops); });
                float top = largest(tops) * scale;
                over(from, to, [&](i64 i, i64 n) INLINE {
                    lanes power = exponential(load(row + i, n, -INFINITY) * scale - top);
                    store(e + i, n, power);
                    sums += power;
                });
                float total = sum(sums), inverse = 1.0f / total;
                *log_sum = top + std::log(total);
                over(from, to, [&](i64 i, i64 n) INLINE { store(row + i, n, load(e + i, n) * inverse); });
            } else {
                float offset = *log_sum;
                over(from, to, [&](i64 i, i64 n) INLINE {
                    store(row + i, n, exponential(load(row + i, n) * scale - offset));
                });
            }
            // also where the row's numbers made them NaN
            memset(static_cast<void*>(row), 0, begin * sizeof(T));
            memset(static_cast<void*>(row + end), 0, (keys - end) * sizeof(T));
        }
    }
}

// grad becomes probability * (grad - row's sum of grad * probability) * scale, in place.
template <typename T>
static void softmax_backward(const T* probability, T* grad, i64 rows, i64 width, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 row = 0; row < rows; row++) {
        const T* p = probability + row * width;
        T* g = grad + row * width;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (i64 i = 0; i < width; i++) dot += get(p, i) * get(g, i);
#pragma omp simd
        for (i64 i = 0; i < width; i++) put(g, i, get(p, i) * (get(g, i) - dot) * scale);
    }
}

// out[m] = sum over k of weight[m, k] * x[index[m, k]]; weight may be null.
template <typename T>
static void gather_sum(const T* x, const i64* index, const float* weight, T* out, i64 rows, i64 per_row, i64 width,
                       int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffer(width);
        float* sum = buffer.data();
#pragma omp for schedule(static)
        for (i64 row = 0; row < rows; row++) {
            for (i64 k = 0; k < per_row; k++) {
                const T* from = x + index[row * per_row + k] * width;
                float w = weight ? weight[row * per_row + k] : 1.0f;
                if (k == 0) {
#pragma omp simd
                    for (i64 i = 0; i < width; i++) sum[i] = w * get(from, i);
                } else {
#pragma omp simd
                    for (i64 i = 0; i < width; i++) sum[i] += w * get(from, i);
                }
            }
#pragma omp simd
            for (i64 i = 0; i < width; i++) put(out + row * width, i, sum[i]);
        }
    }
}

// Rotary embedding of x (tokens, heads, width), rows of x `stride` apart: halves (a, b) become
// (a cos - b sin, b cos + a sin), or, with sign -1, the inverse. out is contiguous; cos, sin: (tokens, width).
template <typename T>
static void rotate(const T* x, const T* cosine, const T* sine, T* out, i64 tokens, i64 heads, i64 width, i64 stride,
                   float sign, int threads) {
    i64 half = width / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 token = 0; token < tokens; token++) {
        const T *c = cosine + token * width, *s = sine + token * width;
        for (i64 head = 0; head < heads; head++) {
            const T* a = x + token * stride + head * width;
            T* y = out + (token * heads + head) * width;
#pragma omp simd
            for (i64 i = 0; i < half; i++) {
                float first = get(a, i), second = get(a, i + half);
                put(y, i, first * get(c, i) - sign * second * get(s, i));
                put(y, i + half, second * get(c, i) + sign * first * get(s, i));
            }
        }
    }
}

#include "experts.h"

#define BOTH(name, parameters, arguments)                          \
    extern "C" void name##_fp32 parameters(float) { name arguments; } \
    extern "C" void name##_bf16 parameters(bf16) { name arguments; }

#define P(T) (const T* x, const T* delta, const T* weight, T* sum, T* y, float* scale, i64 rows, i64 width, float eps, int threads)
BOTH(norm_forward, P, (x, delta, weight, sum, y, scale, rows, width, eps, threads))
#undef P
#define P(T) (const T* grad, const T* x, const T* weight, const float* scale, const T* grad_sum, T* grad_x, float* partial, i64 runs, i64 rows, i64 width, int threads)
BOTH(norm_backward, P, (grad, x, weight, scale, grad_sum, grad_x, partial, runs, rows, width, threads))
#undef P
#define P(T) (const T* gate_up, const float* weight, T* hidden, i64 rows, i64 width, int threads)
BOTH(swiglu_forward, P, (gate_up, weight, hidden, rows, width, threads))
#undef P
#define P(T) (const T* gate_up, const T* grad_hidden, const float* weight, T* hidden, T* grad_gate_up, float* grad_weight, i64 rows, i64 width, int threads)
BOTH(swiglu_backward, P, (gate_up, grad_hidden, weight, hidden, grad_gate_up, grad_weight, rows, width, threads))
#undef P
#define P(T) (T* logits, const i64* labels, float* losses, i64 rows, i64 width, int gradient, int threads)
BOTH(cross_entropy, P, (logits, labels, losses, rows, width, gradient, threads))
#undef P
#define P(T) (T* scores, float* log_sums, const int32_t* starts, i64 sequences, i64 groups, i64 heads, i64 queries, i64 keys, i64 first_query, i64 first_key, i64 length, float scale, int fresh, int threads)
BOTH(probabilities, P, (scores, log_sums, starts, sequences, groups, heads, queries, keys, first_query, first_key, length, scale, fresh, threads))
#undef P
#define P(T) (const T* probability, T* grad, i64 rows, i64 width, float scale, int threads)
BOTH(softmax_backward, P, (probability, grad, rows, width, scale, threads))
#undef P
#define P(T) (const T* x, const i64* index, const float* weight, T* out, i64 rows, i64 per_row, i64 width, int threads)
BOTH(gather_sum, P, (x, index, weight, out, rows, per_row, width, threads))
#undef P
#define P(T) (const T* x, const T* cosine, const T* sine, T* out, i64 tokens, i64 heads, i64 width, i64 stride, float sign, int threads)
BOTH(rotate, P, (x, cosine, sine, out, tokens, heads, width, stride, sign, threads))
#undef P
#define P(T) (T* a, T* b, T* c, const i64* layout, int threads)
BOTH(matmul, P, (a, b, c, layout, threads))
#undef P
#define P(T) (T* x, const i64* token_index, T* gate_up_proj, T* down_proj, const i64* counts, const float* weight, T* gate_up, T* hidden, T* y, i64 experts, i64 D, i64 F, i64 block, int threads)
BOTH(experts_forward, P, (x, token_index, gate_up_proj, down_proj, counts, weight, gate_up, hidden, y, experts, D, F, block, threads))
#undef P
#define P(T) (T* x, const i64* token_index, T* gate_up_proj, T* down_proj, const i64* counts, const float* weight, T* gate_up, T* grad, T* hidden, T* grad_gate_up, T* grad_x, T* grad_gate_up_proj, T* grad_down_proj, float* grad_weight, i64 experts, i64 D, i64 F, i64 block, int threads)
BOTH(experts_backward, P, (x, token_index, gate_up_proj, down_proj, counts, weight, gate_up, grad, hidden, grad_gate_up, grad_x, grad_gate_up_proj, grad_down_proj, grad_weight, experts, D, F, block, threads))
#undef P
