//! `cableway image`: a small guest, so that there is something to boot.
//!
//! Owns what is in the image and where its parts come from: a stock kernel with a few of its modules, a busybox, and this very
//! program, whose `vnf` and `latency` are what the guest does. Installs nothing and changes nothing but the output directory.

mod cpio;
mod debian;
mod kernel;
mod modules;
mod program;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use cpio::Cpio;

use crate::output::{self, refuse};

/// What a guest needs to have network cards at all, and what it likes to have.
const NEEDED: &[&str] = &["virtio_net"];
const WANTED: &[&str] =
    &["virtio_pci", "af_packet", "virtio_console", "virtio_rng", "virtio_blk", "8021q", "pvpanic_mmio"];

/// The first process of the guest.
const INIT: &str = include_str!("init");

/// Build a small guest: a kernel, and an initial file system with network functions of ours.
///
/// The kernel is Debian's cloud kernel, downloaded as a package by this machine's apt and unpacked, never installed, or one that is there:
/// --kernel /boot/vmlinuz-VERSION. What a guest does is said by its kernel command line: `cableway.role=forward` (eth0 to eth1 and
/// back), `reflect` (eth0, back to the sender), `offer` (numbered frames to a function that reflects), `latency` (how quiet its vCPUs
/// are) or `shell`. configs/demo.toml boots it; docs/node.md tells more.
///
/// Exit status: 0 the image is there; 1 something went wrong; 2 the arguments are wrong.
#[derive(Args, Debug)]
pub(crate) struct ImageArgs {
    /// Where `kernel` and `initramfs.cpio` are written [default: /var/lib/cableway/image, or
    /// $XDG_DATA_HOME/cableway/image (~/.local/share/cableway/image) when not root].
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// A kernel that is there: a bzImage, or an ELF with a PVH entry [default: Debian's cloud kernel, by apt-get download].
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Its modules [default: /lib/modules/VERSION of the kernel].
    #[arg(long, value_name = "DIR", requires = "kernel")]
    modules: Option<PathBuf>,
    /// A busybox that needs no libraries [default: /bin/busybox if it is one, else that of Debian's busybox-static].
    #[arg(long, value_name = "FILE")]
    busybox: Option<PathBuf>,
}

