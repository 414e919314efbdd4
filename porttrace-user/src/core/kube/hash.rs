//! kube-proxy's and portmap's chain names, computed: a comment is believed only when the chain's name agrees.

use data_encoding::BASE32;
use sha2::{Digest, Sha256};

/// The suffix of KUBE-SVC-, KUBE-SVL-, KUBE-EXT- and KUBE-FW- chains: `base32(sha256(service port name + protocol))[:16]`
/// (pkg/proxy/iptables/proxier.go, `portProtoHash`). `service` is `namespace/name` or `namespace/name:port`.
pub fn service_suffix(service: &str, protocol: &str) -> String {
    suffix(&[service, protocol])
}

/// The suffix of KUBE-SEP- chains (`servicePortEndpointChainName`); `endpoint` is `ip:port`, IPv6 in brackets.
pub fn endpoint_suffix(service: &str, protocol: &str, endpoint: &str) -> String {
    suffix(&[service, protocol, endpoint])
}

/// The name of portmap's chain for a sandbox: `CNI-DN-` and 21 hexadecimal digits (utils/utils.go, `FormatChainName`).
pub fn portmap_chain(network: &str, sandbox: &str) -> String {
    let mut hash = sha2::Sha512::new();
    hash.update(network.as_bytes());
    hash.update(sandbox.as_bytes());
    let mut text = data_encoding::HEXLOWER.encode(&hash.finalize());
    text.truncate(21);
    format!("CNI-DN-{text}")
}

/// The name of CRI-O's chain for a hostPort of a sandbox: `KUBE-HP-` and 16 letters (internal/hostport/hostport_iptables.go,
/// `getHostportChain`; the kubelet of dockershim's days did the same). `host_ip` as the pod asks for it, empty for none.
pub fn crio_chain(sandbox: &str, port: u16, protocol: &str, host_ip: &str) -> String {
    let protocol = protocol.to_ascii_uppercase();
    format!("{CRIO}{}", suffix(&[sandbox, &port.to_string(), &protocol, host_ip]))
}

/// The eight letters in the names of kube-proxy's native chains, of what follows them (pkg/proxy/nftables/proxier.go,
/// `hashAndTruncate`).
pub fn native_suffix(name: &str) -> String {
    let mut text = BASE32.encode(&Sha256::digest(name.as_bytes()));
    text.truncate(8);
    text
}

/// How the names of CRI-O's chains begin.
pub const CRIO: &str = "KUBE-HP-";

fn suffix(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.as_bytes());
    }
    let mut text = BASE32.encode(&hash.finalize());
    text.truncate(16);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubernetes_service_has_its_well_known_chain() {
        assert_eq!(service_suffix("default/kubernetes:https", "tcp"), "NPX46M4PTMTKRN6Y");
    }

    /// What `printf 'abc8080TCP' | sha256sum` and `base32` make.
    #[test]
    fn a_host_port_of_crio_has_its_chain() {
        assert_eq!(crio_chain("abc", 8080, "tcp", ""), "KUBE-HP-P4J7YZKMGVPXNFWM");
    }

    #[test]
    fn an_endpoint_of_the_recorded_frontend_has_its_recorded_chain() {
        assert_eq!(service_suffix("default/frontend:http", "tcp"), "UHJVR435UML62OOS");
        assert_eq!(endpoint_suffix("default/frontend:http", "tcp", "10.244.1.9:80"), "XYJSGLKBOREFOWOO");
    }
}
