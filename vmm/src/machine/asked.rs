//! What a machine that runs is asked for: to rest and go on, to reboot, to end.
//!
//! Owns the wait for its end. Requests come from any thread and are done here, one after the other, by the machine's own;
//! each is answered in bounded time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use kvm_bindings::kvm_clock_data;
use tokio::sync::oneshot;

use super::{Ended, Event, Machine};
use crate::control::report::{EventKind, MachineState};
use crate::layout;
use crate::life::Life;
use crate::lifecycle::{self, Lifecycle};

/// How long vCPUs, and then devices, may take to come to rest: a back end that does not answer has lost its connection by then.
const REST: Duration = Duration::from_secs(3);
const DEVICES_REST: Duration = Duration::from_secs(7);

/// Whether it was done, or why not.
pub(crate) type Done = Result<(), String>;
type Answer = oneshot::Sender<Done>;

/// Asks a machine to rest, to reboot or to end; any thread may hold one.
#[derive(Clone)]
pub struct Remote {
    requests: Sender<Request>,
}

/// What a machine can be asked for.
#[derive(Debug)]
pub(super) enum Request {
    Pause(Answer),
    Resume(Answer),
    Reset(Answer),
    /// Within a time, or the configured one.
    Shutdown(Option<Duration>, Answer),
    Kill(Answer),
}

impl Remote {
    pub(super) fn new(requests: Sender<Request>) -> Self {
        Self { requests }
    }

    fn ask(&self, request: impl FnOnce(Answer) -> Request) -> oneshot::Receiver<Done> {
        let (answer, answered) = oneshot::channel();
        // A machine that ended needs no more; whoever waits hears that.
        let _ = self.requests.send(request(answer));
        answered
    }

    /// Presses the power button; if the guest is not off within the configured time, the machine ends all the same.
    pub fn shutdown(&self) {
        drop(self.shutdown_within(None));
    }

    /// Ends the machine at once.
    pub fn kill(&self) {
        drop(self.end());
    }

    pub(crate) fn shutdown_within(&self, time: Option<Duration>) -> oneshot::Receiver<Done> {
        self.ask(|answer| Request::Shutdown(time, answer))
    }

    pub(crate) fn end(&self) -> oneshot::Receiver<Done> {
        self.ask(Request::Kill)
    }

    pub(crate) fn pause(&self) -> oneshot::Receiver<Done> {
        self.ask(Request::Pause)
    }

    pub(crate) fn resume(&self) -> oneshot::Receiver<Done> {
        self.ask(Request::Resume)
    }

    pub(crate) fn reset(&self) -> oneshot::Receiver<Done> {
        self.ask(Request::Reset)
    }
}

/// Whoever asked may not listen any more.
fn answer(to: Answer, done: Done) {
    let _ = to.send(done);
}

