//! Checkpoints that bitsandbytes has put into 4 bits (`…-bnb-4bit`): beside `X.weight`, which holds codes,
//! stand its tables and scales and a JSON text that says how they belong together.
//! Source: bitsandbytes/functional.py (QuantState.as_dict), transformers/quantizers/quantizer_bnb_4bit.py.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use ferrotune_tensor::{DType, Error, Result};
use safetensors::Dtype;
use serde_json::Value;

use super::four_bit::{FourBit, FourBitScales};
use super::{SafetensorsSource, Stored, WeightSource, check_rows};

const STATE: &str = ".quant_state.bitsandbytes__";
/// Far above any quant_state.
const LONGEST_STATE: usize = 4096;

/// A folder with weights in 4 bits. Those that bitsandbytes left out (`llm_int8_skip_modules`) are as in any other.
#[derive(Debug)]
pub(super) struct BnbSource {
    inner: SafetensorsSource,
    /// By the weight's name.
    coded: BTreeMap<String, State>,
    /// Of all tensors that are not parts of another.
    names: Vec<String>,
}

/// How the parts of a weight belong together.
#[derive(Clone, Debug)]
struct State {
    rows: usize,
    cols: usize,
    dtype: DType,
    block: usize,
    /// Blocks in a group and the offset, where scales are quantised as well.
    nested: Option<(usize, f32)>,
    kind: String,
}

/// What a folder with weights in 4 bits holds, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FourBitKind {
    /// `nf4` or `fp4`.
    pub quant_type: String,
    /// Scales are quantised as well.
    pub double_quantized: bool,
    /// Projections in 4 bits.
    pub count: usize,
}

impl FourBitKind {
    /// Whether its weights stay in 4 bits when they are read: NF4 alone does.
    pub fn is_nf4(&self) -> bool {
        self.quant_type == "nf4"
    }
}

impl BnbSource {
    /// Whether a folder has weights in 4 bits.
    pub(super) fn is_one(source: &SafetensorsSource) -> bool {
        source.names().iter().any(|it| it.contains(STATE))
    }

    /// Reads and checks how the parts belong together.
    ///
    /// # Errors
    /// When a part is missing, or is of another type or length than the JSON says.
    pub(super) fn new(inner: SafetensorsSource) -> Result<BnbSource> {
        let mut coded = BTreeMap::new();
        for state in inner.names().into_iter().filter(|it| it.contains(STATE)) {
            let (weight, kind) = state.split_once(STATE).unwrap_or((state, ""));
            let read = read_state(&inner, weight, state, kind)
                .map_err(|message| Error::file(inner.path(), format!("tensor `{state}`: {message}")))?;
            if coded.insert(weight.to_string(), read).is_some() {
                let message = format!("tensor `{weight}` is in 4 bits in two ways, nf4 and fp4");
                return Err(Error::file(inner.path(), message));
            }
        }
        let part_of = |name: &str| {
            let stem = |suffix: &str| name.strip_suffix(suffix).is_some_and(|it| coded.contains_key(it));
            name.contains(STATE)
                || [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"].into_iter().any(stem)
        };
        let names = inner.names().into_iter().filter(|it| !part_of(it)).map(str::to_string).collect();
        Ok(BnbSource { coded, names, inner })
    }

    /// What is in 4 bits.
    pub(super) fn kind(&self) -> Option<FourBitKind> {
        let first = self.coded.values().next()?;
        Some(FourBitKind {
            quant_type: first.kind.clone(),
            double_quantized: first.nested.is_some(),
            count: self.coded.len(),
        })
    }

    /// Puts the parts of a weight together; codes stay where they are.
    fn matrix(&self, name: &str, state: &State) -> Result<FourBit<'_>> {
        let wrong = |part: &str, message: &str| {
            Error::file(
                self.inner.path(),
                format!("tensor `{name}{part}` holds {message}: the file is damaged"),
            )
        };
        let floats = |part: &str| -> Result<Vec<f32>> {
            let values = floats(self.inner.raw(&format!("{name}{part}"))?.bytes);
            let finite = values.iter().all(|it| it.is_finite());
            if finite { Ok(values) } else { Err(wrong(part, "NaN or infinity")) }
        };
        let bytes = |part: &str| Ok::<_, Error>(self.inner.raw(&format!("{name}{part}"))?.bytes.to_vec());
        let scales = match state.nested {
            None => FourBitScales::Plain(floats(".absmax")?),
            Some((group, offset)) => FourBitScales::Nested {
                codes: bytes(".absmax")?,
                map: floats(".nested_quant_map")?,
                group,
                nested_absmax: floats(".nested_absmax")?,
                offset,
            },
        };
        let table = floats(".quant_map")?;
        let table = table.try_into().map_err(|_| wrong(".quant_map", "another number than 16"))?;
        let codes = &self.inner.raw(name)?.bytes[..(state.rows * state.cols).div_ceil(2)];
        let State { rows, cols, dtype, block, .. } = *state;
        Ok(FourBit { rows, cols, codes: codes.into(), table, block, scales, dtype })
    }
}

impl WeightSource for BnbSource {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn names(&self) -> Vec<&str> {
        self.names.iter().map(String::as_str).collect()
    }

