use super::*;

use crate::test_support::Scratch;

fn no_hub(hub: &HubSet) -> std::result::Result<Vec<PathBuf>, String> {
    Err(format!("asked for {hub:?}"))
}

fn load(name: &str, folder: &Path, options: &SourceOptions) -> Result<Loaded> {
    DataSet::find(name, folder, &no_hub)?.load(options)
}

/// Loads a file with this content; `line: first content` of each conversation, or the error with F for the file.
fn check_with(file: &str, content: &[u8], options: &SourceOptions, expected: &str) {
    let folder = Scratch::new();
    std::fs::write(folder.path().join(file), content).unwrap();
    let path = folder.path().join(file).display().to_string();
    let shown = match load(file, folder.path(), options) {
        Ok(loaded) => {
            let shown = |(place, conversation): &(Place, Conversation)| {
                format!("{}: {}", place.line, conversation.messages[0].content)
            };
            let mut lines: Vec<String> = loaded.conversations.iter().map(shown).collect();
            lines.extend(loaded.counts.skipped.iter().map(|it| {
                let places: Vec<String> = it.first.iter().map(|place| place.line.to_string()).collect();
                format!("{} skipped: {}", places.join("+"), it.reason)
            }));
            lines.join(", ")
        }
        Err(error) => error.to_string().replace(&path, "F"),
    };
    assert_eq!(shown, expected);
}

/// With a stop at the first bad row.
fn check(file: &str, content: &str, expected: &str) {
    let options = SourceOptions { on_bad_row: OnBadRow::Stop, ..SourceOptions::default() };
    check_with(file, content.as_bytes(), &options, expected);
}

/// Skipping bad rows.
fn check_skips(file: &str, content: &[u8], expected: &str) {
    check_with(file, content, &SourceOptions::default(), expected);
}

#[test]
fn files_and_lines() {
    check("a.jsonl", "{\"text\": \"x\"}\n\n{\"text\": \"y\"}\n", "1: x, 3: y");
    check(
        "a.json",
        "[\n {\"text\": \"x\"},\n\n {\"text\":\n \"y\"}, {\"text\": \"z\"}\n]",
        "2: x, 4: y, 5: z",
    );
    check("a.json", "{\"text\": \"x\"}\n{\"text\": \"y\"}\n", "1: x, 2: y");
    check("a.json", "{\n\"text\": \"x\"\n}", "1: x");
    check("a.json", "{\n\"text\": \"x\"\n}\n{\n\"text\": \"y\"}", "1: x, 4: y");
    check("a.json", "\u{FEFF}[{\"text\": \"x\"}]", "1: x");
    check("a.jsonl", "\u{FEFF}{\"text\": \"x\"}\r\n{\"text\": \"y\"}\r\n", "1: x, 2: y");
    check("a.txt", "one\n\ntwo", "F:2: the text is empty: there is nothing to train on");
    check_skips(
        "a.txt",
        b"one\n\ntwo\r\n",
        "1: one, 3: two, 2 skipped: the text is empty: there is nothing to train on",
    );
}

#[test]
fn malformed_rows_are_named() {
    let one_line = "not a JSON object on one line";
    check(
        "a.jsonl",
        "{\"text\": \"x\"}\n{\"text\": \n",
        &format!("F:2: {one_line}: EOF while parsing a value"),
    );
    check("a.jsonl", "{\"text\": \"x\"}\n5\n", "F:2: expected an object, found a number");
    check("a.json", "[\n{\"text\": \"x\"},\n{\"text\": }]", "F:3: not JSON: expected value");
    let comma = "expected `,` or `]` after a row of the list";
    check("a.json", "[\n{\"text\": \"x\"}\n{\"text\": \"y\"}]", &format!("F:3: {comma}"));
    check("a.json", "[\n{\"text\": \"x\"},\n", "F:3: the list of rows is not closed with `]`");
    check("a.json", "[\n{\"text\": \"x", "F:2: the list of rows is not closed with `]`");
    check("a.json", "[{\"text\": \"x\"}] 7", "F:1: expected nothing after the list of rows");
    check("a.jsonl", "{\"text\": \"x\"}\n{\"tex\": \"y\"}\n", "F:2: no column `text`; the row has: tex");
    // What can be passed over is; what can't stops in any case.
    check_skips(
        "a.jsonl",
        b"{\"text\": \"x\"}\n7\n{\"text\": 1}\n{\"text\": \"\xFF\"}\n{\"tex",
        "1: x, 2 skipped: expected an object, found a number, 3 skipped: expected a text in column `text`, \
         found a number, 4 skipped: not UTF-8 text, 5 skipped: not a JSON object on one line: EOF while parsing a string",
    );
    check_skips(
        "a.json",
        b"[{\"text\": \"x\"}, {\"text\": },\n{\"text\": \"]}\\\"\"}, [1], 3, {\"text\":\"z\"}]",
        "1: x, 2: ]}\", 2: z, 1 skipped: not JSON: expected value, 2 skipped: expected an object, found a list, 2 skipped: expected an object, found a number",
    );
    check_skips("a.json", b"[{\"text\": \"x\"} {\"text\": \"y\"}]", &format!("F:1: {comma}"));
}

