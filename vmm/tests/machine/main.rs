//! Whole machines on real KVM, with a guest of a few hundred bytes ([`program`]).

#[cfg(test)]
mod discards;
#[cfg(test)]
mod hotplug;
#[cfg(test)]
mod lifecycle;
#[cfg(test)]
mod memory_error;
#[cfg(test)]
mod pci;
#[cfg(test)]
mod program;
#[cfg(test)]
mod save_restore;
#[cfg(test)]
mod support;
#[cfg(test)]
mod timer;
#[cfg(test)]
mod vsock;
