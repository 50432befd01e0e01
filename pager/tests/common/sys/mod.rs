pub(crate) mod guest;
pub(crate) mod memory;
