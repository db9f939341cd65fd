// SamplingMixing: 3D sampling and both adaptive mixings of one query and group per block, without leaving the chip.
//
// Grid (queries * GROUPS, images). While the two parameter matrices travel to shared memory, the block samples the
// pyramid; then y = act(norm(x M)) and z = act(norm(S y)). Compile-time constants: ELEMENT, GROUPS, CHANNELS (of a
// group), POINTS, MIXED, THREADS, CHANNELS_LAST, TENSOR_CORES (16-bit elements, compute capability 8.0 and later), RELU
// (else the activation is the GELU); of the points' unit CELLS_PER_UNIT (cells of P2) and FIRST_LEVEL (z of P2's cell).
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
// Left alone, some versions of the compiler save registers until a few spill.
constexpr int BLOCKS_AT_ONCE = 2;
#endif
#if CHANNELS_LAST
constexpr int TOGETHER = PacketSize<ELEMENT, CHANNELS>::value;  // channels of a sample that one thread takes
constexpr int CELL_STEP = GROUPS * CHANNELS;                    // elements between neighbouring cells
#else
constexpr int TOGETHER = 1, CELL_STEP = 1;
#endif
constexpr int CHANNEL_PITCH = CHANNELS + PAD;  // rows of x, M, y and z
constexpr int POINT_PITCH = POINTS + PAD;      // rows of S

static_assert(THREADS % WARP_SIZE == 0, "whole warps");
static_assert(CHANNELS % 8 == 0 && POINTS % 8 == 0, "rows move in pieces of 16 bytes");

// One cell under a sample. 32 bits are enough: 2^32 elements are 256 channels for an image of 16384 x 16384 pixels.
struct Tap {
    unsigned offset;  // elements from the map's first cell
    float weight;
};
using TapPair = Packet<Tap, 2>;  // 16 bytes, which move at once

__device__ constexpr int larger(int one, int other) { return one > other ? one : other; }
constexpr int SAMPLE_ITEMS = POINTS * CHANNEL_PITCH;
constexpr int PARAMETER_ITEMS = CHANNELS * CHANNEL_PITCH + MIXED * POINT_PITCH;
constexpr int RESULT_ITEMS = TENSOR_CORES ? MIXED * CHANNEL_PITCH : 0;
constexpr int SHARED_ITEMS = SAMPLE_ITEMS + larger(PARAMETER_ITEMS, RESULT_ITEMS);

// action(0), .., action(COUNT - 1), shared among the block's threads. Unsigned, so that dividing by a power of two is a
// shift.
template <unsigned COUNT, class Action>
__device__ __forceinline__ void for_each(Action action) {
#pragma unroll
    for (unsigned first = 0; first < COUNT; first += THREADS) {
        const unsigned index = first + threadIdx.x;
        if (COUNT % THREADS == 0 || index < COUNT) action(index);
    }
}

// Sums of the warps, on their way to becoming sums of the block.
union Partial {
    float both[2][WARPS];
    struct {
        float sum[1][WARPS], squares[1][WARPS];
    };
};

// Sums over the block in a fixed order, with one barrier. `partial` must not be in use by another call.
template <int COUNT>
__device__ void block_sums(float (&sums)[COUNT], float (&partial)[COUNT][WARPS]) {
#pragma unroll
    for (int index = 0; index < COUNT; ++index) {
        sums[index] = warp_sum(sums[index]);
        if (threadIdx.x % WARP_SIZE == 0) partial[index][threadIdx.x / WARP_SIZE] = sums[index];
    }
    __syncthreads();
#pragma unroll
    for (int index = 0; index < COUNT; ++index) {
        sums[index] = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) sums[index] += partial[index][warp];
    }
}

#if RELU
// What is no number stays none, as in the definition.
__device__ float activation_of_twice(float half) { return half < 0.0f ? 0.0f : half + half; }
#elif TENSOR_CORES
// GELU of twice `half`, within 2.6e-5 but for the error of the tanh, less than the rounding to 16 bits that follows: erf
// is replaced by the tanh of a polynomial fitted to it (minimax over -6..6, coefficients for half the argument). Beyond
// that the polynomial turns round, and the tanh is 1 anyway: a value 11 deviations from the mean must keep its sign.
__device__ float activation_of_twice(float half) {
    const float square = fminf(half * half, 9.0f);
    const float slope = 1.594994504f + square * (0.2961220544f + square * -0.01129844685f);
    return half + half * approximate_tanh(half * slope);
}
#else
// The exact GELU of twice `half`.
__device__ float activation_of_twice(float half) { return half + half * erff(half * 1.41421356237309505f); }
#endif

