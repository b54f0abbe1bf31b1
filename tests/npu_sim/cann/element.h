// TEST-ONLY SIMULATOR. 16-bit floating point numbers, of which C++ knows neither kind portably.
#pragma once
#include <cstdint>
#include <cstring>

inline float from_bfloat16(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    if (value != value) {
        return static_cast<uint16_t>(wide >> 16 | 0x40);  // keep a NaN a NaN
    }
    wide += 0x7fff + (wide >> 16 & 1);  // round to nearest, ties to even
    return static_cast<uint16_t>(wide >> 16);
}

using Half = _Float16;
