//! An 82576 and its virtual functions, both driven by us: what they say to each other, what frames go where, and one that is hostile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use pmd::access::{Bar, PciDevice};
use pmd::dma::{Arena, ArenaOptions};
use pmd::igb::{Igb, Settings};
use pmd::igbvf::Igbvf;
use pmd::nic::{DeviceError, Filter, Mac, Nic, Opened, Options, ReceiveQueue, TransmitQueue};
use pmd::qtest::{Function, Machine, Wire};
use port::{BurstBuffer, DropReason, Offload, RxQueue, Scratch, TagEdit};

use crate::frames::{PATIENCE, Pattern, Source, gather, next, until};

const OWN: Mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const FIRST: Mac = [0x16, 0x54, 0, 0x12, 0x34, 0x56];
const STRANGER: Mac = [2, 0, 0, 0, 0, 9];

/// The machine, and the adapter with somebody who keeps house for it.
struct Adapter {
    nic: Arc<Mutex<Igb<Function>>>,
    receive: <Igb<Function> as Nic>::Receive,
    transmit: <Igb<Function> as Nic>::Transmit,
    functions: Vec<Arc<Function>>,
    arena: Arc<Arena>,
    wire: Wire,
    end: Arc<AtomicBool>,
    keeper: Option<JoinHandle<()>>,
    machine: Machine,
}

impl Adapter {
    fn with(functions: u16) -> Self {
        let mut machine = Machine::start("igb,mac=52:54:00:12:34:56").unwrap();
        let wire = machine.wire().unwrap();
        let functions = machine.virtual_functions(functions).unwrap();
        let arena = Arena::new(ArenaOptions::default(), machine.space()).unwrap();
        let options = Options { mtu: 9000, ..Options::default() };
        let mut opened = Igb::open(machine.function(), &arena, options).unwrap();
        opened.nic.wait_for_link(PATIENCE).unwrap();
        let (receive, transmit) = (opened.receive.pop().unwrap(), opened.transmit.pop().unwrap());
        let nic = Arc::new(Mutex::new(opened.nic));
        let end = Arc::new(AtomicBool::new(false));
        let keeper = std::thread::spawn({
            let (nic, end) = (nic.clone(), end.clone());
            move || {
                while !end.load(Ordering::Relaxed) {
                    nic.lock().unwrap().link().unwrap();
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        });
        Self { nic, receive, transmit, functions, arena, wire, end, keeper: Some(keeper), machine }
    }

    fn nic(&self) -> MutexGuard<'_, Igb<Function>> {
        self.nic.lock().unwrap()
    }

    fn open(&self, number: usize) -> Result<Opened<Igbvf<Function>>, DeviceError> {
        let options = Options { mtu: 9000, ..Options::default() };
        Igbvf::open(self.functions[number].clone(), &self.arena, options)
    }

    /// Opens it, with a link.
    fn opened(&self, number: usize) -> Opened<Igbvf<Function>> {
        let mut function = self.open(number).unwrap();
        function.nic.wait_for_link(PATIENCE).unwrap();
        function
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let ended = self.keeper.take().unwrap().join();
        assert!(std::thread::panicking() || ended.is_ok(), "the adapter is kept to the end");
    }
}

/// Frame `number` of any size, to `to`.
fn frame(pattern: &Pattern, number: u64, to: Mac) -> Vec<u8> {
    let mut frame = Vec::new();
    pattern.write(number, 60 + (number * 97 % 8900) as usize, &mut frame);
    frame[..6].copy_from_slice(&to);
    frame
}

fn send(queue: &mut impl TransmitQueue, frame: &[u8], edit: TagEdit) {
    let mut source = Source { frames: vec![(frame.to_vec(), Offload::NONE)] };
    let mut buffer = BurstBuffer::default();
    let burst = source.poll(&mut buffer);
    queue.send(&burst, burst.all(), edit, &mut Scratch::default());
    drop(burst);
    queue.notify();
}

/// Everything that is in the ring now.
fn drain(queue: &mut impl ReceiveQueue) -> Vec<Vec<u8>> {
    let mut buffer = BurstBuffer::default();
    let mut all = Vec::new();
    loop {
        let burst = queue.poll(&mut buffer);
        if burst.is_empty() {
            return all;
        }
        for frame in burst.frames() {
            let mut bytes = Vec::new();
            gather(&burst, frame, &mut bytes);
            all.push(bytes);
        }
    }
}

/// The next frames that come in, of which there are `n`.
fn receive(queue: &mut impl ReceiveQueue, n: usize) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    until("frames come in", || {
        all.extend(drain(queue));
        all.len() >= n
    });
    all
}