// Layer norm over all values of the block, then the activation. Ends with every thread past a barrier.
template <int COUNT>
__device__ void normalize_and_activate(float (&values)[COUNT], Partial& partial) {
    constexpr float SHARE = 1.0f / (COUNT * THREADS);
#if TENSOR_CORES
    // Variance as mean of squares less square of mean: one pass. What a mean far from zero costs in precision is less
    // than the values lost already, as sums of products of 16-bit floats.
    float sums[2] = {};
#pragma unroll
    for (int index = 0; index < COUNT; ++index) {
        sums[0] += values[index];
        sums[1] += values[index] * values[index];
    }
    block_sums(sums, partial.both);
    const float mean = sums[0] * SHARE, variance = fmaxf(sums[1] * SHARE - mean * mean, 0.0f);
#else
    float sum[1] = {}, squares[1] = {};
#pragma unroll
    for (int index = 0; index < COUNT; ++index) sum[0] += values[index];
    block_sums(sum, partial.sum);
    const float mean = sum[0] * SHARE;
#pragma unroll
    for (int index = 0; index < COUNT; ++index) squares[0] += (values[index] - mean) * (values[index] - mean);
    block_sums(squares, partial.squares);
    const float variance = squares[0] * SHARE;
#endif
    const float half_scale = 0.5f * rsqrtf(variance + EPSILON), half_shift = -mean * half_scale;
#pragma unroll
    for (int index = 0; index < COUNT; ++index) {
        values[index] = activation_of_twice(values[index] * half_scale + half_shift);
    }
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

    static __device__ void store(Stored* shared, const float (&values)[COUNT]) {
#pragma unroll
        for (int index = 0; index < COUNT; index += 2) {
            *reinterpret_cast<unsigned*>(shared + row(index) * RIGHT_PITCH + column(index)) =
                pack(ELEMENT{}, values[index], values[index + 1]);
        }
    }
#else
    static constexpr int ROW_STEP = THREADS / COLUMNS;
    static_assert(ROW_STEP * COLUMNS == THREADS && ROWS % ROW_STEP == 0, "whole rows of threads");

    static __device__ int row(int index) { return index * ROW_STEP + threadIdx.x / COLUMNS; }
    static __device__ int column(int) { return threadIdx.x % COLUMNS; }

    static __device__ void compute(const Stored* left, const Stored* right, float (&values)[COUNT]) {
#pragma unroll
        for (int index = 0; index < COUNT; ++index) values[index] = 0.0f;
#pragma unroll 1
        for (int depth = 0; depth < DEPTH; depth += 4) {
            float column_values[4];
#pragma unroll
            for (int step = 0; step < 4; ++step) column_values[step] = right[(depth + step) * RIGHT_PITCH + column(0)];
#pragma unroll
            for (int index = 0; index < COUNT; ++index) {
                const auto row_values =
                    *reinterpret_cast<const Packet<float, 4>*>(left + row(index) * LEFT_PITCH + depth);
#pragma unroll
                for (int step = 0; step < 4; ++step) values[index] += row_values.items[step] * column_values[step];
            }
        }
    }

    static __device__ void store(Stored* shared, const float (&values)[COUNT]) {
#pragma unroll
        for (int index = 0; index < COUNT; ++index) shared[row(index) * RIGHT_PITCH + column(index)] = values[index];
    }
#endif
};

// Neighbours in shared memory, from an address that is a multiple of what they fill, up to 16 bytes.
template <int COUNT>
__device__ void store_floats(Stored* shared, const float (&values)[COUNT]) {
#if TENSOR_CORES
    if constexpr (COUNT % 2 == 0) {
        Packet<unsigned, COUNT / 2> words;
#pragma unroll
        for (int word = 0; word < COUNT / 2; ++word) {
            words.items[word] = pack(ELEMENT{}, values[2 * word], values[2 * word + 1]);
        }
        *reinterpret_cast<Packet<unsigned, COUNT / 2>*>(shared) = words;
    } else {
        static_assert(COUNT == 1, "pairs or one alone");
        shared[0] = Convert<Stored>::from(values[0]);
    }
#else
    constexpr int TOGETHER = COUNT % 4 == 0 ? 4 : 1;
#pragma unroll
    for (int first = 0; first < COUNT; first += TOGETHER) {
        Packet<float, TOGETHER> packet;
#pragma unroll
        for (int item = 0; item < TOGETHER; ++item) packet.items[item] = values[first + item];
        *reinterpret_cast<Packet<float, TOGETHER>*>(shared + first) = packet;
    }
#endif
}

