//! An image made on the spot: Debian's static busybox and a configuration, packed as `docker save` packs it.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;

/// Debian's package busybox-static.
const BUSYBOX: &str = "/bin/busybox";

/// An image that holds busybox alone.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// Its full name, `docker.io/local/NAME:TAG`.
    pub name: &'a str,
    /// The busybox applet that it runs, with its arguments.
    pub command: &'a [&'a str],
    /// `80/tcp`, …
    pub exposed: &'a [&'a str],
    /// `NAME=value`, …
    pub env: &'a [&'a str],
}

impl Image<'_> {
    /// The archive: a manifest, the configuration, one layer.
    pub fn archive(&self) -> Result<Vec<u8>> {
        let busybox = fs::read(BUSYBOX).with_context(|| format!("reading {BUSYBOX} (Debian: busybox-static)"))?;
        let layer = tar_of(&[("bin/busybox", 0o755, &busybox)])?;
        let config = self.config(&sha256(&layer)).to_string().into_bytes();
        let config_name = format!("{}.json", sha256(&config));
        let manifest = json!([{"Config": config_name, "RepoTags": [self.name], "Layers": ["layer.tar"]}]).to_string();
        tar_of(&[
            ("manifest.json", 0o644, manifest.as_bytes()),
            (&config_name, 0o644, &config),
            ("layer.tar", 0o644, &layer),
        ])
    }

    /// OCI image specification, config.md.
    fn config(&self, layer: &str) -> Value {
        let exposed: serde_json::Map<String, Value> =
            self.exposed.iter().map(|port| ((*port).to_owned(), json!({}))).collect();
        json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {
                "Entrypoint": ["/bin/busybox"], "Cmd": self.command, "Env": self.env, "ExposedPorts": exposed,
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer}")]},
        })
    }
}

fn tar_of(files: &[(&str, u32, &[u8])]) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, mode, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        archive.append_data(&mut header, name, *content)?;
    }
    Ok(archive.into_inner()?)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
