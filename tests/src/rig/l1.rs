#![forbid(unsafe_code)]
//! One boot of the outer machine with one scenario.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity};

use super::console::{Ended, Line, Report};
use super::initramfs::Archive;
use super::packages::{self, Kernel, Series};

/// Lines of the console that a failure's message shows.
const TAIL_LINES: usize = 40;
/// A console that says nothing for so long is one of an emulator that hangs (docs/pager.md): no wait of
/// a scenario is longer than 300 s.
const SILENCE: Duration = Duration::from_secs(360);
/// How long L1 may take to power off after its scenario's end.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(20);
/// Room for L1's own kernel and files beside what the scenario needs.
const DEFAULT_MEMORY_MIB: u32 = 3072;
const DEFAULT_ACCELERATOR: &str = "tcg,thread=multi";
const DEFAULT_CPU: &str = "max,+svm";
/// With two, the emulator's threads race: guests triple-fault, and L1 itself panics, now and then
/// (docs/pager.md, "The nested rig").
const DEFAULT_CPUS: u32 = 1;
const DEFAULT_LIMIT: Duration = Duration::from_secs(300);

/// An outer machine to be booted.
///
/// In it are: `/bin` with busybox, the guest's `/rig/vmlinuz` and `/rig/initrd`, and what is added here.
#[derive(Debug)]
pub struct L1 {
    name: String,
    series: Series,
    memory_mib: u32,
    limit: Duration,
    echo: bool,
    accelerator: String,
    cpu: String,
    cpus: u32,
    programs: Vec<(PathBuf, String)>,
    files: Vec<(PathBuf, String)>,
}

impl L1 {
    /// A machine with a kernel of `series`; `name` names the run and its console log.
    pub fn new(name: &str, series: Series) -> Self {
        Self {
            name: name.to_owned(),
            series,
            memory_mib: DEFAULT_MEMORY_MIB,
            limit: DEFAULT_LIMIT,
            echo: false,
            accelerator: DEFAULT_ACCELERATOR.to_owned(),
            cpu: DEFAULT_CPU.to_owned(),
            cpus: DEFAULT_CPUS,
            programs: Vec::new(),
            files: Vec::new(),
        }
    }

    /// Its memory; what it does not touch costs nothing here.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// The run is ended after this time.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Prints the console while the run goes on.
    #[must_use]
    pub fn echo(mut self) -> Self {
        self.echo = true;
        self
    }

    /// Another accelerator of the emulator, as its `-accel` takes it.
    #[must_use]
    pub fn accelerator(mut self, accelerator: &str) -> Self {
        accelerator.clone_into(&mut self.accelerator);
        self
    }

    /// Another processor, as the emulator's `-cpu` takes it; it must offer SVM.
    #[must_use]
    pub fn cpu(mut self, cpu: &str) -> Self {
        cpu.clone_into(&mut self.cpu);
        self
    }

    /// Another number of processors.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Adds a program with the shared libraries that it needs.
    #[must_use]
    pub fn program(mut self, from: &Path, to: &str) -> Self {
        self.programs.push((from.to_path_buf(), to.to_owned()));
        self
    }

    /// Adds a file as it is.
    #[must_use]
    pub fn file(mut self, from: &Path, to: &str) -> Self {
        self.files.push((from.to_path_buf(), to.to_owned()));
        self
    }

    /// Boots, runs the scenario (shell text, with the functions of `tests/rig/l1-lib.sh`), and gives
    /// what it reported.
    ///
    /// # Errors
    /// When the machine cannot be put together or started. A scenario that fails, hangs or kills L1
    /// is a report, not an error.
    pub fn run(&self, scenario: &str) -> Result<Report> {
        let qemu = packages::qemu()?;
        let kernel = Kernel::find(self.series)?;
        let folder = super::work_folder()?;
        let log = folder.join(format!("{}.log", self.name));
        let image = folder.join(format!("{}.img", self.name));
        fs::write(&image, self.archive(&kernel, scenario)?)
            .with_context(|| format!("cannot write {}", image.display()))?;
        let report = self.boot(qemu, &kernel, &image, &log);
        fs::remove_file(&image).with_context(|| format!("cannot remove {}", image.display()))?;
        report
    }

