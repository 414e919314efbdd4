//! A second kernel, in a virtual machine: Debian's own, with modules and kprobes.
pub mod image;

/// A kernel series that Debian ships for its release 12.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub enum Kernel {
    /// The release's own kernel: older than the NETFILTER program type (6.4).
    #[default]
    #[value(name = "6.1")]
    V6_1,
    /// The backport in the security suite.
    #[value(name = "6.12")]
    V6_12,
}

impl Kernel {
    /// As people name it, and its directory.
    pub fn series(self) -> &'static str {
        match self {
            Kernel::V6_1 => "6.1",
            Kernel::V6_12 => "6.12",
        }
    }

    /// The meta-package that follows the series.
    pub fn package(self) -> &'static str {
        match self {
            Kernel::V6_1 => "linux-image-amd64",
            Kernel::V6_12 => "linux-image-6.12-amd64",
        }
    }
}
