//! Event files for TensorBoard: TFRecords of `Event` messages (tensorflow/core/util/event.proto and
//! summary.proto; the framing is that of tensorflow/core/lib/io/record_writer.h), with the tags that
//! transformers' trainer writes.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use ferrotune_tensor::{Error, Result};

use crate::{EvalReport, StepReport};

/// Writes one event file, which is made with the first event.
#[derive(Debug)]
pub struct EventWriter {
    folder: PathBuf,
    file: Option<(File, PathBuf)>,
}

impl EventWriter {
    /// Into `runs` of a run's folder.
    pub fn new(output_dir: &Path) -> EventWriter {
        EventWriter { folder: output_dir.join("runs"), file: None }
    }

    /// The numbers of a logged step.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn write(&mut self, report: &StepReport) -> Result<()> {
        let values = [
            ("train/loss", report.mean_loss),
            ("train/grad_norm", report.grad_norm),
            ("train/learning_rate", report.learning_rate),
            ("train/epoch", report.epoch),
        ];
        self.event(report.step, &values)
    }

    /// The numbers of an evaluation.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn write_evaluation(&mut self, report: &EvalReport) -> Result<()> {
        let values = [
            ("eval/loss", report.loss),
            ("eval/perplexity", report.perplexity()),
            ("eval/accuracy", report.accuracy),
            ("eval/runtime", report.runtime),
        ];
        self.event(report.step, &values)
    }

    fn event(&mut self, step: usize, values: &[(&str, f64)]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.file.is_none() {
            let name = format!("events.out.tfevents.{}.ferrotune.{}", now.as_secs(), std::process::id());
            let path = self.folder.join(name);
            let made = std::fs::create_dir_all(&self.folder).and_then(|()| File::create(&path));
            let mut file = made.map_err(|source| Error::io(&path, source))?;
            let mut first = number(1, now.as_secs_f64());
            first.extend(bytes(3, b"brain.Event:2"));
            file.write_all(&record(&first)).map_err(|source| Error::io(&path, source))?;
            self.file = Some((file, path));
        }
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut it = bytes(1, tag.as_bytes());
            // Field 2, four bytes.
            it.push(2 << 3 | 5);
            it.extend((*value as f32).to_le_bytes());
            summary.extend(bytes(1, &it));
        }
        let mut event = number(1, now.as_secs_f64());
        // Field 2, a varint.
        event.push(2 << 3);
        event.extend(varint(step as u64));
        event.extend(bytes(5, &summary));
        match &mut self.file {
            Some((file, path)) => {
                file.write_all(&record(&event)).map_err(|source| Error::io(path.as_path(), source))
            }
            None => Ok(()),
        }
    }
}

/// A field of eight bytes.
fn number(field: u8, value: f64) -> Vec<u8> {
    let mut out = vec![field << 3 | 1];
    out.extend(value.to_le_bytes());
    out
}

/// A field of any length.
fn bytes(field: u8, value: &[u8]) -> Vec<u8> {
    let mut out = vec![field << 3 | 2];
    out.extend(varint(value.len() as u64));
    out.extend(value);
    out
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

/// Length, its checksum, data, its checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked(data).to_le_bytes());
    out
}

/// CRC-32C, turned and shifted as TFRecords have it.
fn masked(data: &[u8]) -> u32 {
    let crc = !data.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82F6_3B78 } else { 0 })
    });
    crc.rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_framed_as_tensorflow_frames_them() {
        // CRC-32C of "123456789" is 0xE3069283 (RFC 3720, B.4 has others): masked by hand.
        assert_eq!(masked(b"123456789"), 0xE306_9283u32.rotate_right(15).wrapping_add(0xA282_EAD8));
        let it = record(b"ab");
        assert_eq!((it.len(), &it[..8], &it[12..14]), (18, &2u64.to_le_bytes()[..], &b"ab"[..]));
        assert_eq!(varint(300), [0xAC, 2]);
    }
}
