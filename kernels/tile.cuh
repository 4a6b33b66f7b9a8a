// Tiles in shared memory that thin products read (low_rank_forward.cu, low_rank_backward.cu).

#pragma once

// Where 16 bytes of a tile are; spread so that eight rows of one column lie in different banks.
template <int ROW_BYTES>
__device__ __forceinline__ unsigned in_tile(unsigned tile, int row, int column) {
    return tile + row * ROW_BYTES + ((column / 8 ^ row % 8) << 4);
}
