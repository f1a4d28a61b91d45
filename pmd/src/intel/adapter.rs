//! A whole adapter, opened: what housekeeping does with it.

use std::sync::Arc;
use std::time::Duration;

use super::core::Core;
use super::regs::{MTA, RAH, RAL, STATUS};
use super::statistics::Statistics;
use super::{Functions, Physical, Receive, Transmit, receive, reset, transmit};
use crate::access::{PciDevice, Reading, Regs};
use crate::dma::{Arena, Pool};
use crate::nic::{DeviceError, Filter, Link, Mac, Nic, Opened, Options};

/// Card `C`, reached by `D`.
pub struct Adapter<D: PciDevice, C: Physical> {
    pub(crate) core: Arc<Core<D, C>>,
    statistics: Statistics,
    pub(crate) functions: C::Functions,
    /// Which frames it takes.
    taken: Filter,
}

impl<D: PciDevice, C: Physical> Nic for Adapter<D, C> {
    type Device = D;
    type Receive = Receive<D, C>;
    type Transmit = Transmit<D, C>;

    const NAME: &'static str = C::NAME;
    const IDS: &'static [u32] = C::IDS;
    const QUEUES: u16 = C::QUEUES;
    const RECEIVE_ERRORS: [&'static str; 8] = C::RECEIVE_ERRORS;

    fn open(device: Arc<D>, arena: &Arc<Arena>, options: Options) -> Result<Opened<Self>, DeviceError> {
        options.check(C::NAME, C::QUEUES, C::MTU)?;
        let max = options.longest();
        let pools = |count: u32| (0..options.queues).map(move |_| Pool::new(arena, count));
        let receive_pools = pools(options.receive_ring + options.spare).collect::<Result<Vec<_>, _>>()?;
        let transmit_pools = pools(options.transmit_ring).collect::<Result<Vec<_>, _>>()?;
        let core = Arc::new(Core::<D, C>::take(device, arena, &options)?);
        let regs = core.regs();
        reset::<_, C>(regs)?;
        core.let_loose();
        for word in 0..128 {
            regs.write_number(MTA(word), 0);
        }
        let functions = C::prepare(regs, &options)?;
        let first = functions.first_queue();
        transmit(regs);
        for (queue, (_, ring)) in (first..).zip(core.addresses()) {
            C::start_transmit(regs, queue, ring, &options)?;
        }
        for (queue, (ring, _)) in (first..).zip(core.addresses()) {
            C::start_receive(regs, queue, ring, &options)?;
        }
        receive(regs, &options);
        let receive = (0..).zip(receive_pools).map(|(queue, pool)| {
            let mut queue =
                Receive::new(core.clone(), (queue, first + queue), options.receive_ring, max, pool);
            queue.refill();
            queue
        });
        let receive = receive.collect();
        let transmit = (0..).zip(transmit_pools);
        let transmit = transmit
            .map(|(queue, pool)| {
                Transmit::new(core.clone(), (queue, first + queue), options.transmit_ring, max, pool)
            })
            .collect();
        let taken = Filter::default();
        let mut nic = Self { core, statistics: Statistics::default(), functions, taken };
        let mac = nic.mac();
        nic.set_mac(mac)?;
        nic.set_filter(&Filter { promiscuous: options.promiscuous, ..Filter::default() })?;
        // What was counted before is not ours.
        nic.statistics();
        nic.statistics = Statistics::default();
        nic.functions.begin(nic.core.regs());
        nic.link()?;
        Ok(Opened { nic, receive, transmit })
    }

    fn mac(&self) -> Mac {
        let (low, high) = (self.core.regs().read(RAL(0)), self.core.regs().read(RAH(0)));
        let [a, b, c, d] = low.to_le_bytes();
        let [e, f, ..] = high.to_le_bytes();
        [a, b, c, d, e, f]
    }

    fn set_mac(&mut self, mac: Mac) -> Result<(), DeviceError> {
        self.set_exact(0, Some(mac));
        Ok(())
    }

    fn set_filter(&mut self, filter: &Filter) -> Result<(), DeviceError> {
        self.taken = filter.clone();
        self.filter(filter);
        Ok(())
    }

    fn link(&mut self) -> Result<Link, DeviceError> {
        match self.core.look() {
            Ok(status) if !self.functions.are_those_of(status) => {
                self.core.state.fail(DeviceError::OtherFunctions);
                self.core.stop();
                Err(DeviceError::OtherFunctions)
            }
            Ok(status) => {
                let up = STATUS::LU.are_in(status);
                self.serve(up);
                let speed = match STATUS::SPEED.of(status) {
                    0 => 10,
                    1 => 100,
                    _ => 1000,
                };
                Ok(Link { up, speed, full_duplex: STATUS::FD.are_in(status) })
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
        self.statistics.update(self.core.regs());
        self.statistics.each().collect()
    }

    fn stop(&mut self) {
        self.core.stop();
    }

    fn registers(device: &D) -> Result<Vec<Reading>, DeviceError> {
        let regs = Regs::new(device.bar(0, C::BAR_BYTES)?);
        let mut all = regs.look(super::regs::TABLE);
        all.extend(regs.look(C::TABLE));
        Ok(all)
    }
}

impl<D: PciDevice, C: Physical> Adapter<D, C> {
    /// Does what its virtual functions asked for, and tells them of its link.
    fn serve(&mut self, link: bool) {
        if self.functions.serve(self.core.regs(), link) {
            self.filter(&self.taken);
        }
    }
}

impl<D: PciDevice, C: Physical> Drop for Adapter<D, C> {
    fn drop(&mut self) {
        self.core.stop();
    }
}
