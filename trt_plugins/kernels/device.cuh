// What the kernels need of the device beyond plain C++: 16-bit floats, reductions over a warp, asynchronous copies and
// tensor cores. Nothing is included from the CUDA toolkit, so NVRTC alone compiles it.
#pragma once

// Storage of 16-bit floats. Arithmetic is always float.
struct Half {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr int WARP_SIZE = 32;

template <class To>
struct Convert;

__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float to_float(Half value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

__device__ __forceinline__ float to_float(BFloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }

template <>
struct Convert<float> {
    static __device__ __forceinline__ float from(float value) { return value; }
};

template <>
struct Convert<Half> {
    static __device__ __forceinline__ Half from(float value) {
        Half result;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
        return result;
    }
};

template <>
struct Convert<BFloat16> {
    // To nearest, ties to even, in integers: the instruction is missing before compute capability 8.0.
    static __device__ __forceinline__ BFloat16 from(float value) {
        const unsigned bits = __float_as_uint(value);
        const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        return BFloat16{static_cast<unsigned short>(value != value ? 0x7fffu : rounded)};
    }
};

// Two 16-bit floats in one word, the first in the lower half; from compute capability 8.0 on.
__device__ __forceinline__ unsigned pack(Half, float first, float second) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

__device__ __forceinline__ unsigned pack(BFloat16, float first, float second) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

// Relative error up to 2^-11.
__device__ __forceinline__ float approximate_tanh(float value) {
    float result;
    asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// 2^value with a relative error up to 2^-22; below 2^-126 it is 0.
__device__ __forceinline__ float approximate_exp2(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// All lanes get the result; all lanes must take part. The order of a sum is fixed, so its bits are.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int lane = WARP_SIZE / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(FULL_WARP, value, lane);
    return value;
}

// Exact, and so without an order.
__device__ __forceinline__ int warp_count(int value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(FULL_WARP, value);
#else
#pragma unroll
    for (int lane = WARP_SIZE / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(FULL_WARP, value, lane);
    return value;
#endif
}

__device__ __forceinline__ unsigned warp_max(unsigned value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(FULL_WARP, value);
#else
#pragma unroll
    for (int lane = WARP_SIZE / 2; lane > 0; lane /= 2) value = max(value, __shfl_xor_sync(FULL_WARP, value, lane));
    return value;
#endif
}

__device__ __forceinline__ unsigned warp_min(unsigned value) { return ~warp_max(~value); }

__device__ __forceinline__ unsigned warp_ballot(bool flag) { return __ballot_sync(FULL_WARP, flag); }

// Copy 16 bytes from global to shared memory; they are there after wait_for_copies() and a barrier.
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Four 8x8 tiles of 16-bit elements; lane i names row i%8 of tile i/8. A lane gets two neighbours of row lane/4 per tile.
__device__ __forceinline__ void load_tiles(unsigned (&tiles)[4], const void* row) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(address)
                 : "memory");
}

// Two 8x8 tiles, transposed: a lane gets two neighbours of column lane/4 per tile. Lane i < 16 names row i%8 of tile i/8.
__device__ __forceinline__ void load_tiles_transposed(unsigned (&tiles)[2], const void* row) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(tiles[0]), "=r"(tiles[1])
                 : "r"(address)
                 : "memory");
}

template <class Element>
struct TensorCore;

// sum[16 x 8] += left[16 x 16] * right[16 x 8], in float; lane i holds rows i/4 and i/4 + 8, columns i%4*2 and the next.
template <>
struct TensorCore<Half> {
    static __device__ __forceinline__ void multiply(float (&sum)[4], const unsigned (&left)[4],
                                                    const unsigned (&right)[2]) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
    }
};

template <>
struct TensorCore<BFloat16> {
    static __device__ __forceinline__ void multiply(float (&sum)[4], const unsigned (&left)[4],
                                                    const unsigned (&right)[2]) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
    }
};

// Elements that move together: at most 16 bytes, and a whole number of them in COUNT.
template <class Element, int COUNT>
struct PacketSize {
    static constexpr int value = (COUNT * sizeof(Element)) % 16 == 0  ? 16 / sizeof(Element)
                                 : (COUNT * sizeof(Element)) % 8 == 0 ? 8 / sizeof(Element)
                                 : (COUNT * sizeof(Element)) % 4 == 0 && sizeof(Element) == 2 ? 2
                                                                                              : 1;
};

template <class Element, int SIZE>
struct alignas(SIZE * sizeof(Element)) Packet {
    Element items[SIZE];
};