#[test]
#[ignore = "needs QEMU: ./check nic"]
fn a_virtual_function_gets_what_its_adapter_grants_and_no_more() {
    let adapter = Adapter::with(2);
    let mut function = adapter.opened(0);
    assert_eq!(function.nic.mac(), FIRST);
    let state = |number: usize| adapter.nic().virtual_functions()[number].clone();
    assert!(state(0).active && !state(1).active);
    assert_eq!(state(0).longest, 9022);

    // Not trusted: its address stays, groups by name are granted, all are not.
    assert!(matches!(function.nic.set_mac(STRANGER), Err(DeviceError::Refused(_))));
    let groups =
        Filter { multicast: vec![[1, 0, 0x5e, 0, 0, 5], [1, 0, 0x5e, 0, 0, 6]], ..Filter::default() };
    function.nic.set_filter(&groups).unwrap();
    let all = Filter { all_multicast: true, ..Filter::default() };
    assert!(matches!(function.nic.set_filter(&all), Err(DeviceError::Refused(_))));

    // Trusted from now on, with an address of its own: its driver has to begin anew, and is told why.
    let settings = Settings { mac: Some([2, 0, 0, 0, 0, 1]), trusted: true, ..Settings::default() };
    adapter.nic().set_virtual_function(0, settings).unwrap();
    until("the function's driver is told", || function.nic.link().is_err());
    assert!(function.nic.link().unwrap_err().to_string().contains("has changed what it may; open it again"));
    drop(function);
    until("that it ended is seen", || !state(0).active);
    let mut function = adapter.opened(0);
    assert_eq!(function.nic.mac(), [2, 0, 0, 0, 0, 1]);
    function.nic.set_filter(&all).unwrap();
    function.nic.set_mac(STRANGER).unwrap();
    assert_eq!(state(0).mac, STRANGER);
    for taken in [OWN, state(1).mac, [1, 0, 0, 0, 0, 1], [0; 6]] {
        assert!(matches!(function.nic.set_mac(taken), Err(DeviceError::Refused(_))), "{taken:x?}");
    }
    assert!(function.nic.link().is_ok(), "refusals change nothing else");
    let refused = [
        (2, Settings::default()),
        (1, Settings { mac: Some(STRANGER), ..Settings::default() }),
        (1, Settings { vlan: Some(0), ..Settings::default() }),
    ];
    for (number, settings) in refused {
        assert!(adapter.nic().set_virtual_function(number, settings).is_err());
    }
}

#[test]
#[ignore = "needs QEMU: ./check nic"]
fn frames_of_all_sizes_go_both_ways_through_a_virtual_function_and_between_it_and_its_adapter() {
    let mut adapter = Adapter::with(1);
    let mut function = adapter.opened(0);
    let (mut into, mut out) = (function.receive.remove(0), function.transmit.remove(0));
    let pattern = Pattern::new();
    let (mut got, mut sent, total) = (0, 0, 20_000u64);
    // Few are under way at a time: a full ring drops.
    while got < total {
        while sent < total.min(got + 20) {
            adapter.wire.send(&frame(&pattern, sent, FIRST)).unwrap();
            send(&mut out, &frame(&pattern, sent, STRANGER), TagEdit::Keep);
            let mut left = Vec::new();
            next(&adapter.wire, &mut left);
            assert!(left == frame(&pattern, sent, STRANGER), "frame {sent} leaves");
            sent += 1;
        }
        for bytes in receive(&mut into, 1) {
            assert!(bytes == frame(&pattern, got, FIRST), "frame {got} comes in");
            got += 1;
        }
    }
    let (counters, sent) = (into.counters(), out.counters());
    assert_eq!((counters.frames.get(), counters.drops.sum()), (total, 0));
    assert_eq!((sent.sent.get(), sent.drops.sum()), (total, 0));
    let hardware = function.nic.statistics();
    let counted = |name| hardware.iter().find(|(n, _)| *n == name).unwrap().1;
    assert_eq!((counted("received"), counted("sent")), (total, total));

    // What is for nobody else is the adapter's; and the two reach each other without the wire.
    drain(&mut adapter.receive);
    adapter.wire.send(&frame(&pattern, 1, STRANGER)).unwrap();
    assert_eq!(receive(&mut adapter.receive, 1), [frame(&pattern, 1, STRANGER)]);
    send(&mut adapter.transmit, &frame(&pattern, 2, FIRST), TagEdit::Keep);
    assert_eq!(receive(&mut into, 1), [frame(&pattern, 2, FIRST)]);
    send(&mut out, &frame(&pattern, 3, OWN), TagEdit::Keep);
    assert_eq!(receive(&mut adapter.receive, 1), [frame(&pattern, 3, OWN)]);
}

