//! What a vCPU says of itself: the host's processor as far as KVM passes it on, with the guest's own topology.
//!
//! Owns the words of `cpuid`; the base is what KVM supports here, so that nothing is promised which KVM does not keep. Leaf
//! numbers: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; for 0x4000_00xx Linux, Documentation/virt/kvm/x86/cpuid.rst.

use std::arch::x86_64::__cpuid;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::config::Topology;

/// What is the same for all vCPUs of a machine.
pub(crate) struct Model {
    base: Vec<kvm_cpuid_entry2>,
    topology: Topology,
}

/// What a user may change about it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choices {
    /// The guest has performance counters.
    pub(crate) pmu: bool,
    /// The guest's vCPUs have their cores to themselves (KVM_HINTS_REALTIME).
    pub(crate) dedicated: bool,
}

impl Model {
    /// The host's processor, as far as KVM passes it on.
    pub(crate) fn of_host(
        kvm: &Kvm,
        topology: Topology,
        choices: Choices,
    ) -> Result<Self, kvm_ioctls::Error> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        let made_anew = |function| is_topology(function) || NAME.contains(&function);
        let mut base: Vec<_> =
            supported.as_slice().iter().filter(|e| !made_anew(e.function)).copied().collect();
        base.extend(name());
        for entry in &mut base {
            match entry.function {
                1 => {
                    set(&mut entry.ecx, 31, true); // a hypervisor is there
                    set(&mut entry.ecx, 24, deadline_timer);
                    if !choices.pmu {
                        set(&mut entry.ecx, 15, false); // PDCM
                    }
                }
                0xa | 0x8000_0022 if !choices.pmu => {
                    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
                }
                0x8000_0001 if !choices.pmu => {
                    [23, 24, 28].into_iter().for_each(|counters| set(&mut entry.ecx, counters, false));
                }
                0x4000_0001 => set(&mut entry.edx, 0, choices.dedicated),
                _ => {}
            }
        }
        Ok(Self { base, topology })
    }

    /// Address bits of the vCPUs (leaf 0x8000_0008); 36 where the processor does not say.
    pub(crate) fn address_bits(&self) -> u8 {
        let leaf = self.base.iter().find(|entry| entry.function == 0x8000_0008);
        leaf.map_or(36, |leaf| (leaf.eax & 0xff) as u8)
    }

    /// Everything that the vCPU number `n` says.
    pub(crate) fn of_vcpu(&self, n: u32) -> Result<CpuId, vmm_sys_util::fam::Error> {
        let topology = &self.topology;
        let id = topology.apic_id(n);
        let per_socket = topology.cores * topology.threads;
        let (thread_bits, core_bits) = topology.apic_bits();
        let mut entries = self.base.clone();
        for entry in &mut entries {
            match entry.function {
                1 => {
                    entry.ebx = entry.ebx & 0x0000_ffff | (per_socket.min(255)) << 16 | id << 24;
                    set(&mut entry.edx, 28, per_socket > 1);
                }
                // Deterministic caches: who shares each (EAX 25:14), cores of a package (31:26, Intel only).
                4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                    let level = entry.eax >> 5 & 7;
                    let sharing = if level >= 3 { per_socket } else { topology.threads };
                    entry.eax = entry.eax & 0x0000_3fff | ((sharing - 1) & 0xfff) << 14;
                    if entry.function == 4 {
                        entry.eax |= ((topology.cores - 1) & 0x3f) << 26;
                    }
                }
                0x8000_0008 => {
                    entry.ecx =
                        entry.ecx & !0xf0ff | ((per_socket - 1) & 0xff) | (thread_bits + core_bits) << 12;
                }
                0x8000_001e => {
                    let (core, socket) = (id >> thread_bits, id >> (thread_bits + core_bits));
                    entry.eax = id;
                    entry.ebx = core & 0xff | (topology.threads - 1) << 8;
                    entry.ecx = socket & 0xff;
                }
                _ => {}
            }
        }
        // Extended topology: threads of a core (type 1), cores of a package (type 2), the end.
        let highest = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
        for function in [0xb, 0x1f].into_iter().filter(|function| *function <= highest) {
            let levels =
                [(thread_bits, topology.threads, 1), (thread_bits + core_bits, per_socket, 2), (0, 0, 0)];
            for (index, (shift, count, kind)) in (0..).zip(levels) {
                entries.push(kvm_cpuid_entry2 {
                    function,
                    index,
                    flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    eax: shift,
                    ebx: count,
                    ecx: index | kind << 8,
                    edx: id,
                    ..Default::default()
                });
            }
        }
        CpuId::from_entries(&entries)
    }
}

