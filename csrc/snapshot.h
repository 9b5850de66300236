// Comparison of modules with an earlier snapshot: fused_res/nn/snapshot.py creates it and defines the tuples.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_res {

bool snapshot_is_current(const pybind11::tuple& attributes, const pybind11::tuple& tensors, bool refuse_grad);

}  // namespace fused_res
