//! The XDP program that hands an interface's frames to AF_XDP sockets, and its map of sockets.
//!
//! Owns the five instructions and the calls of bpf(2) that load and attach them. Attached by a link: it is gone when its descriptor
//! is closed, also by the kernel after a SIGKILL, and when the interface goes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

// Of linux/bpf.h.
const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const MAP_TYPE_XSKMAP: u32 = 17;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const FUNC_REDIRECT_MAP: i32 = 51;
const PSEUDO_MAP_FD: u8 = 1;
const XDP_PASS: i32 = 2;

/// Runs the program where every driver can: behind the driver, on the kernel's own frames.
const GENERIC: u32 = 1 << 1;

/// Where `struct xdp_md` says which queue a frame came in on.
const RX_QUEUE_INDEX: i16 = 16;

/// The commands that [`Program::attach`] takes: what a sandbox must let pass.
pub const COMMANDS: [libc::c_long; 4] = [MAP_CREATE, MAP_UPDATE_ELEM, PROG_LOAD, LINK_CREATE];

/// An instruction (linux/bpf.h, `struct bpf_insn`).
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// The arguments of `MAP_CREATE`.
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// The arguments of `MAP_UPDATE_ELEM`.
#[repr(C)]
struct MapUpdate {
    map: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The arguments of `PROG_LOAD`, as far as they are used here.
#[repr(C)]
struct ProgramLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach: u32,
}

/// The arguments of `LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    program: u32,
    interface: u32,
    attach: u32,
    flags: u32,
}

/// A program that is attached, for as long as this lives.
pub(super) struct Program {
    _link: OwnedFd,
    _map: OwnedFd,
}

impl Program {
    /// Lets the frames that come in on queue `n` of an interface go to `sockets[n]`, those of further queues to the kernel.
    ///
    /// # Errors
    /// What was being done, and what the kernel said.
    pub(super) fn attach(
        interface: libc::c_int,
        sockets: &[BorrowedFd<'_>],
    ) -> Result<Self, (&'static str, io::Error)> {
        let count = sockets.len() as u32;
        let create =
            MapCreate { kind: MAP_TYPE_XSKMAP, key_size: 4, value_size: 4, max_entries: count, flags: 0 };
        let map = made(bpf(MAP_CREATE, &create)).map_err(|e| ("making the map of its XDP sockets", e))?;
        let program = load(map.as_fd()).map_err(|e| ("loading its XDP program", e))?;
        for (queue, socket) in (0u32..).zip(sockets) {
            let value = number(*socket);
            let update = MapUpdate {
                map: number(map.as_fd()),
                _pad: 0,
                key: (&raw const queue).addr() as u64,
                value: (&raw const value).addr() as u64,
                flags: 0,
            };
            bpf(MAP_UPDATE_ELEM, &update).map_err(|e| ("giving a socket to its XDP program", e))?;
        }
        let attach = |flags| {
            let (program, interface) = (number(program.as_fd()), interface.unsigned_abs());
            made(bpf(LINK_CREATE, &LinkCreate { program, interface, attach: ATTACH_XDP, flags }))
        };
        // In its driver if that can, else behind it.
        let link = attach(0).or_else(|error| match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EINVAL) => attach(GENERIC),
            _ => Err(error),
        });
        let link = link.map_err(|e| ("attaching its XDP program", e))?;
        Ok(Self { _link: link, _map: map })
    }
}

/// `return bpf_redirect_map(&map, context->rx_queue_index, XDP_PASS)`.
fn load(map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let insn = |code, registers, offset, immediate| Instruction { code, registers, offset, immediate };
    let instructions = [
        insn(0x61, 0x12, RX_QUEUE_INDEX, 0), // r2 = *(u32 *)(r1 + 16)
        insn(0x18, PSEUDO_MAP_FD << 4 | 1, 0, map.as_raw_fd()), // r1 = the map
        insn(0x00, 0, 0, 0),                 // (its upper half)
        insn(0xb7, 3, 0, XDP_PASS),          // r3 = what to do where there is no socket
        insn(0x85, 0, 0, FUNC_REDIRECT_MAP), // r0 = bpf_redirect_map(r1, r2, r3)
        insn(0x95, 0, 0, 0),                 // return r0
    ];
    let license = c"Apache-2.0";
    let mut name = [0; 16];
    name.iter_mut().zip(b"cableway").for_each(|(to, from)| *to = *from);
    made(bpf(
        PROG_LOAD,
        &ProgramLoad {
            kind: PROG_TYPE_XDP,
            instruction_count: instructions.len() as u32,
            instructions: instructions.as_ptr().addr() as u64,
            license: license.as_ptr().addr() as u64,
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name,
            interface: 0,
            expected_attach: ATTACH_XDP,
        },
    ))
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// The descriptor that a command made.
fn made(answer: io::Result<libc::c_int>) -> io::Result<OwnedFd> {
    // SAFETY: the kernel just made it, and nobody else has it.
    answer.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// bpf(2).
fn bpf<T>(command: libc::c_long, arguments: &T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads the arguments, and what the addresses in them lead to, during the call; the callers keep both.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(arguments), size_of::<T>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer as libc::c_int) }
}
