/* Batch normalization with the max pooling and the activation that follow it in one pass over memory, each of these alone,
 * dropout, the weights' quantizers, and the gradients of all: for float32 on a CPU, images in channels last, that is, as
 * rows (pixels) of channels. models/fused.py calls them. Lines of an image, width * channels numbers, lie on the stack.
 *
 * activation: n > 0 is round(n * clamp(x, 0, 1)) / n, straight-through (models/quan_ops.py); else one of these.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { RELU = 0, NONE = -1 };

static inline float activate(float x, int n)
{
    if (n == NONE)
        return x;
    x = x < 0 ? 0 : x;
    if (n == RELU)
        return x;
    x = x > 1 ? 1 : x;
    return rintf(x * n) / n;
}

static inline int passes(float x, int n)  /* does the gradient pass? At the clamp's ends too, at ReLU's not. */
{
    return n == NONE ? 1 : n == RELU ? !(x <= 0) : !((x < 0) | (x > 1));
}

static inline int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* y = activation(x) of `count` numbers. passed, one for each: 1 where the gradient passes, else 0. */
void activation(const float *x, int64_t count, int kind, float *y, uint8_t *passed, int threads)
{
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += 1024)
        for (int64_t i = start; i < least(start + 1024, count); i++) {
            y[i] = activate(x[i], kind);
            passed[i] = passes(x[i], kind);
        }
}

void activation_backward(const float *grad, const uint8_t *passed, int64_t count, float *dx, int threads)
{
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += 1024)
        for (int64_t i = start; i < least(start + 1024, count); i++)
            dx[i] = passed[i] ? grad[i] : 0;
}

/* y = 2 x where the element's bit is 1, else 0; 32 of them in each of words. Its gradient is the same of grad. */
void dropout(const float *x, const uint32_t *words, int64_t count, float *y)
{
    for (int64_t start = 0; start < count; start += 32) {
        const uint32_t word = words[start / 32];
        for (int64_t i = 0; i < least(32, count - start); i++)
            y[start + i] = (word >> i) & 1 ? 2 * x[start + i] : 0;
    }
}

/* ---- max_pool2d(x, 2); what is left over at the right and below is left out */

enum { OUT = 4 };

static inline int exceeds(float value, float most)  /* as torch has it, also for NaN */
{
    return (value > most) | (value != value);
}

/* A line of outputs out of two lines, `top` and the one below, of `width` pixels. where: the number of the first maximum
 * in its window, or OUT if the gradient does not pass. */
static void pool_line(const float *top, int64_t width, int64_t channels, int kind, float *y, uint8_t *where)
{
    const int64_t count = width / 2 * channels;
    int32_t index[count + 1];  /* bytes are made of a whole line: loops over channels are too short for vectors of them */
    float best[count + 1];
    for (int64_t column = 0; column < width / 2; column++) {
        const float *a = top + 2 * column * channels, *b = a + channels, *c = a + width * channels, *d = c + channels;
        float *most = best + column * channels;
        int32_t *at = index + column * channels;
        #pragma omp simd
        for (int64_t i = 0; i < channels; i++) {
            float m = a[i];
            int32_t j = 0;
            j = exceeds(b[i], m) ? 1 : j;
            m = exceeds(b[i], m) ? b[i] : m;
            j = exceeds(c[i], m) ? 2 : j;
            m = exceeds(c[i], m) ? c[i] : m;
            at[i] = exceeds(d[i], m) ? 3 : j;
            most[i] = exceeds(d[i], m) ? d[i] : m;
        }
    }
    for (int64_t i = 0; i < count; i++) {
        y[i] = activate(best[i], kind);
        where[i] = passes(best[i], kind) ? index[i] : OUT;
    }
}

/* Line `row` of the gradient, of images of height x width pixels, out of that of the outputs. */
static void unpool_line(const float *grad, const uint8_t *where, int64_t row, int64_t height, int64_t width,
                        int64_t channels, float *to)
{
    const int64_t count = width / 2 * channels, line = row % height / 2;
    const int64_t start = (row / height * (height / 2) + line) * count;
    const float *end = to + width * channels;
    int32_t index[count + 1];
    if (line < height / 2) {
        for (int64_t i = 0; i < count; i++)
            index[i] = where[start + i];
        for (int64_t column = 0; column < width / 2 * 2; column++, to += channels) {
            const int32_t mine = row % height % 2 * 2 + column % 2, *at = index + column / 2 * channels;
            const float *g = grad + start + column / 2 * channels;
            #pragma omp simd
            for (int64_t i = 0; i < channels; i++)
                to[i] = at[i] == mine ? g[i] : 0;
        }
    }
    memset(to, 0, (end - to) * sizeof *to);
}

/* y = max_pool2d(x, 2) of `images` images. */
void pool(const float *x, int64_t images, int64_t height, int64_t width, int64_t channels, float *y, uint8_t *where,
          int threads)
{
    const int64_t lines = height / 2, count = width / 2 * channels;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < images * lines; k++)
        pool_line(x + (k / lines * height + k % lines * 2) * width * channels, width, channels, NONE, y + k * count,
                  where + k * count);
}

