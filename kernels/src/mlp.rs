//! The element-wise parts of the feed-forward layers: SiLU, SwiGLU and exact GELU, with gradients.
//!
//! Element-wise, so rows cannot influence each other; the exponential has the same bits wherever an element lies.

use crate::vector::{dispatch, exp, mul_add, sigmoid};
use rayon::prelude::*;

/// Elements handled by one task.
const CHUNK: usize = 1 << 14;

fn same(what: &str, lengths: &[usize]) {
    assert!(lengths.windows(2).all(|w| w[0] == w[1]), "mlp: {what}: the slices differ in length: {lengths:?}");
}

/// y = f(x), in parallel when it is long enough.
fn one(y: &mut [f32], x: &[f32], f: fn(&mut [f32], &[f32])) {
    if y.len() <= CHUNK {
        return f(y, x);
    }
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| f(y, x));
}

/// y = f(a, b), in parallel when it is long enough.
fn two(y: &mut [f32], a: &[f32], b: &[f32], f: fn(&mut [f32], &[f32], &[f32])) {
    if y.len() <= CHUNK {
        return f(y, a, b);
    }
    let inputs = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
    y.par_chunks_mut(CHUNK).zip(inputs).for_each(|(y, (a, b))| f(y, a, b));
}

/// y = x · sigmoid(x).
///
/// # Shapes
/// Any, equal.
pub fn silu_forward(y: &mut [f32], x: &[f32]) {
    same("silu", &[y.len(), x.len()]);
    one(y, x, silu_many);
}

dispatch! { fn silu_many(y: &mut [f32], x: &[f32]) = silu_body }
#[inline(always)]
fn silu_body<const LEVEL: u8>(y: &mut [f32], x: &[f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = x * sigmoid::<LEVEL>(x);
    }
}

/// dx = dy · (s + x·s·(1 − s)) with s = sigmoid(x).
pub fn silu_backward(dx: &mut [f32], dy: &[f32], x: &[f32]) {
    same("silu backward", &[dx.len(), dy.len(), x.len()]);
    two(dx, dy, x, silu_grad_many);
}

dispatch! { fn silu_grad_many(dx: &mut [f32], dy: &[f32], x: &[f32]) = silu_grad_body }
#[inline(always)]
fn silu_grad_body<const LEVEL: u8>(dx: &mut [f32], dy: &[f32], x: &[f32]) {
    for ((dx, &dy), &x) in dx.iter_mut().zip(dy).zip(x) {
        let s = sigmoid::<LEVEL>(x);
        *dx = dy * (s + x * s * (1.0 - s));
    }
}

/// h = silu(gate) · up (Shazeer 2020, arXiv:2002.05202).
///
/// # Shapes
/// Any, equal; usually `[T, N]`.
pub fn swiglu_forward(h: &mut [f32], gate: &[f32], up: &[f32]) {
    same("swiglu", &[h.len(), gate.len(), up.len()]);
    two(h, gate, up, swiglu_many);
}

dispatch! { fn swiglu_many(h: &mut [f32], gate: &[f32], up: &[f32]) = swiglu_body }
#[inline(always)]
fn swiglu_body<const LEVEL: u8>(h: &mut [f32], gate: &[f32], up: &[f32]) {
    for ((h, &g), &u) in h.iter_mut().zip(gate).zip(up) {
        *h = g * sigmoid::<LEVEL>(g) * u;
    }
}

/// All three in place: gate becomes dgate = dh · up · silu'(gate), up becomes dup = dh · silu(gate), dh becomes h again.
pub fn swiglu_backward(dh: &mut [f32], gate: &mut [f32], up: &mut [f32]) {
    same("swiglu backward", &[dh.len(), gate.len(), up.len()]);
    if dh.len() <= CHUNK {
        return swiglu_grad_many(dh, gate, up);
    }
    dh.par_chunks_mut(CHUNK)
        .zip(gate.par_chunks_mut(CHUNK).zip(up.par_chunks_mut(CHUNK)))
        .for_each(|(dh, (gate, up))| swiglu_grad_many(dh, gate, up));
}