// Rows of a matrix from global to shared memory, `PITCH` apart; complete after wait_for_copies() and a barrier.
template <int ROWS, int COLUMNS, int PITCH>
__device__ void load_matrix(Stored* shared, const ELEMENT* global) {
    if constexpr (sizeof(Stored) == sizeof(ELEMENT)) {
        constexpr unsigned PIECE = 16 / sizeof(ELEMENT), PIECES = COLUMNS / PIECE;
        for_each<ROWS * PIECES>([=](unsigned work) {
            copy_16_bytes(shared + work / PIECES * PITCH + work % PIECES * PIECE, global + work * PIECE);
        });
    } else {
        constexpr unsigned PIECES = COLUMNS / 8;
        for_each<ROWS * PIECES>([=](unsigned work) {
            const auto piece = *reinterpret_cast<const Bundle<ELEMENT, 8>*>(global + work * 8);
            float values[8];
#pragma unroll
            for (int item = 0; item < 8; ++item) values[item] = piece[item];
            store_floats(shared + work / PIECES * PITCH + work % PIECES * 8, values);
        });
    }
}

// Cells and weights of one sample on one level. In place of a cell outside the map stands the first, with weight 0.
__device__ void find_taps(float x, float y, float z, int level, int height, int width, TapPair* pairs) {
    // Softmax over the levels of half the squared distance to each, negative, in powers of two.
    constexpr float HALF_LOG2_E = 0.72134752044f;
    float likeness[LEVELS], best = -3.402823466e38f, total = 0.0f, own = 0.0f;
#pragma unroll
    for (int other = 0; other < LEVELS; ++other) {
        const float distance = z - (FIRST_LEVEL + other);
        likeness[other] = distance * distance * -HALF_LOG2_E;
        best = fmaxf(best, likeness[other]);
    }
#pragma unroll
    for (int other = 0; other < LEVELS; ++other) {
        const float weight = approximate_exp2(likeness[other] - best);
        total += weight;
        if (other == level) own = weight;
    }
    own = __fdividef(own, total);
    // From the points' unit to cells of the level. Far outside every weight is 0; the bound keeps the conversion to int defined.
    const float scale = __uint_as_float(unsigned(127 - level) << 23) * CELLS_PER_UNIT;  // 2^-level of them
    const float at_x = fmaxf(fminf(x * scale - 0.5f, 1e6f), -1e6f), at_y = fmaxf(fminf(y * scale - 0.5f, 1e6f), -1e6f);
    const float left = floorf(at_x), top = floorf(at_y);
    const int left_cell = int(left), top_cell = int(top);
    const float right_share = at_x - left, lower_share = at_y - top;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        TapPair pair;
#pragma unroll
        for (int beside = 0; beside < 2; ++beside) {
            const unsigned cell_x = left_cell + beside, cell_y = top_cell + below;
            const bool inside = cell_x < unsigned(width) && cell_y < unsigned(height);  // less than 0 is very large
            const float weight = (beside ? right_share : 1.0f - right_share) * (below ? lower_share : 1.0f - lower_share);
            const unsigned cell = cell_y * width + cell_x;
            pair.items[beside] = inside ? Tap{cell * CELL_STEP, weight * own} : Tap{0, 0.0f};
        }
        pairs[below] = pair;
    }
}

