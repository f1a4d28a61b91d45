//! How a running machine is asked and told: the paths and answers of its control socket.
//!
//! Owns the socket's name and its paths ([`routes`]), and the types of all answers ([`report`]). Everything is answered from
//! [`crate::life::Life`] in bounded time; no vCPU ever waits for a client.

pub mod report;
mod routes;

use std::path::{Path, PathBuf};

use control::Door;

pub use routes::{NEXT, openapi, router};

/// Around a machine's name, in the run directory.
const PREFIX: &str = "vm-";
const SUFFIX: &str = ".sock";

/// Where the machine `name` is asked.
pub fn door(run_dir: &Path, name: &str) -> Door {
    let dir = run_dir.display();
    Door {
        socket: run_dir.join(format!("{PREFIX}{name}{SUFFIX}")),
        what: format!("machine `{name}`"),
        absent: format!(
            "no machine `{name}` is running in {dir}: cableway vm list shows those that are, --run-dir says where"
        ),
        taken: "end it first, or give this one another name (--name) or --run-dir",
    }
}

/// The names of all machines that have, or had, a control socket in `run_dir`.
///
/// # Errors
/// The directory cannot be read.
pub fn names(run_dir: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(run_dir)? {
        let path = PathBuf::from(entry?.file_name());
        let name = path.to_str().and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX));
        names.extend(name.map(str::to_owned));
    }
    names.sort_unstable();
    Ok(names)
}
