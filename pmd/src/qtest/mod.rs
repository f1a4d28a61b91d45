//! QEMU's device models as devices for drivers, without a guest: for tests, and for who writes a driver.
//!
//! ```text
//!   driver ── Function ── qtest socket ──► QEMU: configuration space, registers
//!      │                                     │
//!      ├── Arena ─────── memory file ────────┤   DMA: both map it (a memory module above 4 GiB)
//!      └── Wire ──────── datagrams ──────────┘   frames, from outside
//! ```
//!
//! [`Machine::start`] runs `qemu-system-x86_64` with one device behind a PCI Express root port and no guest at all: its
//! processor halts at its first instruction. [`Machine::function`] is the device, ready for a driver; [`Machine::space`] is
//! where its memory is mapped; [`Wire`] is what its network socket is connected to; [`Machine::set_link`] and
//! [`Machine::remove`] are faults. [`Machine::start_with_tap`] is for devices with several queues, which that socket has not. A register costs 50 µs to read and 2.4 µs to write (writes are not waited for): let the
//! data path read none.
//!
//! QEMU's models are not the hardware: they never reorder, never lose a write, and check little of what a driver does wrong.

mod function;
mod functions;
mod protocol;
mod qmp;
mod tap;
mod vectors;
mod wire;

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use host::memory::{Pages, SharedMemory};

use crate::access::{IovaSpace, MapError};
use protocol::{Qtest, Width};
use qmp::Qmp;

pub use function::{Function, Window};
pub use tap::Tap;
pub use wire::Wire;

/// How long QEMU may take to start, and to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the configuration space of bus 0 begins (PCIEXBAR is set to it).
const ECAM: u64 = 0xb000_0000;

/// Where BARs are put: below 4 GiB, above all memory of the machine.
const BARS: u64 = 0xe000_0000;

/// The root port's place on bus 0; the device is function 0 of bus 1.
const ROOT_PORT: u64 = 4;

/// A QEMU that models a device. Ends with its owner.
pub struct Machine {
    shared: Arc<Shared>,
    function: Arc<Function>,
    wire: Option<Wire>,
    process: Child,
    _folder: tempfile::TempDir,
}

/// What the machine, its function and its memory use together.
struct Shared {
    qtest: Mutex<Qtest>,
    qmp: Mutex<Qmp>,
    modules: Mutex<u32>,
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum MachineError {
    #[error("cannot start qemu-system-x86_64: {0}; it is in Debian's package qemu-system-x86")]
    Start(io::Error),
    #[error("{doing}: {source}")]
    Io { doing: &'static str, source: io::Error },
    #[error("QEMU ended at its start: {0}")]
    Ended(String),
    #[error("QEMU refused {command}: {reason}")]
    Refused { command: String, reason: String },
    #[error("the device has no virtual functions (SR-IOV)")]
    NoFunctions,
    #[error("QEMU's connection broke while {0}")]
    Broken(&'static str),
    #[error("no PCI function behind the root port: is {0} a PCI Express device?")]
    NoDevice(String),
}

fn io_error(doing: &'static str) -> impl Fn(io::Error) -> MachineError {
    move |source| MachineError::Io { doing, source }
}

impl Machine {
    /// Starts a machine with `device` (as for QEMU's `-device`, e.g. `e1000e,mac=52:54:00:00:00:01`) and a wire to it.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub fn start(device: &str) -> Result<Self, MachineError> {
        let folder = folder()?;
        let (host, qemu) = (folder.path().join("host"), folder.path().join("qemu"));
        let wire = Wire::new(&host, &qemu)?;
        let (host, qemu) = (host.display(), qemu.display());
        let netdev =
            format!("dgram,id=wire,local.type=unix,local.path={qemu},remote.type=unix,remote.path={host}");
        let mut machine = Self::launch(device, &["-netdev", &netdev], folder)?;
        machine.wire = Some(wire);
        Ok(machine)
    }

    /// The same with an interface of this host for a wire, which has `queues` queues: for devices with several. Takes root.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub fn start_with_tap(device: &str, queues: u16) -> Result<(Self, Tap), MachineError> {
        let name = Tap::name();
        let netdev = format!("tap,id=wire,ifname={name},script=no,downscript=no,queues={queues}");
        let machine = Self::launch(device, &["-netdev", &netdev], folder()?)?;
        Ok((machine, Tap::new(&name)?))
    }

    /// The same for a virtio-net device whose rings are served by the vhost-user back end that listens at `socket`, which then reads and
    /// writes the driver's memory by itself.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub fn start_with_back_end(device: &str, socket: &Path) -> Result<Self, MachineError> {
        let chardev = format!("socket,id=back,path={}", socket.display());
        Self::launch(device, &["-chardev", &chardev, "-netdev", "vhost-user,id=wire,chardev=back"], folder()?)
    }

