//! Figures: medians with their spread, and rows of them.

/// What was measured again and again, once a round.
#[derive(Clone, Debug, Default)]
pub struct Series(Vec<f64>);

impl Series {
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The middle one (of an even number the upper); NaN without any.
    pub fn median(&self) -> f64 {
        self.at(0.5)
    }

    pub fn least(&self) -> f64 {
        self.at(0.0)
    }

    pub fn most(&self) -> f64 {
        self.at(1.0)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each value as percent of the base's in the same round: what one round has in common (how fast the machine just is)
    /// cancels out.
    pub fn percent_of(&self, base: &Self) -> Self {
        Self(self.0.iter().zip(&base.0).map(|(value, base)| value / base * 100.0).collect())
    }

    /// The value with this part of all below it.
    fn at(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let index = (sorted.len() as f64 * part) as usize;
        sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
    }
}

/// `  name   median   percent of the base (the middle half of the rounds)   (least to most)`, for each series; the first is
/// the base.
pub fn print(title: &str, rows: &[(&str, &Series)]) {
    println!("\n{title}");
    let Some((_, base)) = rows.first() else { return };
    for (name, series) in rows.iter().filter(|(_, series)| !series.is_empty()) {
        let parts = series.percent_of(base);
        println!(
            "  {name:<42} {:>10} {:>6.1} % ({:>5.1} to {:>5.1})   {} to {}",
            number(series.median()),
            parts.median(),
            parts.at(0.25),
            parts.at(0.75),
            number(series.least()),
            number(series.most())
        );
    }
}

/// Three significant digits at least, thousands without decimals.
pub fn number(value: f64) -> String {
    if value.abs() >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(values: &[f64]) -> Series {
        Series(values.to_vec())
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert!(Series::default().median().is_nan());
        let three = series(&[3.0, 1.0, 2.0]);
        assert_eq!((three.least(), three.median(), three.most()), (1.0, 2.0, 3.0));
    }

    #[test]
    fn a_round_is_compared_with_itself() {
        // The machine became half as fast from round to round; the tool takes a tenth all the same.
        let (base, tool) = (series(&[100.0, 50.0, 25.0]), series(&[90.0, 45.0, 22.5]));
        let parts = tool.percent_of(&base);
        assert_eq!((parts.least(), parts.most()), (90.0, 90.0));
    }
}
