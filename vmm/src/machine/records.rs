#![forbid(unsafe_code)]
//! Saved devices as records: a kind, a version, and the device's own saved form.

use super::error::MachineError;
use super::state::DeviceRecord;

/// A record of a device.
pub(super) fn encode(
    kind: &str,
    version: u32,
    state: &impl serde::Serialize,
) -> Result<DeviceRecord, MachineError> {
    let body = postcard::to_stdvec(state).map_err(|e| MachineError::DeviceState {
        kind: kind.to_owned(),
        reason: e.to_string(),
    })?;
    Ok(DeviceRecord {
        kind: kind.to_owned(),
        version,
        body,
    })
}

/// The only record of a kind, decoded.
pub(super) fn decode<T: serde::de::DeserializeOwned>(
    records: &[DeviceRecord],
    kind: &'static str,
    ours: u32,
) -> Result<T, MachineError> {
    let mut matching = records.iter().filter(|record| record.kind == kind);
    let record = matching.next().ok_or_else(|| MachineError::MissingDevice {
        kind: kind.to_owned(),
    })?;
    if matching.next().is_some() {
        return Err(MachineError::DeviceState {
            kind: kind.to_owned(),
            reason: "it is there twice".to_owned(),
        });
    }
    decode_one(record, ours)
}

/// A record of version `ours`, decoded.
pub(super) fn decode_one<T: serde::de::DeserializeOwned>(
    record: &DeviceRecord,
    ours: u32,
) -> Result<T, MachineError> {
    let kind = || record.kind.clone();
    let damaged = |reason: String| MachineError::DeviceState {
        kind: kind(),
        reason,
    };
    if record.version != ours {
        return Err(MachineError::DeviceVersion {
            kind: kind(),
            saved: record.version,
            ours,
        });
    }
    let (state, rest) =
        postcard::take_from_bytes(&record.body).map_err(|e| damaged(e.to_string()))?;
    if rest.is_empty() {
        Ok(state)
    } else {
        Err(damaged(format!("{} bytes too many", rest.len())))
    }
}
