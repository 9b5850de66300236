// Part of amx_instructions.cpp: tdpbf16ps against a scalar model (equal bits) and double precision (error
// bound).
#pragma once

#include <immintrin.h>

#include <cmath>
#include <limits>
#include <utility>

#include "amx_instructions.h"

namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
float from_bf16(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }

template <class T>
T element(const TileData& data, int row, int column) {
  T value;
  std::memcpy(&value, data.row[row] + column * static_cast<int>(sizeof(T)), sizeof(T));
  return value;
}
template <class T>
void set_element(TileData& data, int row, int column, T value) {
  std::memcpy(data.row[row] + column * static_cast<int>(sizeof(T)), &value, sizeof(T));
}

constexpr float kSmallestNormal = std::numeric_limits<float>::min();

float without_denormal(float x) { return std::abs(x) < kSmallestNormal ? std::copysign(0.f, x) : x; }

// a b + c rounded once, to nearest even; denormal operands are zero, and a result that is denormal after
// rounding to 24 bits is flushed. That is decided on operands scaled by 2^64, whose result is not denormal.
float flushing_fma(float a, float b, float c) {
  a = without_denormal(a), b = without_denormal(b), c = without_denormal(c);
  const float result = std::fma(a, b, c);
  if (!(std::abs(result) < 0x1p-100f)) return result;
  if (std::abs(a) < std::abs(b)) std::swap(a, b);  // |a b| is tiny, so that 2^64 b does not overflow
  const float scaled = std::fma(a, b * 0x1p64f, c * 0x1p64f);
  return std::abs(scaled) < kSmallestNormal * 0x1p64f ? std::copysign(0.f, scaled) : scaled * 0x1p-64f;
}

struct Shape {
  int rows, columns, pairs;
};

// The operation of the manual's page on TDPBF16PS.
TileData scalar_model(const Shape& shape, const TileData& c, const TileData& a, const TileData& b) {
  TileData result = c;
  for (int m = 0; m < shape.rows; ++m) {
    for (int n = 0; n < shape.columns; ++n) {
      float sums[2] = {0, 0};
      for (int k = 0; k < shape.pairs; ++k)
        for (int i = 0; i < 2; ++i)
          sums[i] = flushing_fma(from_bf16(element<uint16_t>(a, m, 2 * k + i)),
                                 from_bf16(element<uint16_t>(b, k, 2 * n + i)), sums[i]);
      const float sum = flushing_fma(sums[0], 1, sums[1]);
      set_element(result, m, n, flushing_fma(element<float>(c, m, n), 1, sum));
    }
  }
  return result;
}

void check_products(const Shape& shape, const TileData& c, const TileData& a, const TileData& b,
                    const TileData& got) {
  const TileData expected = scalar_model(shape, c, a, b);
  for (int m = 0; m < shape.rows; ++m) {
    for (int n = 0; n < shape.columns; ++n) {
      const bool nan = std::isnan(element<float>(expected, m, n));
      check(nan ? std::isnan(element<float>(got, m, n))
                : element<uint32_t>(got, m, n) == element<uint32_t>(expected, m, n),
            "tdpbf16ps and its scalar model", m * 16 + n);
    }
  }
}

void check_error(const Shape& shape, const TileData& c, const TileData& a, const TileData& b,
                 const TileData& got) {
  for (int m = 0; m < shape.rows; ++m) {
    for (int n = 0; n < shape.columns; ++n) {
      double sum = element<float>(c, m, n), magnitude = std::abs(sum);
      for (int k = 0; k < 2 * shape.pairs; ++k) {
        const double product = static_cast<double>(from_bf16(element<uint16_t>(a, m, k))) *
                               from_bf16(element<uint16_t>(b, k / 2, 2 * n + k % 2));
        sum += product, magnitude += std::abs(product);
      }
      // One rounding for each pair, and two for the final additions.
      const double bound = (shape.pairs + 2) * 0x1p-24 * magnitude;
      check(std::abs(element<float>(got, m, n) - sum) <= bound, "tdpbf16ps and double precision", m * 16 + n);
    }
  }
}

enum class Values { kAroundOne, kAnyBits, kDenormalProducts };

uint16_t random_bf16(Values values) {
  const uint32_t bits = random_bits();
  const uint32_t sign_and_mantissa = bits & 0x807F;
  switch (values) {
    case Values::kAroundOne:
      return static_cast<uint16_t>(sign_and_mantissa | (125 + (bits >> 16) % 4) << 7);
    case Values::kAnyBits:  // one in eight is NaN, infinite, zero or denormal
      if (bits >> 20 & 7) return static_cast<uint16_t>(sign_and_mantissa | (1 + (bits >> 8) % 254) << 7);
      return static_cast<uint16_t>((bits & 1 ? sign_and_mantissa : bits & 0x8000) |
                                   (bits & 2 ? 255 << 7 : 0));
    case Values::kDenormalProducts:  // 2^-63 to 2^-61, sometimes denormal
      return static_cast<uint16_t>(sign_and_mantissa | (bits >> 20 & 15 ? 64 + (bits >> 16) % 3 : 0) << 7);
  }
  return 0;
}

float random_accumulator(Values values) {
  const float value = from_bf16(random_bf16(values)) + from_bits(random_bits() & 0xFFFF);
  return values == Values::kDenormalProducts ? value * 0x1p-64f : value;
}

