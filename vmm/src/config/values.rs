//! The types of single values that only a virtual machine has.

use std::path::PathBuf;

use host::pci::Bdf;
use settings::{text, words};

words! {
    /// What a guest's memory is made of.
    PageSize {
        /// 2 MiB where enough are free, else 4 KiB.
        Auto = "auto",
        /// Pages of 4 KiB, which the kernel may join behind the scenes.
        Ordinary = "4K",
        /// Huge pages of 2 MiB.
        Huge2M = "2M",
        /// Huge pages of 1 GiB.
        Huge1G = "1G",
    }

    /// What a guest may do without leaving the guest, at the price of a core that never rests.
    DisabledExit {
        /// HLT: a halted vCPU keeps its core.
        Hlt = "hlt",
        /// MONITOR and MWAIT: the guest chooses idle states itself.
        Mwait = "mwait",
        /// PAUSE in spin loops.
        Pause = "pause",
        /// Reading of C-state residency counters.
        Cstate = "cstate",
    }

    /// Where the I/O APIC is; local APICs are KVM's.
    IrqChip {
        /// In KVM, too.
        Kernel = "kernel",
        /// In this process.
        Split = "split",
    }

    /// What is behind a network card.
    NetKind {
        /// A vhost-user back end.
        VhostUser = "vhost-user",
        /// A tap interface of the host.
        Tap = "tap",
    }

    /// What a disk's image is; never guessed: whoever writes its first bytes could choose it.
    DiskFormat {
        /// The disk's bytes and nothing else; a block device as well.
        Raw = "raw",
    }

    /// How a disk's reads and writes are done, in the words of QEMU.
    DiskAio {
        /// By the kernel, many at a time.
        IoUring = "io_uring",
        /// By the queue's thread, one after the other.
        Threads = "threads",
    }

    /// Which end of the socket we are.
    NetMode {
        /// We connect, again and again, to the back end.
        Client = "client",
        /// We listen; the back end connects.
        Server = "server",
    }

    /// What a system call does that a kind of thread has no use for.
    Seccomp {
        /// It ends the process.
        Kill = "kill",
        /// The kernel logs it, and it is done.
        Log = "log",
        /// It is done: no filters.
        Off = "off",
    }

    /// What a reset by the guest does.
    OnReboot {
        /// The machine starts again.
        Restart = "restart",
        /// The machine ends.
        End = "end",
    }
}

/// Where the serial console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialTo {
    /// Standard output, and input if that is a terminal or a pipe.
    Stdio,
    /// A file, written anew.
    File(PathBuf),
    /// There is none.
    Off,
}

impl std::fmt::Display for SerialTo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SerialTo::Stdio => f.write_str("standard input and output"),
            SerialTo::File(path) => write!(f, "{}", path.display()),
            SerialTo::Off => f.write_str("nowhere"),
        }
    }
}

text! {
    /// What a forbidden system call does; Cloud Hypervisor's words are known, too.
    SeccompName(Seccomp), "\"kill\", \"log\" or \"off\"", |text| match text {
        "kill" | "true" => Ok(Seccomp::Kill),
        "log" => Ok(Seccomp::Log),
        "off" | "false" => Ok(Seccomp::Off),
        _ => Err(format!("{text:?}: wanted \"kill\", \"log\" or \"off\"")),
    };

    /// Where the I/O APIC is; QEMU's word `on` for `kernel` is known, too.
    IrqChipName(IrqChip), "\"kernel\" or \"split\"", |text| match text {
        "kernel" | "on" => Ok(IrqChip::Kernel),
        "split" => Ok(IrqChip::Split),
        _ => Err(format!("{text:?}: wanted \"kernel\" or \"split\"")),
    };

    /// Where the serial console goes.
    SerialName(SerialTo), "\"stdio\", \"off\" or \"file:PATH\"", |text| match text {
        "stdio" => Ok(SerialTo::Stdio),
        "off" => Ok(SerialTo::Off),
        _ => match text.strip_prefix("file:") {
            Some(path) if !path.is_empty() => Ok(SerialTo::File(path.into())),
            _ => Err(format!("{text:?}: wanted \"stdio\", \"off\" or \"file:PATH\"")),
        },
    };

    /// A disk's serial number (virtio 1.3, 5.2.6.1).
    Serial(String), "up to 20 printable ASCII characters in quotes", |text| {
        let fits = text.len() <= 20 && text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
        fits.then(|| text.to_owned()).ok_or_else(|| format!("{text:?}: wanted up to 20 printable ASCII characters"))
    };

    /// A PCI function of the host.
    Function(Bdf), "a PCI address like \"0000:01:00.0\"", |text: &str| text.parse::<Bdf>().map_err(|error| error.to_string());

    /// The path of a file.
    FileName(PathBuf), "a path in quotes", |text| match text {
        "" => Err("the path is empty".to_owned()),
        _ if text.contains('\0') => Err(format!("{text:?}: a path holds no zero byte")),
        _ => Ok(text.into()),
    };

    /// A kernel's command line.
    CommandLine(String), "text in quotes", |text| {
        if text.contains(['\0', '\n']) {
            return Err("a command line is one line without zero bytes".to_owned());
        }
        match crate::layout::COMMAND_LINE_MAX - 1 {
            most if text.len() > most => Err(format!("{} bytes, Linux takes at most {most}", text.len())),
            _ => Ok(text.to_owned()),
        }
    };
}
