use std::path::PathBuf;

use serde_json::json;

use super::*;
use crate::test_support::Scratch;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/rows").join(name)
}

fn all(name: &str) -> Result<Vec<serde_json::Map<String, Value>>> {
    open(&fixture(name))?.map(|row| row.map(|row| row.fields)).collect()
}

/// Files that pyarrow and datasets wrote hold the same rows as JSON.
#[test]
fn parquet_and_arrow_hold_what_json_does() {
    let expected = all("rows.json").unwrap();
    assert_eq!(expected.len(), 5);
    let names = [
        "snappy.parquet",
        "zstd.parquet",
        "gzip.parquet",
        "lz4.parquet",
        "none.parquet",
        "plain.arrow",
        "large.arrow",
        "datasets.arrow",
    ];
    for name in names {
        let rows = all(name).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(rows, expected, "{name}");
    }
    let error = all("brotli.parquet").unwrap_err().to_string();
    assert!(error.contains("brotli.parquet:") && error.to_lowercase().contains("brotli"), "{error}");
    let error = all("lz4.arrow").unwrap_err().to_string();
    assert!(error.contains("lz4.arrow:") && error.to_lowercase().contains("lz4"), "{error}");
    let places: Vec<usize> =
        open(&fixture("plain.arrow")).unwrap().map(|row| row.unwrap().place.line).collect();
    assert_eq!(places, [1, 2, 3, 4, 5]);
}

/// Whatever is cut off or changed in a file, it gives rows or an error.
#[test]
fn damaged_tables_are_errors() {
    for name in ["snappy.parquet", "zstd.parquet", "plain.arrow", "datasets.arrow"] {
        let bytes = std::fs::read(fixture(name)).unwrap();
        let kind = if name.ends_with("parquet") { Kind::Parquet } else { Kind::Arrow };
        let read = |bytes: Vec<u8>| match super::rows_of_bytes(kind, bytes, Path::new("f")) {
            Ok(rows) => rows.map(|row| row.is_err()).fold(false, |a, b| a | b),
            Err(_) => true,
        };
        assert!(!read(bytes.clone()), "{name}");
        for length in (0..bytes.len()).step_by(97) {
            read(bytes[..length].to_vec());
        }
        assert!(read(bytes[..bytes.len() / 2].to_vec()), "{name}");
    }
}

#[test]
fn the_kind_is_told_by_name_or_content() {
    let folder = Scratch::new();
    let check = |name: &str, content: &[u8], expected: usize| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let rows = open(&path).map(|rows| rows.filter(Result::is_ok).count());
        assert_eq!(rows.unwrap_or(99), expected, "{name}");
    };
    let arrow = std::fs::read(fixture("plain.arrow")).unwrap();
    let parquet = std::fs::read(fixture("snappy.parquet")).unwrap();
    check("arrow", &arrow, 5);
    check("0001", &parquet, 5);
    check("lines", b"{}\n{}\n", 2);
    check("picture", b"\x89PNG", 99);
    // A mirror that unpacks.
    check("plain.jsonl.gz", b"{}\n", 1);
    check("table.parquet.gz", b"\x1F\x8B", 99);
}

/// A reader of `count` bytes made as they are read.
struct Made(u64, u8);

impl Read for Made {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = buffer.len().min(self.0 as usize);
        buffer[..count].fill(self.1);
        self.0 -= count as u64;
        Ok(count)
    }
}

/// A line of a gigabyte is passed over in little memory.
#[test]
fn a_row_without_end_is_passed_over() {
    let gigabyte = 1 << 30;
    let check = |kind: Kind, start: &'static [u8], end: &'static [u8], expected: &str| {
        let before = peak_bytes();
        let reader = start.chain(Made(gigabyte, b'a')).chain(end);
        let rows = text_rows(kind, unpacked(reader), Place::new("f", 0));
        let shown: Vec<String> = rows
            .map(|row| match row {
                Ok(row) => format!("{}: {}", row.place, json!(row.fields)),
                Err(error) => error.to_string(),
            })
            .collect();
        assert_eq!(shown.join(" | "), expected);
        let grown = peak_bytes() - before;
        assert!(grown < 4 * LONGEST_ROW as u64, "{grown}");
    };
    let long = "the row is longer than 64 MiB";
    let row = r#"{"text":"x"}"#;
    check(Kind::JsonLines, b"{\"text\": \"", b"\"}\n{\"text\": \"x\"}", &format!("f:1: {long} | f:2: {row}"));
    check(Kind::Json, b"[{\"text\": \"", b"\"},\n{\"text\": \"x\"}]", &format!("f:1: {long} | f:2: {row}"));
    check(Kind::Text, b"", b"\nx", &format!("f:1: {long} | f:2: {row}"));
    check(Kind::Csv, b"text\n\"", b"\"\nx", &format!("f:2: {long}; a quote opened on line 2"));
}

/// The most memory that this process ever had, in bytes; 0 where the system doesn't say.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).map_or(0, |kib| kib << 10)
}
