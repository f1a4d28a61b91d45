//! Feature bits (virtio 1.3, sections 5.1.3 and 6), as masks.

/// Device handles frames with a partial checksum (from the guest).
pub const NET_CSUM: u64 = 1 << 0;
/// Driver handles frames with a partial checksum (to the guest).
pub const NET_GUEST_CSUM: u64 = 1 << 1;
/// The device tells the driver its MTU.
pub const NET_MTU: u64 = 1 << 3;
/// The device has a MAC address.
pub const NET_MAC: u64 = 1 << 5;
/// Driver receives TCP over IPv4 unsegmented.
pub const NET_GUEST_TSO4: u64 = 1 << 7;
/// Driver receives TCP over IPv6 unsegmented.
pub const NET_GUEST_TSO6: u64 = 1 << 8;
/// Driver receives unsegmented TCP with ECN.
pub const NET_GUEST_ECN: u64 = 1 << 9;
/// Driver receives UDP unfragmented.
pub const NET_GUEST_UFO: u64 = 1 << 10;
/// Device receives TCP over IPv4 unsegmented.
pub const NET_HOST_TSO4: u64 = 1 << 11;
/// Device receives TCP over IPv6 unsegmented.
pub const NET_HOST_TSO6: u64 = 1 << 12;
/// Device receives unsegmented TCP with ECN.
pub const NET_HOST_ECN: u64 = 1 << 13;
/// Device receives UDP unfragmented.
pub const NET_HOST_UFO: u64 = 1 << 14;
/// A frame may span several receive buffers.
pub const NET_MRG_RXBUF: u64 = 1 << 15;
/// The device has a link status.
pub const NET_STATUS: u64 = 1 << 16;
/// The device has a control queue.
pub const NET_CTRL_VQ: u64 = 1 << 17;
/// The driver says which frames it wants to receive.
pub const NET_CTRL_RX: u64 = 1 << 18;
/// The driver says more finely which frames it wants to receive.
pub const NET_CTRL_RX_EXTRA: u64 = 1 << 20;
/// The driver can announce itself with gratuitous packets.
pub const NET_GUEST_ANNOUNCE: u64 = 1 << 21;
/// The device has several queue pairs.
pub const NET_MQ: u64 = 1 << 22;
/// The driver can change the device's MAC address.
pub const NET_CTRL_MAC_ADDR: u64 = 1 << 23;
/// Driver receives UDP segments unsegmented, over IPv4.
pub const NET_GUEST_USO4: u64 = 1 << 54;
/// Driver receives UDP segments unsegmented, over IPv6.
pub const NET_GUEST_USO6: u64 = 1 << 55;
/// Device receives UDP segments unsegmented.
pub const NET_HOST_USO: u64 = 1 << 56;

/// vhost: log all writes to guest memory (not a virtio feature; a vhost-user front end sets it to migrate).
pub const VHOST_LOG_ALL: u64 = 1 << 26;
/// A descriptor may refer to a table of descriptors.
pub const RING_INDIRECT_DESC: u64 = 1 << 28;
/// Notifications are suppressed by index rather than by flag.
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// vhost-user: protocol features are negotiated (not a virtio feature).
pub const VHOST_USER_PROTOCOL_FEATURES: u64 = 1 << 30;
/// A device of the 1.x specification.
pub const VERSION_1: u64 = 1 << 32;
/// The packed layout.
pub const RING_PACKED: u64 = 1 << 34;
/// Buffers are used in the order in which they were made available.
pub const IN_ORDER: u64 = 1 << 35;
/// The device's memory accesses are the platform's: translated by its IOMMU, if there is one.
pub const ACCESS_PLATFORM: u64 = 1 << 33;
/// The platform orders the device's memory accesses, as it does those of hardware.
pub const ORDER_PLATFORM: u64 = 1 << 36;
