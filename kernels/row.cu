// One row through a linear layer, for decoding: every matrix is read once, as it is stored (crates/nn/src/row.rs).
//   prepare:  x' = x, norm(x) (see norm.cu) or act(gate)·up (see activation.cu);   low = s·A·x'
//   product:  y = W·x' + B·low + bias,  or  y = add + scale·(the same)
//   next:     token = the first of the largest logits,  position += 1;   search // two words, zeros before and after
//   x, x', y, add  // (cols), (rows of W)        low // (R), of all parts together
//   A  // (rank, cols) of each part    B // (rows, rank)    bias // (rows)
//   W  // (rows, cols): plain numbers, or 4-bit codes as nf4.cu has them, two in a byte, the earlier in the high half
//   absmax // (rows·cols/64): plain, or codes of it with nested // (⌈·/256⌉), offset // (1) and map // (256), one for all parts
// All outputs =. cols is a multiple of 32 (64 for codes) and every matrix begins at a multiple of 16 bytes, so that all accesses are
// whole packs.
// Parts are projections that read the same x; one that isn't there has no rows, a part without adapter has rank 0.
// Dequantised numbers aren't rounded: a sum over 32 levels is multiplied by their absmax once.
//
// Launch: row_prepare: PREPARE_BLOCK threads, grid.x = max(R, 1), no dynamic shared memory;
//   row_product_plain: BLOCK threads, grid.x counts WARPS·ROWS rows a block (any grid is right), dynamic shared memory: cols of T;
//   row_product_coded: 32·tiles·n threads for any n, CODED_BLOCK at most, where tiles is at most ⌈cols/CHUNK⌉; grid.x = the sum of
//   ⌈rows/rows_per_block⌉ of the parts; dynamic shared memory: cols rounded up to CHUNK, of T, and (tiles + 1)·rows_per_block·4 bytes;
//   row_next: NEXT_BLOCK threads, any grid.x.
// All may begin before the kernels ahead have ended: what they wrote is read after wait_for_kernels_before().
// archs: 75, 80, 90

#include "activation.cuh"
#include "common.cuh"

// Where launches may overlap (compute_90, Launch::early): waits until every kernel before has ended and what it wrote is seen. All
// kernels that are launched so must wait before they end; then none ends before those ahead of it.
__device__ __forceinline__ void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin, which then waits as above.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Asks for the line of this address to be brought into the L2.
__device__ __forceinline__ void prefetch_to_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

__device__ __forceinline__ float2 load_shared_pair(unsigned address) {
    float2 pair;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
    return pair;
}


constexpr int PREPARE_BLOCK = 512;
constexpr int NEXT_BLOCK = 256;
constexpr int BLOCK = 128;
constexpr int WARPS = BLOCK / WARP;
constexpr int PLAIN_ROWS = 4;  // that a warp does at a time
constexpr int PARTS = 3;
constexpr int SCALED = 64;  // elements that share an absmax
constexpr int GROUP = 256;  // absmax that share a nested one

enum Source { PLAIN, NORMED, ACTIVATED };

// What the parts' adapters read.
template <typename T>
struct Ranks {
    const T* a[PARTS];
    int rank[PARTS];
};

// How a row becomes x'.
struct Before {
    int source;
    const float *weight, *bias;  // of the norm
    float eps;
    int centered, gated, kind;
};

// A row of x (or up beside it, or a row of A). A thread loads its first pack before anything is computed; those of wider rows are
// loaded where they are used.
template <typename T>
struct Loaded {
    static constexpr int WIDTH = Pack<T>::SIZE, STEP = PREPARE_BLOCK * WIDTH;
    using Piece = Run<T, WIDTH>;
    const T* row;
    Piece kept;

