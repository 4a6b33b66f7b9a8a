/// Turns pairs of a head's channels by position · inverse frequency.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Half the rotary width; the other channels of a head pass unturned.
    pub inverse_frequencies: Vec<f64>,
    /// What cosine and sine are multiplied by (yarn, longrope; else 1).
    pub attention_factor: f64,
    /// Pairs are (2i, 2i+1), not (i, i + width/2).
    pub interleaved: bool,
}
