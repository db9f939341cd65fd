// SelectTokens: an image's tokens of largest score in CAPACITY places, one block per image.
//
// The cut between chosen and other tokens is found by bisection over the bits of the scores, which the threads keep in
// registers where these are enough. Chosen tokens fill the first places by rising index, the others the rest: a token's place is counted.
// Compile-time constants: TOKENS, CAPACITY, THREADS.
#include "device.cuh"

constexpr int ITEMS = (TOKENS + THREADS - 1) / THREADS;
constexpr bool HELD = ITEMS <= 32;  // else every look at the scores reads them again
constexpr int UNROLLED = HELD ? ITEMS : 8;
constexpr unsigned SIGN = 1u << 31;

static_assert(0 < CAPACITY && CAPACITY <= TOKENS, "every place is filled");

// A number that orders as the score does and is not 0. What is no number comes last, with minus infinity; what is less
// than the smallest normal number is 0, of either sign.
__device__ unsigned key_of(float score) {
    if (score != score) score = __uint_as_float(0xff800000u);
    unsigned bits = __float_as_uint(score);
    if ((bits & 0x7f800000u) == 0) bits = 0;
    return bits & SIGN ? ~bits : bits | SIGN;
}

// Behind the last token 0.
__device__ unsigned key_at(const float* scores, int token) { return token < TOKENS ? key_of(scores[token]) : 0; }

// One block per image: more than one per multiprocessor is not worth a spill.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    select_tokens(const float* __restrict__ scores, const long long* __restrict__ counts,
                  long long* __restrict__ indices, unsigned char* __restrict__ active) {
    __shared__ Totals::Buffers buffers;

    const int thread = threadIdx.x;
    const long long image = blockIdx.x;
    const long long asked = counts[image];
    const int count = int(asked < 0 ? 0 : asked < CAPACITY ? asked : CAPACITY);
    scores += image * TOKENS;
    indices += image * CAPACITY;
    active += image * CAPACITY;
    Totals totals{buffers};

    unsigned keys[HELD ? ITEMS : 1];
#pragma unroll
    for (int item = 0; item < ITEMS && HELD; ++item) keys[item] = key_at(scores, item * THREADS + thread);
    const auto key = [&](int item) { return HELD ? keys[HELD ? item : 0] : key_at(scores, item * THREADS + thread); };

    // The cut: the greatest number that at least `count` keys reach.
    unsigned cut = 0;
    int over = TOKENS;  // keys that reach the cut
#pragma unroll 1
    for (int bit = 31; bit >= 0 && over > count; --bit) {
        const unsigned trial = cut | (1u << bit);
        int reached = 0;
#pragma unroll(UNROLLED)
        for (int item = 0; item < ITEMS; ++item) reached += key(item) >= trial;
        reached = totals.sum(reached);
        if (reached >= count) {
            cut = trial;
            over = reached;
        }
    }
    if (cut == 0) cut = 1;  // every token is chosen; the keys behind the last one are 0

    // Of equals at the cut only the first ones are chosen.
    int above = 0;
#pragma unroll(UNROLLED)
    for (int item = 0; item < ITEMS; ++item) above += key(item) > cut;
    const int room = count - totals.sum(above);
    int above_before = 0, equal_before = 0;
#pragma unroll(UNROLLED)
    for (int item = 0; item < ITEMS; ++item) {
        const int token = item * THREADS + thread;
        const unsigned own = key(item);
        Pair found;
        const Pair before = totals.rank(own > cut, own == cut, found);
        const int equal_rank = equal_before + before.second;
        const bool chosen = own > cut || (own == cut && equal_rank < room);
        const int rank = above_before + before.first + min(equal_rank, room);
        const int place = chosen ? rank : count + token - rank;
        if (token < TOKENS && place < CAPACITY) indices[place] = token;
        above_before += found.first;
        equal_before += found.second;
    }
    for (int place = thread; place < CAPACITY; place += THREADS) active[place] = place < count;
}
