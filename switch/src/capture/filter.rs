//! Which frames of a port are wanted: a small part of the language of pcap-filter(7).
//!
//! Owns parsing and evaluation. Looks at the private head of a frame and nothing else; every frame costs at most [`MOST`]
//! comparisons.

use std::net::IpAddr;

use port::HEAD;

/// Words of an expression at most.
const MOST: usize = 64;

/// What is looked at of a frame.
struct Seen<'h> {
    destination: &'h [u8],
    source: &'h [u8],
    vlan: Option<u16>,
    kind: u16,
    /// Protocol and addresses of IP.
    ip: Option<(u8, IpAddr, IpAddr)>,
    /// Source and destination port.
    ports: Option<(u16, u16)>,
}

/// Which end of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Source,
    Destination,
    Either,
}

/// An expression.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Expression {
    And(Box<Expression>, Box<Expression>),
    Or(Box<Expression>, Box<Expression>),
    Not(Box<Expression>),
    Kind(u16),
    Protocol(u8),
    Vlan(Option<u16>),
    Broadcast,
    Multicast,
    Station(End, [u8; 6]),
    Host(End, IpAddr),
    Port(End, u16),
}

/// What frames must be like; nothing lets all pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter(Option<Expression>);

impl Filter {
    /// Reads `text`; empty: all frames.
    ///
    /// # Errors
    /// What is not understood, and what would be.
    pub fn parse(text: &str) -> Result<Self, String> {
        let spaced = text.replace('(', " ( ").replace(')', " ) ");
        let words: Vec<&str> = spaced.split_whitespace().collect();
        if words.len() > MOST {
            return Err(format!("filter: {} words, at most {MOST} are possible", words.len()));
        }
        if words.is_empty() {
            return Ok(Self(None));
        }
        let mut parser = Parser { words: &words, at: 0 };
        let expression = parser.any()?;
        match parser.peek() {
            None => Ok(Self(Some(expression))),
            Some(word) => {
                Err(format!("filter: {word:?} is one word too many; join conditions with `and` or `or`"))
            }
        }
    }

    /// Whether a frame of `len` bytes with this head is wanted.
    pub fn wants(&self, head: &[u8; HEAD], len: u32) -> bool {
        let Some(expression) = &self.0 else { return true };
        let bytes = head.get(..(len as usize).min(HEAD)).unwrap_or_default();
        Seen::of(bytes).is_some_and(|seen| expression.holds(&seen))
    }
}

struct Parser<'w> {
    words: &'w [&'w str],
    at: usize,
}

