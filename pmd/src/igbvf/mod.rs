#![doc = include_str!("README.md")]

mod mailbox;
mod regs;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use port::{DropReason, Head};

use crate::access::{Bar, Entry, PciDevice, Reading, Regs, WaitError, Writable};
use crate::dma::{Arena, Pool};
use crate::igb::I82576;
use crate::igb::message::{self, ACK};
use crate::intel::core::Core;
use crate::intel::filter::hash;
use crate::intel::regs::STATUS;
use crate::intel::{Ask, Card, Checksum, Receive, Transmit};
use crate::nic::selftest::{Found, SelfTest};
use crate::nic::{DeviceError, Filter, Link, Mac, Nic, Opened, Options};
use mailbox::Mailbox;
use regs::{
    RDBAH, RDBAL, RDH, RDLEN, RDT, RXDCTL, SRRCTL, TDBAH, TDBAL, TDH, TDLEN, TDT, TXDCTL, VFGORC, VFGOTC,
    VFGPRC, VFGPTC, VFMPRC, VTCTRL, VTEIAC, VTEICR, VTEICS, VTEIMC, VTEIMS, VTIVAR,
};

/// What a virtual function of the 82576 differs in from others.
pub struct I82576Vf;

/// How long a queue may take to start or end.
const QUEUE_LIMIT: Duration = Duration::from_millis(100);

/// The longest frame of ordinary ones, with FCS and a tag: nobody has to be asked for it.
const ORDINARY: u32 = 1522;

impl Card for I82576Vf {
    const NAME: &'static str = "a virtual function of an 82576";
    const IDS: &'static [u32] = &[0x10ca_8086, 0x152d_8086];
    /// Datasheet 8.26: 16 KiB.
    const BAR_BYTES: u32 = 16 << 10;
    const TABLE: &'static [Entry] = regs::TABLE;
    const RING_ALIGN: u32 = 128;
    const DAMAGED: u64 = I82576::DAMAGED;
    const IGNORE_CHECKSUM: u64 = I82576::IGNORE_CHECKSUM;
    const RECEIVE_ERRORS: [&'static str; 8] = I82576::RECEIVE_ERRORS;

    #[inline(always)]
    fn receive_tail(queue: u32) -> impl Writable {
        RDT(queue)
    }

    /// Of three.
    fn vector(_: u32) -> u16 {
        0
    }

    fn arm<B: Bar>(regs: &Regs<B>, queue: u32) {
        let bit = 1 << Self::vector(queue);
        regs.write_number(VTEICR, bit);
        regs.write_number(VTEIMS, bit);
        regs.flush(STATUS);
    }

    fn raise<B: Bar>(regs: &Regs<B>, queue: u32) {
        regs.write_number(VTEICS, 1 << Self::vector(queue));
        regs.flush(STATUS);
    }

    fn disarm<B: Bar>(regs: &Regs<B>, queue: u32) {
        regs.write_number(VTEIMC, 1 << Self::vector(queue));
    }

    #[inline(always)]
    fn transmit_tail(queue: u32) -> impl Writable {
        TDT(queue)
    }

    #[inline(always)]
    fn data(len: u32, frame: u32, flags: u64) -> u64 {
        I82576::data(len, frame, flags)
    }

    fn ask(checksum: Option<Checksum>, tag: Option<u16>, head: &Head) -> Result<Ask, DropReason> {
        I82576::ask(checksum, tag, head)
    }

    /// Queues off, then the function's own reset, which ends its requests (datasheet 4.2.1.6.2).
    fn quiet<B: Bar>(regs: &Regs<B>) -> Result<(), WaitError> {
        regs.write_number(VTEIMC, 7);
        regs.clear(TXDCTL(0), TXDCTL::ENABLE);
        regs.clear(RXDCTL(0), RXDCTL::ENABLE);
        regs.wait_clear(TXDCTL(0), TXDCTL::ENABLE, QUEUE_LIMIT)?;
        regs.wait_clear(RXDCTL(0), RXDCTL::ENABLE, QUEUE_LIMIT)?;
        regs.write(VTCTRL, VTCTRL::RST);
        Ok(())
    }
}

/// A virtual function of an 82576, reached by `D`.
pub struct Igbvf<D: PciDevice> {
    core: Arc<Core<D, I82576Vf>>,
    mailbox: Mailbox,
    mac: Mac,
    counted: Counted,
}

impl<D: PciDevice> Igbvf<D> {
    /// Asks the adapter; whether it granted that.
    fn ask(&mut self, words: &[u32]) -> Result<bool, DeviceError> {
        let [answer, ..] = self.mailbox.ask(self.core.regs(), words)?;
        Ok(answer & ACK != 0)
    }

