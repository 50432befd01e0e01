#![forbid(unsafe_code)]
//! One client of a server: its userfaultfd, its regions, its part of everything.

use std::collections::VecDeque;
use std::sync::Arc;

use userfaultfd::Uffd;

use super::ahead::AheadWork;
use super::by_page::ByPage;
use super::served::Served;
use crate::client::{ClientEvent, ClientId, ImageRun};
use crate::fault::Message;
use crate::health::{Health, PoisonMethod, PoisonedPage};
use crate::page::{PageIndex, PageRange};
use crate::queue::ClientKey;
use crate::record::Recorder;
use crate::shared::Listener;
use crate::sys::userfaultfd::Tracking;
use crate::token::ClientSlot;

/// Who hears of a client's troubles.
#[derive(Clone)]
pub(crate) enum Tells {
    /// The owner of a pager of this process.
    Health(Health),
    /// The owner of a shared pager.
    Listener(Listener),
}

impl std::fmt::Debug for Tells {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Health(_) => "Health",
            Self::Listener(_) => "Listener",
        })
    }
}

impl Tells {
    pub(super) fn poisoned(&self, client: ClientId, page: &PoisonedPage) {
        match self {
            Self::Health(health) => health.report(page),
            Self::Listener(_) => self.tell(ClientEvent::Poisoned {
                client,
                page: page.clone(),
            }),
        }
    }

    pub(super) fn tell(&self, event: ClientEvent) {
        if let Self::Listener(listener) = self {
            listener(event);
        }
    }
}

/// A client as a server is given it.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) id: ClientId,
    pub(crate) uffd: Arc<Uffd>,
    /// By address, none over another.
    pub(crate) regions: Vec<Served>,
    by_page: ByPage,
    pub(crate) tells: Tells,
    pub(crate) poison: PoisonMethod,
    pub(crate) tracking: Tracking,
    pub(crate) recorder: Option<Recorder>,
    pub(super) ahead: AheadWork,
    /// Messages that are not handled yet.
    pub(super) pending: VecDeque<Message>,
    /// It is among those whose messages are to be handled.
    pub(super) in_turn: bool,
    /// Reads in flight that were started for it.
    pub(super) reads: usize,
    /// The room for its faults was used up when the loop last looked.
    pub(super) was_full: bool,
    /// It waits to be armed again.
    pub(super) is_unarmed: bool,
}

impl Client {
    pub(crate) fn new(
        id: ClientId,
        uffd: Arc<Uffd>,
        mut regions: Vec<Served>,
        tells: Tells,
    ) -> Self {
        regions.sort_by_key(|served| served.region().base());
        Self {
            by_page: ByPage::new(&regions),
            id,
            uffd,
            regions,
            tells,
            poison: PoisonMethod::Marker,
            tracking: Tracking::Off,
            recorder: None,
            ahead: AheadWork::default(),
            pending: VecDeque::new(),
            in_turn: false,
            reads: 0,
            was_full: false,
            is_unarmed: false,
        }
    }

    /// Takes over a plan, in pieces of its regions; at most `limit` pages of it.
    pub(crate) fn plan(&mut self, runs: &[ImageRun], limit: u64) {
        let pieces = runs
            .iter()
            .flat_map(|run| self.parts_of(run.image.index(), run.pages));
        self.ahead = AheadWork::new(pieces, limit);
    }

    /// The region and page at `address`.
    pub(super) fn page_at(&self, address: u64) -> Option<(u32, PageIndex)> {
        let behind = self
            .regions
            .partition_point(|served| served.region.base() <= address);
        let at = behind.checked_sub(1)?;
        let page = self.regions[at].region.page_at(address)?;
        Some((u32::try_from(at).ok()?, page))
    }

    /// The parts of an image's `pages` that lie in its regions, with their regions.
    pub(super) fn parts_of(&self, image: usize, pages: PageRange) -> Vec<(u32, PageRange)> {
        self.by_page.parts(&self.regions, image, pages)
    }
}

/// All clients of a server, by the place that the port gave them.
#[derive(Debug, Default)]
pub(super) struct Clients {
    places: Vec<Option<(u32, Client)>>,
    generation: u32,
    count: usize,
}

impl Clients {
    /// Puts a client in its place.
    pub(super) fn put(&mut self, slot: ClientSlot, client: Client) -> ClientKey {
        if self.places.len() <= slot.index() {
            self.places.resize_with(slot.index() + 1, || None);
        }
        self.generation = self.generation.wrapping_add(1);
        self.places[slot.index()] = Some((self.generation, client));
        self.count += 1;
        ClientKey {
            slot,
            generation: self.generation,
        }
    }

    pub(super) fn get(&self, key: ClientKey) -> Option<&Client> {
        let (generation, client) = self.places.get(key.slot.index())?.as_ref()?;
        (*generation == key.generation).then_some(client)
    }

    pub(super) fn get_mut(&mut self, key: ClientKey) -> Option<&mut Client> {
        let (generation, client) = self.places.get_mut(key.slot.index())?.as_mut()?;
        (*generation == key.generation).then_some(client)
    }

    /// Who is in a place now.
    pub(super) fn at(&self, slot: ClientSlot) -> Option<ClientKey> {
        let (generation, _) = self.places.get(slot.index())?.as_ref()?;
        Some(ClientKey {
            slot,
            generation: *generation,
        })
    }

    pub(super) fn remove(&mut self, key: ClientKey) -> Option<Client> {
        self.get(key)?;
        let (_, client) = self.places.get_mut(key.slot.index())?.take()?;
        self.count -= 1;
        Some(client)
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Everybody.
    pub(super) fn keys(&self) -> Vec<ClientKey> {
        let places = (0u32..).zip(&self.places);
        places
            .filter_map(|(at, place)| {
                let (generation, _) = place.as_ref()?;
                Some(ClientKey {
                    slot: ClientSlot::new(at),
                    generation: *generation,
                })
            })
            .collect()
    }
}
