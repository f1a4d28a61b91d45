use super::profile::Form;
use super::*;
use std::collections::BTreeMap;
use std::fs;

const PROFILE: &str = r#"
    about = "for tests"
    cmdline = ["isolcpus={isolated}"]
    [[knob]]
    name = "irq"
    file = "/proc/irq/*/smp_affinity_list"
    value = "{housekeeping}"
    form = "within"
    why = "w"
    source = "s"
    [[knob]]
    name = "thp"
    file = "/sys/thp"
    value = "madvise"
    form = "choice"
    why = "w"
    source = "s"
    [[knob]]
    name = "ksm"
    file = "/sys/ksm"
    value = "2"
    keep = ["0"]
    why = "w"
    source = "s"
    [[knob]]
    name = "queues"
    file = "/sys/mask"
    value = "{housekeeping:mask}"
    form = "mask"
    why = "w"
    source = "s"
    [[knob]]
    name = "none"
    file = "/sys/none"
    value = "1"
    why = "w"
    source = "s"
"#;

struct Machine(tempfile::TempDir);

impl Machine {
    fn new() -> Self {
        let machine = Self(tempfile::tempdir().unwrap());
        for (file, text) in [
            ("proc/irq/1/smp_affinity_list", "0-3\n"),
            ("proc/irq/2/smp_affinity_list", "0\n"),
            ("sys/thp", "always madvise never\n"),
            ("sys/ksm", "0\n"),
            ("sys/mask", "0000000f\n"),
        ] {
            let path = machine.0.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        machine
    }

    fn saved(&self) -> PathBuf {
        self.0.path().join("saved/tune.json")
    }

    fn holds(&self) -> BTreeMap<&'static str, String> {
        let files = [
            "proc/irq/1/smp_affinity_list",
            "proc/irq/2/smp_affinity_list",
            "sys/thp",
            "sys/ksm",
            "sys/mask",
        ];
        files
            .map(|file| (file, fs::read_to_string(self.0.path().join(file)).unwrap().trim().to_owned()))
            .into()
    }
}

fn division() -> Division {
    Division::new([2, 3].into_iter().collect(), &(0..4).collect()).unwrap()
}

#[test]
fn a_profile_is_applied_and_everything_is_given_back() {
    let (machine, profile) = (Machine::new(), Profile::parse("test", PROFILE).unwrap());
    let before = machine.holds();
    let lines = apply(machine.0.path(), &profile, &division(), &machine.saved()).unwrap();
    let effects: Vec<_> = lines.iter().map(|line| (line.knob.as_str(), &line.effect)).collect();
    use Effect::{AsWanted, Missing, Set};
    // The interrupt that stays within housekeeping is left alone; a mere file holds what was written, without the brackets of the
    // kernel's.
    assert_eq!(
        effects,
        [
            ("irq", &Set),
            ("irq", &AsWanted),
            ("thp", &Set),
            ("ksm", &AsWanted),
            ("queues", &Set),
            ("none", &Missing)
        ]
    );
    let now = machine.holds();
    assert_eq!((now["proc/irq/1/smp_affinity_list"].as_str(), now["sys/mask"].as_str()), ("0-1", "00000003"));
    // Again: nothing to do, and what was found first is what is given back.
    let again = apply(machine.0.path(), &profile, &division(), &machine.saved()).unwrap();
    assert!(again.iter().all(|line| matches!(line.effect, AsWanted | Missing)), "{again:?}");
    let other = Division::new([3].into_iter().collect(), &(0..4).collect()).unwrap();
    apply(machine.0.path(), &profile, &other, &machine.saved()).unwrap();
    let now = machine.holds();
    assert_eq!((now["proc/irq/1/smp_affinity_list"].as_str(), now["sys/mask"].as_str()), ("0-1", "00000007"));
    restore(machine.0.path(), &machine.saved()).unwrap();
    assert_eq!(machine.holds(), before);
    assert!(!machine.saved().exists());
    assert!(restore(machine.0.path(), &machine.saved()).unwrap().is_empty());
}

