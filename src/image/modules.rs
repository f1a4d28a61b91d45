//! Kernel modules for an image: found in a folder, unpacked, with those that they need before them.
//!
//! What a module needs stands in itself (`depends=` in its .modinfo), so that a folder does not need depmod's lists.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Why there are no modules.
#[derive(Debug, thiserror::Error)]
pub(super) enum ModuleError {
    /// The folder is not there or empty.
    #[error("no kernel modules in {}: say where those of this kernel are with --modules DIR (/lib/modules/VERSION)", .0.display())]
    None(PathBuf),
    /// One that the image cannot do without.
    #[error("no module {name} in {}: is it the folder of this kernel? Debian's linux-image-cloud-amd64 has it", folder.display())]
    Missing {
        /// Which.
        name: String,
        /// Where.
        folder: PathBuf,
    },
    /// It cannot be unpacked.
    #[error("cannot unpack {}: {why}", path.display())]
    Packed {
        /// The module.
        path: PathBuf,
        /// Why not.
        why: String,
    },
}

/// A module.
pub(super) struct Module {
    /// Its name, as `lsmod` shows it.
    pub(super) name: String,
    /// Itself, unpacked.
    pub(super) data: Vec<u8>,
}

/// The modules `needed` and `wanted` of `folder`, and what they need, in the order to load them. What is `wanted` may be missing, and what is
/// built into the kernel is.
///
/// # Errors
/// A needed one is not there, or one cannot be read.
pub(super) fn collect(folder: &Path, needed: &[&str], wanted: &[&str]) -> Result<Vec<Module>, ModuleError> {
    let mut there = BTreeMap::new();
    find(folder, 0, &mut there);
    let built_in = fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
    let built_in: BTreeSet<_> = built_in.lines().filter_map(|line| name_of(Path::new(line))).collect();
    if there.is_empty() && built_in.is_empty() {
        return Err(ModuleError::None(folder.to_owned()));
    }
    let mut order = Vec::new();
    let mut met = BTreeSet::new();
    for name in needed.iter().chain(wanted) {
        if there.contains_key(*name) {
            bring(name, &there, &mut met, &mut order)?;
        } else if needed.contains(name) && !built_in.contains(*name) {
            return Err(ModuleError::Missing { name: (*name).to_owned(), folder: folder.to_owned() });
        }
    }
    Ok(order)
}

/// `name` behind all that it needs. One that is not in the folder is built in.
fn bring(
    name: &str,
    there: &BTreeMap<String, PathBuf>,
    met: &mut BTreeSet<String>,
    order: &mut Vec<Module>,
) -> Result<(), ModuleError> {
    let Some(path) = there.get(name) else { return Ok(()) };
    if !met.insert(name.to_owned()) {
        return Ok(());
    }
    let data = unpack(path).map_err(|why| ModuleError::Packed { path: path.clone(), why })?;
    for other in depends(&data) {
        bring(&other, there, met, order)?;
    }
    order.push(Module { name: name.to_owned(), data });
    Ok(())
}

/// Every module below `folder`.
fn find(folder: &Path, depth: u32, there: &mut BTreeMap<String, PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth < 16 => find(&path, depth + 1, there),
            Ok(kind) if !kind.is_dir() => {
                if let Some(name) = name_of(&path) {
                    there.insert(name, path);
                }
            }
            _ => {}
        }
    }
}

/// The module's name if this is the path of one, packed or not.
fn name_of(path: &Path) -> Option<String> {
    let (name, packed) = path.file_name()?.to_str()?.split_once(".ko")?;
    ["", ".xz", ".zst", ".gz"].contains(&packed).then(|| name.replace('-', "_"))
}

fn unpack(path: &Path) -> Result<Vec<u8>, String> {
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let mut unpacked = Vec::new();
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => {
            lzma_rs::xz_decompress(&mut bytes.as_slice(), &mut unpacked)
                .map_err(|error| error.to_string())?;
        }
        Some("zst") => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(bytes.as_slice());
            let mut decoder = decoder.map_err(|error| error.to_string())?;
            decoder.read_to_end(&mut unpacked).map_err(|error| error.to_string())?;
        }
        Some("gz") => return Err("packed with gzip; unpack the modules first: gunzip".to_owned()),
        _ => unpacked = bytes,
    }
    Ok(unpacked)
}

/// What a module says that it needs.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let text = module.get(at + KEY.len()..).unwrap_or_default();
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(text);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("kernel/net")).unwrap();
        for (file, depends) in modules {
            let module = format!("\x7fELF\0license=GPL\0depends={depends}\0name=x\0");
            let path = folder.path().join("kernel/net").join(file);
            if file.ends_with(".xz") {
                let mut packed = Vec::new();
                lzma_rs::xz_compress(&mut module.as_bytes(), &mut packed).unwrap();
                fs::write(path, packed).unwrap();
            } else {
                fs::write(path, module).unwrap();
            }
        }
        folder
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn a_module_comes_behind_what_it_needs_and_each_comes_once() {
        let folder = folder(&[
            ("virtio_net.ko.xz", "net_failover,virtio"),
            ("net-failover.ko", "failover"),
            ("failover.ko.xz", ""),
            ("virtio_rng.ko", "failover"),
            ("other.ko", ""),
        ]);
        let found = collect(folder.path(), &["virtio_net"], &["virtio_rng", "absent"]).unwrap();
        assert_eq!(names(&found), ["failover", "net_failover", "virtio_net", "virtio_rng"]);
        assert!(found.iter().all(|module| module.data.starts_with(b"\x7fELF")));
    }

    #[test]
    fn modules_that_need_each_other_come_once() {
        let folder = folder(&[("a.ko", "b"), ("b.ko", "a")]);
        assert_eq!(names(&collect(folder.path(), &["a"], &[]).unwrap()), ["b", "a"]);
    }

    #[test]
    fn what_is_missing_is_said_unless_it_is_built_in() {
        let folder = folder(&[("other.ko", "")]);
        let missing = || collect(folder.path(), &["virtio_net"], &[]).map(|_| ());
        assert!(matches!(missing(), Err(ModuleError::Missing { name, .. }) if name == "virtio_net"));
        fs::write(folder.path().join("modules.builtin"), "kernel/drivers/net/virtio_net.ko\n").unwrap();
        assert!(missing().is_ok());
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(collect(empty.path(), &["a"], &[]), Err(ModuleError::None(_))));
    }
}
