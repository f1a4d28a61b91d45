//! Real functions: registers are mapped into this process, memory is mapped by the IOMMU.
//!
//! What [`host::vfio`] opens, as drivers see it. Owns no policy of who may open what.

use std::sync::Arc;

use host::memory::SharedMemory;
use host::pci::Bdf;
use host::vfio::{Container, Device, VfioError};

use super::{AccessError, IovaSpace, MapError, Mmio, PciDevice};

/// The address space of all cards that exchange frames.
pub struct VfioSpace {
    container: Arc<Container>,
    /// As drivers compare it: always the same.
    shared: Arc<Mapper>,
}

/// A function in a [`VfioSpace`].
pub struct VfioFunction {
    device: Arc<Device>,
    space: Arc<Mapper>,
}

struct Mapper(Arc<Container>);

impl VfioSpace {
    /// An empty one.
    ///
    /// # Errors
    /// The machine has no VFIO.
    pub fn new() -> Result<Self, VfioError> {
        let container = Container::new()?;
        Ok(Self { shared: Arc::new(Mapper(container.clone())), container })
    }

    /// Opens a function, which is reset. `token`: what a virtual function needs whose physical one is with vfio-pci.
    ///
    /// # Errors
    /// It cannot be had; the message says why and what to do.
    pub fn open(&self, bdf: Bdf, token: Option<&str>) -> Result<Arc<VfioFunction>, VfioError> {
        let device = self.container.open(bdf, token)?;
        Ok(Arc::new(VfioFunction { device, space: self.shared.clone() }))
    }

    /// Where an arena is mapped for these functions. Only while one is open.
    pub fn memory(&self) -> Arc<dyn IovaSpace> {
        self.shared.clone()
    }
}

impl VfioFunction {
    /// Where it is.
    pub fn bdf(&self) -> Bdf {
        self.device.bdf()
    }

    /// The function itself: interrupts, and whether it must be closed.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl IovaSpace for Mapper {
    fn map(&self, memory: &SharedMemory) -> Result<u64, MapError> {
        let start = std::ptr::NonNull::new(memory.as_ptr());
        let start =
            start.ok_or_else(|| MapError { len: memory.len(), reason: "it is not there".to_owned() })?;
        // SAFETY: whoever maps memory unmaps it before it goes ([`IovaSpace::unmap`]; `Arena` does). `SharedMemory` never hands out
        // a reference to its bytes.
        unsafe { self.0.map(start, memory.len()) }
            .map_err(|error| MapError { len: memory.len(), reason: error.to_string() })
    }

    fn unmap(&self, iova: u64, _: usize) {
        self.0.unmap(iova);
    }
}

impl PciDevice for VfioFunction {
    type Bar = Mmio;

    fn bar(&self, index: u8, len: u32) -> Result<Mmio, AccessError> {
        let none = |reason: Option<VfioError>| {
            if let Some(reason) = reason {
                tracing::warn!("{reason}");
            }
            AccessError::NoBar { device: self.bdf().to_string(), index, len }
        };
        let region = self.device.map(index.into()).map_err(|error| none(Some(error)))?;
        // Registers beyond 4 GiB are none that a driver here knows.
        let bytes = u32::try_from(region.bytes().get()).unwrap_or(u32::MAX);
        if bytes < len {
            return Err(none(None));
        }
        let start = region.start();
        // SAFETY: the mapping lives as long as `region`, which is the owner; it begins at a page, can be read and written, and
        // nobody has references into it.
        Ok(unsafe { Mmio::new(start, bytes, Arc::new(region)) })
    }

    fn config_read(&self, offset: u16) -> u32 {
        self.device.config_read(offset)
    }

    fn config_write(&self, offset: u16, value: u32) {
        self.device.config_write(offset, value);
    }

    fn iova_space(&self) -> Arc<dyn IovaSpace> {
        self.space.clone()
    }
}
