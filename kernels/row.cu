// One row through a linear layer, for decoding: every matrix is read once, as it is stored (crates/nn/src/row.rs).
//   prepare:  x' = x, norm(x) (see norm.cu) or act(gate)·up (see activation.cu);   low = s·A·x'
//   product:  y = W·x' + B·low + bias,  or  y = add + scale·(the same)
//   next:     token = the first of the largest logits,  position += 1
//   x, x', y, add  // (cols), (rows of W)        low // (R), of all parts together
//   A  // (rank, cols) of each part    B // (rows, rank)    bias // (rows)
//   W  // (rows, cols): plain numbers, or 4-bit codes as nf4.cu has them, two in a byte, the earlier in the high half
//   absmax // (rows·cols/64): plain, or codes of it with nested // (⌈·/256⌉), offset // (1) and map // (256), one for all parts
// All outputs =. cols is a multiple of 32 and every matrix begins at a multiple of 16 bytes, so that all accesses are whole packs.
// Parts are projections that read the same x; one that isn't there has no rows, a part without adapter has rank 0.
// Dequantised numbers aren't rounded: a sum over 32 levels is multiplied by their absmax once.
//
// Launch: row_prepare: PREPARE_BLOCK threads, grid.x = max(R, 1), no dynamic shared memory;
//   row_product_*: BLOCK threads, grid.x counts WARPS·each rows a block, with `each` of the launch facts (any grid is right), dynamic
//   shared memory: cols rounded up to a multiple of 1024, in bytes of T;   row_next: NEXT_BLOCK threads, grid.x = 1.

#include "activation.cuh"
#include "common.cuh"

constexpr int PREPARE_BLOCK = 512;
constexpr int NEXT_BLOCK = 1024;
constexpr int BLOCK = 128;
constexpr int WARPS = BLOCK / WARP;
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
    const T* a = nullptr;
    int rank = blockIdx.x;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        if (rank >= 0 && rank < parts.rank[part]) a = parts.a[part] + static_cast<long long>(rank) * cols;
        rank -= parts.rank[part];
    }
    const Loaded<T> row(x, cols), up(before.source == ACTIVATED && before.gated ? x + cols : nullptr, cols), low_row(a, cols);
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

// A copy of the 16 levels for each lane, in its own bank, and the map of nested scales.
struct Tables {
    unsigned mine;  // address of this lane's first level; rows of copies are 2^STEP bytes apart
    const float* map;
    static constexpr int STEP = 7;

    static constexpr unsigned BYTES = 16 << STEP;

    // Fills shared memory: 2·BYTES, of which those from a multiple of BYTES on are used, and 256 numbers for the map, if any.
    __device__ Tables(unsigned char* copies, float* own_map, const float* levels, const float* map) : map(own_map) {
        const unsigned start = -shared_address(copies) % BYTES;
        mine = shared_address(copies) + start + threadIdx.x % WARP * sizeof(float);
        if (levels != nullptr) {
            float* rows = reinterpret_cast<float*>(copies + start);
            for (int i = threadIdx.x; i < 16 * WARP; i += BLOCK) rows[i] = levels[i / WARP];
        }
        if (map != nullptr) {
            for (int i = threadIdx.x; i < GROUP; i += BLOCK) own_map[i] = map[i];
        }
    }
    // Of the code whose lowest bit is bit SHIFT of the word.
    template <int SHIFT>
    __device__ float level(unsigned word) const {
        const unsigned offset = SHIFT >= STEP ? word >> max(SHIFT - STEP, 0) : word << max(STEP - SHIFT, 0);
        return load_shared((offset & (15u << STEP)) | mine);
    }
};

// What a warp multiplies ROWS rows by at a time: EACH numbers a lane. A stage is what a lane has loaded of them.

// Plain numbers: a pack.
template <int ROWS, typename T>
struct PlainRows {
    static constexpr int EACH = Pack<T>::SIZE;
    struct Stage {
        Run<T, EACH> numbers[ROWS];
    };
    const T* matrix;

    __device__ PlainRows(const Part<T>& part) : matrix(static_cast<const T*>(part.weight)) {}

    __device__ void load(Stage& stage, const int (&row)[ROWS], int column, int cols) const {
#pragma unroll
        for (int r = 0; r < ROWS; r++) stage.numbers[r] = load_run<EACH>(matrix + static_cast<long long>(row[r]) * cols + column);
    }
    __device__ void add(float (&sums)[ROWS], Stage& stage, const Pack<T>* x, const Tables&) const {
        const Pack<T> pack = x[0];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const float value = to_f32(pack[i]);
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[r] += stage.numbers[r][i] * value;
        }
    }
};