    fn shape(&self, name: &str) -> Result<(usize, usize)> {
        match self.coded.get(name) {
            Some(state) => Ok((state.rows, state.cols)),
            None => self.inner.shape(name),
        }
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        match self.coded.get(name) {
            Some(state) => Ok(state.dtype),
            None => self.inner.dtype(name),
        }
    }

    fn stored_dtype(&self, name: &str) -> Result<Option<DType>> {
        match self.coded.contains_key(name) {
            true => Ok(None),
            false => self.inner.stored_dtype(name),
        }
    }

    fn get(&self, name: &str) -> Result<Stored> {
        match self.coded.get(name) {
            Some(state) => Ok(Stored::FourBit(self.matrix(name, state)?.into_owned())),
            None => self.inner.get(name),
        }
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let Some(state) = self.coded.get(name) else { return self.inner.read_rows(name, rows, out) };
        check_rows(name, (state.rows, state.cols), &rows, out.len())?;
        self.matrix(name, state)?.read_rows(rows, out);
        Ok(())
    }

    fn forget(&self, name: &str) {
        self.inner.forget(name);
    }

    fn fingerprint(&self) -> String {
        self.inner.fingerprint()
    }
}

/// Reads the JSON of a weight, and checks its parts against it.
fn read_state(source: &SafetensorsSource, weight: &str, state: &str, kind: &str) -> Result<State, String> {
    if kind != "nf4" && kind != "fp4" {
        return Err(format!("`{kind}` is no kind of 4 bits that is known, only: nf4, fp4"));
    }
    let raw = source.raw(state).map_err(|error| error.to_string())?;
    if raw.dtype != Dtype::U8 || raw.bytes.len() > LONGEST_STATE {
        return Err(format!("expected up to {LONGEST_STATE} bytes of JSON"));
    }
    let json: Value = serde_json::from_slice(raw.bytes).map_err(|error| format!("not JSON: {error}"))?;
    if json.get("quant_type").and_then(Value::as_str) != Some(kind) {
        return Err(format!("`quant_type` is {}, but the name says {kind}", json["quant_type"]));
    }
    let power = |key: &str, least: u64| {
        let value = json.get(key).and_then(Value::as_u64);
        let good = value.filter(|it| it.is_power_of_two() && (least..=1 << 16).contains(it));
        let message = || format!("`{key}` is {}, expected a power of two from {least} to 65536", json[key]);
        good.map(|it| it as usize).ok_or_else(message)
    };
    let dtype = match json.get("dtype").and_then(Value::as_str) {
        Some("bfloat16") => DType::BF16,
        Some("float16") => DType::F16,
        Some("float32") => DType::F32,
        _ => return Err(format!("`dtype` is {}, expected bfloat16, float16 or float32", json["dtype"])),
    };
    let size = |index: usize| json.get("shape")?.get(index)?.as_u64().filter(|it| (1..=1 << 24).contains(it));
    let two = json.get("shape").and_then(Value::as_array).is_some_and(|it| it.len() == 2);
    let (Some(rows), Some(cols), true) = (size(0), size(1), two) else {
        return Err(format!("`shape` is {}, expected two sizes from 1 to {}", json["shape"], 1 << 24));
    };
    let (rows, cols, block) = (rows as usize, cols as usize, power("blocksize", 16)?);
    let blocks = (rows * cols).div_ceil(block);

    let part = |suffix: &str, dtype: Option<Dtype>, bytes: usize| {
        let name = format!("{weight}{suffix}");
        let raw = source.raw(&name).map_err(|_| format!("`{name}` is missing, which belongs to it"))?;
        // Codes may be stored as numbers of another type, the last of which is filled up (`bnb_4bit_quant_storage`).
        let bytes =
            if dtype.is_some() { bytes } else { bytes.next_multiple_of(raw.dtype.bitsize().div_ceil(8)) };
        match dtype.is_none_or(|it| it == raw.dtype) && raw.bytes.len() == bytes {
            true => Ok(()),
            false => Err(format!(
                "a weight of {rows} x {cols} in blocks of {block} has {bytes} bytes{} in `{name}`, the file {} of {:?}",
                dtype.map_or(String::new(), |it| format!(" of {it:?}")),
                raw.bytes.len(),
                raw.dtype
            )),
        }
    };
    part("", None, (rows * cols).div_ceil(2))?;
    part(".quant_map", Some(Dtype::F32), 4 * 16)?;
    let nested = match json.get("nested_offset").filter(|it| !it.is_null()) {
        None => {
            part(".absmax", Some(Dtype::F32), 4 * blocks)?;
            None
        }
        Some(offset) => {
            let group = power("nested_blocksize", 16)?;
            if json.get("nested_dtype").and_then(Value::as_str) != Some("float32") {
                return Err(format!("`nested_dtype` is {}, expected float32", json["nested_dtype"]));
            }
            part(".absmax", Some(Dtype::U8), blocks)?;
            part(".nested_absmax", Some(Dtype::F32), 4 * blocks.div_ceil(group))?;
            part(".nested_quant_map", Some(Dtype::F32), 4 * 256)?;
            let offset = offset.as_f64().map(|it| it as f32).filter(|it| it.is_finite());
            Some((group, offset.ok_or("`nested_offset` is no number")?))
        }
    };
    Ok(State { rows, cols, dtype, block, nested, kind: kind.to_string() })
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|it| f32::from_le_bytes([it[0], it[1], it[2], it[3]])).collect()
}
