// MultiScaleDeformableAttention: each query's weighted samples of all levels, head by head.
//
// Grid (pairs of query and head / those of a block, images). LANES neighbouring threads serve one pair, each some of its
// channels. What a point asks for, four cells and their weights, is worked out by one of them and read by all: in rounds
// of LANES points, through shared memory that no other warp sees. Pairs follow each other as in memory, heads fastest,
// so that neighbouring heads of a cell, which lie in different banks of the cache, are read together.
// Compile-time constants: ELEMENT, QUERIES, CELLS (of all levels), HEADS, CHANNELS (of a head), POINTS (of all levels), LANES,
// LEVELS, LEVEL_SHAPES (height, width, ..), LEVEL_POINTS, THREADS.
#include "device.cuh"

constexpr int TAPS = 4;  // cells under a sample
// A thread's channels, in pieces that move at once; the pieces of neighbouring threads lie side by side.
constexpr int TOGETHER = CHANNELS % 8 == 0 ? 8 : CHANNELS % 4 == 0 ? 4 : CHANNELS % 2 == 0 ? 2 : 1;
constexpr int WIDTH = PacketSize<ELEMENT, TOGETHER>::value;
constexpr int PIECES = TOGETHER / WIDTH;
constexpr int PIECE_STEP = CHANNELS / PIECES;
constexpr int PAIRS = QUERIES * HEADS;  // of query and head, in an image
constexpr int PAIRS_AT_ONCE = THREADS / LANES;
constexpr unsigned CELL_STEP = HEADS * CHANNELS;  // elements between neighbouring cells
// Adding it rounds a float to a whole number, which then is the difference of the bits: no slow conversions.
constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23
constexpr unsigned ROUNDER_BITS = 0x4b400000u;

static_assert(THREADS % WARP_SIZE == 0 && WARP_SIZE % LANES == 0, "a pair is served by one warp");
static_assert(LANES * TOGETHER >= CHANNELS, "every channel has a thread");
static_assert(CELLS <= 1 << 22, "ROUNDER keeps whole numbers up to there");

using Piece = Bundle<ELEMENT, WIDTH>;

// Of the level of a point.
struct alignas(16) Level {
    float width, height;
    float first;  // cell of all levels, over ROUNDER
    float unused;
};

// What one point wants of one head: the elements of its cells, counted from the image's first, and their weights.
struct Taps {
    Packet<unsigned, TAPS> offsets;
    Packet<float, TAPS> weights;
};

// The level of every point; complete after a barrier.
__device__ void find_levels(Level* levels) {
    constexpr int SHAPES[] = {LEVEL_SHAPES}, COUNTS[] = {LEVEL_POINTS};
    for (int point = threadIdx.x; point < POINTS; point += THREADS) {
        int first_point = 0, first = 0;
        Level level{};
#pragma unroll
        for (int number = 0; number < LEVELS; ++number) {
            const float width = SHAPES[2 * number + 1], height = SHAPES[2 * number];
            if (point >= first_point) level = Level{width, height, ROUNDER + first, 0.0f};
            first_point += COUNTS[number];
            first += SHAPES[2 * number] * SHAPES[2 * number + 1];
        }
        levels[point] = level;
    }
}

// A side of a sample: the two cells next to it, held inside the map, and their shares, 0 for what lies outside, even if
// the place is no number. Between them the nearest whole number may be either: one share is 1 then, the other 0.
__device__ __forceinline__ void find_side(float place, float cells, float (&held)[2], float (&shares)[2]) {
    const float at = place * cells - 0.5f;
    const float before = ((at - 0.5f) + ROUNDER) - ROUNDER, after = before + 1.0f;
    const float fraction = at - before;
    held[0] = fminf(fmaxf(before, 0.0f), cells - 1.0f);
    held[1] = fminf(fmaxf(after, 0.0f), cells - 1.0f);
    shares[0] = held[0] == before ? 1.0f - fraction : 0.0f;
    shares[1] = held[1] == after ? fraction : 0.0f;
}

