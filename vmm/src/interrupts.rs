//! Message-signalled interrupts: which KVM interrupt stands for which message.
//!
//! Owns the routing table of a machine, which KVM only takes whole. A vector gets a route when the guest first unmasks it,
//! so that vectors nobody uses cost nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;

use crate::device::lock;

/// Inputs of the I/O APIC: interrupts below this number are its.
const IO_APIC_PINS: u32 = 24;
/// Routes that KVM takes at most (KVM_MAX_IRQ_ROUTES).
const MOST: u32 = 4096;

/// What a device writes to interrupt a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Message {
    pub(crate) address: u64,
    pub(crate) data: u32,
}

/// The routing table.
pub(crate) struct Interrupts {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    routes: BTreeMap<u32, Message>,
    given: u32,
}

impl Interrupts {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, table: Mutex::default() }
    }

    /// The machine that they belong to.
    pub(crate) fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// A number for a vector; `None` when all are given away.
    pub(crate) fn number(&self) -> Option<u32> {
        let mut table = lock(&self.table);
        let number = IO_APIC_PINS + table.given;
        table.given += 1;
        (number < MOST).then_some(number)
    }

    /// Routes interrupt `number` to `message`.
    ///
    /// # Errors
    /// KVM does not take the message.
    pub(crate) fn route(&self, number: u32, message: Message) -> Result<(), kvm_ioctls::Error> {
        let mut table = lock(&self.table);
        let before = table.routes.insert(number, message);
        if before == Some(message) {
            return Ok(());
        }
        let set = self.set(&table);
        if set.is_err() {
            // A message that KVM refuses must not stand in the way of other vectors.
            match before {
                Some(before) => table.routes.insert(number, before),
                None => table.routes.remove(&number),
            };
        }
        set
    }

    fn set(&self, table: &Table) -> Result<(), kvm_ioctls::Error> {
        let mut entries: Vec<kvm_irq_routing_entry> = Vec::new();
        for pin in 0..IO_APIC_PINS {
            let mut entry =
                kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
            entry.u.irqchip.pin = pin;
            entries.push(entry);
        }
        for (gsi, message) in &table.routes {
            let mut entry =
                kvm_irq_routing_entry { gsi: *gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            entry.u.msi.address_lo = message.address as u32;
            entry.u.msi.address_hi = (message.address >> 32) as u32;
            entry.u.msi.data = message.data;
            entries.push(entry);
        }
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        self.vm.set_gsi_routing(&table)
    }
}
