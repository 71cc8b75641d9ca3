// Instructions of a warp and of a thread: mma.sync, ldmatrix, shuffles, cp.async.
#include <cstring>

#include "machine.h"

namespace cuda_emulation {
namespace {

enum Instruction { MULTIPLY_ADD = 1, LOAD_MATRICES, SHUFFLE, MULTIPLY_ADD_INTEGERS, SYNC, ANY };

}  // namespace

// Layouts of the fragments as in the PTX manual, mma.m16n8k16 with 16-bit elements.
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*to_float)(uint16_t)) {
    const unsigned lane = current->lane;
    Warp& warp = *current->warp;
    std::memcpy(warp.c[lane], c, sizeof c);
    std::memcpy(warp.words[lane], a, sizeof a);
    warp.words[lane][4] = b0, warp.words[lane][5] = b1;
    warp_instruction(MULTIPLY_ADD, [&](Warp& w) {
        float left[16][16], right[16][8];
        for (unsigned l = 0; l < WARP; ++l)
            for (unsigned i = 0; i < 12; ++i) {
                const float x = to_float(uint16_t(w.words[l][i / 2] >> i % 2 * 16));
                const unsigned inner = l % 4 * 2 + i % 2;
                if (i < 8)
                    left[l / 4 + i / 2 % 2 * 8][inner + i / 4 * 8] = x;
                else
                    right[inner + (i - 8) / 2 * 8][l / 4] = x;
            }
        for (unsigned l = 0; l < WARP; ++l)
            for (unsigned i = 0; i < 4; ++i) {
                double sum = w.c[l][i];
                for (unsigned k = 0; k < 16; ++k)
                    sum += double(left[l / 4 + i / 2 * 8][k]) * right[k][l % 4 * 2 + i % 2];
                w.c[l][i] = float(sum);
            }
    });
    std::memcpy(c, warp.c[lane], sizeof c);
}

// mma.m16n8k32 with int8: words lie as with 16-bit elements, each of four numbers.
void multiply_add_integers(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const unsigned lane = current->lane;
    Warp& warp = *current->warp;
    std::memcpy(warp.c[lane], c, sizeof c);
    std::memcpy(warp.words[lane], a, sizeof a);
    warp.words[lane][4] = b0, warp.words[lane][5] = b1;
    warp_instruction(MULTIPLY_ADD_INTEGERS, [&](Warp& w) {
        int8_t left[16][32], right[8][32];
        for (unsigned l = 0; l < WARP; ++l)
            for (unsigned i = 0; i < 4; ++i) {
                std::memcpy(&left[l / 4 + i % 2 * 8][l % 4 * 4 + i / 2 * 16], &w.words[l][i], 4);
                if (i < 2) std::memcpy(&right[l / 4][l % 4 * 4 + i * 16], &w.words[l][4 + i], 4);
            }
        for (unsigned l = 0; l < WARP; ++l)
            for (unsigned i = 0; i < 4; ++i) {
                int32_t sum;
                std::memcpy(&sum, &w.c[l][i], 4);
                const int8_t *x = left[l / 4 + i / 2 * 8], *y = right[l % 4 * 2 + i % 2];
                for (unsigned k = 0; k < 32; ++k) sum = int32_t(uint32_t(sum) + uint32_t(int32_t(x[k]) * y[k]));
                std::memcpy(&w.c[l][i], &sum, 4);
            }
    });
    std::memcpy(c, warp.c[lane], sizeof c);
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
    const unsigned lane = current->lane;
    Warp& warp = *current->warp;
    warp.rows[lane] = check_shared(row, 16, 16);
    warp_instruction(LOAD_MATRICES + transposed * 100, [&](Warp& w) {
        for (unsigned l = 0; l < WARP; ++l)
            for (unsigned i = 0; i < 8; ++i) {
                const unsigned matrix = i / 2, across = l % 4 * 2 + i % 2;
                const unsigned y = transposed ? across : l / 4, x = transposed ? l / 4 : across;
                uint16_t element;
                std::memcpy(&element, w.rows[matrix * 8 + y] + 2 * x, 2);
                uint32_t& word = w.words[l][matrix];
                word = i % 2 ? word | uint32_t(element) << 16 : element;
            }
    });
    std::memcpy(r, warp.words[lane], sizeof r);
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

namespace vpd::device {

void async_copy_16(void* shared, const void* global, bool valid) {
    check_shared(shared, 16, 16);
    if (valid) check_global(global, 16, false);
    std::memset(shared, NAN_BYTE, 16);
    current->groups.back().push_back({shared, valid ? global : nullptr});
}

void async_commit() { current->groups.emplace_back(); }

void wait_for_copies(int pending) {
    while (current->groups.size() > size_t(pending) + 1) {
        for (const Copy& copy : current->groups.front())
            if (copy.global)
                std::memcpy(copy.shared, copy.global, 16);
            else
                std::memset(copy.shared, 0, 16);
        current->groups.pop_front();
    }
}

void sync_warp() {
    warp_instruction(SYNC, [](Warp&) {});
}

bool any_in_warp(bool x) {
    Warp& warp = *current->warp;
    warp.words[current->lane][0] = x;
    warp_instruction(ANY, [&](Warp& w) {
        uint32_t any = 0;
        for (unsigned l = 0; l < WARP; ++l) any |= w.words[l][0];
        for (unsigned l = 0; l < WARP; ++l) w.words[l][1] = any;
    });
    return warp.words[current->lane][1];
}

float shuffle_xor(float x, int mask) {
    Warp& warp = *current->warp;
    warp.c[current->lane][0] = x;
    warp_instruction(SHUFFLE, [&](Warp& w) {
        for (unsigned l = 0; l < WARP; ++l) w.c[l][1] = w.c[l ^ mask][0];
    });
    return warp.c[current->lane][1];
}

}  // namespace vpd::device