/// Builds it.
///
/// # Errors
/// A part is not there, with the way to get it.
pub(crate) fn run(args: &ImageArgs) -> Result<ExitCode> {
    let Some(output) = args.output.clone().or_else(default_output) else {
        return Ok(refuse("neither XDG_DATA_HOME nor HOME is set: say where with --output DIR"));
    };
    for given in [&args.kernel, &args.modules, &args.busybox].into_iter().flatten() {
        if let Err(error) = fs::metadata(given) {
            return Ok(refuse(format!("{}: {error}", given.display())));
        }
    }
    fs::create_dir_all(&output)
        .with_context(|| format!("making {}; name another one with --output", output.display()))?;
    // Beside what is made of it: there is room, or it would not help.
    let folder =
        tempfile::tempdir_in(&output).with_context(|| format!("writing into {}", output.display()))?;

    let (kernel_file, modules_folder) = match &args.kernel {
        Some(kernel) => (kernel.clone(), args.modules.clone()),
        None => debian_kernel(folder.path())?,
    };
    let bytes = fs::read(&kernel_file).with_context(|| format!("reading {}", kernel_file.display()))?;
    if !kernel::is_kernel(&bytes) {
        return Ok(refuse(format!(
            "{} is no kernel: a bzImage (/boot/vmlinuz-…) or an ELF",
            kernel_file.display()
        )));
    }
    let Some(modules_folder) = modules_folder.or_else(|| installed_modules(&kernel_file, &bytes)) else {
        return Ok(refuse(format!(
            "which version {} is does not stand in it: say where its modules are with --modules DIR",
            kernel_file.display()
        )));
    };
    let modules = modules::collect(&modules_folder, NEEDED, WANTED)?;
    let busybox = match &args.busybox {
        Some(busybox) => busybox.clone(),
        None => busybox(folder.path())?,
    };
    if !program::is_static(&busybox).with_context(|| format!("reading {}", busybox.display()))? {
        return Ok(refuse(format!(
            "{} needs shared libraries: apt-get install busybox-static, or another one with --busybox",
            busybox.display()
        )));
    }

    eprintln!("packing the image …");
    let initramfs = pack(&fs::read(&busybox)?, &modules)?;
    let elf = kernel::elf_inside(&bytes);
    write(&output, "kernel", elf.as_ref().unwrap_or(&bytes))?;
    write(&output, "initramfs.cpio", &initramfs)?;
    let brought: Vec<_> = modules.iter().map(|module| module.name.as_str()).collect();
    let text = format!(
        "{}: {}, {}\n{}: {}, with busybox, cableway and the modules {}\n",
        output.join("kernel").display(),
        output::bytes(elf.as_ref().unwrap_or(&bytes).len() as u64),
        if elf.is_some() {
            "the ELF inside of the kernel's bzImage, which starts faster"
        } else {
            "as it was"
        },
        output.join("initramfs.cpio").display(),
        output::bytes(initramfs.len() as u64),
        brought.join(", ")
    );
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn default_output() -> Option<PathBuf> {
    if nix::unistd::geteuid().is_root() {
        return Some(PathBuf::from("/var/lib/cableway/image"));
    }
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let data = set("XDG_DATA_HOME").or_else(|| Some(set("HOME")?.join(".local/share")))?;
    Some(data.join("cableway/image"))
}

/// Debian's cloud kernel and its modules.
fn debian_kernel(folder: &Path) -> Result<(PathBuf, Option<PathBuf>)> {
    let package = debian::newest_kernel()?;
    let root = debian::unpack(&package, folder)?;
    let only = |folder: PathBuf, begins: &str| {
        let mut entries = fs::read_dir(&folder).ok()?.flatten();
        entries
            .find(|entry| entry.file_name().to_string_lossy().starts_with(begins))
            .map(|entry| entry.path())
    };
    // Newer releases keep /lib in /usr.
    let modules = only(root.join("lib/modules"), "").or_else(|| only(root.join("usr/lib/modules"), ""));
    match only(root.join("boot"), "vmlinuz-") {
        Some(kernel) => Ok((kernel, modules)),
        None => bail!("{package} has no kernel in /boot; give one with --kernel"),
    }
}

/// Where the modules of a kernel are that is installed.
fn installed_modules(file: &Path, kernel: &[u8]) -> Option<PathBuf> {
    let named = || Some(file.file_name()?.to_str()?.split_once('-')?.1.to_owned());
    Some(Path::new("/lib/modules").join(kernel::version(kernel).or_else(named)?))
}

fn busybox(folder: &Path) -> Result<PathBuf> {
    let installed = PathBuf::from("/bin/busybox");
    if program::is_static(&installed).unwrap_or(false) {
        return Ok(installed);
    }
    let root = debian::unpack("busybox-static", folder)?;
    let places = ["bin/busybox", "usr/bin/busybox"].map(|place| root.join(place));
    places
        .into_iter()
        .find(|path| path.exists())
        .context("Debian's busybox-static has no busybox; give one with --busybox")
}

/// The initial file system.
fn pack(busybox: &[u8], modules: &[modules::Module]) -> Result<Vec<u8>> {
    let mut archive = Cpio::default();
    for folder in ["bin", "dev", "proc", "sys", "tmp", "etc", "run", "lib/modules"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 5, 1);
    archive.program("init", INIT.as_bytes());
    archive.program("bin/busybox", busybox);
    archive.program("bin/cableway", &program::own()?);
    for library in program::libraries()? {
        let data = fs::read(&library).with_context(|| format!("reading {}", library.display()))?;
        archive.program(library.to_string_lossy().trim_start_matches('/'), &data);
    }
    let mut load = String::new();
    for module in modules {
        archive.file(&format!("lib/modules/{}.ko", module.name), &module.data);
        load += &format!("{}\n", module.name);
    }
    archive.file("lib/modules/load", load.as_bytes());
    Ok(archive.finished())
}

/// A file of the image, whole or as it was before.
fn write(output: &Path, name: &str, data: &[u8]) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let path = output.join(name);
    let writing = || format!("writing {}", path.display());
    let mut file = tempfile::NamedTempFile::new_in(output).with_context(writing)?;
    file.write_all(data).with_context(writing)?;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o644)).with_context(writing)?;
    file.persist(&path).with_context(writing)?;
    Ok(())
}