    __device__ Loaded(const T* row, int cols) : row(row) {
        const int at = threadIdx.x * WIDTH;
        if (row != nullptr && at < cols) kept = load_run<WIDTH>(row + at);
    }
    // Calls body(column, piece of this row, piece of each other row).
    template <typename Body, typename... Others>
    __device__ void each(int cols, Body body, const Others&... others) const {
        int at = threadIdx.x * WIDTH;
        if (at < cols) body(at, kept, others.kept...);
#pragma unroll 1
        for (at += STEP; at < cols; at += STEP) body(at, piece(at), others.piece(at)...);
    }
    __device__ Piece piece(int at) const { return row != nullptr ? load_run<WIDTH>(row + at) : Piece(); }
};

template <typename T>
__device__ void row_prepare(T* out, float* low, const T* x, const Before& before, int cols, float scaling, const Ranks<T>& parts) {
    constexpr int WIDTH = Pack<T>::SIZE;
    using Piece = Run<T, WIDTH>;
    let_next_kernel_begin();
    const T* a = nullptr;
    int rank = blockIdx.x;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        if (rank >= 0 && rank < parts.rank[part]) a = parts.a[part] + static_cast<long long>(rank) * cols;
        rank -= parts.rank[part];
    }
    const Loaded<T> low_row(a, cols);
    wait_for_kernels_before();
    const Loaded<T> row(x, cols), up(before.source == ACTIVATED && before.gated ? x + cols : nullptr, cols);
    float mean = 0, r = 1;
    if (before.source == NORMED) {
        if (before.centered) {
            float sum = 0;
            row.each(cols, [&](int, const Piece& piece) {
                for (int i = 0; i < WIDTH; i++) sum += piece[i];
            });
            mean = block_sum(sum) / cols;
        }
        float squares = 0;
        row.each(cols, [&](int, const Piece& piece) {
            for (int i = 0; i < WIDTH; i++) squares += (piece[i] - mean) * (piece[i] - mean);
        });
        r = 1.0f / sqrtf(block_sum(squares) / cols + before.eps);
    }
    const bool writes = blockIdx.x == 0 && before.source != PLAIN;
    float dot = 0;
    row.each(cols, [&](int at, const Piece& piece, const Piece& up, const Piece& a_piece) {
        float values[WIDTH];
        if (before.source == NORMED) {
            float w[WIDTH], b[WIDTH] = {};
            load_constants(w, before.weight + at);
            if (before.bias != nullptr) load_constants(b, before.bias + at);
            for (int i = 0; i < WIDTH; i++) values[i] = (piece[i] - mean) * r * w[i] + b[i];
        } else if (before.source == ACTIVATED) {
            for (int i = 0; i < WIDTH; i++) {
                const float act = before.kind == 0 ? activate<Silu>(piece[i]) : activate<GeluTanh>(piece[i]);
                values[i] = act * (before.gated ? up[i] : 1.0f);
            }
        } else {
            for (int i = 0; i < WIDTH; i++) values[i] = piece[i];
        }
        if (writes) store_run(out + at, values);
        for (int i = 0; i < WIDTH; i++) dot += to_f32(from_f32<T>(values[i])) * a_piece[i];  // of x' as it is multiplied later
    }, up, low_row);
    if (a == nullptr) return;  // the whole block
    dot = block_sum(dot);
    if (threadIdx.x == 0) low[blockIdx.x] = dot * scaling;
}

// One projection. Of a plain weight only `weight` is there.
template <typename T>
struct Part {
    const void *weight, *absmax;
    const float *nested, *offset, *map;
    const T* b;
    const float* bias;
    int rows, rank;
};

// ---- Plain numbers: a warp does ROWS rows of one part at a time, so that what is read of x serves all of them.

// Which rows a warp does.
template <int ROWS, typename T>
struct Unit {
    Part<T> part;
    int row[ROWS];
    int before = 0, rank_before = 0;  // rows and ranks of the parts before
    int count = 0;                    // rows that exist; none when there are no more units

