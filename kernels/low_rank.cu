// The border of a weight with low-rank adapters, beside and below W in one matrix (crates/nn/src/linear/fused.rs):
//   E = [ W  B ]      rows of E: those of W's parts, then R;  columns: those of W, then R
//       [ A  · ]      B's blocks stand on their part's rows and ranks, 0 beside them; A's parts one below the other
//   E  // (outputs + room, inputs + room), room ≥ R of all parts together; what is beyond R is 0
//   a  // (rank, inputs) of each part;  b  // (rows, rank) of each part; a part without an adapter has rank 0
// The border of E =; W and the corner are left alone.
//
// Launch: BLOCK threads; grid.x counts 1024 numbers of the border a block (any grid is right); no dynamic shared memory.

#include "common.cuh"

constexpr int BLOCK = 256;
constexpr int PARTS = 3;  // q, k, v is the longest row of projections that read one input

template <typename T>
__device__ void low_rank_border(T* e, const T* const (&a)[PARTS], const T* const (&b)[PARTS], const int (&rows)[PARTS],
                                const int (&ranks)[PARTS], int inputs, int outputs, int room) {
    const int stride = inputs + room;
    const unsigned below = static_cast<unsigned>(room) * inputs, beside = static_cast<unsigned>(outputs) * room;
    for (unsigned i = blockIdx.x * BLOCK + threadIdx.x; i < below + beside; i += gridDim.x * BLOCK) {
        T value = from_f32<T>(0);
        if (i < below) {
            const int row = i / inputs, column = i % inputs;
            int rank = row;
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                if (rank >= 0 && rank < ranks[part]) value = a[part][static_cast<long long>(rank) * inputs + column];
                rank -= ranks[part];
            }
            e[static_cast<long long>(outputs + row) * stride + column] = value;
        } else {
            const int row = (i - below) / room, column = (i - below) % room;
            int own = row, rank = column;
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const bool inside = own >= 0 && own < rows[part] && rank >= 0 && rank < ranks[part];
                if (inside) value = b[part][static_cast<long long>(own) * ranks[part] + rank];
                own -= rows[part];
                rank -= ranks[part];
            }
            e[static_cast<long long>(row) * stride + inputs + column] = value;
        }
    }
}

#define DEFINE(NAME, T)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                            \
    low_rank_border_##NAME(T* e, const T* a0, const T* a1, const T* a2, const T* b0, const T* b1, const T* b2, int rows0,          \
                           int rows1, int rows2, int rank0, int rank1, int rank2, int inputs, int outputs, int room) {             \
        low_rank_border<T>(e, {a0, a1, a2}, {b0, b1, b2}, {rows0, rows1, rows2}, {rank0, rank1, rank2}, inputs, outputs, room);    \
    }

FOR_NUMBER_TYPES(DEFINE)
