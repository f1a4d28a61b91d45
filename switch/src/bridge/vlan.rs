//! VLANs: which one a frame belongs to when it comes in, which ports belong to one, and what happens to the tag on the way out.
//!
//! Only the outermost 802.1Q tag (type 0x8100) counts. A provider tag (0x88a8) and whatever lies inside the outermost tag
//! is payload. Decides from the private head; edits nothing itself.

use super::portset::{MAX_PORTS, PortSet};
use port::{DropReason, TagEdit};

/// Identifiers 0 to 4095. 0 means "priority only" in a tag and 4095 is reserved; neither names a VLAN.
const VIDS: usize = 4096;

/// Bytes of an Ethernet header with one tag.
const TAGGED_HEADER: u32 = 18;

/// 802.1Q's type, as a little-endian load finds it.
const TAG_TYPE: u16 = 0x8100_u16.swap_bytes();

/// A set of VLANs, 1 to 4094.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VlanSet(Box<[u64; VIDS / 64]>);

impl VlanSet {
    /// No VLAN.
    pub fn none() -> Self {
        Self(Box::new([0; VIDS / 64]))
    }

    /// All VLANs, 1 to 4094.
    pub fn all() -> Self {
        (1..4095).collect()
    }

    /// Adds `vid`, unless it names no VLAN.
    pub fn insert(&mut self, vid: u16) {
        if is_vlan(vid) {
            self.0[usize::from(vid / 64)] |= 1 << (vid % 64);
        }
    }

    /// Whether `vid` is in the set.
    #[inline(always)]
    pub fn contains(&self, vid: u16) -> bool {
        self.0.get(usize::from(vid / 64)).is_some_and(|word| word >> (vid % 64) & 1 == 1)
    }
}

impl FromIterator<u16> for VlanSet {
    fn from_iter<I: IntoIterator<Item = u16>>(vids: I) -> Self {
        let mut set = Self::none();
        vids.into_iter().for_each(|vid| set.insert(vid));
        set
    }
}

/// Whether `vid` names a VLAN: 1 to 4094.
pub fn is_vlan(vid: u16) -> bool {
    (1..4095).contains(&vid)
}

/// What a port has to do with VLANs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum VlanMode {
    /// Nothing: tags pass untouched, and do not keep ports apart. Such ports form a bridge of their own, next to the VLANs of
    /// the others.
    #[default]
    Unaware,
    /// One VLAN, untagged. Frames with a tag of any VLAN are refused; one with a priority tag (VLAN 0) comes in, and
    /// leaves without it.
    Access(u16),
    /// Several VLANs, tagged; and one, `native`, untagged. Without it, untagged frames are refused.
    Trunk {
        /// The VLANs that are sent and accepted with a tag.
        vlans: VlanSet,
        /// The VLAN that is sent without a tag, and accepted with or without.
        native: Option<u16>,
    },
}

/// The VLAN of a frame, and the tag that it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// The VLAN: 0 on a port that is unaware of them.
    pub vid: u16,
    /// The frame's tag as it came in.
    pub tag: Tag,
}

/// The outermost 802.1Q tag of a frame that came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    /// There is none, or nobody looks.
    None,
    /// One of VLAN 0, which carries a priority only.
    Priority,
    /// One of the VLAN that the frame belongs to.
    Vlan,
}

impl Class {
    /// Of all frames from ports that are unaware of VLANs.
    pub const UNAWARE: Self = Self { vid: 0, tag: Tag::None };
}

impl VlanMode {
    /// Whether frames are told apart by VLAN at all.
    pub fn is_aware(&self) -> bool {
        !matches!(self, Self::Unaware)
    }

    /// Whether the port belongs to VLAN `vid`; 0 is the bridge of the ports that are unaware.
    pub fn is_member(&self, vid: u16) -> bool {
        match self {
            Self::Unaware => vid == 0,
            Self::Access(own) => *own == vid,
            Self::Trunk { vlans, native } => *native == Some(vid) || vlans.contains(vid),
        }
    }

