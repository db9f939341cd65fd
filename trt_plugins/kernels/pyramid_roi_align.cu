// PyramidRoIAlign: 7x7 bins of each box from the pyramid level that fits it, two samples per axis and bin.
//
// Grid (channel chunks, queries, images). The 14 sample places per axis are worked out once per block and held in shared
// memory: a bin's value is a sum over rows and columns of products of two weights. Compile-time constants: ELEMENT,
// CHANNELS, CHUNK (channels per block, divides CHANNELS), MAPS (how many of the maps count), FIRST_LEVEL (the binary
// logarithm of the first one's stride), THREADS, CHANNELS_LAST.
#include "device.cuh"

constexpr int ROI_SIDE = 7;
constexpr int BINS = ROI_SIDE * ROI_SIDE;
constexpr int SAMPLES = 2 * ROI_SIDE;  // per axis
// float32: as the compiler sees fit. 16 bits: left alone, it saves registers until some spill.
constexpr int BLOCKS_AT_ONCE = sizeof(ELEMENT) == 4 ? 0 : 4;

static_assert(CHANNELS % CHUNK == 0, "a block takes a whole number of channels");

// One sample place along one axis: two neighbouring cells and their weights, 0 for a place outside the map.
struct Place {
    int before, after;
    float weight_before, weight_after;
};

__device__ Place sample_place(float at, int cells) {
    Place place{0, 0, 0.0f, 0.0f};
    if (!(at >= -1.0f && at <= float(cells))) return place;  // also where `at` is NaN
    at = fmaxf(at, 0.0f);
    place.before = min(int(at), cells - 1);
    place.after = min(place.before + 1, cells - 1);
    place.weight_after = place.before == cells - 1 ? 0.0f : at - place.before;
    place.weight_before = 1.0f - place.weight_after;
    return place;
}

// The maps as 0, 1, ..: floor(4 + log2(sqrt(area) / 224) + 1e-6), clamped; a NaN area counts as the finest.
__device__ int pyramid_level(float width, float height) {
    const float scale = sqrtf(__fmul_rn(width, height));
    const float level = floorf(__fadd_rn(__fadd_rn(4.0f, log2f(scale / 224.0f)), 1e-6f));
    return int(fmaxf(fminf(level, float(FIRST_LEVEL + MAPS - 1)), float(FIRST_LEVEL))) - FIRST_LEVEL;
}

// The 4 x 4 cells under a bin, and their weights.
struct Taps {
    unsigned rows[4], columns[4];  // elements from the map's first row and column
    float row_weights[4], column_weights[4];
};

