// The operator that packs the weight of a convolution, and weights that are packed within a call. The kernels
// are direct_pack, winograd_pack (isa/direct.h, isa/winograd.h) and those of isa/pack_bf16.h.
#include "cpu/packed_weight.h"

#include <torch/library.h>

#include <utility>

#include "cpu/weight_memory.h"

namespace fused_res::cpu {
namespace {

Tensor empty_packed(int64_t size, at::ScalarType dtype, bool resident) {
  return resident ? empty_weight(size, dtype) : empty_output({size}, dtype, at::MemoryFormat::Contiguous);
}

TapSubset all_taps(int64_t count) { return {0, 1, count}; }

// The view of a weight of float32; the arguments are those of pack_conv_weight.
WeightView weight_view(const Tensor& weight, int64_t winograd) {
  return {float_data(weight, "weight"),
          weight.size(0),
          weight.size(1),
          weight.size(2),
          weight.size(3),
          weight.stride(0),
          weight.stride(1),
          weight.stride(2),
          weight.stride(3),
          winograd,
          /*stream=*/false};
}
WeightView transposed_view(const Tensor& weight, int64_t winograd, TapSubset rows, TapSubset columns) {
  WeightView view = weight_view(weight, winograd);
  view.data += (rows.first + (rows.count - 1) * rows.step) * view.row_stride +
               (columns.first + (columns.count - 1) * columns.step) * view.column_stride;
  view.kernel_h = rows.count, view.kernel_w = columns.count;
  view.row_stride *= -rows.step, view.column_stride *= -columns.step;
  std::swap(view.out_channels, view.channels);
  std::swap(view.output_stride, view.channel_stride);
  return view;
}

Tensor pack(WeightView view, bool resident) {
  const bool winograd = view.stride != 0;
  const int64_t size = packed_size(view.out_channels, view.channels, view.kernel_h * view.kernel_w, winograd);
  Tensor packed = empty_packed(size, at::kFloat, resident);
  void* to = packed.mutable_data_ptr();
  const auto kernel =
      winograd ? convolution_kernels().winograd[0].pack : convolution_kernels().direct[0].pack;
  // Half of the L3, not keeps_in_l3()'s quarter: nothing is read between the packing of U and its use.
  view.stream = static_cast<int64_t>(packed.nbytes()) > caches().l3 / 2;
  Parallel{size}(num_panels(view.out_channels),
                 [&](int64_t begin, int64_t end) { kernel(view, {begin, end}, to); });
  return packed;
}

Tensor pack_bf16(const Tensor& weight, bool transposed, TapSubset rows, TapSubset columns, bool resident) {
  const Bf16ConvolutionKernels& kernel = *kernels().bf16_convolution;
  const Bf16WeightView view = {weight.const_data_ptr(),
                               dtype_of(weight, "weight"),
                               weight.size(0),
                               weight.size(1),
                               weight.size(2),
                               weight.size(3),
                               transposed,
                               rows,
                               columns};
  const int64_t out_channels = transposed ? view.channels : view.out_channels,
                channels = transposed ? view.out_channels : view.channels;
  const int64_t size = packed_bf16_size(out_channels, channels, rows.count, columns.count, kernel.tiles);
  Tensor packed = empty_packed(size, at::kBFloat16, resident);
  void* to = packed.mutable_data_ptr();
  Parallel{size}(num_panels(out_channels),
                 [&](int64_t begin, int64_t end) { kernel.pack(view, {begin, end}, to); });
  return packed;
}

// Packs a weight (K, C, kh, kw) of float32, bfloat16 or float16. winograd: the stride, 1 or 2, of a Winograd
// convolution, or 0 for a direct one. transposed: pack the weight of the gradient with respect to the input
// (dgrad), whose taps are reversed and whose input and output channels are swapped. bf16_products: pack
// bfloat16 for products of bfloat16, otherwise float32. resident: many calls will read the packed weight.
Tensor pack_conv_weight(const Tensor& weight, int64_t winograd, bool transposed, bool bf16_products,
                        bool resident) {
  image_dtype(weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 4, "weight: expected (K, C, kh, kw), got ", weight.sizes());
  const TapSubset rows = all_taps(weight.size(2)), columns = all_taps(weight.size(3));
  TORCH_CHECK_VALUE(winograd >= 0 && winograd <= 2,
                    "winograd: expected a stride of 1 or 2, or 0 for direct, got ", winograd);
  TORCH_CHECK_VALUE(winograd == 0 || (rows.count == 3 && columns.count == 3),
                    "weight: Winograd supports 3x3 kernels, got ", weight.sizes());
  TORCH_CHECK_VALUE(
      !bf16_products || (kernels().bf16_convolution && winograd == 0),
      "bf16_products: expected a direct convolution, and an instruction set with products of bfloat16, "
      "got ",
      kernels().name);
  if (!bf16_products) {
    const Tensor w = weight.to(at::kFloat);
    return pack(transposed ? transposed_view(w, winograd, rows, columns) : weight_view(w, winograd),
                resident);
  }
  // Blocks of filter rows are packed from the weight as it is.
  const bool swap =
      transposed && packs_filter_rows(weight.size(0), weight.size(3), kernels().bf16_convolution->tiles);
  const Tensor rotated = swap ? weight.flip({2, 3}).transpose(0, 1) : weight;
  const Tensor w = (rotated.scalar_type() == at::kHalf ? rotated.to(at::kBFloat16) : rotated)
                       .contiguous(at::MemoryFormat::ChannelsLast);
  return pack_bf16(w, transposed && !swap, rows, columns, resident);
}

}  // namespace

PackedWeight::PackedWeight(ConvolutionArgs& args, const Tensor& weight) : memory_(weight) {
  if (weight.dim() != 4) {
    args.packed = packed_data(args, weight);
    return;
  }
  image_dtype(weight, "weight");
  const int64_t sizes[] = {args.out_channels, args.channels, args.kernel_h, args.kernel_w};
  TORCH_CHECK_VALUE(weight.sizes().equals(sizes), "weight: expected ", at::IntArrayRef(sizes),
                    " for this convolution, got ", weight.sizes());
  if (args.bf16_products) {
    memory_ = pack_conv_weight(weight, 0, false, true, /*resident=*/false);
    args.packed = memory_.const_data_ptr();
  } else {
    memory_ = weight.to(at::kFloat);
    set(args, weight_view(memory_, args.tile != 0 ? args.stride_h : 0));
  }
}

PackedWeight::PackedWeight(ConvolutionArgs& args, const Tensor& weight, TapSubset rows, TapSubset columns) {
  if (args.bf16_products) {
    memory_ = pack_bf16(weight.contiguous(at::MemoryFormat::ChannelsLast), true, rows, columns,
                        /*resident=*/false);
    args.packed = memory_.const_data_ptr();
  } else {
    memory_ = weight;
    set(args, transposed_view(weight, args.tile != 0 ? 1 : 0, rows, columns));
  }
}

void PackedWeight::set(ConvolutionArgs& args, const WeightView& view) {
  if (args.tile != 0 && WinogradTasks(args).staged()) {
    view_ = std::make_unique<WeightView>(view);
    args.weight = view_.get();
  } else {
    memory_ = pack(view, /*resident=*/false);
    args.packed = memory_.const_data_ptr();
  }
}

}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) {
  m.impl("pack_conv_weight", TORCH_FN(fused_res::cpu::pack_conv_weight));
}
