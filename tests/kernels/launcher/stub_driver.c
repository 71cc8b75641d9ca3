// Stands for the CUDA driver: records launches instead of making them. Each is a line of `stub_log`: device, stream, kernel,
// grid, threads, shared memory, and the bytes of each parameter whose sizes `stub_sizes` was told.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_IMAGE = 200, NOT_FOUND = 500, TEXT = 1 << 20 };

typedef struct {
    unsigned grid[3], block[3], shared;
    void* stream;
    void* attributes;
    unsigned count;
} Config;  // CUlaunchConfig

static char text[TEXT];
static size_t used;
static int sizes[256], size_count, current = -1, allowed[64], max_shared = 227 << 10;
static char names[4096][64];
static int kernels;

const char* stub_log(void) { return text; }
void stub_clear(void) { used = 0, text[0] = 0; }
void stub_shared(int bytes) { max_shared = bytes, memset(allowed, 0, sizeof allowed); }
void stub_sizes(const int* values, int count) {
    size_count = count;
    memcpy(sizes, values, sizeof(int) * count);
}

#define WRITE(...) (used += used < TEXT / 2 ? snprintf(text + used, TEXT - used, __VA_ARGS__) : 0)  // and no more then

int cuInit(unsigned flags) { return flags ? INVALID_IMAGE : SUCCESS; }
int cuGetErrorName(int status, const char** name) { return *name = status == INVALID_IMAGE ? "INVALID_IMAGE" : "ERROR", 0; }
int cuGetErrorString(int status, const char** out) { return *out = status == INVALID_IMAGE ? "no cubin" : "refused", 0; }
int cuDriverGetVersion(int* version) { return *version = STUB_VERSION, SUCCESS; }
int cuDeviceGet(int* device, int number) { return *device = number, SUCCESS; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)(intptr_t)(device + 1), SUCCESS; }
int cuCtxPushCurrent_v2(void* context) { return current = (int)(intptr_t)context - 1, SUCCESS; }
int cuCtxPopCurrent_v2(void** context) { return *context = (void*)(intptr_t)(current + 1), current = -1, SUCCESS; }

int cuLibraryLoadData(void** library, const void* code, void* a, void* b, unsigned c, void* d, void* e, unsigned f) {
    if (current < 0 || memcmp(code, "\177ELF", 4)) return INVALID_IMAGE;
    *library = (void*)code;
    return SUCCESS;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    if (kernels == 4096) return NOT_FOUND;
    snprintf(names[kernels], sizeof names[0], "%s", name);
    *kernel = names[kernels++];
    return SUCCESS;
}
int cuKernelSetCacheConfig(void* kernel, int config, int device) { return SUCCESS; }
int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
    if (attribute != 8 || value > max_shared) return NOT_FOUND;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    if (value > allowed[device]) allowed[device] = value;
    return SUCCESS;
}
int cuLaunchKernelEx(const Config* config, void* kernel, void** parameters, void** extra) {
    if (extra || current < 0 || config->count || ((int)config->shared > 48 << 10 && (int)config->shared > allowed[current]))
        return NOT_FOUND;
    WRITE("%d %p %s %u,%u,%u %u %u", current, config->stream, (char*)kernel, config->grid[0], config->grid[1],
          config->grid[2], config->block[0] * config->block[1] * config->block[2], config->shared);
    for (int i = 0; i < size_count; ++i) {
        WRITE(" ");
        for (int byte = 0; byte < sizes[i]; ++byte) WRITE("%02x", ((unsigned char*)parameters[i])[byte]);
    }
    WRITE("\n");
    return SUCCESS;
}