/// Leaves with the processor's name, which KVM leaves to us: a guest that has none shows numbers instead.
const NAME: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;

/// The host's processor's name, if it has one.
fn name() -> Vec<kvm_cpuid_entry2> {
    if __cpuid(0x8000_0000).eax < *NAME.end() {
        return Vec::new();
    }
    let leaf = |function| {
        let words = __cpuid(function);
        let (eax, ebx, ecx, edx) = (words.eax, words.ebx, words.ecx, words.edx);
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    };
    NAME.map(leaf).collect()
}

/// Leaves that describe the host's topology and are made anew for the guest.
fn is_topology(function: u32) -> bool {
    matches!(function, 0xb | 0x1f | 0x8000_0026)
}

fn set(word: &mut u32, bit: u32, value: bool) {
    *word = *word & !(1 << bit) | u32::from(value) << bit;
}

impl Topology {
    /// Bits of an APIC identifier that number threads of a core, and cores of a socket.
    pub(crate) fn apic_bits(&self) -> (u32, u32) {
        let bits = |count: u32| count.next_power_of_two().trailing_zeros();
        (bits(self.threads), bits(self.cores))
    }

    /// The APIC identifier of vCPU number `n`: socket, core and thread, each in its own bits (Intel SDM volume 3, 9.9).
    pub(crate) fn apic_id(&self, n: u32) -> u32 {
        let (thread_bits, core_bits) = self.apic_bits();
        let (thread, core) = (n % self.threads, n / self.threads % self.cores);
        let socket = n / (self.threads * self.cores);
        socket << (thread_bits + core_bits) | core << thread_bits | thread
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(topology: Topology) -> Model {
        let leaf = |function, index, eax| kvm_cpuid_entry2 { function, index, eax, ..Default::default() };
        let base =
            vec![leaf(0, 0, 0x1f), leaf(1, 0, 0), leaf(4, 3, 0xfc00_4163), leaf(0x8000_0008, 0, 0x3027)];
        Model { base, topology }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| (e.function, e.index) == (function, index)).unwrap()
    }

    #[test]
    fn identifiers_keep_sockets_cores_and_threads_in_bits_of_their_own() {
        let topology = Topology { sockets: 2, cores: 3, threads: 2 };
        let ids: Vec<_> = (0..topology.vcpus()).map(|n| topology.apic_id(n)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
    }

    #[test]
    fn a_guest_is_told_the_name_of_the_hosts_processor_once() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("skipped: no /dev/kvm");
            return;
        };
        let topology = Topology { sockets: 1, cores: 1, threads: 1 };
        let model = Model::of_host(&kvm, topology, Choices { pmu: true, dedicated: false }).unwrap();
        let cpuid = model.of_vcpu(0).unwrap();
        let leaves = cpuid.as_slice().iter().filter(|entry| NAME.contains(&entry.function));
        let words = leaves.flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
        let told: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        let told = String::from_utf8_lossy(&told).trim_matches(['\0', ' ']).to_owned();
        // As Linux tells it here: `model name : AMD EPYC Processor`.
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let here =
            cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).unwrap().1;
        assert_eq!(told.split_whitespace().collect::<Vec<_>>(), here.split_whitespace().collect::<Vec<_>>());
    }

    #[test]
    fn every_way_of_asking_for_the_topology_gives_the_same_one() {
        let model = model(Topology { sockets: 2, cores: 2, threads: 2 });
        assert_eq!(model.address_bits(), 39);
        let cpuid = model.of_vcpu(5).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ebx >> 16, 5 << 8 | 4);
        assert_eq!(find(&cpuid, 4, 3).eax >> 26, 1, "two cores");
        assert_eq!(find(&cpuid, 4, 3).eax >> 14 & 0xfff, 3, "whose four threads share the last cache");
        for function in [0xb, 0x1f] {
            let levels: Vec<_> = (0..3).map(|level| find(&cpuid, function, level)).collect();
            let seen: Vec<_> = levels.iter().map(|l| (l.eax, l.ebx, l.ecx >> 8, l.edx)).collect();
            assert_eq!(seen, [(1, 2, 1, 5), (2, 4, 2, 5), (0, 0, 0, 5)]);
        }
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 2 << 12 | 3);
    }
}
