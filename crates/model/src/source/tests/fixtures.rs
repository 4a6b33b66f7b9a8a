use ferrotune_tensor::DType;
use sha2::{Digest, Sha256};

use super::*;
use crate::source::{FileKind, GgufVocabulary, SafetensorsSource};
use crate::spec::names;

#[test]
fn a_folder_with_one_file_and_llama3_rope() {
    let files = ModelFiles::open(fixture("llama_tiny")).unwrap();
    let spec = &files.spec;
    assert_eq!((spec.vocab_size, spec.hidden_size, spec.layers.len()), (300, 64, 3));
    assert_eq!((files.kind, spec.tie_word_embeddings, spec.norm.eps), (FileKind::Folder, false, 1e-5));
    assert_eq!((spec.bos_token_id, &spec.eos_token_ids[..], spec.pad_token_id), (Some(1), &[2][..], Some(0)));
    let attention = &spec.layers[0].attention;
    assert_eq!(
        (attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim),
        (4, 2, 16)
    );
    let golden = json(&fixture("llama_tiny").join("golden.json"));
    let expected = golden["inv_freq"].as_array().unwrap();
    let got = &attention.rope.as_ref().unwrap().inverse_frequencies;
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        let expected = expected.as_f64().unwrap();
        assert!((got - expected).abs() < 1e-6 * expected, "{got} {expected}");
    }
    let bytes: u64 = files
        .source
        .names()
        .iter()
        .map(|it| {
            let (rows, cols) = files.source.shape(it).unwrap();
            (rows * cols) as u64
        })
        .sum();
    assert_eq!(spec.parameter_count(), bytes);
    let embedding = files.source.get_f32(names::EMBEDDING).unwrap();
    let mut row = vec![0.0; 64];
    files.source.read_rows(names::EMBEDDING, 7..8, &mut row).unwrap();
    assert_eq!(embedding.values::<f32>().unwrap()[7 * 64..8 * 64], row);
    assert!(files.source.read_rows(names::EMBEDDING, 299..301, &mut [0.0; 128]).is_err());
    assert_eq!(files.fingerprint(), ModelFiles::open(fixture("llama_tiny")).unwrap().fingerprint());
}

#[test]
fn shards_in_bf16_with_a_tied_head_and_new_config_keys() {
    let files = ModelFiles::open(fixture("llama_tiny_tied")).unwrap();
    let spec = &files.spec;
    assert!(spec.tie_word_embeddings && !files.source.contains(names::HEAD));
    assert_eq!(spec.layers[0].attention.head_dim, 32);
    let frequencies = &spec.layers[0].attention.rope.as_ref().unwrap().inverse_frequencies;
    assert!((frequencies[1] - 500_000f64.powf(-2.0 / 32.0)).abs() < 1e-12);
    let name = names::weight(1, names::DOWN);
    assert_eq!(files.source.dtype(&name).unwrap(), DType::BF16);
    let stored = files.source.get(&name).unwrap().into_dense().unwrap();
    assert_eq!(stored.dtype(), DType::BF16);
    let wide = files.source.get_f32(&name).unwrap();
    assert_eq!(stored.to_f32().unwrap(), wide.values::<f32>().unwrap());
    assert_ne!(files.fingerprint(), ModelFiles::open(fixture("llama_tiny")).unwrap().fingerprint());
}

#[test]
fn gguf_tensors_are_what_the_reference_reads() {
    let path = fixture("gguf").join("tiny.gguf");
    let files = ModelFiles::open(&path).unwrap();
    assert_eq!((files.kind, files.spec.layers.len(), files.spec.norm.eps), (FileKind::Gguf, 2, 1e-5));
    assert!(files.spec.tie_word_embeddings);
    let golden = json(&fixture("gguf").join("golden.json"));
    let mut seen = 0;
    for (name, expected) in golden["tensors"].as_object().unwrap() {
        let (ours, module) =
            crate::source::GgufArchitecture::named("llama").unwrap().canonical(name).unwrap();
        if matches!(module, "attn_q" | "attn_k") {
            continue; // in our order: below
        }
        let tensor = files.source.get_f32(&ours).unwrap();
        let bytes: Vec<u8> = tensor.values::<f32>().unwrap().iter().flat_map(|it| it.to_le_bytes()).collect();
        assert_eq!(
            crate::source::hex(&Sha256::digest(bytes)),
            expected["sha256_f32"],
            "{name} ({})",
            expected["type"]
        );
        seen += 1;
    }
    assert_eq!(seen, 16);
    let scratch = Scratch::new();
    fs::copy(fixture("gguf").join("rows.safetensors"), scratch.0.join("model.safetensors")).unwrap();
    let rows = SafetensorsSource::open(&scratch.0).unwrap();
    let mut seen = 0;
    for name in rows.names() {
        let Some(ours) = name.strip_prefix("hf.") else { continue };
        let expected = rows.get_f32(name).unwrap();
        let tensor = files.source.get_f32(ours).unwrap();
        let (cols, values) = (tensor.cols(), tensor.values::<f32>().unwrap());
        for (i, row) in golden["hf_rows"].as_array().unwrap().iter().enumerate() {
            let row = row.as_u64().unwrap() as usize;
            let expected = &expected.values::<f32>().unwrap()[i * cols..(i + 1) * cols];
            assert_eq!(&values[row * cols..(row + 1) * cols], expected, "{ours} row {row}");
            let mut one = vec![0.0; cols];
            files.source.read_rows(ours, row..row + 1, &mut one).unwrap();
            assert_eq!(one, expected);
        }
        seen += 1;
    }
    assert_eq!(seen, 4);
}

