//! Small statistics for result tables and curves: means, 95 % intervals, a paired test, smoothing.
//!
//! Pure functions on plain numbers. What must stay true: an interval is never narrower than the number of
//! independent questions allows (several answers to one question are one cluster, not several facts), and nothing
//! here turns an empty input into a confident zero.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The two-sided 95 % quantile of the normal distribution.
const Z95: f64 = 1.959_963_984_540_054;

/// A number with its 95 % interval; one cell of a result table.
///
/// ```
/// use foveate::stats::wilson;
/// let cell = wilson(50, 100);
/// assert_eq!((cell.value, cell.n), (0.5, 100));
/// assert!((cell.low - 0.4038).abs() < 1e-4 && (cell.high - 0.5962).abs() < 1e-4);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The estimate itself (for a share: between 0 and 1).
    pub value: f64,
    /// Lower end of the 95 % interval.
    pub low: f64,
    /// Upper end of the 95 % interval.
    pub high: f64,
    /// How many observations went in.
    pub n: usize,
}

/// The arithmetic mean, or `None` of nothing.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The share `successes / n` with Wilson's score interval (Wilson 1927, doi:10.1080/01621459.1927.10502953).
///
/// Unlike the textbook normal interval it stays within [0, 1] and has a width at 0 of n and n of n.
/// With `n = 0` nothing is known: the value is NaN and the interval is [0, 1].
pub fn wilson(successes: usize, n: usize) -> Estimate {
    if n == 0 {
        return Estimate { value: f64::NAN, low: 0.0, high: 1.0, n };
    }
    let share = successes as f64 / n as f64;
    let (low, high) = wilson_bounds(share, n as f64);
    Estimate { value: share, low, high, n }
}

/// Wilson's interval for a share seen in `n` observations, where `n` may be an effective, fractional number.
fn wilson_bounds(share: f64, n: f64) -> (f64, f64) {
    let z2 = Z95 * Z95;
    let centre = (share + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z95 / (1.0 + z2 / n) * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
    ((centre - half).max(0.0), (centre + half).min(1.0))
}

/// The variance of the mean when observations of one cluster may be dependent, with the G/(G-1) correction
/// (Liang & Zeger 1986; for evaluations of language models: Miller 2024, arXiv:2411.00640, equation 4).
/// `None` with fewer than two clusters, when nothing can be said. Returns the number of clusters too.
fn clustered_variance<K: Ord>(values: &[f64], clusters: &[K], mean: f64) -> (usize, Option<f64>) {
    let mut sums: BTreeMap<&K, f64> = BTreeMap::new();
    for (value, cluster) in values.iter().zip(clusters) {
        *sums.entry(cluster).or_default() += value - mean;
    }
    let (groups, n) = (sums.len(), values.len() as f64);
    if groups < 2 {
        return (groups, None);
    }
    let squares: f64 = sums.values().map(|sum| sum * sum).sum();
    let correction = groups as f64 / (groups as f64 - 1.0);
    (groups, Some(correction * squares / (n * n)))
}

/// The mean of `values` with a normal interval whose width counts clusters (questions), not observations.
///
/// `clusters[i]` names the question of `values[i]`. With one cluster the interval is unbounded; with no values all is NaN.
///
/// # Panics
/// If the two slices differ in length: that is a bug of the caller, not of the data.
pub fn clustered_mean<K: Ord>(values: &[f64], clusters: &[K]) -> Estimate {
    assert_eq!(values.len(), clusters.len(), "one cluster name per value");
    let n = values.len();
    let Some(value) = mean(values) else {
        return Estimate { value: f64::NAN, low: f64::NAN, high: f64::NAN, n };
    };
    let half = match clustered_variance(values, clusters, value) {
        (_, Some(variance)) => Z95 * variance.sqrt(),
        (_, None) => f64::INFINITY,
    };
    Estimate { value, low: value - half, high: value + half, n }
}

/// The mean of scores in [0, 1] (right or wrong) with Wilson's interval at the effective number of observations.
///
/// The clustered variance says how many independent observations would have been as informative; that number goes
/// into Wilson's formula. So several answers to the same question do not narrow the interval, and all right or all wrong
/// still leaves a width (then each question counts once). With one value per question it is [`wilson`].
///
/// # Panics
/// If the two slices differ in length: that is a bug of the caller, not of the data.
pub fn clustered_share<K: Ord>(values: &[f64], clusters: &[K]) -> Estimate {
    assert_eq!(values.len(), clusters.len(), "one cluster name per value");
    let n = values.len();
    let Some(value) = mean(values) else {
        return Estimate { value: f64::NAN, low: 0.0, high: 1.0, n };
    };
    let (groups, variance) = clustered_variance(values, clusters, value);
    let effective = if groups == n {
        n as f64
    } else {
        match variance {
            Some(variance) if variance > 0.0 => (value * (1.0 - value) / variance).clamp(1.0, n as f64),
            _ => groups as f64,
        }
    };
    let (low, high) = wilson_bounds(value, effective);
    Estimate { value, low, high, n }
}

/// The exact two-sided p-value of McNemar's test: under "no difference" each of the `b + c` questions on which the
/// systems disagree is a fair coin (McNemar 1947, doi:10.1007/BF02295996). 1 when they never disagree.
pub fn mcnemar_exact(b: usize, c: usize) -> f64 {
    let n = b + c;
    if n == 0 {
        return 1.0;
    }
    // Summed in logarithms: 2^n leaves f64 at n = 1024.
    let mut log_choose = 0.0_f64;
    let mut tail = 0.0_f64;
    for k in 0..=b.min(c) {
        if k > 0 {
            log_choose += ((n - k + 1) as f64).ln() - (k as f64).ln();
        }
        tail += (log_choose - n as f64 * std::f64::consts::LN_2).exp();
    }
    (2.0 * tail).min(1.0)
}

/// By how much one system is better than another on the same questions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Mean over questions of the first's share of right answers less the second's, between -1 and 1, with its 95 % interval; `n` counts questions.
    #[serde(flatten)]
    pub estimate: Estimate,
    /// Two-sided exact p under "for each question, who does better is a fair coin".
    pub p: f64,
}

