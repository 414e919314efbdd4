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
        let columns = columns(&stdout).or_else(|| std::env::var("COLUMNS").ok()?.parse().ok());
        Style::new(when, stdout.is_terminal(), no_colour, columns)
    }
}

/// The terminal's width; `None` when the output is none.
fn columns(output: &impl std::os::fd::AsFd) -> Option<usize> {
    nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, libc::winsize);
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    use std::os::fd::AsRawFd;
    // SAFETY: TIOCGWINSZ fills one winsize, which is what it gets.
    unsafe { window_size(output.as_fd().as_raw_fd(), &mut size) }.ok()?;
    (size.ws_col > 0).then_some(usize::from(size.ws_col))
}
