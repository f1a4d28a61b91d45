//! Packages of Debian, downloaded by the user's own apt and unpacked in a folder of ours; nothing is installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The series that guests are known to boot with; another one is taken where a release has only that.
const KNOWN: &str = "6.12.";

/// Downloads a package into `folder` and unpacks it there; the folder that it would have been installed into.
///
/// # Errors
/// apt cannot, with what it said.
pub(super) fn unpack(package: &str, folder: &Path) -> Result<PathBuf> {
    eprintln!("downloading Debian's {package} …");
    let place = folder.join(package);
    fs::create_dir(&place).with_context(|| format!("making {}", place.display()))?;
    let mut apt = Command::new("apt-get");
    // The user that apt would become may not write here.
    apt.args(["-q", "-o", "APT::Sandbox::User=root", "download", package]).current_dir(&place);
    run(&mut apt).context(
        "run apt-get update and try again, or give a kernel with --kernel and a busybox with --busybox",
    )?;
    let mut entries = fs::read_dir(&place)?.flatten().map(|entry| entry.path());
    let Some(deb) = entries.find(|path| path.extension().is_some_and(|extension| extension == "deb")) else {
        bail!("apt-get download {package} left no package");
    };
    let root = place.join("root");
    run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&root))?;
    Ok(root)
}

/// The package of the newest cloud kernel that apt can download.
///
/// # Errors
/// apt knows none.
pub(super) fn newest_kernel() -> Result<String> {
    let listed = run(Command::new("apt-cache").args(["pkgnames", "linux-image-"]))
        .context("without Debian's apt, say which kernel: --kernel /boot/vmlinuz-VERSION")?;
    for package in by_age(&listed) {
        let policy = run(Command::new("apt-cache").args(["policy", package]))?;
        if !policy.contains("Candidate: (none)") && !policy.is_empty() {
            return Ok(package.to_owned());
        }
    }
    bail!(
        "apt knows no linux-image-…-cloud-amd64: run apt-get update and try again, or give a kernel with --kernel"
    )
}

/// Cloud kernels among names of packages, the best first.
fn by_age(listed: &str) -> Vec<&str> {
    let version = |name: &str| {
        let version = name.strip_prefix("linux-image-")?.strip_suffix("-cloud-amd64")?;
        version.starts_with(|first: char| first.is_ascii_digit()).then(|| {
            let numbers: Vec<u32> =
                version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect();
            (version.starts_with(KNOWN), numbers)
        })
    };
    let mut found: Vec<_> = listed.lines().filter_map(|name| Some((version(name)?, name))).collect();
    found.sort_unstable();
    found.into_iter().rev().map(|(_, name)| name).collect()
}

/// What a command prints.
fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let ran = command.stdin(Stdio::null()).output();
    let ran = ran.with_context(|| format!("starting {name}, which Debian and Ubuntu have"))?;
    if !ran.status.success() {
        bail!("{name}: {}", String::from_utf8_lossy(&ran.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_cloud_kernel_of_the_known_series_comes_first() {
        let listed = "linux-image-amd64\nlinux-image-6.1.0-40-cloud-amd64\nlinux-image-6.12.9+bpo-cloud-amd64\n\
                      linux-image-6.12.12+bpo-cloud-amd64\nlinux-image-6.12.12+bpo-amd64\n\
                      linux-image-6.19.1-cloud-amd64\nlinux-image-6.12.99-cloud-amd64-unsigned\n\
                      linux-image-cloud-amd64\n";
        assert_eq!(
            by_age(listed),
            [
                "linux-image-6.12.12+bpo-cloud-amd64",
                "linux-image-6.12.9+bpo-cloud-amd64",
                "linux-image-6.19.1-cloud-amd64",
                "linux-image-6.1.0-40-cloud-amd64"
            ]
        );
    }
}
