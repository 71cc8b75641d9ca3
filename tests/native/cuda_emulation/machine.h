// The machine behind cuda_emulation.h, for the files that implement its instructions: threads are fibers that run until
// they wait for others.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cuda_emulation.h"

namespace cuda_emulation {

constexpr unsigned WARP = 32;
constexpr unsigned char NAN_BYTE = 0xff;  // NaN in every float format when all bytes are this

struct Thread;

// Where a number of threads meet. `waiting` are those that go on when the last has arrived.
struct Barrier {
    unsigned arrived = 0;
    unsigned long generation = 0;
    std::vector<Thread*> waiting;
};

struct Copy {
    void* shared;
    const void* global;
};

struct Warp {
    Barrier barrier;
    int instruction = 0;  // that the threads which have arrived execute
    float c[WARP][4];
    uint32_t words[WARP][6], given[WARP][4];
    const unsigned char* rows[WARP];
};

// An mbarrier: a phase ends when all arrivals and all bytes that were announced have come.
struct TransactionBarrier {
    unsigned count = 0, pending = 0;
    long bytes = 0;
    unsigned phase = 0;
    std::vector<Thread*> waiting;
};

struct Block {
    std::vector<unsigned char> memory;
    unsigned char* shared;
    size_t bytes;
    Barrier barrier;
    std::map<int, Barrier> named;
    std::map<const void*, TransactionBarrier> transactions;
    std::vector<Warp> warps;
    unsigned running;  // threads that have not ended
    std::map<unsigned, Barrier> register_moves;  // by warpgroup
    std::vector<std::pair<int, bool>> register_counts;  // that warpgroups have now, and whether these were more
    bool visible = false;  // shared memory, for stores by TMA: a thread has said so
    dim3 index;
};

// A matrix instruction of a warpgroup that has been issued and not been waited for.
struct PendingProduct {
    std::function<void()> run;
    int group;
    void* sums;
};

struct Thread {
    ucontext_t start;
    jmp_buf state;
    bool started = false;
    Block* block;
    Warp* warp;
    unsigned lane;
    dim3 index;
    unsigned long cluster_generation = 0;
    bool arrived_in_cluster = false;  // and not waited yet
    std::deque<std::vector<Copy>> groups;  // the last is still open
    std::deque<PendingProduct> products;
    std::map<void*, std::vector<uint32_t>> sums;  // of pending products, whose registers hold nothing
    int group = 0;                                // of products that is open
    bool fenced = false;
    std::vector<std::function<void()>> stores;  // by TMA, which have not been waited for
    bool stores_open = false;                   // in a group that is not committed
};

struct Range {
    uintptr_t begin, end;
    bool writable;
};
struct Device {
    int processors = 132, major = 9, shared_limit = 227 << 10;
    unsigned order = 0;  // in which threads run: 0 the longest waiting first, 1 the last that became ready, else random
};

extern Device device;
extern std::vector<Range> ranges;
extern Thread* current;
extern std::deque<Thread*> ready;
// Copies under way by TMA. They come when no thread can run without them, or at once, or at random (Device::order).
extern std::deque<std::function<void()>> copies_under_way;

Block& block_of_cluster(unsigned rank);  // fails if there is none, or it has ended
unsigned rank_of(const Block& block);
void yield();
[[noreturn]] void fail(const std::string& message);
bool arrive(Barrier& barrier, unsigned count);  // whether the caller was the last of `count`, which must release()
void release(Barrier& barrier);
void wake(std::vector<Thread*>& waiting);
const unsigned char* check_shared(const void* address, size_t bytes, size_t alignment);

// `last` runs once all threads of the warp have come to the same instruction.
template <typename Function>
void warp_instruction(int instruction, Function last) {
    Warp& warp = *current->warp;
    if (warp.barrier.arrived && warp.instruction != instruction) fail("threads of a warp execute different instructions");
    warp.instruction = instruction;
    if (!arrive(warp.barrier, WARP)) return;
    last(warp);
    release(warp.barrier);
}

}  // namespace cuda_emulation
