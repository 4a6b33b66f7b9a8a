//! A stream takes the same memory however long its file is. A test of its own: it looks at the whole process.

use std::fmt::Write as _;
use std::io::Write as _;

use ferrotune_data::{
    BatchOptions, BatchSource as _, DataSet, Long, MixStrategy, Sample, SourceOptions, StreamOptions,
    StreamedBatches,
};

/// The most memory that this process ever had, in MiB; none where the system doesn't say.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib >> 10)
}

#[test]
fn a_long_file_takes_no_more_memory() {
    // 64 MiB unless FERROTUNE_TEST_STREAM_MIB says otherwise.
    let size = std::env::var("FERROTUNE_TEST_STREAM_MIB").ok().and_then(|it| it.parse().ok()).unwrap_or(64);
    let folder = std::env::temp_dir().join(format!("ferrotune-stream-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("rows.jsonl");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&path).unwrap());
    let (mut rows, mut written) = (0usize, 0);
    while written < size << 20 {
        let mut line = format!("{{\"text\": \"row {rows}");
        (0..100).for_each(|word| write!(line, " word{}", rows.wrapping_mul(31) % 997 + word).unwrap());
        line.push_str("\"}\n");
        file.write_all(line.as_bytes()).unwrap();
        written += line.len();
        rows += 1;
    }
    file.flush().unwrap();
    drop(file);
    let set = DataSet::find(path.to_str().unwrap(), &folder, &|_| Err(String::new())).unwrap();
    let options = StreamOptions {
        batch: BatchOptions {
            per_device_train_batch_size: 8,
            packing: true,
            cutoff_len: 512,
            seed: 1,
            shuffle: true,
            group_by_length: 0,
        },
        buffer_size: 1000,
        strategy: MixStrategy::Concat,
        chances: Vec::new(),
        evaluation: 0,
        long: Long::AsEncoded,
    };
    let encode = |conversation: &ferrotune_data::Conversation| {
        let tokens: Vec<u32> =
            conversation.messages[0].content.split(' ').map(|it| it.len() as u32).collect();
        Ok(Sample { trained: vec![true; tokens.len()], tokens, ..Sample::default() })
    };
    let mut batches = StreamedBatches::new(vec![set], SourceOptions::default(), encode, options).unwrap();
    let (mut sequences, start) = (0, peak_mib());
    while let Some(batch) = batches.next().unwrap() {
        sequences += batch.sequences();
    }
    let end = peak_mib();
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(sequences, rows);
    eprintln!("{size} MiB in {rows} rows: peak {start:?} MiB after the first batch, {end:?} MiB at the end");
    if let (Some(start), Some(end)) = (start, end) {
        assert!(end < start + 24, "from {start} to {end} MiB");
    }
}
