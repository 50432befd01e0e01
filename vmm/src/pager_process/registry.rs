#![forbid(unsafe_code)]
//! Which client is whose: peers choose names, the pager has numbers of its own.

use std::collections::HashMap;
use std::sync::Arc;

use pando_pager::{ClientEvent, ClientId};

use super::outlet::Outlet;
use super::protocol::ClientNews;

/// A connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerId(pub u64);

/// A client as its peer knows it.
#[derive(Debug)]
struct Entry {
    peer: PeerId,
    name: u64,
    outlet: Arc<Outlet>,
    /// What happened before its peer was told that it is served.
    early: Option<Early>,
    /// Whether its peer was told of a page that cannot be had: the first is enough.
    is_poisoned: bool,
}

/// What happened while a client was being attached.
#[derive(Debug, Default)]
struct Early {
    poisoned: Option<String>,
    is_gone: bool,
}

/// All clients.
#[derive(Debug, Default)]
pub(super) struct Registry {
    next: u64,
    entries: HashMap<ClientId, Entry>,
    names: HashMap<(PeerId, u64), ClientId>,
    of_peer: HashMap<PeerId, usize>,
}

impl Registry {
    /// A new client of `peer`; `None` if it has one of that name.
    pub(super) fn begin(
        &mut self,
        peer: PeerId,
        name: u64,
        outlet: &Arc<Outlet>,
    ) -> Option<ClientId> {
        if self.names.contains_key(&(peer, name)) {
            return None;
        }
        let id = ClientId::new(self.next);
        self.next += 1;
        self.names.insert((peer, name), id);
        *self.of_peer.entry(peer).or_default() += 1;
        let entry = Entry {
            peer,
            name,
            outlet: Arc::clone(outlet),
            early: Some(Early::default()),
            is_poisoned: false,
        };
        self.entries.insert(id, entry);
        Some(id)
    }

    /// How many clients a peer has.
    pub(super) fn count(&self, peer: PeerId) -> usize {
        self.of_peer.get(&peer).copied().unwrap_or(0)
    }

    /// It is served: tells its peer, and what has happened since.
    pub(super) fn attached(&mut self, id: ClientId, io: &str) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        let client = entry.name;
        let io = io.to_owned();
        entry
            .outlet
            .tell_client(ClientNews::Attached { client, io });
        let early = entry.early.take().unwrap_or_default();
        if let Some(page) = early.poisoned {
            entry
                .outlet
                .tell_client(ClientNews::Poisoned { client, page });
        }
        if early.is_gone {
            self.gone(id);
        }
    }

    /// The number of a peer's client.
    pub(super) fn find(&self, peer: PeerId, name: u64) -> Option<ClientId> {
        self.names.get(&(peer, name)).copied()
    }

    /// Forgets a client.
    pub(super) fn remove(&mut self, id: ClientId) {
        if let Some(entry) = self.entries.remove(&id) {
            self.names.remove(&(entry.peer, entry.name));
            if let Some(count) = self.of_peer.get_mut(&entry.peer) {
                *count -= 1;
                if *count == 0 {
                    self.of_peer.remove(&entry.peer);
                }
            }
        }
    }

    /// Forgets a peer; gives its clients.
    pub(super) fn remove_peer(&mut self, peer: PeerId) -> Vec<ClientId> {
        let of_peer = self.entries.iter().filter(|(_, entry)| entry.peer == peer);
        let ids: Vec<ClientId> = of_peer.map(|(id, _)| *id).collect();
        ids.iter().for_each(|&id| self.remove(id));
        ids
    }

    /// Tells a peer what the pager says of its client.
    pub(super) fn hear(&mut self, event: &ClientEvent) {
        match event {
            ClientEvent::Poisoned { client, page } => {
                let Some(entry) = self.entries.get_mut(client) else {
                    return;
                };
                if std::mem::replace(&mut entry.is_poisoned, true) {
                    return;
                }
                let page = page.to_string();
                match &mut entry.early {
                    Some(early) => early.poisoned = Some(page),
                    None => {
                        let client = entry.name;
                        entry
                            .outlet
                            .tell_client(ClientNews::Poisoned { client, page });
                    }
                }
            }
            ClientEvent::Gone { client } => self.gone(*client),
            ClientEvent::Touched { .. }
            | ClientEvent::AheadDone { .. }
            | ClientEvent::ShardFailed { .. } => (),
        }
    }

    fn gone(&mut self, id: ClientId) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        if let Some(early) = &mut entry.early {
            early.is_gone = true;
            return;
        }
        let client = entry.name;
        entry.outlet.tell_client(ClientNews::Gone { client });
        self.remove(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clone::control::{Channel, Received};
    use crate::pager_process::outlet::Form;
    use crate::pager_process::protocol::FromPager;
    use pando_pager::{PageIndex, PoisonReason, PoisonedPage};
    use rustix::event::{EventfdFlags, eventfd};

    fn news(channel: &Channel) -> Vec<ClientNews> {
        let mut all = Vec::new();
        while let Ok(Received::Message(FromPager::Client(news), _)) = channel.receive_now() {
            all.push(news);
        }
        all
    }

    #[test]
    fn a_peer_hears_of_its_clients_in_order_and_once() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::new(theirs);
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let outlet = Arc::new(Outlet::new(ours, Form::Program, wake));
        let mut registry = Registry::default();
        let peer = PeerId(3);
        let id = registry.begin(peer, 7, &outlet).unwrap();
        assert_eq!(registry.begin(peer, 7, &outlet), None);
        let page = PoisonedPage {
            image: "ram0".into(),
            page: PageIndex::new(5),
            reason: PoisonReason::NoMemory,
        };
        let poisoned = ClientEvent::Poisoned { client: id, page };
        registry.hear(&poisoned);
        registry.hear(&ClientEvent::Gone { client: id });
        assert!(news(&theirs).is_empty(), "it is not attached yet");
        registry.attached(id, "pread");
        registry.hear(&poisoned);
        let told = news(&theirs);
        assert!(matches!(&told[0], ClientNews::Attached { client: 7, io } if io == "pread"));
        assert!(
            matches!(&told[1], ClientNews::Poisoned { client: 7, page } if page.contains("page 5 of ram0"))
        );
        assert_eq!(told[2..], [ClientNews::Gone { client: 7 }]);
        assert_eq!(registry.count(peer), 0);
        registry.begin(peer, 7, &outlet).unwrap();
        let other = registry.begin(PeerId(4), 7, &outlet).unwrap();
        assert_eq!(registry.remove_peer(peer).len(), 1);
        assert_eq!(registry.find(PeerId(4), 7), Some(other));
    }
}