    /// The VLAN of a frame of `len` bytes whose bytes 12 to 16 are `kind` and `tci`, each as a little-endian load gives it.
    ///
    /// # Errors
    /// [`DropReason::VlanRefused`]: not a VLAN of this port, or a tag that is cut short.
    #[inline]
    pub fn classify(&self, kind: u16, tci: u16, len: u32) -> Result<Class, DropReason> {
        let untagged = match self {
            Self::Unaware => return Ok(Class::UNAWARE),
            Self::Access(vid) => Some(*vid),
            Self::Trunk { native, .. } => *native,
        };
        let (vid, tag) = if kind != TAG_TYPE {
            (untagged, Tag::None)
        } else if len < TAGGED_HEADER {
            (None, Tag::None)
        } else {
            match u16::from_be(tci) & 0xfff {
                0 => (untagged, Tag::Priority),
                // As in Open vSwitch: a tag on an access port is refused even if it names the port's own VLAN.
                vid => (
                    Some(vid).filter(|&vid| !matches!(self, Self::Access(_)) && self.is_member(vid)),
                    Tag::Vlan,
                ),
            }
        };
        vid.map(|vid| Class { vid, tag }).ok_or(DropReason::VlanRefused)
    }

    /// What happens to the tag of a frame of `class` that leaves by this port, a member of its VLAN.
    #[inline]
    pub fn edit(&self, class: Class) -> TagEdit {
        let tagged = match self {
            Self::Unaware => return TagEdit::Keep,
            Self::Access(_) => false,
            Self::Trunk { native, .. } => *native != Some(class.vid),
        };
        match (tagged, class.tag) {
            (false, Tag::None) | (true, Tag::Vlan) => TagEdit::Keep,
            (false, _) => TagEdit::Pop,
            (true, Tag::None) => TagEdit::Push(class.vid),
            (true, Tag::Priority) => TagEdit::SetVid(class.vid),
        }
    }
}

/// Which ports belong to each VLAN: one look-up for a frame.
pub(super) struct Members {
    /// Index into `sets` for each VLAN.
    of: Box<[u16; VIDS]>,
    /// The distinct sets; the first is empty. Few: trunks of all VLANs share theirs.
    sets: Vec<PortSet>,
}