#[test]
fn gguf_vocabulary_and_config() {
    let files = ModelFiles::open(fixture("gguf").join("tiny.gguf")).unwrap();
    let vocabulary = files.vocabulary.unwrap();
    assert_eq!((vocabulary.model.as_str(), vocabulary.pre.as_str()), ("gpt2", "smollm"));
    assert_eq!(
        (vocabulary.tokens.len(), vocabulary.token_types.len(), vocabulary.scores.len()),
        (264, 264, 0)
    );
    assert_eq!(vocabulary.tokens[1], "<|im_start|>");
    assert_eq!(vocabulary.token_types[..4], [3, 3, 3, 1]);
    assert_eq!(vocabulary.merges.len(), 264 - 3 - 256);
    assert_eq!((vocabulary.bos_token_id, vocabulary.eos_token_id), (Some(1), Some(2)));
    assert_eq!((vocabulary.unk_token_id, vocabulary.pad_token_id), (Some(0), Some(2)));
    assert_eq!((vocabulary.add_bos_token, vocabulary.add_space_prefix), (Some(false), None));
    assert!(vocabulary.chat_template.unwrap().contains("add_generation_prompt"));
    assert_eq!(files.config["rope_theta"], 10_000.0);
    assert_eq!(files.config["head_dim"], 16);
    assert_eq!(files.spec.eos_token_ids, [2]);
}

#[test]
fn tensors_are_read_from_several_threads() {
    let files = ModelFiles::open(fixture("gguf").join("tiny.gguf")).unwrap();
    let source: &dyn WeightSource = files.source.as_ref();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| source.names().iter().for_each(|it| drop(source.get(it).unwrap())));
        }
    });
}

#[test]
fn plain_numbers_of_each_type() {
    let values = [0.0f32, -1.5, 0.333_251_95, 65504.0, 6.0e-8];
    let mut data = Vec::new();
    let mut header = serde_json::Map::new();
    let mut add = |name: &str, kind: &str, bytes: Vec<u8>| {
        let offsets = [data.len(), data.len() + bytes.len()];
        header
            .insert(name.into(), serde_json::json!({ "dtype": kind, "shape": [5], "data_offsets": offsets }));
        data.extend(bytes);
    };
    add("a", "F32", values.iter().flat_map(|it| it.to_le_bytes()).collect());
    add("b", "F16", values.iter().flat_map(|it| half::f16::from_f32(*it).to_le_bytes()).collect());
    add("c", "BF16", values.iter().flat_map(|it| half::bf16::from_f32(*it).to_le_bytes()).collect());
    add("d", "I64", vec![0; 40]);
    let header = serde_json::Value::from(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    let scratch = Scratch::new();
    let source = SafetensorsSource::open_file(&scratch.write("x.safetensors", bytes)).unwrap();
    for (name, dtype) in [("a", DType::F32), ("b", DType::F16), ("c", DType::BF16)] {
        let stored = source.get(name).unwrap().into_dense().unwrap();
        assert_eq!((stored.dtype(), stored.shape()), (dtype, (1, 5)));
        let wide = source.get_f32(name).unwrap();
        assert_eq!(stored.to_f32().unwrap(), wide.values::<f32>().unwrap());
        let close = |(got, value): (&f32, &f32)| (got - value).abs() <= 0.004 * value.abs() + 1e-8;
        assert!(wide.values::<f32>().unwrap().iter().zip(&values).all(close), "{wide:?}");
    }
    let message = source.get("d").unwrap_err().to_string();
    assert!(message.contains("`d`") && message.contains("I64"), "{message}");
}

#[test]
fn vocabularies_of_other_families() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/llama.cpp/vocab");
    let Ok(entries) = fs::read_dir(&folder) else {
        eprintln!("skipped: {} is not there", folder.display());
        return;
    };
    let files =
        entries.flatten().map(|it| it.path()).filter(|it| it.extension().is_some_and(|it| it == "gguf"));
    let counts: Vec<usize> = files.map(|it| GgufVocabulary::open(&it).unwrap().tokens.len()).collect();
    assert!(counts.len() >= 4 && counts.iter().all(|it| *it > 30_000), "{counts:?}");
}
