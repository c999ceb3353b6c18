//! The whole loop learns: from rewards alone, a policy that says one of four numbers comes to say the right one.

use foveate::config;
use foveate::rl;
use foveate::run::{Interrupt, Start};
use foveate::sft;

use crate::tiny;

#[test]
fn rewards_alone_teach_the_right_answer() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let model = tiny::checkpoint(dir, 9);
    let rows = tiny::rows(dir, 4);

    // First the form: any of four numbers, equally often.
    let dialogues = tiny::four_numbers(dir);
    let plan: sft::Plan = config::parse(
        &format!(
            r#"
            [model]
            path = "{}"
            [data]
            train = "{}"
            max_pixels = 6272
            min_pixels = 3136
            [optim]
            lr = 1e-2
            [train]
            out = "{}"
            steps = 40
            batch = 8
            "#,
            model.display(),
            dialogues.display(),
            dir.join("sft").display()
        ),
        &[],
    )
    .unwrap();
    sft::train(&plan, Start::New, &Interrupt::none()).unwrap();

    // Then which of them: the reward is all it is told.
    let plan: rl::Plan = config::parse(
        &format!(
            r#"
            [model]
            path = "{}"
            [data]
            train = "{}"
            [task]
            template = "short"
            turns = 1
            judge = "number"
            max_pixels = 6272
            min_pixels = 3136
            [rollout]
            max_new_tokens = 8
            max_tokens = 256
            [objective]
            kl_coef = 0.0
            [optim]
            lr = 1.5e-3
            [train]
            out = "{}"
            steps = 20
            prompts = 4
            group = 8
            checkpoint_every = 0
            episodes_every = 0
            "#,
            dir.join("sft/checkpoints/40").display(),
            rows.display(),
            dir.join("rl").display()
        ),
        &[],
    )
    .unwrap();
    let mut rewards = Vec::new();
    rl::train(&plan, Start::New, &Interrupt::none(), &mut |_, metrics| {
        rewards.push(metrics["reward/mean"].as_f64().unwrap())
    })
    .unwrap();
    let mean = |r: &[f64]| r.iter().sum::<f64>() / r.len() as f64;
    let (first, last) = (mean(&rewards[..2]), mean(&rewards[17..]));
    println!("reward {first:.2} -> {last:.2}: {rewards:.2?}");
    // It starts near one in four.
    assert!((0.05..0.6).contains(&first), "{rewards:?}");
    assert!(last > first + 0.3 && last > 0.8, "{rewards:?}");

    // Updates in bands: while the policy is still the reference, no episode is far from its own reference, in whatever order the
    // groups stand.
    let mut banded = plan;
    banded.objective.insert("kl_coef".into(), 0.01.into());
    banded.optim.lr = 1e-12;
    banded.train = rl::TrainOptions { out: dir.join("banded"), steps: 1, updates: 2, bands: true, ..banded.train };
    let metrics = rl::train(&banded, Start::New, &Interrupt::none(), &mut |_, _| {}).unwrap();
    assert!(metrics["reward_std"].as_f64().unwrap() > 0.0, "groups differ");
    let kl = metrics["actor/ref_kl"].as_f64().unwrap();
    assert!(kl.abs() < 1e-9, "{kl}");
}
