//! A virtual machine from its first page to its end.
//!
//! Owns the order in which a machine is put together and taken apart, and what its end means. Everything it consists of has a
//! file of its own; nothing here knows a register or a table.

mod asked;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam::channel::{Receiver, bounded, unbounded};
use host::thread::{PinError, RealTimeError};
use host::topology::CoreSet;
use kvm_bindings::{
    KVM_CAP_HALT_POLL, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_DISABLE_EXITS, KVM_PMU_CAP_DISABLE, kvm_enable_cap,
};
use kvm_ioctls::{Cap, VmFd};

use crate::boot::BootError;
use crate::config::{Config, NetBack, SerialTo};
use crate::console::Console;
use crate::control::report::Port;
use crate::device::serial::SerialPort;
use crate::device::{Devices, lock};
use crate::disk::image::Image;
use crate::disk::{Disk, DiskError};
use crate::interrupts::Interrupts;
use crate::life::{Life, Parts};
use crate::memory::{GuestMemory, GuestMemoryError};
use crate::net::tap::TapCard;
use crate::net::{Net, NetError};
use crate::pci::PciBus;
use crate::preflight::{Preflight, PreflightError, bit};
use crate::rng::Rng;
use crate::sandbox::SandboxError;
use crate::vcpu::cpuid::{Choices, Model};
use crate::vcpu::exits::{ExitCounters, ExitReason};
use crate::vcpu::{RunningVcpu, Scheduling, Vcpu, registers, stop_all};
use crate::virtio_console::{Typed, VirtioConsole};
use crate::virtio_pci::{BAR_SIZE, VirtioDevice, VirtioPci};
use crate::{acpi, layout, vfio};
pub(crate) use asked::Done;
pub use asked::Remote;
use asked::Request;

