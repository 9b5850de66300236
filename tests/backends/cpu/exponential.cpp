// Largest error of the vectorized exp(), in ulps of the exact result, over all exponents: prints one line for
// float and one for double, of the normal and of the subnormal results. Special values are checked exactly.
#include <cmath>
#include <cstdio>
#include <limits>

#include "cpu/isa/activation.h"

using namespace fused_res::cpu;

namespace {

template <class S>
struct Worst {
  long double normal = 0, subnormal = 0;
};

template <class S>
void measure(S first, Worst<S>& worst) {
  using V = Vec<S>;
  S x[V::lanes], y[V::lanes];
  for (int i = 0; i < V::lanes; ++i) x[i] = i ? std::nextafter(x[i - 1], S(0)) : first;
  store(y, fused_res::cpu::exp(load(x)));
  for (int i = 0; i < V::lanes; ++i) {
    const long double exact = expl(static_cast<long double>(x[i]));
    if (exact > std::numeric_limits<S>::max()) continue;
    const bool normal = exact >= std::numeric_limits<S>::min();
    const int exponent = normal ? ilogbl(exact) : std::numeric_limits<S>::min_exponent - 1;
    const long double ulp = ldexpl(1, exponent - std::numeric_limits<S>::digits + 1);
    long double& largest = normal ? worst.normal : worst.subnormal;
    const long double error = fabsl(static_cast<long double>(y[i]) - exact) / ulp;
    if (!(error <= largest)) largest = error;
  }
}

template <class S>
bool special_values() {
  using V = Vec<S>;
  const S inf = std::numeric_limits<S>::infinity();
  const auto at = [](S x) { return first_lane(fused_res::cpu::exp(V::broadcast(x))); };
  const S highest = std::log(std::numeric_limits<S>::max()) * S(1.001);
  return at(0) == 1 && at(-S(0)) == 1 && at(inf) == inf && at(-inf) == 0 && at(highest) == inf &&
         at(1e30f) == inf && at(-1e30f) == 0 && std::isnan(at(std::numeric_limits<S>::quiet_NaN()));
}

template <class S>
void report(const char* name, S lowest, S highest) {
  Worst<S> worst;
  constexpr int steps = 400000;
  for (int i = 0; i <= steps; ++i) measure(lowest + (highest - lowest) * (S(i) / steps), worst);
  for (S x = 1; x > std::numeric_limits<S>::min(); x *= S(0.9)) measure(x, worst), measure(-x, worst);
  std::printf("%s %.3Lf %.3Lf %s\n", name, worst.normal, worst.subnormal,
              special_values<S>() ? "ok" : "special values");
}

}  // namespace

int main() {
  report<float>("float", -104, 88.8f);
  report<double>("double", -746, 709.8);
}
