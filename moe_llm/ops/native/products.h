// Matrix products of fp32 and of bf16, summed in fp32, by the threads of a team that runs already: so that several of
// them, and what lies between them, share one parallel region, rows are gathered where they are read, and nothing is
// compiled for a shape.
//
// After Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (2008): a panel of B, as wide as two
// vectors, is copied together and stays in the cache while the rows of A pass by, a tile of which is kept in registers.
// Each number of the result is a sum over k in one order, in runs of DEPTH cells or in one, whatever its place and
// the number of threads: so a row's product depends neither on the other rows nor on the layout of the work.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

#include "lanes.h"

#if defined(__AVX512F__)
const int TILE = 14;  // rows: 28 registers of sums, of 32
#else
const int TILE = 6;  // 12 of 16
#endif
const i64 WIDE = TILE > 8 ? 16 : 8;  // numbers copied for each row of a tile, at most twice as many as it has
const i64 PANEL = 2 * LANES;
const i64 DEPTH = 512;      // of k that a panel holds: 64 KiB of them with 16 lanes
const i64 CHUNK = 8;        // panels of B that one thread holds at a time: 512 KiB of them
const i64 TILES = 20;       // tiles of A^T that one thread holds at a time: as much
const i64 FEW = 4;          // panels of B for which A^T is read where it lies
const i64 UNFINISHED = 2097152;  // numbers of a thread's unfinished sums
const i64 SHARED = 64;      // panels of B that all threads hold at a time, in the cache that they share

// Rows of contiguous numbers: row r is at step * r from base, or, where rows come in runs of `inner`, at
// outer * (r / inner) + step * (r % inner); `index`, where given, tells which row is meant.
template <typename T>
struct Rows {
    T* base;
    i64 step, outer = 0, inner = 0;
    const i64* index = nullptr;
    T* operator()(i64 row) const {
        if (index) row = index[row];
        return base + (inner ? row / inner * outer + row % inner * step : row * step);
    }
};

// A buffer of the thread's own, which stays for the next product.
struct Buffer {
    float* cells = nullptr;
    i64 size = 0;
    float* at_least(i64 wanted) {
        if (wanted > size) {
            std::free(cells);
            cells = static_cast<float*>(std::aligned_alloc(64, (wanted * sizeof(float) + 63) / 64 * 64));
            if (!cells) throw std::bad_alloc();
            size = wanted;
        }
        return cells;
    }
    ~Buffer() { std::free(cells); }
};
static thread_local Buffer own_buffer, team_buffer, sums_buffer;

// Numbers along k that are multiplied at once: a cell of 32 bits, one of fp32, two of bf16.
template <typename T>
const i64 PAIR = 4 / sizeof(T);

// c + a * b, rounded once where the processor can.
template <typename T>
static inline lanes multiply_add(lanes a, lanes b, lanes c);
template <>
inline lanes multiply_add<float>(lanes a, lanes b, lanes c) {
#if defined(__AVX512F__)
    return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return c + a * b;
#endif
}
// of bf16, both of a cell: a0 * b0 + a1 * b1 + c
template <>
inline lanes multiply_add<bf16>(lanes a, lanes b, lanes c) {
#if defined(__AVX512BF16__)
    return (lanes)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
    lane_bits x, y;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    lane_bits low_x = x << 16, low_y = y << 16, high_x = x & 0xffff0000u, high_y = y & 0xffff0000u;
    lanes a0, a1, b0, b1;
    memcpy(&a0, &low_x, sizeof a0);
    memcpy(&a1, &high_x, sizeof a1);
    memcpy(&b0, &low_y, sizeof b0);
    memcpy(&b1, &high_y, sizeof b1);
    return multiply_add<float>(a1, b1, multiply_add<float>(a0, b0, c));
#endif
}

// The threads that compute one product.
struct Team {
    i64 rank, size;
    void wait() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
};

