// Functions that add the operators to module _C, one per operator.
#pragma once

#include <pybind11/pybind11.h>

namespace vpd {

void bind_conv2d(pybind11::module_& m);
void bind_cross_attention_maps(pybind11::module_& m);
void bind_cross_attention_maps_backward(pybind11::module_& m);
void bind_group_norm_affine(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_self_attention(pybind11::module_& m);
void bind_upsample_argmax(pybind11::module_& m);
void bind_winograd_conv2d(pybind11::module_& m);

}  // namespace vpd