#[test]
fn tables() {
    check("a.csv", "text,n\nx,1\n\"a,\n\"\"b\"\"\",2\nz,3\n", "2: x, 3: a,\n\"b\", 5: z");
    check("a.tsv", "instruction\toutput\nq\ta\n", "2: q");
    check_skips(
        "a.csv",
        b"instruction,output\nq,a\nq\nq,\n\xFF,a\n",
        "2: q, 3 skipped: expected 2 columns, found 1, 4 skipped: no answer in column `output`: there is nothing to \
         train on, 5 skipped: column `instruction` is not UTF-8 text",
    );
    check_skips(
        "a.csv",
        b"instruction,output\nq,a\nr,\"b\nq,a\n\ns,c\n",
        "2: q, 3 skipped: the quote that opens on this line is never closed; it takes the 3 lines after it along",
    );
    check_skips(
        "a.csv",
        b"instruction,output\nq,\"a\n\"\"b\"\"\"\nq,x\"y\nr,\"a\n",
        "2: q, 4: q, 5 skipped: the quote that opens on this line is never closed; it takes the 0 lines after it along",
    );
    check("a.csv", "text,text\nx,y\n", "F:1: two columns are called `text`");
    check(
        "a.csv",
        "messages,n\n\"[{\"\"from\"\": \"\"human\"\", \"\"value\"\": \"\"q\"\"},{\"\"from\"\": \"\"gpt\"\", \"\"value\"\": \"\"a\"\"}]\",1\n",
        "2: q",
    );
}

#[test]
fn packed_files_folders_and_patterns() {
    use std::io::Write as _;
    let folder = Scratch::new();
    let path = |name: &str| folder.path().join(name);
    std::fs::create_dir_all(path("set/deep")).unwrap();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(b"{\"text\": \"x\"}\n").unwrap();
    std::fs::write(path("set/a.jsonl.gz"), gz.finish().unwrap()).unwrap();
    let zst = zstd::encode_all(&b"text\ny\n"[..], 1).unwrap();
    std::fs::write(path("set/deep/b.csv.zst"), zst).unwrap();
    std::fs::write(path("set/readme.md"), "# not rows").unwrap();
    std::fs::write(path("set/.hidden.jsonl"), "7").unwrap();
    let texts = |name: &str| {
        let loaded = load(name, folder.path(), &SourceOptions::default())?;
        assert_eq!(loaded.counts.files, loaded.conversations.len());
        Ok(loaded.conversations.iter().map(|it| it.1.messages[0].content.clone()).collect::<String>())
    };
    let check = |name: &str, expected: &str| {
        let texts = texts(name).unwrap_or_else(|error: Error| error.to_string());
        assert!(texts.contains(expected), "{texts}");
    };
    check("set", "xy");
    check("set/*.gz", "x");
    check("set/**/*.zst", "y");
    check("set/*.parquet", "no data set `set/*.parquet`");
    std::fs::write(path("set/c.jsonl.gz"), [0x1F, 0x8B, 8, 0, 1]).unwrap();
    check("set/c.jsonl.gz", "cannot read");
    std::fs::create_dir(path("empty")).unwrap();
    check("empty", "has no file of rows; expected .json");
}

#[test]
fn empty_and_unknown_files() {
    check("a.json", "[]", "data set `a.json` has no rows");
    check("a.jsonl", "\n\n", "data set `a.jsonl` has no rows");
    check("a.csv", "", "data set `a.csv` has no rows");
    check("a.csv", "text", "data set `a.csv` has no rows");
    check(
        "a.doc",
        "",
        "`F`: cannot tell the kind of file from its name; expected .json, .jsonl, .csv, .tsv, .txt, .parquet or \
         .arrow (the text ones also as .gz or .zst)",
    );
    check("a", "{\"text\": \"x\"}", "1: x");
    check_skips(
        "a.jsonl",
        b"7\n",
        "no row of data set `a.jsonl` can be used; the first one: F:1: expected an object, found a number",
    );
}

