#![forbid(unsafe_code)]
//! What a client is attached with. Not proven yet: see [`super::check`].

use std::fmt;
use std::os::fd::OwnedFd;

use crate::page::PageRange;

/// Most regions of one client: a fork of a root has one per run of holes.
pub const MAX_REGIONS: usize = 4096;

/// Most pages of one order to forget, 1 GiB: it is done at once, while the shard serves nobody.
pub const MAX_FORGOTTEN_PAGES: u64 = 1 << 18;

/// Name of a client; its owner chooses it, each once at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(u64);

impl ClientId {
    /// Client `id`.
    pub const fn new(id: u64) -> Self {
        Self(id)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An image that a pager has: images are counted from 0 in the order in which it was given them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageId(u32);

impl ImageId {
    /// Image number `number`.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn number(self) -> u32 {
        self.0
    }

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image {}", self.0)
    }
}

/// One run of an image's pages in the address space of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientRegion {
    /// Which image.
    pub image: ImageId,
    /// Address of the first page in the client's address space; page aligned.
    pub address: u64,
    /// Which pages of the image lie there, one after the other.
    pub pages: PageRange,
}

impl ClientRegion {
    /// The address behind the last byte; `None` when there is none.
    pub(crate) fn end(&self) -> Option<u64> {
        self.address.checked_add(self.pages.bytes())
    }
}

/// A run of an image's pages: to be absent again, or to be brought before anybody asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageRun {
    /// Of which image.
    pub image: ImageId,
    /// Which pages.
    pub pages: PageRange,
}

/// All that it takes to serve a client. Its memory is registered with `uffd` for missing faults
/// before anything can touch it, and its owner keeps a descriptor of `uffd` until it is unmapped:
/// with the last one closed, missing pages would read as zeros.
#[derive(Debug)]
pub struct ClientSpec {
    /// Its userfaultfd: handshake done, non-blocking, no event but faults asked for.
    pub uffd: OwnedFd,
    /// Becomes readable when its process ends (pidfd_open(2)). Without one, the pager learns of
    /// the end when it next installs a page.
    pub pidfd: Option<OwnedFd>,
    /// What is served where; at least one and at most [`MAX_REGIONS`], none over another.
    pub regions: Vec<ClientRegion>,
    /// Wake who waits in the regions, for they may wait for messages that another pager took.
    pub wake: bool,
    /// The shard to serve it; else the one with the fewest clients.
    pub shard: Option<usize>,
    /// Record its first touches, at most so many; no walk is brought ahead then.
    pub record: Option<usize>,
    /// Pages to bring, in this order and in bounded batches that yield to demand.
    pub ahead: Vec<ImageRun>,
    /// Install pages write-protected, so that the kernel knows which were written: the regions are
    /// registered for write protection too, with UFFD_FEATURE_WP_ASYNC.
    pub track_writes: bool,
    /// The map of the pages that it discards for good (`Registration::discard_map`): of all images of the
    /// pager, which are all that it has.
    pub discards: Option<OwnedFd>,
}

impl ClientSpec {
    /// A client with nothing special about it.
    pub fn new(uffd: OwnedFd, regions: Vec<ClientRegion>) -> Self {
        Self {
            uffd,
            pidfd: None,
            regions,
            wake: false,
            shard: None,
            record: None,
            ahead: Vec::new(),
            track_writes: false,
            discards: None,
        }
    }
}