// c[i][at...] (+)= sum over p < depth of a[i][p] b[p], or, where the rows of A^T lie `step` apart, of a[0][p * step +
// i]; all but `step` and `at` in cells.
template <typename T, typename Out, int ROWS, bool TRANSPOSED>
static void tile(const float* const* a, i64 step, const float* b, i64 depth, Out* const* c, i64 at, bool add) {
    lanes sums[ROWS][2] = {};
    const float* rows[ROWS] = {};
    for (int i = 0; i < ROWS && !TRANSPOSED; i++) rows[i] = a[i];
    const float* column = *a;
    for (i64 p = 0; p < depth; p++) {
        lanes first, second;
        memcpy(&first, b + p * PANEL, sizeof first);
        memcpy(&second, b + p * PANEL + LANES, sizeof second);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            lanes x = (TRANSPOSED ? column[i] : rows[i][p]) - lanes{};
            sums[i][0] = multiply_add<T>(x, first, sums[i][0]);
            sums[i][1] = multiply_add<T>(x, second, sums[i][1]);
        }
        if (TRANSPOSED) column += step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
        for (i64 half = 0; half < PANEL; half += LANES) {
            Out* out = c[i] + at + half;
            lanes sum = sums[i][half / LANES];
            store(out, LANES, add ? load(out, LANES) + sum : sum);
        }
}
template <typename Out>
using Tile = void (*)(const float* const*, i64, const float*, i64, Out* const*, i64, bool);
template <typename T, typename Out, bool TRANSPOSED, size_t... COUNTS>
static Tile<Out> tile_of(i64 rows, std::index_sequence<COUNTS...>) {
    static const Tile<Out> tiles[] = {tile<T, Out, int(COUNTS) + 1, TRANSPOSED>...};
    return tiles[rows - 1];
}
template <typename T, typename Out, bool TRANSPOSED>
static Tile<Out> tile_of(i64 rows) {
    return tile_of<T, Out, TRANSPOSED>(rows, std::make_index_sequence<TILE>());
}

// The tile, also where fewer than PANEL columns are left: by way of a buffer then.
template <typename T>
static inline void compute(Tile<T> tile, i64 rows, const float* const* a, i64 step, const float* b, i64 depth,
                           T* const* c, i64 at, i64 columns, bool add) {
    if (columns >= PANEL) return tile(a, step, b, depth, c, at, add);
    T cells[TILE][PANEL], *out[TILE];
    for (i64 i = 0; i < TILE; i++) {
        out[i] = cells[i];
        if (add && i < rows) memcpy(static_cast<void*>(cells[i]), c[i] + at, columns * sizeof(T));
    }
    tile(a, step, b, depth, out, 0, add);
    for (i64 i = 0; i < rows; i++) memcpy(static_cast<void*>(c[i] + at), cells[i], columns * sizeof(T));
}

// Cells of n numbers of a row, and of the same of the next one for bf16 (null: zeros).
static inline void cells_of(const float* row, const float*, i64 n, float* out) { memcpy(out, row, n * sizeof(float)); }
static inline void cells_of(const bf16* row, const bf16* next, i64 n, float* out) {
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) {
        half_bits low, high = {};
        memcpy(&low, row + i, sizeof low);
        if (next) memcpy(&high, next + i, sizeof high);
        lane_bits both = __builtin_convertvector(low, lane_bits) | __builtin_convertvector(high, lane_bits) << 16;
        memcpy(out + i, &both, sizeof both);
    }
    for (; i < n; i++) {
        uint32_t both = row[i].bits | (next ? uint32_t(next[i].bits) << 16 : 0);
        memcpy(out + i, &both, sizeof both);
    }
}

// Panels `begin` to `end` (zeros beyond N columns) of B's rows k to k + depth, as cells.
template <typename T>
static void pack_rows(const Rows<T>& b, i64 k, i64 depth, i64 begin, i64 end, i64 N, float* out) {
    i64 cells = (depth + PAIR<T> - 1) / PAIR<T>;
    for (i64 p = 0; p < cells; p++) {
        i64 at = p * PAIR<T>;
        const T *row = b(k + at), *next = at + 1 < depth ? b(k + at + 1) : nullptr;
        for (i64 panel = begin; panel < end; panel++) {
            float* to = out + ((panel - begin) * cells + p) * PANEL;
            i64 there = std::min(PANEL, N - panel * PANEL);
            if (there < PANEL) memset(to, 0, PANEL * sizeof(float));
            cells_of(row + panel * PANEL, next ? next + panel * PANEL : nullptr, there, to);
        }
    }
}

