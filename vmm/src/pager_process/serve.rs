#![forbid(unsafe_code)]
//! The pager alone, for other VMMs: a listening socket whose peers are not trusted.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pando_pager::image::BackendIndex;
use pando_pager::{FaultCounts, Image, PagerError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen, socket_with,
};
use rustix::process::{Resource, getrlimit};
use thiserror::Error;

use super::hub::{Hub, OrderError};
use super::outlet::{Form, Outlet};
use super::peer::Peer;
use super::protocol::ClientOrder;
use super::registry::PeerId;
use crate::clone::closing::close_elsewhere;
use crate::clone::control::{Channel, ControlError, PagerConfig, Received};
use crate::report::one_line;
use crate::template::{Template, TemplateError};

/// Most peers at once; one more is turned away.
pub const MAX_PEERS: usize = 64;
/// Most clients of one peer, fewer where this process may have few descriptors.
pub const MAX_CLIENTS: usize = 256;
/// Descriptors for everything else: sockets of peers, images, rings.
const DESCRIPTORS_OF_OWN: usize = 256;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// Why nothing can be served.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The socket.
    #[error(
        "cannot {action} socket {}; is its directory there and its path short, and does nobody listen \
         there or have a file of that name?",
        path.display()
    )]
    Socket {
        /// What was tried.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An image.
    #[error("cannot serve {}", path.display())]
    Image {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: pando_pager::ImageError,
    },
    /// A template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The pager.
    #[error("the pager cannot start")]
    Pager(#[from] PagerError),
    /// An image that the pager does not take.
    #[error("the pager does not take {}", path.display())]
    Refused {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: OrderError,
    },
    /// The pager ended.
    #[error("{why}")]
    Failed {
        /// Why.
        why: String,
    },
    /// Waiting.
    #[error("cannot wait for orders")]
    Wait(#[source] io::Error),
}

/// A pager behind a socket, which is removed when this is dropped.
#[derive(Debug)]
pub struct Server {
    hub: Hub,
    listener: OwnedFd,
    socket: BoundSocket,
    peers: BTreeMap<u64, Peer>,
    next_peer: u64,
    /// The images in order: what they are, and how many pages they have.
    images: Vec<(String, u64)>,
}

impl Server {
    /// Opens the images (RAM files, or directories of templates, all of whose backends count) and
    /// listens at `socket`, which only this user may connect to.
    pub fn bind(
        socket: &Path,
        images: &[PathBuf],
        config: &PagerConfig,
    ) -> Result<Self, ServeError> {
        let mut hub = Hub::start(config, clients_of_a_peer(), FaultCounts::Total)?;
        let mut names = Vec::new();
        for path in images {
            for (image, template) in open(path)? {
                let pages = image.index().pages().get();
                names.push((format!("{} of {}", image.id(), path.display()), pages));
                hub.add_image(image, &template).map_err(|source| {
                    let path = path.clone();
                    ServeError::Refused { path, source }
                })?;
            }
        }
        let (listener, socket) = bind_socket(socket)?;
        Ok(Self {
            hub,
            listener,
            socket,
            peers: BTreeMap::new(),
            next_peer: 0,
            images: names,
        })
    }

    /// What the images are, by number, and how many pages they have.
    pub fn images(&self) -> &[(String, u64)] {
        &self.images
    }

    /// Which way messages and bytes take.
    pub fn io(&self) -> &'static str {
        self.hub.io()
    }

    /// Serves until `signals` is readable.
    pub fn run(&mut self, signals: &UnixStream) -> Result<(), ServeError> {
        loop {
            let mut fds = vec![
                PollFd::new(signals, PollFlags::IN),
                PollFd::from_borrowed_fd(self.hub.as_fd(), PollFlags::IN),
                PollFd::new(&self.listener, PollFlags::IN),
            ];
            let others = fds.len();
            for peer in self.peers.values() {
                fds.push(PollFd::from_borrowed_fd(peer.outlet.as_fd(), peer.flags()));
            }
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => (),
                Err(errno) => return Err(ServeError::Wait(errno.into())),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            if ready[0] {
                return Ok(());
            }
            self.hub.clear_wake();
            if let Some(why) = self.hub.failure() {
                return Err(ServeError::Failed { why });
            }
            let news: Vec<u64> = self
                .peers
                .iter()
                .zip(&ready[others..])
                .filter(|((_, peer), ready)| **ready || !peer.outlet.is_clear())
                .map(|((number, _), _)| *number)
                .collect();
            for number in news {
                self.attend(number);
            }
            if ready[2] {
                self.accept();
            }
        }
    }

    fn attend(&mut self, number: u64) {
        let Some(peer) = self.peers.get(&number) else {
            return;
        };
        let hub = &self.hub;
        let outcome = peer.attend(receive, |order, descriptors| {
            hub.obey(peer.id, &peer.outlet, order, descriptors);
        });
        let is_there = outcome.unwrap_or_else(|error| {
            tracing::info!(peer = number, "a peer is dropped: {}", one_line(&error));
            peer.outlet.last_words(one_line(&error));
            false
        });
        if !is_there {
            self.hub.leave(peer.id);
            self.peers.remove(&number);
        }
    }

    /// Takes one connection.
    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = match accept_with(&self.listener, flags) {
            Ok(socket) => socket,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return,
            Err(errno) => {
                // Of descriptors or memory there are none left just now; those who leave give some.
                tracing::warn!("cannot take a connection: {}", io::Error::from(errno));
                std::thread::sleep(std::time::Duration::from_millis(10));
                return;
            }
        };
        let wake = Arc::clone(self.hub.waker());
        let outlet = Outlet::new(Channel::new(socket), Form::Json, wake);
        if self.peers.len() >= MAX_PEERS {
            tracing::warn!(MAX_PEERS, "a peer is turned away");
            outlet.last_words(format!("{MAX_PEERS} peers are served, which is the limit"));
            return;
        }
        let number = self.next_peer;
        self.next_peer += 1;
        let peer = Peer {
            id: PeerId(number),
            outlet: Arc::new(outlet),
        };
        self.peers.insert(number, peer);
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.socket.0
    }
}

