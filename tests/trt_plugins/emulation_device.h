// The part of device.cuh that is machine code on a GPU, for emulation.h.
#pragma once

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }
inline float to_float(Half value) {
    const unsigned exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    float size;
    if (exponent == 31) {
        size = fraction ? NAN : INFINITY;
    } else {
        size = exponent ? std::ldexp(float(fraction + 1024), int(exponent) - 25) : std::ldexp(float(fraction), -24);
    }
    return value.bits & 0x8000 ? -size : size;
}

template <>
struct Convert<float> {
    static float from(float value) { return value; }
};
template <>
struct Convert<Half> {
    static Half from(float value) {
        const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
        const float size = std::fabs(value);
        if (std::isnan(value)) return Half{static_cast<unsigned short>(sign | 0x7e00)};
        if (size >= 65520.0f) return Half{static_cast<unsigned short>(sign | 0x7c00)};
        if (size < 6.103515625e-05f) {  // 2^-14: subnormal, in steps of 2^-24
            return Half{static_cast<unsigned short>(sign | unsigned(std::nearbyint(std::ldexp(size, 24))))};
        }
        int exponent;
        const float fraction = std::frexp(size, &exponent);  // in [0.5, 1)
        const unsigned steps = unsigned(std::nearbyint(std::ldexp(fraction, 11)));  // 1024..2048; a carry moves up
        return Half{static_cast<unsigned short>(sign | (unsigned((exponent + 13) << 10) + steps))};
    }
};
template <>
struct Convert<BFloat16> {
    static BFloat16 from(float value) {
        const unsigned bits = __float_as_uint(value);
        if (std::isnan(value)) return BFloat16{0x7fff};
        return BFloat16{static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
    }
};

template <class Element>
unsigned pack(Element, float first, float second) {
    return unsigned(Convert<Element>::from(second).bits) << 16 | Convert<Element>::from(first).bits;
}
inline float approximate_tanh(float value) { return std::tanh(value); }
inline float approximate_exp2(float value) { return std::exp2(value); }

inline float warp_sum(float value) {
    return emulation::across_warp(value, [](float* values, unsigned lane) {
        // As the butterfly does it, so that rounding is the same.
        for (unsigned distance = 16; distance > 0; distance /= 2) {
            float next[32];
            for (unsigned own = 0; own < 32; ++own) next[own] = values[own] + values[own ^ distance];
            std::memcpy(values, next, sizeof(next));
        }
        return values[lane];
    });
}
inline int warp_count(int value) {
    return emulation::across_warp(value, [](int* values, unsigned) {
        int sum = 0;
        for (int lane = 0; lane < 32; ++lane) sum += values[lane];
        return sum;
    });
}
inline unsigned warp_max(unsigned value) {
    return emulation::across_warp(value, [](unsigned* values, unsigned) {
        unsigned best = 0;
        for (int lane = 0; lane < 32; ++lane) best = max(best, values[lane]);
        return best;
    });
}
inline unsigned warp_min(unsigned value) { return ~warp_max(~value); }
inline unsigned warp_ballot(bool flag) {
    return emulation::across_warp(flag, [](bool* flags, unsigned) {
        unsigned bits = 0;
        for (int lane = 0; lane < 32; ++lane) bits |= unsigned(flags[lane]) << lane;
        return bits;
    });
}

inline void copy_16_bytes(void* shared, const void* global) {
    emulation::require_alignment(shared, 16);
    emulation::require_alignment(global, 16);
    std::memcpy(shared, global, 16);
}
inline void wait_for_copies() {}

// Layouts as the PTX manual gives them for `ldmatrix` and `mma.m16n8k16`.
inline void load_tiles(unsigned (&tiles)[4], const void* row) {
    emulation::require_alignment(row, 16);
    emulation::across_warp(row, [&](const void** rows, unsigned lane) {
        for (int tile = 0; tile < 4; ++tile) {
            std::memcpy(&tiles[tile], static_cast<const char*>(rows[tile * 8 + lane / 4]) + lane % 4 * 4, 4);
        }
        return 0;
    });
}
inline void load_tiles_transposed(unsigned (&tiles)[2], const void* row) {
    emulation::require_alignment(row, 16);
    emulation::across_warp(row, [&](const void** rows, unsigned lane) {
        for (int tile = 0; tile < 2; ++tile) {
            for (unsigned item = 0; item < 2; ++item) {
                const char* source = static_cast<const char*>(rows[tile * 8 + lane % 4 * 2 + item]) + lane / 4 * 2;
                std::memcpy(reinterpret_cast<char*>(&tiles[tile]) + item * 2, source, 2);
            }
        }
        return 0;
    });
}

template <class Element>
struct TensorCore {
    static float item(const unsigned* pairs, int lane, int index) {
        Element both[2];
        std::memcpy(both, &pairs[lane], sizeof(both));
        return to_float(both[index]);
    }
    static void multiply(float (&sum)[4], const unsigned (&left)[4], const unsigned (&right)[2]) {
        unsigned all_left[4][32], all_right[2][32];
        const auto keep = [](unsigned value, unsigned* all) {
            emulation::across_warp(value, [all](unsigned* values, unsigned) {
                std::memcpy(all, values, 32 * sizeof(unsigned));
                return 0;
            });
        };
        for (int part = 0; part < 4; ++part) keep(left[part], all_left[part]);
        for (int part = 0; part < 2; ++part) keep(right[part], all_right[part]);
        const int lane = emulation::current % 32;
        for (int index = 0; index < 4; ++index) {
            const int row = lane / 4 + index / 2 * 8, column = lane % 4 * 2 + index % 2;
            for (int depth = 0; depth < 16; ++depth) {
                const int owner = depth % 8 / 2;
                sum[index] += item(all_left[row / 8 + depth / 8 * 2], row % 8 * 4 + owner, depth % 2) *
                              item(all_right[depth / 8], column * 4 + owner, depth % 2);
            }
        }
    }
};