#[test]
#[ignore = "needs QEMU: ./check nic"]
fn a_link_that_goes_is_the_functions_too_and_their_drivers_are_told() {
    let adapter = Adapter::with(2);
    let mut function = adapter.opened(0);
    let (mut into, mut out) = (function.receive.remove(0), function.transmit.remove(0));
    // Its driver never looks: what it is told lies in its mailbox (registers V2PMAILBOX.PFSTS and VMBMEM).
    let _other = adapter.opened(1);
    let mailbox = adapter.functions[1].bar(0, 16 << 10).unwrap();
    let told = || mailbox.read32(0xc40) >> 4 & 1 == 1 && mailbox.read32(0x800) == 0x2000_0100;
    let pattern = Pattern::new();
    for round in 0..2 {
        adapter.machine.set_link(false).unwrap();
        until("the function's link goes", || !function.nic.link().unwrap().up);
        until("the other one is told", told);
        let before = out.counters().drops.get(DropReason::PortDown);
        send(&mut out, &frame(&pattern, 1, STRANGER), TagEdit::Keep);
        assert_eq!(out.counters().drops.get(DropReason::PortDown), before + 1, "round {round}");
        adapter.machine.set_link(true).unwrap();
        until("the function's link comes back", || function.nic.link().unwrap().up);
        until("the other one is told", told);
        send(&mut out, &frame(&pattern, 2, STRANGER), TagEdit::Keep);
        let mut left = Vec::new();
        next(&adapter.wire, &mut left);
        assert_eq!(left, frame(&pattern, 2, STRANGER));
        drain(&mut into);
        adapter.wire.send(&frame(&pattern, 3, FIRST)).unwrap();
        assert_eq!(receive(&mut into, 1), [frame(&pattern, 3, FIRST)]);
    }
}

#[test]
#[ignore = "needs QEMU: ./check nic"]
fn a_virtual_function_is_kept_in_its_vlan_and_does_not_see_the_tag() {
    let adapter = Adapter::with(2);
    adapter.nic().set_virtual_function(0, Settings { vlan: Some(0x6064), ..Settings::default() }).unwrap();
    let mut function = adapter.opened(0);
    let (mut into, mut out) = (function.receive.remove(0), function.transmit.remove(0));
    let pattern = Pattern::new();
    let tagged = |frame: &[u8], tag: [u8; 2]| [&frame[..12], &[0x81, 0], &tag, &frame[12..]].concat();
    send(&mut out, &frame(&pattern, 1, STRANGER), TagEdit::Keep);
    let mut left = Vec::new();
    next(&adapter.wire, &mut left);
    assert_eq!(left, tagged(&frame(&pattern, 1, STRANGER), [0x60, 0x64]));
    // Another VLAN's and untagged ones do not come in; its own does, last.
    adapter.wire.send(&tagged(&frame(&pattern, 2, FIRST), [0, 0xc8])).unwrap();
    adapter.wire.send(&frame(&pattern, 3, FIRST)).unwrap();
    adapter.wire.send(&tagged(&frame(&pattern, 4, FIRST), [0, 0x64])).unwrap();
    assert_eq!(receive(&mut into, 1), [frame(&pattern, 4, FIRST)]);
}

