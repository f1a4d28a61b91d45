//! What `--check` says of the files that a process would be held to.

use std::path::PathBuf;

use anyhow::Result;
use host::sandbox::files::{FileAccess, Held};

/// Which files it would be held to. Tried on a thread that ends at once: only the kernel knows how far.
pub(crate) fn files(files: Option<&FileAccess>) -> Result<String> {
    let Some(files) = files else {
        return Ok("open whatever files its user can: `confine_files` is off".to_owned());
    };
    let held = std::thread::scope(|scope| scope.spawn(|| files.confine()).join());
    let held = held.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let list =
        |dirs: &[PathBuf]| dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ");
    let text = format!("read files only beneath {}", list(&files.read));
    let text = match list(&files.sockets) {
        sockets if sockets.is_empty() => text,
        sockets => format!("{text}, make sockets only beneath {sockets}"),
    };
    let text = match list(&files.write) {
        write if write.is_empty() => text,
        write => format!("{text}, write files beneath {write}"),
    };
    let text = match list(&files.devices) {
        devices if devices.is_empty() => text,
        devices => format!("{text}, open {devices}"),
    };
    Ok(match held {
        Held::Fully => text,
        Held::Partly => {
            format!("{text} (this kernel's Landlock is an older one, and holds it to that only in part)")
        }
        Held::NotAtAll => {
            "open whatever files its user can: this kernel has no Landlock to hold it to its own".to_owned()
        }
    })
}
