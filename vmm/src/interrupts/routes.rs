//! Which KVM interrupt stands for which message.
//!
//! Owns the routing table of a machine, which KVM only takes whole. A vector gets a route when the guest first unmasks it,
//! so that vectors nobody uses cost nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;

use super::{Message, PINS};
use crate::device::lock;

/// Routes that KVM takes at most (KVM_MAX_IRQ_ROUTES).
const MOST: u32 = 4096;

/// The routing table.
pub(super) struct Routes {
    vm: Arc<VmFd>,
    /// The first interrupts are the inputs of KVM's own I/O APIC.
    own_pins: bool,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    messages: BTreeMap<u32, Message>,
    given: u32,
}

impl Routes {
    pub(super) fn new(vm: Arc<VmFd>, own_pins: bool) -> Self {
        Self { vm, own_pins, table: Mutex::default() }
    }

    /// The machine that they belong to.
    pub(super) fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// A number that no input of the I/O APIC has; `None` when all are given away.
    pub(super) fn number(&self) -> Option<u32> {
        let mut table = lock(&self.table);
        let number = PINS + table.given;
        table.given += 1;
        (number < MOST).then_some(number)
    }

    /// Routes interrupt `number` to `message`.
    ///
    /// # Errors
    /// KVM does not take the message.
    pub(super) fn route(&self, number: u32, message: Message) -> Result<(), kvm_ioctls::Error> {
        self.set(number, Some(message))
    }

    /// Routes interrupt `number` to nothing.
    ///
    /// # Errors
    /// KVM does not do it.
    pub(super) fn unroute(&self, number: u32) -> Result<(), kvm_ioctls::Error> {
        self.set(number, None)
    }

    fn set(&self, number: u32, message: Option<Message>) -> Result<(), kvm_ioctls::Error> {
        let mut table = lock(&self.table);
        let put = |table: &mut Table, message| match message {
            Some(message) => table.messages.insert(number, message),
            None => table.messages.remove(&number),
        };
        let before = put(&mut table, message);
        if before == message {
            return Ok(());
        }
        let given = self.give(&table);
        if given.is_err() {
            // A message that KVM refuses must not stand in the way of others.
            put(&mut table, before);
        }
        given
    }

    fn give(&self, table: &Table) -> Result<(), kvm_ioctls::Error> {
        let mut entries: Vec<kvm_irq_routing_entry> = Vec::new();
        for pin in 0..if self.own_pins { PINS } else { 0 } {
            let mut entry =
                kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
            entry.u.irqchip.pin = pin;
            entries.push(entry);
        }
        for (gsi, message) in &table.messages {
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