    __device__ Unit(int unit, const Part<T> (&parts)[PARTS]) {
        part = parts[0];
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            if (count > 0) continue;
            part = parts[i];
            count = max(min(part.rows - unit * ROWS, ROWS), 0);
#pragma unroll
            for (int r = 0; r < ROWS; r++) row[r] = min(unit * ROWS + r, part.rows - 1);
            if (count > 0) continue;
            unit -= (part.rows + ROWS - 1) / ROWS;
            before += part.rows;
            rank_before += part.rank;
        }
    }
    // What B adds to the rows, this lane's share.
    __device__ void add_low_rank(float (&sums)[ROWS], const float* low) const {
#pragma unroll 1
        for (int i = threadIdx.x % WARP; i < part.rank; i += WARP) {
            const float value = low[rank_before + i];
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[r] += to_f32(part.b[static_cast<long long>(row[r]) * part.rank + i]) * value;
        }
    }
};

// What a lane has loaded of ROWS rows.
template <int ROWS, typename T>
struct Stage {
    static constexpr int EACH = Pack<T>::SIZE;
    Run<T, EACH> numbers[ROWS];

    __device__ void load(const Unit<ROWS, T>& unit, int column, int cols) {
        const T* matrix = static_cast<const T*>(unit.part.weight);
#pragma unroll
        for (int r = 0; r < ROWS; r++) numbers[r] = load_run<EACH>(matrix + static_cast<long long>(unit.row[r]) * cols + column);
    }
};

// Each piece of W is under way while the one before is multiplied; the first is before x is there, and that of the next rows before
// these are done.
template <int ROWS, typename T>
__device__ void row_product_plain(T* y, const T* x, const float* low, const T* add, float scale, int cols,
                                  const Part<T> (&parts)[PARTS]) {
    DYNAMIC_SHARED(unsigned char, shared);
    constexpr int EACH = Pack<T>::SIZE, CHUNK = EACH * WARP;
    Pack<T>* packs = reinterpret_cast<Pack<T>*>(shared);  // (cols / EACH)
    const int lane = threadIdx.x % WARP;

    let_next_kernel_begin();
    int index = blockIdx.x * WARPS + threadIdx.x / WARP;
    Unit<ROWS, T> unit(index, parts);
    Stage<ROWS, T> stage, next;
    if (unit.count > 0 && lane * EACH < cols) stage.load(unit, lane * EACH, cols);
    wait_for_kernels_before();
    for (int at = threadIdx.x; at < cols / EACH; at += BLOCK) packs[at] = load_pack(x + at * EACH);
    __syncthreads();

    while (unit.count > 0) {
        float sums[ROWS] = {};
        unit.add_low_rank(sums, low);
#pragma unroll 1
        for (int column = lane * EACH; column < cols; column += CHUNK) {
            if (column + CHUNK < cols) next.load(unit, column + CHUNK, cols);
            const Pack<T> pack = packs[column / EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const float value = to_f32(pack[i]);
#pragma unroll
                for (int r = 0; r < ROWS; r++) sums[r] += stage.numbers[r][i] * value;
            }
            stage = next;
        }
        const Unit<ROWS, T> done = unit;
        index += gridDim.x * WARPS;
        unit = Unit<ROWS, T>(index, parts);
        if (unit.count > 0 && lane * EACH < cols) stage.load(unit, lane * EACH, cols);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float sum = warp_sum(sums[r]);
            if (lane != r || r >= done.count) continue;
            if (done.part.bias != nullptr) sum += done.part.bias[done.row[r]];
            const int at = done.before + done.row[r];
            y[at] = from_f32<T>(add != nullptr ? to_f32(add[at]) + scale * sum : sum);
        }
    }
}

// ---- Codes: a block does some rows of one part, each of its warps the same columns of all of them, whose x stays in registers. So
// few instructions are left for a code that neither they nor the accesses of shared memory hold up what comes from memory.

// A warp's columns of a row: a lane has 32, which are half a block of one absmax.
constexpr int EACH = 32, CHUNK = EACH * WARP;
constexpr int CODED_BLOCK = 512;  // threads at most
constexpr int AHEAD = 4;          // rows that are under way

// The two levels of each byte of codes, copied so that the lanes of a half-warp read different banks.
constexpr int COPIES = 16, BYTES = 256;

// Of a byte of the word; `mine` is the address of this lane's first copy.
template <int BYTE>
__device__ __forceinline__ float2 levels_of(unsigned mine, unsigned word) {
    return load_shared_pair(mine + __byte_perm(word, 0, 0x4440 + BYTE) * static_cast<unsigned>(COPIES * sizeof(float2)));
}

