// Matrix products in fp32, by the threads of a team that runs already: so that several of them, and what lies between
// them, share one parallel region, rows are gathered where they are read, and nothing is compiled for a shape.
//
// After Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (2008): a panel of B, as wide as two
// vectors, is copied together and stays in the cache while the rows of A pass by, a tile of which is kept in registers.
// Each number of the result is a sum over k in one order, in runs of DEPTH, whatever its place and the number of
// threads: so a row's product depends neither on the other rows nor on the layout of the work.

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
const i64 SHARED = 64;      // panels of B that all threads hold at a time, in the cache that they share
typedef float loose_lanes __attribute__((vector_size(4 * LANES), aligned(4)));

// Rows of contiguous numbers: row r is at step * r from base, or, where rows come in runs of `inner`, at
// outer * (r / inner) + step * (r % inner); `index`, where given, tells which row is meant.
struct Rows {
    float* base;
    i64 step, outer = 0, inner = 0;
    const i64* index = nullptr;
    float* operator()(i64 row) const {
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
static thread_local Buffer own_buffer, team_buffer;

// c + a * b, rounded once where the processor can.
static inline lanes multiply_add(lanes a, lanes b, lanes c) {
#if defined(__AVX512F__)
    return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return c + a * b;
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

// c[i][at...] (+)= sum over p < depth of a[i][p] b[p], or, where the rows of A^T lie `step` apart, of a[0][p * step + i].
template <int ROWS, bool TRANSPOSED>
static void tile(const float* const* a, i64 step, const float* b, i64 depth, float* const* c, i64 at, bool add) {
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
            sums[i][0] = multiply_add(x, first, sums[i][0]);
            sums[i][1] = multiply_add(x, second, sums[i][1]);
        }
        if (TRANSPOSED) column += step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
        loose_lanes *left = reinterpret_cast<loose_lanes*>(c[i] + at),
                    *right = reinterpret_cast<loose_lanes*>(c[i] + at + LANES);
        *left = add ? *left + sums[i][0] : sums[i][0];
        *right = add ? *right + sums[i][1] : sums[i][1];
    }
}
typedef void (*Tile)(const float* const*, i64, const float*, i64, float* const*, i64, bool);
template <bool TRANSPOSED, size_t... COUNTS>
static Tile tile_of(i64 rows, std::index_sequence<COUNTS...>) {
    static const Tile tiles[] = {tile<int(COUNTS) + 1, TRANSPOSED>...};
    return tiles[rows - 1];
}
template <bool TRANSPOSED>
static Tile tile_of(i64 rows) {
    return tile_of<TRANSPOSED>(rows, std::make_index_sequence<TILE>());
}

// The tile, also where fewer than PANEL columns are left: by way of a buffer then.
static inline void compute(Tile tile, i64 rows, const float* const* a, i64 step, const float* b, i64 depth,
                           float* const* c, i64 at, i64 columns, bool add) {
    if (columns >= PANEL) return tile(a, step, b, depth, c, at, add);
    float cells[TILE][PANEL], *out[TILE];
    for (int i = 0; i < TILE; i++) out[i] = cells[i];
    tile(a, step, b, depth, out, 0, false);
    for (i64 i = 0; i < rows; i++)
        for (i64 n = 0; n < columns; n++) c[i][at + n] = add ? c[i][at + n] + cells[i][n] : cells[i][n];
}

// Panels `begin` to `end` (zeros beyond N columns) of B's rows k to k + depth.
static void pack_rows(const Rows& b, i64 k, i64 depth, i64 begin, i64 end, i64 N, float* out) {
    for (i64 p = 0; p < depth; p++) {
        const float* row = b(k + p);
        for (i64 panel = begin; panel < end; panel++) {
            float* to = out + ((panel - begin) * depth + p) * PANEL;
            i64 there = N - panel * PANEL;
            if (there >= PANEL) {
                memcpy(to, row + panel * PANEL, PANEL * sizeof(float));
            } else {
                memset(to, 0, PANEL * sizeof(float));
                memcpy(to, row + panel * PANEL, there * sizeof(float));
            }
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

// As pack_rows, of a B that is given column by column: columns(n) are its numbers along k.
static void pack_columns(const Rows& columns, i64 k, i64 depth, i64 begin, i64 end, i64 N, float* out) {
    for (i64 first = begin * PANEL; first < end * PANEL; first += LANES) {
        float* to = out + (first / PANEL - begin) * PANEL * depth + first % PANEL;
        const float* column[LANES];
        for (i64 i = 0; i < LANES; i++) column[i] = first + i < N ? columns(first + i) + k : nullptr;
        i64 done = 0;
#if defined(__AVX512F__)
        for (; first + LANES <= N && done + LANES <= depth; done += LANES) transpose(column, done, to + done * PANEL);
#endif
        for (i64 i = 0; i < LANES; i++)
            for (i64 p = done; p < depth; p++) to[p * PANEL + i] = column[i] ? column[i][p] : 0.0f;
    }
}

// C = A B (+ C where `add`), C of M x N: A's rows are read as they lie, each thread has columns of its own, or, where
// there are few, rows. by_columns: B is given by its columns.
static void rows_times(const Team& team, const Rows& a, const Rows& b, bool by_columns, const Rows& c, i64 M, i64 N,
                       i64 K, bool add) {
    i64 panels = (N + PANEL - 1) / PANEL, across = team.size;
    while (across > 1 && (team.size % across || across > panels)) across--;
    i64 down = team.size / across, column = team.rank % across, row = team.rank / across;
    i64 first_panel = panels * column / across, panels_here = panels * (column + 1) / across - first_panel;
    i64 chunks = (panels_here + CHUNK - 1) / CHUNK;
    i64 first_row = M * row / down, rows_here = M * (row + 1) / down - first_row;
    i64 tiles = (rows_here + TILE - 1) / TILE;
    float* packed = own_buffer.at_least(CHUNK * PANEL * DEPTH);
    for (i64 chunk = 0; chunk < chunks; chunk++) {
        i64 begin = first_panel + panels_here * chunk / chunks, end = first_panel + panels_here * (chunk + 1) / chunks;
        for (i64 k = 0; k < K || (k == 0 && !add); k += DEPTH) {
            i64 depth = std::min(DEPTH, K - k);
            (by_columns ? pack_columns : pack_rows)(b, k, depth, begin, end, N, packed);
            for (i64 t = 0; t < tiles; t++) {
                i64 from = first_row + rows_here * t / tiles, rows = first_row + rows_here * (t + 1) / tiles - from;
                const float* in[TILE];
                float* out[TILE];
                for (i64 i = 0; i < rows; i++) in[i] = a(from + i) + k, out[i] = c(from + i);
                Tile tile = tile_of<false>(rows);
                for (i64 panel = begin; panel < end; panel++)
                    compute(tile, rows, in, 0, packed + (panel - begin) * PANEL * depth, depth, out,
                            panel * PANEL, N - panel * PANEL, add || k > 0);
            }
        }
    }
}

// C = A^T B (+ C where `add`), C of M x N, A of K x M, B of K x N: a sum over rows. B is copied together once, in
// `shared` (SHARED * PANEL * DEPTH numbers), each thread has columns of A of its own.
static void transposed_times(const Team& team, float* shared, const Rows& a, const Rows& b, const Rows& c, i64 M, i64 N,
                             i64 K, bool add) {
    i64 panels = (N + PANEL - 1) / PANEL, tiles = (M + TILE - 1) / TILE;
    i64 first_tile = tiles * team.rank / team.size, tiles_here = tiles * (team.rank + 1) / team.size - first_tile;
    i64 chunks = (tiles_here + TILES - 1) / TILES;
    // for few panels copies cost more than what they save, where rows are evenly apart
    bool as_it_lies = panels <= FEW && !a.index && (!a.inner || a.outer == a.inner * a.step);
    float* packed = own_buffer.at_least(TILES * TILE * DEPTH + LANES);
    for (i64 first = 0; first < panels; first += SHARED) {
        i64 last = std::min(first + SHARED, panels);
        for (i64 k = 0; k < K || (k == 0 && !add); k += DEPTH) {
            i64 depth = std::min(DEPTH, K - k);
            team.wait();
            i64 mine = first + (last - first) * team.rank / team.size;
            pack_rows(b, k, depth, mine, first + (last - first) * (team.rank + 1) / team.size, N,
                      shared + (mine - first) * PANEL * depth);
            team.wait();
            for (i64 chunk = 0; chunk < chunks; chunk++) {
                i64 begin = first_tile + tiles_here * chunk / chunks;
                i64 end = first_tile + tiles_here * (chunk + 1) / chunks, left = M * begin / tiles;
                for (i64 p = 0; p < depth && !as_it_lies; p++) {
                    const float* row = a(k + p);
                    for (i64 t = begin; t < end; t++) {
                        i64 from = M * t / tiles, rows = M * (t + 1) / tiles - from;
                        float* out = packed + (from - left) * depth + p * rows;
                        // more than there are, over which those of the next row are written
                        if (p + 1 < depth && from + WIDE <= M)
                            memcpy(out, row + from, WIDE * sizeof(float));
                        else
                            for (i64 i = 0; i < rows; i++) out[i] = row[from + i];
                    }
                }
                for (i64 panels_done = first; panels_done < last; panels_done += CHUNK)
                    for (i64 t = begin; t < end; t++) {
                        i64 from = M * t / tiles, rows = M * (t + 1) / tiles - from;
                        float* out[TILE];
                        for (i64 i = 0; i < rows; i++) out[i] = c(from + i);
                        Tile tile = tile_of<true>(rows);
                        const float* in = as_it_lies ? a(k) + from : packed + (from - left) * depth;
                        for (i64 panel = panels_done; panel < std::min(panels_done + CHUNK, last); panel++)
                            compute(tile, rows, &in, as_it_lies ? a.step : rows,
                                    shared + (panel - first) * PANEL * depth, depth, out, panel * PANEL,
                                    N - panel * PANEL, add || k > 0);
                    }
            }
        }
    }
    team.wait();  // before anyone packs something else there
}