// Codes: 32, which are half a block of one absmax.
template <int ROWS, typename T>
struct CodedRows {
    static constexpr int EACH = 32;
    struct Stage {
        Run<unsigned, 4> words[ROWS];
        float scales[ROWS];           // absmax, or what is nested
        unsigned char codes[ROWS];    // of absmax, where it is nested
    };
    const Part<T>& part;
    const bool nested;
    const float offset;

    __device__ CodedRows(const Part<T>& part) : part(part), nested(part.map != nullptr), offset(nested ? *part.offset : 0) {}

    __device__ void load(Stage& stage, const int (&row)[ROWS], int column, int cols) const {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const long long at = static_cast<long long>(row[r]) * cols + column, block = at / SCALED;
            stage.words[r] = load_run<4>(reinterpret_cast<const unsigned*>(static_cast<const unsigned char*>(part.weight) + at / 2));
            if (nested) {
                stage.codes[r] = static_cast<const unsigned char*>(part.absmax)[block];
                stage.scales[r] = part.nested[block / GROUP];
            } else {
                stage.scales[r] = static_cast<const float*>(part.absmax)[block];
            }
        }
    }
    // A word of each row at a time, in a loop that stays one: unrolled, more time went into fetching instructions than into
    // executing them.
    __device__ void add(float (&sums)[ROWS], Stage& stage, const Pack<T>* x, const Tables& tables) const {
        constexpr int SIZE = Pack<T>::SIZE, CODES = 8, PACKS = CODES / SIZE;
        float parts[ROWS] = {};
#pragma unroll 1
        for (int word = 0; word < EACH / CODES; word++, x += PACKS * WARP) {
            float values[CODES];
#pragma unroll
            for (int pack = 0; pack < PACKS; pack++) {
                const Pack<T> some = x[pack * WARP];
#pragma unroll
                for (int i = 0; i < SIZE; i++) values[pack * SIZE + i] = to_f32(some[i]);
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                unsigned(&words)[4] = stage.words[r].values;
                const unsigned codes = words[0];
                words[0] = words[1], words[1] = words[2], words[2] = words[3];
                const float even = tables.level<4>(codes) * values[0] + tables.level<12>(codes) * values[2] +
                                   tables.level<20>(codes) * values[4] + tables.level<28>(codes) * values[6];
                const float odd = tables.level<0>(codes) * values[1] + tables.level<8>(codes) * values[3] +
                                  tables.level<16>(codes) * values[5] + tables.level<24>(codes) * values[7];
                parts[r] += even + odd;
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float scale = nested ? __fadd_rn(__fmul_rn(tables.map[stage.codes[r]], stage.scales[r]), offset) : stage.scales[r];
            sums[r] += parts[r] * scale;
        }
    }
};

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

