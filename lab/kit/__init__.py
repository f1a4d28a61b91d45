"""What the lab's programs share: building kernels and file systems for its machines."""
