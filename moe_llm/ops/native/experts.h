// Matrix products, and experts made of them; see products.h. Included by kernels.cpp, after SwiGLU.

#pragma once

// C = A B, or A^T B, (+ C), `outer` times `inner` of them. layout, in this order: outer, inner, M, N, K; for each of A,
// B and C: the steps from one to the next along outer and inner, and their rows' outer step, step and run (see Rows);
// and whether A is given transposed, B by columns, and C is added to. In bf16 K is even unless A is given transposed.
template <typename T>
static void matmul(T* a, T* b, T* c, const i64* layout, int threads) {
    i64 outer = layout[0], inner = layout[1], M = layout[2], N = layout[3], K = layout[4];
    bool transposed = layout[20], by_columns = layout[21], add = layout[22];
    auto rows = [&](T* base, const i64* steps, i64 item) {
        return Rows<T>{base + item / inner * steps[0] + item % inner * steps[1], steps[3], steps[2], steps[4]};
    };
    auto compute_item = [&](const Team& team, Buffer& shared, i64 item) {
        Rows<T> A = rows(a, layout + 5, item), B = rows(b, layout + 10, item), C = rows(c, layout + 15, item);
        if (transposed)
            transposed_times(team, shared, A, B, C, M, N, K, add);
        else
            rows_times(team, A, B, by_columns, C, M, N, K, add);
    };
    Buffer& shared = team_buffer;
    bool apart = outer * inner >= threads;
#pragma omp parallel num_threads(threads)
    {
        if (apart) {
#pragma omp for schedule(dynamic)
            for (i64 item = 0; item < outer * inner; item++) compute_item({0, 1}, team_buffer, item);
        } else {
            Team team{omp_get_thread_num(), omp_get_num_threads()};
            for (i64 item = 0; item < outer * inner; item++) compute_item(team, shared, item);
        }
    }
}

// The rows of a thread: a run of them for each.
struct Share {
    i64 from, to;
    Share(const Team& team, i64 rows) : from(rows * team.rank / team.size), to(rows * (team.rank + 1) / team.size) {}
};

// y = (weight silu(x W_gate^T) (x W_up^T)) W_down^T for each expert's rows, which follow one another. x: (tokens, D),
// row r is token_index[r], or r without one; gate_up_proj: (experts, 2 F, D); down_proj: (experts, D, F); counts: rows
// of each; weight: of each row, or null. Written: gate_up (rows, 2 F), y (rows, D); hidden holds `block` rows of F. In
// bf16 D and F are even.
template <typename T>
static void experts_forward(T* x, const i64* token_index, T* gate_up_proj, T* down_proj, const i64* counts,
                            const float* weight, T* gate_up, T* hidden, T* y, i64 experts, i64 D, i64 F, i64 block,
                            int threads) {
#pragma omp parallel num_threads(threads)
    {
        Team team{omp_get_thread_num(), omp_get_num_threads()};
        i64 start = 0;
        for (i64 expert = 0; expert < experts; expert++) {
            Rows<T> gate_up_columns{gate_up_proj + expert * 2 * F * D, D}, down_columns{down_proj + expert * D * F, F};
            for (i64 left = counts[expert], n; left > 0; left -= n, start += n) {
                n = std::min(left, block);
                Rows<T> in = token_index ? Rows<T>{x, D, 0, 0, token_index + start} : Rows<T>{x + start * D, D};
                T* projected = gate_up + start * 2 * F;
                rows_times(team, in, gate_up_columns, true, {projected, 2 * F}, n, 2 * F, D, false);
                team.wait();
                Share share(team, n);
                swiglu_forward_rows(projected, weight ? weight + start : nullptr, hidden, share.from, share.to, F);
                team.wait();
                rows_times(team, {hidden, F}, down_columns, true, {y + start * D, D}, n, D, F, false);
                team.wait();
            }
        }
    }
}

// The gradients of experts_forward from grad (tokens, D), gathered as x is; those that are null are not computed.
// gate_up: as written by the forward pass; grad_gate_up: null, and then gate_up is written over, or `block` rows of 2
// F.
template <typename T>
static void experts_backward(T* x, const i64* token_index, T* gate_up_proj, T* down_proj, const i64* counts,
                             const float* weight, T* gate_up, T* grad, T* hidden, T* grad_gate_up, T* grad_x,
                             T* grad_gate_up_proj, T* grad_down_proj, float* grad_weight, i64 experts, i64 D, i64 F,
                             i64 block, int threads) {
    Buffer& shared = team_buffer;
#pragma omp parallel num_threads(threads)
    {
        Team team{omp_get_thread_num(), omp_get_num_threads()};
        i64 start = 0;
        for (i64 expert = 0; expert < experts; expert++) {
            Rows<T> gate_up_rows{gate_up_proj + expert * 2 * F * D, D}, down_rows{down_proj + expert * D * F, F};
            for (i64 done = 0, n; done < counts[expert]; done += n, start += n) {
                n = std::min(counts[expert] - done, block);
                auto gathered = [&](T* tokens) {
                    return token_index ? Rows<T>{tokens, D, 0, 0, token_index + start} : Rows<T>{tokens + start * D, D};
                };
                T *projected = gate_up + start * 2 * F, *grad_projected = grad_gate_up ? grad_gate_up : projected;
                rows_times(team, gathered(grad), down_rows, false, {hidden, F}, n, F, D, false);
                team.wait();
                Share share(team, n);
                swiglu_backward_rows(projected, hidden, weight ? weight + start : nullptr, hidden, grad_projected,
                                     grad_weight ? grad_weight + start : nullptr, share.from, share.to, F);
                team.wait();
                if (grad_down_proj)
                    transposed_times(team, shared, gathered(grad), {hidden, F}, {grad_down_proj + expert * D * F, F}, D,
                                     F, n, done > 0);
                if (grad_gate_up_proj)
                    transposed_times(team, shared, {grad_projected, 2 * F}, gathered(x),
                                     {grad_gate_up_proj + expert * 2 * F * D, D}, 2 * F, D, n, done > 0);
                if (grad_x)
                    rows_times(team, {grad_projected, 2 * F}, gate_up_rows, false, {grad_x + start * D, D}, n, D, 2 * F,
                               false);
                team.wait();
            }
        }
    }
}
