//! What a process that talks to strangers gives up: filters of system calls (seccomp) by kind of thread, and files that are not its
//! own (Landlock, in [`files`]).
//!
//! Owns how filters are built and put in force, and the lists that all programs begin with ([`calls`]). Which kind of thread may what
//! is each program's to say. A filter holds for the thread that asks for it and for all that it starts; filters only ever add up. What
//! lies in memory is not protected by this: all threads share it.

pub mod calls;
pub mod files;

use std::collections::BTreeMap;

use libc::c_long;
pub use seccompiler::{BackendError, BpfProgram, Error as FilterError, SeccompAction as Action};
use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch};

/// Where taps come from.
pub const TUN: &str = "/dev/net/tun";

/// A condition on one argument of a call. Arguments are `int`s, whose upper halves the kernel ignores, unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// It is this.
    Is(u8, u64),
    /// Those bits of it are these.
    Bits(u8, u64, u64),
    /// It is this, in all 64 bits.
    IsLong(u8, u64),
}

impl Argument {
    fn rule(self) -> Result<SeccompRule, BackendError> {
        use SeccompCmpArgLen::{Dword, Qword};
        use SeccompCmpOp::{Eq, MaskedEq};
        let condition = match self {
            Argument::Is(argument, value) => SeccompCondition::new(argument, Dword, Eq, value),
            Argument::Bits(argument, mask, value) => {
                SeccompCondition::new(argument, Dword, MaskedEq(mask), value)
            }
            Argument::IsLong(argument, value) => SeccompCondition::new(argument, Qword, Eq, value),
        };
        SeccompRule::new(vec![condition?])
    }
}

/// The calls that pass a filter.
#[derive(Clone, Debug)]
pub struct Allowed(BTreeMap<c_long, Vec<SeccompRule>>);

impl Allowed {
    /// Those of `lists`, whatever their arguments, but for a few that never pass as they please: no memory can be executed (code
    /// that somebody smuggles in stays data), only threads can be started, sockets are UNIX sockets, and nothing is asked of a
    /// device, nor of the process, but what every library asks.
    ///
    /// # Errors
    /// None; the filter's maker is general.
    pub fn new(lists: &[&[c_long]]) -> Result<Self, BackendError> {
        let is = |argument, values: &[libc::c_int]| -> Vec<Argument> {
            values.iter().map(|value| Argument::Is(argument, u64::from(value.unsigned_abs()))).collect()
        };
        // The C library asks in either way whether something is a terminal (glibc 2.42 in the second).
        let terminal = [libc::TCGETS, libc::TCGETS2, libc::TIOCGWINSZ];
        let plain = [&[libc::FIONBIO, libc::FIONREAD, libc::FIOCLEX], &terminal[..]].concat();
        let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
        let executable = u64::from(libc::PROT_EXEC.unsigned_abs());
        let mut allowed = Self(lists.iter().copied().flatten().map(|call| (*call, Vec::new())).collect());
        for (call, conditions) in [
            (libc::SYS_mmap, vec![Argument::Bits(2, executable, 0)]),
            (libc::SYS_mprotect, vec![Argument::Bits(2, executable, 0)]),
            (libc::SYS_clone, vec![Argument::Bits(0, thread, thread)]),
            (libc::SYS_socket, is(0, &[libc::AF_UNIX])),
            (libc::SYS_socketpair, is(0, &[libc::AF_UNIX])),
            (libc::SYS_ioctl, plain.iter().map(|request| Argument::Is(1, *request)).collect()),
            (libc::SYS_prctl, is(0, &[libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_NO_NEW_PRIVS])),
        ] {
            if allowed.0.contains_key(&call) {
                allowed = allowed.when(call, &conditions)?;
            }
        }
        Ok(allowed)
    }

    /// `call` passes where one of `conditions` holds, which are looked at first, or one of those that it had; and nowhere else. Without
    /// any, nothing changes.
    ///
    /// # Errors
    /// An argument that no call has.
    pub fn when(mut self, call: c_long, conditions: &[Argument]) -> Result<Self, BackendError> {
        let rules = conditions.iter().map(|condition| condition.rule());
        let rules = rules.collect::<Result<Vec<_>, _>>()?;
        if !rules.is_empty() {
            self.0.entry(call).or_default().splice(0..0, rules);
        }
        Ok(self)
    }

    /// The filter; what is not allowed is answered with `otherwise`.
    ///
    /// # Errors
    /// It would be too long.
    pub fn or(self, otherwise: Action) -> Result<BpfProgram, BackendError> {
        SeccompFilter::new(self.0, otherwise, Action::Allow, TargetArch::x86_64)?.try_into()
    }
}

/// A filter that lets all but `calls` pass, which get `answer`. Where several filters answer, the hardest answer holds, and among equals
/// that of the last.
///
/// # Errors
/// It would be too long.
pub fn all_but(calls: &[c_long], answer: Action) -> Result<BpfProgram, BackendError> {
    let rules = calls.iter().map(|&call| (call, Vec::new())).collect();
    SeccompFilter::new(rules, Action::Allow, answer, TargetArch::x86_64)?.try_into()
}

/// Puts filters in force for the calling thread, and those that it starts later.
///
/// # Errors
/// The kernel has no seccomp filters, or the thread has one already that lets no other follow.
pub fn put_in_force(programs: &[BpfProgram]) -> Result<(), FilterError> {
    programs.iter().try_for_each(|program| seccompiler::apply_filter(program))
}
