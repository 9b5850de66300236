#include "snapshot.h"

#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <string>

namespace fused_res {
namespace {

namespace py = pybind11;

// Returns a borrowed reference to an element of a table: a tuple of columns, which are tuples of equal
// length.
PyObject* item(const py::tuple& columns, Py_ssize_t column, Py_ssize_t row) {
  return PyTuple_GET_ITEM(PyTuple_GET_ITEM(columns.ptr(), column), row);
}

Py_ssize_t rows(const py::tuple& columns, Py_ssize_t count) {
  const Py_ssize_t expected = PyTuple_Size(columns.ptr());
  if (expected != count) throw py::value_error("expected " + std::to_string(count) + " columns");
  const Py_ssize_t size = PyTuple_Size(PyTuple_GET_ITEM(columns.ptr(), 0));
  for (Py_ssize_t column = 0; column < count; ++column) {
    if (PyTuple_Size(PyTuple_GET_ITEM(columns.ptr(), column)) != size || PyErr_Occurred()) {
      PyErr_Clear();
      throw py::value_error("expected columns of equal length");
    }
  }
  return size;
}

// THPVariable_Check calls Python's isinstance, which takes longer than all the rest.
bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass)) != 0;
}

int64_t version(const at::Tensor& tensor) { return tensor.is_inference() ? -1 : tensor._version(); }

bool same_memory(const at::Tensor& tensor, const at::Tensor& alias, const void* pointer) {
  return tensor.has_storage() && tensor.const_data_ptr() == pointer &&
         tensor.scalar_type() == alias.scalar_type() && tensor.sizes() == alias.sizes() &&
         tensor.strides() == alias.strides();
}

// The version tag of CPython's method cache. It is never used again for another state of a class.
unsigned int class_tag(PyObject* object) {
  if (!PyType_Check(object)) throw py::type_error("classes: expected classes");
  auto* type = reinterpret_cast<PyTypeObject*>(object);
  return PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG) ? type->tp_version_tag : 0;
}

}  // namespace

py::tuple class_tags(const py::tuple& classes) {
  py::tuple tags(classes.size());
  for (size_t i = 0; i < classes.size(); ++i) {
    PyObject* object = PyTuple_GET_ITEM(classes.ptr(), i);
    Py_XDECREF(PyObject_GetAttrString(object, "__call__"));  // CPython tags a class at its first look-up
    PyErr_Clear();
    tags[i] = class_tag(object);
  }
  return tags;
}

bool class_tags_are(const py::tuple& classes, const py::tuple& tags) {
  const Py_ssize_t count = PyTuple_GET_SIZE(classes.ptr());
  if (PyTuple_GET_SIZE(tags.ptr()) != count) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const unsigned int tag = class_tag(PyTuple_GET_ITEM(classes.ptr(), i));
    if (tag == 0 || PyLong_AsUnsignedLong(PyTuple_GET_ITEM(tags.ptr(), i)) != tag) return false;
  }
  return true;
}

bool snapshot_is_current(const py::tuple& attributes, const py::tuple& tensors, bool refuse_grad) {
  // attributes: (dictionary, key, value); tensors: (tensor, alias, version, data pointer).
  for (Py_ssize_t row = 0, count = rows(attributes, 3); row < count; ++row) {
    PyObject* dictionary = item(attributes, 0, row);
    if (!PyDict_Check(dictionary)) throw py::type_error("attributes: expected dictionaries");
    PyObject* value = PyDict_GetItemWithError(dictionary, item(attributes, 1, row));
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (value != item(attributes, 2, row)) return false;
  }
  for (Py_ssize_t row = 0, count = rows(tensors, 4); row < count; ++row) {
    PyObject *object = item(tensors, 0, row), *alias = item(tensors, 1, row);
    if (!is_tensor(object) || !is_tensor(alias)) throw py::type_error("tensors: expected tensors");
    const int64_t expected = PyLong_AsLongLong(item(tensors, 2, row));
    const void* pointer = PyLong_AsVoidPtr(item(tensors, 3, row));
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    const at::Tensor& tensor = THPVariable_Unpack(object);
    if (version(tensor) != expected || !same_memory(tensor, THPVariable_Unpack(alias), pointer) ||
        (refuse_grad && tensor.requires_grad())) {
      return false;
    }
  }
  return true;
}

}  // namespace fused_res