    /// The function begins anew, and learns its address.
    fn begin(&mut self) -> Result<(), DeviceError> {
        let regs = self.core.regs();
        regs.write(VTCTRL, VTCTRL::RST);
        regs.pause(Duration::from_millis(1));
        // One that is just being reset by who opens it does not answer either.
        let missing = |error| match error {
            WaitError::Timeout { .. } => DeviceError::NoAdapter(error),
            gone @ WaitError::Gone { .. } => gone.into(),
        };
        self.mailbox.wait_for_adapter(regs).map_err(missing)?;
        let [answer, low, high] = self.mailbox.ask(regs, &[message::RESET]).map_err(missing)?;
        let mac = message::mac_of([low, high]);
        if answer & ACK == 0 || mac == [0; 6] {
            return Err(DeviceError::Refused("to begin, as it has no address: its owner gives it one"));
        }
        self.mac = mac;
        Ok(())
    }

    /// Which groups are taken.
    fn take_groups(&mut self, filter: &Filter) -> Result<(), DeviceError> {
        let all = filter.promiscuous || filter.all_multicast || filter.multicast.len() > message::MOST_GROUPS;
        if self.ask(&[message::SET_PROMISCUOUS | if all { message::ALL_GROUPS } else { 0 }])? || !all {
            let hashes = filter.multicast.iter().take(message::MOST_GROUPS).map(hash);
            let hashes: Vec<u32> = hashes.map(|(word, bit)| (word as u32) << 5 | bit).collect();
            let mut words = vec![message::SET_GROUPS | (hashes.len() as u32) << 16];
            words
                .extend(hashes.chunks(2).map(|two| two.iter().rev().fold(0, |word, hash| word << 16 | hash)));
            if self.ask(&words)? {
                return Ok(());
            }
        }
        Err(DeviceError::Refused("these groups: only a trusted function may take all"))
    }

    fn set_up(&self, options: &Options) -> Result<(), DeviceError> {
        let regs = self.core.regs();
        for (receive, transmit) in self.core.addresses() {
            regs.clear(TXDCTL(0), TXDCTL::ENABLE);
            regs.write_number(TDBAL(0), transmit as u32);
            regs.write_number(TDBAH(0), (transmit >> 32) as u32);
            regs.write_number(TDLEN(0), 16 * options.transmit_ring);
            regs.write_number(TDH(0), 0);
            regs.write_number(TDT(0), 0);
            regs.write(TXDCTL(0), TXDCTL::ENABLE | TXDCTL::PTHRESH.is(8) | TXDCTL::HTHRESH.is(1));
            regs.wait_set(TXDCTL(0), TXDCTL::ENABLE, QUEUE_LIMIT)?;

            regs.clear(RXDCTL(0), RXDCTL::ENABLE);
            regs.write_number(RDBAL(0), receive as u32);
            regs.write_number(RDBAH(0), (receive >> 32) as u32);
            regs.write_number(RDLEN(0), 16 * options.receive_ring);
            regs.write_number(RDH(0), 0);
            regs.write_number(RDT(0), 0);
            // As of the adapter's own queues; one that is full must not hold up those of others.
            regs.write(SRRCTL(0), SRRCTL::DESCTYPE.is(1) | SRRCTL::BSIZEPACKET.is(2) | SRRCTL::DROP_EN);
            regs.write(RXDCTL(0), RXDCTL::ENABLE | RXDCTL::PTHRESH.is(16) | RXDCTL::HTHRESH.is(8));
            regs.wait_set(RXDCTL(0), RXDCTL::ENABLE, QUEUE_LIMIT)?;
        }
        regs.write(VTIVAR, VTIVAR::RECEIVE.is(I82576Vf::vector(0).into()) | VTIVAR::RECEIVE_VALID);
        regs.write_number(VTEIAC, 7);
        Ok(())
    }
}

impl<D: PciDevice> Nic for Igbvf<D> {
    type Device = D;
    type Receive = Receive<D, I82576Vf>;
    type Transmit = Transmit<D, I82576Vf>;