/// Compares two systems question by question. `first[i]` of `of_first` answers of the first to question i were right, and so for the second.
///
/// The interval is Agresti and Min's for matched pairs (2005, doi:10.1002/sim.1781): half a question of each of the four outcomes is
/// added to the normal interval of the mean difference, so that it has a width where the systems never disagree; with several answers to a
/// question its mean difference takes the place of -1, 0 or 1. The p-value is that of the exact sign-flip test, which is McNemar's
/// where each question has one answer.
///
/// ```
/// use foveate::stats::difference;
/// let d = difference(&[1, 1, 1, 0], 1, &[0, 1, 0, 0], 1);
/// assert_eq!((d.estimate.value, d.estimate.n, d.p), (0.5, 4, 0.5));
/// ```
///
/// # Panics
/// If the two slices differ in length or a system gave no answers: that is a bug of the caller, not of the data.
pub fn difference(first: &[usize], of_first: usize, second: &[usize], of_second: usize) -> Difference {
    assert_eq!(first.len(), second.len(), "both systems answer the same questions");
    assert!(of_first > 0 && of_second > 0, "both systems answer");
    // In whole numbers, of which `unit` is one right answer of each.
    let unit = (of_first * of_second) as f64;
    let steps: Vec<i64> =
        first.iter().zip(second).map(|(&a, &b)| (a * of_second) as i64 - (b * of_first) as i64).collect();
    let n = steps.len();
    if n == 0 {
        return Difference { estimate: Estimate { value: f64::NAN, low: f64::NAN, high: f64::NAN, n }, p: 1.0 };
    }
    let sum: f64 = steps.iter().map(|&s| s as f64 / unit).sum();
    let squares: f64 = steps.iter().map(|&s| (s as f64 / unit).powi(2)).sum();
    let padded = n as f64 + 2.0;
    let centre = sum / padded;
    let half = Z95 * (((squares + 1.0) / padded - centre * centre) / padded).sqrt();
    // A difference of everything stands at the end of its interval, not beyond it.
    let value = sum / n as f64;
    let (low, high) = ((centre - half).max(-1.0).min(value), (centre + half).min(1.0).max(value));
    Difference { estimate: Estimate { value, low, high, n }, p: sign_flip(&steps) }
}

