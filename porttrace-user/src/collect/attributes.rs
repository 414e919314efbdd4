//! Netlink attributes as raw bytes, for the protocols that have no crate of their own here (ctnetlink, nf_tables, sock_diag).

use netlink_packet_core::NlasIterator;

/// The attributes of a message or of a nested attribute, malformed ones left out: kind (without flag bits) and value.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    /// `NLA_TYPE_MASK` (include/uapi/linux/netlink.h).
    const TYPE: u16 = 0x3fff;
    NlasIterator::new(bytes).filter_map(|attribute| {
        let attribute = attribute.ok()?;
        let whole: &[u8] = attribute.into_inner();
        let length = usize::from(u16::from_ne_bytes(*whole.first_chunk()?));
        let kind = u16::from_ne_bytes(*whole.get(2..)?.first_chunk()?) & TYPE;
        Some((kind, whole.get(4..length)?))
    })
}

/// A number in network order.
pub(super) fn be16(value: &[u8]) -> Option<u16> {
    value.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

/// A number in network order.
pub(super) fn be32(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// An IPv4 or IPv6 address, by its length.
pub(super) fn address(value: &[u8]) -> Option<std::net::IpAddr> {
    match value.len() {
        4 => Some(<[u8; 4]>::try_from(value).ok()?.into()),
        16 => Some(<[u8; 16]>::try_from(value).ok()?.into()),
        _ => None,
    }
}