// The block's samples [POINTS, CHANNELS] into shared memory. `maps` point at the group's first channel of the image.
__device__ void sample(const ELEMENT* const (&maps)[LEVELS], const unsigned (&channel_steps)[LEVELS], const TapPair* taps,
                       Stored* samples) {
    constexpr unsigned PIECES = CHANNELS / TOGETHER;
    for_each<POINTS * PIECES>([&](unsigned work) {
        const unsigned point = work / PIECES, channel = work % PIECES * TOGETHER;
        float sums[TOGETHER] = {};
#pragma unroll
        for (int level = 0; level < LEVELS; ++level) {
            const unsigned first = channel * channel_steps[level];
            // All loads of a level first, without a branch, so that they travel together.
            const TapPair pairs[2] = {taps[(point * LEVELS + level) * 2], taps[(point * LEVELS + level) * 2 + 1]};
            using Cell = Bundle<ELEMENT, TOGETHER>;
            Cell cells[TAPS];
#pragma unroll
            for (int tap = 0; tap < TAPS; ++tap) {
                const unsigned place = first + pairs[tap / 2].items[tap % 2].offset;
                cells[tap] = *reinterpret_cast<const Cell*>(maps[level] + place);
            }
#pragma unroll
            for (int tap = 0; tap < TAPS; ++tap) {
                const float weight = pairs[tap / 2].items[tap % 2].weight;
                cells[tap].clear_unless(weight != 0.0f);  // what the first cell holds must not matter
#pragma unroll
                for (int item = 0; item < TOGETHER; ++item) sums[item] += weight * cells[tap][item];
            }
        }
        store_floats(samples + point * CHANNEL_PITCH + channel, sums);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    sampling_mixing(const ELEMENT* __restrict__ p2, const ELEMENT* __restrict__ p3, const ELEMENT* __restrict__ p4,
                    const ELEMENT* __restrict__ p5, const float* __restrict__ points,
                    const ELEMENT* __restrict__ parameters, int queries, int height2, int width2, int height3,
                    int width3, int height4, int width4, int height5, int width5, ELEMENT* __restrict__ output) {
    alignas(16) __shared__ Stored storage[SHARED_ITEMS];
    __shared__ TapPair taps[POINTS * LEVELS * TAPS / 2];
    alignas(16) __shared__ Partial partial[2];
    Stored* const samples = storage;
    Stored* const channel_matrix = storage + SAMPLE_ITEMS;
    Stored* const point_matrix = channel_matrix + CHANNELS * CHANNEL_PITCH;

    const int group = blockIdx.x % GROUPS;
    const long long image = blockIdx.y;
    const long long place = image * queries * GROUPS + blockIdx.x;  // (image, query, group)
    parameters += place * (CHANNELS * CHANNELS + MIXED * POINTS);
    points += place * POINTS * 3;

    load_matrix<CHANNELS, CHANNELS, CHANNEL_PITCH>(channel_matrix, parameters);
    load_matrix<MIXED, POINTS, POINT_PITCH>(point_matrix, parameters + CHANNELS * CHANNELS);

    const int heights[LEVELS] = {height2, height3, height4, height5}, widths[LEVELS] = {width2, width3, width4, width5};
    const ELEMENT* maps[LEVELS] = {p2, p3, p4, p5};
    unsigned channel_steps[LEVELS];
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
        const long long cells = (long long)heights[level] * widths[level];
        channel_steps[level] = CHANNELS_LAST ? 1 : cells;
        maps[level] += image * GROUPS * CHANNELS * cells + group * CHANNELS * channel_steps[level];
    }
    for_each<POINTS * LEVELS>([&](unsigned work) {
        const int level = work % LEVELS;
        const float* point = points + work / LEVELS * 3;
        const int height = level == 0 ? height2 : level == 1 ? height3 : level == 2 ? height4 : height5;
        const int width = level == 0 ? width2 : level == 1 ? width3 : level == 2 ? width4 : width5;
        find_taps(point[0], point[1], point[2], level, height, width, taps + work * 2);
    });
    __syncthreads();
    sample(maps, channel_steps, taps, samples);
    wait_for_copies();
    __syncthreads();

    using ByChannels = Product<POINTS, CHANNELS, CHANNELS, CHANNEL_PITCH, CHANNEL_PITCH>;
    float mixed[ByChannels::COUNT];
    ByChannels::compute(samples, channel_matrix, mixed);
    normalize_and_activate(mixed, partial[0]);  // its barrier ends the reading of the samples
    ByChannels::store(samples, mixed);
    __syncthreads();

    using ByPoints = Product<MIXED, POINTS, CHANNELS, POINT_PITCH, CHANNEL_PITCH>;
    float result[ByPoints::COUNT];
    ByPoints::compute(point_matrix, samples, result);
    normalize_and_activate(result, partial[1]);  // and of the parameters
    output += place * MIXED * CHANNELS;
#if TENSOR_CORES
    // Through shared memory, over the parameters, so that whole rows leave in pieces of 16 bytes.
    Stored* const turned = channel_matrix;
    ByPoints::store(turned, result);
    __syncthreads();
    constexpr unsigned PIECES = CHANNELS / 8;
    for_each<MIXED * PIECES>([=](unsigned work) {
        *reinterpret_cast<Packet<unsigned, 4>*>(output + work * 8) =
            *reinterpret_cast<const Packet<unsigned, 4>*>(turned + work / PIECES * CHANNEL_PITCH + work % PIECES * 8);
    });
#else
#pragma unroll
    for (int index = 0; index < ByPoints::COUNT; ++index) {
        output[ByPoints::row(index) * CHANNELS + ByPoints::column(index)] = Convert<ELEMENT>::from(result[index]);
    }
#endif
}