/// The exact two-sided p-value of the sign-flip test: how often the sum of `steps` would be at least as far from 0 if the sign of each were
/// a fair coin (Fisher 1935, The Design of Experiments, section 21).
fn sign_flip(steps: &[i64]) -> f64 {
    let divisor = steps.iter().fold(0, |divisor, &step| gcd(divisor, step.unsigned_abs()));
    let sizes: Vec<usize> =
        steps.iter().filter(|&&step| step != 0).map(|step| (step.unsigned_abs() / divisor) as usize).collect();
    if sizes.iter().all(|&size| size == 1) {
        let better = steps.iter().filter(|&&step| step > 0).count();
        return mcnemar_exact(better, sizes.len() - better);
    }
    // The chance of each sum of the steps that came up positive, one step after another.
    let all: usize = sizes.iter().sum();
    let mut chance = vec![0.0_f64; all + 1];
    chance[0] = 1.0;
    let mut reached = 0;
    for size in sizes {
        reached += size;
        for sum in (0..=reached).rev() {
            chance[sum] = 0.5 * (chance[sum] + if sum >= size { chance[sum - size] } else { 0.0 });
        }
    }
    let seen = steps.iter().filter(|&&step| step > 0).map(|&step| step as usize / divisor as usize).sum::<usize>();
    let near = seen.min(all - seen);
    (2.0 * chance[..=near].iter().sum::<f64>()).min(1.0)
}

