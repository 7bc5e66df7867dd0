//! The `fastflux` binary.

fn main() {}
