//! Exponential and hyperbolic tangent over vector registers.

use pulp::Simd;

/// `1.5 * 2^23`: adding it rounds to an integer and leaves that integer in the low mantissa bits.
const ROUND: f32 = 12_582_912.0;

/// `2^x` for `x <= 127`, to about one unit in the last place; exactly 0 from `x = -127` down, so
/// that an excluded score (-inf) weighs nothing. NaN stays NaN.
#[inline(always)]
pub(super) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // A comparison, not a maximum: what a maximum makes of NaN differs between machines.
    let floor = simd.splat_f32s(-127.0);
    let x = simd.select_f32s(simd.less_than_f32s(x, floor), floor, x);
    let magic = simd.splat_f32s(ROUND);
    let n = simd.add_f32s(x, magic);
    let f = simd.sub_f32s(x, simd.sub_f32s(n, magic));
    // Minimax on [-0.5, 0.5] with the constant term held at 1: relative error 2e-9.
    let mut p = simd.splat_f32s(EXP2[5]);
    for c in EXP2[..5].iter().rev() {
        p = simd.mul_add_e_f32s(p, f, simd.splat_f32s(*c));
    }
    p = simd.mul_add_e_f32s(p, f, simd.splat_f32s(1.0));
    // n goes straight into the exponent. At -127 the fraction is 0 and p is 1, and the bits of 1
    // less 127 exponents are those of 0.
    let n = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(n), simd.splat_u32s(23));
    simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(p), n))
}

/// Coefficients of f, f^2, ... f^6.
const EXP2: [f32; 6] =
    [core::f32::consts::LN_2, 0.240_226_5, 0.055_503_283, 0.009_618_23, 0.001_340_003_4, 0.000_154_086_3];

/// `tanh(x)` to a relative error of about 2e-7 everywhere, so that `cap * tanh(s / cap)` is as
/// precise as s itself even where s is small beside the cap.
#[inline(always)]
pub(super) fn tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |c: f32| simd.splat_f32s(c);
    let one = splat(1.0);
    let y = simd.abs_f32s(x);

    // Small: an odd polynomial (Cephes), since 1 - exp(-2y) cancels.
    let z = simd.mul_f32s(x, x);
    let mut small = splat(-5.704_988_7e-3);
    for c in [2.063_908_8e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1] {
        small = simd.mul_add_e_f32s(small, z, splat(c));
    }
    let small = simd.mul_add_e_f32s(simd.mul_f32s(small, z), x, x);

    // Large: (1 - e) / (1 + e) with e = exp(-2y), and x's sign.
    let e = exp2(simd, simd.mul_f32s(y, splat(-2.0 * core::f32::consts::LOG2_E)));
    let large = simd.div_f32s(simd.sub_f32s(one, e), simd.add_f32s(one, e));
    let sign = simd.and_u32s(simd.transmute_u32s_f32s(x), simd.splat_u32s(1 << 31));
    let large = simd.transmute_f32s_u32s(simd.or_u32s(simd.transmute_u32s_f32s(large), sign));

    simd.select_f32s(simd.less_than_f32s(y, splat(0.625)), small, large)
}
