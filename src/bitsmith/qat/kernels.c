/* Fake-quantize forward and backward in one pass over memory each. native.py compiles this where a compiler is at hand;
 * kernels.py computes the same without it.
 *
 * x and out are dense and laid out alike. low and high of a grid are its first and last code counted from the zero point;
 * lo and hi are the real ends that x must be between for its gradient to pass. NaN passes through as NaN. */

#include <math.h>
#include <omp.h>
#include <stdint.h>

#define BLOCK 4096 /* sums are float32 within as many elements, float64 beyond */

static inline float on_grid(float x, float scale, float low, float high) {
    float code = x / scale;
    code = low > code ? low : code;
    code = high < code ? high : code;
    return rintf(code) * scale;
}

void fake_quantize(const float *x, float *out, int64_t n, float scale, float low, float high, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) out[i] = on_grid(x[i], scale, low, high);
}

/* seen: the least and the greatest x, and 0, or NaN where some x is not finite */
void fake_quantize_watched(const float *x, float *out, int64_t n, float scale, float low, float high, float *seen,
                           int threads) {
    float least = INFINITY, greatest = -INFINITY, rest = 0;
#pragma omp parallel for simd num_threads(threads) schedule(static) reduction(min : least) \
    reduction(max : greatest) reduction(+ : rest)
    for (int64_t i = 0; i < n; i++) {
        float v = x[i];
        least = v < least ? v : least;
        greatest = v > greatest ? v : greatest;
        rest += v * 0.0f;
        out[i] = on_grid(v, scale, low, high);
    }
    seen[0] = least, seen[1] = greatest, seen[2] = rest;
}

/* scale, low and high for each of the rows of columns elements */
void fake_quantize_rows(const float *x, float *out, int64_t rows, int64_t columns, const float *scale, const float *low,
                        const float *high, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float s = scale[r], l = low[r], h = high[r];
#pragma omp simd
        for (int64_t i = r * columns; i < (r + 1) * columns; i++) out[i] = on_grid(x[i], s, l, h);
    }
}

/* passed = g inside, 0 elsewhere; sums += {g * (q - x) inside (where rounding counts) + g * q elsewhere, g elsewhere} */
static inline void learn(const float *g, const float *x, const float *q, float *passed, int64_t n, float lo, float hi,
                         float rounding, double *sums) {
    float moved = 0, clipped = 0;
#pragma omp simd reduction(+ : moved, clipped)
    for (int64_t i = 0; i < n; i++) {
        int inside = (x[i] > lo) & (x[i] < hi);
        float error = rounding * (q[i] - x[i]);
        moved += g[i] * (inside ? error : q[i]);
        clipped += inside ? 0.0f : g[i];
        passed[i] = inside ? g[i] : 0.0f;
    }
    sums[0] += moved, sums[1] += clipped;
}

void learned_backward(const float *g, const float *x, const float *q, float *passed, int64_t n, float lo, float hi,
                      float rounding, double *sums, int threads) {
    double parts[threads][2]; /* added up in order: the same bits in every run, which a reduction does not promise */
    for (int t = 0; t < threads; t++) parts[t][0] = parts[t][1] = 0;
#pragma omp parallel num_threads(threads)
    {
        double part[2] = {0, 0};
#pragma omp for schedule(static)
        for (int64_t b = 0; b < n; b += BLOCK)
            learn(g + b, x + b, q + b, passed + b, n - b < BLOCK ? n - b : BLOCK, lo, hi, rounding, part);
        parts[omp_get_thread_num()][0] = part[0], parts[omp_get_thread_num()][1] = part[1];
    }
    sums[0] = sums[1] = 0;
    for (int t = 0; t < threads; t++) sums[0] += parts[t][0], sums[1] += parts[t][1];
}

/* sums: two for each row */
void learned_backward_rows(const float *g, const float *x, const float *q, float *passed, int64_t rows, int64_t columns,
                           const float *lo, const float *hi, float rounding, double *sums, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        sums[2 * r] = sums[2 * r + 1] = 0;
        for (int64_t b = r * columns; b < (r + 1) * columns; b += BLOCK) {
            int64_t left = (r + 1) * columns - b;
            learn(g + b, x + b, q + b, passed + b, left < BLOCK ? left : BLOCK, lo[r], hi[r], rounding, sums + 2 * r);
        }
    }
}
