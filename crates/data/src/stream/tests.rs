use std::fmt::Write as _;

use super::*;
use crate::conversation::Role;
use crate::error::SampleError;
use crate::test_support::Scratch;

/// Sets of texts `a0`, `a1` …, `b0` …; a text `-` gives nothing to train on.
fn stream(folder: &Scratch, sets: &[&[&str]], options: StreamOptions) -> Result<StreamedBatches> {
    let mut found = Vec::new();
    for (index, texts) in sets.iter().enumerate() {
        let name = format!("{index}.jsonl");
        let mut lines = String::new();
        for text in *texts {
            writeln!(lines, "{{\"text\": \"{text}\"}}").unwrap();
        }
        std::fs::write(folder.path().join(&name), lines).unwrap();
        found.push(DataSet::find(&name, folder.path(), &|_| Err(String::new()))?);
    }
    let encode = |conversation: &Conversation| {
        assert_eq!(conversation.messages[0].role, Role::Text);
        let tokens: Vec<u32> = conversation.messages[0].content.bytes().map(u32::from).collect();
        if tokens == [u32::from(b'-')] {
            return Err(SampleError::NothingTrained("a dash".to_string()).into());
        }
        Ok(Sample { trained: vec![true; tokens.len()], tokens, ..Sample::default() })
    };
    StreamedBatches::new(found, SourceOptions::default(), encode, options)
}

fn options() -> StreamOptions {
    StreamOptions {
        batch: BatchOptions {
            per_device_train_batch_size: 2,
            packing: false,
            cutoff_len: 8,
            seed: 7,
            shuffle: false,
            group_by_length: 0,
        },
        buffer_size: 4,
        strategy: MixStrategy::Concat,
        chances: Vec::new(),
        evaluation: 0,
        long: Long::AsEncoded,
    }
}

/// The texts of an epoch, batches apart.
fn epoch(batches: &mut StreamedBatches) -> String {
    let mut shown = Vec::new();
    while let Some(batch) = batches.next().unwrap() {
        let starts = batch.sequence_starts.windows(2);
        let texts = starts.map(|it| &batch.tokens[it[0] as usize..it[1] as usize]);
        let text = |tokens: &[u32]| tokens.iter().filter_map(|it| char::from_u32(*it)).collect::<String>();
        shown.push(texts.map(text).collect::<Vec<_>>().join(" "));
    }
    shown.join(" | ")
}

#[test]
fn sets_are_mixed_as_they_are_read() {
    let folder = Scratch::new();
    let check = |strategy: MixStrategy, expected: &str| {
        let mut batches = stream(
            &folder,
            &[&["a0", "a1", "-"], &["b0", "b1", "b2", "b3"]],
            StreamOptions { strategy, ..options() },
        )
        .unwrap();
        assert_eq!(epoch(&mut batches), expected);
        assert_eq!(epoch(&mut batches), expected, "the next epoch");
    };
    check(MixStrategy::Concat, "a0 a1 | b0 b1 | b2 b3");
    check(MixStrategy::InterleaveUnder, "a0 b0 | a1 b1 | b2");
    check(MixStrategy::InterleaveOver, "a0 b0 | a1 b1 | b2 a0 | b3");
    check(MixStrategy::InterleaveOnce, "a0 b0 | a1 b1 | b2 b3");
    let mut batches = stream(&folder, &[&["a0", "-", "a1"]], options()).unwrap();
    epoch(&mut batches);
    batches.seek(Cursor::default());
    batches.trained_ahead(9);
    let counts = &batches.counts()[0];
    assert_eq!((counts.rows, counts.used, counts.skipped[0].first[0].line), (3, 2, 2));
    assert_eq!(counts.skipped[0].reason, "nothing to train on: a dash");
}

#[test]
fn the_first_samples_are_left_to_evaluation() {
    let folder = Scratch::new();
    let mut batches =
        stream(&folder, &[&["a0", "-", "a1", "a2"]], StreamOptions { evaluation: 2, ..options() }).unwrap();
    assert_eq!(epoch(&mut batches), "a2");
    let evaluation = batches.evaluation().unwrap();
    assert_eq!(
        evaluation.iter().map(|it| it.tokens[1]).collect::<Vec<_>>(),
        [u32::from(b'0'), u32::from(b'1')]
    );
    assert!(stream(&folder, &[&["a0"]], StreamOptions { evaluation: 1, ..options() }).unwrap().is_empty());
    let error = stream(&folder, &[&["-"]], options()).err().unwrap().to_string();
    assert_eq!(error, "no row of the data gives anything to train on");
}

#[test]
fn a_cursor_is_found_again() {
    let folder = Scratch::new();
    let texts: Vec<String> = (0..3000).map(|index| format!("{index:04}")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    for (packing, long) in [(false, Long::AsEncoded), (true, Long::AsEncoded), (true, Long::Split)] {
        let options = || StreamOptions {
            batch: BatchOptions { packing, shuffle: true, per_device_train_batch_size: 7, ..options().batch },
            buffer_size: 100,
            long,
            ..options()
        };
        let mut batches = stream(&folder, &[&texts], options()).unwrap();
        let (mut all, mut cursors, mut seen) = (Vec::new(), Vec::new(), Vec::new());
        while batches.cursor().epoch < 2 {
            cursors.push(batches.cursor());
            assert!(batches.trained_ahead(3) > 0 || batches.trained_ahead(1) == 0);
            all.push(batches.next().unwrap());
            seen.extend(all.last().unwrap().iter().flat_map(|batch| batch.tokens.clone()));
        }
        assert_eq!(seen.len(), 2 * 4 * 3000);
        let half = all.iter().position(Option::is_none).unwrap();
        assert_ne!(all[..20], all[half + 1..half + 21], "the next epoch has another order");
        for index in [0, 1, 17, half - 1, half, half + 1, half + 40] {
            let mut resumed = stream(&folder, &[&texts], options()).unwrap();
            resumed.seek(cursors[index]);
            for expected in all[index..].iter().take(30) {
                assert_eq!(&resumed.next().unwrap(), expected, "{index}");
            }
        }
    }
}
