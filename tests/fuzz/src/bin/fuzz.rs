#![no_main]
//! libFuzzer around the target that `PANDO_FUZZ_TARGET` names.

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use pando_fuzz::{Target, target};

static TARGET: OnceLock<&'static Target> = OnceLock::new();

fn chosen() -> &'static Target {
    let name = std::env::var("PANDO_FUZZ_TARGET").unwrap_or_default();
    target(&name).unwrap_or_else(|| panic!("PANDO_FUZZ_TARGET names no target: '{name}'"))
}

fuzz_target!(|data: &[u8]| {
    (TARGET.get_or_init(chosen).run)(data);
});
