//! What is behind a port: the keys of each kind, and which keys go with which kind.

use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use host::pci::Bdf;
use pmd::kernel::pcap::PcapOptions;
use settings::Spanned;
use settings::values::SocketName;

use super::keys::PortKeys;
use super::validate::{PortReader, value_or};
use super::values::{Device, FeatureName, FileName};
use control::SOCKET_PATH_MAX;

use super::{Feature, PortKind, SocketSide};
use crate::control::CONTROL_SOCKET;

const SOCKET_MODE: u32 = 0o660;
const RECONNECT: Duration = Duration::from_secs(1);

/// What is behind a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Behind {
    /// A virtual machine's virtio-net device.
    VhostUser {
        /// The socket's path, already resolved in the run directory, at most [`SOCKET_PATH_MAX`] bytes.
        socket: PathBuf,
        /// Which end of the socket we are.
        side: Side,
    },
    /// A tap interface.
    Tap {
        /// Its name.
        device: String,
    },
    /// A packet socket on an interface.
    Packet {
        /// The interface's name.
        device: String,
    },
    /// XDP sockets on an interface.
    Xdp {
        /// The interface's name.
        device: String,
    },
    /// A network card.
    Nic {
        /// Its PCI address, as it is printed.
        device: String,
        /// The same.
        bdf: Bdf,
        /// What it takes to open it, for some virtual functions, or to open those of this one.
        token: Option<String>,
        /// What its virtual functions may, in order; what those beyond the end may is the default.
        vfs: Vec<VirtualFunction>,
    },
    /// Files of frames.
    Pcap(PcapOptions),
    /// Nothing.
    Null,
}

/// What a virtual function of a card may, in the words of ip-link(8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtualFunction {
    /// Its address; one that the card's driver makes up, if none.
    pub mac: Option<[u8; 6]>,
    /// Its VLAN: what it sends is tagged, what it receives is of this VLAN, without tag.
    pub vlan: Option<u16>,
    /// The priority in these tags, 0 to 7.
    pub qos: u8,
    /// It may change its address and take all groups.
    pub trust: bool,
    /// What it sends must come from its own address.
    pub spoof_check: bool,
}

impl Default for VirtualFunction {
    fn default() -> Self {
        Self { mac: None, vlan: None, qos: 0, trust: false, spoof_check: true }
    }
}

/// How a port's socket comes to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Side {
    /// We listen.
    Server {
        /// Permissions of the socket.
        mode: u32,
        /// Its group (a gid), if it is not the process's own.
        group: Option<u32>,
    },
    /// We connect, for ever.
    Client {
        /// Time between attempts.
        reconnect: Duration,
    },
}

impl Behind {
    /// Its kind, as in the configuration.
    pub fn kind(&self) -> PortKind {
        match self {
            Behind::VhostUser { .. } => PortKind::VhostUser,
            Behind::Tap { .. } => PortKind::Tap,
            Behind::Packet { .. } => PortKind::Packet,
            Behind::Xdp { .. } => PortKind::Xdp,
            Behind::Nic { .. } => PortKind::Nic,
            Behind::Pcap(_) => PortKind::Pcap,
            Behind::Null => PortKind::Null,
        }
    }

    /// The socket, if it has one.
    pub fn socket(&self) -> Option<&Path> {
        match self {
            Behind::VhostUser { socket, .. } => Some(socket),
            _ => None,
        }
    }

    /// The socket that we listen on, if it has one.
    pub fn listens_on(&self) -> Option<&Path> {
        match self {
            Behind::VhostUser { socket, side: Side::Server { .. } } => Some(socket),
            _ => None,
        }
    }

    /// The network interface or card, if it has one.
    pub fn device(&self) -> Option<&str> {
        match self {
            Behind::Tap { device }
            | Behind::Packet { device }
            | Behind::Xdp { device }
            | Behind::Nic { device, .. } => Some(device),
            Behind::VhostUser { .. } | Behind::Pcap(_) | Behind::Null => None,
        }
    }

    /// The file that is written, if there is one.
    pub fn writes(&self) -> Option<&Path> {
        match self {
            Behind::Pcap(files) => files.record.as_deref(),
            _ => None,
        }
    }

    /// The file that is read, if there is one.
    pub fn reads(&self) -> Option<&Path> {
        match self {
            Behind::Pcap(files) => files.replay.as_deref(),
            _ => None,
        }
    }

    /// What the virtual functions of a card may.
    pub fn functions(&self) -> &[VirtualFunction] {
        match self {
            Behind::Nic { vfs, .. } => vfs,
            _ => &[],
        }
    }