__device__ __forceinline__ float dot(const Run<unsigned, 4>& codes, const float (&x)[EACH], unsigned mine) {
    float sums[4] = {};
#pragma unroll
    for (int word = 0; word < 4; word++) {
        const float2 pairs[4] = {levels_of<0>(mine, codes.values[word]), levels_of<1>(mine, codes.values[word]),
                                 levels_of<2>(mine, codes.values[word]), levels_of<3>(mine, codes.values[word])};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sums[i % 2 * 2] += pairs[i].x * x[word * 8 + 2 * i];
            sums[i % 2 * 2 + 1] += pairs[i].y * x[word * 8 + 2 * i + 1];
        }
    }
    return sums[0] + sums[1] + (sums[2] + sums[3]);
}

// Rows of one part: those of a block.
template <typename T>
struct Rows {
    Part<T> part;
    int first = 0, count = 0;         // in the part
    int before = 0, rank_before = 0;  // rows and ranks of the parts before

    __device__ Rows(int block, int rows_per_block, const Part<T> (&parts)[PARTS]) {
        part = parts[0];
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            if (count > 0) continue;
            const int blocks = (parts[i].rows + rows_per_block - 1) / rows_per_block;
            if (block < blocks) {
                part = parts[i];
                first = block * rows_per_block;
                count = min(rows_per_block, part.rows - first);
            } else {
                block -= blocks;
                before += parts[i].rows;
                rank_before += parts[i].rank;
            }
        }
    }
};

// A lane's codes of one row of its warp after the other.
struct Codes {
    const unsigned* at;
    long long step;  // words from row to row
    int left;        // rows

    template <typename T>
    __device__ Codes(const Part<T>& part, int first, int step, int count, int column, int cols) {
        column += threadIdx.x % WARP * EACH;
        const long long code = static_cast<long long>(first) * cols + column;
        at = static_cast<const unsigned*>(part.weight) + code / 8;
        this->step = static_cast<long long>(step) * cols / 8;
        left = column < cols ? count : 0;
    }
    // Nothing after the last.
    __device__ void next(Run<unsigned, 4>& words) {
        if (left > 0) words = load_run<4>(at);
        at += step;
        left--;
    }
};

// The absmax of two rows at a time, as they are stored: lanes 0 to 15 have those of the first, the others those of the second.
struct Scales {
    const void* absmax;
    const float* nested;
    unsigned block, step;  // of absmax
    int left;

    template <typename T>
    __device__ Scales(const Part<T>& part, int first, int step, int count, int column, int cols)
        : absmax(part.absmax), nested(part.nested) {
        const unsigned of_row = cols / SCALED, second = threadIdx.x % WARP / 16;
        column += threadIdx.x % 16 * SCALED;
        block = (first + second * step) * of_row + column / SCALED;
        this->step = 2 * step * of_row;
        left = column < cols ? count - static_cast<int>(second) : 0;
    }
    __device__ void next(float& scale, unsigned char& code) {
        if (left > 0) {
            if (nested != nullptr) {
                code = static_cast<const unsigned char*>(absmax)[block];
                scale = nested[block / GROUP];
            } else {
                scale = static_cast<const float*>(absmax)[block];
            }
        }
        block += step;
        left -= 2;
    }
};

// The low-rank part of the sum of a row of B. The first packs may be there already.
template <typename T>
struct LowRank {
    static constexpr int SIZE = Pack<T>::SIZE, KEPT = 16 / SIZE;
    const T* b;  // (rank)
    int rank;
    bool whole;
    Pack<T> kept[KEPT];

