//! Whether a trace helps: MG-Thinker's second filter (arXiv 2609.37374), over episodes that were played without and with the traces.
//!
//! The rule needs two numbers of each row: how well a model answers directly, and how well with the trace. Both are read from the
//! records of `foveate eval` (or `rollout`), so that any model, template and number of answers can be meant. It hides their
//! reading. What must stay true: several episodes of a row count by their mean; a row without episodes is never taken for a good one.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::Rejected;
use crate::data::Sample;
use crate::reward::Parts;

/// A row that is right without a trace must rise by this share of its IoU ("IoU rises >= 10 %"). Perfect answers cannot.
const RISE: f64 = 0.10;
/// A row that is wrong both ways must gain this much IoU ("gains >= 20 % IoU").
const GAIN: f64 = 0.20;

/// What the answers to a row are worth, as means over its episodes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Worth {
    /// 0 on a wrong picture.
    iou: f64,
    /// Share of episodes in which everything was found with an IoU of at least 0.5, on the right picture.
    right: f64,
}

impl Worth {
    /// More often than not.
    fn is_right(self) -> bool {
        self.right > 0.5
    }
}

/// The rule. A row that was right and is wrong with its trace has not gained, whatever its IoU.
fn helps(direct: Worth, reasoned: Worth) -> bool {
    let gain = reasoned.iou - direct.iou;
    match (direct.is_right(), reasoned.is_right()) {
        (true, true) => gain >= RISE * direct.iou,
        (true, false) => false,
        (false, true) => true,
        (false, false) => gain >= GAIN,
    }
}

/// Rows by id, answered directly and with their traces.
pub(super) struct Gains {
    direct: HashMap<String, Worth>,
    reasoned: HashMap<String, Worth>,
}

impl Gains {
    /// # Errors
    /// A file that cannot be read or holds other records, or none of these rows.
    pub fn read(direct: &Path, reasoned: &Path, rows: &[Sample]) -> Result<Gains> {
        let of = |path: &Path| {
            let worth = read(path)?;
            ensure!(
                rows.iter().any(|row| worth.contains_key(&row.id)),
                "reading what answers are worth: none of the rows was played here; expected episodes of the same rows: {}",
                path.display()
            );
            Ok(worth)
        };
        Ok(Gains { direct: of(direct)?, reasoned: of(reasoned)? })
    }

    /// Whether the trace of a row is worth keeping.
    pub fn judge(&self, id: &str) -> Result<(), Rejected> {
        match (self.direct.get(id), self.reasoned.get(id)) {
            (Some(direct), Some(reasoned)) if helps(*direct, *reasoned) => Ok(()),
            (Some(_), Some(_)) => Err(Rejected::NoGain),
            _ => Err(Rejected::Unmeasured),
        }
    }
}

/// As much of an episode record as is needed.
#[derive(Deserialize)]
struct Played {
    id: String,
    rewards: Parts,
}

fn read(path: &Path) -> Result<HashMap<String, Worth>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading episodes: {}", path.display()))?;
    let mut sums: HashMap<String, (Worth, f64)> = HashMap::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let named = || format!("line {} is no episode of a task of several pictures: {}", i + 1, path.display());
        let Played { id, rewards } = serde_json::from_str(line).with_context(named)?;
        let part = |name: &str| {
            rewards.get(name).with_context(|| format!("there is no {name:?} in its rewards")).with_context(named)
        };
        let (iou, right) = (part("iou")?, part("joint")?);
        let (sum, n) = sums.entry(id).or_default();
        sum.iou += iou;
        sum.right += right;
        *n += 1.0;
    }
    Ok(sums.into_iter().map(|(id, (sum, n))| (id, Worth { iou: sum.iou / n, right: sum.right / n })).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worth(iou: f64) -> Worth {
        Worth { iou, right: f64::from(u8::from(iou >= 0.5)) }
    }

    #[test]
    fn the_published_rule() {
        for (direct, reasoned, kept) in [
            (0.60, 0.67, true),  // right, and 11.7 % more
            (0.60, 0.65, false), // right, and 8.3 % more
            (0.95, 1.00, false), // right, and no room for 10 %
            (0.60, 0.40, false),
            (0.45, 0.51, true), // wrong became right
            (0.00, 0.25, true), // wrong, and gains 0.25
            (0.10, 0.25, false),
            (0.00, 0.00, false),
        ] {
            assert_eq!(helps(worth(direct), worth(reasoned)), kept, "{direct} -> {reasoned}");
        }
        // Two targets: the mean IoU rises, but one is no longer found.
        assert!(!helps(Worth { iou: 0.5, right: 1.0 }, Worth { iou: 0.7, right: 0.0 }));
    }

    #[test]
    fn several_episodes_of_a_row_count_by_their_mean() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.jsonl");
        let line = |id: &str, iou: f64, joint: f64| {
            format!("{{\"id\":\"{id}\",\"rewards\":{{\"iou\":{iou},\"joint\":{joint}}}}}\n")
        };
        std::fs::write(&path, line("a", 0.2, 0.0) + "\n" + &line("a", 0.8, 1.0) + &line("b", 1.0, 1.0)).unwrap();
        let read = read(&path).unwrap();
        assert_eq!((read["a"], read["b"]), (Worth { iou: 0.5, right: 0.5 }, Worth { iou: 1.0, right: 1.0 }));
        assert!(!read["a"].is_right(), "right half of the time is not more often than not");
        let rows = [Sample { id: "a".into(), ..Sample::question(&[], "?", vec![]) }];
        let gains = Gains::read(&path, &path, &rows).unwrap();
        assert_eq!((gains.judge("a"), gains.judge("c")), (Err(Rejected::NoGain), Err(Rejected::Unmeasured)));
        let error = Gains::read(&path, &path, &[]).err().unwrap().to_string();
        assert!(error.contains("none of the rows") && error.contains("0.jsonl"), "{error}");
        std::fs::write(&path, "{\"id\": \"a\", \"rewards\": {\"accuracy\": 1}}\n").unwrap();
        let error = format!("{:#}", Gains::read(&path, &path, &rows).err().unwrap());
        assert!(error.contains("line 1") && error.contains("\"iou\"") && error.contains("0.jsonl"), "{error}");
    }
}
