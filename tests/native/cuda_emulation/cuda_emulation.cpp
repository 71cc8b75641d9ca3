// The machine behind cuda_emulation.h: fibers, barriers, checked memory, the runtime; and its Python controls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <random>
#include <tuple>
#include <utility>

#include "machine.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace vpd {
void bind_cross_attention_maps(pybind11::module_& m);
void bind_gemm(pybind11::module_& m);
void bind_self_attention(pybind11::module_& m);
void bind_probes(pybind11::module_& m);
void bind_prologue(pybind11::module_& m);
void bind_upsample_argmax_strips(pybind11::module_& m);
}

namespace cuda_emulation {

Device device;
std::vector<Range> ranges;
Thread* current;
std::deque<Thread*> ready;
std::deque<std::function<void()>> copies_under_way;

namespace {

constexpr size_t STACK_BYTES = 128 << 10, GUARD_BYTES = 4096;

std::map<const void*, size_t> shared_allowed;
std::string error;
int launches = 0;
size_t shared_bytes = 0;
unsigned blocks_launched = 0;

jmp_buf scheduler;
std::vector<std::unique_ptr<Block>> blocks;  // of the running cluster
Barrier cluster_barrier;
size_t ended;  // threads of it, which its barrier does not wait for
const std::function<void()>* body;
std::vector<std::unique_ptr<char[]>> stacks;

enum Signal { YIELDED = 1, FINISHED, FAILED };

}  // namespace

void yield() {
    if (!_setjmp(current->state)) _longjmp(scheduler, YIELDED);
}

[[noreturn]] void fail(const std::string& message) {
    if (error.empty())
        error = message + " (block " + std::to_string(current->block->index.x) + ", thread " +
                std::to_string(current->index.x) + ")";
    _longjmp(scheduler, FAILED);
}

bool arrive(Barrier& barrier, unsigned count) {
    if (++barrier.arrived == count) return true;
    barrier.waiting.push_back(current);
    yield();
    return false;
}

void wake(std::vector<Thread*>& waiting) {
    ready.insert(ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
}

void release(Barrier& barrier) {
    barrier.arrived = 0;
    ++barrier.generation;
    wake(barrier.waiting);
}

const unsigned char* check_shared(const void* address, size_t bytes, size_t alignment) {
    const auto* p = static_cast<const unsigned char*>(address);
    const Block& block = *current->block;
    if (p < block.shared || p + bytes > block.shared + block.bytes) fail("shared memory is accessed out of bounds");
    if (reinterpret_cast<uintptr_t>(p) % alignment) fail("shared memory is accessed at a misaligned address");
    return p;
}

Block& block_of_cluster(unsigned rank) {
    if (rank >= blocks.size()) fail("a block of the cluster does not exist");
    if (!blocks[rank]->running) fail("shared memory of a block that has ended is used");
    return *blocks[rank];
}

unsigned rank_of(const Block& block) { return block.index.x - blocks.front()->index.x; }

namespace {

// Ends the phase of the cluster's barrier if nobody is missing.
void pass_cluster_barrier() {
    if (cluster_barrier.arrived && cluster_barrier.arrived + ended == blocks.size() * blockDim.x) release(cluster_barrier);
}

void run_thread() {
    (*body)();
    for (const auto& group : current->groups)
        if (!group.empty()) fail("a thread ended before its copies were waited for");
    if (!current->products.empty()) fail("a thread ended before its products were waited for");
    if (!current->stores.empty()) fail("a thread ended before its stores were waited for");
    if (current->arrived_in_cluster) fail("a thread ended before it waited for its cluster");
    --current->block->running;
    ++ended;
    pass_cluster_barrier();
    _longjmp(scheduler, FINISHED);
}

void prepare(Thread& thread, char* stack) {
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stack;
    thread.start.uc_stack.ss_size = STACK_BYTES;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, run_thread, 0);
}

std::unique_ptr<Block> make_block(const cudaLaunchConfig_t& config, unsigned index) {
    auto block = std::make_unique<Block>();
    block->bytes = config.dynamicSmemBytes;
    block->memory.assign(block->bytes + 2 * GUARD_BYTES, NAN_BYTE);
    const auto address = reinterpret_cast<uintptr_t>(block->memory.data()) + GUARD_BYTES / 2;
    block->shared = reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024 + 128);  // aligned to no more
    block->warps = std::vector<Warp>(config.blockDim.x / WARP);
    block->running = config.blockDim.x;
    block->index = {index, 0, 0};
    return block;
}

void check_guards(const Block& block) {
    const unsigned char *begin = block.memory.data(), *end = begin + block.memory.size();
    for (const unsigned char* p = begin; p < end; p += p + 1 == block.shared ? block.bytes + 1 : 1)
        if (*p != NAN_BYTE && error.empty()) error = "shared memory was written out of bounds";
}

Thread* next_ready(std::mt19937& random) {
    if (device.order > 1) std::swap(ready.back(), ready[random() % ready.size()]);
    Thread* thread = device.order ? ready.back() : ready.front();
    if (device.order)
        ready.pop_back();
    else
        ready.pop_front();
    return thread;
}

// Runs blocks first .. first + count, which form a cluster.
void run_cluster(const cudaLaunchConfig_t& config, unsigned first, unsigned count, std::mt19937& random) {
    std::vector<std::unique_ptr<Thread>> threads;
    blocks.clear(), ready.clear(), copies_under_way.clear();
    cluster_barrier = Barrier(), ended = 0;
    for (unsigned rank = 0; rank < count; ++rank) {
        blocks.push_back(make_block(config, first + rank));
        for (unsigned i = 0; i < config.blockDim.x; ++i) {
            threads.push_back(std::make_unique<Thread>());
            Thread& thread = *threads.back();
            thread.block = blocks.back().get(), thread.warp = &thread.block->warps[i / WARP];
            thread.lane = i % WARP, thread.index = {i, 0, 0};
            thread.groups.emplace_back();
            if (stacks.size() < threads.size()) stacks.emplace_back(new char[STACK_BYTES]);
            prepare(thread, stacks[threads.size() - 1].get());
            ready.push_back(&thread);
        }
    }
    volatile size_t running = threads.size();  // volatile: changed between _setjmp and its second return
    while (running && error.empty()) {
        if (!copies_under_way.empty() && (ready.empty() || device.order == 0 || (device.order > 1 && random() % 64 == 0))) {
            const size_t chosen = device.order > 1 ? random() % copies_under_way.size() : 0;
            copies_under_way[chosen]();
            copies_under_way.erase(copies_under_way.begin() + chosen);
            continue;
        }
        if (ready.empty()) {
            error = "deadlock: threads wait where others never arrive";
            break;
        }
        current = next_ready(random);
        threadIdx = current->index, blockIdx = current->block->index;
        const int signal = _setjmp(scheduler);
        if (signal == 0) {
            if (current->started) _longjmp(current->state, 1);
            current->started = true;
            setcontext(&current->start);
        }
        if (signal == FINISHED) running = running - 1;
    }
    if (!copies_under_way.empty() && error.empty()) error = "a block ended before its copies had come";
    for (const auto& block : blocks) check_guards(*block);
}

}  // namespace

