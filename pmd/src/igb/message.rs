//! What a virtual function of the 82576 and its adapter say to each other: messages of up to sixteen words, as Intel's drivers of both
//! have them (the datasheet has the mailbox, 7.10.2.9, and leaves its contents to software).

/// Words of a mailbox.
pub(crate) const WORDS: u32 = 16;

/// In the first word of an answer: done; not done; the function may go on talking.
pub(crate) const ACK: u32 = 1 << 31;
pub(crate) const NACK: u32 = 1 << 30;
pub(crate) const CLEAR_TO_SEND: u32 = 1 << 29;

/// The kind of a message: its low half. The function was reset; wants this address, these groups, this VLAN, frames of this length,
/// all groups.
pub(crate) const RESET: u32 = 1;
pub(crate) const SET_MAC: u32 = 2;
pub(crate) const SET_GROUPS: u32 = 3;
pub(crate) const SET_VLAN: u32 = 4;
pub(crate) const SET_LONGEST: u32 = 5;
pub(crate) const SET_PROMISCUOUS: u32 = 6;
/// From the adapter, on its own account: something changed. Without CLEAR_TO_SEND, the function has to begin anew.
pub(crate) const CONTROL: u32 = 0x100;

/// The kind.
pub(crate) const KIND: u32 = 0xffff;

/// The number in the first word: how many groups; whether a VLAN is wanted.
pub(crate) fn number(first: u32) -> u32 {
    first >> 16 & 0xff
}

/// [`SET_PROMISCUOUS`]: all groups.
pub(crate) const ALL_GROUPS: u32 = 2 << 16;

/// Groups that one message holds: hashes of twelve bits, two to a word.
pub(crate) const MOST_GROUPS: usize = 30;

/// An address in two words.
pub(crate) fn mac_of([low, high]: [u32; 2]) -> [u8; 6] {
    let ([a, b, c, d], [e, f, ..]) = (low.to_le_bytes(), high.to_le_bytes());
    [a, b, c, d, e, f]
}

/// As [`mac_of`], the other way.
pub(crate) fn words_of([a, b, c, d, e, f]: [u8; 6]) -> [u32; 2] {
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, 0, 0])]
}
