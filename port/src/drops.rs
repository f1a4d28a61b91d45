//! Why a frame was not sent. Every frame that comes in is sent, or counted under exactly one of these.

macro_rules! reasons {
    ($($(#[doc = $sentence:literal])+ $name:ident = $key:literal,)+) => {
        /// Why a frame was dropped. The sentence of each is what statistics print and what the documentation lists.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum DropReason { $($(#[doc = $sentence])+ $name,)+ }

        impl DropReason {
            /// All reasons, in the order of their discriminants.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$name,)+];
            /// How many reasons there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The name in statistics and metrics: lower case, with underscores.
            pub fn key(self) -> &'static str {
                match self { $(DropReason::$name => $key,)+ }
            }

            /// What it means, as a sentence.
            pub fn sentence(self) -> &'static str {
                match self { $(DropReason::$name => concat!($($sentence,)+).trim_ascii(),)+ }
            }
        }
    };
}

reasons! {
    /// Shorter than an Ethernet header.
    Runt = "runt",
    /// Longer than any frame this switch forwards (9,216 bytes, or 64 KiB left for segmentation).
    Oversize = "oversize",
    /// A descriptor chain without room for the virtio-net header, with a descriptor of the wrong direction, or too long.
    BadChain = "bad_chain",
    /// The virtio-net header asks for something impossible: a checksum outside the frame, an unknown segmentation type.
    BadOffload = "bad_offload",
    /// The source address is not one this port may use.
    SourceRefused = "source_refused",
    /// The frame's VLAN is not one of the ingress port's.
    VlanRefused = "vlan_refused",
    /// Sent to a reserved address (01:80:c2:00:00:0x) that a bridge does not forward.
    Reserved = "reserved",
    /// Learnt on the port it came in on: nothing to do.
    Hairpin = "hairpin",
    /// The only ports it could go to are isolated from the one it came in on.
    Isolated = "isolated",
    /// No other port to send it to.
    NoOutput = "no_output",
    /// Over the port's limit for broadcast frames.
    StormBroadcast = "storm_broadcast",
    /// Over the port's limit for multicast frames.
    StormMulticast = "storm_multicast",
    /// Over the port's limit for frames to unknown addresses.
    StormUnknown = "storm_unknown",
    /// Longer than the MTU of the port it would leave by.
    MtuExceeded = "mtu_exceeded",
    /// The receiver had no free descriptors within the burst's retry budget.
    ReceiverFull = "receiver_full",
    /// The receiver's free descriptors together are too small for this frame.
    ReceiverTooSmall = "receiver_too_small",
    /// Another worker held the receiver's ring for longer than the burst's retry budget.
    RingBusy = "ring_busy",
    /// The port it would leave by is not connected, or its queue is not enabled.
    PortDown = "port_down",
    /// Left unsegmented by its sender, and cutting it would exceed the burst's budget of segments and bytes.
    SegmentBudget = "segment_budget",
    /// Left unsegmented or without checksum for a receiver that wants it done, and its headers cannot be followed.
    CannotFinish = "cannot_finish",
    /// The network device behind the port would not take the frame.
    DeviceRefused = "device_refused",
    /// The network card received it with an error: a bad checksum of the wire (FCS), a damaged symbol.
    Damaged = "damaged",
    /// Lost on purpose (`inject`).
    Injected = "injected",
    /// Held back on purpose (`inject`), when there was no more room for such frames or the port stopped.
    InjectedLost = "injected_lost",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_key_and_a_sentence() {
        let keys: std::collections::BTreeSet<_> = DropReason::ALL.iter().map(|r| r.key()).collect();
        assert_eq!(keys.len(), DropReason::COUNT);
        for (i, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
            assert!(reason.sentence().ends_with('.'), "{}", reason.key());
        }
    }
}