#[test]
fn placeholders() {
    let values = [("name", "Fe"), ("author", "{{name}}")].map(|(a, b)| (a.to_string(), b.to_string()));
    let options = SourceOptions { substitute: values.into(), ..SourceOptions::default() };
    let check = |text: &str, expected: &str| {
        let line = serde_json::json!({ "text": text }).to_string();
        check_with("a.jsonl", line.as_bytes(), &options, expected);
    };
    check("I am {{name}}, by {{ author }}.", "1: I am Fe, by {{name}}.");
    check("{{ 1 + 1 }} {{x", "1: {{ 1 + 1 }} {{x");
    // A mistake in the config, which no row is left out for.
    check("{{nam}}", "F:1: placeholder `{{nam}}` has no value; given are: author, name");
    check_with("a.jsonl", b"{\"text\": \"{{nam}}\"}", &SourceOptions::default(), "1: {{nam}}");
}

#[test]
fn at_most_so_many_rows() {
    let options = SourceOptions { max_samples: Some(2), ..SourceOptions::default() };
    check_with(
        "a.jsonl",
        b"{\"text\": \"x\"}\n7\n{\"text\": \"y\"}\n",
        &options,
        "1: x, 2 skipped: expected an object, found a number",
    );
}

#[test]
fn registry() {
    let folder = Scratch::new();
    let sharegpt = serde_json::json!({"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "m"},
                     "tags": {"user_tag": "u", "assistant_tag": "a"}});
    let with = |key: &str, value: serde_json::Value| {
        let mut entry = sharegpt.clone();
        entry[key] = value;
        entry
    };
    let info = serde_json::json!({
        "mine": sharegpt,
        "hub": {"hf_hub_url": "x/y", "file_name": "a.json", "subset": "en", "split": "test", "folder": "data"},
        "modelscope": {"ms_hub_url": "x/y"},
        "script": {"script_url": "x.py"},
        "nowhere": {"formatting": "alpaca"},
        "misspelt": with("formating", "alpaca".into()),
        "column": with("columns", serde_json::json!({"message": "m"})),
        "some": with("num_samples", 5.into()),
        "none": with("num_samples", 0.into()),
        "ranked": with("ranking", "yes".into()),
        "form": with("formatting", "xml".into()),
        "gone": {"file_name": "gone.json"},
    });
    std::fs::write(folder.path().join("dataset_info.json"), info.to_string()).unwrap();
    let rows = r#"[{"m": [{"from": "u", "value": "1"}, {"from": "a", "value": "2"}]},
                   {"m": [{"from": "u", "value": "3"}, {"from": "a", "value": "4"}]}]"#;
    std::fs::write(folder.path().join("a.json"), rows).unwrap();
    let options = SourceOptions::default();
    let loaded = load("mine", folder.path(), &options).unwrap();
    assert_eq!((loaded.counts.format.as_str(), loaded.conversations.len()), ("sharegpt", 2));
    let some = load("some", folder.path(), &options).unwrap();
    assert_eq!((some.counts.used, some.conversations.len()), (2, 5));
    assert_eq!(load("some", folder.path(), &options).unwrap().conversations, some.conversations);
    let check = |name: &str, expected: &str| {
        let error = load(name, folder.path(), &options).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(
        "hub",
        "asked for HubSet { name: \"x/y\", subset: Some(\"en\"), split: Some(\"test\"), revision: None, folder: Some(\"data\") }",
    );
    check("modelscope", "`ms_hub_url`: is not there yet");
    check("script", "no code of a data set is ever run");
    check("nowhere", "data set `nowhere` in dataset_info.json: it names no source");
    check("misspelt", "unknown key `formating`");
    check("column", "unknown key `columns.message`; expected prompt");
    check("none", "expected a number of rows, 1 or more");
    check("ranked", "expected true or false in `ranking`, found a text");
    check("form", "unknown data format `xml`; expected alpaca");
    check("gone", "there is no file `");
    check("nobody", "no data set `nobody`: there is no such file");
    check(
        "org/name?split=test",
        "asked for HubSet { name: \"org/name\", subset: None, split: Some(\"test\")",
    );
    check("org/name.jsonl", "no data set `org/name.jsonl`");
    let error = load("mine", Path::new("ONLINE"), &options).unwrap_err().to_string();
    assert!(error.starts_with("no data set `mine`"), "{error}");
}