impl Members {
    /// From the modes of all ports, by port number.
    pub(super) fn new<'a>(modes: impl Iterator<Item = (u16, &'a VlanMode)> + Clone) -> Self {
        let mut of = Box::new([0; VIDS]);
        let mut sets = vec![PortSet::EMPTY];
        let mut index = std::collections::HashMap::from([(PortSet::EMPTY, 0)]);
        for (vid, at) in (0u16..).zip(of.iter_mut()) {
            let ports: PortSet = modes
                .clone()
                .take(MAX_PORTS)
                .filter(|(_, mode)| mode.is_member(vid))
                .map(|(port, _)| port)
                .collect();
            *at = *index.entry(ports).or_insert_with(|| {
                sets.push(ports);
                (sets.len() - 1) as u16 // at most one per VLAN
            });
        }
        Self { of, sets }
    }

    /// The members of VLAN `vid`, of which the low 12 bits count.
    #[inline(always)]
    pub(super) fn of(&self, vid: u16) -> &PortSet {
        let at = usize::from(self.of[usize::from(vid & 0xfff)]);
        self.sets.get(at).unwrap_or(&PortSet::EMPTY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trunk(vlans: &[u16], native: Option<u16>) -> VlanMode {
        VlanMode::Trunk { vlans: vlans.iter().copied().collect(), native }
    }

    /// Classifies a frame with a tag of `tci`, or without.
    fn class(mode: &VlanMode, tci: Option<u16>) -> Result<(u16, Tag), DropReason> {
        let kind = if tci.is_some() { 0x8100 } else { 0x0800_u16 };
        mode.classify(kind.to_be(), tci.unwrap_or(0x4500).to_be(), 64).map(|class| (class.vid, class.tag))
    }

    const REFUSED: Result<(u16, Tag), DropReason> = Err(DropReason::VlanRefused);

    #[test]
    fn a_port_that_is_unaware_passes_every_tag_untouched() {
        for tci in [None, Some(0), Some(10), Some(0xffff)] {
            assert_eq!(class(&VlanMode::Unaware, tci), Ok((0, Tag::None)));
        }
        assert_eq!(VlanMode::Unaware.edit(Class::UNAWARE), TagEdit::Keep);
    }

    #[test]
    fn an_access_port_takes_untagged_and_priority_tagged_frames_only() {
        let access = VlanMode::Access(10);
        assert_eq!(class(&access, None), Ok((10, Tag::None)));
        assert_eq!(class(&access, Some(0xe000)), Ok((10, Tag::Priority)));
        assert_eq!(class(&access, Some(10)), REFUSED);
        assert_eq!(class(&access, Some(20)), REFUSED);
    }

    #[test]
    fn a_trunk_takes_its_vlans_and_its_native_one_with_or_without_tag() {
        let mode = trunk(&[20, 30], Some(10));
        assert_eq!(class(&mode, None), Ok((10, Tag::None)));
        assert_eq!(class(&mode, Some(0x6000)), Ok((10, Tag::Priority)));
        assert_eq!(class(&mode, Some(10)), Ok((10, Tag::Vlan)));
        assert_eq!(class(&mode, Some(0xf000 | 30)), Ok((30, Tag::Vlan)));
        assert_eq!(class(&mode, Some(40)), REFUSED);
        let without = trunk(&[20], None);
        assert_eq!((class(&without, None), class(&without, Some(0))), (REFUSED, REFUSED));
    }

    #[test]
    fn vlan_4095_is_refused_even_by_a_trunk_of_all() {
        let all = VlanMode::Trunk { vlans: VlanSet::all(), native: None };
        assert_eq!(class(&all, Some(4094)), Ok((4094, Tag::Vlan)));
        assert_eq!(class(&all, Some(4095)), REFUSED);
    }

    #[test]
    fn a_tag_that_is_cut_short_is_refused_where_tags_count() {
        for len in 14..18 {
            for mode in [VlanMode::Access(10), trunk(&[20], Some(10))] {
                assert_eq!(mode.classify(TAG_TYPE, 0, len), Err(DropReason::VlanRefused));
            }
            assert_eq!(VlanMode::Unaware.classify(TAG_TYPE, 0, len), Ok(Class::UNAWARE));
        }
    }

    #[test]
    fn a_provider_tag_is_payload() {
        let class = VlanMode::Access(10).classify(0x88a8_u16.to_be(), 20_u16.to_be(), 64);
        assert_eq!(class, Ok(Class { vid: 10, tag: Tag::None }));
    }

    #[test]
    fn the_tag_on_the_way_out_is_what_the_port_wants() {
        let edit = |mode: &VlanMode, vid, tag| mode.edit(Class { vid, tag });
        let access = VlanMode::Access(10);
        assert_eq!(edit(&access, 10, Tag::None), TagEdit::Keep);
        assert_eq!(edit(&access, 10, Tag::Priority), TagEdit::Pop);
        assert_eq!(edit(&access, 10, Tag::Vlan), TagEdit::Pop);
        let mode = trunk(&[20], Some(10));
        assert_eq!(edit(&mode, 10, Tag::None), TagEdit::Keep);
        assert_eq!(edit(&mode, 10, Tag::Priority), TagEdit::Pop);
        assert_eq!(edit(&mode, 10, Tag::Vlan), TagEdit::Pop);
        assert_eq!(edit(&mode, 20, Tag::None), TagEdit::Push(20));
        assert_eq!(edit(&mode, 20, Tag::Priority), TagEdit::SetVid(20));
        assert_eq!(edit(&mode, 20, Tag::Vlan), TagEdit::Keep);
    }

    #[test]
    fn members_are_the_ports_of_each_vlan_and_unaware_ports_are_in_none() {
        let modes = [
            VlanMode::Unaware,
            VlanMode::Access(10),
            trunk(&[20], Some(10)),
            VlanMode::Trunk { vlans: VlanSet::all(), native: None },
        ];
        let members = Members::new((0..).zip(&modes));
        let of = |vid| members.of(vid).iter().collect::<Vec<_>>();
        assert_eq!((of(0), of(10), of(20), of(30)), (vec![0], vec![1, 2, 3], vec![2, 3], vec![3]));
        assert!(of(4095).is_empty());
        assert!(members.sets.len() <= 6);
    }
}
