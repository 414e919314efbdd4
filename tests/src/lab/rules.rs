//! kube-proxy's recorded rules, and which flavour of iptables restores them.

use crate::netns::Netns;
use anyhow::{Context, Result};
use std::ffi::OsStr;
use std::iter;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// What real kube-proxy 1.36 (iptables mode) wrote on worker3 for the lab's Services, with kindnet's masquerade rules; portmap's
/// rules are left out, because the lab's pods bring their own.
pub const KUBE_PROXY_V4: &str = include_str!("../../cases/lab/kube-proxy.v4.rules");
/// See [`KUBE_PROXY_V4`].
pub const KUBE_PROXY_V6: &str = include_str!("../../cases/lab/kube-proxy.v6.rules");

/// The iptables flavour of a lab: kube-proxy's rules and portmap's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum IptablesFlavour {
    #[default]
    Nft,
    Legacy,
}

impl IptablesFlavour {
    /// The multi-call binary of iptables 1.8.
    pub const fn binary(self) -> &'static str {
        match self {
            Self::Nft => "xtables-nft-multi",
            Self::Legacy => "xtables-legacy-multi",
        }
    }
}

/// A directory in which `iptables`, `ip6tables`, `iptables-save`, … are of one flavour, whatever the system's default is.
pub struct Tools {
    directory: PathBuf,
}

impl Tools {
    /// Fills `directory`, which must exist.
    pub fn new(directory: PathBuf, flavour: IptablesFlavour) -> Result<Self> {
        let binary = Path::new("/usr/sbin").join(flavour.binary());
        for family in ["iptables", "ip6tables"] {
            for tool in ["", "-save", "-restore"] {
                let link = directory.join(format!("{family}{tool}"));
                symlink(&binary, &link).with_context(|| format!("making {}", link.display()))?;
            }
        }
        Ok(Self { directory })
    }

    /// `PATH` with these tools first.
    pub fn path(&self) -> String {
        format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", self.directory.display())
    }

    /// The full path of `iptables`, `ip6tables-save`, ….
    pub fn tool(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Runs `iptables` with these words in a namespace.
    pub fn iptables(&self, netns: &Netns, words: &str) -> Result<()> {
        let tool = self.tool("iptables");
        netns.exec(iter::once(tool.as_os_str()).chain(words.split(' ').map(OsStr::new))).map(drop)
    }

    /// Loads `rules` (`iptables-save` format) with `iptables-restore` or `ip6tables-restore` in a namespace.
    pub fn restore(&self, netns: &Netns, family: &str, rules: &str) -> Result<()> {
        let tool = self.tool(&format!("{family}-restore"));
        netns.exec_with([tool.as_os_str(), "-w".as_ref(), "10".as_ref()], rules).map(drop)
    }

    /// What `iptables-save` or `ip6tables-save` says in a namespace.
    pub fn save(&self, netns: &Netns, family: &str) -> Result<String> {
        netns.exec([self.tool(&format!("{family}-save"))])
    }
}