#if defined(__AVX512F__)
// out[j * PANEL + i] = rows[i][at + j] for 16 x 16 numbers.
static inline void transpose(const float* const* rows, i64 at, float* out) {
    typedef int32_t order __attribute__((vector_size(64)));
    const order low[] = {{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29},
                         {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
                         {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
                         {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}};
    const order high[] = {low[0] + 2, low[1] + 2, low[2] + 4, low[3] + 8};
    lanes x[16], y[16];
    for (int i = 0; i < 16; i++) memcpy(&x[i], rows[i] + at, sizeof x[i]);
    for (int i = 0; i < 16; i += 2) {
        y[i] = __builtin_shuffle(x[i], x[i + 1], low[0]);
        y[i + 1] = __builtin_shuffle(x[i], x[i + 1], high[0]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int r = 0; r < 2; r++) {
            x[i + 2 * r] = __builtin_shuffle(y[i + r], y[i + 2 + r], low[1]);
            x[i + 2 * r + 1] = __builtin_shuffle(y[i + r], y[i + 2 + r], high[1]);
        }
    // x[4q + r], four numbers at 4g: column 4g + r of rows 4q to 4q + 3
    for (int r = 0; r < 4; r++) {
        lanes even = __builtin_shuffle(x[r], x[4 + r], low[2]), odd = __builtin_shuffle(x[r], x[4 + r], high[2]);
        lanes even2 = __builtin_shuffle(x[8 + r], x[12 + r], low[2]),
              odd2 = __builtin_shuffle(x[8 + r], x[12 + r], high[2]);
        y[r] = __builtin_shuffle(even, even2, low[3]);
        y[8 + r] = __builtin_shuffle(even, even2, high[3]);
        y[4 + r] = __builtin_shuffle(odd, odd2, low[3]);
        y[12 + r] = __builtin_shuffle(odd, odd2, high[3]);
    }
    for (int j = 0; j < 16; j++) memcpy(out + j * PANEL, &y[j], sizeof y[j]);
}
#endif

// As pack_rows, of a B that is given column by column: columns(n) are its numbers along k. Of bf16 an even number.
template <typename T>
static void pack_columns(const Rows<T>& columns, i64 k, i64 depth, i64 begin, i64 end, i64 N, float* out) {
    i64 cells = depth / PAIR<T>;
    for (i64 first = begin * PANEL; first < end * PANEL; first += LANES) {
        float* to = out + (first / PANEL - begin) * PANEL * cells + first % PANEL;
        const float* column[LANES];
        for (i64 i = 0; i < LANES; i++)
            column[i] = first + i < N ? reinterpret_cast<const float*>(columns(first + i) + k) : nullptr;
        i64 done = 0;
#if defined(__AVX512F__)
        for (; first + LANES <= N && done + LANES <= cells; done += LANES) transpose(column, done, to + done * PANEL);
#endif
        for (i64 i = 0; i < LANES; i++)
            for (i64 p = done; p < cells; p++) {
                if (column[i])
                    memcpy(to + p * PANEL + i, column[i] + p, sizeof(float));
                else
                    to[p * PANEL + i] = 0;
            }
    }
}

// How many panels or tiles of so many cells there is room for, where there is for `most` of DEPTH.
static inline i64 room_for(i64 most, i64 cells) { return std::max(most * DEPTH / cells, i64(1)); }

// C = A B (+ C where `add`), C of M x N: A's rows are read as they lie, each thread has columns of its own, or, where
// there are few, rows. by_columns: B is given by its columns. In bf16 K is even, or A has one more number in each row.
template <typename T>
static void rows_times(const Team& team, const Rows<T>& a, const Rows<T>& b, bool by_columns, const Rows<T>& c, i64 M,
                       i64 N, i64 K, bool add) {
    i64 panels = (N + PANEL - 1) / PANEL, across = team.size;
    while (across > 1 && (team.size % across || across > panels)) across--;
    i64 down = team.size / across, column = team.rank % across, row = team.rank / across;
    i64 first_panel = panels * column / across, panels_here = panels * (column + 1) / across - first_panel;
    i64 first_row = M * row / down, rows_here = M * (row + 1) / down - first_row;
    i64 tiles = (rows_here + TILE - 1) / TILE, run = PAIR<T> == 1 ? DEPTH : std::max(K, i64(1));
    i64 most = std::max(std::min(K, run) / PAIR<T>, i64(1));
    i64 width = room_for(CHUNK, most), chunks = (panels_here + width - 1) / width;
    float* packed = own_buffer.at_least(width * PANEL * most);
    for (i64 chunk = 0; chunk < chunks; chunk++) {
        i64 begin = first_panel + panels_here * chunk / chunks, end = first_panel + panels_here * (chunk + 1) / chunks;
        for (i64 k = 0; k < K || (k == 0 && !add); k += run) {
            i64 depth = std::min(run, K - k), cells = depth / PAIR<T>;
            (by_columns ? pack_columns<T> : pack_rows<T>)(b, k, depth, begin, end, N, packed);
            for (i64 t = 0; t < tiles; t++) {
                i64 from = first_row + rows_here * t / tiles, rows = first_row + rows_here * (t + 1) / tiles - from;
                const float* in[TILE];
                T* out[TILE];
                for (i64 i = 0; i < rows; i++)
                    in[i] = reinterpret_cast<const float*>(a(from + i) + k), out[i] = c(from + i);
                Tile<T> tile = tile_of<T, T, false>(rows);
                for (i64 panel = begin; panel < end; panel++)
                    compute(tile, rows, in, 0, packed + (panel - begin) * PANEL * cells, cells, out, panel * PANEL,
                            N - panel * PANEL, add || k > 0);
            }
        }
    }
}

// C = A^T B (+ C where `add`), C of M x N, A of K x M, B of K x N: a sum over rows. B is copied together once, in
// `shared`, each thread has columns of A of its own. What a run of K leaves unfinished is kept in C, or, in bf16, in a
// buffer in fp32.
template <typename T>
static void transposed_times(const Team& team, Buffer& shared_buffer, const Rows<T>& a, const Rows<T>& b,
                             const Rows<T>& c, i64 M, i64 N, i64 K, bool add) {
    i64 panels = (N + PANEL - 1) / PANEL, tiles = (M + TILE - 1) / TILE, run = DEPTH * PAIR<T>;
    i64 most = std::max((std::min(K, run) + PAIR<T> - 1) / PAIR<T>, i64(1));
    i64 first_tile = tiles * team.rank / team.size, tiles_here = tiles * (team.rank + 1) / team.size - first_tile;
    i64 first_row = M * first_tile / tiles, rows_here = M * (first_tile + tiles_here) / tiles - first_row;
    i64 height = room_for(TILES, most), chunks = (tiles_here + height - 1) / height;
    i64 together = room_for(SHARED, most), width = room_for(CHUNK, most);
    bool unfinished = PAIR<T> == 2 && K > run;
    if (unfinished) {
        i64 rows = (tiles + team.size - 1) / team.size * TILE;
        together = std::clamp(UNFINISHED / (PANEL * rows), i64(1), together);
    }
    float* sums = unfinished ? sums_buffer.at_least(rows_here * together * PANEL) : nullptr;
    // for few panels copies cost more than what they save, where rows are evenly apart
    bool as_it_lies = PAIR<T> == 1 && panels <= FEW && !a.index && (!a.inner || a.outer == a.inner * a.step);
    float* packed = own_buffer.at_least(height * TILE * most + LANES);
    team.wait();
    if (team.rank == 0) shared_buffer.at_least(together * PANEL * most);
    for (i64 first = 0; first < panels; first += together) {
        i64 last = std::min(first + together, panels);
        for (i64 k = 0; k < K || (k == 0 && !add); k += run) {
            i64 depth = std::min(run, K - k), cells = (depth + PAIR<T> - 1) / PAIR<T>;
            team.wait();
            float* shared = shared_buffer.cells;
            i64 mine = first + (last - first) * team.rank / team.size;
            pack_rows(b, k, depth, mine, first + (last - first) * (team.rank + 1) / team.size, N,
                      shared + (mine - first) * PANEL * cells);
            team.wait();
            for (i64 chunk = 0; chunk < chunks; chunk++) {
                i64 begin = first_tile + tiles_here * chunk / chunks;
                i64 end = first_tile + tiles_here * (chunk + 1) / chunks, left = M * begin / tiles;
                for (i64 p = 0; p < cells && !as_it_lies; p++) {
                    i64 at = k + p * PAIR<T>;
                    const T *row = a(at), *next = at + 1 < k + depth ? a(at + 1) : nullptr;
                    for (i64 t = begin; t < end; t++) {
                        i64 from = M * t / tiles, rows = M * (t + 1) / tiles - from;
                        float* out = packed + (from - left) * cells + p * rows;
                        // more than there are, over which those of the next row are written
                        if (p + 1 < cells && from + WIDE <= M)
                            cells_of(row + from, next ? next + from : nullptr, WIDE, out);
                        else
                            cells_of(row + from, next ? next + from : nullptr, rows, out);
                    }
                }
                for (i64 group = first; group < last; group += width)
                    for (i64 t = begin; t < end; t++) {
                        i64 from = M * t / tiles, rows = M * (t + 1) / tiles - from;
                        const float* in =
                            as_it_lies ? reinterpret_cast<const float*>(a(k) + from) : packed + (from - left) * cells;
                        i64 step = as_it_lies ? a.step : rows;
                        T* out[TILE];
                        float* kept[TILE];
                        for (i64 i = 0; i < rows; i++) {
                            out[i] = c(from + i);
                            kept[i] = sums + (from + i - first_row) * together * PANEL;
                        }
                        for (i64 panel = group; panel < std::min(group + width, last); panel++) {
                            const float* with = shared + (panel - first) * PANEL * cells;
                            if (unfinished)
                                tile_of<T, float, true>(rows)(&in, step, with, cells, kept, (panel - first) * PANEL,
                                                              k > 0);
                            else
                                compute(tile_of<T, T, true>(rows), rows, &in, step, with, cells, out, panel * PANEL,
                                        N - panel * PANEL, add || k > 0);
                        }
                    }
            }
        }
        i64 columns = std::min(together * PANEL, N - first * PANEL);
        for (i64 row = 0; row < rows_here && unfinished; row++) {
            T* out = c(first_row + row) + first * PANEL;
            const float* sum = sums + row * together * PANEL;
            over(0, columns, [&](i64 i, i64 n) INLINE {
                store(out + i, n, add ? load(out + i, n) + load(sum + i, n) : load(sum + i, n));
            });
        }
    }
    team.wait();  // before anyone packs something else there
}
