//! A card of whichever kind there is a driver for.

use super::Nic;
use crate::e1000e::E1000e;
use crate::igb::Igb;
use crate::qtest::Function;
use crate::virtio_net::VirtioNet;

/// What the card is called whose PCI function has this identifier (device in the high half, vendor in the low); none where
/// there is no driver for it.
pub fn driver_for(id: u32) -> Option<&'static str> {
    fn of<N: Nic>(id: u32) -> Option<&'static str> {
        N::IDS.contains(&id).then_some(N::NAME)
    }
    of::<E1000e<Function>>(id).or_else(|| of::<Igb<Function>>(id)).or_else(|| of::<VirtioNet<Function>>(id))
}
