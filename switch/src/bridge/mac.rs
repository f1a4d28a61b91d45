//! Ethernet addresses, as they are written and as the bridge compares them.

use std::{fmt, str::FromStr};

/// The 48 bits of an address in the order in which a little-endian load finds them on the wire.
pub(super) const MASK: u64 = 0xffff_ffff_ffff;

/// A 48-bit Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

/// Text that is no Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no Ethernet address; write six pairs of hexadecimal digits, like 52:54:00:12:34:56")]
pub struct MacError(String);

impl Mac {
    /// Whether it names one station: neither a group (multicast, broadcast) nor all zero.
    pub fn is_station(self) -> bool {
        let wire = self.wire();
        wire & 1 == 0 && wire != 0
    }

    /// The six bytes as a little-endian load from a frame gives them.
    #[inline(always)]
    pub(super) fn wire(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
    }

    /// The address whose six bytes are the low ones of `wire`.
    #[inline(always)]
    pub(super) fn from_wire(wire: u64) -> Self {
        let [a, b, c, d, e, f, ..] = wire.to_le_bytes();
        Self([a, b, c, d, e, f])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let wrong = || MacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().ok_or_else(wrong)?;
            if pair.len() != 2 || !pair.bytes().all(|c| c.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
        }
        if pairs.next().is_some() {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_as_it_is_written() {
        let mac: Mac = "52:54:00:aB:34:56".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:34:56");
        assert_eq!(Mac::from_wire(mac.wire()), mac);
    }

    #[test]
    fn text_that_is_no_address_is_refused_with_an_example() {
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:+6",
            "5254.0012.3456",
            "g0:0:0:0:0:0",
        ] {
            let error = text.parse::<Mac>().unwrap_err().to_string();
            assert!(error.contains("52:54:00:12:34:56"), "{error}");
        }
    }

    #[test]
    fn groups_and_zero_are_no_stations() {
        for text in ["ff:ff:ff:ff:ff:ff", "01:80:c2:00:00:00", "33:33:00:00:00:01", "00:00:00:00:00:00"] {
            assert!(!text.parse::<Mac>().unwrap().is_station(), "{text}");
        }
        assert!("00:00:00:00:00:01".parse::<Mac>().unwrap().is_station());
    }
}
