// Element types of tensors that CUDA operators take.
#pragma once

namespace vpd {

enum class CudaFloat { float32, bfloat16, float16 };

}  // namespace vpd
