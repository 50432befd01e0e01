#![forbid(unsafe_code)]
//! What others ask of a shard, and the end of clients.

use std::io;
use std::os::fd::OwnedFd;

use crossbeam::channel::Sender;

use super::Server;
use super::client::Client;
use crate::client::{ClientEvent, ClientId, ImageRun, MAX_FORGOTTEN_PAGES, SpecError};
use crate::port::IoPath;
use crate::queue::{ClientKey, RegionKey};
use crate::working_set::Trace;

/// A client to be served. Everything about it is proven.
#[derive(Debug)]
pub(crate) struct Attach {
    pub(crate) client: Client,
    pub(crate) pidfd: Option<OwnedFd>,
    /// Wake who waits in its memory.
    pub(crate) wake: bool,
}

/// How a server is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// When all faults that were raised until now are answered.
    WhenAnswered,
    /// Now: faults stay in the kernel.
    AtOnce,
}

/// What a shard can be asked. Each is answered when it is in force; a shard that ended drops the
/// sender instead.
#[derive(Debug)]
pub(crate) enum Command {
    Attach(Box<Attach>, Sender<Result<IoPath, SpecError>>),
    Forget(ClientId, Vec<ImageRun>, Sender<Result<(), SpecError>>),
    Detach(ClientId, Sender<()>),
    Trace(ClientId, Sender<Option<Trace>>),
    Stop(Stop),
}

impl Server {
    /// Does what was asked since the bell last rang.
    pub(super) fn obey(&mut self) {
        if !std::mem::take(&mut self.inbox.bell) {
            return;
        }
        // Before the commands are taken: who rings later is heard later.
        let _silent = rustix::io::read(&self.parts.bell, &mut [0; 8]);
        while let Ok(command) = self.parts.commands.try_recv() {
            match command {
                Command::Attach(attach, reply) => {
                    let answer = self.attach(*attach);
                    let _caller_gone = reply.send(answer);
                }
                Command::Forget(id, runs, reply) => {
                    let _caller_gone = reply.send(self.forget(id, &runs));
                }
                Command::Detach(id, reply) => {
                    if let Some(&key) = self.ids.get(&id) {
                        self.remove(key);
                        (self.parts.on_gone)(id);
                    }
                    let _caller_gone = reply.send(());
                }
                Command::Trace(id, reply) => {
                    let client = self.ids.get(&id).and_then(|&key| self.clients.get(key));
                    let trace = client.and_then(|client| client.recorder.as_ref());
                    let _caller_gone = reply.send(trace.map(crate::record::Recorder::trace));
                }
                Command::Stop(stop) => {
                    self.stopping = Some(stop);
                    for key in self.clients.keys() {
                        self.parts.port.disarm(key.slot);
                    }
                }
            }
        }
    }

    /// Serves a client from now on.
    pub(crate) fn attach(&mut self, attach: Attach) -> Result<IoPath, SpecError> {
        let Attach {
            client,
            pidfd,
            wake,
        } = attach;
        let limit = self.parts.budget.clients.max(1);
        if self.clients.len() >= limit {
            return Err(SpecError::Full { limit });
        }
        if self.ids.contains_key(&client.id) {
            return Err(SpecError::Duplicate);
        }
        let id = client.id;
        let wrong = |source| SpecError::Uffd {
            what: "it cannot be waited for",
            source,
        };
        let slot = self.parts.port.watch(&client.uffd, pidfd).map_err(wrong)?;
        for served in &client.regions {
            let image = served.image();
            let file = image.image().file();
            self.parts.port.add_file(image.number(), file);
        }
        let has_plan = client.ahead.has_left();
        let regions = client.regions.len();
        let key = self.clients.put(slot, client);
        self.ids.insert(id, key);
        if has_plan {
            self.planned.push_back(key);
        }
        if let Err(error) = self.settle(key) {
            self.remove(key);
            return Err(wrong(error));
        }
        if wake {
            // Messages that another pager took are not delivered again: who waits must ask again.
            for region in (0..regions).filter_map(|number| u32::try_from(number).ok()) {
                let region = RegionKey {
                    client: key,
                    region,
                };
                if let Some(served) = self.served(region) {
                    self.wake(region, served.region.pages());
                }
            }
        }
        Ok(self.path())
    }

    /// Arms the first wait for a client's messages and looks what becomes of it: a READ that says
    /// EAGAIN at once is not tried again. Messages of threads that were early are kept.
    fn settle(&mut self, key: ClientKey) -> io::Result<()> {
        if !self.parts.port.arm(key.slot) {
            return Err(io::Error::from(io::ErrorKind::ResourceBusy));
        }
        self.goes_on = true;
        self.parts.port.look(&mut self.inbox)
    }

    /// All of `runs`, or nothing.
    fn forget(&mut self, id: ClientId, runs: &[ImageRun]) -> Result<(), SpecError> {
        let key = *self.ids.get(&id).ok_or(SpecError::Unknown)?;
        let client = self.clients.get_mut(key).ok_or(SpecError::Unknown)?;
        let mut parts = Vec::new();
        let mut pages = 0;
        for run in runs {
            let of_run = client.parts_of(run.image.index(), run.pages);
            pages += of_run
                .iter()
                .map(|(_, part)| part.count().get())
                .sum::<u64>();
            if pages > MAX_FORGOTTEN_PAGES {
                return Err(SpecError::TooManyForgotten { pages });
            }
            parts.extend(of_run);
        }
        for (region, pages) in parts {
            client.regions[region as usize].forget(pages);
        }
        Ok(())
    }

    /// Forgets the clients that are gone, and says so.
    pub(super) fn drop_lost(&mut self) {
        while let Some(key) = self.lost.pop() {
            if let Some(client) = self.remove(key) {
                tracing::debug!(client = %client.id, "a client is gone");
                (self.parts.on_gone)(client.id);
                client.tells.tell(ClientEvent::Gone { client: client.id });
            }
        }
    }

    /// Serves a client no longer. Reads that are under way for it find nobody.
    fn remove(&mut self, key: ClientKey) -> Option<Client> {
        let mut client = self.clients.remove(key)?;
        self.ids.remove(&client.id);
        self.parts.port.unwatch(key.slot);
        // The next client may get the place before the inbox is looked at.
        self.inbox.forget(key.slot);
        self.queue.remove_client(key);
        self.settle_accounts(&mut client);
        if let Some(recorder) = &client.recorder {
            client.tells.tell(ClientEvent::Touched {
                client: client.id,
                trace: recorder.trace(),
            });
        }
        Some(client)
    }
}
