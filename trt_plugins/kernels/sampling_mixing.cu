// SamplingMixing: 3D sampling and both adaptive mixings of one query and group per block, without leaving the chip.
//
// Grid (queries * GROUPS, images). While the two parameter matrices travel to shared memory, the block samples the pyramid;
// then y = gelu(norm(x M)) and z = gelu(norm(S y)). Compile-time constants: ELEMENT, GROUPS, CHANNELS (of a group), POINTS,
// MIXED, THREADS, CHANNELS_LAST, and TENSOR_CORES (16-bit elements on compute capability 8.0 and later).
#include "device.cuh"

constexpr int WARPS = THREADS / WARP_SIZE;
constexpr int LEVELS = 4;
constexpr int TAPS = 4;  // cells of one level under a sample
constexpr float EPSILON = 1e-5f;

#if TENSOR_CORES
using Stored = ELEMENT;
constexpr int PAD = 8;  // 16 bytes, so that eight rows of a tile lie in different banks
// Three blocks fit a multiprocessor at 80 registers a thread; with fewer registers some spill.
constexpr int BLOCKS_AT_ONCE = 3;
#else
using Stored = float;
constexpr int PAD = 0;
// float32: as the compiler sees fit. 16 bits: left alone, it saves registers until some spill.
constexpr int BLOCKS_AT_ONCE = sizeof(ELEMENT) == 4 ? 0 : 2;
#endif
constexpr int CHANNEL_PITCH = CHANNELS + PAD;  // rows of x, M, y and z
constexpr int POINT_PITCH = POINTS + PAD;      // rows of S

static_assert(THREADS % WARP_SIZE == 0, "whole warps");
static_assert(CHANNELS % 8 == 0 && POINTS % 8 == 0, "rows move in pieces of 16 bytes");

struct Tap {
    int cell;  // y * width + x
    float weight;
};

struct Level {
    const ELEMENT* map;
    long long cell_step, channel_step;  // elements between neighbours
};

__device__ constexpr int larger(int one, int other) { return one > other ? one : other; }
constexpr int SAMPLE_ITEMS = POINTS * CHANNEL_PITCH;
constexpr int PARAMETER_ITEMS = CHANNELS * CHANNEL_PITCH + MIXED * POINT_PITCH;
constexpr int RESULT_ITEMS = TENSOR_CORES ? MIXED * CHANNEL_PITCH : 0;
constexpr int SHARED_ITEMS = SAMPLE_ITEMS + larger(PARAMETER_ITEMS, RESULT_ITEMS);

// Sum over the block in a fixed order. `partial` must not be in use by another call.
__device__ float block_sum(float value, float* partial) {
    value = warp_sum(value);
    if (threadIdx.x % WARP_SIZE == 0) partial[threadIdx.x / WARP_SIZE] = value;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += partial[warp];
    return sum;
}

__device__ float gelu(float value) { return 0.5f * value * (1.0f + erff(value * 0.70710678118654752f)); }

// Layer norm over all values of the block, then the exact GELU. Ends with every thread past two barriers.
template <int COUNT>
__device__ void normalize_and_activate(float (&values)[COUNT], float (&partial)[2][WARPS]) {
    constexpr float SHARE = 1.0f / (COUNT * THREADS);
    float sum = 0.0f;
#pragma unroll
    for (int index = 0; index < COUNT; ++index) sum += values[index];
    const float mean = block_sum(sum, partial[0]) * SHARE;
    float squares = 0.0f;
#pragma unroll
    for (int index = 0; index < COUNT; ++index) {
        values[index] -= mean;
        squares += values[index] * values[index];
    }
    const float scale = 1.0f / sqrtf(block_sum(squares, partial[1]) * SHARE + EPSILON);
#pragma unroll
    for (int index = 0; index < COUNT; ++index) values[index] = gelu(values[index] * scale);
}

