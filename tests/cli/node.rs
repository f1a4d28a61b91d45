//! `cableway up`, `status` and `down` as a user meets them: what is refused, what is supervised, what is given back. Machines that
//! really run are for the lab (`lab/run crash`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::world::{CABLEWAY, core, port};

/// A node's file and run directory; brought down when dropped.
struct Place(tempfile::TempDir);

impl Place {
    fn new(rest: &str) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir(place.run_dir()).unwrap();
        place.write(rest);
        place
    }

    /// `[switch]` on three lines, then `rest` from line 4 on.
    fn write(&self, rest: &str) {
        let text = format!("[switch]\nworkers = [{}]\nidle = \"sleep\"\n{rest}", core());
        fs::write(self.file(), text).unwrap();
    }

    fn run_dir(&self) -> PathBuf {
        self.0.path().join("run")
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("node.toml")
    }

    fn cableway(&self, args: &[&str]) -> Output {
        Command::new(CABLEWAY).args(args).arg("--run-dir").arg(self.run_dir()).output().unwrap()
    }

    fn up(&self, args: &[&str]) -> Output {
        self.cableway(&[&["up", self.file().to_str().unwrap()], args].concat())
    }

    fn status(&self) -> Value {
        let output = self.cableway(&["status", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
    }

    fn switch(&self) -> Value {
        self.status()["children"][0].clone()
    }

    /// Waits until the switch runs as another process.
    fn await_another_switch(&self, than: i32) -> i32 {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let switch = self.switch();
            let pid = switch["pid"].as_i64().unwrap_or(0) as i32;
            if pid != 0 && pid != than && switch["state"] == "running" {
                return pid;
            }
            assert!(Instant::now() < end, "{switch}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.run_dir().join("node.log")).unwrap_or_default()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.cableway(&["down"]);
    }
}

fn pid(value: &Value) -> i32 {
    value.as_i64().unwrap_or_else(|| panic!("{value} is no process")) as i32
}

fn end(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// Whether a process has ended; nobody may have waited for it yet.
fn is_gone(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_node_is_brought_up_supervised_taken_over_and_brought_down() {
    let place = Place::new(&port("a"));
    let up = place.up(&["--detach"]);
    assert!(up.status.success(), "{up:?}\n{}", place.log());
    assert!(text(&up.stdout).contains("switch  running"), "{up:?}");
    let before = place.status();
    let (supervisor, switch) = (pid(&before["supervisor"]), pid(&place.switch()["pid"]));

    let again = place.up(&["--detach"]);
    assert_eq!(again.status.code(), Some(2));
    assert!(text(&again.stderr).contains("is up in"), "{again:?}");

    end(switch);
    let second = place.await_another_switch(switch);
    let now = place.switch();
    assert_eq!((&now["restarts"], now["last_end"].as_str()), (&1.into(), Some("was ended by SIGKILL")));

    // Without its supervisor the switch goes on.
    end(supervisor);
    let end_of_patience = Instant::now() + Duration::from_secs(60);
    while place.status()["supervisor"] != Value::Null {
        assert!(Instant::now() < end_of_patience);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(place.cableway(&["status"]).status.code(), Some(1));
    assert_eq!(pid(&place.switch()["pid"]), second);

    // The next supervisor takes it over, and answers its death although it is not its child.
    let up = place.up(&["--detach"]);
    assert!(up.status.success(), "{up:?}\n{}", place.log());
    assert_eq!(pid(&place.switch()["pid"]), second, "{}", place.log());
    end(second);
    let third = place.await_another_switch(second);

    let down = place.cableway(&["down"]);
    assert!(down.status.success() && text(&down.stdout).contains("is down"), "{down:?}");
    assert!(is_gone(third));
    let left: Vec<_> = fs::read_dir(place.run_dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name.to_str().unwrap().ends_with(".log")), "{left:?}");
    let down = place.cableway(&["down"]);
    assert!(down.status.success() && text(&down.stdout).contains("no node is up"), "{down:?}");
    assert_eq!(place.cableway(&["status"]).status.code(), Some(2));
}

#[test]
fn what_ends_again_and_again_waits_longer_and_longer_and_comes_back_when_its_file_is_mended() {
    let place = Place::new(&port("a"));
    assert!(place.up(&["--detach"]).status.success(), "{}", place.log());
    let switch = pid(&place.switch()["pid"]);
    // From now on it is refused at each start, at once.
    place.write("[[port]]\nname = \"a\"\n");
    end(switch);
    let patience = Instant::now() + Duration::from_secs(60);
    while !place
        .log()
        .contains("switch ended with status 2; it ends too often, and is started again in a while")
    {
        assert!(Instant::now() < patience, "{}", place.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    let at_once = place.log().matches("; it is started again\n").count();
    // More where the starts are slow: those within ten seconds count.
    assert!(at_once >= 5, "five ends are answered at once: {}", place.log());
    place.write(&port("a"));
    place.await_another_switch(switch);
    assert!(place.switch()["restarts"].as_u64().unwrap() > 5);
}

#[test]
fn down_works_without_a_supervisor() {
    let place = Place::new(&port("a"));
    assert!(place.up(&["-d"]).status.success(), "{}", place.log());
    let status = place.status();
    let switch = pid(&place.switch()["pid"]);
    end(pid(&status["supervisor"]));
    let down = place.cableway(&["down"]);
    assert!(down.status.success(), "{down:?}");
    assert!(is_gone(switch));
    assert!(!place.run_dir().join("node.json").exists());
}

#[test]
fn what_fails_on_the_way_is_taken_back_and_told() {
    // A machine whose memory the plan finds sufficient, and whose kernel has no code: it ends before it is ready.
    if !Path::new("/dev/kvm").exists() {
        println!("SKIPPED /dev/kvm is not there");
        return;
    }
    let place = Place::new("");
    let mut kernel = vec![0; 2048];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    let path = place.0.path().join("vmlinuz");
    fs::write(&path, kernel).unwrap();
    let machine = format!("[[vm]]\nname = \"m\"\nkernel = {path:?}\nmemory = \"64 MiB\"\n");
    place.write(&(port("a") + &machine));
    let up = place.up(&["--detach"]);
    assert_eq!(up.status.code(), Some(1), "{up:?}");
    let said = text(&up.stderr);
    assert!(said.contains("m ended with status") && said.contains("everything is taken back"), "{said}");
    assert!(!place.run_dir().join("node.json").exists());
    assert_eq!(place.cableway(&["switch", "ports"]).status.code(), Some(1), "the switch still runs");
}

#[test]
fn every_mistake_of_a_node_is_found_in_one_pass_and_nothing_is_changed() {
    let core = core();
    let place = Place::new("");
    let machine = |name: &str, more: &str| {
        format!("[[vm]]\nname = \"{name}\"\nkernel = \"/nonexistent/vmlinuz\"\n{more}\n")
    };
    let rest = format!(
        "[host]\nhuge_pages = [{{ size = \"2M\" }}]\nrestart = \"sometimes\"\nprofile = \"fast\"\n[[nic]]\ndevice = \"ffff:00:00.0\"\n{}{}{}{}[[vm]]\nname = \"d\"\n[hosts]\n",
        port("a"),
        port("a"),
        machine("b", &format!("vcpu_cores = [{core}]\nmemory = \"64 TiB\"\npages = \"2M\"")),
        machine(
            "c",
            "net = [{ kind = \"vhost-user\", socket = \"a.sock\", mode = \"server\" }, { kind = \"vhost-user\", socket = \"x.sock\" }]"
        ),
    );
    place.write(&rest);
    let pages = fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap();
    for how in [&["--plan"][..], &[], &["--detach"]] {
        let output = place.up(how);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        for (line, message) in [
            (5, "`huge_pages` needs `pages`"),
            (6, "\"sometimes\" is unknown"),
            (7, "there is no profile `fast`"),
            (9, "there is no PCI function ffff:00:00.0"),
            (15, "port `a` is there already, on line 11"),
            (20, "machine `b`: the kernel /nonexistent/vmlinuz"),
            (21, &format!("core {core} is a worker's already")),
            (22, "`memory`: wanted from 2 MiB to 16 TiB"),
            (27, "port `a` and its card both listen"),
            (27, "no port has the socket"),
            (28, "[vm] needs `kernel`"),
            (30, "unknown key `hosts`; did you mean `host`?"),
        ] {
            let found =
                said.lines().any(|l| l.contains(&format!("node.toml:{line}:")) && l.contains(message));
            assert!(found, "{line}: {message:?} is not in\n{said}");
        }
    }
    assert_eq!(fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap(), pages);
    assert_eq!(fs::read_dir(place.run_dir()).unwrap().count(), 0);
    let missing = place.cableway(&["up", "/nonexistent.toml"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(text(&missing.stderr).contains("there is no such file"), "{missing:?}");
}

#[test]
fn the_pages_of_all_machines_are_counted_together() {
    let place = Place::new("");
    let kernel = place.0.path().join("vmlinuz");
    let mut bytes = vec![0; 2048];
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(&kernel, bytes).unwrap();
    let machine = |name: &str| {
        format!("[[vm]]\nname = \"{name}\"\nkernel = {kernel:?}\nmemory = \"1 TiB\"\npages = \"2M\"\n")
    };
    // One fits into the pool that is asked for, whoever has some of its pages, two do not: the second one's memory is on line 14.
    place.write(&format!(
        "[host]\nhuge_pages = [{{ size = \"2M\", pages = 600000 }}]\n{}{}",
        machine("a"),
        machine("b")
    ));
    let said = text(&place.up(&["--plan"]).stderr);
    if said.contains("this machine has pools") {
        println!("SKIPPED no pool of 2 MiB pages on node 0");
        return;
    }
    let of =
        |name: &str| said.lines().any(|l| l.contains(&format!("machine `{name}`: needs 524288 huge pages")));
    assert!(of("b") && !of("a"), "{said}");
    assert!(said.contains("node.toml:14:"), "{said}");
}

#[test]
fn every_node_of_configs_is_planned() {
    if !Path::new("/dev/kvm").exists() || !host::topology::permitted_cores().unwrap().contains(1) {
        println!("SKIPPED no /dev/kvm, or no core 1");
        return;
    }
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    for (name, devices) in [("node", 0), ("chain", 0), ("demo", 0), ("realtime", 0), ("pvp", 2), ("sriov", 2)]
    {
        let place = Place::new("");
        let mut kernel = vec![0; 2048];
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        for file in [
            "vmlinuz",
            "kernel",
            "initramfs.cpio",
            "near.cpio",
            "far.cpio",
            "vnf.cpio",
            "firewall.cpio",
            "nat.cpio",
            "balancer.cpio",
        ] {
            fs::write(place.0.path().join(file), &kernel).unwrap();
        }
        let text = fs::read_to_string(configs.join(format!("{name}.toml"))).unwrap();
        // Huge pages may be in use by other tests; that they are counted is for another one.
        let text = text.replace("/boot/vmlinuz", "vmlinuz").replace("pages = \"2M\"", "pages = \"4K\"");
        let text = text.replace("/var/lib/cableway/image/", "");
        fs::write(place.file(), text).unwrap();
        let plan = place.up(&["--plan"]);
        let said = text_of(&plan);
        if plan.status.success() {
            assert!(devices == 0 && said.contains("worker of the switch"), "{name}: {said}");
            continue;
        }
        // Cards and cores are of the machine that it is for: nothing else is wrong with it.
        let (unknown, few) = ("there is no PCI function", "cores for the vCPUs of");
        assert_eq!(said.lines().filter(|line| line.contains(unknown)).count(), devices, "{name}: {said}");
        let few_cores = name == "realtime" && host::topology::permitted_cores().unwrap().len() < 4;
        let known = |line: &str| line.contains(unknown) || few_cores && line.contains(few);
        assert!(said.lines().all(known), "{name}: {said}");
    }
}

fn text_of(output: &Output) -> String {
    text(&output.stdout) + &text(&output.stderr)
}

/// The mistakes that everybody makes, in one file: each is found by one pass, with its line and what to do.
#[test]
fn two_vms_on_one_core_too_many_pages_an_unknown_device_a_port_twice_and_a_vm_without_kernel() {
    let core = core();
    let place = Place::new("");
    let kernel = place.0.path().join("vmlinuz");
    let mut bytes = vec![0; 2048];
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(&kernel, bytes).unwrap();
    let other = host::topology::permitted_cores().unwrap().iter().find(|c| *c != core).unwrap_or(core);
    let vm = |name: &str| {
        format!(
            "[[vm]]\nname = \"{name}\"\nkernel = {kernel:?}\nvcpu_cores = [{other}]\nmemory = \"4 TiB\"\npages = \"2M\"\n"
        )
    };
    // Lines 4 and 7, 10 to 15, 16 to 21, 22 and 23.
    place.write(&format!(
        "{}{}[[port]]\nname = \"wire\"\nkind = \"nic\"\ndevice = \"ffff:1f:00.0\"\n{}{}[[vm]]\nname = \"c\"\n",
        port("a"),
        port("a"),
        vm("a"),
        vm("b")
    ));
    let text_before = fs::read_to_string(place.file()).unwrap();
    let pages = fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap();
    let plan = place.up(&["--plan"]);
    let said = text(&plan.stderr);
    assert_eq!((plan.status.code(), plan.stdout.len()), (Some(2), 0), "{said}");
    let line_of = |words: &str| 1 + text_before[..text_before.rfind(words).unwrap()].matches('\n').count();
    for (line, message, fix) in [
        (line_of("vcpu_cores"), "is vCPU 0's of machine `a` already", "a core has one task"),
        (line_of("memory"), "needs 2097152 huge pages of 2 MiB", "more in [host], `huge_pages"),
        (line_of("device"), "ffff:1f:00.0", "cableway nic list"),
        (line_of("name = \"a\"\nkind"), "port `a` is there already, on line", "give this one another name"),
        (line_of("[[vm]]"), "[vm] needs `kernel`", "as in `kernel ="),
    ] {
        let at = format!("node.toml:{line}:");
        let found = said.lines().any(|l| l.contains(&at) && l.contains(message) && l.contains(fix));
        assert!(found, "line {line}: {message:?}, {fix:?} are not in\n{said}");
    }
    assert_eq!(fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap(), pages);
    assert_eq!(fs::read_dir(place.run_dir()).unwrap().count(), 0);
}

#[test]
fn a_disks_threads_are_part_of_the_plan_and_have_no_core_that_polls() {
    let worker = core();
    let permitted = host::topology::permitted_cores().unwrap();
    let Some(other) = permitted.iter().find(|core| *core != worker) else {
        println!("SKIPPED this machine has one core");
        return;
    };
    let place = Place::new("");
    let file = |name: &str| place.0.path().join(name);
    let mut bytes = vec![0; 2048];
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(file("vmlinuz"), bytes).unwrap();
    ["a", "b"].iter().for_each(|name| fs::write(file(name), [0; 4096]).unwrap());
    let vm = |name: &str, rest: String| {
        let (kernel, disk) = (file("vmlinuz"), file(name));
        format!(
            "[[vm]]\nname = \"{name}\"\nkernel = {kernel:?}\nmemory = \"64 MiB\"\n{rest}[[vm.disk]]\nformat = \"raw\"\npath = {disk:?}\n"
        )
    };
    // Beside a worker, and beside a vCPU, whichever of the two is first in the file.
    place.write(&format!(
        "{}{}iothread_cores = [{worker}]\n{}iothread_cores = [{other}]\n",
        port("p"),
        vm("a", format!("vcpu_cores = [{other}]\n")),
        vm("b", String::new()),
    ));
    let plan = place.up(&["--plan"]);
    let said = text(&plan.stderr);
    assert_eq!(plan.status.code(), Some(2), "{said}");
    let text_of_file = fs::read_to_string(place.file()).unwrap();
    let line_of = |words: &str| 1 + text_of_file[..text_of_file.find(words).unwrap()].matches('\n').count();
    for (cores, machine, whose) in [
        (format!("iothread_cores = [{worker}]"), "a", "a worker's".to_owned()),
        (format!("iothread_cores = [{other}]"), "b", "vCPU 0's of machine `a`".to_owned()),
    ] {
        let (line, core) = (line_of(&cores), if machine == "a" { worker } else { other });
        let message = format!(
            "node.toml:{line}:1: machine `{machine}`: `iothread_cores`: core {core} is {whose} already; a core has one task"
        );
        assert!(said.contains(&message), "{message}\n{said}");
    }
    place.write(&format!(
        "{}{}iothread_cores = [{other}]\n{}",
        port("p"),
        vm("a", String::new()),
        vm("b", format!("vcpu_cores = [{other}]\n")),
    ));
    let said = text(&place.up(&["--plan"]).stderr);
    assert!(
        said.contains(&format!("`vcpu_cores`: core {other} is a thread of disk0's of machine `a` already")),
        "{said}"
    );

    // Two that sleep most of the time share one.
    place.write(&format!(
        "{}{}iothread_cores = [{other}]\n{}iothread_cores = [{other}]\n",
        port("p"),
        vm("a", String::new()),
        vm("b", String::new()),
    ));
    let plan = place.up(&["--plan"]);
    let said = text_of(&plan);
    assert!(plan.status.success() && said.contains("disk0 of a, disk0 of b"), "{said}");
}

#[test]
fn a_function_of_the_host_has_one_user_and_must_be_there() {
    let place = Place::new("");
    let kernel = place.0.path().join("vmlinuz");
    let mut bytes = vec![0; 2048];
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(&kernel, bytes).unwrap();
    let vm = |name: &str| {
        format!("[[vm]]\nname = \"{name}\"\nkernel = {kernel:?}\npci = [{{ device = \"ffff:1f:00.0\" }}]\n")
    };
    place.write(&format!("{}{}{}", port("a"), vm("one"), vm("two")));
    let plan = place.up(&["--plan"]);
    let said = text(&plan.stderr);
    assert_eq!(plan.status.code(), Some(2), "{said}");
    assert!(said.contains("machine `one`: `pci`: there is no PCI function ffff:1f:00.0"), "{said}");
    assert!(said.contains("machine `two`: ffff:1f:00.0 is machine `one`'s already"), "{said}");
}

#[test]
fn a_core_plan_is_shown_with_its_reasons_and_the_switch_finds_the_same() {
    let place = Place::new("");
    let rest = format!("idle = \"sleep\"\n{}", port("a"));
    fs::write(place.file(), format!("[host]\ncores = {{ housekeeping = 1, workers = 1 }}\n[switch]\n{rest}"))
        .unwrap();
    let (machine, permitted) =
        (host::machine::Machine::read(Path::new("/")).unwrap(), host::topology::permitted_cores().unwrap());
    let physical = machine.cores.values().filter(|c| permitted.contains(c.number));
    if physical.filter(|core| core.threads.iter().next() == Some(core.number)).count() < 2 {
        println!("SKIPPED this machine has one physical core");
        return;
    }
    let plan = place.up(&["--plan"]);
    let said = text_of(&plan);
    assert!(
        plan.status.success() && said.contains("housekeeping of the switch") && said.contains("why"),
        "{said}"
    );
    let worker = said.lines().find(|line| line.contains("worker of the switch")).unwrap();
    assert!(worker.contains("beside "), "{worker}");
    let core: u32 = worker.split_whitespace().next().unwrap().parse().unwrap();
    let check = place.cableway(&["switch", place.file().to_str().unwrap(), "--check"]);
    let checked = text_of(&check);
    let same = checked.contains(&format!("poll on core {core} "));
    assert!(check.status.success() && same, "{checked}");
    // It runs there, and its own reload, confined as it is, finds the same.
    let up = place.up(&["--detach"]);
    assert!(up.status.success(), "{up:?}\n{}", place.log());
    for _ in 0..2 {
        let workers = text_of(&place.cableway(&["switch", "stats", "--json"]));
        let stats: Value = serde_json::from_str(&workers).unwrap_or_else(|e| panic!("{e}: {workers}"));
        assert_eq!(stats["workers"][0]["core"], core, "{workers}");
        let reload = place.cableway(&["switch", "reload"]);
        assert!(reload.status.success(), "{reload:?}");
    }

    let many = "[host]\ncores = { housekeeping = 4000 }\n[switch]\nworkers = \"auto\"\n";
    fs::write(place.file(), many.to_owned() + &rest).unwrap();
    let said = text_of(&place.up(&["--plan"]));
    assert!(
        said.contains("node.toml:2:26: `housekeeping`: 4000 cores for housekeeping are wanted"),
        "{said}"
    );
}
