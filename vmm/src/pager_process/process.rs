#![forbid(unsafe_code)]
//! A pager process as its supervisor sees it. Nothing here waits for it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use pando_pager::PageCount;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::protocol::{
    ClientOrder, FromPager, PagerStart, RawAttach, RawForget, RawImage, ToPager,
};
use crate::clone::control::{Channel, ControlError, Received};
use crate::clone::process::{ChildProcess, SpawnError};
use crate::template::{Template, TemplateError};

/// The hidden subcommand that a pager process runs.
pub const PAGER_COMMAND: &str = "pager-worker";

/// What a template gives a pager process: all that is needed to start one, and another.
#[derive(Debug)]
pub struct ServedTemplate {
    images: Vec<(RawImage, File, PageCount)>,
    /// The proven index, in memory that nobody can change: the file could have been replaced.
    index: OwnedFd,
}

impl ServedTemplate {
    /// Opens the template in `dir`, and keeps its RAM files open.
    pub fn open(dir: &Path) -> Result<Self, TemplateError> {
        let template = Template::open(dir)?;
        let mut images = Vec::new();
        let backends = template.index().backends().iter();
        for (number, (file, (backend, index))) in
            template.ram_files().iter().zip(backends).enumerate()
        {
            let path = template.ram_path(number);
            let raw = RawImage {
                template: template.name(),
                backend: backend.clone(),
                path: path.display().to_string(),
            };
            let file = file
                .try_clone()
                .map_err(TemplateError::io("open again", &path))?;
            images.push((raw, file, index.pages()));
        }
        let index = sealed(&template.index().encode())
            .map_err(TemplateError::io("keep the index of", dir))?;
        Ok(Self { images, index })
    }

    /// Which backend of the template image `number` is, and how many pages it has.
    pub fn backend(&self, number: u32) -> Option<(u32, PageCount)> {
        // A pager is given the images of one template, in its order.
        Some((number, self.pages(number)?))
    }

    /// How many pages image `number` has.
    pub fn pages(&self, number: u32) -> Option<PageCount> {
        let number = usize::try_from(number).ok()?;
        self.images.get(number).map(|(_, _, pages)| *pages)
    }
}

/// Bytes that whoever has the descriptor can read and nobody can change.
fn sealed(bytes: &[u8]) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(memfd_create("pando-index", flags)?);
    file.write_all(bytes)?;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}

/// A pager process that was started; dropping it ends it. Its clients sleep then at their next missing
/// page, until they are attached to another.
#[derive(Debug)]
pub struct PagerProcess {
    process: ChildProcess,
    channel: Channel,
}

impl PagerProcess {
    /// Starts `program` as a pager of `template`. Must be called on a thread that lives as long as
    /// the pager.
    pub fn start(
        program: &Path,
        start: PagerStart,
        template: &ServedTemplate,
    ) -> Result<Self, SpawnError> {
        let (channel, theirs) = Channel::pair()?;
        // These few fit into the socket before anybody reads.
        let send = |message: &ToPager, descriptors: &[BorrowedFd<'_>]| match channel
            .send_now(message, descriptors)
        {
            Ok(true) => Ok(()),
            Ok(false) => Err(ControlError::Damaged {
                reason: format!("{} images are too many", template.images.len()),
            }),
            Err(error) => Err(error),
        };
        send(&ToPager::Start(start), &[])?;
        for (raw, file, _) in &template.images {
            let descriptors = [file.as_fd(), template.index.as_fd()];
            send(&ToPager::Image(raw.clone()), &descriptors)?;
        }
        let mut command = Command::new(program);
        command
            .arg(PAGER_COMMAND)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null());
        let process = ChildProcess::spawn(&mut command)?;
        Ok(Self { process, channel })
    }

    /// Sends a client to be served; `false` while the pager has too much unread.
    pub fn attach(
        &self,
        client: RawAttach,
        uffd: BorrowedFd<'_>,
        pidfd: BorrowedFd<'_>,
        map: Option<BorrowedFd<'_>>,
    ) -> Result<bool, ControlError> {
        let order = ToPager::Client(ClientOrder::Attach(client));
        let descriptors: Vec<_> = [uffd, pidfd].into_iter().chain(map).collect();
        self.channel.send_now(&order, &descriptors)
    }

    /// Takes a client from it. A message that is lost does no harm: the pager sees that the client
    /// has ended.
    pub fn detach(&self, client: u64) {
        let order = ToPager::Client(ClientOrder::Detach { client });
        let _ = self.channel.send_now(&order, &[]);
    }

    /// Has it bring pages of a client again; `false` while it has too much unread.
    pub fn forget(&self, forget: RawForget) -> Result<bool, ControlError> {
        let order = ToPager::Client(ClientOrder::Forget(forget));
        self.channel.send_now(&order, &[])
    }

    /// Asks it to say what it recorded last and to end; `false` if that cannot be said.
    pub fn ask_to_stop(&self) -> bool {
        self.channel.send_now(&ToPager::Stop, &[]).unwrap_or(false)
    }

    /// The next message, without waiting for it.
    pub fn receive(&self) -> Result<Received<FromPager>, ControlError> {
        self.channel.receive_now()
    }

    /// Becomes readable when there is a message, or the process has ended.
    pub fn channel(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Without its socket, to be ended.
    pub fn into_process(self) -> ChildProcess {
        self.process
    }
}