// left[ROWS x DEPTH] * right[DEPTH x COLUMNS], both in shared memory, spread over the registers of the block.
template <int ROWS, int DEPTH, int COLUMNS, int LEFT_PITCH, int RIGHT_PITCH>
struct Product {
    static constexpr int COUNT = ROWS * COLUMNS / THREADS;  // values per thread
    static_assert(COUNT * THREADS == ROWS * COLUMNS, "every thread holds as many values");

#if TENSOR_CORES
    static constexpr int TILE_ROWS = 16, TILE_DEPTH = 16, TILE_COLUMNS = 8;
    static constexpr int COLUMN_TILES = COLUMNS / TILE_COLUMNS;
    static_assert(ROWS % TILE_ROWS == 0 && DEPTH % TILE_DEPTH == 0 && COLUMNS % TILE_COLUMNS == 0, "whole tiles");

    static __device__ int tile(int index) { return index / 4 * WARPS + threadIdx.x / WARP_SIZE; }
    static __device__ int row(int index) {
        return tile(index) / COLUMN_TILES * TILE_ROWS + threadIdx.x % WARP_SIZE / 4 + index % 4 / 2 * 8;
    }
    static __device__ int column(int index) {
        return tile(index) % COLUMN_TILES * TILE_COLUMNS + threadIdx.x % 4 * 2 + index % 2;
    }

    static __device__ void compute(const Stored* left, const Stored* right, float (&values)[COUNT]) {
        const int lane = threadIdx.x % WARP_SIZE;
        float sums[COUNT / 4][4] = {};
#pragma unroll
        for (int depth = 0; depth < DEPTH; depth += TILE_DEPTH) {
            unsigned left_tiles[4], right_tiles[2];
#pragma unroll
            for (int index = 0; index < COUNT / 4; ++index) {
                const int tile_row = tile(4 * index) / COLUMN_TILES * TILE_ROWS;
                const int tile_column = tile(4 * index) % COLUMN_TILES * TILE_COLUMNS;
                load_tiles(left_tiles, left + (tile_row + lane % 16) * LEFT_PITCH + depth + lane / 16 * 8);
                // Where the warps share the columns evenly, a warp stays in one column of tiles.
                if (index == 0 || WARPS % COLUMN_TILES != 0) {
                    load_tiles_transposed(right_tiles, right + (depth + lane % 16) * RIGHT_PITCH + tile_column);
                }
                TensorCore<ELEMENT>::multiply(sums[index], left_tiles, right_tiles);
            }
        }
#pragma unroll
        for (int index = 0; index < COUNT; ++index) values[index] = sums[index / 4][index % 4];
    }
#else
    static constexpr int ROW_STEP = THREADS / COLUMNS;
    static_assert(ROW_STEP * COLUMNS == THREADS && ROWS % ROW_STEP == 0, "whole rows of threads");

    static __device__ int row(int index) { return index * ROW_STEP + threadIdx.x / COLUMNS; }
    static __device__ int column(int) { return threadIdx.x % COLUMNS; }

    static __device__ void compute(const Stored* left, const Stored* right, float (&values)[COUNT]) {
#pragma unroll
        for (int index = 0; index < COUNT; ++index) values[index] = 0.0f;
#pragma unroll 4
        for (int depth = 0; depth < DEPTH; depth += 4) {
            float column_values[4];
#pragma unroll
            for (int step = 0; step < 4; ++step) column_values[step] = right[(depth + step) * RIGHT_PITCH + column(0)];
#pragma unroll
            for (int index = 0; index < COUNT; ++index) {
                const auto row_values = *reinterpret_cast<const Packet<float, 4>*>(left + row(index) * LEFT_PITCH + depth);
#pragma unroll
                for (int step = 0; step < 4; ++step) values[index] += row_values.items[step] * column_values[step];
            }
        }
    }
#endif
};

// Rows of a matrix from global to shared memory, `PITCH` apart; complete after wait_for_copies() and a barrier.
template <int ROWS, int COLUMNS, int PITCH>
__device__ void load_matrix(Stored* shared, const ELEMENT* global) {
    if constexpr (sizeof(Stored) == sizeof(ELEMENT)) {
        constexpr int PIECE = 16 / sizeof(ELEMENT), PIECES = COLUMNS / PIECE;
        for (int work = threadIdx.x; work < ROWS * PIECES; work += THREADS) {
            const int row = work / PIECES, column = work % PIECES * PIECE;
            copy_16_bytes(shared + row * PITCH + column, global + row * COLUMNS + column);
        }
    } else {
        for (int work = threadIdx.x; work < ROWS * COLUMNS; work += THREADS) {
            shared[work / COLUMNS * PITCH + work % COLUMNS] = Convert<Stored>::from(to_float(global[work]));
        }
    }
}

