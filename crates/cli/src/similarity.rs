//! How like an expected answer a model's answer is, as LLaMA-Factory's predict counts it
//! (train/sft/metric.py): BLEU-4 of characters (Papineni et al. 2002, with Chen and Cherry's third
//! smoothing), ROUGE-1, 2 and L of words (Lin 2004), which jieba finds in Chinese. One difference is known:
//! jieba-rs leaves Latin words with hyphens whole.

use std::collections::{HashMap, HashSet};

use jieba_rs::Jieba;

/// Scores from 0 to 100.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Similarity {
    /// BLEU-4
    pub bleu_4: f64,
    /// F of ROUGE-1.
    pub rouge_1: f64,
    /// F of ROUGE-2.
    pub rouge_2: f64,
    /// F of ROUGE-L.
    pub rouge_l: f64,
}

/// Compares texts; holds jieba's dictionary.
pub struct Comparer(Jieba);

impl Comparer {
    /// Reads the dictionary.
    pub fn new() -> Comparer {
        Comparer(Jieba::new())
    }

    /// How like `label` the text `predict` is.
    pub fn compare(&self, predict: &str, label: &str) -> Similarity {
        let bleu_4 = 100.0 * bleu(&predict.chars().collect::<Vec<_>>(), &label.chars().collect::<Vec<_>>());
        let (predict, label) = (self.words(predict), self.words(label));
        if predict.iter().all(|it| it.is_empty()) || label.iter().all(|it| it.is_empty()) {
            return Similarity { bleu_4, ..Similarity::default() };
        }
        Similarity {
            bleu_4,
            rouge_1: 100.0 * rouge_n(1, &predict, &label),
            rouge_2: 100.0 * rouge_n(2, &predict, &label),
            rouge_l: 100.0 * f_score(longest_common(&predict, &label), predict.len(), label.len()),
        }
    }

    /// Words, as rouge_chinese takes them apart once more: a sentence of blanks alone is one empty word.
    fn words(&self, text: &str) -> Vec<String> {
        let joined = self.0.cut(text, true).iter().map(|it| it.word).collect::<Vec<_>>().join(" ");
        let mut words = Vec::new();
        for sentence in sentences(&joined).split('\n').filter(|it| !it.is_empty()) {
            let before = words.len();
            words.extend(sentence.split_whitespace().map(str::to_string));
            if words.len() == before {
                words.push(String::new());
            }
        }
        words
    }
}

/// Puts a line's end behind each sentence (`cut_sent` of rouge_chinese).
fn sentences(text: &str) -> String {
    let is_end = |c: &char| "。！？?".contains(*c);
    let is_quote = |c: &char| "”’".contains(*c);
    let end = |it: &[char]| it.first().filter(|it| is_end(it)).map(|_| 1);
    let dots = |it: &[char]| it.starts_with(&['.'; 6]).then_some(6);
    let ellipsis = |it: &[char]| it.starts_with(&['…'; 2]).then_some(2);
    let quoted = |it: &[char]| matches!(it, [c, q, ..] if is_end(c) && is_quote(q)).then_some(2);
    let text = cut(text, end, |next| !is_quote(next));
    let text = cut(&text, dots, |next| !is_quote(next));
    let text = cut(&text, ellipsis, |next| !is_quote(next));
    let text = cut(&text, quoted, |next| *next != '，' && !is_end(next));
    text.trim_end().to_string()
}

/// Ends the line behind each match that such a character follows.
fn cut(text: &str, length: impl Fn(&[char]) -> Option<usize>, follows: impl Fn(&char) -> bool) -> String {
    let chars: Vec<char> = text.chars().collect();
    let (mut out, mut at) = (String::with_capacity(text.len()), 0);
    while at < chars.len() {
        match length(&chars[at..]) {
            Some(length) if chars.get(at + length).is_some_and(&follows) => {
                out.extend(&chars[at..at + length]);
                out.push('\n');
                out.push(chars[at + length]);
                at += length + 1;
            }
            _ => {
                out.push(chars[at]);
                at += 1;
            }
        }
    }
    out
}

/// exp of the mean log of the precisions for 1 to 4 characters, times the penalty for shortness.
fn bleu(predict: &[char], label: &[char]) -> f64 {
    let counts = |text: &[char], n: usize| {
        let mut counts: HashMap<Vec<char>, usize> = HashMap::new();
        text.windows(n).for_each(|it| *counts.entry(it.to_vec()).or_default() += 1);
        counts
    };
    let (mut sum, mut missing) = (0.0, 0);
    for n in 1..=4 {
        let (ours, theirs) = (counts(predict, n), counts(label, n));
        let hits: usize = ours.iter().map(|(it, count)| *count.min(theirs.get(it).unwrap_or(&0))).sum();
        let all = ours.values().sum::<usize>().max(1) as f64;
        match hits {
            0 if n == 1 => return 0.0,
            // 1/2ᵏ of a hit for the k-th length without one.
            0 => {
                missing += 1;
                sum += (0.5f64.powi(missing) / all).ln() / 4.0;
            }
            hits => sum += (hits as f64 / all).ln() / 4.0,
        }
    }
    let shortness = (1.0 - label.len() as f64 / predict.len() as f64).min(0.0);
    (sum + shortness).exp()
}

fn rouge_n(n: usize, predict: &[String], label: &[String]) -> f64 {
    let ours: HashSet<&[String]> = predict.windows(n).collect();
    let theirs: HashSet<&[String]> = label.windows(n).collect();
    f_score(ours.intersection(&theirs).count(), ours.len(), theirs.len())
}

fn f_score(hits: usize, ours: usize, theirs: usize) -> f64 {
    let share = |of: usize| if of == 0 { 0.0 } else { hits as f64 / of as f64 };
    let (precision, recall) = (share(ours), share(theirs));
    2.0 * precision * recall / (precision + recall + 1e-8)
}

/// Length of the longest common subsequence.
fn longest_common(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_those_of_llama_factory() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/similarity.json");
        let pairs: Vec<serde_json::Value> =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let comparer = Comparer::new();
        assert!(pairs.len() > 10);
        for it in pairs {
            let (predict, label) = (it["predict"].as_str().unwrap(), it["label"].as_str().unwrap());
            let cut: Vec<&str> = comparer.0.cut(predict, true).iter().map(|it| it.word).collect();
            let words: Vec<&str> =
                it["words"].as_array().unwrap().iter().filter_map(|it| it.as_str()).collect();
            assert_eq!(cut, words);
            let got = comparer.compare(predict, label);
            for (name, got) in [
                ("bleu-4", got.bleu_4),
                ("rouge-1", got.rouge_1),
                ("rouge-2", got.rouge_2),
                ("rouge-l", got.rouge_l),
            ] {
                let expected = it[name].as_f64().unwrap();
                assert!(
                    (got - expected).abs() < 1e-6,
                    "{predict} / {label}: {name} is {got}, not {expected}"
                );
            }
        }
    }
}