    /// Starts a machine with `device` on what `wire` makes.
    fn launch(device: &str, wire: &[&str], folder: tempfile::TempDir) -> Result<Self, MachineError> {
        let at = |name: &str| folder.path().join(name);
        let path = |name: &str| at(name).display().to_string();
        fs::write(at("bios"), halting_bios()).map_err(io_error("cannot write a BIOS"))?;
        let errors = fs::File::create(at("errors")).map_err(io_error("cannot make a log for QEMU"))?;

        let mut process = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-no-user-config", "-accel", "tcg", "-M", "q35"])
            // Native hot-plug: whoever speaks for the guest answers at the root port, without ACPI.
            .args(["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"])
            .args(["-m", "64M,slots=8,maxmem=64G", "-bios", &path("bios")])
            .args([
                "-qtest",
                &format!("unix:{},server=on,wait=off", path("qtest")),
                "-qtest-log",
                "/dev/null",
            ])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp"))])
            .args(wire)
            .args([
                "-device",
                &format!("pcie-root-port,id=root,bus=pcie.0,addr={ROOT_PORT},chassis=1,slot=1"),
            ])
            .args(["-device", &format!("{device},id=nic,netdev=wire,bus=root")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .map_err(MachineError::Start)?;

        let sockets = (|| {
            let begin = Instant::now();
            loop {
                if let Some(status) = process.try_wait().map_err(io_error("cannot wait for QEMU"))? {
                    let said = fs::read_to_string(at("errors")).unwrap_or_default();
                    return Err(MachineError::Ended(format!("{status}: {}", said.trim())));
                }
                match Qtest::connect(&at("qtest")).and_then(|qtest| Ok((qtest, Qmp::connect(&at("qmp"))?))) {
                    Ok(sockets) => return Ok(sockets),
                    Err(e) if begin.elapsed() > PATIENCE => {
                        return Err(MachineError::Io { doing: "cannot connect to QEMU", source: e });
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        })();
        let (qtest, qmp) = match sockets {
            Ok(sockets) => sockets,
            Err(e) => {
                end(&mut process);
                return Err(e);
            }
        };
        let shared =
            Arc::new(Shared { qtest: Mutex::new(qtest), qmp: Mutex::new(qmp), modules: Mutex::new(0) });
        let function = Function::find(&shared, device);
        match function {
            Ok(function) => {
                Ok(Self { shared, function: Arc::new(function), wire: None, process, _folder: folder })
            }
            Err(e) => {
                end(&mut process);
                Err(e)
            }
        }
    }

    /// The device.
    pub fn function(&self) -> Arc<Function> {
        self.function.clone()
    }

    /// Turns on `count` virtual functions of the device, and finds them. Once, and before a driver takes the device.
    ///
    /// # Errors
    /// It has none.
    pub fn virtual_functions(&self, count: u16) -> Result<Vec<Arc<Function>>, MachineError> {
        functions::enable(&self.shared, count)
    }

    /// Where the device finds memory.
    pub fn space(&self) -> Arc<dyn IovaSpace> {
        self.shared.clone()
    }

    /// The other end of its network cable, once; none of a machine that was started with a tap.
    pub fn wire(&mut self) -> Option<Wire> {
        self.wire.take()
    }

    /// Pulls the cable out, or plugs it in.
    ///
    /// # Errors
    /// QEMU refuses, or is gone.
    pub fn set_link(&self, up: bool) -> Result<(), MachineError> {
        self.shared.qmp().run("set_link", &serde_json::json!({ "name": "nic", "up": up })).map(drop)
    }

    /// Takes the device out of the running machine: its registers read as all ones from now on.
    ///
    /// # Errors
    /// QEMU refuses, or is gone.
    pub fn remove(&self) -> Result<(), MachineError> {
        self.shared.qmp().run("device_del", &serde_json::json!({ "id": "nic" }))?;
        // The guest's part: power off the slot, as a driver of hot-plug does when the attention button was pressed.
        self.function.power_off_slot();
        self.shared.qmp().wait_for("DEVICE_DELETED")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

/// For a machine's sockets.
fn folder() -> Result<tempfile::TempDir, MachineError> {
    tempfile::tempdir().map_err(io_error("cannot make a folder for QEMU's sockets"))
}

/// Ends QEMU. It has nothing to save.
fn end(process: &mut Child) {
    let _ = process.kill();
    let _ = process.wait();
}

impl Shared {
    fn qtest(&self) -> MutexGuard<'_, Qtest> {
        self.qtest.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn qmp(&self) -> MutexGuard<'_, Qmp> {
        self.qmp.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn read(&self, address: u64, width: Width) -> u64 {
        self.qtest().read(address, width)
    }

    fn write(&self, address: u64, width: Width, value: u64) {
        self.qtest().write(address, width, value);
    }
}

/// Each arena is a memory module that is plugged into the machine. It stays there until the machine ends: a module only comes
/// out if a guest lets go of it.
impl IovaSpace for Shared {
    fn map(&self, memory: &SharedMemory) -> Result<u64, MapError> {
        let failed = |reason: String| MapError { len: memory.len(), reason };
        let mut modules = self.modules.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (backend, module) = (format!("m{modules}"), format!("d{modules}"));
        let align = if memory.pages() == Pages::Ordinary { 0 } else { memory.pages().size() };
        // QEMU opens the same file that this process has.
        let path = format!("/proc/{}/fd/{}", std::process::id(), memory.file().as_raw_fd());
        let mut object = serde_json::json!({
            "qom-type": "memory-backend-file", "id": backend, "size": memory.len(), "mem-path": path, "share": true,
        });
        if let (Some(object), true) = (object.as_object_mut(), align > 0) {
            object.insert("align".into(), align.into());
        }
        let mut qmp = self.qmp();
        qmp.run("object-add", &object).map_err(|e| failed(e.to_string()))?;
        let plugged = qmp
            .run("device_add", &serde_json::json!({ "driver": "pc-dimm", "id": module, "memdev": backend }));
        plugged.map_err(|e| failed(e.to_string()))?;
        *modules += 1;
        let all =
            qmp.run("query-memory-devices", &serde_json::json!({})).map_err(|e| failed(e.to_string()))?;
        let data = all.as_array().into_iter().flatten().filter_map(|d| d.get("data"));
        let ours = data.filter(|d| d.get("id").and_then(|id| id.as_str()) == Some(&module));
        let address = ours.filter_map(|d| d.get("addr").and_then(serde_json::Value::as_u64)).next();
        address.ok_or_else(|| failed("QEMU does not tell its address".into()))
    }

    fn unmap(&self, _: u64, _: usize) {}
}

/// 64 KiB of which the processor runs four bytes, at the reset vector: `cli; hlt; jmp` back (Intel SDM 3A, 11.1.4).
fn halting_bios() -> Vec<u8> {
    let mut bios = vec![0x90; 64 << 10];
    let reset = bios.len() - 16;
    bios.splice(reset..reset + 4, [0xfa, 0xf4, 0xeb, 0xfd]);
    bios
}
