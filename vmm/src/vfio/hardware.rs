//! A real device behind [`Hardware`]: one that VFIO opened.

use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use host::vfio::{Device, Interrupt};
use kvm_bindings::KVM_DEV_VFIO_FILE_DEL;

use super::{Extent, Hardware, Shared, Window};

/// An open function, and what all functions of the machine share.
pub(super) struct Real {
    pub(super) device: Arc<Device>,
    pub(super) shared: Arc<Shared>,
}

impl Drop for Real {
    fn drop(&mut self) {
        // KVM would keep it open, and who wants it back wait for that.
        if let Some(file) = self.device.itself() {
            let _ = self.shared.kvm.change(KVM_DEV_VFIO_FILE_DEL, file);
        }
    }
}

impl Hardware for Real {
    fn name(&self) -> String {
        self.device.bdf().to_string()
    }

    fn config_len(&self) -> usize {
        usize::try_from(self.device.config_len()).unwrap_or(0)
    }

    fn config_read(&self, at: u16, data: &mut [u8]) {
        self.device.config_read_bytes(at, data);
    }

    fn config_write(&self, at: u16, data: &[u8]) {
        self.device.config_write_bytes(at, data);
    }

    fn region(&self, index: u32) -> Extent {
        let region = self.device.region(index);
        region.map_or_else(Extent::default, |r| Extent { len: r.len, mappable: r.mappable.clone() })
    }

    fn map(&self, index: u32, part: Range<u64>) -> Option<Window> {
        let region = match self.device.map_part(index, part.clone()) {
            Ok(region) => region,
            Err(error) => {
                tracing::info!("{error}; accesses to {part:#x?} leave the guest");
                return None;
            }
        };
        Some(Window { start: region.start().as_ptr().addr() as u64, _owner: Box::new(region) })
    }

    fn read(&self, index: u32, offset: u64, data: &mut [u8]) {
        self.device.region_read(index, offset, data);
    }

    fn write(&self, index: u32, offset: u64, data: &[u8]) {
        self.device.region_write(index, offset, data);
    }

    fn has_line(&self) -> bool {
        self.device.interrupts(Interrupt::Line) > 0
    }

    fn interrupts_grow(&self, kind: Interrupt) -> bool {
        self.device.interrupts_grow(kind)
    }

    fn signal(&self, kind: Interrupt, first: u32, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.device.signal(kind, first, events)
    }

    fn unmask_by(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        self.device.unmask_by(event)
    }

    fn must_go(&self) -> Option<&'static str> {
        self.device.must_go()
    }

    fn alarms(&self) -> Vec<OwnedFd> {
        self.device.alarms().filter_map(|alarm| alarm.try_clone_to_owned().ok()).collect()
    }
}
