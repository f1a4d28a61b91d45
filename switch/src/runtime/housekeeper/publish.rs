//! What is known now becomes a plan for the workers and a view for readers.

use std::sync::Arc;

use super::super::attached::{self, Attached};
use super::super::placement::{Queue, place};
use super::super::ports::{self, RunningPort};
use super::super::{PortView, View};
use super::Housekeeper;
use crate::bridge::PlanError;
use crate::config::Idle;
use crate::inject::{Injection, Injections};
use crate::plan::{Devices, Extras, Plan};

impl Housekeeper {
    /// Puts what is known now into force: a new plan for the workers, a new view for readers.
    pub(super) fn publish(&mut self) -> Result<(), PlanError> {
        let queues = self.queues();
        let plain: Vec<Queue> = queues.iter().map(|q| q.3).collect();
        let places = place(&plain, &self.worker_nodes());
        let mut by_worker = vec![Vec::new(); self.shared.workers.len()];
        let mut devices =
            Devices { queues: vec![Vec::new(); self.shared.workers.len()], ..Devices::default() };
        self.places.clear();
        for ((number, pair, slot, _), worker) in queues.into_iter().zip(places) {
            self.places.push((number, pair, worker));
            if let (Some(guests), Some(devices)) = (by_worker.get_mut(worker), devices.queues.get_mut(worker))
            {
                match slot {
                    attached::Queue::Guest(slot) => guests.push(slot),
                    attached::Queue::Device(slot) => devices.push(slot),
                }
            }
        }
        let highest = self.ports.iter().map(|p| usize::from(p.port.number()) + 1).max().unwrap_or(0);
        let mut by_number = vec![None; highest];
        devices.ports = vec![None; highest];
        for running in &self.ports {
            let number = usize::from(running.port.number());
            if let (Some(guest), Some(device)) = (by_number.get_mut(number), devices.ports.get_mut(number)) {
                match &running.port {
                    Attached::Guest(port) => *guest = Some(port.clone()),
                    Attached::Device(port) => *device = Some(port.clone()),
                }
            }
        }
        let bridge = ports::bridge(&self.config, &self.ports, self.shared.fdb.clone())?;
        // The number of a port that is gone may be another's by now, whose frames nobody asked for.
        let runs = |number: u16, name: &str| {
            self.ports.iter().any(|p| p.port.number() == number && p.config.name == name)
        };
        self.shared.change_captures(|captures| captures.retain(|c| runs(c.port, &c.name)));
        let view = |p: &RunningPort| PortView {
            config: p.config.clone(),
            port: p.port.clone(),
            lanes: p.lanes.clone(),
            trace: p.trace.as_ref().map(|trace| trace.shared.clone()),
        };
        let ports = self.ports.iter().map(view).collect();
        self.shared.view.store(Arc::new(View { config: self.config.clone(), ports }));
        self.shared.plans.swap(Plan {
            bridge,
            ports: by_number,
            queues: by_worker,
            devices,
            extras: self.extras().any(),
            burst: self.config.switch.burst,
            idle: self.config.switch.idle,
        });
        if self.config.switch.idle == Idle::Sleep {
            self.shared.workers.iter().for_each(|w| w.sleeper.wake());
        }
        self.ports.iter_mut().for_each(RunningPort::settle);
        Ok(())
    }

    /// What is done to frames besides moving them.
    fn extras(&self) -> Extras {
        let mut captures = self.shared.captures();
        captures.extend(self.ports.iter().filter_map(|p| Some(p.trace.as_ref()?.shared.capture.clone())));
        let injected = |p: &RunningPort| Some(Injection { port: p.port.number(), lanes: p.lanes.clone()? });
        let injections = Injections::new(self.ports.iter().filter_map(injected).collect());
        Extras { captures, injections }
    }

    /// The same where nobody waits for an answer. The ports are those of a plan that was possible before.
    pub(super) fn republish(&mut self) {
        if let Err(e) = self.publish() {
            tracing::error!("workers go on as before: {e}");
        }
    }
}
