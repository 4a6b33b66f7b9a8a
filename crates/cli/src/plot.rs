//! The curves of a run as pictures, under LLaMA-Factory's names: `training_loss` and `training_eval_loss`,
//! as SVG and as PNG.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use ferrotune_export::write_whole;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use serde_json::Value;

const SIZE: (u32, u32) = (960, 600);
const FONT: &str = "ubuntu";

/// A curve: (step, value).
type Points = Vec<(f64, f64)>;

/// Draws what the log of a run holds.
///
/// # Errors
/// When the log can't be read or a picture can't be written.
pub fn plot_losses(output_dir: &Path) -> anyhow::Result<()> {
    let log = output_dir.join("trainer_log.jsonl");
    let text = fs::read_to_string(&log).with_context(|| format!("can't read {}", log.display()))?;
    let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let curve = |key: &str| -> Points {
        lines.iter().filter_map(|it| Some((it["current_steps"].as_f64()?, it[key].as_f64()?))).collect()
    };
    for (key, name, title) in
        [("loss", "training_loss", "training loss"), ("eval_loss", "training_eval_loss", "evaluation loss")]
    {
        let raw = curve(key);
        if !raw.is_empty() {
            write_pictures(&output_dir.join(name), title, &raw, &smoothed(&raw))?;
        }
    }
    Ok(())
}

/// A running mean whose weight grows with the curve's length (LLaMA-Factory extras/ploting.py).
pub fn smoothed(raw: &[(f64, f64)]) -> Points {
    let weight = 1.8 * (1.0 / (1.0 + (-0.05 * raw.len() as f64).exp()) - 0.5);
    let mut last = raw.first().map_or(0.0, |it| it.1);
    raw.iter()
        .map(|(step, value)| {
            last = weight * last + (1.0 - weight) * value;
            (*step, last)
        })
        .collect()
}

/// The values that an axis shows: a little more than there are, but nothing below 0 where none is, and never so little
/// that its labels are all the same.
pub fn value_range(low: f64, high: f64) -> (f64, f64) {
    let margin = (0.05 * (high - low)).max(0.02 * high.abs()).max(1e-3);
    let below = if low >= 0.0 { (low - margin).max(0.0) } else { low - margin };
    (below, high + margin)
}

fn write_pictures(path: &Path, title: &str, raw: &[(f64, f64)], smooth: &[(f64, f64)]) -> anyhow::Result<()> {
    // Its own font, so that every machine draws the same.
    register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
        .map_err(|_| anyhow!("the font for plots is damaged"))?;
    let mut svg = String::new();
    draw(SVGBackend::with_string(&mut svg, SIZE).into_drawing_area(), title, raw, smooth)?;
    write_whole(&path.with_extension("svg"), svg.as_bytes())?;
    let mut pixels = vec![0; (SIZE.0 * SIZE.1 * 3) as usize];
    draw(BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area(), title, raw, smooth)?;
    let mut file = Cursor::new(Vec::new());
    let mut encoder = png::Encoder::new(&mut file, SIZE.0, SIZE.1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&pixels));
    written.context("can't encode the plot")?;
    Ok(write_whole(&path.with_extension("png"), file.get_ref())?)
}

fn draw<Backend: DrawingBackend>(
    area: DrawingArea<Backend, Shift>,
    title: &str,
    raw: &[(f64, f64)],
    smooth: &[(f64, f64)],
) -> anyhow::Result<()> {
    let wrong = |error: DrawingAreaErrorKind<Backend::ErrorType>| anyhow!("can't draw the plot: {error}");
    area.fill(&WHITE).map_err(wrong)?;
    let values = raw.iter().chain(smooth).map(|it| it.1);
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), it| (low.min(it), high.max(it)));
    let (low, high) = value_range(low, high);
    let last = raw.last().map_or(1.0, |it| it.0).max(1.0);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, (FONT, 24))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..last, low..high)
        .map_err(wrong)?;
    let mesh = &mut chart.configure_mesh();
    mesh.x_desc("step").y_desc("loss").label_style((FONT, 15)).axis_desc_style((FONT, 16));
    // Labels are whole steps, none of them twice.
    mesh.x_labels(1 + last.min(10.0) as usize);
    mesh.x_label_formatter(&|step| format!("{step:.0}"));
    mesh.light_line_style(WHITE).draw().map_err(wrong)?;
    for (name, color, points) in
        [("raw", RGBColor(160, 190, 230), raw), ("smoothed", RGBColor(20, 70, 160), smooth)]
    {
        let line = LineSeries::new(points.iter().copied(), color.stroke_width(2))
            .point_size(if points.len() < 40 { 2 } else { 0 });
        let line = chart.draw_series(line).map_err(wrong)?;
        line.label(name).legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], color));
    }
    let labels = &mut chart.configure_series_labels();
    // Where falling curves aren't.
    labels.position(SeriesLabelPosition::UpperRight);
    labels.label_font((FONT, 15)).border_style(BLACK.mix(0.3)).background_style(WHITE.mix(0.9));
    labels.draw().map_err(wrong)?;
    area.present().map_err(wrong)
}
