//! What the virtual functions of a card may that one of the kernel's drivers has: asked for, and changed, by rtnetlink(7), as
//! ip-link(8) does.
//!
//! Owns the two requests, and which setting of a change was refused. Knows no card; whether a driver can do a thing is the
//! kernel's to say.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    LinkAttribute, LinkExtentMask, LinkMessage, LinkVfInfo, VfInfo, VfInfoLinkState, VfInfoMac,
    VfInfoSpoofCheck, VfInfoTrust, VfInfoVlan, VfLinkState,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Whether a virtual function sees a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// As the card has one.
    Auto,
    /// Always.
    Enable,
    /// Never.
    Disable,
}

impl Link {
    /// In the words of ip-link(8).
    pub fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Enable => "enable",
            Self::Disable => "disable",
        }
    }
}

/// A virtual function, as the driver of its card has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vf {
    /// Its number.
    pub number: u16,
    /// Its address; zeros: none that its driver chose.
    pub mac: [u8; 6],
    /// Its VLAN, if it is kept in one, and the priority there.
    pub vlan: Option<(u16, u8)>,
    /// Whether it may change its address and receive all groups.
    pub trust: bool,
    /// Whether what it sends must come from its own address.
    pub spoof_check: bool,
    /// Whether it sees a link.
    pub link: Link,
}

/// What is to change; what is left out stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Its address.
    pub mac: Option<[u8; 6]>,
    /// Its VLAN and priority; VLAN 0: none.
    pub vlan: Option<(u16, u8)>,
    /// See [`Vf::trust`].
    pub trust: Option<bool>,
    /// See [`Vf::spoof_check`].
    pub spoof_check: Option<bool>,
    /// See [`Vf::link`].
    pub link: Option<Link>,
}

/// Why a virtual function was not asked about or changed.
#[derive(Debug, thiserror::Error)]
pub enum VfError {
    /// The kernel cannot be asked.
    #[error("cannot ask the kernel about {interface}: {source}")]
    Asking {
        /// The interface of the card.
        interface: String,
        /// What the system said.
        source: io::Error,
    },
    /// Its driver, or the kernel, says no. What was changed before this stays changed.
    #[error("virtual function {number} of {interface}: {setting} refused: {source}{hint}")]
    Refused {
        /// The interface of the card.
        interface: String,
        /// Number of the function.
        number: u16,
        /// What was to be set.
        setting: &'static str,
        /// What the kernel said.
        source: io::Error,
        /// What may help, beginning with "; ", or nothing.
        hint: &'static str,
    },
}

/// The virtual functions of the card with this interface, in order.
///
/// # Errors
/// There is no such interface, or the kernel does not answer.
pub fn list(interface: &str) -> Result<Vec<Vf>, VfError> {
    let failed = |source| VfError::Asking { interface: interface.to_owned(), source };
    let mask = LinkAttribute::ExtMask(vec![LinkExtentMask::Vf, LinkExtentMask::SkipStats]);
    let message = RouteNetlinkMessage::GetLink(link(interface, vec![mask]).map_err(failed)?);
    let answer = ask(message, NLM_F_REQUEST).map_err(failed)?;
    let attributes = answer.map(|link| link.attributes).unwrap_or_default();
    let functions = attributes.into_iter().filter_map(|attribute| match attribute {
        LinkAttribute::VfInfoList(functions) => Some(functions),
        _ => None,
    });
    Ok(functions.flatten().filter_map(|LinkVfInfo(facts)| of(&facts)).collect())
}

