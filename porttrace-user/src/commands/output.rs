//! Where commands print to: colour and width of standard output.

use clap::ValueEnum;
use porttrace_user::render::style::{Style, When};
use std::io::IsTerminal;

/// `--color`.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Colour {
    /// When to colour the output
    #[arg(long = "color", value_enum, default_value_t = ColourChoice::Auto, value_name = "WHEN")]
    choice: ColourChoice,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ColourChoice {
    /// On a terminal, unless NO_COLOR is set
    Auto,
    Always,
    Never,
}

impl Colour {
    /// The style for standard output, from its terminal and the environment.
    pub fn style(self) -> Style {
        let when = match self.choice {
            ColourChoice::Auto => When::Auto,
            ColourChoice::Always => When::Always,
            ColourChoice::Never => When::Never,
        };
        let stdout = std::io::stdout();
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let no_colour = set("NO_COLOR") || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let columns = terminal_size::terminal_size_of(&stdout)
            .map(|(width, _)| usize::from(width.0))
            .or_else(|| std::env::var("COLUMNS").ok()?.parse().ok());
        Style::new(when, stdout.is_terminal(), no_colour, columns)
    }
}