void pool_backward(const float *grad, const uint8_t *where, int64_t images, int64_t height, int64_t width,
                   int64_t channels, float *dx, int threads)
{
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < images * height; row++)
        unpool_line(grad, where, row, height, width, channels, dx + row * width * channels);
}

/* ---- batch normalization
 * Images are worked on in blocks, whatever the number of threads, so that sums do not depend on it, and a block in
 * SPAN stripes: lines, or as many rows as make 128 numbers or more, for long loops also where channels are few. The sum
 * of a block is float32, and that of blocks double: accurate also for even backgrounds, over which float32 sums drift. */

enum { SPAN = 32 };

static int64_t stripe_of(int64_t width, int64_t channels, int pooled)
{
    return channels * (pooled ? width : (127 + channels) / channels);
}

static void repeat(float *stripe, const float *values, int64_t channels, int64_t size)
{
    for (int64_t i = 0; i < size; i += channels)
        memcpy(stripe + i, values, channels * sizeof *values);
}

static void add_up(double *total, const float *stripe, int64_t channels, int64_t size)
{
    for (int64_t c = 0; c < channels; c++)
        total[c] = 0;
    for (int64_t i = 0; i < size; i += channels)
        for (int64_t c = 0; c < channels; c++)
            total[c] += stripe[i + c];
}

/* y = activation(z), or activation(max_pool2d(z, 2)) if there is `where` for pool_line, of z = x * scale + shift,
 * scale = weight / deviation, shift = bias - mean * scale. statistics (4, channels): mean, 1 / deviation, scale, shift.
 * The running ones move towards them by momentum. Returns 0, or 1 without memory. */
int normalize(const float *x, const float *weight, const float *bias, int64_t images, int64_t height, int64_t width,
              int64_t channels, double eps, int kind, double momentum, float *running_mean, float *running_variance,
              float *y, uint8_t *where, float *statistics, int threads)
{
    float *mean = statistics, *inverse = mean + channels, *scale = inverse + channels, *shift = scale + channels;
    const int64_t rows = images * height * width, size = rows * channels, lines = height / 2;
    const int64_t stripe = stripe_of(width, channels, where != NULL), block = stripe * SPAN;
    const int64_t blocks = (size + block - 1) / block;
    double *totals = malloc(blocks * channels * sizeof *totals);
    if (!totals)
        return 1;
    #pragma omp parallel num_threads(threads)
    {
        float a[stripe], b[stripe];
        for (int pass = 0; pass < 2; pass++) {
            if (pass)
                repeat(a, mean, channels, stripe);
            #pragma omp for schedule(static)
            for (int64_t k = 0; k < blocks; k++) {
                memset(b, 0, stripe * sizeof *b);
                for (int64_t start = k * block; start < least((k + 1) * block, size); start += stripe) {
                    const int64_t count = least(stripe, size - start);
                    const float *p = x + start;
                    if (pass)
                        for (int64_t i = 0; i < count; i++)
                            b[i] += (p[i] - a[i]) * (p[i] - a[i]);
                    else
                        for (int64_t i = 0; i < count; i++)
                            b[i] += p[i];
                }
                add_up(totals + k * channels, b, channels, stripe);
            }
            #pragma omp single
            for (int64_t c = 0; c < channels; c++) {
                double total = 0;
                for (int64_t k = 0; k < blocks; k++)
                    total += totals[k * channels + c];
                if (pass) {
                    inverse[c] = 1 / sqrt(total / rows + eps);
                    scale[c] = weight[c] * inverse[c];
                    shift[c] = bias[c] - mean[c] * scale[c];
                    running_mean[c] += momentum * (mean[c] - running_mean[c]);
                    running_variance[c] += momentum * (total / (rows - 1) - running_variance[c]);
                } else
                    mean[c] = total / rows;
            }
        }
        repeat(a, scale, channels, stripe);
        repeat(b, shift, channels, stripe);
        if (where) {
            float z[2 * stripe];
            #pragma omp for schedule(static)
            for (int64_t k = 0; k < images * lines; k++) {
                const float *p = x + (k / lines * height + k % lines * 2) * stripe;
                for (int64_t i = 0; i < stripe; i++) {
                    z[i] = p[i] * a[i] + b[i];
                    z[stripe + i] = p[stripe + i] * a[i] + b[i];
                }
                const int64_t to = k * (width / 2 * channels);
                pool_line(z, width, channels, kind, y + to, where + to);
            }
        } else {
            #pragma omp for schedule(static)
            for (int64_t start = 0; start < size; start += stripe) {
                const int64_t count = least(stripe, size - start);
                for (int64_t i = 0; i < count; i++)
                    y[start + i] = activate(x[start + i] * a[i] + b[i], kind);
            }
        }
    }
    free(totals);
    return 0;
}

/* With u = grad where it passes, v = (x - mean) / deviation, and the mean over rows:
 * dbias = sum u, dweight = sum u v, dx = scale * (u - mean u - v * mean(u v)). gradients (2, channels): dweight, dbias. */
