//! What an adapter does for [`crate::nic::selftest`].

use std::time::Duration;

use super::regs::{EEC, EERD, MTA, RAH, RAL};
use super::{Adapter, Physical, loop_back, reset};
use crate::access::{Bar, PciDevice, Regs, Scratch, WaitError};
use crate::nic::DeviceError;
use crate::nic::selftest::{Found, SelfTest};

/// How long a word of the EEPROM may take: some ten µs.
const WORD_LIMIT: Duration = Duration::from_millis(10);

/// Words that are summed up, and their sum (82574 datasheet 6.1.2.8, word 0x3f).
const WORDS: u32 = 0x40;
const SUM: u16 = 0xbaba;

fn word<B: Bar>(regs: &Regs<B>, at: u32) -> Result<u16, WaitError> {
    regs.write(EERD, EERD::START | EERD::ADDR.is(at));
    regs.wait_set(EERD, EERD::DONE, WORD_LIMIT)?;
    Ok(EERD::DATA.of(regs.read(EERD)) as u16)
}

impl<D: PciDevice, C: Physical> SelfTest for Adapter<D, C> {
    fn try_registers(device: &D) -> Found {
        let regs = Regs::new(device.bar(0, C::BAR_BYTES)?);
        reset::<_, C>(&regs)?;
        let addresses =
            (1..C::EXACT).flat_map(|i| [Scratch::new(RAL(i), u32::MAX), Scratch::new(RAH(i), 0xffff)]);
        let groups = (0..128).map(|i| Scratch::new(MTA(i), u32::MAX));
        let all: Vec<_> = C::scratch().into_iter().chain(groups).chain(addresses).collect();
        regs.hold_patterns(&all)?;
        Ok(Some(format!("{} of them held every pattern", all.len())))
    }

    fn try_settings(&self) -> Found {
        let regs = self.core.regs();
        if !EEC::PRES.are_in(regs.read(EEC)) {
            return Ok(None);
        }
        let mut sum = 0u16;
        for at in 0..WORDS {
            sum = sum.wrapping_add(word(regs, at)?);
        }
        if sum != SUM {
            let register = "sum of the EEPROM's first 64 words".to_owned();
            let (wanted, got) = (SUM.into(), sum.into());
            return Err(WaitError::Timeout { register, wanted, got, waited: Duration::ZERO }.into());
        }
        Ok(Some(format!("64 words, their sum is {SUM:#x}")))
    }

    fn raise(&self) -> bool {
        C::raise(self.core.regs(), 0);
        true
    }

    fn loop_back(&mut self, on: bool) -> Result<bool, DeviceError> {
        loop_back(self.core.regs(), on)?;
        Ok(true)
    }
}
