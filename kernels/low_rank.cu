// A weight with low-rank adapters as one matrix (crates/nn/src/linear/fused.rs):
//   E = [ W  B ]      rows of E: those of W's parts, then R;  columns: those of W, then R
//       [ A  · ]      B's blocks stand on their part's rows and ranks, 0 beside them; A's parts one below the other
//   E  // (outputs + room, inputs + room), room ≥ R of all parts together; what is beyond R is 0
//   a  // (rank, inputs) of each part;  b  // (rows, rank) of each part; a part without an adapter has rank 0
//   codes, absmax, nested, offset of each part, and tables: codes.cuh
// The corner is left alone. low_rank_border: the border of E =, W too is left alone. low_rank_coded: E =.
// low_rank_add adds the rows of dA of all parts, sum // (R, inputs), to the parts' own gradients: da // (rank, inputs) +=.
//
// Launch: BLOCK threads, no dynamic shared memory; grid.x
//   low_rank_border: 2048 numbers of the border a block (any grid is right)
//   low_rank_coded: `border_blocks`, as many as for low_rank_border, and 8192 elements of W a block, for each part by itself, exactly
//   low_rank_add: 256 numbers of the sum a block (any grid is right)

#include "codes.cuh"

constexpr int BLOCK = 256;
constexpr int PARTS = 3;  // q, k, v is the longest row of projections that read one input

// `block` of `blocks` write the border together, in runs of neighbouring columns that belong to one part.
template <int WIDTH, typename T>
__device__ void border(T* e, const T* const (&a)[PARTS], const T* const (&b)[PARTS], const int (&rows)[PARTS], const int (&ranks)[PARTS],
                       int inputs, int outputs, int room, int block, int blocks) {
    const int stride = inputs + room;
    const unsigned below = static_cast<unsigned>(room) * inputs / WIDTH, beside = static_cast<unsigned>(outputs) * room / WIDTH;
    for (unsigned i = block * BLOCK + threadIdx.x; i < below + beside; i += blocks * BLOCK) {
        Run<T, WIDTH> run;
        if (i < below) {
            const int row = i / (inputs / WIDTH), column = i % (inputs / WIDTH) * WIDTH;
            int rank = row;
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                if (rank >= 0 && rank < ranks[part]) run = load_run<WIDTH>(a[part] + static_cast<long long>(rank) * inputs + column);
                rank -= ranks[part];
            }
            store_run(e + static_cast<long long>(outputs + row) * stride + column, run);
        } else {
            const int row = (i - below) / (room / WIDTH), column = (i - below) % (room / WIDTH) * WIDTH;
            int own = row, rank = column;
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const bool inside = own >= 0 && own < rows[part] && rank >= 0 && rank < ranks[part];
                if (inside) run = load_run<WIDTH>(b[part] + static_cast<long long>(own) * ranks[part] + rank);
                own -= rows[part];
                rank -= ranks[part];
            }
            store_run(e + static_cast<long long>(row) * stride + inputs + column, run);
        }
    }
}

template <typename T>
__device__ void low_rank_border(T* e, const T* const (&a)[PARTS], const T* const (&b)[PARTS], const int (&rows)[PARTS],
                                const int (&ranks)[PARTS], int inputs, int outputs, int room, int block, int blocks) {
    constexpr int WIDTH = Pack<T>::SIZE;
    bool runs = inputs % WIDTH == 0 && room % WIDTH == 0 && is_aligned_16(e);
#pragma unroll
    for (int part = 0; part < PARTS; part++) runs = runs && ranks[part] % WIDTH == 0 && is_aligned_16(a[part]) && is_aligned_16(b[part]);
    if (runs) border<WIDTH>(e, a, b, rows, ranks, inputs, outputs, room, block, blocks);
    else border<1>(e, a, b, rows, ranks, inputs, outputs, room, block, blocks);
}

template <typename T>
__device__ void low_rank_coded(T* e, const float* tables, const Coded (&parts)[PARTS], const int (&rows)[PARTS], int inputs, int room,
                               int round_to, int block) {
    Coded own = parts[0];
    int own_rows = rows[0];
    long long first = 0;  // row of the part
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const long long n = static_cast<long long>(rows[part]) * inputs;
        const int blocks = static_cast<int>((n + PIECE<BLOCK> - 1) / PIECE<BLOCK>);
        if (part + 1 == PARTS || block < blocks) {
            own = parts[part];
            own_rows = rows[part];
            break;
        }
        block -= blocks;
        first += rows[part];
    }
    const long long n = static_cast<long long>(own_rows) * inputs, stride = inputs + room;
    write_coded<BLOCK>(e + first * stride, own, tables, n, inputs, static_cast<int>(stride), round_to, block);
}

#define DEFINE(NAME, T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                        \
    low_rank_border_##NAME(T* e, const T* a0, const T* a1, const T* a2, const T* b0, const T* b1, const T* b2, int rows0,      \
                           int rows1, int rows2, int rank0, int rank1, int rank2, int inputs, int outputs, int room) {         \
        low_rank_border<T>(e, {a0, a1, a2}, {b0, b1, b2}, {rows0, rows1, rows2}, {rank0, rank1, rank2}, inputs, outputs, room, \
                           blockIdx.x, gridDim.x);                                                                             \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                        \
    low_rank_coded_##NAME(T* e, const T* a0, const T* a1, const T* a2, const T* b0, const T* b1, const T* b2, int rows0,       \
                          int rows1, int rows2, int rank0, int rank1, int rank2, int inputs, int outputs, int room,            \
                          int border_blocks, int round_to, const float* tables, const unsigned char* codes0,                   \
                          const unsigned char* codes1, const unsigned char* codes2, const void* absmax0, const void* absmax1,  \
                          const void* absmax2, const float* nested0, const float* nested1, const float* nested2,               \
                          const float* offset0, const float* offset1, const float* offset2) {                                  \
        const int block = blockIdx.x;                                                                                          \
        if (block < border_blocks) {                                                                                           \
            low_rank_border<T>(e, {a0, a1, a2}, {b0, b1, b2}, {rows0, rows1, rows2}, {rank0, rank1, rank2}, inputs, outputs, room,\
                               block, border_blocks);                                                                          \
        } else {                                                                                                               \
            low_rank_coded<T>(e, tables,                                                                                       \
                              {{codes0, absmax0, nested0, offset0}, {codes1, absmax1, nested1, offset1},                       \
                               {codes2, absmax2, nested2, offset2}},                                                           \
                              {rows0, rows1, rows2}, inputs, room, round_to, block - border_blocks);                           \
        }                                                                                                                      \
    }

FOR_NUMBER_TYPES(DEFINE)

extern "C" __global__ void __launch_bounds__(BLOCK)
low_rank_add(float* da0, float* da1, float* da2, const float* sum, int rank0, int rank1, int rank2, int inputs) {
    const int first = rank0 * inputs, second = rank1 * inputs, all = first + second + rank2 * inputs;
    for (int i = blockIdx.x * BLOCK + threadIdx.x; i < all; i += gridDim.x * BLOCK) {
        float* own = i < first ? da0 + i : i < first + second ? da1 + (i - first) : da2 + (i - first - second);
        *own += sum[i];
    }
}