impl<'w> Parser<'w> {
    fn peek(&self) -> Option<&'w str> {
        self.words.get(self.at).copied()
    }

    fn next(&mut self, wanted: &str) -> Result<&'w str, String> {
        let word = self.peek().ok_or_else(|| format!("filter: it ends where {wanted} is wanted"))?;
        self.at += 1;
        Ok(word)
    }

    fn takes(&mut self, words: [&str; 2]) -> bool {
        let found = self.peek().is_some_and(|word| words.contains(&word));
        self.at += usize::from(found);
        found
    }

    fn any(&mut self) -> Result<Expression, String> {
        let mut left = self.all()?;
        while self.takes(["or", "||"]) {
            left = Expression::Or(Box::new(left), Box::new(self.all()?));
        }
        Ok(left)
    }

    fn all(&mut self) -> Result<Expression, String> {
        let mut left = self.one()?;
        while self.takes(["and", "&&"]) {
            left = Expression::And(Box::new(left), Box::new(self.one()?));
        }
        Ok(left)
    }

    fn one(&mut self) -> Result<Expression, String> {
        if self.takes(["not", "!"]) {
            return Ok(Expression::Not(Box::new(self.one()?)));
        }
        if self.takes(["(", "("]) {
            let inside = self.any()?;
            return match self.next("`)`")? {
                ")" => Ok(inside),
                other => Err(format!("filter: {other:?} where `)` is wanted")),
            };
        }
        Ok(match self.next("a condition")? {
            "arp" => Expression::Kind(0x0806),
            "ip" => Expression::Kind(0x0800),
            "ip6" => Expression::Kind(0x86dd),
            "icmp" => Expression::Protocol(1),
            "tcp" => Expression::Protocol(6),
            "udp" => Expression::Protocol(17),
            "icmp6" => Expression::Protocol(58),
            "broadcast" => Expression::Broadcast,
            "multicast" => Expression::Multicast,
            "vlan" => match self.peek().and_then(|word| word.parse().ok()) {
                Some(vlan) => {
                    self.at += 1;
                    Expression::Vlan(Some(vlan))
                }
                None => Expression::Vlan(None),
            },
            "src" => self.of_end(End::Source)?,
            "dst" => self.of_end(End::Destination)?,
            "ether" => {
                let end = match self.next("`src`, `dst` or `host`")? {
                    "src" => End::Source,
                    "dst" => End::Destination,
                    "host" => End::Either,
                    other => {
                        return Err(format!(
                            "filter: {other:?} behind `ether`; there are `src`, `dst` and `host`"
                        ));
                    }
                };
                Expression::Station(end, station(self.next("an address")?)?)
            }
            word @ ("host" | "port") => self.host_or_port(End::Either, word)?,
            other => {
                let known = "arp, ip, ip6, icmp, icmp6, tcp, udp, broadcast, multicast, vlan [ID], [src|dst] host IP, \
                             [src|dst] port N, ether src|dst|host MAC, and, or, not, ( )";
                return Err(format!("filter: {other:?} is unknown; there are {known}"));
            }
        })
    }

    fn of_end(&mut self, end: End) -> Result<Expression, String> {
        let word = self.next("`host` or `port`")?;
        self.host_or_port(end, word)
    }

    fn host_or_port(&mut self, end: End, word: &str) -> Result<Expression, String> {
        match word {
            "host" => {
                let word = self.next("an IP address")?;
                let address = word.parse().map_err(|_| format!("filter: {word:?} is no IP address"))?;
                Ok(Expression::Host(end, address))
            }
            "port" => {
                let word = self.next("a port's number")?;
                let port =
                    word.parse().map_err(|_| format!("filter: {word:?} is no port from 0 to 65535"))?;
                Ok(Expression::Port(end, port))
            }
            other => Err(format!("filter: {other:?} where `host` or `port` is wanted")),
        }
    }
}

fn station(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("filter: {text:?} is no Ethernet address like 02:00:00:00:00:01");
    let bytes: Option<Vec<u8>> = text.split(':').map(|b| u8::from_str_radix(b, 16).ok()).collect();
    bytes.and_then(|b| b.try_into().ok()).ok_or_else(wrong)
}

impl Expression {
    fn holds(&self, seen: &Seen<'_>) -> bool {
        let ends = |end: End, source: bool, destination: bool| match end {
            End::Source => source,
            End::Destination => destination,
            End::Either => source || destination,
        };
        match self {
            Expression::And(a, b) => a.holds(seen) && b.holds(seen),
            Expression::Or(a, b) => a.holds(seen) || b.holds(seen),
            Expression::Not(a) => !a.holds(seen),
            Expression::Kind(kind) => seen.kind == *kind,
            Expression::Protocol(protocol) => seen.ip.is_some_and(|ip| ip.0 == *protocol),
            Expression::Vlan(None) => seen.vlan.is_some(),
            Expression::Vlan(vlan) => seen.vlan == *vlan,
            Expression::Broadcast => seen.destination == [0xff; 6],
            Expression::Multicast => seen.destination.first().is_some_and(|b| b & 1 == 1),
            Expression::Station(end, a) => ends(*end, seen.source == a, seen.destination == a),
            Expression::Host(end, a) => seen.ip.is_some_and(|ip| ends(*end, ip.1 == *a, ip.2 == *a)),
            Expression::Port(end, p) => seen.ports.is_some_and(|(s, d)| ends(*end, s == *p, d == *p)),
        }
    }
}

