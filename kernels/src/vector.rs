//! Small pieces shared by the element-wise loops: run-time choice of the instruction set, a branch-free exponential
//! and error function, and sums in a fixed order.
//!
//! What must stay true: nothing here depends on where a value lies in a vector register, so that a value computed
//! in a tail loop has the bits of the same value computed in a full vector. Fused multiply-add is used either
//! everywhere (hosts that have it) or nowhere.

/// Instruction set levels the loops are compiled for; the const parameter of every `body`.
pub(crate) const PLAIN: u8 = 0;
/// Fused multiply-add, vectors of up to 8 lanes (AVX2, NEON).
pub(crate) const FUSED: u8 = 1;
/// Fused multiply-add, vectors of 16 lanes (AVX-512).
pub(crate) const WIDE: u8 = 2;

/// Partial sums that a long sum is split into: element i goes to sum i mod `LANES`.
pub(crate) const LANES: usize = 16;

/// Defines `fn NAME(args)` that runs `BODY::<LEVEL>(args)` compiled for the best instruction set of this machine; `= BODY[N]` runs
/// `BODY::<LEVEL, N>(args)`.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident $([$more:expr])?) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        #[multiversion::multiversion(targets(
            "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+fma",
            "x86_64+avx2+fma",
            "aarch64+neon",
        ))]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            if multiversion::target::target_cfg_f!(target_feature = "avx512f") {
                $body::<{ $crate::vector::WIDE } $(, { $more })?>($($arg),*)
            } else if multiversion::target::target_cfg_f!(any(target_feature = "fma", target_feature = "neon")) {
                $body::<{ $crate::vector::FUSED } $(, { $more })?>($($arg),*)
            } else {
                $body::<{ $crate::vector::PLAIN } $(, { $more })?>($($arg),*)
            }
        }
    };
}
pub(crate) use dispatch;

/// `a * b + c`, rounded once where the machine can.
#[inline(always)]
pub(crate) fn mul_add<const LEVEL: u8>(a: f32, b: f32, c: f32) -> f32 {
    if LEVEL == PLAIN { a * b + c } else { a.mul_add(b, c) }
}

/// e^x, relative error below 2e-7; 0 below -87.3 (and for -inf), +inf above 88.37, no branches.
///
/// x = n·ln2 + r with |r| ≤ ln2/2, then 2^n times the Taylor polynomial of e^r (degree 7: remainder < 1e-9).
#[inline(always)]
pub(crate) fn exp<const LEVEL: u8>(x: f32) -> f32 {
    // Adding 1.5·2^23 rounds to the nearest integer, and leaves that integer in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // ln2 in two parts, so that n·LN2_HI is exact.
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // The range in which 2^n is an ordinary number.
    const LOWEST: f32 = -87.3;
    const HIGHEST: f32 = 88.37;
    let clamped = x.clamp(LOWEST, HIGHEST);
    let shifted = mul_add::<LEVEL>(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<LEVEL>(n, -LN2_LO, mul_add::<LEVEL>(n, -LN2_HI, clamped));
    let mut p = 1.0 / 5040.0;
    p = mul_add::<LEVEL>(p, r, 1.0 / 720.0);
    p = mul_add::<LEVEL>(p, r, 1.0 / 120.0);
    p = mul_add::<LEVEL>(p, r, 1.0 / 24.0);
    p = mul_add::<LEVEL>(p, r, 1.0 / 6.0);
    p = mul_add::<LEVEL>(p, r, 0.5);
    p = mul_add::<LEVEL>(p, r, 1.0);
    p = mul_add::<LEVEL>(p, r, 1.0);
    // n is within -126..=127, so 2^n is an ordinary number.
    let bits = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let y = p * f32::from_bits(bits);
    // A NaN is in p.
    let y = if x < LOWEST { 0.0 } else { y };
    if x > HIGHEST { f32::INFINITY } else { y }
}

/// 2^x for x ≤ 0, relative error below 3e-7; never below 2^-125, the price of having no branches. Exact at 0.
///
/// x = n + r with |r| ≤ 1/2, then the polynomial of degree 5 closest to 2^r (relative error 9e-8), with n added to its exponent.
#[inline(always)]
pub(crate) fn exp2<const LEVEL: u8>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    const LOWEST: f32 = -125.0;
    let x = if x < LOWEST { LOWEST } else { x };
    let shifted = x + ROUND;
    let r = x - (shifted - ROUND);
    let mut p = 1.326_472_7e-3;
    p = mul_add::<LEVEL>(p, r, 9.671_513e-3);
    p = mul_add::<LEVEL>(p, r, 5.550_733_7e-2);
    p = mul_add::<LEVEL>(p, r, 2.402_224_2e-1);
    // Not ln 2: the polynomial is the closest one over its whole range.
    #[allow(clippy::approx_constant)]
    const FIRST: f32 = 6.931_47e-1;
    p = mul_add::<LEVEL>(p, r, FIRST);
    p = mul_add::<LEVEL>(p, r, 1.0);
    // Of the shift only the low bits of n remain: p is above 0.7, so its exponent has room for them. A NaN that arithmetic made stays one.
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid<const LEVEL: u8>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<LEVEL>(-x))
}

