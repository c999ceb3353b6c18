//! AdamW in one pass over the parameters.
//!
//! Equal to `torch.optim.AdamW` (Loshchilov & Hutter 2019, arXiv:1711.05101): decoupled weight decay first, then the bias-corrected
//! step, with eps added after the square root's correction.

use crate::vector::dispatch;
use rayon::prelude::*;

/// Learning rate, decay rates, and the number of this step, counted from 1.
#[derive(Clone, Copy, Debug)]
pub struct Hyper {
    pub lr: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    pub weight_decay: f32,
    pub step: u64,
}

/// One step: parameters p and moments m, v change in place; the gradient is multiplied by `clip_scale` as it is read.
///
/// # Shapes
/// All equal.
pub fn update(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], hyper: Hyper, clip_scale: f32) {
    let n = p.len();
    assert!(
        g.len() == n && m.len() == n && v.len() == n,
        "adamw: p, g, m, v have {n}, {}, {}, {} numbers",
        g.len(),
        m.len(),
        v.len()
    );
    assert!(hyper.step > 0, "adamw: steps are counted from 1");
    let (b1, b2, lr) = (f64::from(hyper.beta1), f64::from(hyper.beta2), f64::from(hyper.lr));
    let correction = |b: f64| 1.0 - (hyper.step as f64 * b.ln()).exp();
    let s = Scalars {
        decay: (1.0 - lr * f64::from(hyper.weight_decay)) as f32,
        b1: hyper.beta1,
        c1: (1.0 - b1) as f32,
        b2: hyper.beta2,
        c2: (1.0 - b2) as f32,
        step_size: (lr / correction(b1)) as f32,
        inv_root: (1.0 / correction(b2).sqrt()) as f32,
        eps: hyper.eps,
        clip_scale,
    };
    const CHUNK: usize = 1 << 15;
    p.par_chunks_mut(CHUNK)
        .zip(g.par_chunks(CHUNK))
        .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
        .for_each(|((p, g), (m, v))| update_many(p, g, m, v, s));
}

#[derive(Clone, Copy)]
struct Scalars {
    decay: f32,
    b1: f32,
    c1: f32,
    b2: f32,
    c2: f32,
    step_size: f32,
    inv_root: f32,
    eps: f32,
    clip_scale: f32,
}

dispatch! { fn update_many(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], s: Scalars) = update_body }
#[inline(always)]
fn update_body<const LEVEL: u8>(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], s: Scalars) {
    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * s.clip_scale;
        *m = s.b1 * *m + s.c1 * g;
        *v = s.b2 * *v + s.c2 * g * g;
        let denominator = v.sqrt() * s.inv_root + s.eps;
        *p = *p * s.decay - s.step_size * (*m / denominator);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{assert_close, numbers, wide};

    #[test]
    fn the_first_step_moves_by_the_learning_rate() {
        // After one step m/(1-b1) = g and v/(1-b2) = g², so p moves by lr·sign(g) (eps aside), after the decay.
        let (mut p, mut m, mut v) = ([1.0, 1.0], [0.0; 2], [0.0; 2]);
        let hyper = Hyper { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 0.0, weight_decay: 0.5, step: 1 };
        update(&mut p, &[3.0, -0.002], &mut m, &mut v, hyper, 1.0);
        assert!((p[0] - (0.95 - 0.1)).abs() < 1e-6 && (p[1] - (0.95 + 0.1)).abs() < 1e-6, "{p:?}");
    }

    /// The update as torch.optim.AdamW documents it, in f64.
    fn oracle(p: &mut [f64], m: &mut [f64], v: &mut [f64], g: &[f64], h: Hyper) {
        let [lr, b1, b2, eps, decay] = [h.lr, h.beta1, h.beta2, h.eps, h.weight_decay].map(f64::from);
        for i in 0..p.len() {
            p[i] -= lr * decay * p[i];
            m[i] = b1 * m[i] + (1.0 - b1) * g[i];
            v[i] = b2 * v[i] + (1.0 - b2) * g[i] * g[i];
            let m_hat = m[i] / (1.0 - b1.powi(h.step as i32));
            let v_hat = v[i] / (1.0 - b2.powi(h.step as i32));
            p[i] -= lr * m_hat / (v_hat.sqrt() + eps);
        }
    }

    #[test]
    fn twenty_steps_agree_with_the_oracle() {
        let n = 70;
        let (mut p, mut m, mut v) = (numbers(1, n), vec![0.0; n], vec![0.0; n]);
        let (mut ps, mut ms, mut vs) = (wide(&p), wide(&m), wide(&v));
        for step in 1..=20 {
            let hyper = Hyper { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step };
            let g = numbers(100 + step, n);
            let clipped: Vec<f64> = g.iter().map(|&g| f64::from(g) * 0.25).collect();
            update(&mut p, &g, &mut m, &mut v, hyper, 0.25);
            oracle(&mut ps, &mut ms, &mut vs, &clipped, hyper);
        }
        // Twenty steps of 0.01, each good to some 1e-6 of itself, on top of parameters rounded at 6e-8.
        assert_close("p", &p, &ps, 2e-6);
        assert_close("m", &m, &ms, 1e-6);
        assert_close("v", &v, &vs, 1e-6);
    }
}