/// Changes virtual function `number` of the card with this interface, one setting after the other.
///
/// # Errors
/// One is refused: those before it hold, those behind it were not tried.
pub fn change(interface: &str, number: u16, change: &Change) -> Result<(), VfError> {
    let id = u32::from(number);
    let settings = [
        ("the address", change.mac.map(|mac| VfInfo::Mac(VfInfoMac::new(id, &mac)))),
        (
            "the VLAN",
            change.vlan.map(|(vlan, qos)| VfInfo::Vlan(VfInfoVlan::new(id, vlan.into(), qos.into()))),
        ),
        ("trust", change.trust.map(|on| VfInfo::Trust(VfInfoTrust::new(id, on)))),
        (
            "the check of sources",
            change.spoof_check.map(|on| VfInfo::SpoofCheck(VfInfoSpoofCheck::new(id, on))),
        ),
        (
            "the state of its link",
            change.link.map(|link| {
                let state = match link {
                    Link::Auto => VfLinkState::Auto,
                    Link::Enable => VfLinkState::Enable,
                    Link::Disable => VfLinkState::Disable,
                };
                VfInfo::LinkState(VfInfoLinkState::new(id, state))
            }),
        ),
    ];
    for (setting, fact) in settings {
        let Some(fact) = fact else { continue };
        let list = LinkAttribute::VfInfoList(vec![LinkVfInfo(vec![fact])]);
        let asked = link(interface, vec![list])
            .and_then(|link| ask(RouteNetlinkMessage::SetLink(link), NLM_F_REQUEST | NLM_F_ACK));
        asked.map_err(|source| VfError::Refused {
            interface: interface.to_owned(),
            number,
            setting,
            hint: match source.raw_os_error() {
                Some(libc::EPERM) => "; this needs root",
                Some(libc::EOPNOTSUPP) => "; the card's driver knows no such setting",
                Some(libc::EINVAL) => "; is there a function of that number, and is the interface up?",
                _ => "",
            },
            source,
        })?;
    }
    Ok(())
}

/// What the kernel says of one function.
fn of(facts: &[VfInfo]) -> Option<Vf> {
    let mut vf =
        Vf { number: 0, mac: [0; 6], vlan: None, trust: false, spoof_check: false, link: Link::Auto };
    let mut named = false;
    for fact in facts {
        match fact {
            VfInfo::Mac(fact) => {
                vf.number = u16::try_from(fact.vf_id).ok()?;
                vf.mac.copy_from_slice(fact.mac.get(..6)?);
                named = true;
            }
            VfInfo::Vlan(fact) if fact.vlan_id != 0 => {
                vf.vlan = Some((u16::try_from(fact.vlan_id).ok()?, u8::try_from(fact.qos).ok()?));
            }
            VfInfo::Trust(fact) => vf.trust = fact.enabled,
            VfInfo::SpoofCheck(fact) => vf.spoof_check = fact.enabled,
            VfInfo::LinkState(fact) => {
                vf.link = match fact.state {
                    VfLinkState::Enable => Link::Enable,
                    VfLinkState::Disable => Link::Disable,
                    _ => Link::Auto,
                };
            }
            _ => {}
        }
    }
    named.then_some(vf)
}

fn link(interface: &str, attributes: Vec<LinkAttribute>) -> io::Result<LinkMessage> {
    let mut message = LinkMessage::default();
    message.header.index = nix::net::if_::if_nametoindex(interface)?;
    message.attributes = attributes;
    Ok(message)
}

/// One request, and the answer to it: an interface, or that it was done.
fn ask(message: RouteNetlinkMessage, flags: u16) -> io::Result<Option<LinkMessage>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut packet = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
    packet.header.flags = flags;
    packet.header.sequence_number = 1;
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    // The kernel answers at once, and with nothing before the answer: this socket hears of nobody else's changes.
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
        NetlinkPayload::Error(error) if error.code.is_none() => Ok(None),
        NetlinkPayload::Error(error) => Err(error.to_io()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_of_a_function_is_read_and_what_it_leaves_out_is_the_default() {
        let facts = [
            VfInfo::Mac(VfInfoMac::new(3, &[2, 0, 0, 0, 0, 9])),
            VfInfo::Vlan(VfInfoVlan::new(3, 20, 5)),
            VfInfo::Trust(VfInfoTrust::new(3, true)),
            VfInfo::LinkState(VfInfoLinkState::new(3, VfLinkState::Disable)),
        ];
        let wanted = Vf {
            number: 3,
            mac: [2, 0, 0, 0, 0, 9],
            vlan: Some((20, 5)),
            trust: true,
            spoof_check: false,
            link: Link::Disable,
        };
        assert_eq!(of(&facts), Some(wanted));
        assert_eq!(of(&[]), None);
    }

    #[test]
    fn an_interface_without_functions_has_none_and_one_that_is_not_there_is_said() {
        assert_eq!(list("lo").unwrap(), []);
        let error = list("nosuchif0").unwrap_err().to_string();
        assert!(error.starts_with("cannot ask the kernel about nosuchif0"), "{error}");
        let error =
            change("lo", 0, &Change { trust: Some(true), ..Change::default() }).unwrap_err().to_string();
        assert!(error.starts_with("virtual function 0 of lo: trust refused"), "{error}");
    }
}