// Cells and weights of one sample on one level. In place of a cell outside the map stands cell 0 with weight 0.
__device__ void find_taps(float x, float y, float z, int level, int height, int width, Tap* taps) {
    float likeness[LEVELS], best = -3.402823466e38f, total = 0.0f;
#pragma unroll
    for (int other = 0; other < LEVELS; ++other) {
        likeness[other] = -(z - other) * (z - other) / 2;
        best = fmaxf(best, likeness[other]);
    }
    float own = 0.0f;
#pragma unroll
    for (int other = 0; other < LEVELS; ++other) {
        const float weight = expf(likeness[other] - best);
        total += weight;
        if (other == level) own = weight;
    }
    own /= total;
    // Points are in units of P2's cells. Far outside every weight is 0; the bound keeps the conversion to int defined.
    const float scale = 1.0f / float(1 << level);
    const float at_x = fmaxf(fminf(x * scale - 0.5f, 1e6f), -1e6f), at_y = fmaxf(fminf(y * scale - 0.5f, 1e6f), -1e6f);
    const float left = floorf(at_x), top = floorf(at_y);
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) {
        const float cell_x = left + tap % 2, cell_y = top + tap / 2;
        const bool inside = cell_x >= 0 && cell_x < width && cell_y >= 0 && cell_y < height;
        const float weight = (1.0f - fabsf(at_x - cell_x)) * (1.0f - fabsf(at_y - cell_y));
        taps[tap] = inside ? Tap{int(cell_y) * width + int(cell_x), weight * own} : Tap{0, 0.0f};
    }
}

// The block's samples [POINTS, CHANNELS] into shared memory. `levels` point at the group's first channel of the image.
__device__ void sample(const Level (&levels)[LEVELS], const Tap* taps, Stored* samples) {
#if CHANNELS_LAST
    constexpr int TOGETHER = PacketSize<ELEMENT, CHANNELS>::value;
#else
    constexpr int TOGETHER = 1;
#endif
    constexpr int PIECES = CHANNELS / TOGETHER;
    for (int work = threadIdx.x; work < POINTS * PIECES; work += THREADS) {
        const int point = work / PIECES, channel = work % PIECES * TOGETHER;
        float sums[TOGETHER] = {};
#pragma unroll
        for (int level = 0; level < LEVELS; ++level) {
            // All loads of a level first, without a branch, so that they travel together.
            Packet<ELEMENT, TOGETHER> values[TAPS];
            Tap level_taps[TAPS];
#pragma unroll
            for (int tap = 0; tap < TAPS; ++tap) {
                level_taps[tap] = taps[(point * LEVELS + level) * TAPS + tap];
                values[tap] = *reinterpret_cast<const Packet<ELEMENT, TOGETHER>*>(
                    levels[level].map + level_taps[tap].cell * levels[level].cell_step +
                    channel * levels[level].channel_step);
            }
#pragma unroll
            for (int tap = 0; tap < TAPS; ++tap) {
#pragma unroll
                for (int item = 0; item < TOGETHER; ++item) {
                    // Outside the map stands cell 0 with weight 0, and what it holds must not matter.
                    const float value = level_taps[tap].weight == 0.0f ? 0.0f : to_float(values[tap].items[item]);
                    sums[item] += level_taps[tap].weight * value;
                }
            }
        }
#pragma unroll
        for (int item = 0; item < TOGETHER; ++item) {
            samples[point * CHANNEL_PITCH + channel + item] = Convert<Stored>::from(sums[item]);
        }
    }
}

