//! The DSDT: devices that a guest cannot find by itself (ACPI 6.5, chapters 19 and 20).

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed,
    Method, Name, Notify, Package, Path, ResourceTemplate, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{Machine, OEM, REVISION, SLEEP_TYPE_S5, TABLE};
use crate::layout;

/// `Notify` of a power button: pressed (5.6.6).
const PRESSED: u8 = 0x80;
/// `_STA`: present, enabled, functioning (6.3.7).
const THERE: u8 = 0xf;

/// The whole table.
pub(super) fn table(machine: &Machine, memory: u64) -> Vec<u8> {
    let mut code = Vec::new();
    sleep_states(&mut code);
    pci(machine, memory, &mut code);
    if machine.serial {
        serial(&mut code);
    }
    panic_notifier(&mut code);
    power_button(&mut code);
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    table.append_slice(&code);
    table.as_slice().to_vec()
}

/// S5, soft off, is the only sleep state.
fn sleep_states(code: &mut Vec<u8>) {
    let package = Package::new(vec![&SLEEP_TYPE_S5, &ZERO]);
    Name::new(Path::new("_S5_"), &package).to_aml_bytes(code);
}

/// The PCI host bridge with its windows (PCI firmware specification 3.3, 4.1 and 4.6).
fn pci(machine: &Machine, memory: u64, code: &mut Vec<u8>) {
    let window_32 = layout::PCI_WINDOW_32;
    let window_64 = layout::pci_window_64(memory, machine.address_bits);
    let buses = AddressSpace::new_bus_number(0_u16, (layout::PCI_BUSES - 1) as u16);
    let config_ports = IO::new(layout::PCI_ADDRESS_PORT, layout::PCI_ADDRESS_PORT, 1, 8);
    let small = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        window_32.start as u32,
        (window_32.end - 1) as u32,
        None,
    );
    let large = (!window_64.is_empty()).then(|| {
        AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            window_64.start,
            window_64.end - 1,
            None,
        )
    });
    let mut resources: Vec<&dyn Aml> = vec![&buses, &config_ports, &small];
    resources.extend(large.as_ref().map(|large| large as &dyn Aml));
    let mut names = vec![
        Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
        Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
        Name::new(Path::new("_UID"), &ZERO),
        Name::new(Path::new("_SEG"), &ZERO),
        Name::new(Path::new("_BBN"), &ZERO),
        // Caches and DMA agree, as on every PC (6.2.17).
        Name::new(Path::new("_CCA"), &1_u8),
        Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)),
    ];
    // Which memory node the devices are near (6.2.15).
    let near = machine.nodes.iter().position(|node| node.devices);
    names.extend(near.map(|node| Name::new(Path::new("_PXM"), &(node as u32))));
    if !machine.lines.is_empty() {
        names.push(lines(machine));
    }
    let names = names.iter().map(|name| name as &dyn Aml).collect();
    Device::new(Path::new("_SB_.PCI0"), names).to_aml_bytes(code);
    // Who has the ECAM range (PCI firmware specification 3.3, 4.1.2).
    let ecam =
        Memory32Fixed::new(true, layout::ECAM.start as u32, (layout::ECAM.end - layout::ECAM.start) as u32);
    Device::new(
        Path::new("_SB_.ECAM"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(Path::new("_UID"), &1_u8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ecam])),
        ],
    )
    .to_aml_bytes(code);
}

/// Where interrupt lines of PCI devices go (6.2.13): all functions of a device, pin A, an input of the I/O APIC.
fn lines(machine: &Machine) -> Name {
    let routes: Vec<[u32; 4]> =
        machine.lines.iter().map(|(device, input)| [device << 16 | 0xffff, 0, 0, *input]).collect();
    let routes: Vec<Package<'_>> = routes
        .iter()
        .map(|route| Package::new(route.iter().map(|number| number as &dyn Aml).collect()))
        .collect();
    let routes = Package::new(routes.iter().map(|route| route as &dyn Aml).collect());
    Name::new(Path::new("_PRT"), &routes)
}

/// The first serial port, a 16550A.
fn serial(code: &mut Vec<u8>) {
    let ports = IO::new(layout::SERIAL.start, layout::SERIAL.start, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, layout::SERIAL_IRQ);
    Device::new(
        Path::new("_SB_.COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(code);
}

/// Where the guest says that it panicked (QEMU, docs/specs/pvpanic.rst).
fn panic_notifier(code: &mut Vec<u8>) {
    let port = IO::new(layout::PANIC_PORT, layout::PANIC_PORT, 1, 1);
    Device::new(
        Path::new("_SB_.PEVT"),
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(Path::new("_STA"), &THERE),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&port])),
        ],
    )
    .to_aml_bytes(code);
}

/// A power button, and the event device whose interrupt says that it was pressed (4.8.3.1 and 5.6.9).
fn power_button(code: &mut Vec<u8>) {
    Device::new(
        Path::new("_SB_.PWRB"),
        vec![&Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")), &Name::new(Path::new("_UID"), &ZERO)],
    )
    .to_aml_bytes(code);
    let interrupt = Interrupt::new(true, true, false, false, layout::EVENT_IRQ);
    let event = u8::try_from(layout::EVENT_IRQ).unwrap_or_default();
    Device::new(
        Path::new("_SB_.GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![&If::new(
                    &Equal::new(&Arg(0), &event),
                    vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &PRESSED)],
                )],
            ),
        ],
    )
    .to_aml_bytes(code);
}