dispatch! { fn swiglu_grad_many(dh: &mut [f32], gate: &mut [f32], up: &mut [f32]) = swiglu_grad_body }
#[inline(always)]
fn swiglu_grad_body<const LEVEL: u8>(dh: &mut [f32], gate: &mut [f32], up: &mut [f32]) {
    for ((dh, gate), up) in dh.iter_mut().zip(gate).zip(up) {
        let (d, g, u) = (*dh, *gate, *up);
        let s = sigmoid::<LEVEL>(g);
        *gate = d * u * (s + g * s * (1.0 - s));
        *up = d * (g * s);
        *dh = g * s * u;
    }
}

/// y = x · Φ(x), the exact GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415), as `nn.GELU()` computes it.
///
/// # Shapes
/// Any, equal.
pub fn gelu_forward(y: &mut [f32], x: &[f32]) {
    same("gelu", &[y.len(), x.len()]);
    one(y, x, gelu_many);
}

dispatch! { fn gelu_many(y: &mut [f32], x: &[f32]) = gelu_body }
#[inline(always)]
fn gelu_body<const LEVEL: u8>(y: &mut [f32], x: &[f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = x * normal_cdf::<LEVEL>(x);
    }
}

/// dx = dy · (Φ(x) + x·φ(x)).
pub fn gelu_backward(dx: &mut [f32], dy: &[f32], x: &[f32]) {
    same("gelu backward", &[dx.len(), dy.len(), x.len()]);
    two(dx, dy, x, gelu_grad_many);
}

dispatch! { fn gelu_grad_many(dx: &mut [f32], dy: &[f32], x: &[f32]) = gelu_grad_body }
#[inline(always)]
fn gelu_grad_body<const LEVEL: u8>(dx: &mut [f32], dy: &[f32], x: &[f32]) {
    const INV_SQRT_2PI: f32 = 0.398_942_3;
    for ((dx, &dy), &x) in dx.iter_mut().zip(dy).zip(x) {
        let density = INV_SQRT_2PI * exp::<LEVEL>(-0.5 * x * x);
        *dx = dy * (normal_cdf::<LEVEL>(x) + x * density);
    }
}