    __device__ LowRank(const Rows<T>& rows, int row) : b(nullptr), rank(row < rows.count ? rows.part.rank : 0) {
        if (rank == 0) return;
        b = rows.part.b + static_cast<long long>(rows.first + row) * rank;
        whole = rows_are_aligned_16(rows.part.b, rank);
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            if (whole && i * SIZE < rank) kept[i] = load_pack(b + i * SIZE);
        }
    }
    __device__ float times(const float* low) const {
        float sum = 0;
        if (!(rank > 0)) return sum;
        if (whole) {
#pragma unroll
            for (int i = 0; i < KEPT; i++) {
                if (i * SIZE < rank) add(sum, kept[i], low + i * SIZE);
            }
#pragma unroll 1
            for (int at = KEPT * SIZE; at < rank; at += SIZE) add(sum, load_pack(b + at), low + at);
        } else {
#pragma unroll 1
            for (int at = 0; at < rank; at++) sum += to_f32(b[at]) * low[at];
        }
        return sum;
    }
    __device__ static void add(float& sum, const Pack<T>& pack, const float* low) {
#pragma unroll
        for (int i = 0; i < SIZE; i++) sum += to_f32(pack[i]) * low[i];
    }
};

// `tiles` warps have a row's columns at a time; those beyond are done after all rows have had these.
template <typename T>
__device__ void row_product_coded(T* y, const T* x, const float* low, const T* add, float scale, const float* levels, int cols,
                                  int rows_per_block, int tiles, const Part<T> (&parts)[PARTS]) {
    DYNAMIC_SHARED(unsigned char, shared);
    __shared__ float2 pairs[BYTES * COPIES];
    __shared__ float own_map[GROUP];
    constexpr int SIZE = Pack<T>::SIZE, PACKS = EACH / SIZE;
    const int chunks = (cols + CHUNK - 1) / CHUNK;
    Pack<T>* packs = reinterpret_cast<Pack<T>*>(shared);  // (chunks, PACKS, lanes): each lane's own at neighbouring places
    float* sums = reinterpret_cast<float*>(packs + chunks * PACKS * WARP);  // (tiles + 1, rows): the last are the low-rank ones
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, threads = blockDim.x;

    let_next_kernel_begin();
    const Rows<T> rows(blockIdx.x, rows_per_block, parts);
    const int groups = threads / WARP / tiles, group = warp / tiles, tile = warp % tiles;
    const int count = max((rows.count - group + groups - 1) / groups, 0);  // rows of this warp
    Codes codes(rows.part, rows.first + group, groups, count, tile * CHUNK, cols);
    Scales scales(rows.part, rows.first + group, groups, count, tile * CHUNK, cols);
    Run<unsigned, 4> ahead[AHEAD];
    float scale_ahead[AHEAD / 2] = {};
    unsigned char code_ahead[AHEAD / 2] = {};
    const auto load_all = [&] {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) codes.next(ahead[i]);
#pragma unroll
        for (int i = 0; i < AHEAD / 2; i++) scales.next(scale_ahead[i], code_ahead[i]);
    };
    load_all();
    const LowRank<T> low_rank(rows, threadIdx.x);
    const bool nested = rows.part.map != nullptr;
    const float offset = nested ? *rows.part.offset : 0;
#pragma unroll 2
    for (int i = threadIdx.x; i < BYTES * COPIES; i += threads) {
        pairs[i] = make_float2(levels[i / COPIES / 16], levels[i / COPIES % 16]);
    }
    if (nested) {
#pragma unroll 1
        for (int i = threadIdx.x; i < GROUP; i += threads) own_map[i] = rows.part.map[i];
    }
    // What isn't loaded yet is brought nearer while the kernels before are at work: a lane asks for a line.
    if (tile == 0) {
        constexpr int LINE = 256;  // codes of 128 bytes
        const int lines = (cols + LINE - 1) / LINE;
        const unsigned char* weight = static_cast<const unsigned char*>(rows.part.weight);
#pragma unroll 1
        for (int i = AHEAD * lines + lane; i < count * lines; i += WARP) {
            const int row = rows.first + group + i / lines * groups;
            prefetch_to_l2(weight + (static_cast<long long>(row) * cols + i % lines * LINE) / 2);
        }
    }

    wait_for_kernels_before();
