//! Prints the speed of the products and of attention in GFLOP/s: `cargo run --release -p foveate-kernels --example speed`.
//! For a person to look at after a change; the project's measured numbers come from `foveate bench`.

use foveate_kernels::attention::{self, Dims, Keys, Span};
use foveate_kernels::matrix::{Compute, Matrix};
use foveate_kernels::memory::OnLines;
use foveate_kernels::{linear, logprob, mlp, norm};
use std::hint::black_box;
use std::time::Instant;

#[global_allocator]
static MEMORY: OnLines = OnLines;

const ALL: [Compute; 3] = [Compute::F32, Compute::Bf16x6, Compute::Bf16];

/// Best of several runs, within about a fifth of a second.
fn seconds(mut work: impl FnMut()) -> f64 {
    work();
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed().as_secs_f64() < 0.2 {
        let one = Instant::now();
        work();
        best = best.min(one.elapsed().as_secs_f64());
    }
    best
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1009) as f32 / 504.0 - 1.0).collect()
}

fn line(name: &str, flops: usize, seconds: f64) {
    println!("{name:44} {:8.1} GFLOP/s {:10.3} ms", flops as f64 / seconds / 1e9, seconds * 1e3);
}

fn main() {
    println!("{} threads", rayon::current_num_threads());
    for (m, n) in [(128, 384), (512, 1536)] {
        let w = numbers(n * m);
        for compute in ALL {
            let w = Matrix::from(&w).computed(compute);
            let packed = linear::Packed::new(w, m, n);
            for t in [1, 4, 16, 32, 64, 128, 2048] {
                let (x, mut y) = (numbers(t * m), vec![0.0; t * n]);
                let flops = 2 * t * m * n;
                line(
                    &format!("linear T={t} {m}x{n} {compute:?}"),
                    flops,
                    seconds(|| linear::forward(black_box(&mut y), &x, w, None, false, t, m, n)),
                );
                line("  packed", flops, seconds(|| packed.forward(black_box(&mut y), &x, None, false, t)));
                if t == 2048 {
                    let (mut dx, mut dw) = (vec![0.0; t * m], vec![0.0; n * m]);
                    line(
                        "  backward input",
                        flops,
                        seconds(|| linear::backward_input(black_box(&mut dx), &y, w, t, m, n, false)),
                    );
                    line(
                        "  backward weight",
                        flops,
                        seconds(|| linear::backward_weight(black_box(&mut dw), None, &y, &x, t, m, n, compute)),
                    );
                }
            }
        }
    }
    // Decoding over weights that lie in a file, and in f32: more than any cache holds, so that memory is read.
    let (m, n) = (2048, 65536);
    let w = numbers(n * m);
    let bytes: Vec<[u8; 2]> = w.iter().map(|w| ((w.to_bits() >> 16) as u16).to_le_bytes()).collect();
    for t in [1, 4, 64] {
        let (x, mut y) = (numbers(t * m), vec![0.0; t * n]);
        let (wide, stored) = (Matrix::from(&w), Matrix::from(&bytes[..]));
        for (name, w) in [
            ("f32", wide),
            ("f32 in bf16 by six", wide.computed(Compute::Bf16x6)),
            ("f32 in bf16", wide.computed(Compute::Bf16)),
            ("bf16", stored),
            ("bf16 in bf16", stored.computed(Compute::Bf16)),
        ] {
            let took = seconds(|| linear::forward(black_box(&mut y), &x, w, None, false, t, m, n));
            line(&format!("linear T={t} {m}x{n} {name}"), 2 * t * m * n, took);
        }
    }
    for (t, heads, kv_heads, k, causal) in [
        (256, 4, 4, 32, true),
        (256, 4, 2, 32, true),
        (1500, 8, 8, 64, true),
        (1500, 8, 2, 64, true),
        (1024, 4, 4, 32, false),
        (5120, 4, 4, 32, false),
        (64, 4, 4, 32, false),
        (4096, 6, 6, 64, false),
    ] {
        for compute in ALL {
            if causal && compute != Compute::F32 {
                continue;
            }
            let dims = Dims { heads, kv_heads, k };
            let (q, kk, v) = (numbers(t * heads * k), numbers(t * kv_heads * k), numbers(t * kv_heads * k));
            let (mut o, mut lse) = (vec![0.0; q.len()], vec![0.0; t * heads]);
            let spans = [Span { queries: 0..t, shared: 0..0, own: 0..t, causal }];
            let flops = 4 * t * t * heads * k / if causal { 2 } else { 1 };
            line(
                &format!("attention T={t} H={heads}/{kv_heads} K={k} causal={causal} {compute:?}"),
                flops,
                seconds(|| {
                    attention::forward(black_box(&mut o), &mut lse, &q, Keys::Rows(&kk), &v, &spans, dims, compute)
                }),
            );
            let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; kk.len()], vec![0.0; v.len()]);
            line(
                "  backward",
                flops * 5 / 2,
                seconds(|| {
                    attention::backward(
                        black_box(&mut dq),
                        &mut dk,
                        &mut dv,
                        &o,
                        &o,
                        &lse,
                        &q,
                        &kk,
                        &v,
                        &spans,
                        dims,
                        compute,
                    )
                }),
            );
        }
    }
    // Decoding: 32 sequences of 400 cached keys, one query each, the first 300 keys shared.
    let dims = Dims { heads: 4, kv_heads: 2, k: 32 };
    let (b, row_q, row_k) = (32, 128, 64);
    let (q, kk) = (numbers(b * row_q), numbers((300 + 100 * b) * row_k));
    let spans: Vec<Span> = (0..b)
        .map(|i| Span { queries: i..i + 1, shared: 0..300, own: 300 + 100 * i..400 + 100 * i, causal: true })
        .collect();
    let (mut o, mut lse) = (vec![0.0; q.len()], vec![0.0; b * 4]);
    line(
        "attention decode B=32 keys=400 H=4/2 K=32",
        4 * b * 400 * 4 * 32,
        seconds(|| {
            attention::forward(black_box(&mut o), &mut lse, &q, Keys::Rows(&kk), &kk, &spans, dims, Compute::F32)
        }),
    );

    let (t, d, v) = (256, 128, 4096);
    let (h, w, targets) = (numbers(t * d), numbers(v * d), vec![7u32; t]);
    let mut out = logprob::forward(&h, &w, &targets, 1.0, &[3], d, v);
    line(
        "logprob N=256 D=128 V=4096",
        2 * t * d * v,
        seconds(|| out = logprob::forward(&h, &w, &targets, 1.0, &[3], d, v)),
    );
    let (mut dh, mut dw) = (vec![0.0; t * d], vec![0.0; v * d]);
    let weights = vec![1.0; t];
    line(
        "  backward",
        6 * t * d * v,
        seconds(|| {
            logprob::backward(
                black_box(&mut dh),
                Some(&mut dw),
                &weights,
                None,
                &out,
                &h,
                &w,
                &targets,
                1.0,
                &[3],
                d,
                v,
            )
        }),
    );

    let (t, d) = (2048, 384);
    let (x, g, mut y, mut rstd) = (numbers(t * d), numbers(d), vec![0.0; t * d], vec![0.0; t]);
    line("norm T=2048 D=384", 4 * t * d, seconds(|| norm::forward(black_box(&mut y), &mut rstd, &x, &g, d, 1e-6)));
    line("swiglu T=2048 D=384", 4 * t * d, seconds(|| mlp::swiglu_forward(black_box(&mut y), &x, &x)));
    line("gelu T=2048 D=384", 4 * t * d, seconds(|| mlp::gelu_forward(black_box(&mut y), &x)));
}
