/* Layers of a network, each y = conv(activation(max_pool2d(batch_norm(x), 2))) or a part of that, and their gradients; dropout;
 * the weights' quantizers. For float32 on a CPU, images in channels last, that is, as rows (pixels) of channels.
 * models/fused.py calls them. What lies between x and y is computed a few images at a time, and again for the gradients.
 * Lines of an image, width * channels numbers, lie on the stack.
 *
 * activation: n > 0 is round(n * clamp(x, 0, 1)) / n, straight-through (models/quan_ops.py); else one of these.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { RELU = 0, NONE = -1 };

typedef struct {
    int64_t images, height, width, channels;  /* of x */
    int64_t pooled, activation;
    int64_t out, window, padding;  /* of the convolution, of stride 1; out is 0 without one */
    const float *weight;           /* (out, window, window, channels) */
    const float *statistics;       /* (4, channels): mean, 1 / deviation, scale, shift; NULL without batch_norm */
} Geometry;

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

static float *allocate(int64_t count)  /* in whole cache lines */
{
    return aligned_alloc(64, (count * sizeof(float) + 127) / 64 * 64);
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

/* Loops over a pixel's channels run up to the next multiple of STEP, since compilers make vectors of a fixed length of them:
 * what they write too much belongs to the pixel after, which comes next, or to the STEP numbers kept free at the end. */
enum { STEP = 8 };

/* A line of outputs out of two lines, `top` and the one below, of `width` pixels. where: the number of the first maximum
 * in its window, or OUT if the gradient does not pass. */
static void pool_line(const float *top, int64_t width, int64_t channels, int kind, float *y, uint8_t *where)
{
    const int64_t line = width * channels, count = width / 2 * channels;
    const float *bottom = top + line;
    float higher[line + STEP], best[count + STEP];
    int32_t row[line + STEP], index[count + STEP];
    for (int64_t i = 0; i < line; i++) {
        row[i] = exceeds(bottom[i], top[i]) ? 2 : 0;
        higher[i] = exceeds(bottom[i], top[i]) ? bottom[i] : top[i];
    }
    for (int64_t i = line; i < line + STEP; i++)
        higher[i] = row[i] = 0;
    for (int64_t to = 0; to < count; to += channels)
        for (int64_t start = 0; start < channels; start += STEP)
            for (int64_t i = start; i < start + STEP; i++) {
                const float left = higher[2 * to + i], right = higher[2 * to + channels + i];
                const int32_t l = row[2 * to + i], r = row[2 * to + channels + i] + 1;
                const int moves = (right > left) | ((right == left) & (r < l)) | ((right != right) & ((left == left) | (r > l)));
                best[to + i] = moves ? right : left;
                index[to + i] = moves ? r : l;
            }
    for (int64_t i = 0; i < count; i++) {
        y[i] = activate(best[i], kind);
        where[i] = passes(best[i], kind) ? index[i] : OUT;
    }
}

/* Line `row` of the gradient of an image of height x width pixels, out of that of its outputs. */
static void unpool_line(const float *grad, const uint8_t *where, int64_t row, int64_t height, int64_t width,
                        int64_t channels, float *to)
{
    const int64_t line = width * channels, count = width / 2 * channels, start = row / 2 * count;
    int32_t spread[line + STEP], from[count + STEP], index[count + STEP];  /* floats as they are, for masks of bits */
    if (row / 2 >= height / 2) {
        memset(to, 0, line * sizeof *to);
        return;
    }
    memcpy(from, grad + start, count * sizeof *from);
    memset(from + count, 0, STEP * sizeof *from);
    memset(index + count, 0, STEP * sizeof *index);
    for (int64_t i = 0; i < count; i++)
        index[i] = where[start + i] - row % 2 * 2;
    for (int64_t pixel = 0; pixel < width / 2 * 2; pixel++)
        for (int64_t first = 0, at = pixel / 2 * channels; first < channels; first += STEP)
            for (int64_t i = first; i < first + STEP; i++)
                spread[pixel * channels + i] = from[at + i] & -(index[at + i] == pixel % 2);
    memset(spread + 2 * count, 0, (line - 2 * count) * sizeof *spread);
    memcpy(to, spread, line * sizeof *to);
}

/* ---- batch normalization
 * Sums over SPAN lines are float32, and those of these double: accurate also for even backgrounds, over which float32 sums
 * drift. Each image has sums of its own, so that they do not depend on the number of threads. */

enum { SPAN = 32 };

static void repeat(float *line, const float *values, int64_t channels, int64_t size)
{
    for (int64_t i = 0; i < size; i += channels)
        memcpy(line + i, values, channels * sizeof *values);
}

/* Add a line of sums to total, and begin anew. */
static void add_up(double *total, float *line, int64_t channels, int64_t size)
{
    for (int64_t i = 0; i < size; i += channels)
        for (int64_t c = 0; c < channels; c++)
            total[c] += line[i + c];
    memset(line, 0, size * sizeof *line);
}

static double sum_of(const double *totals, int64_t channel, int64_t images, int64_t step)
{
    double sum = 0;
    for (int64_t image = 0; image < images; image++)
        sum += totals[image * step + channel];
    return sum;
}

/* The statistics of x, scale = weight / deviation, shift = bias - mean * scale. The running ones move towards them by
 * momentum. Returns 0, or 1 without memory. */
int normalize(const Geometry *l, const float *x, const float *weight, const float *bias, double eps, double momentum,
              float *running_mean, float *running_variance, float *statistics, int threads)
{
    const int64_t channels = l->channels, line = l->width * channels, size = l->height * line;
    const int64_t count = l->images * l->height * l->width;
    float *mean = statistics, *inverse = mean + channels, *scale = inverse + channels, *shift = scale + channels;
    double *totals = malloc(l->images * channels * sizeof *totals);
    if (!totals)
        return 1;
    #pragma omp parallel num_threads(threads)
    {
        float sums[line], means[line];
        memset(sums, 0, sizeof sums);
        for (int pass = 0; pass < 2; pass++) {
            if (pass)
                repeat(means, mean, channels, line);
            #pragma omp for schedule(static)
            for (int64_t image = 0; image < l->images; image++) {
                const float *p = x + image * size;
                double *total = totals + image * channels;
                memset(total, 0, channels * sizeof *total);
                for (int64_t row = 0; row < l->height; row++, p += line) {
                    if (pass)
                        for (int64_t i = 0; i < line; i++)
                            sums[i] += (p[i] - means[i]) * (p[i] - means[i]);
                    else
                        for (int64_t i = 0; i < line; i++)
                            sums[i] += p[i];
                    if (row % SPAN == SPAN - 1 || row == l->height - 1)
                        add_up(total, sums, channels, line);
                }
            }
            #pragma omp single
            for (int64_t c = 0; c < channels; c++) {
                const double sum = sum_of(totals, c, l->images, channels);
                if (pass) {
                    inverse[c] = 1 / sqrt(sum / count + eps);
                    scale[c] = weight[c] * inverse[c];
                    shift[c] = bias[c] - mean[c] * scale[c];
                    running_mean[c] += momentum * (mean[c] - running_mean[c]);
                    running_variance[c] += momentum * (sum / (count - 1) - running_variance[c]);
                } else
                    mean[c] = sum / count;
            }
        }
    }
    free(totals);
    return 0;
}

/* ---- convolution
 * Outputs are computed in tiles of the same pixel of TILE images by GROUP channels, which stay in registers while sums run
 * over the lines of the window, and over the pixels and channels of a line, which lie one after the other. What of the
 * window is outside the image is left out. Weights are copied so that a group's stand side by side. Their gradient has at most
 * PARTS sums, and so threads. */

#if defined(__AVX512F__)
enum { LANES = 16, TILE = 8 };
#elif defined(__AVX__)
enum { LANES = 8, TILE = 6 };
#else
enum { LANES = 4, TILE = 4 };
#endif
enum { GROUP = 16, VECTORS = GROUP / LANES, MOST = 8, PARTS = 16 };
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

#define OF_EVERY_SIZE(function, size, ...)     \
    switch (size) {                            \
    case 1: function(1, __VA_ARGS__); break;   \
    case 2: function(2, __VA_ARGS__); break;   \
    case 3: function(3, __VA_ARGS__); break;   \
    case 4: function(4, __VA_ARGS__); break;   \
    case 5: function(5, __VA_ARGS__); break;   \
    case 6: function(6, __VA_ARGS__); break;   \
    case 7: function(7, __VA_ARGS__); break;   \
    case 8: function(8, __VA_ARGS__); break;   \
    }

static int64_t most(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int64_t outputs(int64_t size, int64_t window, int64_t padding)  /* of a convolution, along one side of an image */
{
    return size + 2 * padding - window + 1;
}

static int64_t whole_groups(int64_t channels)
{
    return (channels + GROUP - 1) / GROUP * GROUP;
}

static int64_t apart(int64_t size)  /* how far apart images are kept: not in the same sets of the cache */
{
    return (size + 1023) / 1024 * 1024 + 80;
}

/* (groups, window, window, in, GROUP) of (out, window, window, in), for the gradient turned about and in and out, in whole
 * groups, exchanged; NULL without memory. */
static float *pack(const Geometry *l, int turned)
{
    const int64_t area = l->window * l->window, in = l->channels, out = l->out, whole = whole_groups(out);
    const int64_t count = area * (turned ? whole : in), size = (turned ? whole_groups(in) : whole) * count;
    float *packed = allocate(size);
    if (!packed)
        return NULL;
    memset(packed, 0, size * sizeof *packed);
    for (int64_t o = 0; o < out; o++)
        for (int64_t place = 0; place < area; place++)
            for (int64_t i = 0; i < in; i++) {
                const int64_t channel = turned ? i : o, k = turned ? (area - 1 - place) * whole + o : place * in + i;
                packed[(channel / GROUP * count + k) * GROUP + channel % GROUP] = l->weight[(o * area + place) * in + i];
            }
    return packed;
}

/* The first `channels` numbers of to[image * to_size] = the sum over lines and k < count of
 * x[image * size + line * stride + k] times weights[line * weight_stride + k * GROUP]. */
INLINE void sum_window(const int images, const float *x, int64_t size, int64_t lines, int64_t stride, int64_t count,
                       const float *weights, int64_t weight_stride, float *to, int64_t to_size, int64_t channels)
{
    vector sums[MOST][VECTORS];
    const float *at[MOST];
    for (int p = 0; p < images; p++) {
        at[p] = x + p * size;
        for (int v = 0; v < VECTORS; v++)
            sums[p][v] = (vector){0};
    }
    for (int64_t line = 0; line < lines; line++, weights += weight_stride) {
        const float *weight = weights;
        for (int64_t k = 0; k < count; k++, weight += GROUP) {
            vector w[VECTORS];
            for (int v = 0; v < VECTORS; v++)
                w[v] = *(const vector *)(weight + v * LANES);
            for (int p = 0; p < images; p++)
                for (int v = 0; v < VECTORS; v++)
                    sums[p][v] += at[p][k] * w[v];
        }
        for (int p = 0; p < images; p++)
            at[p] += stride;
    }
    for (int p = 0; p < images; p++, to += to_size)
        if (channels == GROUP)
            for (int v = 0; v < VECTORS; v++)
                *(vector *)(to + v * LANES) = sums[p][v];
        else
            memcpy(to, sums[p], channels * sizeof *to);
}

static void window_tile(int64_t images, const float *x, int64_t size, int64_t lines, int64_t stride, int64_t count,
                        const float *weights, int64_t weight_stride, float *to, int64_t to_size, int64_t channels)
{
    OF_EVERY_SIZE(sum_window, images, x, size, lines, stride, count, weights, weight_stride, to, to_size, channels)
}

/* y (images, rows, columns, out) of x (images, height, width, in), for at most TILE images, which lie size and y_size apart.
 * padding < window. */
static void convolve(const float *x, int64_t size, int64_t images, int64_t height, int64_t width, int64_t in, int64_t out,
                     int64_t window, int64_t padding, const float *packed, float *y, int64_t y_size)
{
    const int64_t rows = outputs(height, window, padding), columns = outputs(width, window, padding);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t up = most(0, padding - row), lines = least(window, height + padding - row) - up;
        for (int64_t group = 0; group < out; group += GROUP) {
            const float *weights = packed + (group * window + up * GROUP) * window * in;
            for (int64_t column = 0; column < columns; column++) {
                const int64_t left = most(0, padding - column), pixels = least(window, width + padding - column) - left;
                window_tile(images, x + ((row + up - padding) * width + column + left - padding) * in, size, lines, width * in,
                            pixels * in, weights + left * in * GROUP, window * in * GROUP,
                            y + (row * columns + column) * out + group, y_size, least(GROUP, out - group));
            }
        }
    }
}

/* to[i] (GROUP) += the sum over images, rows and columns of x[image * size + row * line + column * in + i] times the GROUP
 * numbers from grad[image * grad_size + row * grad_line + column * out] on, for i < count. */
INLINE void sum_pixels(const int count, const float *x, int64_t size, int64_t line, int64_t in, int64_t images, int64_t rows,
                       int64_t columns, const float *grad, int64_t grad_size, int64_t grad_line, int64_t out, float *to)
{
    vector sums[MOST][VECTORS];
    for (int i = 0; i < count; i++)
        for (int v = 0; v < VECTORS; v++)
            sums[i][v] = *(vector *)(to + i * GROUP + v * LANES);
    for (int64_t image = 0; image < images; image++)
        for (int64_t row = 0; row < rows; row++) {
            const float *at = x + image * size + row * line, *from = grad + image * grad_size + row * grad_line;
            for (int64_t column = 0; column < columns; column++, at += in, from += out) {
                vector g[VECTORS];
                for (int v = 0; v < VECTORS; v++)
                    g[v] = *(const vector *)(from + v * LANES);
                for (int i = 0; i < count; i++)
                    for (int v = 0; v < VECTORS; v++)
                        sums[i][v] += at[i] * g[v];
            }
        }
    for (int i = 0; i < count; i++)
        for (int v = 0; v < VECTORS; v++)
            *(vector *)(to + i * GROUP + v * LANES) = sums[i][v];
}

static void pixels_tile(int64_t count, const float *x, int64_t size, int64_t line, int64_t in, int64_t images, int64_t rows,
                        int64_t columns, const float *grad, int64_t grad_size, int64_t grad_line, int64_t out, float *to)
{
    OF_EVERY_SIZE(sum_pixels, count, x, size, line, in, images, rows, columns, grad, grad_size, grad_line, out, to)
}

/* sums (out / GROUP, window, window, in, GROUP) += the gradient of the weights, of x (images, height, width, in) and grad
 * (images, rows, columns, out), out in whole groups. */
static void correlate(const float *x, int64_t size, int64_t images, int64_t height, int64_t width, int64_t in, int64_t out,
                      int64_t window, int64_t padding, const float *grad, int64_t grad_size, float *sums)
{
    const int64_t rows = outputs(height, window, padding), columns = outputs(width, window, padding);
    const int64_t tiles = (in + TILE - 1) / TILE;
    for (int64_t group = 0; group < out; group += GROUP)
        for (int64_t up = 0; up < window; up++)
            for (int64_t left = 0; left < window; left++) {
                const int64_t row = most(0, padding - up), column = most(0, padding - left);
                for (int64_t tile = 0; tile < tiles; tile++) {
                    const int64_t i = in * tile / tiles, count = in * (tile + 1) / tiles - i;
                    pixels_tile(count, x + ((row + up - padding) * width + column + left - padding) * in + i, size, width * in, in,
                                images, least(rows, height + padding - up) - row, least(columns, width + padding - left) - column,
                                grad + (row * columns + column) * out + group, grad_size, columns * out, out,
                                sums + ((group * window + up * GROUP) * window + left * GROUP) * in + i * GROUP);
                }
            }
}

/* ---- layers */

/* What the convolution takes, of one image. where: of pool_line, (height / 2, width / 2, channels), if pooled. */
static void activate_image(const Geometry *l, const float *x, const float *scale, const float *shift, float *to, uint8_t *where)
{
    const int64_t line = l->width * l->channels, count = l->width / 2 * l->channels;
    const int kind = l->activation;
    if (!l->pooled) {
        for (int64_t row = 0; row < l->height; row++, x += line, to += line)
            if (l->statistics)
                for (int64_t i = 0; i < line; i++)
                    to[i] = activate(x[i] * scale[i] + shift[i], kind);
            else
                for (int64_t i = 0; i < line; i++)
                    to[i] = activate(x[i], kind);
        return;
    }
    float z[2 * line];
    for (int64_t row = 0; row < l->height / 2; row++, x += 2 * line, to += count, where += count) {
        if (l->statistics)
            for (int64_t i = 0; i < line; i++) {
                z[i] = x[i] * scale[i] + shift[i];
                z[line + i] = x[line + i] * scale[i] + shift[i];
            }
        pool_line(l->statistics ? z : x, l->width, l->channels, kind, to, where);
    }
}

/* y of x. Returns 0, or 1 without memory. */
int forward(const Geometry *l, const float *x, float *y, int threads)
{
    const int64_t channels = l->channels, line = l->width * channels, size = l->height * line;
    const int64_t height = l->pooled ? l->height / 2 : l->height, width = l->pooled ? l->width / 2 : l->width;
    const int64_t inner = height * width * channels, distance = apart(inner);
    const int64_t area = outputs(height, l->window, l->padding) * outputs(width, l->window, l->padding);
    const int64_t y_size = l->out ? area * l->out : inner;
    const int64_t units = ((l->images + TILE - 1) / TILE + threads - 1) / threads * threads;
    float *packed = l->out ? pack(l, 0) : NULL, *scratch = allocate(l->out ? threads * TILE * distance : 0);
    uint8_t *where = malloc(threads * inner);
    const int failed = !scratch || !where || (l->out && !packed);
    if (!failed)
        #pragma omp parallel num_threads(threads)
        {
            float scale[line], shift[line], *mine = scratch + omp_get_thread_num() * TILE * distance;
            if (l->statistics) {
                repeat(scale, l->statistics + 2 * channels, channels, line);
                repeat(shift, l->statistics + 3 * channels, channels, line);
            }
            #pragma omp for schedule(static)
            for (int64_t unit = 0; unit < units; unit++) {
                const int64_t first = l->images * unit / units, count = l->images * (unit + 1) / units - first;
                for (int64_t i = 0; i < count; i++)
                    activate_image(l, x + (first + i) * size, scale, shift,
                                   l->out ? mine + i * distance : y + (first + i) * y_size, where + omp_get_thread_num() * inner);
                if (l->out)
                    convolve(mine, distance, count, height, width, channels, l->out, l->window, l->padding, packed,
                             y + first * y_size, y_size);
            }
        }
    free(packed);
    free(scratch);
    free(where);
    return failed;
}

/* u of an image: the gradient of what the convolution takes, where it passes the activation and the pooling. With batch_norm
 * sums of u and u * (x - mean) are added to total (2, channels), by way of the lines s and t, which are 0 before and after. */
static void pass_image(const Geometry *l, const float *grad, const float *x, const float *scale, const float *shift,
                       const float *means, const uint8_t *where, float *s, float *t, double *total, float *u)
{
    const int64_t channels = l->channels, line = l->width * channels;
    const int kind = l->activation;
    for (int64_t row = 0; row < l->height; row++, x += line, u += line) {
        if (l->pooled)
            unpool_line(grad, where, row, l->height, l->width, channels, u);
        else if (l->statistics)
            for (int64_t i = 0; i < line; i++)
                u[i] = passes(x[i] * scale[i] + shift[i], kind) ? grad[row * line + i] : 0;
        else
            for (int64_t i = 0; i < line; i++)
                u[i] = passes(x[i], kind) ? grad[row * line + i] : 0;
        if (!l->statistics)
            continue;
        for (int64_t i = 0; i < line; i++) {
            s[i] += u[i];
            t[i] += u[i] * (x[i] - means[i]);
        }
        if (row % SPAN == SPAN - 1 || row == l->height - 1) {
            add_up(total, s, channels, line);
            add_up(total + channels, t, channels, line);
        }
    }
}

/* dx, dw (out, window, window, channels) and of_norm (2, channels), dweight and dbias, of dy = grad; the latter two where the
 * layer has them. With pass_image's u, v = (x - mean) / deviation, and the mean over all pixels: dbias = sum u,
 * dweight = sum u v, dx = scale * (u - mean u - v * mean(u v)). The images are summed up in parts, whatever the number of
 * threads. Returns 0, or 1 without memory. */
int backward(const Geometry *l, const float *grad, const float *x, float *dx, float *dw, float *of_norm, int threads)
{
    const int64_t channels = l->channels, line = l->width * channels, size = l->height * line, images = l->images;
    const int64_t height = l->pooled ? l->height / 2 : l->height, width = l->pooled ? l->width / 2 : l->width;
    const int64_t inner = height * width * channels, distance = apart(inner), count = images * l->height * l->width;
    const int64_t rows = outputs(height, l->window, l->padding), columns = outputs(width, l->window, l->padding);
    const int64_t out = whole_groups(l->out), area = l->out ? rows * columns : 0, grad_distance = apart(area * out);
    const int64_t weights = out * l->window * l->window * channels;
    /* With a convolution an even number, for two threads: more mean tiles that are not full, and more sums to add up. */
    const int64_t tiles = (images + TILE - 1) / TILE, units = l->out ? tiles + tiles % 2 : images;
    const int64_t parts = l->out ? least(units, PARTS) : units;
    const int64_t room = l->out || l->pooled ? TILE * (2 * distance + grad_distance) : 0;
    const float *mean = l->statistics, *inverse = mean ? mean + channels : NULL;
    float *packed = l->out ? pack(l, 1) : NULL, *scratch = allocate(threads * room), *sums = allocate(parts * weights);
    uint8_t *places = malloc(threads * TILE * inner);
    double *totals = calloc(images * 2 * channels, sizeof *totals);
    const int failed = !scratch || !sums || !places || !totals || (l->out && !packed);
    if (!failed)
        #pragma omp parallel num_threads(threads)
        {
            float scale[line], shift[line], means[line], s[line], t[line];
            float *activated = scratch + omp_get_thread_num() * room, *inner_grad = activated + TILE * distance;
            float *outer_grad = inner_grad + TILE * distance;
            uint8_t *where = places + omp_get_thread_num() * TILE * inner;
            if (l->statistics) {
                repeat(scale, inverse + channels, channels, line);
                repeat(shift, inverse + 2 * channels, channels, line);
                repeat(means, mean, channels, line);
                memset(s, 0, sizeof s);
                memset(t, 0, sizeof t);
            }
            #pragma omp for schedule(static)
            for (int64_t part = 0; part < parts; part++) {
                memset(sums + part * weights, 0, weights * sizeof *sums);
                for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; unit++) {
                    const int64_t first = images * unit / units, some = images * (unit + 1) / units - first;
                    if (l->out || l->pooled)
                        for (int64_t i = 0; i < some; i++)
                            activate_image(l, x + (first + i) * size, scale, shift, activated + i * distance, where + i * inner);
                    if (l->out) {
                        for (int64_t i = 0; i < some; i++)
                            for (int64_t pixel = 0; pixel < area; pixel++) {
                                float *to = outer_grad + i * grad_distance + pixel * out;
                                memcpy(to, grad + ((first + i) * area + pixel) * l->out, l->out * sizeof *to);
                                memset(to + l->out, 0, (out - l->out) * sizeof *to);
                            }
                        convolve(outer_grad, grad_distance, some, rows, columns, out, channels, l->window,
                                 l->window - 1 - l->padding, packed, inner_grad, distance);
                        correlate(activated, distance, some, height, width, channels, out, l->window, l->padding, outer_grad,
                                  grad_distance, sums + part * weights);
                    }
                    for (int64_t i = 0; i < some; i++)
                        pass_image(l, l->out ? inner_grad + i * distance : grad + (first + i) * inner, x + (first + i) * size,
                                   scale, shift, means, where + i * inner, s, t,
                                   totals + (first + i) * 2 * channels, dx + (first + i) * size);
                }
            }
            if (l->statistics) {
                #pragma omp single
                for (int64_t c = 0; c < channels; c++) {
                    of_norm[c] = sum_of(totals, channels + c, images, 2 * channels) * inverse[c];
                    of_norm[channels + c] = sum_of(totals, c, images, 2 * channels);
                }
                for (int64_t k = 0; k < line; k++) {
                    const int64_t c = k % channels;
                    s[k] = of_norm[channels + c] / count;
                    t[k] = of_norm[c] * inverse[c] / count;
                }
                #pragma omp for schedule(static) nowait
                for (int64_t row = 0; row < images * l->height; row++)
                    for (int64_t k = 0; k < line; k++) {
                        const int64_t i = row * line + k;
                        dx[i] = scale[k] * (dx[i] - s[k] - (x[i] - means[k]) * t[k]);
                    }
            }
            if (l->out)
                #pragma omp for schedule(static)
                for (int64_t group = 0; group < out; group += GROUP)
                    for (int64_t k = 0; k < weights / out; k++)
                        for (int64_t o = 0; o < least(GROUP, l->out - group); o++) {
                            float sum = 0;
                            for (int64_t part = 0; part < parts; part++)
                                sum += sums[part * weights + group * (weights / out) + k * GROUP + o];
                            dw[(group + o) * (weights / out) + k] = sum;
                        }
        }
    free(packed);
    free(scratch);
    free(sums);
    free(places);
    free(totals);
    return failed;
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
            most = fabsf(t[i]) > most ? fabsf(t[i]) : most;
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
