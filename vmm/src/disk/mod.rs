//! A disk: virtio-blk (virtio 1.3, 5.2) on a raw image or a block device.
//!
//! Owns what the guest's driver sees of it: size, features, limits. Requests are read and answered in [`request`], by threads of
//! the disk's; [`under_way`] is what the kernel does of them by itself, [`image`] the host's side, [`direct`] what O_DIRECT asks
//! for. No vCPU waits for a disk.
//!
//! System calls of a disk's threads, besides those of [`crate::worker`]: io_uring_enter, or without io_uring, and for what it
//! does not do: preadv, pwritev (pwrite64 for zeros where the host has no better way), fdatasync, fallocate; nanosleep. Where
//! the threads are started: io_uring_setup, io_uring_register, mmap of the rings, sched_setaffinity.

mod direct;
pub(crate) mod image;
mod request;
#[cfg(test)]
mod speed;
#[cfg(test)]
mod tests;
mod under_way;

use std::io;
use std::sync::Arc;

use virtio::features;
use virtio::memory::GuestMemory;

use crate::config::{DiskAio, DiskConfig};
use crate::control::report::QueueReport;
use crate::lifecycle::Lifecycle;
use crate::virtio_pci::{Activation, VirtioDevice};
use crate::worker::{Serve, Threads, Workers};
pub(crate) use image::DiskError;
use image::Image;
use request::{FEATURE_FLUSH, ID, Server};
use under_way::UnderWay;

/// virtio's number of a disk, and PCI's class of one (mass storage, other).
const KIND: (u16, u16) = (2, 0x0180);
/// Features (5.2.3).
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLOCK_SIZE: u64 = 1 << 6;
const FEATURE_QUEUES: u64 = 1 << 12;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;

/// Data buffers of a request: with header and status, as many as a chain has at most here.
const MOST_BUFFERS: u16 = virtio::device::MAX_CHAIN as u16 - 2;
/// Ranges of one request to discard, and sectors of a range: 32 MiB, so that writing zeros where the host has no better way
/// is soon done.
const MOST_RANGES: u32 = 16;
const MOST_SECTORS: u32 = 65_536;

/// The disk.
pub(crate) struct Disk {
    offered: u64,
    sectors: u64,
    block: u32,
    queues: u16,
    queue_size: u16,
    workers: Workers,
}

impl Disk {
    /// A disk on `image`.
    ///
    /// # Errors
    /// No more threads or descriptors.
    pub(crate) fn new(
        config: &DiskConfig,
        image: Arc<Image>,
        memory: &Arc<GuestMemory>,
    ) -> Result<Self, DiskError> {
        let discard = config.discard && !config.read_only;
        let mut offered = features::VERSION_1
            | features::RING_INDIRECT_DESC
            | features::RING_EVENT_IDX
            | FEATURE_SEG_MAX
            | FEATURE_BLOCK_SIZE
            | FEATURE_FLUSH
            | FEATURE_QUEUES;
        for (wanted, feature) in
            [(config.read_only, FEATURE_READ_ONLY), (discard, FEATURE_DISCARD | FEATURE_WRITE_ZEROES)]
        {
            offered |= if wanted { feature } else { 0 };
        }
        let serve = Self::servers(config, &image, memory);
        let cores = config.iothread_cores.as_deref().unwrap_or_default();
        let threads = Threads { count: config.iothreads.into(), cores };
        Ok(Self {
            offered,
            sectors: image.sectors(),
            block: image.block(),
            queues: config.queues,
            queue_size: config.queue_size,
            workers: Workers::on(&config.name, memory, serve, threads)?,
        })
    }

    /// What works on its queues.
    pub(crate) fn servers(
        config: &DiskConfig,
        image: &Arc<Image>,
        memory: &Arc<GuestMemory>,
    ) -> Vec<impl Serve + use<>> {
        let mut id = [0; ID];
        id.iter_mut().zip(config.serial.bytes()).for_each(|(to, from)| *to = from);
        let server = |under_way| Server {
            image: image.clone(),
            read_only: config.read_only,
            discard: config.discard && !config.read_only,
            id,
            write_through: true,
            under_way,
        };
        let mut rings = rings(config, image, memory).into_iter();
        (0..config.queues).map(|_| server(rings.next())).collect()
    }
}

/// A ring of the kernel's for each queue; none, and a word why, where it does not give any.
fn rings(config: &DiskConfig, image: &Arc<Image>, memory: &Arc<GuestMemory>) -> Vec<UnderWay> {
    if config.aio == DiskAio::Threads {
        return Vec::new();
    }
    let ring = |_| UnderWay::new(image, memory, config.queue_size);
    let rings: io::Result<Vec<_>> = (0..config.queues).map(ring).collect();
    rings.unwrap_or_else(|error| {
        tracing::warn!(
            "disk {}: no io_uring here ({error}; see /proc/sys/kernel/io_uring_disabled, and whoever confines this process): \
             each thread does one request after the other, as with `aio = \"threads\"`",
            config.name
        );
        Vec::new()
    })
}

impl VirtioDevice for Disk {
    fn kind(&self) -> (u16, u16) {
        KIND
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; self.queues.into()]
    }

    /// 5.2.4: capacity, then fields of 32 bits, but for those that say otherwise.
    fn config(&self) -> Vec<u8> {
        let buffers = u32::from(MOST_BUFFERS.min(self.queue_size.saturating_sub(2)).max(1));
        let block = self.block;
        let mut config = self.sectors.to_le_bytes().to_vec();
        let mut add = |words: &[u32]| config.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        // size_max; seg_max; geometry; blk_size; topology, two words.
        add(&[0, buffers, 0, block, 0, 0]);
        // writeback and a gap of a byte each, num_queues in the upper half.
        add(&[u32::from(self.queues) << 16]);
        // max_discard_sectors, _seg, discard_sector_alignment; the same two for zeros; that they may be freed.
        add(&[MOST_SECTORS, MOST_RANGES, block / 512, MOST_SECTORS, MOST_RANGES, 1]);
        config
    }

    fn activate(&mut self, activation: Activation) {
        self.workers.activate(activation);
    }

    fn reset(&mut self) {
        self.workers.reset();
    }

    fn lifecycle(&self) -> &dyn Lifecycle {
        &self.workers
    }

    fn queue_reports(&self) -> Vec<QueueReport> {
        self.workers.reports()
    }

    fn is_reset(&self) -> bool {
        self.workers.are_idle()
    }

    fn is_broken(&self) -> bool {
        self.workers.are_broken()
    }
}