/// The greatest common divisor, that of nothing and a number being the number.
fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Exponential moving average, corrected for its start (as Adam corrects its moments), so the first value is the first input.
/// `keep` in [0, 1) is the weight of the past. Values that are not finite are carried over: the average before them is repeated.
pub fn ema(values: &[f64], keep: f64) -> Vec<f64> {
    let (mut sum, mut weight) = (0.0, 0.0);
    values
        .iter()
        .map(|&value| {
            if value.is_finite() {
                sum = keep * sum + (1.0 - keep) * value;
                weight = keep * weight + (1.0 - keep);
            }
            if weight > 0.0 { sum / weight } else { f64::NAN }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounding of a handful of f64 operations on numbers near one.
    const ROUNDING: f64 = 1e-12;

    #[test]
    fn wilson_matches_the_values_of_a_printed_table() {
        // Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857), table I, method 3, given to four decimals.
        for (successes, n, low, high) in
            [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
        {
            let got = wilson(successes, n);
            assert!((got.low - low).abs() < 6e-5, "{successes}/{n}: low {} is not {low}", got.low);
            assert!((got.high - high).abs() < 6e-5, "{successes}/{n}: high {} is not {high}", got.high);
        }
    }

    #[test]
    fn wilson_of_nothing_knows_nothing() {
        let got = wilson(0, 0);
        assert!(got.value.is_nan());
        assert_eq!((got.low, got.high, got.n), (0.0, 1.0, 0));
    }

    #[test]
    fn clustered_mean_by_hand() {
        // Clusters a = {1, 1}, b = {0, 0}: mean 1/2, cluster sums of deviations +1 and -1,
        // variance = 2/(2-1) * (1 + 1) / 16 = 1/4, standard error 1/2.
        let got = clustered_mean(&[1.0, 1.0, 0.0, 0.0], &["a", "a", "b", "b"]);
        assert_eq!(got.value, 0.5);
        assert!((got.high - (0.5 + Z95 * 0.5)).abs() < ROUNDING);
        assert!((got.low - (0.5 - Z95 * 0.5)).abs() < ROUNDING);
        // Four questions instead of two: deviations ±1/2 each, variance = 4/3 * (4 * 1/4) / 16 = 1/12.
        let got = clustered_mean(&[1.0, 1.0, 0.0, 0.0], &[1, 2, 3, 4]);
        assert!((got.high - (0.5 + Z95 * (1.0_f64 / 12.0).sqrt())).abs() < ROUNDING);
    }

    #[test]
    fn copies_of_an_answer_do_not_narrow_a_share() {
        let alone = wilson(3, 10);
        let scores: Vec<f64> = (0..80).map(|i| if i % 10 < 3 { 1.0 } else { 0.0 }).collect();
        let questions: Vec<usize> = (0..80).map(|i| i % 10).collect();
        let copied = clustered_share(&scores, &questions);
        assert_eq!((copied.value, copied.n), (0.3, 80));
        // Effective n is 9 here, not 10: the clustered variance divides by G - 1. So it may only be wider.
        assert!(copied.low < alone.low && copied.high > alone.high);
        let (low, high) = wilson_bounds(0.3, 9.0);
        assert!((copied.low - low).abs() < 1e-9 && (copied.high - high).abs() < 1e-9);
    }

    #[test]
    fn one_answer_per_question_is_plain_wilson_even_when_all_are_right() {
        let questions: Vec<usize> = (0..20).collect();
        assert_eq!(clustered_share(&[0.0; 20], &questions), wilson(0, 20));
        // Ten questions answered right twice: no more certain than ten right once.
        let twice: Vec<usize> = (0..20).map(|i| i / 2).collect();
        let got = clustered_share(&[1.0; 20], &twice);
        assert_eq!((got.low, got.high), (wilson(10, 10).low, wilson(10, 10).high));
    }

    #[test]
    fn mcnemar_by_hand() {
        assert_eq!(mcnemar_exact(0, 0), 1.0);
        // 10 coins, at most one head: (1 + 10) / 1024, twice.
        assert!((mcnemar_exact(1, 9) - 22.0 / 1024.0).abs() < ROUNDING);
        assert_eq!(mcnemar_exact(9, 1), mcnemar_exact(1, 9));
        // An even split is capped at one.
        assert_eq!(mcnemar_exact(2, 2), 1.0);
        // 2000 coins do not overflow: 0 heads is 2^-1999, which is zero in f64's range only below 1e-308.
        assert!(mcnemar_exact(0, 1000) > 0.0 && mcnemar_exact(0, 1000) < 1e-300);
        assert!((mcnemar_exact(1000, 1000) - 1.0).abs() < ROUNDING);
    }

    #[test]
    fn a_difference_has_agresti_and_mins_interval() {
        // 10 questions, 3 that only the first gets right and 1 that only the second does. By hand, with 3.5, 1.5 and 12:
        // centre 2/12, variance (5/12 - 1/36)/12.
        let first = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0];
        let second = [0, 0, 0, 1, 1, 1, 0, 0, 0, 0];
        let got = difference(&first, 1, &second, 1);
        let half = Z95 * ((5.0_f64 / 12.0 - 1.0 / 36.0) / 12.0).sqrt();
        assert!((got.estimate.value - 0.2).abs() < ROUNDING);
        assert!((got.estimate.low - (1.0 / 6.0 - half)).abs() < ROUNDING);
        assert!((got.estimate.high - (1.0 / 6.0 + half)).abs() < ROUNDING);
        assert_eq!(got.p, mcnemar_exact(3, 1));
        // Who never disagree are not certainly the same.
        let same = difference(&first, 1, &first, 1);
        assert!(same.estimate.low < -0.1 && same.estimate.high > 0.1 && same.p == 1.0);
        let all = difference(&[1; 3], 1, &[0; 3], 1).estimate;
        assert!(all.value == 1.0 && all.high == 1.0 && all.low < 0.7);
        assert!(difference(&[], 1, &[], 1).estimate.value.is_nan());
    }

    #[test]
    fn several_answers_to_a_question_are_one_coin() {
        // Twice the answers, all of them alike: nothing is learned.
        let (first, second) = ([2, 2, 2, 0, 2], [0, 0, 0, 2, 2]);
        let once = difference(&[1, 1, 1, 0, 1], 1, &[0, 0, 0, 1, 1], 1);
        assert_eq!(difference(&first, 2, &second, 2), once);
        // Steps of 2, 1 and -1: the 8 signs give the sums 4, 2, 2, 0, 0, -2, -2, -4, and the one seen is 2: 6 of 8 are as far from 0.
        let got = difference(&[2, 1, 0], 2, &[0, 0, 1], 2);
        assert!((got.p - 0.75).abs() < ROUNDING && (got.estimate.value - 1.0 / 3.0).abs() < ROUNDING, "{got:?}");
        // The other way round it is the same test.
        assert!((difference(&[0, 0, 1], 2, &[2, 1, 0], 2).p - got.p).abs() < ROUNDING);
        // One of 2 against 2 of 4 answers is no difference.
        assert_eq!(difference(&[1], 2, &[2], 4).estimate.value, 0.0);
    }

    #[test]
    fn smoothing_starts_at_the_first_value_and_passes_over_gaps() {
        let got = ema(&[2.0, 4.0, f64::NAN, 4.0], 0.5);
        // (0.5*1 + 0.5*4) / 0.75 with sum 1 after the first: 2.5 / 0.75.
        assert_eq!(got[0], 2.0);
        assert!((got[1] - 2.5 / 0.75).abs() < ROUNDING);
        assert_eq!(got[2], got[1]);
        assert!((got[3] - 3.25 / 0.875).abs() < ROUNDING);
        assert!(ema(&[f64::NAN], 0.5)[0].is_nan());
    }
}
