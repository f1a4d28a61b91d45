//! Which frames an adapter takes (82574 datasheet 7.1.1, packet address filtering).

use super::regs::{MTA, RAH, RAL, RCTL};
use super::{Adapter, Functions, Physical};
use crate::access::PciDevice;
use crate::nic::{Filter, Mac};

impl<D: PciDevice, C: Physical> Adapter<D, C> {
    /// Changes which frames are taken.
    pub(super) fn filter(&self, filter: &Filter) {
        let regs = self.core.regs();
        let mut table = [0u32; 128];
        for mac in &filter.multicast {
            let (word, bit) = hash(mac);
            if let Some(word) = table.get_mut(word) {
                *word |= 1 << bit;
            }
        }
        let all_groups = filter.promiscuous || filter.all_multicast;
        self.functions.groups(regs, all_groups, &mut table);
        for (word, bits) in (0..).zip(table) {
            regs.write_number(MTA(word), bits);
        }
        let mut addresses = filter.unicast.iter().copied();
        for i in 1..C::EXACT {
            self.set_exact(i, addresses.next());
        }
        let all = filter.promiscuous || addresses.next().is_some();
        let set = |on: bool, bits| if on { regs.set(RCTL, bits) } else { regs.clear(RCTL, bits) };
        set(all, RCTL::UPE);
        set(all_groups, RCTL::MPE);
    }

    /// Receive address `i` (datasheet 10.2.5.19): the high half first is cleared and last is written, so that no half address is
    /// ever valid.
    pub(super) fn set_exact(&self, i: u32, mac: Option<Mac>) {
        let regs = self.core.regs();
        regs.write_number(RAH(i), 0);
        let Some([a, b, c, d, e, f]) = mac else { return };
        regs.write_number(RAL(i), u32::from_le_bytes([a, b, c, d]));
        let pools = RAH::POOL.is(self.functions.pools());
        regs.write(RAH(i), RAH::AV | pools | RAH::HIGH.is(u16::from_le_bytes([e, f]).into()));
    }
}

/// Word and bit of the multicast table for an address: bits 47:36, as RCTL.MO is 0 (datasheet 7.1.1.1.2).
pub(crate) fn hash(mac: &Mac) -> (usize, u32) {
    let [.., e, f] = *mac;
    let hash = u32::from(e) >> 4 | u32::from(f) << 4;
    ((hash >> 5) as usize, hash & 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_of_a_group_is_the_top_twelve_bits_of_its_address() {
        assert_eq!(hash(&[0x01, 0, 0x5e, 0, 0, 0xfb]), (0xfb0 >> 5, 0xfb0 & 31));
        assert_eq!(hash(&[0x33, 0x33, 0, 0, 0xab, 0xcd]), (0xcda >> 5, 0xcda & 31));
    }
}
