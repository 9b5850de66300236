// Comparison of modules with an earlier snapshot: fused_res/nn/snapshot.py creates it and defines the tuples.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_res {

bool snapshot_is_current(const pybind11::tuple& attributes, const pybind11::tuple& tensors, bool refuse_grad);

// Returns a tag for each class, which changes with every change of the class or its bases; 0 if there is
// none.
pybind11::tuple class_tags(const pybind11::tuple& classes);
// Returns whether the tags are still those of the classes, and none is 0.
bool class_tags_are(const pybind11::tuple& classes, const pybind11::tuple& tags);

}  // namespace fused_res