    const NAME: &'static str = I82576Vf::NAME;
    const IDS: &'static [u32] = I82576Vf::IDS;
    /// Of two: nothing spreads frames over them.
    const QUEUES: u16 = 1;
    const RECEIVE_ERRORS: [&'static str; 8] = I82576Vf::RECEIVE_ERRORS;

    /// The function begins anew, asks its adapter for what it needs, and starts.
    fn open(device: Arc<D>, arena: &Arc<Arena>, options: Options) -> Result<Opened<Self>, DeviceError> {
        options.check(Self::NAME, Self::QUEUES, 9000)?;
        if options.strip_tags {
            let what = "taking VLAN tags off (strip_tags): its adapter decides that";
            return Err(DeviceError::Unsupported { card: Self::NAME, what });
        }
        let max = options.longest();
        let receive_pool = Pool::new(arena, options.receive_ring + options.spare)?;
        let transmit_pool = Pool::new(arena, options.transmit_ring)?;
        let core = Arc::new(Core::take(device, arena, &options)?);
        let mut nic = Self { core, mailbox: Mailbox::default(), mac: [0; 6], counted: Counted::default() };
        nic.begin()?;
        if max + 4 > ORDINARY && !nic.ask(&[message::SET_LONGEST, max + 4])? {
            return Err(DeviceError::Refused("frames as long as this MTU needs"));
        }
        nic.core.let_loose();
        nic.set_up(&options)?;
        let mut receive = Receive::new(nic.core.clone(), (0, 0), options.receive_ring, max, receive_pool);
        receive.refill();
        let transmit = Transmit::new(nic.core.clone(), (0, 0), options.transmit_ring, max, transmit_pool);
        // All groups at least, if it may; nobody takes other's frames by a virtual function of this card.
        if options.promiscuous {
            match nic.take_groups(&Filter { all_multicast: true, ..Filter::default() }) {
                Ok(()) | Err(DeviceError::Refused(_)) => {}
                Err(e) => return Err(e),
            }
        }
        nic.counted = Counted::read(nic.core.regs());
        nic.link()?;
        Ok(Opened { nic, receive: vec![receive], transmit: vec![transmit] })
    }

    fn mac(&self) -> Mac {
        self.mac
    }

    fn set_mac(&mut self, mac: Mac) -> Result<(), DeviceError> {
        let [low, high] = message::words_of(mac);
        if !self.ask(&[message::SET_MAC, low, high])? {
            return Err(DeviceError::Refused(
                "another address: only a trusted function may take one that nobody has",
            ));
        }
        self.mac = mac;
        Ok(())
    }

    fn set_filter(&mut self, filter: &Filter) -> Result<(), DeviceError> {
        if filter.promiscuous || !filter.unicast.is_empty() {
            let what = "receiving what is sent to others";
            return Err(DeviceError::Unsupported { card: Self::NAME, what });
        }
        self.take_groups(filter)
    }

    fn link(&mut self) -> Result<Link, DeviceError> {
        if self.core.state.runs() {
            let regs = self.core.regs();
            if let Err(reason) = self.mailbox.check(regs) {
                self.core.state.fail(reason);
            } else if !RXDCTL::ENABLE.are_in(regs.read(RXDCTL(0))) {
                // A reset that the mailbox did not tell of: the bus resets an adapter together with its functions' registers.
                self.core.state.fail(DeviceError::Revoked);
            }
        }
        match self.core.look() {
            Ok(status) => {
                let speed = [10, 100, 1000, 1000][STATUS::SPEED.of(status) as usize & 3];
                Ok(Link { up: STATUS::LU.are_in(status), speed, full_duplex: STATUS::FD.are_in(status) })
            }
            Err(e) => {
                self.core.stop();
                Err(e)
            }
        }
    }

    fn wait_for_link(&mut self, limit: Duration) -> Result<Link, DeviceError> {
        self.core.regs().wait_set(STATUS, STATUS::LU, limit)?;
        self.link()
    }

    fn statistics(&mut self) -> Vec<(&'static str, u64)> {
        self.counted.update(self.core.regs());
        self.counted.each()
    }

    fn stop(&mut self) {
        self.core.stop();
    }

    fn registers(device: &D) -> Result<Vec<Reading>, DeviceError> {
        let regs = Regs::new(device.bar(0, I82576Vf::BAR_BYTES)?);
        let status = crate::intel::regs::TABLE.iter().filter(|entry| entry.name == "STATUS");
        let table: Vec<Entry> = status.chain(I82576Vf::TABLE).copied().collect();
        Ok(regs.look(&table))
    }
}

impl<D: PciDevice> SelfTest for Igbvf<D> {
    fn try_registers(device: &D) -> Found {
        let regs = Regs::new(device.bar(0, I82576Vf::BAR_BYTES)?);
        regs.write(VTCTRL, VTCTRL::RST);
        regs.pause(Duration::from_millis(1));
        let scratch = I82576Vf::scratch();
        regs.hold_patterns(&scratch)?;
        Ok(Some(format!("{} of them held every pattern", scratch.len())))
    }

    fn raise(&self) -> bool {
        I82576Vf::raise(self.core.regs(), 0);
        true
    }
}

impl<D: PciDevice> Drop for Igbvf<D> {
    fn drop(&mut self) {
        self.core.stop();
    }
}

/// The function's own counters: as they read last, and how far they have come.
#[derive(Default)]
struct Counted {
    last: [u32; 5],
    sums: [u64; 5],
}

impl Counted {
    fn numbers<B: Bar>(regs: &Regs<B>) -> [u32; 5] {
        let frames = [regs.read(VFGPRC), regs.read(VFGPTC)];
        let [received, sent] = frames;
        [received, regs.read(VFGORC), sent, regs.read(VFGOTC), regs.read(VFMPRC)]
    }

    fn read<B: Bar>(regs: &Regs<B>) -> Self {
        Self { last: Self::numbers(regs), sums: [0; 5] }
    }

    /// They have 32 bits and count on through zero: read them before 4 GiB have passed, 34 seconds at least.
    fn update<B: Bar>(&mut self, regs: &Regs<B>) {
        let now = Self::numbers(regs);
        if regs.read(STATUS) == crate::access::GONE {
            return;
        }
        for ((sum, last), now) in self.sums.iter_mut().zip(&self.last).zip(now) {
            *sum += u64::from(now.wrapping_sub(*last));
        }
        self.last = now;
    }

    fn each(&self) -> Vec<(&'static str, u64)> {
        let names = ["received", "received_bytes", "sent", "sent_bytes", "received_multicast"];
        names.into_iter().zip(self.sums).collect()
    }
}
