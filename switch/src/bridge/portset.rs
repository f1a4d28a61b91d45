//! Sets of ports, by number.

/// Ports of one switch: numbers 0 to 255.
pub const MAX_PORTS: usize = 256;

const WORDS: usize = MAX_PORTS / 64;

/// A set of port numbers below [`MAX_PORTS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct PortSet([u64; WORDS]);

impl PortSet {
    /// No port.
    pub(super) const EMPTY: Self = Self([0; WORDS]);

    /// Adds port `port`; numbers from [`MAX_PORTS`] on are no ports.
    pub(super) fn insert(&mut self, port: u16) {
        if let Some(word) = self.0.get_mut(usize::from(port >> 6)) {
            *word |= 1 << (port & 63);
        }
    }

    /// Whether `port` is in the set.
    #[inline(always)]
    pub(super) fn contains(&self, port: u16) -> bool {
        // Without a branch: which of several ports it is cannot be predicted.
        let word = self.0[usize::from(port >> 6) % WORDS];
        (word >> (port & 63) & 1 == 1) & (usize::from(port) < MAX_PORTS)
    }

    /// The ports that are in both.
    #[inline(always)]
    #[must_use]
    pub(super) fn and(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] & other.0[i]))
    }

    /// The ports, in ascending order.
    pub(super) fn iter(&self) -> impl Iterator<Item = u16> + use<> {
        let mut words = self.0;
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < WORDS {
                let word = words[at];
                if word != 0 {
                    words[at] = word & (word - 1);
                    return Some((at * 64) as u16 + word.trailing_zeros() as u16);
                }
                at += 1;
            }
            None
        })
    }
}

impl FromIterator<u16> for PortSet {
    fn from_iter<I: IntoIterator<Item = u16>>(ports: I) -> Self {
        let mut set = Self::EMPTY;
        ports.into_iter().for_each(|port| set.insert(port));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_was_inserted_and_yields_it_in_order() {
        let set: PortSet = [255, 0, 64, 63, 300].into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 63, 64, 255]);
        assert!(set.contains(64) && !set.contains(65) && !set.contains(300) && !set.contains(u16::MAX));
        let low: PortSet = (0..64).collect();
        assert_eq!(set.and(&low).iter().collect::<Vec<_>>(), [0, 63]);
        assert_eq!(PortSet::EMPTY.iter().next(), None);
    }
}