__device__ __forceinline__ Taps find_taps(Packet<float, 2> place, float weight, const Level& level, unsigned head) {
    float x[2], y[2], shares_x[2], shares_y[2];
    find_side(place.items[0], level.width, x, shares_x);
    find_side(place.items[1], level.height, y, shares_y);
    Taps taps;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        const float row = y[below] * level.width + level.first;
#pragma unroll
        for (int beside = 0; beside < 2; ++beside) {
            const unsigned cell = __float_as_uint(row + x[beside]) - ROUNDER_BITS;
            taps.offsets.items[2 * below + beside] = cell * CELL_STEP + head * CHANNELS;
            taps.weights.items[2 * below + beside] = shares_y[below] * weight * shares_x[beside];
        }
    }
    return taps;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    deformable_attention(const ELEMENT* __restrict__ value, const float* __restrict__ locations,
                         const ELEMENT* __restrict__ weights, ELEMENT* __restrict__ attended) {
    __shared__ Level levels[POINTS];
    __shared__ Packet<unsigned, TAPS> offsets[THREADS];
    __shared__ Packet<float, TAPS> shares[THREADS];

    find_levels(levels);
    __syncthreads();

    const unsigned lane = threadIdx.x % LANES, first_of_pair = threadIdx.x - lane;
    const unsigned pair = blockIdx.x * PAIRS_AT_ONCE + threadIdx.x / LANES;
    const bool present = PAIRS % PAIRS_AT_ONCE == 0 || pair < PAIRS;
    const unsigned head = pair % HEADS, channel = lane * WIDTH;
    const bool has_channels = LANES * TOGETHER == CHANNELS || channel < PIECE_STEP;
    // Who has none reads those of the first, in vain.
    value += blockIdx.y * (long long)(CELLS * CELL_STEP) + (has_channels ? channel : 0);
    // Kept as one address, so that a cell's is one multiply-add away.
    size_t base = __cvta_generic_to_global(value);
    asm("" : "+l"(base));
    const long long first_point = (blockIdx.y * (long long)PAIRS + (present ? pair : 0)) * POINTS;
    const auto places = reinterpret_cast<const Packet<float, 2>*>(locations) + first_point;
    weights += first_point;

    float sums[TOGETHER] = {};
    // A round's place and weight are on their way while the round before is at work.
    auto place = places[min(int(lane), POINTS - 1)];
    auto weight = weights[min(int(lane), POINTS - 1)];
#pragma unroll 1
    for (int round = 0; round < POINTS; round += LANES) {
        const Taps taps = find_taps(place, to_float(weight), levels[min(int(round + lane), POINTS - 1)], head);
        offsets[threadIdx.x] = taps.offsets;
        shares[threadIdx.x] = taps.weights;
        place = places[min(int(round + LANES + lane), POINTS - 1)];
        weight = weights[min(int(round + LANES + lane), POINTS - 1)];
        __syncwarp();
        constexpr int AT_ONCE = LANES < 4 ? LANES : 4;
#pragma unroll AT_ONCE
        for (int other = 0; other < LANES; ++other) {
            if (POINTS % LANES != 0 && round + other >= POINTS) break;
            const auto from = offsets[first_of_pair + other];
            const auto share = shares[first_of_pair + other];
            Piece cells[TAPS][PIECES];
#pragma unroll
            for (int tap = 0; tap < TAPS; ++tap) {
                const size_t address = base + from.items[tap] * (unsigned long long)sizeof(ELEMENT);
                const auto cell = static_cast<const ELEMENT*>(__cvta_global_to_generic(address));
#pragma unroll
                for (int piece = 0; piece < PIECES; ++piece) {
                    cells[tap][piece] = *reinterpret_cast<const Piece*>(cell + piece * PIECE_STEP);
                }
            }
#pragma unroll
            for (int tap = 0; tap < TAPS; ++tap) {
#pragma unroll
                for (int item = 0; item < TOGETHER; ++item) {
                    sums[item] += share.items[tap] * cells[tap][item / WIDTH][item % WIDTH];
                }
            }
        }
        __syncwarp();
    }

    if (!present || !has_channels) return;
    attended += (blockIdx.y * (long long)PAIRS + pair) * CHANNELS + channel;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        Packet<ELEMENT, WIDTH> result;
#pragma unroll
        for (int item = 0; item < WIDTH; ++item) {
            result.items[item] = Convert<ELEMENT>::from(sums[piece * WIDTH + item]);
        }
        *reinterpret_cast<Packet<ELEMENT, WIDTH>*>(attended + piece * PIECE_STEP) = result;
    }
}
