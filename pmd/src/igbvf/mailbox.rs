//! A virtual function's side of its mailbox (82576 datasheet 7.10.2.9): asks, and waits for the answer, for a bounded time.

use std::time::Duration;

use super::regs::{V2PMAILBOX, VMBMEM};
use crate::access::{Bar, Bits, GONE, Regs, WaitError};
use crate::igb::message::{ACK, CONTROL, KIND, NACK, WORDS};
use crate::nic::DeviceError;

/// How long the adapter's driver may take to answer. Ours looks ten times a second; Intel's are told by an interrupt.
const LIMIT: Duration = Duration::from_secs(2);
/// How long the adapter may take to let its functions begin: whoever waits for one asks again.
const BEGIN_LIMIT: Duration = Duration::from_millis(300);
const STEP: Duration = Duration::from_micros(500);

/// Words that are read of an answer.
pub(super) type Answer = [u32; 3];

/// The mailbox, and the bits of it that reading has cleared.
#[derive(Default)]
pub(super) struct Mailbox(u32);

impl Mailbox {
    /// Looks at the mailbox; bits that were seen and not taken yet are still there. None if the device is gone.
    fn look<B: Bar>(&mut self, regs: &Regs<B>) -> Option<u32> {
        let now = regs.read(V2PMAILBOX);
        if now == GONE {
            return None;
        }
        let once = V2PMAILBOX::PFSTS | V2PMAILBOX::PFACK | V2PMAILBOX::RSTD;
        self.0 |= now & once.value();
        Some(now | self.0)
    }

    /// Waits until `bits` are `wanted`; `ask` is written before each look, if it is anything.
    fn wait<B: Bar>(
        &mut self,
        regs: &Regs<B>,
        (name, bits): (&str, Bits<V2PMAILBOX>),
        wanted: bool,
        ask: Bits<V2PMAILBOX>,
        limit: Duration,
    ) -> Result<(), WaitError> {
        let register = || format!("V2PMAILBOX.{name}");
        let mut waited = Duration::ZERO;
        loop {
            if ask.value() != 0 {
                regs.write(V2PMAILBOX, ask);
            }
            let now = self.look(regs).ok_or_else(|| WaitError::Gone { register: register() })?;
            if (now & bits.value() != 0) == wanted {
                self.0 &= !bits.value();
                return Ok(());
            }
            if waited >= limit {
                let wanted = if wanted { bits.value() } else { 0 };
                return Err(WaitError::Timeout {
                    register: register(),
                    wanted,
                    got: now & bits.value(),
                    waited,
                });
            }
            regs.pause(STEP);
            waited += STEP;
        }
    }

    /// Waits until the adapter lets its functions begin.
    pub(super) fn wait_for_adapter<B: Bar>(&mut self, regs: &Regs<B>) -> Result<(), WaitError> {
        self.0 = 0;
        self.wait(regs, ("RSTI", V2PMAILBOX::RSTI), false, Bits::new(0), BEGIN_LIMIT)
    }

    /// Asks, and waits for the answer. What was asked before and answered too late is not taken for it.
    pub(super) fn ask<B: Bar>(&mut self, regs: &Regs<B>, words: &[u32]) -> Result<Answer, WaitError> {
        self.0 = 0;
        let nothing = Bits::new(0);
        self.wait(regs, ("VFU", V2PMAILBOX::VFU), true, V2PMAILBOX::VFU, LIMIT)?;
        for (i, word) in (0..WORDS).zip(words) {
            regs.write_number(VMBMEM(i), *word);
        }
        self.0 = 0;
        regs.write(V2PMAILBOX, V2PMAILBOX::REQ);
        let kind = words.first().copied().unwrap_or_default() & KIND;
        // A word of the adapter's own may come first, and one more while that is read.
        for _ in 0..4 {
            self.wait(regs, ("PFSTS", V2PMAILBOX::PFSTS), true, nothing, LIMIT)?;
            let answer = self.read(regs)?;
            let [first, ..] = answer;
            if first & KIND == kind && first & (ACK | NACK) != 0 {
                return Ok(answer);
            }
        }
        let register = "VMBMEM[0]".to_owned();
        Err(WaitError::Timeout { register, wanted: kind | ACK, got: regs.read(VMBMEM(0)), waited: LIMIT })
    }

    /// Reads what lies in the mailbox, and says so.
    fn read<B: Bar>(&mut self, regs: &Regs<B>) -> Result<Answer, WaitError> {
        self.wait(regs, ("VFU", V2PMAILBOX::VFU), true, V2PMAILBOX::VFU, LIMIT)?;
        let answer = std::array::from_fn(|i| regs.read(VMBMEM(i as u32)));
        regs.write(V2PMAILBOX, V2PMAILBOX::ACK);
        Ok(answer)
    }

    /// Whether the adapter still wants this function, for housekeeping: it was not reset, and said nothing else.
    pub(super) fn check<B: Bar>(&mut self, regs: &Regs<B>) -> Result<(), DeviceError> {
        let Some(now) = self.look(regs) else { return Ok(()) };
        if now & (V2PMAILBOX::RSTI | V2PMAILBOX::RSTD).value() != 0 {
            return Err(DeviceError::Revoked);
        }
        if !V2PMAILBOX::PFSTS.are_in(now) {
            return Ok(());
        }
        self.0 &= !V2PMAILBOX::PFSTS.value();
        let [first, ..] = self.read(regs)?;
        if first & KIND == CONTROL && first & crate::igb::message::CLEAR_TO_SEND == 0 {
            return Err(DeviceError::Revoked);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;
    use std::sync::Mutex;

    /// A mailbox that reads as it is told, time after time, and then as nothing.
    struct Told(Mutex<VecDeque<u32>>);

    impl Bar for Told {
        fn read32(&self, offset: u32) -> u32 {
            // What lies in it does not matter here.
            if offset < 0xC40 { 0 } else { self.0.lock().unwrap().pop_front().unwrap_or(0) }
        }
        fn write32(&self, _: u32, _: u32) {}
        fn pause(&self, _: Duration) {}
    }

    #[test]
    fn an_answer_that_may_not_be_read_is_waited_for_no_longer_than_two_seconds() {
        let (vfu, pfsts) = (V2PMAILBOX::VFU.value(), V2PMAILBOX::PFSTS.value());
        let regs = Regs::new(Told(Mutex::new([vfu, pfsts].into())));
        let error = Mailbox::default().ask(&regs, &[1]).unwrap_err();
        assert_eq!(error.to_string(), "V2PMAILBOX.VFU: wanted 0x4, read 0x0 for 2s");
    }

    #[test]
    fn a_function_that_is_gone_is_waited_for_no_more() {
        let regs = Regs::new(Told(Mutex::new([GONE].into())));
        let error = Mailbox::default().ask(&regs, &[1]).unwrap_err();
        assert_eq!(error, WaitError::Gone { register: "V2PMAILBOX.VFU".into() });
    }
}
