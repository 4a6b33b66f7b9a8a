//! Damaged files: whatever the bytes, reading ends soon, with rows or errors, never with a panic.
//!
//! The seeds are the small files of `tests/fixtures/rows` and some lines below. Each is read as it is; then `FUZZ_RUNS`
//! (2,000 unless set) mutations of them for each kind of file, the same on every machine. `FUZZ_TARGET` names one kind.
//! `cargo xtask fuzz` runs many, with cargo-fuzz where that is installed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use ferrotune_data::readers::read_through;

/// Counted draws, the same on every machine (splitmix64).
struct Draws(u64);

impl Draws {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % limit.max(1) as u64) as usize
    }
}

const TEXTS: [(&str, &[u8]); 8] = [
    ("a.json", br#"[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "\u00e9\ud83e\udd80"}]}, {"a": [1e9, -0.5, null, true]}]"#),
    ("a.json", b"{\"text\": \"x\"}\n{\n\"text\":\n[[[{}]]]}\n7 \"s\" "),
    ("a.jsonl", b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": [{\"type\": \"text\", \"text\": \"b\"}], \"tool_calls\": []}]}\r\n\n{\"text\": 1}"),
    ("a.jsonl", b"{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n{\"instruction\": \"a\", \"output\": \"b\", \"label\": true}"),
    ("a.csv", b"instruction,output,history\na,\"b\n\"\"c\"\"\",\"[[\"\"q\"\",\"\"a\"\"]]\"\n,,\n"),
    ("a.tsv", b"text\tn\nx\t1\n"),
    ("a.txt", b"one\r\n\n\xEF\xBB\xBFtwo"),
    ("a.txt", b"\xEF\xBB\xBFone\n\xFF\xFE"),
];
/// Pieces that mean something to some reader.
const PIECES: [&[u8]; 14] = [
    b"\"",
    b"\\",
    b"{",
    b"]",
    b",",
    b"\n",
    b"\r\n",
    b"\xEF\xBB\xBF",
    b"\xFF\xFF\xFF\xFF",
    b"\x00\x00\x00\x00",
    b"PAR1",
    b"ARROW1",
    b"\xFF\xFF\xFF\x7F",
    b"\x80\x80\x80\x80\x80\x80\x80\x01",
];

fn seeds(kind: &str) -> Vec<Vec<u8>> {
    let texts = TEXTS.iter().filter(|(name, _)| name.ends_with(kind)).map(|it| it.1.to_vec());
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/rows");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|it| it.unwrap().path()).collect();
    files.sort();
    let files = files.into_iter().filter(|it| it.extension().is_some_and(|it| it == &kind[1..]));
    texts.chain(files.map(|it| std::fs::read(it).unwrap())).collect()
}

fn mutated(seed: &[u8], draws: &mut Draws) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..1 + draws.below(4) {
        let at = draws.below(bytes.len() + 1);
        match draws.below(7) {
            0 if at < bytes.len() => bytes[at] = draws.below(256) as u8,
            1 if at < bytes.len() => bytes[at] ^= 1 << draws.below(8),
            2 => bytes.truncate(at),
            3 => {
                let end = (at + draws.below(16)).min(bytes.len());
                bytes.drain(at..end);
            }
            4 => {
                let piece = PIECES[draws.below(PIECES.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
            5 => {
                let piece = PIECES[draws.below(PIECES.len())];
                let end = (at + piece.len()).min(bytes.len());
                bytes.splice(at..end, piece.iter().copied());
            }
            _ => {
                let from = draws.below(bytes.len() + 1);
                let copied = bytes[from..(from + draws.below(64)).min(bytes.len())].to_vec();
                bytes.splice(at..at, copied);
            }
        }
    }
    bytes
}

#[test]
fn damaged_files_are_read_without_a_panic() {
    let runs: u64 = std::env::var("FUZZ_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(2000);
    let only = std::env::var("FUZZ_TARGET").ok();
    // The Parquet and Arrow crates panic on some damaged files, which the readers catch: nothing to be told.
    std::panic::set_hook(Box::new(|_| {}));
    let mut failed = Vec::new();
    for kind in [".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow"] {
        if only.as_ref().is_some_and(|only| *only != kind[1..]) {
            continue;
        }
        let seeds = seeds(kind);
        let name = format!("f{kind}");
        let mut check = |what: String, bytes: &[u8]| {
            let start = std::time::Instant::now();
            let read = catch_unwind(AssertUnwindSafe(|| read_through(&name, bytes)));
            if read.is_err() || start.elapsed().as_secs() > 20 {
                failed.push(what);
            }
            read.unwrap_or(0)
        };
        for (index, seed) in seeds.iter().enumerate() {
            check(format!("{kind} seed {index}"), seed);
        }
        let mut rows = 0;
        for run in 0..runs {
            let mut draws = Draws(run << 8 | 7);
            let bytes = mutated(&seeds[run as usize % seeds.len()], &mut draws);
            rows += check(format!("{kind} run {run}"), &bytes);
        }
        assert!(rows > 0, "{kind}: mutations are read to some rows");
        eprintln!("{kind}: {runs} runs, {rows} rows");
    }
    let _ = std::panic::take_hook();
    assert!(failed.is_empty(), "{failed:?}");
}