/// Largest value; the order cannot matter. -inf for an empty slice.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for (m, &value) in lanes.iter_mut().zip(chunk) {
            *m = if value > *m { value } else { *m };
        }
    }
    for (m, &value) in lanes.iter_mut().zip(rest) {
        *m = if value > *m { value } else { *m };
    }
    // In a row these comparisons would wait for each other.
    tree(lanes, |a, b| if b > a { b } else { a })
}

/// Adds the lanes as a balanced tree.
#[inline(always)]
pub(crate) fn fold(lanes: [f32; LANES]) -> f32 {
    tree(lanes, |a, b| a + b)
}

#[inline(always)]
fn tree(mut lanes: [f32; LANES], both: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = both(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// Σ x·y in a fixed order (16 interleaved sums, then a tree).
#[inline(always)]
pub(crate) fn dot<const LEVEL: u8>(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (xs, x_rest) = x.as_chunks::<LANES>();
    let (ys, y_rest) = y.as_chunks::<LANES>();
    for (a, b) in xs.iter().zip(ys) {
        for l in 0..LANES {
            lanes[l] = mul_add::<LEVEL>(a[l], b[l], lanes[l]);
        }
    }
    for (l, (&a, &b)) in x_rest.iter().zip(y_rest).enumerate() {
        lanes[l] = mul_add::<LEVEL>(a, b, lanes[l]);
    }
    fold(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exp_all<const LEVEL: u8>(x: &mut [f32]) {
        x.iter_mut().for_each(|v| *v = exp::<LEVEL>(*v));
    }
    dispatch! { fn exp_many(x: &mut [f32]) = exp_all }

    #[test]
    fn exp_is_close_to_the_exact_one_over_its_whole_range() {
        let xs: Vec<f32> = (0..200_000).map(|i| -87.2 + i as f32 * (175.5 / 200_000.0)).collect();
        let mut ys = xs.clone();
        exp_many(&mut ys);
        for (&x, &y) in xs.iter().zip(&ys) {
            let exact = f64::from(x).exp();
            // Three roundings of 6e-8 each.
            assert!(((f64::from(y) - exact) / exact).abs() < 2e-7, "exp({x}) = {y}, exact {exact}");
        }
    }

    fn exp2_all<const LEVEL: u8>(x: &mut [f32]) {
        x.iter_mut().for_each(|v| *v = exp2::<LEVEL>(*v));
    }
    dispatch! { fn exp2_many(x: &mut [f32]) = exp2_all }

    #[test]
    fn exp2_is_close_to_the_exact_one_below_zero() {
        let xs: Vec<f32> = (0..200_000).map(|i| i as f32 * (-125.0 / 200_000.0)).collect();
        let mut ys = xs.clone();
        exp2_many(&mut ys);
        for (&x, &y) in xs.iter().zip(&ys) {
            let exact = f64::from(x).exp2();
            assert!(((f64::from(y) - exact) / exact).abs() < 3e-7, "exp2({x}) = {y}, exact {exact}");
        }
        let mut edges = [f32::NEG_INFINITY, -1e30, 0.0, -1.0, f32::NAN, -f32::NAN];
        exp2_many(&mut edges);
        assert_eq!(edges[..4], [2.0 * f32::MIN_POSITIVE, 2.0 * f32::MIN_POSITIVE, 1.0, 0.5]);
        assert!(edges[4].is_nan() && edges[5].is_nan());
    }

    #[test]
    fn exp_at_the_edges() {
        let mut x = [f32::NEG_INFINITY, -1e30, -88.0, 0.0, 89.0, f32::INFINITY, f32::NAN];
        exp_many(&mut x);
        assert_eq!(x[..6], [0.0, 0.0, 0.0, 1.0, f32::INFINITY, f32::INFINITY]);
        assert!(x[6].is_nan());
    }

    #[test]
    fn exp_has_the_same_bits_in_a_vector_and_alone() {
        let xs: Vec<f32> = (0..67).map(|i| -20.0 + i as f32 * 0.613).collect();
        let mut together = xs.clone();
        exp_many(&mut together);
        for (x, y) in xs.iter().zip(together) {
            let mut alone = [*x];
            exp_many(&mut alone);
            assert_eq!(alone[0].to_bits(), y.to_bits());
        }
    }
}
