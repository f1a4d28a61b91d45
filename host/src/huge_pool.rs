//! Changing how many huge pages the kernel sets aside.
//!
//! Owns the one write that does it; who had how many before, and who gives them back, is the caller's business.

use std::io::{self, Write};
use std::path::Path;
use std::{fmt, fs};

/// Sets aside so many huge pages of `page_size` bytes on `node`, in place of those that there are; returns how many there are
/// then: the kernel gives what it finds in one piece, which may be fewer
/// (Linux, Documentation/admin-guide/mm/hugetlbpage.rst).
///
/// # Errors
/// There is no such pool, or it must not be changed.
pub fn set(root: &Path, node: u32, page_size: u64, pages: u64) -> io::Result<u64> {
    let name = format!("hugepages-{}kB", page_size >> 10);
    let of_node = root.join(format!("sys/devices/system/node/node{node}/hugepages")).join(&name);
    // A kernel without memory nodes has one pool, which counts as that of node 0.
    let whole = root.join("sys/kernel/mm/hugepages").join(&name);
    let folder = if of_node.is_dir() || node > 0 { of_node } else { whole };
    let file = folder.join("nr_hugepages");
    let naming = |error: io::Error| io::Error::new(error.kind(), Failed(file.display().to_string(), error));
    let mut open = fs::OpenOptions::new().write(true).truncate(true).open(&file).map_err(naming)?;
    open.write_all(pages.to_string().as_bytes()).map_err(naming)?;
    let now = fs::read_to_string(&file).map_err(naming)?;
    now.trim().parse().map_err(|_| naming(io::Error::new(io::ErrorKind::InvalidData, "is no count")))
}

/// An error with the file that it is about.
#[derive(Debug)]
struct Failed(String, io::Error);

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0, self.1)
    }
}

impl std::error::Error for Failed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_set_where_it_is_and_nowhere_else() {
        let root = tempfile::tempdir().unwrap();
        let pool = |folder: &str| {
            let folder = root.path().join(folder).join("hugepages-2048kB");
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("nr_hugepages"), "128\n").unwrap();
            folder.join("nr_hugepages")
        };
        let whole = pool("sys/kernel/mm/hugepages");
        let of_node = pool("sys/devices/system/node/node1/hugepages");
        assert_eq!(set(root.path(), 1, 2 << 20, 32).unwrap(), 32);
        assert_eq!(
            (fs::read_to_string(&of_node).unwrap(), fs::read_to_string(&whole).unwrap().trim()),
            ("32".into(), "128")
        );
        // Without a folder for node 0 the kernel's one pool is meant.
        assert_eq!(set(root.path(), 0, 2 << 20, 7).unwrap(), 7);
        assert_eq!(fs::read_to_string(&whole).unwrap(), "7");
        let missing = set(root.path(), 1, 1 << 30, 1).unwrap_err();
        assert!(
            missing.to_string().contains("node1/hugepages/hugepages-1048576kB/nr_hugepages"),
            "{missing}"
        );
    }
}