/// Φ(x) = erfc(−x/√2)/2 without branches, relative error below 2e-6 where Φ matters, absolute below 2e-7.
///
/// erfc(z) = t · exp(−z² + g(t)) for z ≥ 0 with t = 1/(1 + z/2); g is smooth on (0, 1], and the polynomial is its
/// interpolation at 11 Chebyshev points, in powers of t − 1/2 (largest error 1e-8 for z up to 10).
#[inline(always)]
fn normal_cdf<const LEVEL: u8>(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.5 * z);
    let u = t - 0.5;
    let mut g = -0.153_006_14;
    g = mul_add::<LEVEL>(g, u, 0.272_500_43);
    g = mul_add::<LEVEL>(g, u, -0.010_081_558);
    g = mul_add::<LEVEL>(g, u, -0.295_869_2);
    g = mul_add::<LEVEL>(g, u, 0.109_578_215);
    g = mul_add::<LEVEL>(g, u, 0.282_400_24);
    g = mul_add::<LEVEL>(g, u, -0.157_836_92);
    g = mul_add::<LEVEL>(g, u, -0.375_170_7);
    g = mul_add::<LEVEL>(g, u, 0.189_371_38);
    g = mul_add::<LEVEL>(g, u, 1.345_286_5);
    g = mul_add::<LEVEL>(g, u, -0.671_794_1);
    let tail = 0.5 * t * exp::<LEVEL>(mul_add::<LEVEL>(-z, z, g));
    if x < 0.0 { tail } else { 1.0 - tail }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{self, assert_close, assert_same_bits, gradient, numbers, weighted, wide};

    fn spread(n: usize) -> Vec<f32> {
        (0..n).map(|i| -6.0 + 12.0 * i as f32 / (n - 1) as f32).collect()
    }

    #[test]
    fn values_by_hand() {
        let mut y = [0.0; 3];
        silu_forward(&mut y, &[0.0, 100.0, -100.0]);
        assert_eq!(y[..2], [0.0, 100.0]);
        assert!(y[2].abs() < 1e-38);
        // x·Φ(x) at 1: 0.8413447460685429; at -1: -0.15865525393145707
        gelu_forward(&mut y, &[1.0, -1.0, 0.0]);
        assert!((y[0] - 0.841_344_7).abs() < 2e-7 && (y[1] + 0.158_655_25).abs() < 1e-7, "{y:?}");
        assert_eq!(y[2], 0.0);
    }

    #[test]
    fn agree_with_the_oracle_and_its_finite_differences() {
        let (x, up, dy) = (spread(1000), numbers(1, 1000), numbers(2, 1000));
        let (xs, ups) = (wide(&x), wide(&up));
        let silu = |x: &[f64]| x.iter().map(|&x| oracle::silu(x)).collect::<Vec<_>>();
        let gelu = |x: &[f64]| x.iter().map(|&x| oracle::gelu(x)).collect::<Vec<_>>();
        let swiglu = |g: &[f64], u: &[f64]| g.iter().zip(u).map(|(&g, u)| oracle::silu(g) * u).collect::<Vec<_>>();
        // Element-wise, so one element's difference is the whole gradient: no need for n² work.
        let slope = |f: &dyn Fn(&[f64]) -> Vec<f64>, x: &[f64], dy: &[f32]| -> Vec<f64> {
            x.iter().zip(dy).flat_map(|(&x, &dy)| gradient(&[x], |x| weighted(&f(x), &[dy]))).collect()
        };
        let mut y = vec![f32::NAN; 1000];
        let mut dx = vec![f32::NAN; 1000];
        // Each: a handful of roundings at 6e-8 of numbers up to 6 (relative above 1).
        silu_forward(&mut y, &x);
        assert_close("silu", &y, &silu(&xs), 6e-7);
        silu_backward(&mut dx, &dy, &x);
        assert_close("silu backward", &dx, &slope(&silu, &xs, &dy), 6e-7);
        gelu_forward(&mut y, &x);
        assert_close("gelu", &y, &gelu(&xs), 6e-7);
        gelu_backward(&mut dx, &dy, &x);
        assert_close("gelu backward", &dx, &slope(&gelu, &xs, &dy), 1e-6);
        swiglu_forward(&mut y, &x, &up);
        assert_close("swiglu", &y, &swiglu(&xs, &ups), 6e-7);
        let (mut dgate, mut dup, mut h) = (x.clone(), up.clone(), dy.clone());
        swiglu_backward(&mut h, &mut dgate, &mut dup);
        assert_same_bits("h again", &h, &y);
        let per_gate: Vec<f64> =
            (0..1000).flat_map(|i| gradient(&xs[i..=i], |g| weighted(&swiglu(g, &ups[i..=i]), &dy[i..=i]))).collect();
        let per_up: Vec<f64> =
            (0..1000).flat_map(|i| gradient(&ups[i..=i], |u| weighted(&swiglu(&xs[i..=i], u), &dy[i..=i]))).collect();
        assert_close("dgate", &dgate, &per_gate, 6e-7);
        assert_close("dup", &dup, &per_up, 6e-7);
    }

    #[test]
    fn an_element_has_the_same_bits_alone() {
        let (x, up) = (spread(101), numbers(1, 101));
        let (mut h, mut g) = (vec![0.0; 101], vec![0.0; 101]);
        swiglu_forward(&mut h, &x, &up);
        gelu_forward(&mut g, &x);
        for i in 0..101 {
            let mut one = [0.0];
            swiglu_forward(&mut one, &x[i..=i], &up[i..=i]);
            assert_same_bits("swiglu", &one, &h[i..=i]);
            gelu_forward(&mut one, &x[i..=i]);
            assert_same_bits("gelu", &one, &g[i..=i]);
        }
    }

    #[test]
    fn huge_inputs_stay_finite() {
        let x = [-1e30, -1e4, -90.0, 90.0, 1e4, 1e30];
        let mut y = [0.0; 6];
        for i in 0..4 {
            match i {
                0 => silu_forward(&mut y, &x),
                1 => gelu_forward(&mut y, &x),
                2 => gelu_backward(&mut y, &[1.0; 6], &x),
                _ => silu_backward(&mut y, &[1.0; 6], &x),
            }
            assert!(y.iter().all(|v| v.is_finite()), "function {i}: {y:?}");
        }
        let (mut gate, mut up) = (x, [1.0; 6]);
        y = [1.0; 6];
        swiglu_backward(&mut y, &mut gate, &mut up);
        assert!(y.iter().chain(&gate).chain(&up).all(|v| v.is_finite()), "{y:?} {gate:?} {up:?}");
    }
}