#pragma unroll 2
    for (int at = threadIdx.x; at < chunks * PACKS * WARP; at += threads) {
        const int chunk = at / (WARP * PACKS), inside = at % (WARP * PACKS);
        // Through the L1 cache: asynchronous copies pass it by, and all blocks would ask the L2 for the same lines.
        packs[(chunk * PACKS + inside % PACKS) * WARP + inside / PACKS] = at * SIZE < cols ? load_pack(x + at * SIZE) : Pack<T>();
    }
    if (threadIdx.x < rows.count) sums[tiles * rows_per_block + threadIdx.x] = low_rank.times(low + rows.rank_before);
#pragma unroll 1
    for (int row = threadIdx.x + threads; row < rows.count; row += threads) {
        sums[tiles * rows_per_block + row] = LowRank<T>(rows, row).times(low + rows.rank_before);
    }
    __syncthreads();

    const unsigned mine = shared_address(pairs + lane % COPIES);
    for (int chunk = tile; chunk < chunks; chunk += tiles) {
        float values[EACH];
#pragma unroll
        for (int pack = 0; pack < PACKS; pack++) {
            const Pack<T> some = packs[(chunk * PACKS + pack) * WARP + lane];
#pragma unroll
            for (int i = 0; i < SIZE; i++) values[pack * SIZE + i] = to_f32(some[i]);
        }
        float* own = sums + tile * rows_per_block + group;
#pragma unroll 1
        for (int i = 0; i < count; i += AHEAD) {
#pragma unroll
            for (int j = 0; j < AHEAD; j += 2) {
                if (i + j < count) {
                    float& scale = scale_ahead[j / 2];
                    unsigned char& code = code_ahead[j / 2];
                    const float absmax = nested ? __fadd_rn(__fmul_rn(own_map[code], scale), offset) : scale;
                    scales.next(scale, code);
                    const float first = dot(ahead[j], values, mine) * __shfl_sync(FULL_WARP, absmax, lane / 2);
                    codes.next(ahead[j]);
                    const float second = dot(ahead[j + 1], values, mine) * __shfl_sync(FULL_WARP, absmax, 16 + lane / 2);
                    codes.next(ahead[j + 1]);
                    // Each half of the warp adds up one of the rows.
                    const float other = __shfl_xor_sync(FULL_WARP, lane < 16 ? second : first, 16);
                    const float sum = warp_sum<16>((lane < 16 ? first : second) + other);
                    const int row = i + j + lane / 16;
                    if (lane % 16 == 0 && row < count) own[row * groups] = chunk == tile ? sum : own[row * groups] + sum;
                }
            }
        }
        if (chunk + tiles >= chunks) break;
        codes = Codes(rows.part, rows.first + group, groups, count, (chunk + tiles) * CHUNK, cols);
        scales = Scales(rows.part, rows.first + group, groups, count, (chunk + tiles) * CHUNK, cols);
        load_all();
    }
    __syncthreads();
#pragma unroll 1
    for (int row = threadIdx.x; row < rows.count; row += threads) {
        float sum = sums[tiles * rows_per_block + row];
#pragma unroll 1
        for (int i = 0; i < min(tiles, chunks); i++) sum += sums[i * rows_per_block + row];
        if (rows.part.bias != nullptr) sum += rows.part.bias[rows.first + row];
        const int at = rows.before + rows.first + row;
        y[at] = from_f32<T>(add != nullptr ? to_f32(add[at]) + scale * sum : sum);
    }
}

struct Largest {
    template <typename V>
    __device__ static V identity() { return 0; }
    template <typename V>
    __device__ static V apply(V a, V b) { return a > b ? a : b; }
};

