// SampleGrid: maps read bilinearly at places of a grid.
//
// Grid (places / THREADS, channels / TOGETHER, images). A thread works out one place, its four cells and their shares,
// and reads them of TOGETHER channels; neighbouring threads write neighbouring places.
// Compile-time constants: ELEMENT, CHANNELS, HEIGHT, WIDTH, POINTS (places of an image), BORDER (what lies around a map: 0 zeros, 1 its
// border), ALIGNED (whether -1 and 1 are centres of cells), TOGETHER, THREADS.
#include "device.cuh"

constexpr int CELLS = HEIGHT * WIDTH;

// A side of a sample: the two cells next to it, held inside the map, and their shares, 0 for what lies outside.
__device__ __forceinline__ void find_side(float place, float cells, int (&held)[2], float (&shares)[2]) {
    // Of what is no number, both bounds give the lower.
    const float near = fminf(fmaxf(place, -3.0f), 3.0f);
    float at = ((near + 1.0f) * (cells - ALIGNED) - (1.0f - ALIGNED)) / 2.0f;
    if (BORDER) at = fminf(fmaxf(at, 0.0f), cells - 1.0f);
    const float before = floorf(at), after = before + 1.0f;
    const float first = fminf(fmaxf(before, 0.0f), cells - 1.0f), second = fminf(fmaxf(after, 0.0f), cells - 1.0f);
    held[0] = int(first);
    held[1] = int(second);
    shares[0] = first == before ? after - at : 0.0f;
    shares[1] = second == after ? at - before : 0.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sample_grid(const ELEMENT* __restrict__ value, const float* __restrict__ grid, ELEMENT* __restrict__ samples) {
    const int point = blockIdx.x * THREADS + threadIdx.x;
    if (point >= POINTS) return;
    const auto place = reinterpret_cast<const Packet<float, 2>*>(grid)[blockIdx.z * (long long)POINTS + point];
    int x[2], y[2];
    float shares_x[2], shares_y[2];
    find_side(place.items[0], WIDTH, x, shares_x);
    find_side(place.items[1], HEIGHT, y, shares_y);
    const int first = blockIdx.y * TOGETHER;
    const long long row = blockIdx.z * (long long)CHANNELS + first;
    value += row * CELLS;
    samples += row * POINTS + point;
#pragma unroll 4
    for (int channel = 0; channel < TOGETHER; ++channel) {
        if (CHANNELS % TOGETHER != 0 && first + channel >= CHANNELS) return;
        float sum = 0.0f;
#pragma unroll
        for (int below = 0; below < 2; ++below) {
#pragma unroll
            for (int beside = 0; beside < 2; ++beside) {
                sum += shares_y[below] * shares_x[beside] * to_float(value[y[below] * WIDTH + x[beside]]);
            }
        }
        *samples = Convert<ELEMENT>::from(sum);
        value += CELLS;
        samples += POINTS;
    }
}
