#![forbid(unsafe_code)]
//! What is said first: who owns the backend, what it can do, and what its registers hold.

use std::path::Path;

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::error::VhostUserError;
use super::session::{Session, named};

/// That there are protocol features at all.
pub(super) const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// How long a disk's registers are (virtio 1.2, 5.2.4), up to those of zeroes.
pub(super) const BLOCK_CONFIG_BYTES: u32 = 60;
/// Where a disk has its number of sectors, and how large its blocks are.
const BLOCK_BYTES_AT: usize = 20;
/// The largest block that there can be: a page.
const MAX_BLOCK_BYTES: u32 = 4096;

/// Connects to a backend and hears what it can do; `with_config` asks for the registers of a disk.
pub(super) fn open(
    path: &Path,
    queues: u64,
    with_config: bool,
) -> Result<(Session, Vec<u8>), VhostUserError> {
    let mut session = Session::connect(path, queues)?;
    let features = session.ask(|frontend| {
        named("SET_OWNER", frontend.set_owner())?;
        named("GET_FEATURES", frontend.get_features())
    })?;
    if features & PROTOCOL_FEATURES == 0 {
        return Err(session.wrong("has no protocol features: it is too old to be used"));
    }
    if features >> VIRTIO_F_VERSION_1 & 1 == 0 {
        return Err(session.wrong("serves legacy devices only (no VIRTIO_F_VERSION_1)"));
    }
    let mut wanted = VhostUserProtocolFeatures::REPLY_ACK;
    if with_config {
        wanted |= VhostUserProtocolFeatures::CONFIG;
    }
    let protocol = session.ask(|frontend| {
        let offered = named("GET_PROTOCOL_FEATURES", frontend.get_protocol_features())?;
        let protocol = offered & wanted;
        let set = frontend.set_protocol_features(protocol);
        named("SET_PROTOCOL_FEATURES", set)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        Ok(protocol)
    })?;
    (session.features, session.protocol) = (features, protocol);
    if !with_config {
        return Ok((session, Vec::new()));
    }
    if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
        return Err(
            session.wrong("does not say how large its disk is (no CONFIG): it serves no disk")
        );
    }
    let config = session.ask(|frontend| {
        let room = [0; BLOCK_CONFIG_BYTES as usize];
        let flags = VhostUserConfigFlags::empty();
        named(
            "GET_CONFIG",
            frontend.get_config(0, BLOCK_CONFIG_BYTES, flags, &room),
        )
    })?;
    check_config(&session, &config.1)?;
    Ok((session, config.1))
}

/// Refuses registers that no disk has.
fn check_config(session: &Session, config: &[u8]) -> Result<(), VhostUserError> {
    let bytes = config.get(BLOCK_BYTES_AT..BLOCK_BYTES_AT + 4);
    let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
    let block = bytes.map_or(0, u32::from_le_bytes);
    let is_block = block.is_power_of_two() && (512..=MAX_BLOCK_BYTES).contains(&block);
    let sectors = sectors(config);
    if config.len() != BLOCK_CONFIG_BYTES as usize || (block != 0 && !is_block) {
        let (length, wanted) = (config.len(), BLOCK_CONFIG_BYTES);
        return Err(session.wrong(format!(
            "says that its disk has blocks of {block} bytes, in {length} bytes of registers where {wanted} \
             were asked for: no disk is like that"
        )));
    }
    // Guests count bytes in 64 bits, with a sign.
    if sectors > (i64::MAX >> 9).cast_unsigned() {
        return Err(session.wrong(format!(
            "says that its disk has {sectors} sectors: no disk has as many"
        )));
    }
    Ok(())
}

/// How many sectors of 512 bytes a disk has, by its registers.
pub(super) fn sectors(config: &[u8]) -> u64 {
    let bytes = config.get(..8).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u64::from_le_bytes)
}
