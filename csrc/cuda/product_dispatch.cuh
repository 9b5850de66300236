// From what the host knows of a product to a kernel template's arguments.
#pragma once

#include "cuda/product.cuh"
#include "cuda/product.h"

namespace fused_res::cuda {

// f.template operator()<T, exact>().
template <class F>
void with_arithmetic(Arithmetic arithmetic, const F& f) {
  switch (arithmetic) {
    case Arithmetic::kBFloat16:
      return f.template operator()<__nv_bfloat16, false>();
    case Arithmetic::kFloat16:
      return f.template operator()<__half, false>();
    case Arithmetic::kTf32:
      return f.template operator()<float, false>();
    case Arithmetic::kExact:
      return f.template operator()<float, true>();
  }
}

// f.template operator()<T, exact, Shape, aligned>(), for the tiles that ProductShape::largest() allows.
template <bool formed, class F>
void with_tile(Arithmetic arithmetic, TileSize size, bool aligned, const F& f) {
  with_arithmetic(arithmetic, [&]<class T, bool exact>() {
    constexpr bool tall = !formed || sizeof(T) == 2, large = tall && !exact;
    if constexpr (large) {
      if (size == TileSize::kLarge) return f.template operator()<T, exact, LargeTile, true>();
    }
    if constexpr (tall) {
      if (size == TileSize::kTall) return f.template operator()<T, exact, TallTile, true>();
    }
    if (aligned) {
      f.template operator()<T, exact, SmallTile, true>();
    } else {
      f.template operator()<T, exact, SmallTile, false>();
    }
  });
}

}  // namespace fused_res::cuda