#[test]
#[ignore = "needs QEMU: ./check nic"]
fn a_virtual_function_whose_adapter_has_no_driver_says_so() {
    let machine = Machine::start("igb").unwrap();
    let functions = machine.virtual_functions(1).unwrap();
    let arena = Arena::new(ArenaOptions::default(), machine.space()).unwrap();
    let error = Igbvf::open(functions[0].clone(), &arena, Options::default()).err().unwrap().to_string();
    assert!(error.starts_with("V2PMAILBOX.RSTI: wanted 0x0, read 0x40 for 300ms; nobody drives"), "{error}");
}

/// Ten thousand requests of any contents in a second, and locks that are never given back.
#[test]
#[ignore = "needs QEMU: ./check nic"]
fn a_hostile_virtual_function_changes_only_itself() {
    let adapter = Adapter::with(3);
    let mut function = adapter.opened(0);
    let (mut into, mut out) = (function.receive.remove(0), function.transmit.remove(0));
    let before = adapter.nic().virtual_functions().to_vec();
    let registers = adapter_registers(&adapter);
    let pattern = Pattern::new();
    std::thread::scope(|scope| {
        let bar = adapter.functions[1].bar(0, 0x4000).unwrap();
        let hostile = scope.spawn(move || {
            let mut x = 0x2545_f491_4f6c_dd1du64;
            let mut random = || {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                (x >> 16) as u32
            };
            for round in 0..10_000 {
                for word in 0..3 {
                    bar.write32(0x800 + 4 * word, random());
                }
                // Mostly kinds that mean something, and now and then a reset, without which nothing is granted.
                let first = if round % 16 == 0 { 1 } else { (random() & 0xff_0000) | (random() % 8) };
                bar.write32(0x800, first);
                // Request, acknowledge, and now and then a lock that is never given back.
                bar.write32(0xC40, 1 | random() & 2 | if random() % 4 == 0 { 4 } else { 0 });
                if round % 100 == 0 {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        });
        // Meanwhile the others go about their business.
        let mut number = 0;
        while !hostile.is_finished() || number < 500 {
            adapter.wire.send(&frame(&pattern, number, FIRST)).unwrap();
            assert!(receive(&mut into, 1) == [frame(&pattern, number, FIRST)], "frame {number} comes in");
            send(&mut out, &frame(&pattern, number, STRANGER), TagEdit::Keep);
            let mut left = Vec::new();
            next(&adapter.wire, &mut left);
            assert!(left == frame(&pattern, number, STRANGER), "frame {number} leaves");
            if number % 100 == 0 {
                let multicast = vec![[1, 0, 0x5e, 0, 0, 5]];
                function.nic.set_filter(&Filter { multicast, ..Filter::default() }).unwrap();
            }
            number += 1;
        }
        hostile.join().unwrap();
    });
    // A driver that behaves can have it afterwards.
    drop(adapter.opened(1));
    let after = adapter.nic().virtual_functions().to_vec();
    let known = |n: usize| (before[n].mac, before[n].settings, before[n].longest, before[n].vlans.clone());
    for (n, now) in after.iter().enumerate() {
        if n == 1 {
            assert!(now.granted > 0 && now.refused > 0, "it was heard: {now:?}");
            assert_eq!((now.mac, now.settings), (before[1].mac, before[1].settings));
            continue;
        }
        assert_eq!((now.mac, now.settings, now.longest, now.vlans.clone()), known(n), "function {n}");
    }
    assert_eq!(adapter_registers(&adapter), registers);
    assert!(function.nic.link().is_ok() && adapter.nic().link().is_ok());
}

/// What function 1 must not change: addresses of the others, their pools, what their frames must be, and whether they are on.
fn adapter_registers(adapter: &Adapter) -> Vec<u32> {
    let bar = adapter.machine.function().bar(0, 0x20000).unwrap();
    let whole =
        [0x5400, 0x5404, 0x54E0, 0x54E4, 0x54F0, 0x54F4, 0x3700, 0x3708, 0x5AD8, 0x5ADC, 0x581C, 0x5818];
    let mut values: Vec<u32> = whole.into_iter().map(|at| bar.read32(at)).collect();
    // A bit for each pool, or two.
    values.extend([0xC8C, 0xC90].map(|at| bar.read32(at) & !2));
    values.push(bar.read32(0x3500) & !0x202);
    values
}