// A warp does ROWS rows of one part at a time: what is read of x serves all of them. Each piece of W is under way while the one
// before is multiplied; the first is before x is there, and that of the next rows before these are done.
template <int ROWS, template <int, typename> class Rows, typename T>
__device__ void row_product(T* y, const T* x, const float* low, const T* add, float scale, const float* levels, int cols,
                            const Part<T> (&parts)[PARTS]) {
    DYNAMIC_SHARED(unsigned char, shared);
    __shared__ unsigned char copies[2 * Tables::BYTES];
    __shared__ float map[GROUP];
    using Kind = Rows<ROWS, T>;
    constexpr int SIZE = Pack<T>::SIZE, EACH = Kind::EACH, PACKS = EACH / SIZE, CHUNK = EACH * WARP;
    Pack<T>* packs = reinterpret_cast<Pack<T>*>(shared);  // (chunks, PACKS, lanes): each lane's own at neighbouring places
    const int lane = threadIdx.x % WARP;

    int index = blockIdx.x * WARPS + threadIdx.x / WARP;
    Unit<ROWS, T> unit(index, parts);
    typename Kind::Stage stage, next;
    if (unit.count > 0 && lane * EACH < cols) Kind(unit.part).load(stage, unit.row, lane * EACH, cols);
    for (int at = threadIdx.x; at < cols / SIZE; at += BLOCK) {
        const int chunk = at / (WARP * PACKS), inside = at % (WARP * PACKS);
        // Through the L1 cache: asynchronous copies pass it by, and all blocks of a processor would ask the L2 for the same lines.
        packs[(chunk * PACKS + inside % PACKS) * WARP + inside / PACKS] = load_pack(x + at * SIZE);
    }
    const Tables tables(copies, map, levels, parts[0].map);
    __syncthreads();

    while (unit.count > 0) {
        const Kind rows(unit.part);
        float sums[ROWS] = {};
        unit.add_low_rank(sums, low);
        const Pack<T>* mine = packs + lane;
#pragma unroll 1
        for (int column = lane * EACH; column < cols; column += CHUNK) {
            if (column + CHUNK < cols) rows.load(next, unit.row, column + CHUNK, cols);
            rows.add(sums, stage, mine, tables);
            mine += PACKS * WARP;
            stage = next;
        }
        const Unit<ROWS, T> done = unit;
        index += gridDim.x * WARPS;
        unit = Unit<ROWS, T>(index, parts);
        if (unit.count > 0 && lane * EACH < cols) Kind(unit.part).load(stage, unit.row, lane * EACH, cols);
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

// The first of the largest becomes the next token, at the next position.
template <typename T>
__device__ void row_next(unsigned* token, unsigned* position, const T* x, int n) {
    constexpr int SIZE = Pack<T>::SIZE;
    float best = -INFINITY;
    int at = n;
    const auto take = [&](int i, float value) {
        if (value > best) best = value, at = i;
    };
    const int whole = n / SIZE * SIZE;
#pragma unroll 8
    for (int i = threadIdx.x * SIZE; i < whole; i += NEXT_BLOCK * SIZE) {
        const Pack<T> pack = load_pack(x + i);
#pragma unroll
        for (int j = 0; j < SIZE; j++) take(i + j, to_f32(pack[j]));
    }
    if (whole + threadIdx.x < n) take(whole + threadIdx.x, to_f32(x[whole + threadIdx.x]));
    const float most = block_max(best);
    // Indices below 2^24 are exact as floats; vocabularies are.
    const float first = -block_max(best == most ? -static_cast<float>(at) : -INFINITY);
    if (threadIdx.x == 0) {
        *token = first < n ? static_cast<unsigned>(first) : 0;
        *position += 1;
    }
}

#define PART_ARGUMENTS(i, T)                                                                                                     \
    const void *weight##i, const void *absmax##i, const float *nested##i, const float *offset##i, const float *map##i, const T *b##i, \
        const float *bias##i, int rows##i, int rank##i
#define PART(i) {weight##i, absmax##i, nested##i, offset##i, map##i, b##i, bias##i, rows##i, rank##i}

#define DEFINE_PRODUCT(NAME, ROWS, KIND, T)                                                                                      \
    extern "C" __device__ int NAME##_launch[3] = {ROWS, BLOCK, 0};                                                               \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                          \
    NAME(T* y, const T* x, const float* low, const T* add, float scale, const float* levels, int cols, PART_ARGUMENTS(0, T),     \
         PART_ARGUMENTS(1, T), PART_ARGUMENTS(2, T)) {                                                                           \
        const Part<T> parts[PARTS] = {PART(0), PART(1), PART(2)};                                                                \
        row_product<ROWS, KIND, T>(y, x, low, add, scale, levels, cols, parts);                                                  \
    }

#define DEFINE(NAME, T)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(PREPARE_BLOCK)                                                                  \
    row_prepare_##NAME(T* out, float* low, const T* x, int source, const float* weight, const float* bias, float eps,            \
                       int centered, int gated, int kind, int cols, float scaling, const T* a0, const T* a1, const T* a2,        \
                       int rank0, int rank1, int rank2) {                                                                        \
        row_prepare<T>(out, low, x, {source, weight, bias, eps, centered, gated, kind}, cols, scaling,                           \
                       {{a0, a1, a2}, {rank0, rank1, rank2}});                                                                   \
    }                                                                                                                            \
    extern "C" __global__ void __launch_bounds__(NEXT_BLOCK) row_next_##NAME(unsigned* token, unsigned* position, const T* x, int n) { \
        row_next(token, position, x, n);                                                                                         \
    }                                                                                                                            \
    DEFINE_PRODUCT(row_product_plain_##NAME, 4, PlainRows, T)                                                                    \
    DEFINE_PRODUCT(row_product_coded_##NAME, 2, CodedRows, T)

FOR_NUMBER_TYPES(DEFINE)
