// AdaptiveProbing: thresholds, suppression in confidence order and the crops, one launch for all images.
//
// Grid (SLICES, images). Every block of an image makes the same choice, which is cheap, and crops its share of the places;
// slice 0 writes what there is once per image. Compile-time constants: ELEMENT, ANCHORS, CHANNELS, STRIDE, CAPACITY,
// THREADS, SLICES.
#include "device.cuh"

constexpr int PATCH_SIDE = 15;
constexpr int PATCH_CELLS = PATCH_SIDE * PATCH_SIDE;
constexpr float SIDE = float(PATCH_SIDE * STRIDE);
constexpr float CONFIDENCE_LOW = 0.1f;
constexpr float CONFIDENCE_HIGH = 0.7f;
constexpr float SUPPRESSION_IOU = 0.25f;  // a power of two: see overlaps()
constexpr int WARPS = THREADS / WARP_SIZE;
constexpr int ITEMS = (ANCHORS + THREADS - 1) / THREADS;
constexpr unsigned NOTHING = 0xffffffffu;

static_assert(THREADS % WARP_SIZE == 0 && WARPS <= WARP_SIZE, "the second reduction is one warp wide");

// The best square of a warp. `confidence` is the float's bits: for positive floats they order as the values do.
struct Contender {
    unsigned confidence;
    unsigned anchor;
    float x, y;
};

// Whether two squares' IoU is over the threshold. `shared > 0.25 * united` is exactly `round(shared / united) > 0.25`: the
// product is exact, and a quotient over a power of two cannot round down to it, because both numbers are floats.
// Every step rounds as the definition's, so that the same squares go.
__device__ bool overlaps(float x, float y, float other_x, float other_y) {
    const float shared_x = fmaxf(__fsub_rn(SIDE, fabsf(__fsub_rn(x, other_x))), 0.0f);
    const float shared_y = fmaxf(__fsub_rn(SIDE, fabsf(__fsub_rn(y, other_y))), 0.0f);
    const float shared = __fmul_rn(shared_x, shared_y);
    return shared > SUPPRESSION_IOU * __fsub_rn(2.0f * SIDE * SIDE, shared);
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
    __shared__ Contender contenders[2][WARPS];
    __shared__ float centre_x[CAPACITY], centre_y[CAPACITY];
    __shared__ int left_over;

    const int thread = threadIdx.x, lane = thread % WARP_SIZE, warp = thread / WARP_SIZE;
    const int slice = blockIdx.x;
    const long long image = blockIdx.y;
    anchors += image * ANCHORS * 5;
    valid += image * ANCHORS;
    candidate += image * ANCHORS;

    // Bits of the confidence of a square that still takes part, else 0.
    unsigned remaining[ITEMS];
    float x[ITEMS], y[ITEMS];
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const int anchor = item * THREADS + thread;
        remaining[item] = 0;
        x[item] = y[item] = 0.0f;
        if (anchor < ANCHORS) {
            const float* row = anchors + anchor * 5;
            const float confidence = row[4];
            x[item] = row[0];
            y[item] = row[1];
            const bool asks = valid[anchor] && row[2] < SIDE / 2 && row[3] < SIDE / 2 && confidence > CONFIDENCE_LOW &&
                              confidence < CONFIDENCE_HIGH;
            if (asks) remaining[item] = __float_as_uint(confidence);
            if (slice == 0) candidate[anchor] = asks;
        }
    }
    if (thread == 0) left_over = 0;

    int chosen = 0;
    for (; chosen < CAPACITY; ++chosen) {
        unsigned best = 0, best_anchor = NOTHING;
        float best_x = 0.0f, best_y = 0.0f;
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
            if (remaining[item] > best) {  // of equals the first, because a thread's anchors rise
                best = remaining[item];
                best_anchor = item * THREADS + thread;
                best_x = x[item];
                best_y = y[item];
            }
        }
        // The two halves of `contenders` alternate, so that one barrier per round is enough.
        Contender* round = contenders[chosen % 2];
        unsigned top = warp_max(best);
        unsigned first = warp_min(best == top ? best_anchor : NOTHING);
        if (top == 0 ? lane == 0 : best_anchor == first) round[warp] = Contender{top, first, best_x, best_y};
        __syncthreads();
        const unsigned rival = lane < WARPS ? round[lane].confidence : 0;
        top = warp_max(rival);
        if (top == 0) break;  // the same for the whole block
        first = warp_min(lane < WARPS && rival == top ? round[lane].anchor : NOTHING);
        const Contender winner = round[first % THREADS / WARP_SIZE];
        if (thread == 0) {
            centre_x[chosen] = winner.x;
            centre_y[chosen] = winner.y;
        }
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
            if (overlaps(x[item], y[item], winner.x, winner.y) || item * THREADS + thread == first) remaining[item] = 0;
        }
    }

    int left = 0;
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) left += remaining[item] > 0;
    if (left > 0) atomicAdd(&left_over, left);  // whole numbers: the order does not show
    __syncthreads();

    const float content_height = sizes[image * 2], content_width = sizes[image * 2 + 1];
    if (slice == 0) {
        if (thread == 0) overflow[image] = left_over;
        for (int place = thread; place < CAPACITY; place += THREADS) {
            const bool used = place < chosen;
            taken[image * CAPACITY + place] = used;
            corners[(image * CAPACITY + place) * 2] = used ? first_cell(centre_x[place], content_width) : 0;
            corners[(image * CAPACITY + place) * 2 + 1] = used ? first_cell(centre_y[place], content_height) : 0;
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
            column = first_cell(centre_x[place], content_width) + cell % PATCH_SIDE;
            row = first_cell(centre_y[place], content_height) + cell / PATCH_SIDE;
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
