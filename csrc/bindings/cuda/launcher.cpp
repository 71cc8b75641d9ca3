// Launches kernels that were compiled ahead of time, through the CUDA driver. The driver's library is opened when a Driver is made,
// so that the module can be imported where there is none.
#include "bindings/cuda/launcher.h"

#include <cuda.h>
#include <dlfcn.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace vpd {
namespace {

namespace py = pybind11;

constexpr unsigned DEFAULT_SHARED_BYTES = 48 << 10;  // more must be asked for

// cuda.h gives some of these names a suffix with their version, which expansion before "#" keeps.
#define VPD_TEXT(name) #name
#define VPD_SYMBOL(name) VPD_TEXT(name)
#define VPD_FUNCTIONS(DO)        \
    DO(cuInit)                   \
    DO(cuGetErrorName)           \
    DO(cuGetErrorString)         \
    DO(cuDriverGetVersion)       \
    DO(cuDeviceGet)              \
    DO(cuDevicePrimaryCtxRetain) \
    DO(cuCtxPushCurrent)         \
    DO(cuCtxPopCurrent)          \
    DO(cuLibraryLoadData)        \
    DO(cuLibraryGetKernel)       \
    DO(cuKernelSetAttribute)     \
    DO(cuKernelSetCacheConfig)   \
    DO(cuLaunchKernelEx)

// The driver's functions, and its contexts, which PyTorch uses, too.
class Driver {
public:
    explicit Driver(const std::string& path) {
        void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed
        if (!library) throw std::runtime_error(std::string("the CUDA driver cannot be loaded: ") + dlerror());
#define VPD_FIND(name) find(library, VPD_SYMBOL(name), name);
        VPD_FUNCTIONS(VPD_FIND)
#undef VPD_FIND
        require(cuInit(0), "cuInit");
        require(cuDriverGetVersion(&version), "cuDriverGetVersion");
    }

    void require(CUresult status, const char* what) const {
        if (status == CUDA_SUCCESS) return;
        const char *name = nullptr, *text = nullptr;
        cuGetErrorName(status, &name), cuGetErrorString(status, &text);
        throw std::runtime_error(std::string(what) + ": " + (name ? name : "unknown error") + ", " +
                                 (text ? text : ""));
    }

    CUdevice device(int number) const {
        CUdevice device = 0;
        require(cuDeviceGet(&device, number), "cuDeviceGet");
        return device;
    }

    CUcontext context(int number) {
        CUcontext& context = contexts_[number];
        if (!context) require(cuDevicePrimaryCtxRetain(&context, device(number)), "cuDevicePrimaryCtxRetain");
        return context;
    }

    int version = 0;
#define VPD_DECLARE(name) decltype(&::name) name = nullptr;
    VPD_FUNCTIONS(VPD_DECLARE)
#undef VPD_DECLARE

private:
    template <typename Function>
    static void find(void* library, const char* name, Function& function) {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (!function) throw std::runtime_error(std::string("the CUDA driver is too old: it has no ") + name);
    }

    std::map<int, CUcontext> contexts_;
};

// Makes a device's context current for the calling thread, and then the one before.
class ContextGuard {
public:
    ContextGuard(Driver& driver, int device) : driver_(driver) {
        driver.require(driver.cuCtxPushCurrent(driver.context(device)), "cuCtxPushCurrent");
    }
    ~ContextGuard() {
        CUcontext context;
        driver_.cuCtxPopCurrent(&context);
    }
    ContextGuard(const ContextGuard&) = delete;
    ContextGuard& operator=(const ContextGuard&) = delete;

private:
    Driver& driver_;
};

// Machine code of one kernel. It stays loaded: when a process ends, the driver may be gone before this is.
class Cubin {
public:
    Cubin(std::shared_ptr<Driver> driver, std::string image, std::string name, unsigned threads, unsigned shared,
          std::vector<size_t> offsets, size_t size)
        : driver_(std::move(driver)),
          image_(std::move(image)),
          name_(std::move(name)),
          threads_(threads),
          shared_(shared),
          offsets_(std::move(offsets)),
          size_(size) {}

