//! One vCPU: its state at the start, its thread, and what happens when it leaves the guest.
//!
//! Owns the thread and the exit loop. Hands every access to [`Devices`]; never knows what a device does, never decides what
//! an end means: it reports it and stops.

pub(crate) mod cpuid;
pub(crate) mod exits;
pub(crate) mod registers;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Sender, bounded};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::device::{Devices, Outcome};
use crate::lifecycle::Lifecycle;
use crate::machine::{Event, StartError};
use crate::sandbox::{self, ThreadKind};
use exits::{ExitCounters, ExitReason};

/// Calls a vCPU out of the guest; its handler does nothing.
fn kick() -> i32 {
    SIGRTMIN()
}

/// Where and how a vCPU's thread runs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Scheduling {
    pub(crate) core: Option<u32>,
    pub(crate) priority: Option<u8>,
}

/// What a vCPU's thread is to do.
const RUN: u8 = 0;
const REST: u8 = 1;
const STOP: u8 = 2;

/// What passes between a vCPU's thread and the others.
#[derive(Default)]
struct Orders {
    order: AtomicU8,
    /// It is out of the guest, and stays.
    rests: AtomicBool,
}

/// Where a vCPU is, and what it does.
#[derive(Clone)]
pub(crate) struct VcpuPlace {
    pub(crate) number: u32,
    pub(crate) thread: i32,
    pub(crate) scheduling: Scheduling,
    pub(crate) exits: Arc<ExitCounters>,
}

/// A vCPU that runs.
pub(crate) struct RunningVcpu {
    thread: Option<JoinHandle<()>>,
    orders: Arc<Orders>,
    place: VcpuPlace,
}

/// A vCPU that is ready to run.
pub(crate) struct Vcpu {
    pub(crate) number: u32,
    pub(crate) fd: VcpuFd,
    pub(crate) devices: Arc<Devices>,
    pub(crate) events: Sender<Event>,
    /// It is the first to enter KVM, which can be entered without the guest (KVM_CAP_IMMEDIATE_EXIT).
    pub(crate) enters_kvm: bool,
}

/// Whether the loop goes on.
enum Next {
    Again,
    Report(Event),
}

impl Vcpu {
    /// Starts the thread, pins it and makes it real time as asked; then it waits at `gate` until that is closed, so that
    /// no guest runs before all its threads are where they belong.
    ///
    /// # Errors
    /// The thread may not be where it is to be.
    pub(crate) fn start(
        mut self,
        scheduling: Scheduling,
        gate: crossbeam::channel::Receiver<()>,
    ) -> Result<RunningVcpu, StartError> {
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(kick(), nothing).map_err(|error| StartError::Thread(error.into()))?;
        let orders = Arc::new(Orders::default());
        let number = self.number;
        let exits = Arc::new(ExitCounters::default());
        let (ready, is_ready) = bounded(1);
        let (ordered, counters) = (orders.clone(), exits.clone());
        let thread = std::thread::Builder::new().name(format!("vcpu{}", self.number)).spawn(move || {
            if self.enters_kvm {
                self.enter_kvm();
            }
            let arranged = arrange(scheduling);
            let failed = arranged.is_err();
            if ready.send(arranged.map(|()| nix::unistd::gettid().as_raw())).is_err() || failed {
                return;
            }
            let _ = gate.recv();
            self.run(&ordered, &counters);
        });
        let thread = thread.map_err(StartError::Thread)?;
        let number_of_thread =
            is_ready.recv().unwrap_or_else(|_| Err(StartError::Thread(std::io::ErrorKind::Other.into())))?;
        let place = VcpuPlace { number, thread: number_of_thread, scheduling, exits };
        Ok(RunningVcpu { thread: Some(thread), orders, place })
    }