impl<'h> Seen<'h> {
    fn of(bytes: &'h [u8]) -> Option<Self> {
        let (destination, source) = (bytes.get(..6)?, bytes.get(6..12)?);
        let number = |at: usize| Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let (mut at, mut vlan, mut kind) = (14, None, number(12)?);
        // IEEE 802.1Q and 802.1ad; the outermost tag counts.
        while matches!(kind, 0x8100 | 0x88a8) && at < 22 {
            vlan = vlan.or(number(at).map(|tci| tci & 0x0fff));
            (kind, at) = (number(at + 2)?, at + 4);
        }
        let mut seen = Self { destination, source, vlan, kind, ip: None, ports: None };
        let (protocol, end) = match kind {
            // RFC 791, 3.1.
            0x0800 => {
                let address = |at: usize| Some(IpAddr::from(*bytes.get(at..)?.first_chunk::<4>()?));
                let protocol = *bytes.get(at + 9)?;
                seen.ip = Some((protocol, address(at + 12)?, address(at + 16)?));
                let later_fragment = number(at + 6)? & 0x1fff != 0;
                let end = at + usize::from(bytes.get(at)? & 0x0f) * 4;
                (if later_fragment { 0 } else { protocol }, end)
            }
            // RFC 8200, 3.
            0x86dd => {
                let address = |at: usize| Some(IpAddr::from(*bytes.get(at..)?.first_chunk::<16>()?));
                let protocol = *bytes.get(at + 6)?;
                seen.ip = Some((protocol, address(at + 8)?, address(at + 24)?));
                (protocol, at + 40)
            }
            _ => return Some(seen),
        };
        if matches!(protocol, 6 | 17) {
            seen.ports = number(end).zip(number(end + 2));
        }
        Some(seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// TCP over IPv4 from 10.0.0.1:1000 to 10.0.0.2:80, in VLAN 20 if `tagged`.
    fn tcp(tagged: bool) -> [u8; HEAD] {
        let tag: &[u8] = if tagged { &[0x81, 0, 0, 20] } else { &[] };
        let ip = [0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        let bytes =
            [&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1][..], tag, &[8, 0], &ip, &1000u16.to_be_bytes(), &[0, 80]];
        let mut head = [0; HEAD];
        head.iter_mut().zip(bytes.concat()).for_each(|(to, from)| *to = from);
        head
    }

    fn wants(filter: &str, head: &[u8; HEAD]) -> bool {
        Filter::parse(filter).unwrap().wants(head, 60)
    }

    #[test]
    fn conditions_hold_for_the_frames_that_they_name() {
        for head in [tcp(false), tcp(true)] {
            for yes in [
                "",
                "tcp",
                "ip and not udp",
                "port 80",
                "dst port 80 and src port 1000",
                "host 10.0.0.1",
                "src host 10.0.0.1 and dst host 10.0.0.2",
                "ether src 02:00:00:00:00:01",
                "arp or (tcp and port 80)",
                "not (arp or broadcast)",
            ] {
                assert!(wants(yes, &head), "{yes}");
            }
            for no in [
                "arp",
                "udp",
                "src port 80",
                "host 10.0.0.3",
                "ether dst 02:00:00:00:00:01",
                "multicast",
                "ip6",
            ] {
                assert!(!wants(no, &head), "{no}");
            }
        }
        assert!(wants("vlan 20 and tcp", &tcp(true)) && wants("vlan", &tcp(true)));
        assert!(!wants("vlan", &tcp(false)) && !wants("vlan 21", &tcp(true)));
    }

    #[test]
    fn ports_of_later_fragments_are_not_made_up() {
        let mut head = tcp(false);
        head[20] = 0x20;
        assert!(wants("port 80", &head), "a first fragment has them");
        head[21] = 1;
        assert!(!wants("port 80", &head) && wants("tcp", &head));
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (text, wanted) in [
            ("tpc", "\"tpc\" is unknown; there are arp,"),
            ("tcp udp", "\"udp\" is one word too many"),
            ("port", "ends where a port's number is wanted"),
            ("port 70000", "\"70000\" is no port"),
            ("host nowhere", "is no IP address"),
            ("(tcp", "ends where `)` is wanted"),
            ("ether src 02:00", "is no Ethernet address"),
            ("tcp and", "ends where a condition is wanted"),
        ] {
            let error = Filter::parse(text).unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
        assert!(Filter::parse(&"not ".repeat(100)).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_frame_and_no_text_is_a_panic(text in "\\PC{0,80}", bytes: [u8; 32], len in 0u32..100) {
            let mut head = tcp(true);
            head[12..44].copy_from_slice(&bytes);
            let _ = Filter::parse(&text);
            let filter = Filter::parse("vlan 1 or port 2 or host ::1 or ether host 02:00:00:00:00:01").unwrap();
            let _ = filter.wants(&head, len);
        }
    }
}
