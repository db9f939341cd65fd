// AdaptiveProbing: thresholds, suppression in confidence order and the crops, one launch for all images.
//
// Grid (SLICES, images). Every block of an image makes the same choice, which is cheap, and crops its share of the
// places; slice 0 writes what there is once per image. Candidates are sorted in shared memory and taken 32 at a time: all
// warps compare them with the squares chosen so far and with each other, then one warp settles who stays. Compile-time
// constants: ELEMENT, ANCHORS, CHANNELS, STRIDE, CAPACITY, THREADS, SLICES.
#include "device.cuh"

constexpr int PATCH_SIDE = 15;
constexpr int PATCH_CELLS = PATCH_SIDE * PATCH_SIDE;
constexpr float SIDE = float(PATCH_SIDE * STRIDE);
constexpr float CONFIDENCE_LOW = 0.1f;
constexpr float CONFIDENCE_HIGH = 0.7f;
constexpr int WARPS = THREADS / WARP_SIZE;

static_assert(THREADS % WARP_SIZE == 0, "whole warps");
static_assert(8.0 * PATCH_CELLS / 5 * STRIDE * STRIDE < (1 << 24), "see overlaps()");

struct Centre {
    float x, y;
};
constexpr float FAR_AWAY = 1e30f;

// Whether two squares' IoU is over a quarter, as the definition's floats have it. There, `shared / united` rounds to over
// 0.25 exactly if `shared > united / 4`, both being floats. And as `united` is `2 SIDE^2 - shared`, rounded, that holds
// exactly if `shared` is over `2 SIDE^2 / 5`, a whole number that a float holds: rounding keeps the order. The steps up
// to `shared` round as the definition's do. One side may stay negative, because the other is not.
__device__ bool overlaps(Centre one, Centre other) {
    const float shared_x = fmaxf(__fsub_rn(SIDE, fabsf(__fsub_rn(one.x, other.x))), 0.0f);
    const float shared_y = __fsub_rn(SIDE, fabsf(__fsub_rn(one.y, other.y)));
    return __fmul_rn(shared_x, shared_y) > 2.0f * PATCH_CELLS / 5 * STRIDE * STRIDE;
}