impl Machine {
    pub(super) fn wait_for_end(&self) -> Ended {
        let mut deadline: Option<Instant> = None;
        // At rest, the guest's clock stands still.
        let mut clock: Option<kvm_clock_data> = None;
        let mut paused = false;
        loop {
            let timeout = match deadline {
                Some(at) => crossbeam::channel::after(at.saturating_duration_since(Instant::now())),
                None => crossbeam::channel::never(),
            };
            crossbeam::select! {
                recv(self.events) -> event => return match event {
                    Ok(Event::PowerOff) => Ended::PowerOff,
                    // Asked to shut down, it is not to start again.
                    Ok(Event::Reset) if deadline.is_some() => Ended::Stopped,
                    Ok(Event::Reset) => Ended::Reset,
                    Ok(Event::Panicked) => Ended::Panicked,
                    Ok(Event::TripleFault { vcpu }) => Ended::TripleFault { vcpu },
                    Ok(Event::Kvm { vcpu, what }) => Ended::Failed { vcpu, what },
                    Ok(Event::Escape) | Err(_) => Ended::Stopped,
                },
                recv(self.requests) -> request => match request {
                    Ok(Request::Pause(to)) if paused => answer(to, Err("the machine is paused already".to_owned())),
                    Ok(Request::Pause(to)) => {
                        let done = self.pause(&mut clock);
                        paused = done.is_ok();
                        if paused {
                            self.life.becomes(MachineState::Paused, EventKind::Paused);
                        }
                        answer(to, done);
                    }
                    Ok(Request::Resume(to)) if !paused => answer(to, Err("the machine is not paused".to_owned())),
                    Ok(Request::Resume(to)) => {
                        paused = false;
                        self.resume(clock.take());
                        let state = if deadline.is_some() { MachineState::ShuttingDown } else { MachineState::Running };
                        self.life.becomes(state, EventKind::Resumed);
                        answer(to, Ok(()));
                    }
                    Ok(Request::Reset(to)) => {
                        self.life.becomes(MachineState::Restarting, EventKind::Reset);
                        answer(to, Ok(()));
                        return Ended::Reset;
                    }
                    Ok(Request::Shutdown(time, to)) => {
                        if std::mem::take(&mut paused) {
                            self.resume(clock.take());
                        }
                        let time = time.unwrap_or(self.shutdown_timeout);
                        tracing::info!("pressing the power button, waiting {time:?}");
                        let _ = self.interrupts.pulse(layout::EVENT_IRQ);
                        deadline = deadline.or(Instant::now().checked_add(time));
                        self.life.becomes(MachineState::ShuttingDown, EventKind::PowerButton);
                        answer(to, Ok(()));
                    }
                    Ok(Request::Kill(to)) => {
                        answer(to, Ok(()));
                        return Ended::Stopped;
                    }
                    Err(_) => return Ended::Stopped,
                },
                recv(timeout) -> _ => {
                    tracing::warn!("the guest is not off in time: ending it");
                    return Ended::Stopped;
                }
            }
        }
    }

    /// vCPUs first: then nobody gives devices anything new to do.
    fn pause(&self, clock: &mut Option<kvm_clock_data>) -> Done {
        let vcpus: Vec<&dyn Lifecycle> = self.vcpus.iter().map(|vcpu| vcpu as &dyn Lifecycle).collect();
        let late = |part: String| format!("{part} does not come to rest; the machine goes on");
        lifecycle::rest(&vcpus, REST).map_err(late)?;
        *clock = self.vm.get_clock().ok();
        let devices = self.devices.as_ref().map_or_else(Vec::new, |devices| devices.parts());
        lifecycle::rest(&devices, DEVICES_REST).map_err(|part| {
            self.resume(clock.take());
            late(part)
        })
    }

    /// In the other order.
    fn resume(&self, clock: Option<kvm_clock_data>) {
        self.devices.iter().flat_map(|devices| devices.parts()).for_each(|part| part.resume());
        if let Some(was) = clock {
            // Without flags: as it was, not as it would be by now.
            let clock = kvm_clock_data { clock: was.clock, ..Default::default() };
            if let Err(error) = self.vm.set_clock(&clock) {
                tracing::debug!("KVM here does not set the guest's clock: {error}");
            }
        }
        self.vcpus.iter().for_each(|vcpu| vcpu.resume());
    }
}

/// Says of the machine's life how this guest ended.
pub(super) fn note(life: &Arc<Life>, ended: &Ended) {
    let (state, why) = match ended {
        // A user's was said.
        Ended::Reset if life.state() == MachineState::Restarting => return,
        Ended::Reset => (MachineState::Restarting, EventKind::Reset),
        Ended::PowerOff => (MachineState::Ended, EventKind::PowerOff),
        Ended::Panicked => (MachineState::Ended, EventKind::Panicked),
        Ended::TripleFault { .. } => (MachineState::Ended, EventKind::TripleFault),
        Ended::Failed { .. } => (MachineState::Ended, EventKind::Failed),
        Ended::Stopped => (MachineState::Ended, EventKind::Killed),
    };
    life.becomes(state, why);
}