__device__ Level group_of(const ELEMENT* map, int height, int width, long long image, int group) {
    const long long cells = (long long)height * width;
    map += image * GROUPS * CHANNELS * cells + (CHANNELS_LAST ? group * CHANNELS : group * CHANNELS * cells);
    return CHANNELS_LAST ? Level{map, GROUPS * CHANNELS, 1} : Level{map, 1, cells};
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    sampling_mixing(const ELEMENT* __restrict__ p2, const ELEMENT* __restrict__ p3, const ELEMENT* __restrict__ p4,
                    const ELEMENT* __restrict__ p5, const float* __restrict__ points,
                    const ELEMENT* __restrict__ parameters, int queries, int height2, int width2, int height3,
                    int width3, int height4, int width4, int height5, int width5, ELEMENT* __restrict__ output) {
    alignas(16) __shared__ Stored storage[SHARED_ITEMS];
    __shared__ Tap taps[POINTS * LEVELS * TAPS];
    __shared__ float partial[2][2][WARPS];
    Stored* const samples = storage;
    Stored* const channel_matrix = storage + SAMPLE_ITEMS;
    Stored* const point_matrix = channel_matrix + CHANNELS * CHANNEL_PITCH;

    const int group = blockIdx.x % GROUPS;
    const long long image = blockIdx.y;
    const long long place = image * queries * GROUPS + blockIdx.x;  // (image, query, group)
    parameters += place * (CHANNELS * CHANNELS + MIXED * POINTS);
    points += place * POINTS * 3;
    output += place * MIXED * CHANNELS;

    load_matrix<CHANNELS, CHANNELS, CHANNEL_PITCH>(channel_matrix, parameters);
    load_matrix<MIXED, POINTS, POINT_PITCH>(point_matrix, parameters + CHANNELS * CHANNELS);

    const Level levels[LEVELS] = {
        group_of(p2, height2, width2, image, group), group_of(p3, height3, width3, image, group),
        group_of(p4, height4, width4, image, group), group_of(p5, height5, width5, image, group)};
    for (int work = threadIdx.x; work < POINTS * LEVELS; work += THREADS) {
        const int level = work % LEVELS;
        const float* point = points + work / LEVELS * 3;
        const int height = level == 0 ? height2 : level == 1 ? height3 : level == 2 ? height4 : height5;
        const int width = level == 0 ? width2 : level == 1 ? width3 : level == 2 ? width4 : width5;
        find_taps(point[0], point[1], point[2], level, height, width, taps + work * TAPS);
    }
    __syncthreads();
    sample(levels, taps, samples);
    wait_for_copies();
    __syncthreads();

    using ByChannels = Product<POINTS, CHANNELS, CHANNELS, CHANNEL_PITCH, CHANNEL_PITCH>;
    float mixed[ByChannels::COUNT];
    ByChannels::compute(samples, channel_matrix, mixed);
    normalize_and_activate(mixed, partial[0]);  // its barriers end the reading of the samples
#pragma unroll
    for (int index = 0; index < ByChannels::COUNT; ++index) {
        samples[ByChannels::row(index) * CHANNEL_PITCH + ByChannels::column(index)] = Convert<Stored>::from(mixed[index]);
    }
    __syncthreads();

    using ByPoints = Product<MIXED, POINTS, CHANNELS, POINT_PITCH, CHANNEL_PITCH>;
    float result[ByPoints::COUNT];
    ByPoints::compute(point_matrix, samples, result);
    normalize_and_activate(result, partial[1]);  // and of the parameters
#if TENSOR_CORES
    // Through shared memory, over the parameters, so that whole rows leave in pieces of 16 bytes.
    Stored* const turned = channel_matrix;
#pragma unroll
    for (int index = 0; index < ByPoints::COUNT; ++index) {
        turned[ByPoints::row(index) * CHANNEL_PITCH + ByPoints::column(index)] = Convert<Stored>::from(result[index]);
    }
    __syncthreads();
    constexpr int PIECES = CHANNELS / 8;
    for (int work = threadIdx.x; work < MIXED * PIECES; work += THREADS) {
        const int row = work / PIECES, column = work % PIECES * 8;
        *reinterpret_cast<Packet<ELEMENT, 8>*>(output + row * CHANNELS + column) =
            *reinterpret_cast<const Packet<ELEMENT, 8>*>(turned + row * CHANNEL_PITCH + column);
    }
#else
#pragma unroll
    for (int index = 0; index < ByPoints::COUNT; ++index) {
        output[ByPoints::row(index) * CHANNELS + ByPoints::column(index)] = Convert<ELEMENT>::from(result[index]);
    }
#endif
}
