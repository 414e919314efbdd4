//! Figures: medians with their spread, and rows of them.

/// What was measured again and again.
#[derive(Clone, Debug, Default)]
pub struct Series(Vec<f64>);

impl Series {
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_by(f64::total_cmp);
    }

    /// The middle one (of an even number the upper); NaN without any.
    pub fn median(&self) -> f64 {
        self.0.get(self.0.len() / 2).copied().unwrap_or(f64::NAN)
    }

    pub fn least(&self) -> f64 {
        self.0.first().copied().unwrap_or(f64::NAN)
    }

    pub fn most(&self) -> f64 {
        self.0.last().copied().unwrap_or(f64::NAN)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// `  name   median   part of the base   (least to most)`, for each series; the first is the base.
pub fn print(title: &str, rows: &[(&str, &Series)]) {
    println!("\n{title}");
    let base = rows.first().map_or(f64::NAN, |(_, series)| series.median());
    for (name, series) in rows.iter().filter(|(_, series)| !series.is_empty()) {
        let part = series.median() / base * 100.0;
        println!(
            "  {name:<42} {:>10} {part:>6.1} %   ({} to {})",
            number(series.median()),
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

    #[test]
    fn the_median_is_in_the_middle() {
        let mut series = Series::default();
        assert!(series.median().is_nan());
        [3.0, 1.0, 2.0].into_iter().for_each(|value| series.push(value));
        assert_eq!((series.least(), series.median(), series.most()), (1.0, 2.0, 3.0));
    }
}
