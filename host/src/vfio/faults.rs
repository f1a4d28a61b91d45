//! What an IOMMU refused: VFIO tells nobody, so it is read from the kernel's log.
//!
//! Without the right to read that (CAP_SYSLOG, where kernel.dmesg_restrict is set), nothing is heard.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use crate::pci::Bdf;

/// The kernel's log, message by message (Documentation/ABI/testing/dev-kmsg).
pub const LOG: &str = "/dev/kmsg";

/// The longest message (the kernel's LOG_LINE_MAX and what it puts before and behind).
const LONGEST: usize = 8192;

/// Messages that are read at a time.
const AT_A_TIME: usize = 256;

/// Hears of faults from now on.
pub struct Faults(File);

/// A device reached for memory that is not mapped for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which one. Intel's messages name no domain: it is 0 then.
    pub bdf: Bdf,
    /// The kernel's words.
    pub text: String,
}

impl Faults {
    /// None where the log may not be read.
    pub fn listen() -> Option<Self> {
        let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(LOG).ok()?;
        log.seek(SeekFrom::End(0)).ok()?;
        Some(Self(log))
    }

    /// Those that came since this was last asked; a part of them if there are many. Never waits.
    pub fn heard(&mut self) -> Vec<Fault> {
        let mut message = [0; LONGEST];
        let mut faults = Vec::new();
        for _ in 0..AT_A_TIME {
            match self.0.read(&mut message) {
                Ok(n) => {
                    let text = String::from_utf8_lossy(message.get(..n).unwrap_or_default());
                    faults.extend(parse(&text));
                }
                // Messages were lost before they were read: the next are there.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(_) => break,
            }
        }
        faults
    }
}

/// `DMAR: [DMA Write NO_PASID] Request device [01:00.0] fault addr …` (drivers/iommu/intel/dmar.c), or
/// `… AMD-Vi: Event logged [IO_PAGE_FAULT device=0000:01:00.0 …` (drivers/iommu/amd/iommu.c; with a newer kernel the device is before that).
fn parse(record: &str) -> Option<Fault> {
    // What the kernel puts before and behind: level, number, time; further lines of properties.
    let text = record.split_once(';')?.1.lines().next()?;
    if !(text.contains("DMAR: [DMA") || text.contains("AMD-Vi: Event logged [IO_PAGE_FAULT")) {
        return None;
    }
    let words = text.split(|c: char| c.is_whitespace() || "[]=,".contains(c));
    let bdf = words.filter_map(|word| word.trim_end_matches(':').parse().ok()).next()?;
    Some(Fault { bdf, text: text.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_messages_of_faults_name_their_device_and_others_are_none() {
        let bdf = |record: &str| parse(record).map(|fault| fault.bdf.to_string());
        let intel = "3,1,2,-;DMAR: [DMA Read NO_PASID] Request device [01:00.0] fault addr 0xdead0000 [fault reason 0x06] PTE Read access is not set\n";
        assert_eq!(bdf(intel).as_deref(), Some("0000:01:00.0"));
        assert!(parse(intel).unwrap().text.ends_with("PTE Read access is not set"));
        let amd = "3,1,2,-;AMD-Vi: Event logged [IO_PAGE_FAULT device=0001:02:10.3 domain=0x0000 address=0x1000 flags=0x0000]\n";
        assert_eq!(bdf(amd).as_deref(), Some("0001:02:10.3"));
        let newer = "3,1,2,-;vfio-pci 0000:03:00.1: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x000f address=0x1000 flags=0x0]\n SUBSYSTEM=pci\n";
        assert_eq!(bdf(newer).as_deref(), Some("0000:03:00.1"));
        for other in [
            "",
            "6,1,2,-;vfio-pci 0000:01:00.0: enabling device",
            "6,1,2,-;DMAR: DRHD: handling fault status reg 2",
            intel.trim_start_matches("3,1,2,-;"),
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
