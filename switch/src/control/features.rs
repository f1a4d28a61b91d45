//! The names of negotiated virtio features, as QEMU's properties and the kernel's headers have them.

use virtio::features as bit;

const NAMES: &[(u64, &str)] = &[
    (bit::NET_CSUM, "csum"),
    (bit::NET_GUEST_CSUM, "guest_csum"),
    (bit::NET_MTU, "mtu"),
    (bit::NET_MAC, "mac"),
    (bit::NET_GUEST_TSO4, "guest_tso4"),
    (bit::NET_GUEST_TSO6, "guest_tso6"),
    (bit::NET_GUEST_ECN, "guest_ecn"),
    (bit::NET_GUEST_UFO, "guest_ufo"),
    (bit::NET_HOST_TSO4, "host_tso4"),
    (bit::NET_HOST_TSO6, "host_tso6"),
    (bit::NET_HOST_ECN, "host_ecn"),
    (bit::NET_HOST_UFO, "host_ufo"),
    (bit::NET_MRG_RXBUF, "mrg_rxbuf"),
    (bit::NET_STATUS, "status"),
    (bit::NET_CTRL_VQ, "ctrl_vq"),
    (bit::NET_GUEST_ANNOUNCE, "guest_announce"),
    (bit::NET_MQ, "mq"),
    (bit::VHOST_LOG_ALL, "log_all"),
    (bit::RING_INDIRECT_DESC, "indirect"),
    (bit::RING_EVENT_IDX, "event_idx"),
    (bit::VHOST_USER_PROTOCOL_FEATURES, "protocol_features"),
    (bit::VERSION_1, "version_1"),
    (bit::RING_PACKED, "packed"),
    (bit::IN_ORDER, "in_order"),
    (bit::NET_GUEST_USO4, "guest_uso4"),
    (bit::NET_GUEST_USO6, "guest_uso6"),
    (bit::NET_HOST_USO, "host_uso"),
];

/// The names of the features in `bits`, in the order of their bits; one without a name is `bit 42`.
pub fn feature_names(bits: u64) -> Vec<String> {
    let single = (0..u64::BITS).map(|n| (n, 1_u64 << n)).filter(|(_, mask)| bits & mask != 0);
    single
        .map(|(n, mask)| {
            let known = NAMES.iter().find(|(bit, _)| *bit == mask);
            known.map_or_else(|| format!("bit {n}"), |(_, name)| (*name).to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_has_a_name_and_unknown_ones_their_number() {
        assert_eq!(feature_names(bit::RING_PACKED | bit::NET_CSUM | 1 << 2), ["csum", "bit 2", "packed"]);
        assert!(NAMES.iter().all(|(bit, _)| bit.count_ones() == 1));
    }
}
