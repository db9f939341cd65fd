// GatherAnchors: keep threshold, the "fewest" rule of the first level, the "most" rule of all, one block per image.
//
// An anchor's *position* is its place after the first level was put in confidence order where the "fewest" rule applies.
// Nothing is sorted: the few of the first level are ranked by counting, the most confident of all are found by bisection
// over the bits of their confidence, and then ranked by counting. Compile-time constants: ANCHORS, FIRST, KEEP_THRESHOLD,
// FEWEST, MOST, THREADS.
#include "device.cuh"

constexpr int WARPS = THREADS / WARP_SIZE;
constexpr int ITEMS = (ANCHORS + THREADS - 1) / THREADS;
constexpr int TAKEN_FIRST = FEWEST < FIRST ? FEWEST : FIRST;

static_assert(THREADS % WARP_SIZE == 0 && WARPS <= WARP_SIZE, "sums over warps are one warp wide");
static_assert(FIRST <= ANCHORS, "the first level is part of the anchors");

// Sum over a warp; exact, because counts stay far under 2^24.
__device__ int warp_count(int value) { return int(warp_sum(float(value))); }

// Sum over the block; every thread gets it.
__device__ int block_sum(int value, int* totals) {
    const int lane = threadIdx.x % WARP_SIZE;
    const int total = warp_count(value);
    __syncthreads();  // the last user of `totals` is done
    if (lane == 0) totals[threadIdx.x / WARP_SIZE] = total;
    __syncthreads();
    return warp_count(lane < WARPS ? totals[lane] : 0);
}

// How many threads before this one have the flag; `total` becomes the number in the block.
__device__ int block_rank(bool flag, int* totals, int& total) {
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const unsigned flags = warp_ballot(flag);
    __syncthreads();
    if (lane == 0) totals[warp] = __popc(flags);
    __syncthreads();
    const int of_warp = lane < WARPS ? totals[lane] : 0;
    total = warp_count(of_warp);
    return warp_count(lane < warp ? of_warp : 0) + __popc(flags & ((1u << lane) - 1));
}

// One block per image: more than one per multiprocessor is not worth a spill.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gather_anchors(const float* __restrict__ anchors, const unsigned char* __restrict__ selectable,
                   float* __restrict__ boxes, unsigned char* __restrict__ valid) {
    __shared__ float first_confidence[FIRST > 0 ? FIRST : 1];
    __shared__ int first_order[TAKEN_FIRST > 0 ? TAKEN_FIRST : 1];
    __shared__ unsigned chosen_key[MOST];
    __shared__ int chosen_anchor[MOST];
    __shared__ int place_anchor[MOST];
    __shared__ int totals[WARPS];

    const int thread = threadIdx.x;
    const long long image = blockIdx.x;
    anchors += image * ANCHORS * 5;
    selectable += image * ANCHORS;

    // The first level: how many pass, and its confidence order where these are too few.
    int passing = 0;
    for (int anchor = thread; anchor < FIRST; anchor += THREADS) {
        const float raw = anchors[anchor * 5 + 4];
        const float confidence = raw != raw ? -1.0f : raw;
        first_confidence[anchor] = confidence;
        passing += selectable[anchor] && confidence > KEEP_THRESHOLD;
    }
    const bool few = block_sum(passing, totals) < FEWEST;
    if (few) {
        for (int anchor = thread; anchor < FIRST; anchor += THREADS) {
            const float confidence = first_confidence[anchor];
            int rank = 0;
            for (int other = 0; other < FIRST; ++other) {
                const float rival = first_confidence[other];
                rank += rival > confidence || (rival == confidence && other < anchor);
            }
            if (rank < TAKEN_FIRST) first_order[rank] = anchor;
        }
    }
    __syncthreads();

    // Of each position: which anchor, and a key that is 0 where it is not kept and orders as the confidence does.
    int source[ITEMS];
    unsigned key[ITEMS];
    int kept_here = 0;
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const int position = item * THREADS + thread;
        source[item] = position;
        key[item] = 0;
        if (position >= ANCHORS || (few && position >= TAKEN_FIRST && position < FIRST)) continue;
        if (few && position < FIRST) source[item] = first_order[position];
        const float confidence = anchors[source[item] * 5 + 4];
        bool keep = few && position < FIRST;
        if (!keep) keep = selectable[source[item]] && confidence > KEEP_THRESHOLD;
        if (position < FIRST) keep = keep && confidence >= 0.0f;
        kept_here += keep;
        // Adding 0 turns -0 into 0. A negative confidence passes a negative threshold, but no cut by confidence.
        if (keep) key[item] = confidence >= 0.0f ? __float_as_uint(confidence + 0.0f) + 2u : 1u;
    }
    const bool too_many = block_sum(kept_here, totals) > MOST;

    // The smallest key among the MOST largest: the greatest number that at least MOST keys reach.
    unsigned threshold = 0;
    int room_for_equals = 0;
    if (too_many) {
#pragma unroll 1
        for (int bit = 30; bit >= 0; --bit) {
            const unsigned trial = threshold | (1u << bit);
            int reached = 0;
#pragma unroll
            for (int item = 0; item < ITEMS; ++item) reached += key[item] >= trial;
            if (block_sum(reached, totals) >= MOST) threshold = trial;
        }
        if (threshold < 2u) {
            threshold = 1u;  // fewer than MOST are not negative: all of those
        } else {
            int above = 0;
#pragma unroll
            for (int item = 0; item < ITEMS; ++item) above += key[item] > threshold;
            room_for_equals = MOST - block_sum(above, totals);
        }
    }

    // Collect the chosen in order of position; of equals at the threshold the first ones.
    int count = 0, equals = 0;
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        bool take = key[item] > threshold;
        if (room_for_equals > 0) {
            int found;
            const bool equal = key[item] == threshold;
            const int rank = block_rank(equal, totals, found);
            take = take || (equal && equals + rank < room_for_equals);
            equals += found;
        }
        int found;
        const int place = count + block_rank(take, totals, found);
        if (take) {
            chosen_key[place] = key[item];
            chosen_anchor[place] = source[item];
        }
        count += found;
    }
    __syncthreads();

    for (int index = thread; index < count; index += THREADS) {
        int place = index;
        if (too_many) {
            const unsigned own = chosen_key[index];
            place = 0;
            for (int other = 0; other < count; ++other) {
                const unsigned rival = chosen_key[other];
                place += rival > own || (rival == own && other < index);
            }
        }
        place_anchor[place] = chosen_anchor[index];
    }
    __syncthreads();
    for (int place = thread; place < MOST; place += THREADS) valid[image * MOST + place] = place < count;
    for (int number = thread; number < MOST * 4; number += THREADS) {
        const int place = number / 4;
        boxes[image * MOST * 4 + number] = place < count ? anchors[place_anchor[place] * 5 + number % 4] : 0.0f;
    }
}
