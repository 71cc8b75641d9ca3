// A ring of stages in shared memory, which one warp fills by TMA and others read.
#pragma once

#include "cuda/hopper.cuh"

namespace vpd::device {

// A stage of a ring, and how often it went round.
template <int STAGES>
struct Place {
    int stage = 0, round = 0;
    __device__ Place next() const { return stage + 1 == STAGES ? Place{0, round + 1} : Place{stage + 1, round}; }
};

template <int COUNT, int BYTES>
struct Ring {
    static constexpr int STAGES = COUNT, STAGE_BYTES = BYTES, BARRIERS = 2 * COUNT;
    using Stage = Place<COUNT>;
    unsigned char* stages;
    uint64_t* barriers;  // of each stage one that says that it is filled, then one that says that it is read
    // Of what is the first, second, ... to go through the ring, from 0.
    static __device__ Stage place_of(int turn) { return {turn % COUNT, turn / COUNT}; }
    __device__ unsigned char* at(int stage) const { return stages + stage * BYTES; }
    __device__ uint64_t* filled(int stage) const { return barriers + 2 * stage; }
    __device__ uint64_t* emptied(int stage) const { return barriers + 2 * stage + 1; }

    // readers: arrivals that say that a stage is read.
    __device__ void initialize(unsigned readers) const {
        for (int i = 0; i < COUNT; ++i) {
            barrier_init(filled(i), 1);
            barrier_init(emptied(i), readers);
        }
    }
    // Waits until the stage can be filled again, and announces what will fill it.
    __device__ void begin_filling(const Stage& place) const {
        if (place.round) barrier_wait(emptied(place.stage), (place.round - 1) & 1);
        barrier_expect(filled(place.stage), BYTES);
    }
    __device__ void wait_until_filled(const Stage& place) const { barrier_wait(filled(place.stage), place.round & 1); }
    // By one thread of each reader.
    __device__ void release(const Stage& place) const { barrier_arrive(emptied(place.stage)); }
};

}  // namespace vpd::device