    /// Whether it is the same, but for what may change while a device is open: what virtual functions may.
    pub fn is_same_device(&self, other: &Behind) -> bool {
        match (self, other) {
            (Behind::Nic { bdf, token, .. }, Behind::Nic { bdf: other, token: others, .. }) => {
                bdf == other && token == others
            }
            _ => self == other,
        }
    }

    /// Whether both want the same socket, device or file to write, which only one can have.
    pub fn collides(&self, other: &Behind) -> bool {
        let same = |a: Option<&str>, b| a.is_some() && a == b;
        self.socket().is_some() && self.socket() == other.socket()
            || self.writes().is_some() && self.writes() == other.writes()
            || same(self.device(), other.device())
    }
}

/// A key, where it is if it is there, and the kinds that it goes with.
type Rule<'k> = (&'k str, Option<Range<usize>>, &'k [PortKind]);

impl PortReader<'_, '_> {
    /// What is behind the port whose header is at `at`; keys of other kinds are a mistake. Without a kind, which was noted,
    /// the other keys are read as those of a guest.
    pub(super) fn behind(
        &mut self,
        place: &str,
        name: &str,
        at: &Range<usize>,
        keys: &mut PortKeys,
    ) -> Option<Behind> {
        let written = keys.kind.take().map(Spanned::into_inner);
        let kind = written.unwrap_or(PortKind::VhostUser);
        if written.is_some() {
            self.refuse_keys_of_others(place, kind, keys);
        }
        let behind = match kind {
            PortKind::VhostUser => {
                if keys.socket.is_none() {
                    let example = "where a VMM finds it, as in `socket = \"vnf1.sock\"`";
                    keys.wrong.or_missing("socket", at.clone(), example, self.problems);
                }
                let side = self.side(place, keys);
                let socket_side = match side {
                    Side::Server { .. } => SocketSide::Server,
                    Side::Client { .. } => SocketSide::Client,
                };
                let socket = keys.socket.take()?;
                Behind::VhostUser { socket: self.socket(place, name, socket, socket_side), side }
            }
            PortKind::Tap | PortKind::Packet | PortKind::Xdp | PortKind::Nic => {
                if keys.device.is_none() {
                    let example = match kind {
                        PortKind::Tap => "the interface, as in `device = \"tap0\"`",
                        PortKind::Packet | PortKind::Xdp => "the interface, as in `device = \"eth1\"`",
                        _ => "the card, as in `device = \"0000:01:00.0\"` (`cableway nic list` shows them)",
                    };
                    keys.wrong.or_missing("device", at.clone(), example, self.problems);
                }
                if kind == PortKind::Tap {
                    self.offloads_only(place, keys.disable.as_ref().map(Spanned::get_ref));
                }
                let device = keys.device.take()?;
                let span = device.span();
                let device = self.device(place, name, device, kind);
                match (kind, device.parse::<Bdf>()) {
                    (PortKind::Nic, Ok(bdf)) => Behind::Nic {
                        device,
                        bdf,
                        vfs: self.functions(place, keys),
                        token: keys.vf_token.take().map(|token| token.into_inner().0),
                    },
                    (PortKind::Nic, Err(error)) => {
                        self.problems.add(span, format!("{place}`device`: {error}"));
                        return None;
                    }
                    (_, Ok(_)) => {
                        let message = format!(
                            "{device} is the address of a card, for `kind = \"nic\"`, and no interface"
                        );
                        self.problems.add(span, format!("{place}`device`: {message}"));
                        return None;
                    }
                    (PortKind::Tap, Err(_)) => Behind::Tap { device },
                    (PortKind::Xdp, Err(_)) => Behind::Xdp { device },
                    (_, Err(_)) => Behind::Packet { device },
                }
            }
            PortKind::Pcap => Behind::Pcap(self.files(place, name, at, keys)?),
            PortKind::Null => Behind::Null,
        };
        written.map(|_| behind)
    }

