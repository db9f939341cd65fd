// Runs a CUDA kernel's own source on the CPU: blocks one after another, the threads of a block as fibers.
//
// Covered: block and warp barriers, static shared memory, the warp functions of device.cuh. A fiber runs until it waits. A
// barrier that not all threads reach, or an address that is not aligned as a GPU needs it, is reported as a failure. The
// order in which threads run is a parameter, so that a missing barrier shows as a difference between two orders.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

#define ASAG_EMULATION 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulation {

inline dim3 thread_index, block_index;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
    State state = State::ready;
    bool started = false;
    jmp_buf place;
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(256 * 1024);
};

inline std::vector<Fiber> fibers;
inline unsigned count = 0, current = 0;
inline jmp_buf scheduler;
inline void (*body)(void*) = nullptr;
inline void* body_argument = nullptr;
inline uint64_t exchange[32][32];  // [warp][lane]
inline const char* failure = nullptr;

inline void require_alignment(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes) failure = "an address is not aligned";
}

inline void wait(State state) {
    const unsigned own = current;
    fibers[own].state = state;
    if (!_setjmp(fibers[own].place)) _longjmp(scheduler, 1);
}

inline void enter() {
    body(body_argument);
    fibers[current].state = State::done;
    _longjmp(scheduler, 1);
}

inline void resume(unsigned index) {
    current = index;
    thread_index.x = index;
    if (_setjmp(scheduler)) return;
    Fiber& fiber = fibers[index];
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    setcontext(&fiber.context);
}

// Let the threads of [first, last) go on if all that live wait at `barrier`. Returns whether any did.
inline bool release(unsigned first, unsigned last, State barrier) {
    bool any = false;
    for (unsigned index = first; index < last; ++index) {
        if (fibers[index].state == State::done) continue;
        if (fibers[index].state != barrier) return false;
        any = true;
    }
    for (unsigned index = first; any && index < last; ++index) {
        if (fibers[index].state == barrier) fibers[index].state = State::ready;
    }
    return any;
}

inline void run_block(bool backwards) {
    for (unsigned index = 0; index < count; ++index) {
        fibers[index].state = State::ready;
        fibers[index].started = false;
    }
    const unsigned warps = (count + 31) / 32;
    for (;;) {
        // A warp runs ahead as far as it can: nothing but a block barrier holds it back on a GPU either.
        for (unsigned step = 0; step < warps; ++step) {
            const unsigned first = 32 * (backwards ? warps - 1 - step : step);
            do {
                for (unsigned lane = 0; lane < 32; ++lane) {
                    const unsigned index = first + (backwards ? 31 - lane : lane);
                    if (fibers[index].state == State::ready) resume(index);
                }
            } while (release(first, first + 32, State::at_warp_barrier));
        }
        if (release(0, count, State::at_block_barrier)) continue;
        for (unsigned index = 0; index < count; ++index) {
            if (fibers[index].state != State::done) failure = "threads wait at different barriers";
        }
        return;
    }
}

template <class... Arguments, size_t... Index>
void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<Index...>) {
    kernel(*static_cast<Arguments*>(arguments[Index])...);
}

// As cuLaunchKernel: `arguments` points at the values of the kernel's arguments. Returns what went wrong, or null.
template <class... Arguments>
const char* launch(void (*kernel)(Arguments...), const unsigned* grid, unsigned threads, void** arguments, bool backwards) {
    struct Bound {
        void (*kernel)(Arguments...);
        void** arguments;
    } bound{kernel, arguments};
    body = [](void* pointer) {
        auto* inner = static_cast<Bound*>(pointer);
        call(inner->kernel, inner->arguments, std::index_sequence_for<Arguments...>());
    };
    body_argument = &bound;
    failure = nullptr;
    count = threads;
    if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    for (block_index.z = 0; block_index.z < grid[2]; ++block_index.z)
        for (block_index.y = 0; block_index.y < grid[1]; ++block_index.y)
            for (block_index.x = 0; block_index.x < grid[0] && !failure; ++block_index.x) run_block(backwards);
    return failure;
}

// Every lane gives a value; afterwards all see all. The second barrier keeps a fast lane from overwriting.
template <class Value, class Use>
auto across_warp(Value value, Use use) {
    const unsigned warp = current / 32, lane = current % 32;
    std::memcpy(&exchange[warp][lane], &value, sizeof(value));
    wait(State::at_warp_barrier);
    Value values[32];
    for (int other = 0; other < 32; ++other) std::memcpy(&values[other], &exchange[warp][other], sizeof(value));
    wait(State::at_warp_barrier);
    return use(values, lane);
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index

inline void __syncthreads() { emulation::wait(emulation::State::at_block_barrier); }
inline int atomicAdd(int* target, int value) { return std::exchange(*target, *target + value); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float __fdividef(float one, float other) { return one / other; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
// The compiler is told not to fuse multiplications and additions, so plain operators round as these do.
inline float __fadd_rn(float one, float other) { return one + other; }
inline float __fsub_rn(float one, float other) { return one - other; }
inline float __fmul_rn(float one, float other) { return one * other; }
template <class Number>
Number min(Number one, Number other) { return other < one ? other : one; }
template <class Number>
Number max(Number one, Number other) { return one < other ? other : one; }