void test_products() {
  for (const Values values : {Values::kAroundOne, Values::kAnyBits, Values::kDenormalProducts}) {
    long flushed = 0, nans = 0;
    for (int round = 0; round < 60; ++round) {
      Shape shape = {16, 16, 16};
      if (round % 4)
        shape = {static_cast<int>(1 + random_bits() % 16), static_cast<int>(1 + random_bits() % 16),
                 static_cast<int>(1 + random_bits() % 16)};
      TileData a, b, c;
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < 32; ++j) set_element(a, i, j, random_bf16(values));
        for (int j = 0; j < 32; ++j) set_element(b, i, j, random_bf16(values));
        for (int j = 0; j < 16; ++j) set_element(c, i, j, random_accumulator(values));
      }
      Configuration config;
      config.palette = 1;
      config.rows[1] = config.rows[6] = static_cast<uint8_t>(shape.rows);
      config.colsb[1] = config.colsb[3] = static_cast<uint16_t>(4 * shape.columns);
      config.colsb[6] = static_cast<uint16_t>(4 * shape.pairs),
      config.rows[3] = static_cast<uint8_t>(shape.pairs);
      ldtilecfg(config);
      tileloadd(1, &c);
      tileloadd(6, &a);
      tileloadd(3, &b);
      tdpbf16ps(1, 6, 3);
      const TileData got = stored(1);
      check_products(shape, c, a, b, got);
      if (values == Values::kAroundOne) check_error(shape, c, a, b, got);
      for (int i = 0; i < shape.rows; ++i)
        for (int j = 0; j < shape.columns; ++j)
          flushed += element<float>(got, i, j) == 0, nans += std::isnan(element<float>(got, i, j));
    }
    // The values do cover the special cases.
    check((nans > 0) == (values == Values::kAnyBits), "NaN results", nans);
    check(values != Values::kDenormalProducts || flushed > 50, "flushed results", flushed);
  }
  tilerelease();
}

void test_special_products() {
  constexpr uint16_t kOne = 0x3F80, kInf = 0x7F80, kNan = 0x7FC0, kDenormal = 0x0001,
                     kTiny = 0x0080;                                   // 2^-126
  constexpr uint16_t kHalf = 0x3F00, kMinus = 0x8000, kHuge = 0x7F00;  // 2^127
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const float denormal = from_bits(1);
  // c + a0 b0 + a1 b1
  const struct {
    uint16_t a0, b0, a1, b1;
    float c, expected;
  } cases[] = {
      {kOne, kOne, kOne, kHalf, 2, 3.5f},
      {kInf, kOne, 0, 0, 0, inf},
      {kInf, 0, 0, 0, 0, nan},
      {kInf, kOne, kInf, kMinus | kOne, 0, nan},  // the two sums meet as inf - inf
      {kInf, kDenormal, 0, 0, 0, nan},            // the denormal is a zero
      {kNan, 0, 0, 0, 0, nan},
      {kOne, kOne, 0, 0, nan, nan},
      {kOne, kMinus | kInf, 0, 0, 1, -inf},
      {kHuge, kHuge, 0, 0, 0, inf},
      {kHuge, kOne, kHuge, kOne, 0, inf},  // overflow of the sum of even and odd
      {kDenormal, kOne, 0, 0, 0, 0},
      {kDenormal, kHuge, kOne, kOne, 0, 1},
      {kOne, kDenormal, 0, 0, 1, 1},
      {kTiny, kHalf, 0, 0, 0, 0},          // a denormal product is flushed
      {kTiny, kHalf, kTiny, kHalf, 0, 0},  // before the two are added
      {kTiny, kOne, kTiny, kMinus | kHalf, 0, kSmallestNormal},
      {0, 0, 0, 0, denormal, 0},  // a denormal accumulator is a zero
      {kTiny, kOne, 0, 0, denormal, kSmallestNormal},
      {kMinus, kOne, kMinus, kOne, -0.f, 0},  // the sums start at +0
  };
  Configuration config = full_configuration();
  config.rows[2] = 1, config.colsb[1] = 4;  // one pair
  ldtilecfg(config);
  for (const auto& test : cases) {
    TileData a = {}, b = {}, c = {};
    set_element(a, 3, 0, test.a0), set_element(a, 3, 1, test.a1);
    set_element(b, 0, 10, test.b0), set_element(b, 0, 11, test.b1);
    set_element(c, 3, 5, test.c);
    tileloadd(0, &c);
    tileloadd(1, &a);
    tileloadd(2, &b);
    tdpbf16ps(0, 1, 2);
    const TileData got = stored(0);
    const float value = element<float>(got, 3, 5);
    const bool equal = std::isnan(test.expected)
                           ? std::isnan(value)
                           : value == test.expected && !std::signbit(value) == !std::signbit(test.expected);
    check(equal, "special case", &test - cases);
  }
  tilerelease();
}

// Every combination of tile numbers, with rounding modes in MXCSR that must have no effect.
void test_product_operands() {
  ldtilecfg(full_configuration());
  TileData data[kTiles];
  for (TileData& tile : data)
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < 32; ++j) set_element(tile, i, j, random_bf16(Values::kAroundOne));
  long count = 0;
  for (int c = 0; c < kTiles; ++c) {
    for (int a = 0; a < kTiles; ++a) {
      for (int b = 0; b < kTiles; ++b) {
        if (c == a || c == b || a == b) continue;
        for (const int tile : {c, a, b}) tileloadd(tile, &data[tile]);
        const unsigned before = _mm_getcsr(), rounding = before ^ static_cast<unsigned>(count % 4) << 13;
        _mm_setcsr(rounding);
        tdpbf16ps(c, a, b);
        const unsigned after = _mm_getcsr();
        _mm_setcsr(before);
        check(after == rounding, "MXCSR", count);
        check_products({16, 16, 16}, data[c], data[a], data[b], stored(c));
        ++count;
      }
    }
  }
  check(count == 8 * 7 * 6, "combinations of operands", count);
  tilerelease();
}

}  // namespace
