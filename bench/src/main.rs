//! The `pando-bench` command.

fn main() {}
