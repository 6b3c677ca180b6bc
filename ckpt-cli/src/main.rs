//! The `ckpt` binary.
fn main() {}