/// Why a machine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Somebody asked for its end meanwhile.
    #[error("the machine was told to end before its guest began")]
    Ended,
    /// Something was seen to be wrong before anything was taken.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] GuestMemoryError),
    /// Its kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// KVM refuses a step.
    #[error("KVM cannot {doing}: {source}")]
    Kvm {
        /// What.
        doing: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// A network card.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A function to pass through.
    #[error(transparent)]
    Pass(#[from] vfio::PassError),
    /// The serial console cannot be opened.
    #[error(transparent)]
    Console(std::io::Error),
    /// No more eventfds or interrupts.
    #[error("cannot make a PCI function: {0}")]
    Device(std::io::Error),
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// A thread cannot be confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A thread cannot be pinned.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A thread cannot be real time.
    #[error(transparent)]
    RealTime(#[from] RealTimeError),
}

/// Something that concerns the whole machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The guest turned itself off.
    PowerOff,
    /// The guest wants to start again.
    Reset,
    /// The guest says that it panicked.
    Panicked,
    /// A vCPU cannot go on.
    TripleFault { vcpu: u32 },
    /// KVM cannot go on.
    Kvm { vcpu: u32, what: String },
    /// The user ended the machine from its console.
    Escape,
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The guest turned itself off.
    PowerOff,
    /// The guest wants to start again: build another machine.
    Reset,
    /// The guest's kernel panicked, and said so.
    Panicked,
    /// A vCPU met a fault while it handled a fault while it handled a fault.
    TripleFault {
        /// Which.
        vcpu: u32,
    },
    /// KVM cannot run it any further.
    Failed {
        /// Which vCPU met it.
        vcpu: u32,
        /// What KVM says.
        what: String,
    },
    /// We were told to end it.
    Stopped,
}

/// A machine that runs.
pub struct Machine {
    // In this order they are dropped: vCPUs, what they reach, the machine, its memory.
    vcpus: Vec<RunningVcpu>,
    devices: Option<Arc<Devices>>,
    life: Arc<Life>,
    consoles: Vec<Console>,
    interrupts: Arc<Interrupts>,
    vm: Arc<VmFd>,
    _memory: Arc<GuestMemory>,
    events: Receiver<Event>,
    requests: Receiver<Request>,
    remote: Remote,
    shutdown_timeout: Duration,
}

impl Machine {
    /// Builds the machine and starts its vCPUs; until it ends, `life` has its parts. All its other threads run where the calling thread may.
    ///
    /// # Errors
    /// What could not be had; nothing is left behind.
    pub fn start(config: &Config, preflight: &Preflight, life: &Arc<Life>) -> Result<Self, StartError> {
        let kvm = |doing| move |source| StartError::Kvm { doing, source };
        let go_on = || if life.is_ending() { Err(StartError::Ended) } else { Ok(()) };
        go_on()?;
        for exit in preflight.refused_exits() {
            tracing::warn!("`disable_exits`: KVM here does not let {} go without an exit", exit.word());
        }
        let memory = Arc::new(GuestMemory::new(config)?);
        go_on()?;
        let vm = Arc::new(preflight.kvm.create_vm().map_err(kvm("create a machine"))?);
        prepare(&vm, config, preflight)?;
        let interrupts = Interrupts::new(vm.clone(), config.irqchip);
        let interrupts = Arc::new(interrupts.map_err(kvm("create interrupt controllers"))?);
        memory.attach(&vm)?;

        let choices = Choices { pmu: config.pmu, dedicated: config.hint_dedicated };
        let model = Model::of_host(&preflight.kvm, config.topology, choices)
            .map_err(kvm("say what its vCPUs can do"))?;
        let entry = preflight.kernel.load(&memory, preflight.initramfs.as_ref(), &config.cmdline)?;
        registers::write_descriptors(&memory, entry)?;
        let numbers = 0..config.topology.vcpus();
        let serial = config.serial != SerialTo::Off;
        let tables = acpi::Machine {
            apic_ids: numbers.clone().map(|n| config.topology.apic_id(n)).collect(),
            address_bits: model.address_bits(),
            serial,
            nodes: if config.numa { config.nodes.clone() } else { Vec::new() },
            lines: (1..=config.pci.len()).map(|device| (device as u32, vfio::line_of(device))).collect(),
        };
        acpi::write(&memory, &tables)?;

        let (event_sender, events) = unbounded();
        let (request_sender, requests) = unbounded();
        let mut consoles = Vec::new();
        let virtio = match life.sink(Port::Virtio).map_err(StartError::Console)? {
            Some(sink) => {
                let (console, output) = Console::new(sink, &life.console).map_err(StartError::Console)?;
                let (device, typed) = VirtioConsole::new(output, &memory)?;
                consoles.push((console, &config.console, Take::Virtio(Arc::new(typed))));
                Some(device)
            }
            None => None,
        };
        // It may be waited for a back end: before a terminal passes every key on, so that Ctrl-C still ends it.
        let bus = bus(config, &preflight.disks, virtio, &interrupts, &memory, model.address_bits(), life)?;
        let port = match life.sink(Port::Serial).map_err(StartError::Console)? {
            Some(sink) => {
                let (console, output) = Console::new(sink, &life.serial).map_err(StartError::Console)?;
                let port = Arc::new(Mutex::new(SerialPort::new(interrupts.clone(), output)));
                consoles.push((console, &config.serial, Take::Serial(port.clone())));
                Some(port)
            }
            None => None,
        };
        let listen = |(mut console, to, take): (Console, &SerialTo, Take)| {
            if *to == SerialTo::Stdio {
                console.listen(move |bytes| take.bytes(bytes), event_sender.clone())?;
            }
            Ok(console)
        };
        let take = |of: &SerialTo| {
            let found = consoles.iter().find(|(_, to, _)| std::ptr::eq(*to, of));
            found.map(|(.., take)| take.clone())
        };
        let (serial_take, console_take) = (take(&config.serial), take(&config.console));
        let consoles: io::Result<Vec<_>> = consoles.into_iter().map(listen).collect();
        let consoles = consoles.map_err(StartError::Console)?;
        let devices = Arc::new(Devices::new(port, bus, interrupts.clone()));

        let mut machine = Self {
            vcpus: Vec::new(),
            devices: Some(devices.clone()),
            life: life.clone(),
            consoles,
            interrupts,
            vm,
            _memory: memory,
            events,
            requests,
            remote: Remote::new(request_sender),
            shutdown_timeout: config.shutdown_timeout,
        };
        // Every vCPU exists before the first one runs: the first one looks for the others. `gate` is closed by its drop.
        let (gate, closed) = bounded::<()>(0);
        for number in numbers {
            let fd = machine.vm.create_vcpu(config.topology.apic_id(number).into());
            let fd = fd.map_err(kvm("create a vCPU"))?;
            let cpuid = model.of_vcpu(number).map_err(|_| StartError::Kvm {
                doing: "describe a vCPU",
                source: kvm_ioctls::Error::new(libc::E2BIG),
            })?;
            fd.set_cpuid2(&cpuid).map_err(kvm("describe a vCPU"))?;
            registers::set_model_specific(&fd).map_err(kvm("set a vCPU's registers"))?;
            if number == 0 {
                registers::set_entry(&fd, entry).map_err(kvm("set a vCPU's registers"))?;
            }
            let core = config.vcpu_cores.as_ref().and_then(|cores| cores.get(number as usize).copied());
            let scheduling = Scheduling { core, priority: config.vcpu_priority };
            let enters_kvm = number == 0 && preflight.kvm.check_extension(Cap::ImmediateExit);
            let vcpu =
                Vcpu { number, fd, devices: devices.clone(), events: event_sender.clone(), enters_kvm };
            machine.vcpus.push(vcpu.start(scheduling, closed.clone())?);
        }
        let runs = life.runs(Parts {
            remote: machine.remote(),
            vcpus: machine.vcpus.iter().map(|vcpu| vcpu.place().clone()).collect(),
            devices,
            serial: serial_take,
            console: console_take,
        });
        if !runs {
            // While `gate` is closed: none of them enters the guest.
            machine.vcpus.iter().for_each(RunningVcpu::tell);
            return Err(StartError::Ended);
        }
        drop(gate);
        Ok(machine)
    }

    /// What others ask this machine with.
    pub fn remote(&self) -> Remote {
        self.remote.clone()
    }

    /// Exits of all vCPUs by reason, those that happened.
    pub fn exits(&self) -> Vec<(ExitReason, u64)> {
        let counters: Vec<&Arc<ExitCounters>> = self.vcpus.iter().map(RunningVcpu::exits).collect();
        let sum = |reason| counters.iter().map(|of| of.get(reason)).sum::<u64>();
        ExitReason::ALL.iter().map(|reason| (*reason, sum(*reason))).filter(|(_, count)| *count > 0).collect()
    }

    /// Waits until the machine ends, and stops its vCPUs.
    pub fn wait(&mut self) -> Ended {
        let ended = self.wait_for_end();
        asked::note(&self.life, &ended);
        stop_all(&mut self.vcpus);
        ended
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.life.ends();
        stop_all(&mut self.vcpus);
        self.vcpus.clear();
        // With the devices goes the serial port, and with it the console's queue.
        self.devices = None;
        self.consoles.drain(..).for_each(Console::close);
    }
}

/// Confines the calling thread, and all that it starts from then on, to `emulator_cores`. For a process's first thread, before
/// it starts others, and after [`Preflight::new`]: a confined thread sees no other cores.
///
/// # Errors
/// It may not run there.
pub fn become_emulator(config: &Config) -> Result<(), StartError> {
    match &config.emulator_cores {
        Some(cores) => Ok(host::thread::confine(&CoreSet::from_iter(cores.iter().copied()))?),
        None => Ok(()),
    }
}

/// What takes what is typed.
#[derive(Clone)]
pub(crate) enum Take {
    Serial(Arc<Mutex<SerialPort>>),
    Virtio(Arc<Typed>),
}

impl Take {
    /// Returns how many bytes it took.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> usize {
        match self {
            Take::Serial(port) => lock(port).receive(bytes),
            Take::Virtio(typed) => typed.receive(bytes),
        }
    }
}

