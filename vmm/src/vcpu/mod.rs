#![forbid(unsafe_code)]
//! One vCPU: the loop that runs it ([`run`]), the words it uses ([`exit`]), its thread
//! ([`thread`]), and its saved state ([`state`]).

pub mod exit;
pub mod run;
pub mod state;
pub mod thread;
