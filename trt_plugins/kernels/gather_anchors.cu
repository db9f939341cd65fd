// GatherAnchors: keep threshold, the "fewest" rule of the first level, the "most" rule of all, one block per image.
//
// An anchor's *position* is its place after the first level was put in confidence order where the "fewest" rule applies.
// Of all anchors only those that stay are sorted: the cut is found by bisection over the bits of the confidence.
// Compile-time constants: ANCHORS, FIRST, KEEP_THRESHOLD, FEWEST, MOST, THREADS.
#include "device.cuh"

constexpr int ITEMS = (ANCHORS + THREADS - 1) / THREADS;
constexpr int TAKEN_FIRST = FEWEST < FIRST ? FEWEST : FIRST;

static_assert(FIRST <= ANCHORS, "the first level is part of the anchors");

// A key that orders as the confidence does, over 1. Adding 0 turns -0 into 0.
__device__ unsigned key_of(float confidence) { return __float_as_uint(confidence + 0.0f) + 2u; }

// One block per image: more than one per multiprocessor is not worth a spill.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gather_anchors(const float* __restrict__ anchors, const unsigned char* __restrict__ selectable,
                   float* __restrict__ boxes, unsigned char* __restrict__ valid) {
    __shared__ Keyed list[FIRST > MOST ? FIRST : MOST];
    __shared__ int first_order[TAKEN_FIRST > 0 ? TAKEN_FIRST : 1];
    __shared__ Totals::Buffers buffers;
    __shared__ int listed_first, listed;

    const int thread = threadIdx.x;
    const long long image = blockIdx.x;
    anchors += image * ANCHORS * 5;
    selectable += image * ANCHORS;
    Totals totals{buffers};
    if (thread == 0) listed_first = listed = 0;

    // The first level: how many pass, and where these are too few, the most confident ones in order.
    int passing = 0;
    for (int anchor = thread; anchor < FIRST; anchor += THREADS) {
        passing += selectable[anchor] && anchors[anchor * 5 + 4] > KEEP_THRESHOLD;
    }
    const bool few = totals.sum(passing) < FEWEST;
    int in_first_order = 0;
    if (few) {
        for (int anchor = thread; anchor < FIRST; anchor += THREADS) {
            // Neither NaN nor a negative confidence. The order of arrival does not show: what arrives is sorted.
            const float confidence = anchors[anchor * 5 + 4];
            if (confidence >= 0.0f) list[atomicAdd(&listed_first, 1)] = Keyed{~key_of(confidence), unsigned(anchor)};
        }
        __syncthreads();
        const int count = listed_first;
        sort(list, count);
        in_first_order = min(count, TAKEN_FIRST);
        // Without a barrier behind it: what others wrote is read only at the very end.
        for (int position = thread; position < in_first_order; position += THREADS) {
            first_order[position] = list[position].low;
        }
    }
    const auto anchor_at = [&](int position) { return few && position < FIRST ? first_order[position] : position; };

    // Of each position a key that is 0 where it is not kept and orders as the confidence does.
    unsigned keys[ITEMS];
    int kept_here = 0;
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const int position = item * THREADS + thread;
        keys[item] = 0;
        if (position >= ANCHORS || (few && position >= in_first_order && position < FIRST)) continue;
        const int anchor = anchor_at(position);
        const float confidence = anchors[anchor * 5 + 4];
        bool keep = (few && position < FIRST) || (selectable[anchor] && confidence > KEEP_THRESHOLD);
        if (position < FIRST) keep = keep && confidence >= 0.0f;
        kept_here += keep;
        // A negative confidence passes a negative threshold, but no cut by confidence.
        if (keep) keys[item] = confidence >= 0.0f ? key_of(confidence) : 1u;
    }
    const bool too_many = totals.sum(kept_here) > MOST;

    // The cut: the greatest number that at least MOST keys reach; where fewer than MOST are not negative, all of those.
    unsigned cut = 1;
    if (too_many) {
        int over = MOST;  // keys that reach the cut
        cut = 0;
#pragma unroll 1
        for (int bit = 30; bit >= 0; --bit) {
            const unsigned trial = cut | (1u << bit);
            int reached = 0;
#pragma unroll
            for (int item = 0; item < ITEMS; ++item) reached += keys[item] >= trial;
            reached = totals.sum(reached);
            if (reached >= MOST) {
                cut = trial;
                over = reached;
            }
            if (reached == MOST) break;
        }
        if (cut < 2u) {
            cut = 2;
        } else if (over > MOST) {
            // Of equals at the cut only the first ones stay.
            int above = 0;
#pragma unroll
            for (int item = 0; item < ITEMS; ++item) above += keys[item] > cut;
            int room = MOST - totals.sum(above);
#pragma unroll
            for (int item = 0; item < ITEMS; ++item) {
                int found;
                const bool equal = keys[item] == cut;
                if (totals.rank(equal, found) >= room && equal) keys[item] = 0;
                room -= found;
            }
        }
    }

    // In order of confidence where there was a cut, else of position.
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const unsigned position = item * THREADS + thread;
        if (keys[item] >= cut) list[atomicAdd(&listed, 1)] = Keyed{too_many ? ~keys[item] : 0u, position};
    }
    __syncthreads();
    const int count = listed;
    sort(list, count);
    for (int place = thread; place < MOST; place += THREADS) valid[image * MOST + place] = place < count;
    for (int number = thread; number < MOST * 4; number += THREADS) {
        const int place = number / 4;
        boxes[image * MOST * 4 + number] = place < count ? anchors[anchor_at(list[place].low) * 5 + number % 4] : 0.0f;
    }
}