/// The PCI bus with all functions, their BARs side by side from the start of the window.
fn bus(
    config: &Config,
    disks: &[Arc<Image>],
    console: Option<VirtioConsole>,
    interrupts: &Arc<Interrupts>,
    memory: &Arc<GuestMemory>,
    address_bits: u8,
    life: &Life,
) -> Result<PciBus, StartError> {
    let mut bus = PciBus::new();
    // Before a back end is waited for: what is refused is refused at once.
    let own = u64::from(BAR_SIZE) * PciBus::PLACES;
    let window = layout::PCI_WINDOW_32.start + own..layout::PCI_WINDOW_32.end;
    let windows = vfio::Windows::new(window, layout::pci_window_64(memory.len(), address_bits));
    vfio::open(&config.pci, windows, memory, interrupts)?.into_iter().for_each(|function| bus.add(function));
    let for_rings = memory.for_rings().map_err(GuestMemoryError::from)?;
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for card in &config.net {
        devices.push(match &card.back {
            NetBack::VhostUser(back) => {
                Box::new(Net::new(card, back, memory.clone(), life.events().clone(), life.ending())?)
            }
            NetBack::Tap(interface) => Box::new(TapCard::new(card, interface, &for_rings)?),
        });
    }
    for (disk, image) in config.disk.iter().zip(disks) {
        devices.push(Box::new(Disk::new(disk, image.clone(), &for_rings)?));
    }
    if let Some(console) = console {
        devices.push(Box::new(console));
    }
    if config.rng {
        devices.push(Box::new(Rng::new(&for_rings).map_err(StartError::Device)?));
    }
    for (n, device) in (0..).zip(devices) {
        let bar = layout::PCI_WINDOW_32.start as u32 + n * BAR_SIZE;
        let function = VirtioPci::new(device, bar, memory.clone(), interrupts.clone());
        bus.add(Arc::new(function.map_err(StartError::Device)?));
    }
    Ok(bus)
}

/// What has to be said before the first vCPU exists.
fn prepare(vm: &VmFd, config: &Config, preflight: &Preflight) -> Result<(), StartError> {
    let kvm = |doing| move |source| StartError::Kvm { doing, source };
    let enable = |cap: u32, argument: u64| {
        let cap = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() };
        vm.enable_cap(&cap)
    };
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(kvm("place its identity map"))?;
    vm.set_tss_address(layout::KVM_TSS).map_err(kvm("place its task segment"))?;
    let exits = config.disable_exits.iter().filter(|exit| !preflight.refused_exits().contains(exit));
    let exits = exits.fold(0, |bits, exit| bits | bit(*exit));
    if exits != 0 {
        enable(KVM_CAP_X86_DISABLE_EXITS, exits.into()).map_err(kvm("disable exits"))?;
    }
    if let Some(poll) = config.halt_poll {
        let nanoseconds = u64::try_from(poll.as_nanos()).unwrap_or(u64::MAX);
        enable(KVM_CAP_HALT_POLL, nanoseconds).map_err(kvm("set `halt_poll_us`"))?;
    }
    // A kernel that cannot leave them out altogether still has them left out of cpuid.
    if !config.pmu && enable(KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE.into()).is_err() {
        tracing::debug!("KVM here cannot disable performance counters; the guest is not told of them");
    }
    Ok(())
}