    fn refuse_keys_of_others(&mut self, place: &str, kind: PortKind, keys: &PortKeys) {
        use PortKind::{Nic, Packet, Pcap, Tap, VhostUser, Xdp};
        fn span<T>(key: &Option<Spanned<T>>) -> Option<Range<usize>> {
            key.as_ref().map(Spanned::span)
        }
        let rules: [Rule<'_>; 15] = [
            ("socket", span(&keys.socket), &[VhostUser]),
            ("mode", span(&keys.mode), &[VhostUser]),
            ("socket_mode", span(&keys.socket_mode), &[VhostUser]),
            ("socket_group", span(&keys.socket_group), &[VhostUser]),
            ("reconnect_ms", span(&keys.reconnect_ms), &[VhostUser]),
            ("max_memory", span(&keys.max_memory), &[VhostUser]),
            ("queue_pairs", span(&keys.queue_pairs), &[VhostUser, Tap, Xdp, Nic]),
            ("disable", span(&keys.disable), &[VhostUser, Tap]),
            ("device", span(&keys.device), &[Tap, Packet, Xdp, Nic]),
            ("vf_token", span(&keys.vf_token), &[Nic]),
            ("vfs", span(&keys.vfs), &[Nic]),
            ("replay", span(&keys.replay), &[Pcap]),
            ("rate", span(&keys.rate), &[Pcap]),
            ("repeat", span(&keys.repeat), &[Pcap]),
            ("record", span(&keys.record), &[Pcap]),
        ];
        for (key, span, kinds) in rules {
            let Some(span) = span.filter(|_| !kinds.contains(&kind)) else { continue };
            let words: Vec<_> = kinds.iter().map(|kind| format!("`kind = \"{}\"`", kind.word())).collect();
            let message =
                format!("`{key}` works only with {}, not with {:?}", words.join(" or "), kind.word());
            self.problems.add(span, format!("{place}{message}: take it out"));
        }
    }

    /// What a card's virtual functions may.
    fn functions(&mut self, place: &str, keys: &mut PortKeys) -> Vec<VirtualFunction> {
        let Some(written) = keys.vfs.take() else { return Vec::new() };
        if keys.vf_token.is_none() {
            let example = "`vfs` needs it, nobody can open them without (uuidgen makes one)";
            keys.wrong.or_missing("vf_token", written.span(), example, self.problems);
        }
        let mut functions: Vec<VirtualFunction> = Vec::new();
        for written in written.into_inner() {
            let (at, keys) = (written.span(), written.into_inner());
            let function = VirtualFunction {
                mac: keys.mac.map(|mac| mac.into_inner().0),
                vlan: keys.vlan.map(|vlan| vlan.into_inner().get()),
                qos: keys.qos.map_or(0, |qos| qos.into_inner().get()),
                trust: value_or(keys.trust, false),
                spoof_check: value_or(keys.spoof_check, true),
            };
            if function.vlan.is_none() && function.qos > 0 {
                self.problems.add(at.clone(), format!("{place}`vfs`: `qos` goes with a `vlan`: give both"));
            }
            if function.mac.is_some() && functions.iter().any(|other| other.mac == function.mac) {
                self.problems.add(at, format!("{place}`vfs`: two functions have the same `mac`"));
            }
            functions.push(function);
        }
        functions
    }

    /// The files of a pcap port.
    fn files(
        &mut self,
        place: &str,
        name: &str,
        at: &Range<usize>,
        keys: &mut PortKeys,
    ) -> Option<PcapOptions> {
        if keys.replay.is_none() && keys.record.is_none() {
            let example = "a file to read, as in `replay = \"/tmp/in.pcap\"`, or `record` to write one";
            keys.wrong.or_missing("replay", at.clone(), example, self.problems);
            return None;
        }
        if keys.replay.is_none() {
            let spans = [keys.rate.as_ref().map(Spanned::span), keys.repeat.as_ref().map(Spanned::span)];
            for span in spans.into_iter().flatten() {
                self.problems
                    .add(span, format!("{place}`rate` and `repeat` say how to `replay`, and nothing is"));
            }
        }
        let replay = keys.replay.take().map(|file| {
            let path = self.run_dir.join(&file.get_ref().0);
            if let Some((other, line)) = self.seen.records.get(&path) {
                let message =
                    format!("port `{other}` on line {line} empties {} and writes it", path.display());
                self.problems.add(file.span(), format!("{place}`replay`: {message}: replay a copy"));
            } else if let Err(why) = self.surroundings.reads(&path) {
                self.problems.add(file.span(), format!("{place}`replay`: {why}"));
            }
            let line = self.problems.line(&file.span());
            self.seen.replays.entry(path.clone()).or_insert((name.to_owned(), line));
            path
        });
        let record = keys.record.take().map(|file| self.written(place, name, "record", file));
        let rate = keys.rate.take().map(|rate| rate.into_inner().get());
        Some(PcapOptions { replay, rate, repeat: value_or(keys.repeat.take(), false), record })
    }

    /// A file that is emptied and written, by this port alone.
    pub(super) fn written(&mut self, place: &str, name: &str, key: &str, file: Spanned<FileName>) -> PathBuf {
        let (span, path) = (file.span(), self.run_dir.join(&file.get_ref().0));
        if let Some((other, line)) = self.seen.records.get(&path) {
            let message = format!("{} is written by port `{other}` on line {line} already", path.display());
            self.problems.add(span.clone(), format!("{place}`{key}`: {message}"));
        } else if let Some((other, line)) = self.seen.replays.get(&path) {
            let message = if other == name {
                "this would empty the file to replay".to_owned()
            } else {
                format!("this would empty the file that port `{other}` replays (line {line})")
            };
            self.problems.add(span.clone(), format!("{place}`{key}`: {message}"));
        } else if let Err(why) = self.surroundings.writes(&path) {
            self.problems.add(span.clone(), format!("{place}`{key}`: {why}"));
        }
        let line = self.problems.line(&span);
        self.seen.records.entry(path.clone()).or_insert((name.to_owned(), line));
        path
    }

