//! The `cableway` command.
fn main() {}