    void load(int device) {
        if (loaded_.count(device)) return;
        Driver& driver = *driver_;
        const ContextGuard guard(driver, device);
        if (!kernel_) {
            CUlibrary library = nullptr;
            driver.require(driver.cuLibraryLoadData(&library, image_.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
                           "cuLibraryLoadData");
            driver.require(driver.cuLibraryGetKernel(&kernel_, library, name_.c_str()), "cuLibraryGetKernel");
        }
        if (shared_ > DEFAULT_SHARED_BYTES) {
            const CUdevice handle = driver.device(device);
            driver.require(driver.cuKernelSetCacheConfig(kernel_, CU_FUNC_CACHE_PREFER_SHARED, handle),
                           "cuKernelSetCacheConfig");
            driver.require(driver.cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, int(shared_),
                                                       kernel_, handle),
                           "cuKernelSetAttribute");
        }
        loaded_.insert(device);
    }

    void launch(const std::array<unsigned, 3>& grid, const py::bytes& packed, int device, uintptr_t stream) {
        const std::string_view values = packed;
        if (values.size() != size_)
            throw std::invalid_argument("parameters have " + std::to_string(values.size()) + " bytes, expected " +
                                        std::to_string(size_));
        load(device);
        if (!grid[0] || !grid[1] || !grid[2]) return;
        std::vector<void*> parameters;
        for (const size_t offset : offsets_) parameters.push_back(const_cast<char*>(values.data()) + offset);
        CUlaunchConfig config{};
        config.gridDimX = grid[0], config.gridDimY = grid[1], config.gridDimZ = grid[2];
        config.blockDimX = threads_, config.blockDimY = 1, config.blockDimZ = 1;
        config.sharedMemBytes = shared_, config.hStream = reinterpret_cast<CUstream>(stream);
        const ContextGuard guard(*driver_, device);
        driver_->require(
            driver_->cuLaunchKernelEx(&config, reinterpret_cast<CUfunction>(kernel_), parameters.data(), nullptr),
            name_.c_str());
    }

private:
    std::shared_ptr<Driver> driver_;
    std::string image_, name_;
    unsigned threads_, shared_;
    std::vector<size_t> offsets_;
    size_t size_;
    CUkernel kernel_ = nullptr;
    std::set<int> loaded_;
};

}  // namespace

void bind_launcher(py::module_& m) {
    py::class_<Cubin>(m, "Cubin", "A compiled kernel; `Driver.cubin` makes it.")
        .def("load", &Cubin::load, py::arg("device"), "Gets it ready on a device. Raises RuntimeError.")
        .def("launch", &Cubin::launch, py::arg("grid"), py::arg("parameters"), py::arg("device"), py::arg("stream"),
             "Enqueues it. grid: blocks along three axes; of none, nothing is done. parameters: their bytes. stream:\n"
             "handle of a stream of that device. Raises RuntimeError.");
    py::class_<Driver, std::shared_ptr<Driver>>(
        m, "Driver",
        "The CUDA driver, whose library is found at `path`. Raises RuntimeError "
        "if there is none, or one before CUDA 12.")
        .def(py::init<const std::string&>(), py::arg("path"))
        .def_readonly("version", &Driver::version, "Of CUDA: 12080 for 12.8.")
        .def(
            "cubin",
            [](const std::shared_ptr<Driver>& driver, const py::bytes& image, const std::string& name, unsigned threads,
               unsigned shared, const std::vector<size_t>& offsets,
               size_t size) { return Cubin(driver, image, name, threads, shared, offsets, size); },
            py::arg("image"), py::arg("name"), py::arg("threads"), py::arg("shared"), py::arg("offsets"),
            py::arg("size"),
            "A kernel from its machine code. threads: of a block. shared: bytes of dynamic shared memory. offsets: where\n"
            "in the bytes of all parameters, of which there are `size`, each begins.");
}

}  // namespace vpd
