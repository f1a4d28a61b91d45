//! What a switch that runs can still reach: files beneath the directories that it started with, groups that it knew.

use std::fs;
use std::path::Path;

use nix::unistd::{Group, getegid, geteuid};

use crate::world::{Place, Running, eventually, port};

/// What a reload that is refused says.
fn refusal(place: &Place) -> String {
    let refused = place.ask(&["reload"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    said
}

/// Whether this kernel holds `switch` to its files; says so if not.
fn is_held(switch: &Running) -> bool {
    let held = !switch.log().contains("no Landlock");
    if !held {
        eprintln!("skipped: this kernel has no Landlock");
    }
    held
}

#[test]
fn a_configuration_elsewhere_cannot_be_read_by_a_running_switch_unless_it_may_read_everything() {
    for (key, free) in [("", false), ("confine_files = false\n", true)] {
        let (place, elsewhere) = (Place::new(), tempfile::tempdir().unwrap());
        place.write(&(key.to_owned() + &port("a")));
        let mut switch = Running::start(&place);
        if free {
            switch.wait_for_log("`confine_files` is off");
        } else if !is_held(&switch) {
            return;
        }
        // Written anew beside it and put in its place, as editors do: read again.
        place.write(&(key.to_owned() + &port("a") + &port("b")));
        let (new, link) = (place.0.path().join("new"), elsewhere.path().join("switch.toml"));
        fs::copy(place.file(), &new).unwrap();
        fs::rename(&new, place.file()).unwrap();
        assert_eq!(place.json(&["reload"])["added"], serde_json::json!(["b"]));

        place.write(&(key.to_owned() + &port("a")));
        fs::rename(place.file(), &link).unwrap();
        std::os::unix::fs::symlink(&link, place.file()).unwrap();
        if free {
            assert_eq!(place.json(&["reload"])["removed"], serde_json::json!(["b"]));
        } else {
            assert!(refusal(&place).contains("ermission denied"), "{}", refusal(&place));
        }
    }
}

#[test]
fn a_reload_that_wants_a_socket_in_a_new_directory_is_told_to_restart_and_changes_nothing() {
    let place = Place::new();
    let dirs = ["old", "new", "run/beneath"].map(|name| place.0.path().join(name));
    dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let in_dir = |name: &str, dir: &Path| {
        port(name).replace(&format!("{name}.sock"), dir.join("x.sock").to_str().unwrap())
    };
    let [old, new, beneath] = &dirs;
    place.write(&(port("a") + &in_dir("b", old)));
    let switch = Running::start(&place);
    if !is_held(&switch) {
        return;
    }
    let before = place.json(&["ports"]);
    place.write(&(port("c") + &in_dir("d", new)));
    let (file, said) = (place.file(), refusal(&place));
    let wanted =
        format!("{}:11:10: port `d`: `socket`: directory {} is none of", file.display(), new.display());
    assert!(said.contains(&wanted) && said.contains("restart the switch"), "{said}");
    assert_eq!(place.json(&["ports"]), before);
    assert!(!place.socket("c").exists() && !new.join("x.sock").exists());

    // Beneath a known one it may be; a socket that we only connect to, anywhere.
    let client = in_dir("d", new) + "mode = \"client\"\n";
    place.write(&(port("a") + &in_dir("b", old) + &in_dir("c", beneath) + &client));
    assert_eq!(place.json(&["reload"])["added"], serde_json::json!(["c", "d"]));
    let vmm = std::os::unix::net::UnixListener::bind(new.join("x.sock")).unwrap();
    vmm.set_nonblocking(true).unwrap();
    eventually("it connects to the VMM", || vmm.accept().is_ok());

    // A directory of the same name is another directory, to the kernel too.
    fs::remove_file(old.join("x.sock")).unwrap();
    fs::remove_dir(old).unwrap();
    fs::create_dir(old).unwrap();
    place.write(&(port("a") + &in_dir("e", old)));
    assert!(refusal(&place).contains("restart the switch"));
    drop(switch);
    let _again = Running::start(&place);
    assert_eq!(place.state("e"), "listening");
}

#[test]
fn a_reload_knows_the_groups_that_there_were_at_the_start_and_says_so_of_others() {
    let place = Place::new();
    place.write(&port("a"));
    let _switch = Running::start(&place);
    // As root another group than our own, so that the test sees it given.
    let groups = fs::read_to_string("/etc/group").unwrap();
    let names = groups.lines().filter_map(|line| Group::from_name(line.split(':').next()?).ok().flatten());
    let group = names.into_iter().find(|group| geteuid().is_root() != (group.gid == getegid()));
    let Some(group) = group else {
        eprintln!("skipped: this process's group has no name");
        return;
    };
    let with_group = |name: &str| port("a") + &port("b") + &format!("socket_group = \"{name}\"\n");
    place.write(&with_group(&group.name));
    assert_eq!(place.json(&["reload"])["added"], serde_json::json!(["b"]));
    let made = fs::metadata(place.socket("b")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::gid(&made), group.gid.as_raw());

    place.write(&with_group("nobody-has-this-name"));
    let said = refusal(&place);
    assert!(
        said.contains("12:16: port `b`: `socket_group`: group \"nobody-has-this-name\" was not in"),
        "{said}"
    );
    assert!(said.contains("restart the switch"), "{said}");
}