__device__ __forceinline__ float item_of(float, unsigned word, int) { return __uint_as_float(word); }
__device__ __forceinline__ float item_of(Half, unsigned word, int item) {
    return to_float(Half{static_cast<unsigned short>(word >> 16 * item)});
}
__device__ __forceinline__ float item_of(BFloat16, unsigned word, int item) {
    return __uint_as_float(item == 0 ? word << 16 : word & 0xffff0000u);
}

// Neighbouring elements that move together and become floats; in whole words where they fill some: that takes fewer
// steps.
template <class Element, int COUNT, bool WHOLE_WORDS = COUNT * sizeof(Element) % 4 == 0>
struct Bundle {
    Packet<unsigned, COUNT * sizeof(Element) / 4> words;

    __device__ void clear_unless(bool present) {
#pragma unroll
        for (unsigned& word : words.items) word = present ? word : 0;
    }
    __device__ float operator[](int item) const {
        constexpr int PER_WORD = 4 / sizeof(Element);
        return item_of(Element{}, words.items[item / PER_WORD], item % PER_WORD);
    }
};

template <class Element>
struct Bundle<Element, 1, false> {
    Element element;

    __device__ void clear_unless(bool present) { element.bits = present ? element.bits : 0; }
    __device__ float operator[](int) const { return to_float(element); }
};

struct Pair {
    int first, second;
};

// Sums over the block with one barrier each: two buffers take turns, so that nobody overwrites what others still read.
struct Totals {
    static constexpr int WARPS = THREADS / WARP_SIZE;
    static_assert(THREADS % WARP_SIZE == 0 && WARPS <= WARP_SIZE, "sums over warps are one warp wide");
    using Buffers = int[2][WARPS];

    Buffers& buffers;
    int turn = 0;

    // Of each lane the total of the warp with its number.
    __device__ int exchange(int of_warp) {
        turn ^= 1;
        const int lane = threadIdx.x % WARP_SIZE;
        if (lane == 0) buffers[turn][threadIdx.x / WARP_SIZE] = of_warp;
        __syncthreads();
        return lane < WARPS ? buffers[turn][lane] : 0;
    }
    __device__ int sum(int value) { return warp_count(exchange(warp_count(value))); }
    // How many threads before this one have the flag; `total` becomes the number in the block.
    __device__ int rank(bool flag, int& total) {
        const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
        const unsigned flags = warp_ballot(flag);
        const int of_lane = exchange(__popc(flags));
        total = warp_count(of_lane);
        return warp_count(lane < warp ? of_lane : 0) + __popc(flags & ((1u << lane) - 1));
    }
    // The same of two flags; a block's threads are few enough for both counts in one word.
    __device__ Pair rank(bool first, bool second, Pair& total) {
        const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
        const unsigned firsts = warp_ballot(first), seconds = warp_ballot(second), before = (1u << lane) - 1;
        const int of_lane = exchange(__popc(firsts) | __popc(seconds) << 16);
        const int all = warp_count(of_lane), earlier = warp_count(lane < warp ? of_lane : 0);
        total = Pair{all & 0xffff, all >> 16};
        return Pair{(earlier & 0xffff) + __popc(firsts & before), (earlier >> 16) + __popc(seconds & before)};
    }
};

// Something to sort: by `high`, then by `low`.
struct Keyed {
    unsigned high, low;

    __device__ bool operator<(const Keyed& other) const {
        return high < other.high || (high == other.high && low < other.low);
    }
};

// Sort in shared memory, rising: a bitonic network whose every comparison puts the smaller one first, so that any number
// will do, as if the largest keys of all stood behind. All threads of the block take part; ends with a barrier.
__device__ inline void sort(Keyed* list, unsigned count) {
    for (unsigned width = 2; width < 2 * count; width *= 2) {
        const unsigned pairs = ((count + width - 1) & ~(width - 1)) / 2;
        for (unsigned step = width / 2; step > 0; step /= 2) {
            for (unsigned pair = threadIdx.x; pair < pairs; pair += THREADS) {
                const unsigned offset = pair & (step - 1), first = 2 * pair - offset;
                // The first step of a width pairs its two sorted halves head to tail.
                const unsigned second = step == width / 2 ? first + 2 * (step - offset) - 1 : first + step;
                if (second >= count) continue;
                const Keyed one = list[first], other = list[second];
                if (other < one) {
                    list[first] = other;
                    list[second] = one;
                }
            }
            __syncthreads();
        }
    }
}
