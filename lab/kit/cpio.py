"""Initial file systems: newc archives (Linux, Documentation/driver-api/early-userspace/buffer-format.rst), in memory."""
import stat
from pathlib import Path


class Cpio:
    """An archive that grows. Several, one behind the other, are one file system."""

    def __init__(self):
        self.out, self.inode, self.folders = bytearray(), 0, set()

    def add(self, name, mode, data=b"", device=(0, 0)):
        self.inode += 1
        fields = (self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        self.out += b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
        self.out += bytes(-len(self.out) % 4) + data
        self.out += bytes(-len(self.out) % 4)

    def folder(self, name):
        """A folder and those above it, each once."""
        for path in [*reversed(Path(name).parents), Path(name)]:
            if str(path) not in (".", "/") and str(path) not in self.folders:
                self.folders.add(str(path))
                self.add(str(path), stat.S_IFDIR | 0o755)

    def file(self, name, data, executable=False):
        """A file, in folders that are made if need be."""
        self.folder(str(Path(name).parent))
        self.add(name, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def finished(self):
        self.add("TRAILER!!!", 0)
        return bytes(self.out)