__device__ Taps taps_of(const Place* rows, const Place* columns, int bin, int width) {
    constexpr unsigned CELL_STEP = CHANNELS_LAST ? CHANNELS : 1;
    const unsigned row_step = width * CELL_STEP;
    Taps taps;
#pragma unroll
    for (int sample = 0; sample < 2; ++sample) {
        const Place row = rows[bin / ROI_SIDE * 2 + sample], column = columns[bin % ROI_SIDE * 2 + sample];
        taps.rows[2 * sample] = row.before * row_step;
        taps.rows[2 * sample + 1] = row.after * row_step;
        taps.row_weights[2 * sample] = row.weight_before;
        taps.row_weights[2 * sample + 1] = row.weight_after;
        taps.columns[2 * sample] = column.before * CELL_STEP;
        taps.columns[2 * sample + 1] = column.after * CELL_STEP;
        taps.column_weights[2 * sample] = column.weight_before;
        taps.column_weights[2 * sample + 1] = column.weight_after;
    }
    return taps;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    pyramid_roi_align(const ELEMENT* __restrict__ p2, const ELEMENT* __restrict__ p3, const ELEMENT* __restrict__ p4,
                      const ELEMENT* __restrict__ p5, const float* __restrict__ boxes, int queries, int height2,
                      int width2, int height3, int width3, int height4, int width4, int height5, int width5,
                      ELEMENT* __restrict__ rois) {
    __shared__ Place rows[SAMPLES], columns[SAMPLES];
    const int thread = threadIdx.x;
    const long long image = blockIdx.z;
    const long long query = image * queries + blockIdx.y;
    const int first_channel = blockIdx.x * CHUNK;

    const float box_width = boxes[query * 4 + 2], box_height = boxes[query * 4 + 3];
    const int level = pyramid_level(box_width, box_height);
    const int height = level == 0 ? height2 : level == 1 ? height3 : level == 2 ? height4 : height5;
    const int width = level == 0 ? width2 : level == 1 ? width3 : level == 2 ? width4 : width5;
    const ELEMENT* map = level == 0 ? p2 : level == 1 ? p3 : level == 2 ? p4 : p5;
    const long long cells = (long long)height * width;
    map += image * CHANNELS * cells;

    if (thread < 2 * SAMPLES) {
        const bool vertical = thread >= SAMPLES;
        const int sample = thread % SAMPLES;
        const float scale = 1.0f / float(1 << (FIRST_LEVEL + level));
        const float centre = boxes[query * 4 + vertical], extent = vertical ? box_height : box_width;
        const float start = (centre - extent / 2) * scale, end = (centre + extent / 2) * scale;
        const float bin = fmaxf(end - start, 1.0f) / ROI_SIDE;
        const float at = start + (sample / 2) * bin + (sample % 2 + 0.5f) * bin / 2;
        (vertical ? rows : columns)[sample] = sample_place(at, vertical ? height : width);
    }
    __syncthreads();

    ELEMENT* target = rois + (query * CHANNELS + first_channel) * BINS;
#if CHANNELS_LAST
    // Neighbouring threads read neighbouring channels; the results turn around in shared memory.
    constexpr unsigned TOGETHER = PacketSize<ELEMENT, CHUNK>::value, PIECES = CHUNK / TOGETHER;
    alignas(16) __shared__ ELEMENT turned[CHUNK * BINS];
    map += first_channel;
    for (unsigned work = thread; work < PIECES * BINS; work += THREADS) {
        const unsigned channel = work % PIECES * TOGETHER, bin = work / PIECES;
        const Taps taps = taps_of(rows, columns, bin, width);
        float sums[TOGETHER] = {};
#pragma unroll
        for (int tap = 0; tap < 16; ++tap) {
            const unsigned place = taps.rows[tap / 4] + (taps.columns[tap % 4] + channel);
            const auto values = *reinterpret_cast<const Bundle<ELEMENT, TOGETHER>*>(map + place);
            const float weight = taps.row_weights[tap / 4] * taps.column_weights[tap % 4];
#pragma unroll
            for (int item = 0; item < TOGETHER; ++item) sums[item] += weight * values[item];
        }
#pragma unroll
        for (int item = 0; item < TOGETHER; ++item) {
            turned[(channel + item) * BINS + bin] = Convert<ELEMENT>::from(sums[item] / 4);
        }
    }
    __syncthreads();
    using Piece = Packet<ELEMENT, PacketSize<ELEMENT, CHUNK * BINS>::value>;
    for (unsigned work = thread; work < sizeof(turned) / sizeof(Piece); work += THREADS) {
        reinterpret_cast<Piece*>(target)[work] = reinterpret_cast<const Piece*>(turned)[work];
    }
#else
    // A thread keeps its bin, hence its cells and weights, over all its channels; neighbouring threads write neighbours.
    constexpr int TEAM = THREADS / BINS;
    if (thread >= TEAM * BINS) return;
    const int bin = thread % BINS;
    const Taps taps = taps_of(rows, columns, bin, width);
    for (int channel = thread / BINS; channel < CHUNK; channel += TEAM) {
        const ELEMENT* source = map + (first_channel + channel) * cells;
        float sum = 0.0f;
#pragma unroll
        for (int row = 0; row < 4; ++row) {
            float along = 0.0f;
#pragma unroll
            for (int column = 0; column < 4; ++column) {
                along += taps.column_weights[column] * to_float(source[taps.rows[row] + taps.columns[column]]);
            }
            sum += taps.row_weights[row] * along;
        }
        target[channel * BINS + bin] = Convert<ELEMENT>::from(sum / 4);
    }
#endif
}
