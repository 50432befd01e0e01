//! What one can see: metrics for Prometheus, figures for tables, logs.
//!
//! A clone's process records into a [`relay`]; its supervisor takes the differences in, feeds the
//! exporter of [`metrics`] with them and keeps [`stats`] for its own table.

pub mod log;
pub mod memory;
pub mod metrics;
pub mod pressure;
pub mod relay;
pub mod series;
pub mod stats;