// First cell of a patch along one axis: moved back to end by the content's end, not under 0.
__device__ int first_cell(float centre, float content) {
    const float last = ceilf(content / STRIDE) - PATCH_SIDE;
    return int(fmaxf(fminf(floorf(centre / STRIDE - PATCH_SIDE / 2.0f), last), 0.0f));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    adaptive_probing(const float* __restrict__ anchors, const unsigned char* __restrict__ valid,
                     const ELEMENT* __restrict__ feature, const float* __restrict__ sizes, int height, int width,
                     ELEMENT* __restrict__ patches, long long* __restrict__ corners, unsigned char* __restrict__ taken,
                     unsigned char* __restrict__ candidate, int* __restrict__ overflow) {
    __shared__ Keyed list[ANCHORS];
    __shared__ unsigned overlapped[WARPS][WARP_SIZE];
    __shared__ Centre centres[(CAPACITY + WARPS - 1) / WARPS * WARPS];
    __shared__ int asking, chosen_so_far, left_over;

    const int thread = threadIdx.x, lane = thread % WARP_SIZE, warp = thread / WARP_SIZE;
    const int slice = blockIdx.x;
    const long long image = blockIdx.y;
    anchors += image * ANCHORS * 5;
    valid += image * ANCHORS;
    candidate += image * ANCHORS;

    if (thread == 0) asking = chosen_so_far = left_over = 0;
    for (int place = thread; place < (CAPACITY + WARPS - 1) / WARPS * WARPS; place += THREADS) {
        centres[place] = Centre{FAR_AWAY, FAR_AWAY};
    }
    __syncthreads();
    for (int anchor = thread; anchor < ANCHORS; anchor += THREADS) {
        const float* row = anchors + anchor * 5;
        const float confidence = row[4];
        const bool asks = valid[anchor] && row[2] < SIDE / 2 && row[3] < SIDE / 2 && confidence > CONFIDENCE_LOW &&
                          confidence < CONFIDENCE_HIGH;
        // The order of arrival does not show: the keys all differ and are sorted next, the most confident first. Bits of
        // positive floats order as the floats do.
        if (asks) list[atomicAdd(&asking, 1)] = Keyed{~__float_as_uint(confidence), unsigned(anchor)};
        if (slice == 0) candidate[anchor] = asks;
    }
    __syncthreads();
    const int count = asking;
    sort(list, count);
    for (int index = thread; index < count; index += THREADS) {
        const float* row = anchors + list[index].low * 5;
        list[index] = Keyed{__float_as_uint(row[0]), __float_as_uint(row[1])};
    }
    __syncthreads();

    int chosen = 0;
    for (int first = 0; first < count; first += WARP_SIZE) {
        // Of lane's candidate: bit `lane` if it is out, bit i < lane if candidate i of the 32 overlaps it.
        const auto candidate_at = [&](int index) {
            const Keyed found = list[min(first + index, count - 1)];
            return Centre{__uint_as_float(found.high), __uint_as_float(found.low)};
        };
        const Centre own = candidate_at(lane);
        bool out = first + lane >= count;
        for (int other = 0; other < chosen; other += WARPS) out |= overlaps(own, centres[other + warp]);
        unsigned bits = unsigned(out) << lane;
#pragma unroll
        for (int other = 0; other < WARP_SIZE; other += WARPS) {
            const int index = other + warp;
            bits |= unsigned(index < lane && overlaps(own, candidate_at(index))) << index % WARP_SIZE;
        }
        overlapped[warp][lane] = bits;
        __syncthreads();
        if (warp == 0) {
            for (int other = 1; other < WARPS; ++other) bits |= overlapped[other][lane];
            const unsigned own_bit = 1u << lane, before = bits & (own_bit - 1);
            const bool stands = !(bits & own_bit);
            // Whoever is overlapped by nobody before it that is still open, is taken; whom the taken overlap, goes.
            unsigned open = warp_ballot(stands), taken_bits = 0;
            while (open) {
                const unsigned wins = warp_ballot((open & own_bit) && !(before & open));
                open &= ~(wins | warp_ballot(before & wins));
                taken_bits |= wins;
            }
            const int place = chosen + __popc(taken_bits & (own_bit - 1));
            const bool kept = (taken_bits & own_bit) && place < CAPACITY;
            if (kept) centres[place] = own;
            const unsigned kept_bits = warp_ballot(kept);
            const unsigned left = warp_ballot(stands && !kept && !(before & kept_bits));
            if (lane == 0) {
                chosen_so_far = chosen + __popc(kept_bits);
                left_over += __popc(left);
            }
        }
        __syncthreads();
        chosen = chosen_so_far;
    }

    const float content_height = sizes[image * 2], content_width = sizes[image * 2 + 1];
    if (slice == 0) {
        if (thread == 0) overflow[image] = left_over;
        for (int place = thread; place < CAPACITY; place += THREADS) {
            const bool used = place < chosen;
            taken[image * CAPACITY + place] = used;
            corners[(image * CAPACITY + place) * 2] = used ? first_cell(centres[place].x, content_width) : 0;
            corners[(image * CAPACITY + place) * 2 + 1] = used ? first_cell(centres[place].y, content_height) : 0;
        }
    }

    const long long map_cells = (long long)height * width;
    feature += image * CHANNELS * map_cells;
    patches += image * CAPACITY * PATCH_CELLS * CHANNELS;
    constexpr int PACKET = PacketSize<ELEMENT, CHANNELS>::value;
    const int own_places = (CAPACITY - slice + SLICES - 1) / SLICES;
    for (int work = thread; work < own_places * PATCH_CELLS; work += THREADS) {
        const int place = slice + work / PATCH_CELLS * SLICES, cell = work % PATCH_CELLS;
        int column = 0, row = 0;
        bool inside = place < chosen;
        if (inside) {
            column = first_cell(centres[place].x, content_width) + cell % PATCH_SIDE;
            row = first_cell(centres[place].y, content_height) + cell / PATCH_SIDE;
            inside = column < width && row < height;
        }
        const ELEMENT* source = feature + (inside ? (long long)row * width + column : 0);
        ELEMENT* target = patches + ((long long)place * PATCH_CELLS + cell) * CHANNELS;
#pragma unroll
        for (int channel = 0; channel < CHANNELS; channel += PACKET) {
            Packet<ELEMENT, PACKET> packet;
#pragma unroll
            for (int item = 0; item < PACKET; ++item) {
                packet.items[item] = inside ? source[(channel + item) * map_cells] : Convert<ELEMENT>::from(0.0f);
            }
            *reinterpret_cast<Packet<ELEMENT, PACKET>*>(target + channel) = packet;
        }
    }
}