    fn archive(&self, kernel: &Kernel, scenario: &str) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        archive.host_file(&packages::busybox()?, "/bin/busybox", true)?;
        archive.file("/init", include_bytes!("../../rig/l1-init.sh"), true)?;
        archive.file("/rig/lib.sh", include_bytes!("../../rig/l1-lib.sh"), false)?;
        archive.file("/rig/scenario.sh", scenario.as_bytes(), false)?;
        let guest = Archive::guest(&kernel.guest_modules)?;
        archive.file("/rig/initrd", &guest.finish()?, false)?;
        archive.host_file(&kernel.image, "/rig/vmlinuz", false)?;
        for (name, content) in &kernel.modules {
            archive.file(&format!("/lib/modules/{name}.ko"), content, false)?;
        }
        for (from, to) in &self.programs {
            archive.program(from, to)?;
        }
        for (from, to) in &self.files {
            archive.host_file(from, to, false)?;
        }
        archive.finish()
    }

    fn boot(&self, qemu: &str, kernel: &Kernel, image: &Path, log: &Path) -> Result<Report> {
        let memory = format!("{}m", self.memory_mib);
        // setpriv (util-linux): the emulator goes when the thread that started it goes, however
        // that ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if self.cpus == 1 {
            command.args(["taskset", "-c", &host_cpu()?.to_string()]);
        }
        let child = command
            .args([qemu, "-nodefaults", "-no-user-config"])
            .args([
                "-vga", "none", "-display", "none", "-serial", "stdio", "-nic", "none",
            ])
            .args([
                "-accel",
                &self.accelerator,
                "-cpu",
                &self.cpu,
                "-smp",
                &self.cpus.to_string(),
                "-m",
                &memory,
            ])
            .arg("-no-reboot")
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(image)
            .args(["-append", "console=ttyS0 quiet panic=-1 nosoftlockup"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run setpriv: install the package util-linux")?;
        let mut emulator = Emulator(child);
        let lines = emulator.lines()?;
        let mut console = Console::new(log, self.echo)?;
        let began = Instant::now();
        let ended = console.follow(&lines, began + self.limit);
        let ended = match ended {
            Some(Ended::Done) => {
                // Only to have the last words in the log; ended either way.
                let _ = console.follow(&lines, Instant::now() + POWER_OFF_LIMIT);
                Ended::Done
            }
            Some(other) => other,
            None if began.elapsed() >= self.limit => Ended::TimedOut(self.limit.as_secs()),
            None => Ended::Silent(SILENCE.as_secs()),
        };
        let status = emulator.end();
        let ended = match ended {
            Ended::Died(_) => Ended::Died(status),
            other => other,
        };
        Ok(console.report(ended))
    }
}

/// The processor of this host that has all threads of an emulator: side by side they lose interrupts
/// (docs/pager.md, "The nested rig"). Emulators that run at the same time have different ones.
fn host_cpu() -> Result<usize> {
    let allowed = sched_getaffinity(None).context("cannot ask on which processors this runs")?;
    let mut cpus: Vec<usize> = (0..CpuSet::MAX_CPU).collect();
    cpus.retain(|&cpu| allowed.is_set(cpu));
    // The runner numbers what it runs at the same time; by hand there is one.
    let slot = std::env::var("NEXTEST_TEST_GROUP_SLOT").ok();
    let slot: usize = slot.and_then(|slot| slot.parse().ok()).unwrap_or(0);
    let cpu = cpus.get(slot.checked_rem(cpus.len()).unwrap_or(0));
    cpu.copied().context("this process may run on no processor")
}

/// The emulator's process; never outlives this value.
#[derive(Debug)]
struct Emulator(Child);

impl Emulator {
    /// Everything that it prints, line by line; the channel ends with the process.
    fn lines(&mut self) -> Result<Receiver<String>> {
        let (sender, receiver) = channel();
        let out = self.0.stdout.take().context("the emulator has no output")?;
        let err = self
            .0
            .stderr
            .take()
            .context("the emulator has no error output")?;
        let errors = sender.clone();
        thread::spawn(move || forward(BufReader::new(out), |line| sender.send(line).is_ok()));
        thread::spawn(move || forward(BufReader::new(err), |line| errors.send(line).is_ok()));
        Ok(receiver)
    }

    /// Ends it, if it has not ended itself, and says how it ended.
    fn end(&mut self) -> String {
        if let Ok(Some(status)) = self.0.try_wait() {
            return status.to_string();
        }
        // Both can only fail when it has ended meanwhile.
        let _ = self.0.kill();
        self.0
            .wait()
            .map_or_else(|error| error.to_string(), |status| status.to_string())
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.end();
    }
}

fn forward(mut from: impl BufRead, send: impl Fn(String) -> bool) {
    let mut line = Vec::new();
    while from
        .read_until(b'\n', &mut line)
        .is_ok_and(|bytes| bytes > 0)
    {
        if !send(String::from_utf8_lossy(&line).trim_end().to_owned()) {
            return;
        }
        line.clear();
    }
}

/// The console as it comes in: to the log, to the report, and to the terminal when asked.
struct Console {
    log: File,
    path: PathBuf,
    echo: bool,
    report: Vec<super::Check>,
    tail: VecDeque<String>,
}

impl Console {
    fn new(path: &Path, echo: bool) -> Result<Self> {
        let log = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
        let tail = VecDeque::with_capacity(TAIL_LINES);
        Ok(Self {
            log,
            path: path.to_path_buf(),
            echo,
            report: Vec::new(),
            tail,
        })
    }

    /// Follows until the scenario's end, the emulator's, or the deadline or a long silence (nothing).
    fn follow(&mut self, lines: &Receiver<String>, deadline: Instant) -> Option<Ended> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match lines.recv_timeout(left.min(SILENCE)) {
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => return Some(Ended::Died(String::new())),
                Ok(line) => match self.line(line) {
                    Line::Done => return Some(Ended::Done),
                    Line::Check(check) => self.report.push(check),
                    Line::Other => {}
                },
            }
        }
    }

    fn line(&mut self, line: String) -> Line {
        // A full disk must not end the run: the report does not depend on the log.
        let _ = writeln!(self.log, "{line}");
        if self.echo {
            let _ = writeln!(std::io::stdout(), "{line}");
        }
        let parsed = Line::parse(&line);
        if self.tail.len() == TAIL_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(line);
        parsed
    }

    fn report(self, ended: Ended) -> Report {
        Report {
            checks: self.report,
            ended,
            log: self.path,
            tail: self.tail.into(),
        }
    }
}
