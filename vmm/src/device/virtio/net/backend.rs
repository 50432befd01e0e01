#![forbid(unsafe_code)]
//! The other end of a network device: a tap of the host, maybe in a network namespace of its own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use thiserror::Error;

use super::request::HEAD_BYTES;
use crate::spec::{Limits, MacAddress, TapSpec};
use crate::sys::tap::{self, Offload};

/// Where `ip netns` keeps namespaces that have a name.
const NAMESPACES: &str = "/run/netns";
/// Where taps come from.
const TUN: &str = "/dev/net/tun";

/// Why there is no tap.
#[derive(Debug, Error)]
pub enum TapError {
    /// The namespace cannot be entered.
    #[error("cannot enter the network namespace {}", path.display())]
    Namespace {
        /// Its file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is no such interface.
    #[error("there is no tap {tap}: make it first (ip tuntap add dev NAME mode tap)")]
    Missing {
        /// Which.
        tap: TapSpec,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It cannot be had.
    #[error(
        "cannot attach to the tap {tap}: it may be in use, of another kind, or of another user"
    )]
    Attach {
        /// Which.
        tap: TapSpec,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A tap.
#[derive(Debug, Clone)]
pub struct Tap {
    descriptor: Arc<OwnedFd>,
}

impl Tap {
    /// Attaches to a tap that exists. Until the last clone of this goes nobody else can have it.
    pub fn open(spec: &TapSpec) -> Result<Self, TapError> {
        let Some(namespace) = spec.namespace() else {
            return Self::open_here(spec);
        };
        let path = Path::new(NAMESPACES).join(namespace);
        let wrong = |source| TapError::Namespace {
            path: path.clone(),
            source,
        };
        // A thread of its own goes there, and ends there.
        let opened = thread::scope(|scope| {
            let inside = thread::Builder::new().spawn_scoped(scope, || {
                let file = File::open(&path).map_err(wrong)?;
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(file.as_fd(), kind).map_err(|e| wrong(e.into()))?;
                Self::open_here(spec)
            });
            inside.map(thread::ScopedJoinHandle::join)
        });
        match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(_)) => Err(wrong(io::ErrorKind::Other.into())),
            Err(source) => Err(wrong(source)),
        }
    }

    fn open_here(spec: &TapSpec) -> Result<Self, TapError> {
        let missing = |source| TapError::Missing {
            tap: spec.clone(),
            source,
        };
        let attach = |source| TapError::Attach {
            tap: spec.clone(),
            source,
        };
        let socket = socket(AddressFamily::UNIX, SocketType::DGRAM, None);
        let socket = socket.map_err(|errno| missing(errno.into()))?;
        // Attaching to a name that is none would make an interface that leads nowhere.
        name_to_index(&socket, spec.name()).map_err(|errno| missing(errno.into()))?;
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(TUN, flags, rustix::fs::Mode::empty());
        let file = file.map_err(|errno| attach(errno.into()))?;
        let header = u8::try_from(HEAD_BYTES).unwrap_or_default();
        tap::attach(file.as_fd(), spec.name(), header).map_err(attach)?;
        // It keeps what the one before could do.
        tap::set_offload(file.as_fd(), Offload::default()).map_err(attach)?;
        Ok(Self {
            descriptor: Arc::new(file),
        })
    }

    /// Readable when a packet waits.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.descriptor)
    }

    /// Says what the guest can do with packets.
    pub fn set_offload(&self, offload: Offload) -> io::Result<()> {
        tap::set_offload(self.descriptor.as_fd(), offload)
    }

    /// The next packet with its header; 0 where none waits. What does not fit is lost.
    pub fn read(&self, packet: &mut [u8]) -> io::Result<usize> {
        match rustix::io::read(&self.descriptor, packet) {
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            read => Ok(read?),
        }
    }

    /// Sends a packet with its header.
    pub fn write(&self, packet: &[u8]) -> io::Result<()> {
        rustix::io::write(&self.descriptor, packet)?;
        Ok(())
    }
}

/// What a device is connected to on this host.
#[derive(Debug, Clone, Default)]
pub struct NetConnection {
    /// The other end; none is a device without a cable.
    pub tap: Option<Tap>,
    /// The device's hardware address, where it is not the one that it has.
    pub mac: Option<MacAddress>,
    /// How fast packets go, where that is not as the device has it.
    pub limits: Option<Limits>,
}

/// Where a connection waits for its device to take it: a machine may be made before it is known.
#[derive(Debug, Clone, Default)]
pub struct NetPort(Arc<Mutex<Option<NetConnection>>>);

impl NetPort {
    /// Puts a connection there.
    pub fn put(&self, connection: NetConnection) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
    }

    /// Takes what was put there since the last time.
    pub fn take(&self) -> Option<NetConnection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