    /// Enters KVM and leaves it before the guest. With a machine's first vCPU KVM starts a thread of its own (Debian's Linux 6.12:
    /// kvm-nx-lpage-recovery), which inherits cores and priority of whoever enters: now still those of the emulator.
    fn enter_kvm(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        // EINTR, as it should be. Anything else is said again, and reported, when the guest is entered.
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Runs the guest until it ends or is to stop.
    fn run(mut self, orders: &Orders, counters: &ExitCounters) {
        loop {
            match orders.order.load(Ordering::Acquire) {
                STOP => return,
                REST => {
                    self.rest(orders);
                    continue;
                }
                _ => {}
            }
            if let Next::Report(event) = self.enter(counters) {
                // Nobody listens any more: the machine is being taken apart.
                let _ = self.events.send(event);
                return;
            }
        }
    }

    /// Waits until it is to do something else.
    fn rest(&self, orders: &Orders) {
        orders.rests.store(true, Ordering::Release);
        while orders.order.load(Ordering::Acquire) == REST {
            std::thread::park();
        }
        orders.rests.store(false, Ordering::Release);
        // A guest that knows why time went by does not complain of a stuck processor. One without kvm-clock has nothing to be
        // told.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Enters the guest once and handles what it leaves for.
    fn enter(&mut self, counters: &ExitCounters) -> Next {
        let number = self.number;
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                counters.count(ExitReason::Interrupted);
                return Next::Again;
            }
            Err(error) => {
                return Next::Report(Event::Kvm { vcpu: number, what: format!("KVM_RUN: {error}") });
            }
        };
        let (reason, next) = match exit {
            VcpuExit::IoIn(port, data) => {
                self.devices.port_read(port, data);
                (ExitReason::PortRead, Next::Again)
            }
            VcpuExit::IoOut(port, data) => {
                (ExitReason::PortWrite, outcome(self.devices.port_write(port, data)))
            }
            VcpuExit::MmioRead(address, data) => {
                self.devices.mmio_read(address, data);
                (ExitReason::MmioRead, Next::Again)
            }
            VcpuExit::MmioWrite(address, data) => {
                self.devices.mmio_write(address, data);
                (ExitReason::MmioWrite, Next::Again)
            }
            VcpuExit::IoapicEoi(vector) => {
                self.devices.end_of_interrupt(vector);
                (ExitReason::EndOfInterrupt, Next::Again)
            }
            VcpuExit::Hlt => (ExitReason::Halt, Next::Again),
            VcpuExit::Intr => (ExitReason::Interrupted, Next::Again),
            VcpuExit::Shutdown => (ExitReason::Shutdown, Next::Report(Event::TripleFault { vcpu: number })),
            VcpuExit::SystemEvent(kind, _) => {
                let event = match kind {
                    kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => Event::PowerOff,
                    kvm_bindings::KVM_SYSTEM_EVENT_RESET => Event::Reset,
                    kvm_bindings::KVM_SYSTEM_EVENT_CRASH => Event::Panicked,
                    other => Event::Kvm { vcpu: number, what: format!("system event {other}") },
                };
                (ExitReason::SystemEvent, Next::Report(event))
            }
            VcpuExit::FailEntry(why, _) => {
                let what = format!("the processor refuses to enter the guest (reason {why:#x})");
                (ExitReason::Other, Next::Report(Event::Kvm { vcpu: number, what }))
            }
            other => {
                let what = format!("{other:?}");
                (ExitReason::Other, Next::Report(Event::Kvm { vcpu: number, what }))
            }
        };
        counters.count(reason);
        next
    }
}

fn outcome(outcome: Outcome) -> Next {
    match outcome {
        Outcome::Done => Next::Again,
        Outcome::PowerOff => Next::Report(Event::PowerOff),
        Outcome::Reset => Next::Report(Event::Reset),
        Outcome::Panicked => Next::Report(Event::Panicked),
    }
}

/// Puts the calling thread where it belongs, and confines it.
fn arrange(scheduling: Scheduling) -> Result<(), StartError> {
    if let Some(core) = scheduling.core {
        host::thread::pin(core)?;
    }
    if let Some(priority) = scheduling.priority {
        host::thread::run_real_time(priority)?;
    }
    Ok(sandbox::apply(ThreadKind::Vcpu)?)
}

impl RunningVcpu {
    /// Its exit counters.
    pub(crate) fn exits(&self) -> &Arc<ExitCounters> {
        &self.place.exits
    }

    /// Where it is.
    pub(crate) fn place(&self) -> &VcpuPlace {
        &self.place
    }

    fn order(&self, order: u8) {
        self.orders.order.store(order, Ordering::Release);
        self.thread.iter().for_each(|thread| thread.thread().unpark());
    }

    /// Tells it to stop; it may still be in the guest.
    pub(crate) fn tell(&self) {
        self.order(STOP);
    }

    /// Waits until it is out of the guest. The signal may come just before the guest is entered, and is repeated then.
    fn wait(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        while !thread.is_finished() {
            let _ = thread.kill(kick());
            std::thread::sleep(Duration::from_micros(500));
        }
        let _ = thread.join();
    }
}

impl Lifecycle for RunningVcpu {
    fn name(&self) -> String {
        format!("vCPU {}", self.place.number)
    }

    fn pause(&self) {
        self.order(REST);
    }

    /// Calls it out of the guest, again each time: the call may come just before the guest is entered.
    fn is_paused(&self) -> bool {
        let Some(thread) = self.thread.as_ref().filter(|thread| !thread.is_finished()) else { return true };
        if self.orders.rests.load(Ordering::Acquire) {
            return true;
        }
        let _ = thread.kill(kick());
        false
    }

    fn resume(&self) {
        self.order(RUN);
    }
}

/// Ends all of them.
pub(crate) fn stop_all(vcpus: &mut [RunningVcpu]) {
    vcpus.iter().for_each(RunningVcpu::tell);
    vcpus.iter_mut().for_each(RunningVcpu::wait);
}