/// Most clients of one peer: as many as leave each of the others the same, two descriptors each.
fn clients_of_a_peer() -> usize {
    let limit = getrlimit(Resource::Nofile).current;
    let limit = limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    });
    let left = limit.saturating_sub(DESCRIPTORS_OF_OWN);
    (left / MAX_PEERS / 2).clamp(1, MAX_CLIENTS)
}

/// Takes one order from a peer's socket.
fn receive(outlet: &Outlet) -> Result<Received<ClientOrder>, ControlError> {
    Ok(match outlet.channel().receive_bytes(RecvFlags::DONTWAIT)? {
        Received::Message(bytes, descriptors) => match serde_json::from_slice(&bytes) {
            Ok(order) => Received::Message(order, descriptors),
            Err(error) => {
                close_elsewhere(descriptors);
                let reason = error.to_string();
                return Err(ControlError::Damaged { reason });
            }
        },
        Received::Nothing => Received::Nothing,
        Received::Closed => Received::Closed,
    })
}

/// The images at `path`, with the label of their metrics.
fn open(path: &Path) -> Result<Vec<(Image, String)>, ServeError> {
    if path.is_dir() {
        let template = Template::open(path)?;
        let images = template.images()?.into_iter();
        return Ok(images.map(|image| (image, template.name())).collect());
    }
    let wrong = |source| ServeError::Image {
        path: path.to_owned(),
        source,
    };
    let open = |source| {
        wrong(pando_pager::ImageError::Open {
            path: path.to_owned(),
            source,
        })
    };
    let file = fs::File::open(path).map_err(open)?;
    let bytes = file.metadata().map_err(open)?.len();
    let index = BackendIndex::scan(&file, bytes, &mut |_, _| ()).map_err(wrong)?;
    let name = path.file_name().unwrap_or(path.as_os_str());
    let name = name.to_string_lossy().into_owned();
    let image = Image::open(path, &name, index).map_err(wrong)?;
    Ok(vec![(image, name)])
}

/// A socket in the file system, removed with this.
#[derive(Debug)]
struct BoundSocket(PathBuf);

impl Drop for BoundSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn bind_socket(path: &Path) -> Result<(OwnedFd, BoundSocket), ServeError> {
    let error = |action| {
        move |errno: Errno| ServeError::Socket {
            action,
            path: path.to_owned(),
            source: errno.into(),
        }
    };
    let address = SocketAddrUnix::new(path).map_err(error("name"))?;
    let new = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
    };
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if is_socket {
        let probe = new().map_err(error("make"))?;
        if connect(&probe, &address) == Err(Errno::CONNREFUSED) {
            // Of one that was killed.
            let _ = fs::remove_file(path);
        }
    }
    let listener = new().map_err(error("make"))?;
    // Shards make no files: nobody else is concerned by the mask meanwhile.
    let mask = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let bound = bind(&listener, &address);
    rustix::process::umask(mask);
    bound.map_err(error("bind"))?;
    let socket = BoundSocket(path.to_owned());
    listen(&listener, BACKLOG).map_err(error("listen at"))?;
    Ok((listener, socket))
}
