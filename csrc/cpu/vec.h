// Vectors in the widest registers of the instruction set that a tile_*.cpp is compiled for, by the vector
// types of GCC and Clang. Only what tiles need. Everything is in that file's own namespace: the linker must
// never take one instruction set's function for another's.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>

namespace clce::cpu::CLCE_TILE_NAMESPACE {
namespace {

#define CLCE_INLINE [[gnu::always_inline]] inline

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Lanes, and whole numbers of the same size: a comparison gives 0 or -1 of them.
template <class T>
struct Registers;
template <>
struct Registers<float> {
  using Int = int32_t;
  typedef float Lanes __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Registers<double> {
  using Int = int64_t;
  typedef double Lanes __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <class T>
struct Vec {
  using Int = typename Registers<T>::Int;
  using Lanes = typename Registers<T>::Lanes;
  using Bits = typename Registers<T>::Bits;
  Lanes lanes;

  Vec() = default;
  CLCE_INLINE Vec(Lanes lanes) : lanes(lanes) {}
  CLCE_INLINE explicit Vec(T value) : lanes(value - Lanes{}) {}

  static constexpr int64_t size() { return kVectorBytes / sizeof(T); }

  // Which lanes are among the first `count`.
  CLCE_INLINE static Bits first(int64_t count) {
    Bits lane;
    for (int64_t i = 0; i < size(); ++i) lane[i] = static_cast<Int>(i);
    return lane < static_cast<Int>(count) - Bits{};
  }

  CLCE_INLINE static Vec loadu(const T* from) {
    Vec v;
    std::memcpy(&v.lanes, from, sizeof(v.lanes));
    return v;
  }
  CLCE_INLINE void store(T* to) const { std::memcpy(to, &lanes, sizeof(lanes)); }

  // The first `count` lanes; zeros in the others.
  CLCE_INLINE static Vec loadu(const T* from, int64_t count) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      return Lanes(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
    } else {
      return Lanes(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from));
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      return Lanes(_mm256_maskload_ps(from, __m256i(first(count))));
    } else {
      return Lanes(_mm256_maskload_pd(from, __m256i(first(count))));
    }
#else
    Vec v{};
    std::memcpy(&v.lanes, from, sizeof(T) * count);
    return v;
#endif
  }
  CLCE_INLINE void store(T* to, int64_t count) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), __m512(lanes));
    } else {
      _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), __m512d(lanes));
    }
#else
    std::memcpy(to, &lanes, sizeof(T) * count);
#endif
  }
};

template <class T>
CLCE_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return a.lanes + b.lanes;
}
template <class T>
CLCE_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return a.lanes - b.lanes;
}
template <class T>
CLCE_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return a.lanes * b.lanes;
}
template <class T>
CLCE_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return a.lanes / b.lanes;
}

template <class T>
CLCE_INLINE Vec<T> select(typename Vec<T>::Bits condition, Vec<T> a, Vec<T> b) {
  return condition ? a.lanes : b.lanes;
}

// NaN where either is.
template <class T>
CLCE_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return select((a.lanes > b.lanes) | (a.lanes != a.lanes), a, b);
}

// A NaN stays one.
template <class T>
CLCE_INLINE Vec<T> clamp(Vec<T> v, T low, T high) {
  const Vec<T> lowest(low), highest(high);
  const Vec<T> above = select(lowest.lanes > v.lanes, lowest, v);
  return select(highest.lanes < above.lanes, highest, above);
}

// a * b + c, rounded once where the instruction set can.
template <class T>
CLCE_INLINE Vec<T> fmadd(Vec<T> a, Vec<T> b, Vec<T> c) {
  using Lanes [[maybe_unused]] = typename Vec<T>::Lanes;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return Lanes(_mm512_fmadd_ps(__m512(a.lanes), __m512(b.lanes), __m512(c.lanes)));
  } else {
    return Lanes(_mm512_fmadd_pd(__m512d(a.lanes), __m512d(b.lanes), __m512d(c.lanes)));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return Lanes(_mm256_fmadd_ps(__m256(a.lanes), __m256(b.lanes), __m256(c.lanes)));
  } else {
    return Lanes(_mm256_fmadd_pd(__m256d(a.lanes), __m256d(b.lanes), __m256d(c.lanes)));
  }
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 4) {
    return Lanes(vfmaq_f32(float32x4_t(c.lanes), float32x4_t(a.lanes), float32x4_t(b.lanes)));
  } else {
    return Lanes(vfmaq_f64(float64x2_t(c.lanes), float64x2_t(a.lanes), float64x2_t(b.lanes)));
  }
