#![forbid(unsafe_code)]
//! The wait without a ring: epoll(7), whose cost does not grow with the clients.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::io::Errno;
use userfaultfd::Uffd;

use crate::port::{Inbox, make_nonblocking};
use crate::token::{ClientSlot, Token};

/// Events taken at once.
const EVENTS: usize = 256;

#[derive(Debug)]
struct Watched {
    uffd: Arc<Uffd>,
    pidfd: Option<Arc<OwnedFd>>,
    is_armed: bool,
}

impl Watched {
    /// What cannot be waited for is a blocking one.
    fn mend(&self) {
        make_nonblocking(&self.uffd);
    }
}

/// An epoll of all clients, the bell and the signal of the reading threads.
pub(crate) struct Poller {
    epoll: OwnedFd,
    /// Readable when a reading thread is done.
    signal: Arc<OwnedFd>,
    places: Vec<Option<Watched>>,
    free: Vec<ClientSlot>,
    events: Vec<Event>,
}

impl fmt::Debug for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let watched = self.places.iter().flatten().count();
        write!(f, "Poller({watched} clients)")
    }
}

impl Poller {
    pub(crate) fn new(bell: &OwnedFd, signal: Arc<OwnedFd>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        add(&epoll, bell, Token::Bell, EventFlags::IN)?;
        add(&epoll, &*signal, Token::Signal, EventFlags::IN)?;
        Ok(Self {
            epoll,
            signal,
            places: Vec::new(),
            free: Vec::new(),
            events: Vec::with_capacity(EVENTS),
        })
    }

    pub(crate) fn watch(
        &mut self,
        uffd: Arc<Uffd>,
        pidfd: Option<Arc<OwnedFd>>,
    ) -> io::Result<ClientSlot> {
        let slot = self.free.pop().unwrap_or_else(|| {
            let next = u32::try_from(self.places.len()).unwrap_or(u32::MAX);
            self.places.push(None);
            ClientSlot::new(next)
        });
        let added = add(&self.epoll, &*uffd, Token::Uffd(slot), EventFlags::empty());
        let added = added.and_then(|()| match &pidfd {
            Some(pidfd) => add(
                &self.epoll,
                &**pidfd,
                Token::Gone(slot),
                EventFlags::IN | EventFlags::ONESHOT,
            ),
            None => Ok(()),
        });
        if let Err(error) = added {
            // A descriptor that was added leaves the epoll when it is closed with its last copy;
            // until then what it says finds nobody in its place.
            let _not_added = epoll::delete(&self.epoll, &*uffd);
            self.free.push(slot);
            return Err(error);
        }
        self.places[slot.index()] = Some(Watched {
            uffd,
            pidfd,
            is_armed: false,
        });
        Ok(slot)
    }

    pub(crate) fn unwatch(&mut self, slot: ClientSlot) {
        let place = self.places.get_mut(slot.index());
        if let Some(watched) = place.and_then(Option::take) {
            let _closed = epoll::delete(&self.epoll, &*watched.uffd);
            if let Some(pidfd) = &watched.pidfd {
                let _closed = epoll::delete(&self.epoll, &**pidfd);
            }
            self.free.push(slot);
        }
    }

    pub(crate) fn arm(&mut self, slot: ClientSlot) -> bool {
        self.set(slot, true)
    }

    pub(crate) fn disarm(&mut self, slot: ClientSlot) {
        self.set(slot, false);
    }

    fn set(&mut self, slot: ClientSlot, armed: bool) -> bool {
        let place = self.places.get_mut(slot.index());
        let Some(watched) = place.and_then(Option::as_mut) else {
            return true;
        };
        if watched.is_armed == armed {
            return true;
        }
        // Level triggered and not one-shot: a wait that goes on costs no call.
        let flags = if armed {
            EventFlags::IN
        } else {
            EventFlags::empty()
        };
        let data = EventData::new_u64(Token::Uffd(slot).encode());
        match epoll::modify(&self.epoll, &*watched.uffd, data, flags) {
            Ok(()) => {
                watched.is_armed = armed;
                true
            }
            Err(error) => {
                tracing::error!(%error, "cannot wait for a userfaultfd");
                false
            }
        }
    }

    pub(crate) fn wait(&mut self, limit: Option<Duration>, inbox: &mut Inbox) -> io::Result<()> {
        let limit = limit.map(|limit| rustix::event::Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        self.events.clear();
        match epoll::wait(
            &self.epoll,
            spare_capacity(&mut self.events),
            limit.as_ref(),
        ) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        for event in &self.events {
            let flags = event.flags;
            match Token::decode(event.data.u64()) {
                Some(Token::Uffd(slot)) => {
                    if flags.contains(EventFlags::ERR) {
                        let place = self.places.get(slot.index());
                        place.into_iter().flatten().for_each(Watched::mend);
                    }
                    inbox.more.push(slot);
                }
                Some(Token::Gone(slot)) => inbox.gone.push(slot),
                Some(Token::Bell) => inbox.bell = true,
                Some(Token::Signal) => _ = rustix::io::read(&self.signal, &mut [0; 8]),
                Some(Token::Cancel | Token::Read(_)) | None => {}
            }
        }
        Ok(())
    }
}

fn add(
    epoll: &OwnedFd,
    fd: impl std::os::fd::AsFd,
    token: Token,
    flags: EventFlags,
) -> io::Result<()> {
    epoll::add(epoll, fd, EventData::new_u64(token.encode()), flags)?;
    Ok(())
}
