//! `sysctl net` output.

use super::notes::{Notes, quote};
use std::collections::BTreeMap;

/// Reads `key = value` lines. Keys come out with dots only: `sysctl` prints a dot of an interface's name as a slash
/// (`net.ipv4.conf.eth0/5.rp_filter`), which is turned back.
pub fn sysctls(text: &str, notes: &mut Notes) -> BTreeMap<String, String> {
    let mut values = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        // `sysctl -a` mixes its complaints (`sysctl: permission denied on key …`) into what people paste.
        if line.is_empty() || line.starts_with('#') || line.starts_with("sysctl:") {
            continue;
        }
        match line.split_once('=') {
            Some((key, value)) if is_key(key.trim()) => {
                values.insert(key.trim().replace('/', "."), value.trim().to_owned());
            }
            _ => notes.add(index + 1, format!("not a `key = value` line: {}", quote(line))),
        }
    }
    values
}

/// Writes what [`sysctls`] reads.
pub fn write(values: &BTreeMap<String, String>) -> String {
    values.iter().map(|(key, value)| format!("{key} = {value}\n")).collect()
}

fn is_key(key: &str) -> bool {
    !key.is_empty() && !key.contains(char::is_whitespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_values_and_interface_names_with_dots() {
        let text = "net.ipv4.ip_forward = 1\r\nnet.ipv4.conf.eth0/5.rp_filter = 2\n\nnet.ipv4.ip_local_port_range = 32768\t60999\n\
                    net.ipv4.ip_local_reserved_ports = \nsysctl: permission denied on key 'net.x'\nnonsense\n";
        let mut notes = Notes::new("sysctl.txt");
        let values = sysctls(text, &mut notes);
        assert_eq!(values["net.ipv4.ip_forward"], "1");
        assert_eq!(values["net.ipv4.conf.eth0.5.rp_filter"], "2");
        assert_eq!(values["net.ipv4.ip_local_port_range"], "32768\t60999");
        assert_eq!(values["net.ipv4.ip_local_reserved_ports"], "");
        let diagnostics = notes.finish();
        assert_eq!(diagnostics.len(), 1);
        assert_eq!(diagnostics[0].line, 7);
        let mut notes = Notes::new("again");
        assert_eq!(sysctls(&write(&values), &mut notes), values);
    }
}
