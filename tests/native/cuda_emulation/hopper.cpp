// What sm_90 adds: barriers that count bytes, TMA copies of boxes, and matrix instructions of a warpgroup. These run as
// late as they may: a product when it is waited for, with the shared memory of that moment, and its sums are poison until
// then; a copy leaves poison until it has come.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "machine.h"

namespace cuda_emulation {
namespace {

constexpr uint32_t SHARED_BASE = 1024 + 128;  // of the emulated shared window: aligned to 128 bytes only, as memory is
constexpr int PART_BYTES = 32, LINE_BYTES = 128, WAIT_FOR_PRODUCTS = 201, PRODUCT_FROM_REGISTERS = 202;
constexpr unsigned WARPGROUP = 4 * WARP;
constexpr int ALL_REGISTERS = 64 << 10;

uint32_t shared_offset(const void* p) { return uint32_t(static_cast<const unsigned char*>(p) - current->block->shared); }

// That of a block where the current one has `barrier`.
TransactionBarrier& barrier_of(Block& block, const uint64_t* barrier) {
    check_shared(barrier, 8, 8);
    const auto found = block.transactions.find(block.shared + (reinterpret_cast<const unsigned char*>(barrier) - current->block->shared));
    if (found == block.transactions.end()) fail("a barrier is used that was not initialised");
    return found->second;
}
TransactionBarrier& barrier_at(const uint64_t* barrier) { return barrier_of(*current->block, barrier); }

void end_phase_if_complete(TransactionBarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    ++barrier.phase;
    barrier.pending = barrier.count;
    wake(barrier.waiting);
}

// Swizzle of lines of 128 bytes: bits 4 to 6 of an address are changed by bits 7 to 9; of 64 bytes: bits 4 and 5 by 7 and 8.
uint32_t swizzled(uint32_t address, int line_bytes = LINE_BYTES) {
    return line_bytes ? address ^ (address >> 7 & (line_bytes / 16 - 1)) << 4 : address;
}

struct Matrix {
    uint32_t start, rows_apart;
};

// A matrix descriptor of the PTX manual, with a swizzle of 128 bytes: of a factor that lies along K, or across it, where
// the distance of panels stands in place of a 1. It may have a part of an address that does not belong there.
Matrix decode(uint64_t descriptor, bool across = false) {
    if (descriptor >> 62 != 1) fail("only the swizzle of 128 bytes is emulated");
    if (descriptor >> 49 & 7) fail("a base offset is not emulated");
    if (rank_of(*current->block) && (across ? descriptor >> 14 & 3 : (descriptor >> 14 & 0xffff) != 1 << 2))
        fail("the rank of a block in its cluster, which its shared addresses have, is in a descriptor");
    const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
    if (start % 1024 >= LINE_BYTES) fail("a swizzled matrix does not start at a multiple of 1024 bytes");
    return {start, uint32_t(descriptor >> 32 & 0x3fff) << 4};
}

void read_row(const Block& block, const Matrix& matrix, int row, unsigned char (&bytes)[PART_BYTES]) {
    for (int i = 0; i < PART_BYTES; i += 16) {
        const uint32_t line = matrix.start + row / 8 * matrix.rows_apart + row % 8 * LINE_BYTES + i;
        const uint32_t address = swizzled(line) - SHARED_BASE;
        if (address + 16 > block.bytes) fail("a product reads outside of the shared memory");
        std::memcpy(bytes + i, block.shared + address, 16);
    }
}

float float8_to_float(uint8_t bits) {
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    float x = exponent ? std::ldexp(float(fraction + 8), exponent - 10) : std::ldexp(float(fraction), -9);
    if (exponent == 15 && fraction == 7) x = NAN;
    return bits >> 7 ? -x : x;
}

int numbers_of(Format format) { return format == Format::int8 || format == Format::float8_e4m3fn ? 32 : 16; }

void to_numbers(Format format, const unsigned char (&bytes)[PART_BYTES], float (&x)[PART_BYTES]) {
    static const auto FLOAT8 = [] {
        std::vector<float> table(256);
        for (int i = 0; i < 256; ++i) table[i] = float8_to_float(uint8_t(i));
        return table;
    }();
    for (int i = 0; i < numbers_of(format); ++i) {
        uint16_t wide = 0;
        if (format == Format::bfloat16 || format == Format::float16) std::memcpy(&wide, bytes + 2 * i, 2);
        x[i] = format == Format::int8            ? float(int8_t(bytes[i]))
               : format == Format::float8_e4m3fn ? FLOAT8[bytes[i]]
               : format == Format::bfloat16      ? bfloat16_to_float(wide)
                                                 : float16_to_float(wide);
    }
}

// Hopper adds products of 8-bit floats and the sum so far with 13 bits behind the leading one of the largest; the rest of
// each is cut off.
float add_with_few_bits(float sum, const float (&x)[PART_BYTES], const float (&y)[PART_BYTES]) {
    float largest = std::fabs(sum), terms[PART_BYTES], plain = sum;
    for (int i = 0; i < PART_BYTES; ++i) {
        terms[i] = x[i] * y[i], plain += terms[i];
        largest = std::fmax(largest, std::fabs(terms[i]));
    }
    if (!std::isfinite(plain) || largest == 0) return plain;
    const int last = std::ilogb(largest) - 13;
    double total = std::trunc(std::ldexp(double(sum), -last));
    for (float term : terms) total += std::trunc(std::ldexp(double(term), -last));
    return float(std::ldexp(total, last));
}

uint32_t multiply_row(Format format, uint32_t sum, const float (&x)[PART_BYTES], const float (&y)[PART_BYTES]) {
    if (format == Format::int8) {
        for (int i = 0; i < PART_BYTES; ++i) sum += uint32_t(int32_t(x[i]) * int32_t(y[i]));
        return sum;
    }
    float number;
    std::memcpy(&number, &sum, 4);
    if (format == Format::float8_e4m3fn) {
        number = add_with_few_bits(number, x, y);
    } else {
        double total = number;
        for (int i = 0; i < 16; ++i) total += double(x[i]) * y[i];
        number = float(total);
    }
    std::memcpy(&sum, &number, 4);
    return sum;
}

// Numbers of this thread's two rows of the left factor, and of a column of the right one.
using Numbers = float[PART_BYTES];

void left_rows(Thread& thread, Format format, uint64_t left, Numbers (&rows)[2]) {
    const unsigned lane = thread.lane, warp = thread.index.x / WARP % 4;
    unsigned char bytes[PART_BYTES];
    for (int half = 0; half < 2; ++half) {
        read_row(*thread.block, decode(left), int(warp * 16 + lane / 4 + half * 8), bytes);
        to_numbers(format, bytes, rows[half]);
    }
}

void right_column(Thread& thread, Format format, uint64_t right, int column, Numbers& numbers) {
    unsigned char bytes[PART_BYTES];
    read_row(*thread.block, decode(right), column, bytes);
    to_numbers(format, bytes, numbers);
}

// Of a right factor whose lines are 64 columns at one number of K: canonical layout of the PTX manual, MN-major, with
// a swizzle of 128 bytes. Groups of 8 lines, and groups of 64 columns, are as far apart as the descriptor says.
void right_column_across(Thread& thread, Format format, uint64_t right, int column, Numbers& numbers) {
    const Matrix b = decode(right, true);
    const uint32_t panels_apart = uint32_t(right >> 16 & 0x3fff) << 4;
    unsigned char bytes[PART_BYTES];
    for (int k = 0; k < 16; ++k) {
        const uint32_t line = b.start + column / 64 * panels_apart + k / 8 * b.rows_apart + k % 8 * LINE_BYTES;
        const uint32_t address = swizzled(line + column % 64 * 2) - SHARED_BASE;
        if (address + 2 > thread.block->bytes) fail("a product reads outside of the shared memory");
        std::memcpy(bytes + 2 * k, thread.block->shared + address, 2);
    }
    to_numbers(format, bytes, numbers);
}

// This thread's share of sums (64 x columns) += left right^T: layout of the PTX manual for the result of wgmma.
template <typename Right>
void multiply(Thread& thread, Format format, std::vector<uint32_t>& sums, int columns, const Numbers (&rows)[2],
              Right right, bool accumulate) {
    float column[PART_BYTES] = {};
    for (int i = 0; i < columns / 4; ++i) {  // columns of this thread
        right(thread, int(i / 2 * 8 + thread.lane % 4 * 2 + i % 2), column);
        for (int half = 0; half < 2; ++half) {
            uint32_t& sum = sums[i / 2 * 4 + half * 2 + i % 2];
            sum = multiply_row(format, accumulate ? sum : 0, rows[half], column);
        }
    }
}

}  // namespace

namespace {

// Issues a product, `run` being what it does to the sums that are kept meanwhile.
void issue(void* sums, int columns, const std::function<void(std::vector<uint32_t>&)>& run) {
    Thread& thread = *current;
    if (!thread.fenced) fail("a product is issued without a fence before it");
    if (columns % 8 || columns > 256) fail("no matrix instruction has this number of columns");
    const bool pending = thread.sums.count(sums);
    std::vector<uint32_t>& kept = thread.sums[sums];
    if (!pending) {
        kept.resize(columns / 2);
        std::memcpy(kept.data(), sums, kept.size() * 4);
        std::memset(sums, NAN_BYTE, kept.size() * 4);
    }
    thread.products.push_back({[run, &kept] { run(kept); }, thread.group, sums});
}

}  // namespace

void multiply_add_wide(Format format, void* sums, int columns, uint64_t left, uint64_t right, bool accumulate) {
    Thread& thread = *current;
    issue(sums, columns, [=, &thread](std::vector<uint32_t>& kept) {
        Numbers rows[2] = {};
        left_rows(thread, format, left, rows);
        const auto column = [=](Thread& t, int i, Numbers& x) { right_column(t, format, right, i, x); };
        multiply(thread, format, kept, columns, rows, column, accumulate);
    });
}

void multiply_add_from_registers(Format format, void* sums, int columns, const uint32_t (&left)[4], uint64_t right,
                                 bool accumulate) {
    Thread& thread = *current;
    Warp& warp = *thread.warp;
    std::memcpy(warp.words[thread.lane], left, sizeof left);
    struct Quad {
        uint32_t words[4][4];
    } quad;
    warp_instruction(PRODUCT_FROM_REGISTERS, [](Warp& w) {
        for (unsigned l = 0; l < WARP; ++l) std::memcpy(w.given[l], w.words[l], sizeof w.given[l]);
    });
    std::memcpy(quad.words, warp.given[thread.lane / 4 * 4], sizeof quad.words);
    issue(sums, columns, [=, &thread](std::vector<uint32_t>& kept) {
        Numbers rows[2] = {};
        for (int half = 0; half < 2; ++half) {
            unsigned char bytes[PART_BYTES];
            for (int k = 0; k < 16; ++k) {
                const uint32_t word = quad.words[k % 8 / 2][k / 8 * 2 + half];
                const uint16_t number = uint16_t(word >> k % 2 * 16);
                std::memcpy(bytes + 2 * k, &number, 2);
            }
            to_numbers(format, bytes, rows[half]);
        }
        const auto column = [=](Thread& t, int i, Numbers& x) { right_column_across(t, format, right, i, x); };
        multiply(thread, format, kept, columns, rows, column, accumulate);
    });
}

// A warp waits as one: what any of its threads does afterwards comes after the products of all.
void wait_for_products(int pending) {
    Thread& thread = *current;
    while (!thread.products.empty() && thread.products.front().group < thread.group - pending) {
        thread.products.front().run();
        thread.products.pop_front();
    }
    thread.fenced = false;
    warp_instruction(WAIT_FOR_PRODUCTS, [](Warp&) {});
    for (auto sums = thread.sums.begin(); sums != thread.sums.end();) {
        const auto uses = [&](const PendingProduct& product) { return product.sums == sums->first; };
        if (std::any_of(thread.products.begin(), thread.products.end(), uses)) {
            ++sums;
            continue;
        }
        std::memcpy(sums->first, sums->second.data(), sums->second.size() * 4);
        sums = thread.sums.erase(sums);
    }
}

namespace {

// A line of a box: bytes next to each other, where they are in shared memory, and the address of each element that the tensor has.
struct Line {
    uint32_t to;
    std::vector<const unsigned char*> elements;  // null outside of the tensor
};

std::vector<Line> lines_of(const void* shared, const CUtensorMap& map, const int (&place)[5]) {
    size_t count = 1;
    uint32_t counts[5] = {1, 1, 1, 1, 1};
    for (int i = 0; i < map.rank; ++i) counts[i] = (map.box[i] + map.steps[i] - 1) / map.steps[i];
    for (int i = 1; i < map.rank; ++i) count *= counts[i];
    const size_t line_bytes = size_t(map.box[0]) * map.bytes;
    check_shared(shared, count * line_bytes, 128);
    if (map.swizzle && line_bytes != size_t(map.swizzle)) fail("only lines as long as their swizzle are emulated");
    std::vector<Line> lines(count);
    for (size_t line = 0; line < count; ++line) {
        size_t rest = line;
        const unsigned char* from = map.address;
        bool inside = true;
        for (int i = 1; i < map.rank; ++i) {
            const int64_t at = place[i] + int64_t(rest % counts[i]) * map.steps[i];
            rest /= counts[i];
            inside = inside && at >= 0 && uint64_t(at) < map.sizes[i];
            from += at * int64_t(map.strides[i]);
        }
        lines[line].to = shared_offset(shared) + uint32_t(line * line_bytes);
        for (uint32_t i = 0; i < map.box[0]; ++i) {
            const int64_t at = int64_t(place[0]) + i;
            const bool exists = inside && at >= 0 && uint64_t(at) < map.sizes[0];
            lines[line].elements.push_back(exists ? from + at * map.bytes : nullptr);
        }
    }
    return lines;
}

// Where a byte of a line is, from the beginning of shared memory.
uint32_t place_of(const CUtensorMap& map, const Line& line, uint32_t byte) {
    return swizzled(line.to + byte + SHARED_BASE, map.swizzle) - SHARED_BASE;
}

}  // namespace

// mask: blocks of the cluster that get the box, 0 for this one alone.
void load_box(void* shared, const CUtensorMap& map, uint64_t* barrier, const int (&place)[5], unsigned mask) {
    const std::vector<Line> lines = lines_of(shared, map, place);
    const uint32_t line_bytes = map.box[0] * map.bytes;
    std::vector<std::vector<unsigned char>> bytes;
    for (const Line& line : lines) {
        bytes.emplace_back(line_bytes);
        for (size_t i = 0; i < line.elements.size(); ++i) {
            if (!line.elements[i]) continue;
            check_global(line.elements[i], map.bytes, false);
            std::memcpy(&bytes.back()[i * map.bytes], line.elements[i], map.bytes);
        }
    }
    for (unsigned rank = 0; (mask ? mask : 1) >> rank; ++rank) {
        if (mask && !(mask >> rank & 1)) continue;
        Block* const block = mask ? &block_of_cluster(rank) : current->block;
        TransactionBarrier& arrives = barrier_of(*block, barrier);
        std::memset(block->shared + shared_offset(shared), NAN_BYTE, lines.size() * line_bytes);
        copies_under_way.push_back([lines, bytes, block, &arrives, map, line_bytes] {
            for (size_t line = 0; line < lines.size(); ++line)
                for (uint32_t i = 0; i < line_bytes; i += 16)
                    std::memcpy(block->shared + place_of(map, lines[line], i), &bytes[line][i], 16);
            arrives.bytes -= long(lines.size() * line_bytes);
            end_phase_if_complete(arrives);
        });
    }
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

namespace vpd::device {

uint32_t shared_address(const void* p) {
    check_shared(p, 1, 1);
    const uint32_t rank = rank_of(*current->block) << 24;  // of the block in its cluster, as on hardware
    return rank + uint32_t(static_cast<const unsigned char*>(p) - current->block->shared) + SHARED_BASE;
}

void barrier_init(uint64_t* barrier, unsigned arrivals) {
    check_shared(barrier, 8, 8);
    TransactionBarrier& b = current->block->transactions[barrier];
    b.count = b.pending = arrivals;
}
void barrier_init_done() {}

void barrier_expect(uint64_t* barrier, unsigned bytes) {
    barrier_at(barrier).bytes += bytes;
    barrier_arrive(barrier);
}
void barrier_arrive(uint64_t* barrier) {
    TransactionBarrier& b = barrier_at(barrier);
    if (!b.pending) fail("more threads arrive at a barrier than it waits for");
    --b.pending;
    end_phase_if_complete(b);
}
void barrier_arrive_at(uint64_t* barrier, unsigned rank) {
    TransactionBarrier& b = barrier_of(block_of_cluster(rank), barrier);
    if (!b.pending) fail("more threads arrive at a barrier than it waits for");
    --b.pending;
    end_phase_if_complete(b);
}
unsigned rank_in_cluster() { return rank_of(*current->block); }

// Stores read shared memory as late as they may: when they are waited for.
void store_box(const void* shared, const CUtensorMap& map, int x0, int x1, int x2, int x3) {
    if (!current->block->visible) fail("a store reads shared memory that was not made visible to it");
    const std::vector<Line> lines = lines_of(shared, map, {x0, x1, x2, x3, 0});
    for (const Line& line : lines)
        for (const unsigned char* element : line.elements)
            if (element) check_global(element, map.bytes, true);
    Block* const block = current->block;
    current->stores_open = true;
    current->stores.push_back([lines, block, map] {
        for (const Line& line : lines)
            for (uint32_t i = 0; i < line.elements.size(); ++i)
                if (line.elements[i])
                    std::memcpy(const_cast<unsigned char*>(line.elements[i]), block->shared + place_of(map, line, i * map.bytes), map.bytes);
    });
}
void store_commit() { current->stores_open = false; }
void store_wait() {
    if (current->stores_open) fail("stores are waited for that are in no group");
    for (const auto& store : current->stores) store();
    current->stores.clear();
}
void stores_done() { current->block->visible = true; }

void barrier_wait(uint64_t* barrier, unsigned parity) {
    TransactionBarrier& b = barrier_at(barrier);
    while (b.phase % 2 == parity) {
        b.waiting.push_back(current);
        yield();
    }
}

void sync_threads(int barrier, int threads) {
    Barrier& b = current->block->named[barrier];
    if (arrive(b, unsigned(threads))) release(b);
}

bool elected() { return current->lane == 0; }

// Whether warpgroups of a block may move registers like this if so many blocks share a multiprocessor: none takes what
// nobody gave, of the registers that all began with.
static bool can_move(const Block& block, int blocks) {
    const int threads = int(blockDim.x), each = ALL_REGISTERS / (blocks * threads) / 8 * 8;
    int left = blocks == 1 ? ALL_REGISTERS - each * threads : 0;
    for (const auto& [count, more] : block.register_counts) {
        if (more ? count < each : count > each) return false;
        left -= (count - each) * int(WARPGROUP);
    }
    return left >= 0;
}

// All threads of a warpgroup move at once.
static void move_registers(int count, bool more) {
    if (count < 24 || count > 256 || count % 8) fail("no thread can have this number of registers");
    Block& block = *current->block;
    if (!arrive(block.register_moves[current->index.x / WARPGROUP], WARPGROUP)) return;
    block.register_counts.emplace_back(count, more);
    bool possible = block.register_counts.size() < blockDim.x / WARPGROUP;
    for (int blocks = 1; blocks <= 4; ++blocks) possible = possible || can_move(block, blocks);
    if (!possible) fail("warpgroups take more registers than were given");
    release(block.register_moves[current->index.x / WARPGROUP]);
}
void give_registers_to(int count) { move_registers(count, false); }
void take_registers_to(int count) { move_registers(count, true); }

void wgmma_begin() { current->fenced = true; }
void wgmma_commit() { ++current->group; }

}  // namespace vpd::device

namespace {

// As the driver's: refuses what the manual does not allow.
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    const int bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
    const bool bad = reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(address) % 16 || !rank || rank > 5 ||
                     interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || box[0] * bytes % 16 ||
                     (box[0] * bytes > (swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128u : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64u : 256u * bytes));
    if (bad) return CUDA_ERROR_INVALID_VALUE;
    map->address = static_cast<const unsigned char*>(address), map->rank = int(rank), map->bytes = bytes;
    map->swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 0;
    for (unsigned i = 0; i < rank; ++i) {
        map->sizes[i] = sizes[i], map->box[i] = box[i], map->steps[i] = i ? steps[i] : 1;
        map->strides[i] = i ? strides[i - 1] : bytes;
        if (!sizes[i] || sizes[i] > 1ull << 32 || !box[i] || box[i] > 256 || !steps[i] || steps[i] > 8) return CUDA_ERROR_INVALID_VALUE;
        if (i && (!map->strides[i] || map->strides[i] % 16 || map->strides[i] >= 1ull << 40)) return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    const bool known = !std::strcmp(symbol, "cuTensorMapEncodeTiled");
    *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
    *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