void check_global(const void* address, size_t bytes, bool write) {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    if (begin % bytes) fail("global memory is accessed at a misaligned address");
    for (const Range& range : ranges)
        if (begin >= range.begin && begin + bytes <= range.end && (range.writable || !write)) return;
    fail(write ? "global memory is written out of bounds" : "global memory is read out of bounds");
}

cudaError_t allow_shared_memory(const void* kernel, size_t bytes) {
    if (bytes > size_t(device.shared_limit)) return cudaErrorInvalidValue;
    shared_allowed[kernel] = bytes;
    return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
    const unsigned cluster = config.numAttrs ? config.attrs[0].val.clusterDim.x : 1;
    const unsigned grid = config.gridDim.x, size = config.blockDim.x;
    if (!grid || !size || size > 1024 || size % WARP || !cluster || cluster > 8 || grid % cluster ||
        (cluster > 1 && device.major < 9) || config.dynamicSmemBytes > std::max<size_t>(48 << 10, shared_allowed[kernel]))
        return cudaErrorInvalidValue;
    ++launches;
    shared_bytes = config.dynamicSmemBytes, blocks_launched = grid;
    error.clear();
    body = &thread;
    blockDim = config.blockDim, gridDim = config.gridDim;
    std::mt19937 random(device.order);
    for (unsigned first = 0; first < grid && error.empty(); first += cluster) run_cluster(config, first, cluster, random);
    blocks.clear();
    return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

void __syncthreads() {
    Barrier& barrier = current->block->barrier;
    if (arrive(barrier, blockDim.x)) release(barrier);
}

namespace vpd::device {

unsigned char* dynamic_shared() { return current->block->shared; }

void cluster_arrive() {
    current->cluster_generation = cluster_barrier.generation, current->arrived_in_cluster = true;
    ++cluster_barrier.arrived;
    pass_cluster_barrier();
}

void cluster_wait() {
    current->arrived_in_cluster = false;
    if (cluster_barrier.generation != current->cluster_generation) return;
    cluster_barrier.waiting.push_back(current);
    yield();
}

float load_from_cluster(const float* shared, uint32_t rank) {
    const unsigned char* own = check_shared(shared, sizeof(float), sizeof(float));
    float value;
    std::memcpy(&value, block_of_cluster(rank).shared + (own - current->block->shared), sizeof value);
    return value;
}

}  // namespace vpd::device

cudaError_t cudaGetDevice(int* id) {
    *id = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int id) { return id == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount      ? device.processors
             : attribute == cudaDevAttrComputeCapabilityMajor ? device.major
                                                              : device.shared_limit;
    return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t status) {
    return status == cudaErrorLaunchFailure ? error.c_str() : status == cudaSuccess ? "no error" : "invalid argument";
}

PYBIND11_MODULE(cuda_emulated, m) {
    namespace py = pybind11;
    m.def(
        "configure",
        [](int processors, int major, int shared_limit, unsigned order) {
            device = {processors, major, shared_limit, order};
        },
        py::arg("processors"), py::arg("major"), py::arg("shared_limit"), py::arg("order"));
    m.def(
        "announce",
        [](const std::vector<std::tuple<uintptr_t, size_t, bool>>& tensors) {
            ranges.clear();
            for (const auto& [address, bytes, writable] : tensors) ranges.push_back({address, address + bytes, writable});
        },
        "The only memory that kernels may use: (address, bytes, writable)");
    m.def("shared_bytes", [] { return shared_bytes; }, "Dynamic shared memory of a block of the newest kernel");
    m.def("blocks", [] { return blocks_launched; }, "Blocks of the newest kernel");
    m.def("launches", [] { return std::exchange(launches, 0); }, "Kernels launched since the last call");
    vpd::bind_cross_attention_maps(m);
    vpd::bind_gemm(m);
    vpd::bind_self_attention(m);
    vpd::bind_probes(m);
    vpd::bind_prologue(m);
    vpd::bind_upsample_argmax_strips(m);
}