// The first of the largest becomes the next token, at the next position. Blocks meet in `search`: the largest number and its place in
// one word, of which the largest is the answer in whatever order they come; then the blocks that are done.
template <typename T>
__device__ void row_next(unsigned* token, unsigned* position, unsigned long long* search, const T* x, int n) {
    constexpr int SIZE = Pack<T>::SIZE;
    let_next_kernel_begin();
    wait_for_kernels_before();
    float best = -INFINITY;
    int at = n;
    const auto take = [&](int i, float value) {
        if (value > best) best = value, at = i;
    };
    const int whole = n / SIZE * SIZE, thread = blockIdx.x * NEXT_BLOCK + threadIdx.x, step = gridDim.x * NEXT_BLOCK;
#pragma unroll 4
    for (int i = thread * SIZE; i < whole; i += step * SIZE) {
        const Pack<T> pack = load_pack(x + i);
#pragma unroll
        for (int j = 0; j < SIZE; j++) take(i + j, to_f32(pack[j]));
    }
    if (whole + thread < n) take(whole + thread, to_f32(x[whole + thread]));
    const unsigned bits = __float_as_uint(best);
    const unsigned ordered = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;  // as the numbers are
    const unsigned long long mine = at < n ? static_cast<unsigned long long>(ordered) << 32 | ~static_cast<unsigned>(at) : 0;
    const unsigned long long of_block = block_reduce<Largest>(mine);
    if (threadIdx.x != 0) return;
    atomicMax(search, of_block);
    __threadfence();
    if (atomicAdd(search + 1, 1ull) != gridDim.x - 1) return;
    __threadfence();
    const unsigned long long found = atomicExch(search, 0ull);
    search[1] = 0;
    *token = found != 0 ? ~static_cast<unsigned>(found) : 0;
    *position += 1;
}

#define PART_ARGUMENTS(i, T)                                                                                                     \
    const void *weight##i, const void *absmax##i, const float *nested##i, const float *offset##i, const float *map##i, const T *b##i, \
        const float *bias##i, int rows##i, int rank##i
#define PART(i) {weight##i, absmax##i, nested##i, offset##i, map##i, b##i, bias##i, rows##i, rank##i}

#define PARTS_ARGUMENTS(T) PART_ARGUMENTS(0, T), PART_ARGUMENTS(1, T), PART_ARGUMENTS(2, T)

#define DEFINE(NAME, T)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(PREPARE_BLOCK)                                                                  \
    row_prepare_##NAME(T* out, float* low, const T* x, int source, const float* weight, const float* bias, float eps,            \
                       int centered, int gated, int kind, int cols, float scaling, const T* a0, const T* a1, const T* a2,        \
                       int rank0, int rank1, int rank2) {                                                                        \
        row_prepare<T>(out, low, x, {source, weight, bias, eps, centered, gated, kind}, cols, scaling,                           \
                       {{a0, a1, a2}, {rank0, rank1, rank2}});                                                                   \
    }                                                                                                                            \
    extern "C" __global__ void __launch_bounds__(NEXT_BLOCK)                                                                     \
    row_next_##NAME(unsigned* token, unsigned* position, unsigned long long* search, const T* x, int n) {                        \
        row_next(token, position, search, x, n);                                                                                 \
    }                                                                                                                            \
    extern "C" __device__ int row_product_plain_##NAME##_launch[3] = {PLAIN_ROWS, BLOCK, 0};                                     \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                          \
    row_product_plain_##NAME(T* y, const T* x, const float* low, const T* add, float scale, int cols, PARTS_ARGUMENTS(T)) {      \
        const Part<T> parts[PARTS] = {PART(0), PART(1), PART(2)};                                                                \
        row_product_plain<PLAIN_ROWS, T>(y, x, low, add, scale, cols, parts);                                                    \
    }                                                                                                                            \
    extern "C" __device__ int row_product_coded_##NAME##_launch[3] = {CHUNK, CODED_BLOCK, BYTES * COPIES * 8 + GROUP * 4};       \
    extern "C" __global__ void __launch_bounds__(CODED_BLOCK)                                                                    \
    row_product_coded_##NAME(T* y, const T* x, const float* low, const T* add, float scale, const float* levels, int cols,       \
                             int rows_per_block, int tiles, PARTS_ARGUMENTS(T)) {                                                \
        const Part<T> parts[PARTS] = {PART(0), PART(1), PART(2)};                                                                \
        row_product_coded<T>(y, x, low, add, scale, levels, cols, rows_per_block, tiles, parts);                                 \
    }

FOR_NUMBER_TYPES(DEFINE)
