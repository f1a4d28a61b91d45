//! The vocabulary: the keys of `[vm]` as a user writes them, the same in a file and as flags.
//!
//! Owns names, types and one-line meanings; never decides what a combination of keys means (that is `validate`).

use settings::values::{Bounded, CoreNumber, DeviceName, HardwareAddress, Memory, Name, SocketName, VfToken};
use settings::{Spanned, keys, nested, plain};

use super::MAX_VCPUS;
use super::values::{
    CommandLine, DisabledExit, DiskAio, DiskFormat, FileName, Function, IrqChipName, NetKind, NetMode,
    OnReboot, PageSize, SeccompName, Serial, SerialName,
};

plain!(
    CommandLine,
    DisabledExit,
    DiskAio,
    DiskFormat,
    FileName,
    Function,
    IrqChipName,
    NetKind,
    NetMode,
    OnReboot,
    PageSize,
    SeccompName,
    Serial,
    SerialName
);

/// Some vCPUs, or parts of their topology.
pub(super) type VcpuCount = Bounded<1, { MAX_VCPUS as i64 }>;

keys! {
    /// `[vm]`.
    VmKeys in "[vm]" {
        /// What it is called in logs and commands.
        name: Name,
        /// The kernel, an ELF with a PVH entry or a bzImage.
        kernel: FileName,
        /// Firmware to start with instead of a kernel.
        firmware: FileName,
        /// The initial file system.
        initramfs: FileName,
        /// The kernel's command line.
        cmdline: CommandLine,
        /// How much memory.
        memory: Memory,
        /// What the memory is made of.
        pages: PageSize,
        /// The host's memory node that it lies on.
        node: Bounded<0, 1_023>,
        /// Whether it is locked in memory.
        lock_memory: bool,
        /// Whether all of it is there from the start.
        prefault: bool,
        /// The guest's memory nodes.
        numa: Vec<Spanned<NumaKeys>>,
        /// How many vCPUs.
        vcpus: VcpuCount,
        /// How the guest sees them.
        topology: TopologyKeys,
        /// The host's core of each vCPU.
        vcpu_cores: Vec<Spanned<CoreNumber>>,
        /// SCHED_FIFO priority of the vCPUs.
        vcpu_priority: Bounded<1, 98>,
        /// The host's cores of every other thread.
        emulator_cores: Vec<Spanned<CoreNumber>>,
        /// What the guest does without leaving the guest.
        disable_exits: Vec<Spanned<DisabledExit>>,
        /// Microseconds that KVM polls before it puts a halted vCPU to sleep.
        halt_poll_us: Bounded<0, 1_000_000>,
        /// Whether the guest is told that its vCPUs have their cores to themselves.
        hint_dedicated: bool,
        /// Where the I/O APIC is.
        irqchip: IrqChipName,
        /// Whether the guest has performance counters.
        pmu: bool,
        /// Network cards.
        net: Vec<Spanned<NetKeys>>,
        /// Disks.
        disk: Vec<Spanned<DiskKeys>>,
        /// Functions of the host's that the guest gets.
        pci: Vec<Spanned<PciKeys>>,
        /// Where the serial console goes.
        serial: SerialName,
        /// Where the virtio console goes.
        console: SerialName,
        /// Whether the guest has a source of randomness.
        rng: bool,
        /// What a reset by the guest does.
        on_reboot: OnReboot,
        /// Seconds that a guest may take to shut down when asked.
        shutdown_timeout: Bounded<0, 86_400>,
        /// What a system call does that a kind of thread has no use for.
        seccomp: SeccompName,
        /// Whether the process is held to its own files.
        confine_files: bool,
    }
}

/// A vCPU's number, and how far a node is.
pub(super) type VcpuNumber = Bounded<0, { MAX_VCPUS as i64 - 1 }>;
pub(super) type Distance = Bounded<10, 254>;

keys! {
    /// One of `numa`: `[[vm.numa]]`.
    NumaKeys in "`numa`" {
        /// How much memory.
        memory: Memory,
        /// The vCPUs that are near it.
        vcpus: Vec<Spanned<VcpuNumber>>,
        /// The host's memory node that it lies on.
        node: Bounded<0, 1_023>,
        /// How far each node is, itself included.
        distances: Vec<Spanned<Distance>>,
        /// Whether the PCI devices are near it.
        devices: bool,
    }
}

keys! {
    /// `topology = { … }`.
    TopologyKeys in "`topology`" {
        /// Sockets.
        sockets: VcpuCount,
        /// Cores of a socket.
        cores: VcpuCount,
        /// Threads of a core.
        threads: Bounded<1, 8>,
    }
}

keys! {
    /// One of `net`: `[[vm.net]]`.
    NetKeys in "`net`" {
        /// What is behind it.
        kind: NetKind,
        /// What it is called in logs.
        name: Name,
        /// The tap interface.
        device: DeviceName,
        /// The back end's UNIX socket.
        socket: SocketName,
        /// Whether we connect to it or listen on it.
        mode: NetMode,
        /// The card's address.
        mac: HardwareAddress,
        /// How many queue pairs.
        queues: Bounded<1, 128>,
        /// Entries of each queue.
        queue_size: Bounded<16, 4_096>,
        /// The largest layer-3 packet, told to the guest.
        mtu: Bounded<68, 65_535>,
        /// Whether packed rings are offered.
        packed: bool,
        /// Whether the guest starts only when the back end is there.
        wait: bool,
    }
}

keys! {
    /// One of `disk`: `[[vm.disk]]`.
    DiskKeys in "`disk`" {
        /// What its image is.
        format: DiskFormat,
        /// What it is called in logs.
        name: Name,
        /// The image, or a block device.
        path: FileName,
        /// Whether the guest may only read it.
        read_only: bool,
        /// Whether reads and writes pass by the host's page cache.
        direct: bool,
        /// What the guest sees as its serial number.
        serial: Serial,
        /// Whether the guest may give back what it does not need any more.
        discard: bool,
        /// How reads and writes are done.
        aio: DiskAio,
        /// How many queues.
        queues: Bounded<1, 64>,
        /// How many threads work on them.
        iothreads: Bounded<1, 64>,
        /// The host's cores of these threads.
        iothread_cores: Vec<Spanned<CoreNumber>>,
        /// Entries of each queue.
        queue_size: Bounded<16, 1_024>,
    }
}

keys! {
    /// One of `pci`: `[[vm.pci]]`.
    PciKeys in "`pci`" {
        /// Which function.
        device: Function,
        /// The token of the physical function's user, for a virtual one.
        vf_token: VfToken,
    }
}

nested!(DiskKeys, NetKeys, NumaKeys, PciKeys, TopologyKeys);

/// All keys of the vocabulary: (table, key). Documentation and the flags are checked against it.
pub fn vocabulary() -> Vec<(&'static str, &'static str)> {
    let of = |table: &'static str, keys: &'static [&'static str]| keys.iter().map(move |key| (table, *key));
    let parts = of("topology", TopologyKeys::KEYS)
        .chain(of("numa", NumaKeys::KEYS))
        .chain(of("net", NetKeys::KEYS))
        .chain(of("disk", DiskKeys::KEYS))
        .chain(of("pci", PciKeys::KEYS));
    of("vm", VmKeys::KEYS).chain(parts).collect()
}