    /// Of the features, a tap has the offloads.
    fn offloads_only(&mut self, place: &str, disabled: Option<&Vec<Spanned<FeatureName>>>) {
        for feature in disabled.into_iter().flatten() {
            let known = feature.get_ref().0;
            let bits = known.virtio_bits();
            if bits == 0 || bits & !Feature::Offloads.virtio_bits() != 0 {
                let message = format!(
                    "`disable`: a tap has no `{}`; only offloads can be withheld from it",
                    known.name()
                );
                self.problems.add(feature.span(), format!("{place}{message}"));
            }
        }
    }

    /// The interface's name, unique and possible.
    fn device(&mut self, place: &str, name: &str, device: Spanned<Device>, kind: PortKind) -> String {
        let span = device.span();
        let device = device.into_inner().0;
        if let Some((other, line)) = self.seen.devices.get(&device) {
            let message =
                format!("{device} is the device of port `{other}` on line {line}: each port has its own");
            self.problems.add(span.clone(), format!("{place}`device`: {message}"));
        } else if let Err(why) = self.surroundings.device(&device, kind) {
            self.problems.add(span.clone(), format!("{place}`device`: {why}"));
        }
        let line = self.problems.line(&span);
        self.seen.devices.entry(device.clone()).or_insert((name.to_owned(), line));
        device
    }

    /// Which end of the socket we are; the keys of the other end are a mistake.
    fn side(&mut self, place: &str, keys: &mut PortKeys) -> Side {
        let mode = keys.socket_mode.take();
        let group = keys.socket_group.take();
        let reconnect = keys.reconnect_ms.take();
        let mut refuse = |span: Option<Range<usize>>, key: &str, side: SocketSide| {
            if let Some(span) = span {
                let needs = format!("`{key}` works only with `mode = \"{}\"`", side.word());
                self.problems.add(span, format!("{place}{needs}: take one of them out"));
            }
        };
        match value_or(keys.mode.take(), SocketSide::Server) {
            SocketSide::Server => {
                refuse(reconnect.map(|key| key.span()), "reconnect_ms", SocketSide::Client);
                let mode = mode.map_or(SOCKET_MODE, |mode| mode.into_inner().0);
                let group = group.and_then(|group| match self.surroundings.group(&group.get_ref().0) {
                    Ok(gid) => Some(gid),
                    Err(why) => {
                        self.problems.add(group.span(), format!("{place}`socket_group`: {why}"));
                        None
                    }
                });
                Side::Server { mode, group }
            }
            SocketSide::Client => {
                refuse(mode.map(|key| key.span()), "socket_mode", SocketSide::Server);
                refuse(group.map(|key| key.span()), "socket_group", SocketSide::Server);
                Side::Client {
                    reconnect: reconnect.map_or(RECONNECT, |ms| Duration::from_millis(ms.into_inner().get())),
                }
            }
        }
    }

    /// The socket's path, resolved, unique and possible.
    fn socket(&mut self, place: &str, name: &str, socket: Spanned<SocketName>, side: SocketSide) -> PathBuf {
        let span = socket.span();
        let path = self.run_dir.join(&socket.get_ref().0);
        let length = path.as_os_str().as_bytes().len();
        let mut wrong =
            |message: String| self.problems.add(span.clone(), format!("{place}`socket`: {message}"));
        if length > SOCKET_PATH_MAX {
            wrong(format!(
                "{} is {length} bytes long, the kernel takes at most {SOCKET_PATH_MAX}: choose a shorter run directory \
                 (--run-dir) or path",
                path.display()
            ));
        } else if path == self.run_dir.join(CONTROL_SOCKET) {
            wrong(format!("{CONTROL_SOCKET} is the switch's own control socket: choose another name"));
        } else if let Some((other, line)) = self.seen.sockets.get(&path) {
            wrong(format!(
                "{} is the socket of port `{other}` on line {line}: each port has its own",
                path.display()
            ));
        } else if let Err(why) = self.surroundings.socket(&path, side) {
            wrong(why);
        }
        let line = self.problems.line(&span);
        self.seen.sockets.entry(path.clone()).or_insert((name.to_owned(), line));
        path
    }
}