int normalize_backward(const float *grad, const float *x, const uint8_t *where, const float *statistics, int64_t images,
                       int64_t height, int64_t width, int64_t channels, int kind, float *dx, float *gradients, int threads)
{
    const float *mean = statistics, *inverse = mean + channels, *scale = inverse + channels, *shift = scale + channels;
    const int64_t rows = images * height * width, size = rows * channels;
    const int64_t stripe = stripe_of(width, channels, where != NULL), block = stripe * SPAN;
    const int64_t blocks = (size + block - 1) / block;
    const int passing = where ? NONE : kind;  /* of what unpool_line gives, all */
    double *totals = malloc(2 * blocks * channels * sizeof *totals);
    if (!totals)
        return 1;
    #pragma omp parallel num_threads(threads)
    {
        float a[stripe], b[stripe], m[stripe], s[stripe], t[stripe], line[stripe];
        repeat(a, scale, channels, stripe);
        repeat(b, shift, channels, stripe);
        repeat(m, mean, channels, stripe);
        for (int pass = 0; pass < 2; pass++) {
            #pragma omp for schedule(static)
            for (int64_t k = 0; k < blocks; k++) {
                if (!pass) {
                    memset(s, 0, stripe * sizeof *s);
                    memset(t, 0, stripe * sizeof *t);
                }
                for (int64_t start = k * block; start < least((k + 1) * block, size); start += stripe) {
                    const int64_t count = least(stripe, size - start);
                    const float *p = x + start, *g = where ? line : grad + start;
                    if (where)
                        unpool_line(grad, where, start / stripe, height, width, channels, line);
                    if (pass)
                        for (int64_t i = 0; i < count; i++) {
                            const float u = passes(p[i] * a[i] + b[i], passing) ? g[i] : 0;
                            dx[start + i] = a[i] * (u - s[i] - (p[i] - m[i]) * t[i]);
                        }
                    else
                        for (int64_t i = 0; i < count; i++) {
                            const float u = passes(p[i] * a[i] + b[i], passing) ? g[i] : 0;
                            s[i] += u;
                            t[i] += u * (p[i] - m[i]);
                        }
                }
                if (!pass) {
                    add_up(totals + 2 * k * channels, s, channels, stripe);
                    add_up(totals + (2 * k + 1) * channels, t, channels, stripe);
                }
            }
            if (pass)
                continue;
            #pragma omp single
            for (int64_t c = 0; c < channels; c++) {
                double sum_u = 0, sum_uv = 0;
                for (int64_t k = 0; k < blocks; k++) {
                    sum_u += totals[2 * k * channels + c];
                    sum_uv += totals[(2 * k + 1) * channels + c];
                }
                gradients[c] = sum_uv * inverse[c];
                gradients[channels + c] = sum_u;
            }
            for (int64_t i = 0; i < stripe; i++) {
                const int64_t c = i % channels;
                s[i] = gradients[channels + c] / rows;
                t[i] = gradients[c] * inverse[c] / rows;
            }
        }
    }
    free(totals);
    return 0;
}

/* ---- weights */

/* t = tanh(w) of one layer becomes v = t / max |t|, in place. scale: mean |w|. maximum: max |t|. */
void normalize_weight(const float *w, int64_t count, float *t, float *scale, float *maximum)
{
    float most = 0;
    double total = 0;
    for (int64_t start = 0; start < count; start += 256) {
        float sum = 0;
        #pragma omp simd reduction(+ : sum) reduction(max : most)
        for (int64_t i = start; i < least(start + 256, count); i++) {
            sum += fabsf(w[i]);
            most = fmaxf(most, fabsf(t[i]));
        }
        total += sum;
    }
    for (int64_t i = 0; i < count; i++)
        t[i] /= most;
    *scale = total / count;
    *maximum = most;
}

/* dw of dv = grad; the maximum's own share of the gradient goes in equal parts to the weights that have it. */
void normalize_weight_backward(const float *grad, const float *v, int64_t count, const float *maximum, float *dw)
{
    double product = 0;
    int64_t largest = 0;
    for (int64_t start = 0; start < count; start += 256) {
        float sum = 0;
        #pragma omp simd reduction(+ : sum, largest)
        for (int64_t i = start; i < least(start + 256, count); i++) {
            sum += grad[i] * v[i];
            largest += fabsf(v[i]) == 1;
        }
        product += sum;
    }
    const float share = product / largest, most = *maximum;
    for (int64_t i = 0; i < count; i++) {
        const float t = v[i] * most, of_maximum = fabsf(v[i]) == 1 ? share * v[i] : 0;
        dw[i] = (grad[i] - of_maximum) / most * (1 - t * t);
    }
}

/* w = scale * (2 * round(n * (v / 2 + 1/2)) / n - 1), or scale * v where n is 0. */
void quantize_weight(const float *v, int64_t count, const float *scale, int n, float *w)
{
    const float half = n / 2.0f, step = n ? 2.0f / n : 0, e = *scale;
    if (n)
        for (int64_t i = 0; i < count; i++)
            w[i] = (rintf(half * v[i] + half) * step - 1) * e;
    else
        for (int64_t i = 0; i < count; i++)
            w[i] = v[i] * e;
}