#[test]
fn whatever_was_done_when_it_was_killed_is_given_back() {
    let (machine, profile) = (Machine::new(), Profile::parse("test", PROFILE).unwrap());
    let before = machine.holds();
    apply(machine.0.path(), &profile, &division(), &machine.saved()).unwrap();
    // As if it had been killed between the second knob and the third.
    for file in ["sys/thp", "sys/mask"] {
        fs::write(machine.0.path().join(file), &before[file]).unwrap();
    }
    restore(machine.0.path(), &machine.saved()).unwrap();
    assert_eq!(machine.holds(), before);
}

#[test]
fn a_knob_that_is_refused_is_told_and_no_reason_to_stop() {
    let (machine, profile) = (Machine::new(), Profile::parse("test", PROFILE).unwrap());
    let irq = machine.0.path().join("proc/irq/1/smp_affinity_list");
    fs::remove_file(&irq).unwrap();
    // A folder can be neither read nor written.
    fs::create_dir(&irq).unwrap();
    let lines = apply(machine.0.path(), &profile, &division(), &machine.saved()).unwrap();
    assert!(matches!(lines[0].effect, Effect::Refused(_)), "{lines:?}");
    assert_eq!(lines[2].effect, Effect::Set);
}

#[test]
fn what_cannot_be_put_back_stays_saved_and_the_rest_is_put_back() {
    let (machine, profile) = (Machine::new(), Profile::parse("test", PROFILE).unwrap());
    apply(machine.0.path(), &profile, &division(), &machine.saved()).unwrap();
    let irq = machine.0.path().join("proc/irq/1/smp_affinity_list");
    fs::remove_file(&irq).unwrap();
    fs::create_dir(&irq).unwrap();
    let lines = restore(machine.0.path(), &machine.saved()).unwrap();
    let stuck: Vec<_> = lines.iter().filter(|line| matches!(line.effect, Effect::Refused(_))).collect();
    assert_eq!(stuck.len(), 1, "{lines:?}");
    fs::remove_dir(&irq).unwrap();
    fs::write(&irq, "0-1").unwrap();
    let lines = restore(machine.0.path(), &machine.saved()).unwrap();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(machine.holds()["proc/irq/1/smp_affinity_list"], "0-3");
    assert!(!machine.saved().exists());
}

#[test]
fn cores_are_divided_or_it_is_said_why_not() {
    let online: CoreSet = (0..40).collect();
    let some = Division::new([1, 33].into_iter().collect(), &online).unwrap();
    assert_eq!(some.fill("a={isolated} b={housekeeping:mask}"), "a=1,33 b=000000fd,fffffffd");
    let all = Division::new(online.clone(), &online).unwrap_err().to_string();
    assert!(all.contains("at least one"), "{all}");
    let missing = Division::new([40].into_iter().collect(), &online).unwrap_err().to_string();
    assert!(missing.contains("core 40 does not exist"), "{missing}");
    let of = |form| Place::File { file: "/sys/a".into(), form };
    let (mask, cores) = (of(Form::Mask), of(Form::Cores));
    assert!(mask.same("ff,ffffffff", "000000ff,ffffffff") && !mask.same("f", "1f"));
    assert!(cores.same("0,1,2", "0-2") && !cores.same("0", "0-1"));
}

/// Knobs of threads and of the partition, beside a machine's files.
const MORE: &str = r#"
    about = "for tests"
    [[knob]]
    name = "kernel-threads"
    threads = ["*"]
    except = ["irq/*"]
    cores = "{housekeeping}"
    why = "w"
    source = "s"
    [[knob]]
    name = "softirq"
    threads = ["ksoftirqd/*"]
    schedule = "fifo:2"
    why = "w"
    source = "s"
    [[knob]]
    name = "idle"
    file = "/sys/cpu{isolated}/latency"
    value = "3"
    why = "w"
    source = "s"
    [[knob]]
    name = "partition"
    partition = "{isolated}"
    why = "w"
    source = "s"
"#;

fn shown(lines: &[Line]) -> Vec<(String, String, String, String)> {
    lines
        .iter()
        .map(|line| {
            let effect = format!("{:?}", line.effect);
            let effect = effect.split('(').next().unwrap_or_default().to_owned();
            let thread = line.thread.as_deref().unwrap_or(&line.knob);
            (thread.to_owned(), line.now.clone(), line.wanted.clone(), effect)
        })
        .collect()
}

