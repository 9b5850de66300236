#include "cpu/weight_memory.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <new>

#include "cpu/output_allocator.h"

namespace fused_res::cpu {
namespace {

constexpr size_t kHugePage = 2 << 20, kSlabBytes = 32 << 20, kLine = 64;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Freed with the last weight in it.
class Slab {
 public:
  explicit Slab(size_t bytes)
      : bytes_(round_up(bytes, kHugePage)),
        data_(static_cast<char*>(::operator new(bytes_, std::align_val_t{kHugePage}))) {
    advise_huge_pages(data_, bytes_);
  }
  Slab(const Slab&) = delete;
  ~Slab() { ::operator delete(data_, std::align_val_t{kHugePage}); }

  // Returns memory of whole cache lines, or null if there is no room.
  void* take(size_t bytes) {
    bytes = round_up(bytes, kLine);
    if (used_ + bytes > bytes_) return nullptr;
    used_ += bytes;
    return data_ + used_ - bytes;
  }

 private:
  size_t bytes_, used_ = 0;
  char* data_;
};

std::mutex mutex;
std::weak_ptr<Slab> shared_slab;

}  // namespace

Tensor empty_weight(int64_t size, at::ScalarType dtype) {
  const size_t bytes = static_cast<size_t>(size) * at::elementSize(dtype);
  std::shared_ptr<Slab> slab;
  void* data = nullptr;
  // Without the lock, or if it is too large to share, a weight gets a slab of its own: in a child that was
  // forked while another thread held the lock, waiting would never end.
  const std::unique_lock lock(mutex, std::try_to_lock);
  if (lock.owns_lock() && bytes <= kSlabBytes / 2) {
    slab = shared_slab.lock();
    if (slab) data = slab->take(bytes);
    if (!data) {
      slab = std::make_shared<Slab>(kSlabBytes);
      shared_slab = slab;
    }
  } else {
    slab = std::make_shared<Slab>(std::max(bytes, size_t{1}));
  }
  if (!data) data = slab->take(bytes);
  return at::from_blob(data, {size}, [slab](void*) {}, at::TensorOptions(dtype));
}

}  // namespace fused_res::cpu