#else
  return a * b + c;
#endif
}

// a * b - c, likewise.
template <class T>
CLCE_INLINE Vec<T> fmsub(Vec<T> a, Vec<T> b, Vec<T> c) {
  return fmadd(a, b, Vec<T>(-c.lanes));
}

// n rounded to whole numbers, and 2^n of them. Adding `shift`, 1.5 times the number from which on
// floating-point numbers are whole, leaves n in the lowest bits of the sum.
template <class T>
struct WholePower {
  Vec<T> n, power;
};
template <class T>
CLCE_INLINE WholePower<T> whole_power(Vec<T> n) {
  using Bits = typename Vec<T>::Bits;
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52, kBias = sizeof(T) == 4 ? 127 : 1023;
  const Vec<T> shift(T(3) * (int64_t(1) << (kMantissa - 1)));
  const Vec<T> shifted = n + shift;
  const Bits power = (Bits(shifted.lanes) + kBias) << kMantissa;
  return {shifted - shift, Vec<T>(typename Vec<T>::Lanes(power))};
}

// e^x to about 1 ulp for x <= 88, 0 below -87.3: 2^n e^r with |r| <= ln(2) / 2, e^r by a polynomial
// of degree 6 (Cephes' expf coefficients). Faster than a libm call because x is known not to overflow.
CLCE_INLINE Vec<float> exp_vec(Vec<float> x) {
  constexpr float kLowest = -87.33654f;
  const Vec<float> clamped = clamp(x, kLowest, 88.0f);
  const auto [n, power] = whole_power(clamped * Vec<float>(1.44269504088896341f));
  Vec<float> r = fmadd(n, Vec<float>(-0.693359375f), clamped);
  r = fmadd(n, Vec<float>(2.12194440e-4f), r);
  Vec<float> p(1.9875691500e-4f);
  p = fmadd(p, r, Vec<float>(1.3981999507e-3f));
  p = fmadd(p, r, Vec<float>(8.3334519073e-3f));
  p = fmadd(p, r, Vec<float>(4.1665795894e-2f));
  p = fmadd(p, r, Vec<float>(1.6666665459e-1f));
  p = fmadd(p, r, Vec<float>(5.0000001201e-1f));
  p = fmadd(p, r * r, r + Vec<float>(1.0f));
  return select(x.lanes < Vec<float>(kLowest).lanes, Vec<float>(0.0f), p * power);
}

// The same for x <= 709, 0 below -708.3, e^r as 1 + 2 r P(r^2) / (Q(r^2) - r P(r^2)) (Cephes' exp).
CLCE_INLINE Vec<double> exp_vec(Vec<double> x) {
  constexpr double kLowest = -708.39;
  const Vec<double> clamped = clamp(x, kLowest, 709.4);
  const auto [n, power] = whole_power(clamped * Vec<double>(1.4426950408889634073599));
  Vec<double> r = fmadd(n, Vec<double>(-6.93145751953125e-1), clamped);
  r = fmadd(n, Vec<double>(-1.42860682030941723212e-6), r);
  const Vec<double> square = r * r;
  Vec<double> p(1.26177193074810590878e-4);
  p = fmadd(p, square, Vec<double>(3.02994407707441961300e-2));
  p = fmadd(p, square, Vec<double>(9.99999999999999999910e-1));
  p = p * r;
  Vec<double> q(3.00198505138664455042e-6);
  q = fmadd(q, square, Vec<double>(2.52448340349684104192e-3));
  q = fmadd(q, square, Vec<double>(2.27265548208155028766e-1));
  q = fmadd(q, square, Vec<double>(2.0));
  const Vec<double> e = fmadd(Vec<double>(2.0), p / (q - p), Vec<double>(1.0));
  return select(x.lanes < Vec<double>(kLowest).lanes, Vec<double>(0.0), e * power);
}

// Halves against halves, down to one lane.
template <class T, class Combine>
CLCE_INLINE T reduce(Vec<T> v, const Combine& combine) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  for (int64_t half = Vec<T>::size() / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}
template <class T>
CLCE_INLINE T horizontal_sum(Vec<T> v) {
  return reduce(v, [](T a, T b) { return a + b; });
}
template <class T>
CLCE_INLINE T horizontal_max(Vec<T> v) {
  return reduce(v, [](T a, T b) { return a > b || a != a ? a : b; });
}

}  // namespace
}  // namespace clce::cpu::CLCE_TILE_NAMESPACE