#[test]
fn threads_idle_states_and_the_partition_are_looked_at_and_judged() {
    let machine = Machine::new();
    let root = machine.0.path();
    let kernel = 0x20_0000;
    thread::tests::lay_out(root, 9, "ksoftirqd/2", kernel | 0x400_0000, "2", (0, 0));
    thread::tests::lay_out(root, 30, "kswapd0", kernel, "0-3", (0, 0));
    thread::tests::lay_out(root, 31, "kswapd1", kernel, "1,3", (0, 0));
    let file = |path: &str, text: &str| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    for core in 0..4 {
        file(&format!("sys/cpu{core}/latency"), "0\n");
    }
    let profile = Profile::parse("more", MORE).unwrap();
    let row = |name: &str, now: &str, wanted: &str, effect: &str| {
        [name, now, wanted, effect].map(str::to_owned).into()
    };
    let found = |lines: &[(String, String, String, String)], name: &str| {
        lines.iter().filter(|line| line.0 == name).cloned().collect::<Vec<_>>()
    };
    let lines = shown(&check(root, &profile, &division()));
    assert_eq!(
        lines[..5],
        [
            row("kswapd0", "0-3", "0-1", "Differs"),
            // It stays on its node, without the core that is isolated.
            row("kswapd1", "1,3", "1", "Differs"),
            row("ksoftirqd/2", "other", "fifo:2", "Differs"),
            row("idle", "0", "3", "Differs"),
            row("idle", "0", "3", "Differs"),
        ]
    );
    assert_eq!(
        found(&lines, "partition"),
        [row("partition", "-", "on", "Refused"), row("partition", "-", "2-3", "Refused")]
    );
    // With control groups whose controller is version 1's.
    file("proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n");
    file("sys/fs/cgroup/cgroup.controllers", "cpu\n");
    file("sys/fs/cgroup/cgroup.subtree_control", "\n");
    let refused = check(root, &profile, &division());
    assert!(
        matches!(&refused.last().unwrap().effect, Effect::Refused(why) if why.contains("unified_cgroup_hierarchy"))
    );
    // With the controller.
    file("sys/fs/cgroup/cgroup.controllers", "cpuset cpu\n");
    let lines = shown(&check(root, &profile, &division()));
    let wanted = [row("partition", "off", "on", "Differs"), row("partition", "none", "2-3", "Differs")];
    assert_eq!(found(&lines, "partition"), wanted);
    // Where the kernel isolated the cores at its start there is nothing to add.
    file("sys/devices/system/cpu/isolated", "1-3\n");
    let lines = shown(&check(root, &profile, &division()));
    assert!(found(&lines, "partition").iter().all(|line| line.3 == "AsWanted"), "{lines:?}");
}

#[test]
fn what_a_partition_is_going_to_move_is_saved_as_well() {
    let machine = Machine::new();
    let root = machine.0.path();
    thread::tests::lay_out(root, 30, "kcompactd0", 0x20_0000, "1", (0, 0));
    let file = |path: &str, text: &str| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    file("proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n");
    file("sys/fs/cgroup/cgroup.controllers", "cpuset\n");
    file("sys/fs/cgroup/cgroup.subtree_control", "\n");
    let profile = Profile::parse("more", MORE).unwrap();
    apply(root, &profile, &division(), &machine.saved()).unwrap();
    let saved = fs::read_to_string(machine.saved()).unwrap();
    assert!(
        saved.contains("kcompactd0") && saved.contains("\"partition\"") && saved.contains("\"controller\""),
        "{saved}"
    );
    let read = Saved::read(&machine.saved()).unwrap().unwrap();
    assert_eq!(read.entries[0].before, "1");
    // An entry as it was written before there were threads.
    let old = r#"{"entries": [{"knob": "k", "file": "/sys/a", "before": "1", "form": "plain"}]}"#;
    fs::write(machine.saved(), old).unwrap();
    assert_eq!(Saved::read(&machine.saved()).unwrap().unwrap().entries.len(), 1);
}
