//! What the `vhost` crate calls for each message that it knows: takes the message apart and asks the [`Session`].

use std::fs::File;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::memory::{MAX_REGIONS, Wanted};
use super::refusal::Refusal;
use super::rings::Addresses;
use super::session::Session;

impl Session {
    /// Keeps the reason of a refusal for the log; the crate only needs to know that there was one.
    fn tell<T>(&mut self, result: std::result::Result<T, Refusal>) -> Result<T> {
        result.map_err(|refusal| {
            self.refused = Some(refusal);
            Error::BackendInternalError
        })
    }

    fn unsupported<T>(&mut self) -> Result<T> {
        self.tell(Err(Refusal::Unsupported))
    }
}

// The crate's structures are packed: fields are copied, never borrowed.
fn wanted(region: &VhostUserMemoryRegion) -> Wanted {
    Wanted {
        guest: region.guest_phys_addr,
        size: region.memory_size,
        user: region.user_addr,
        offset: region.mmap_offset,
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered_features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let result = Session::set_features(self, features);
        self.tell(result)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let regions: Vec<_> = regions.iter().map(wanted).zip(files.into_iter().map(Into::into)).collect();
        let result = self.set_memory(regions.into_iter());
        self.tell(result.map(|()| None))
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let result = self.set_size(index, num);
        self.tell(result)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        device: u64,
        driver: u64,
        log: u64,
    ) -> Result<()> {
        let log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let result = self.set_addresses(index, Addresses { descriptors, driver, device, log });
        self.tell(result)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let result = self.set_base(index, base);
        self.tell(result)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let result = self.get_base(index);
        self.tell(result.map(|base| VhostUserVringState::new(index, base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let result = self.set_kick(index, fd.map(Into::into));
        self.tell(result)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let result = self.set_call(index, fd.map(Into::into));
        self.tell(result)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let result = self.set_err(index, fd.map(Into::into));
        self.tell(result)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(self.offered_protocol())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let result = self.set_protocol(features);
        self.tell(result)
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queue_pairs())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let result = self.set_enabled(index, u32::from(enable));
        self.tell(result)
    }

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        self.unsupported()
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        self.unsupported()
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        self.unsupported()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        self.unsupported()
    }

    fn get_inflight_fd(&mut self, want: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (want.num_queues, want.queue_size);
        let result = self.make_inflight(queues, size);
        let (bytes, file) = self.tell(result)?;
        Ok((VhostUserInflight::new(bytes, 0, queues, size), file.into()))
    }

    fn set_inflight_fd(&mut self, region: &VhostUserInflight, file: File) -> Result<()> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *region;
        let result = self.set_inflight(&file.into(), mmap_offset, mmap_size, num_queues, queue_size);
        self.tell(result)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let result = self.add_region(wanted(region), file.into());
        self.tell(result.map(|()| None))
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let result = self.remove_region(wanted(region));
        self.tell(result)
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        self.unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        self.unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        self.unsupported()
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let VhostUserLog { mmap_size, mmap_offset } = *log;
        let result = self.set_log(&file.into(), mmap_offset, mmap_size);
        self.tell(result)
    }
}
