#![forbid(unsafe_code)]
//! `pando clone --check-unique`: asks a root shell in two clones who they are, and compares.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::args::{CloneArgs, UniqueArgs};
use super::fail::Failure;
use super::out::say;
use super::table::table;
use crate::arch::x86_64::layout::GENERATION_ID_ADDRESS;
use crate::clone::control::Ending;
use crate::clone::process::SerialPlan;
use crate::clone::supervise::{STOP_GRACE, Supervisor};
use crate::report::{chain, exit};
use crate::spec::{DeviceSpec, MachineSpec};

/// How many clones are compared.
const CLONES: usize = 2;
/// What an answer begins with. The question has it in two parts: its echo is no answer.
const MARK: &str = "pando:";

/// What must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// Both have it, and not the same.
    Differs,
    /// Not the same, where they have it.
    DiffersIfThere,
    /// Whatever it is: nothing outside the guest can change it.
    Shown,
}

/// A fact, the shell command that tells it, and what must be.
struct Fact {
    name: &'static str,
    command: String,
    rule: Rule,
}

/// What is asked, in this order, of busybox too. What a clone's devices give it must be there if it has
/// them; what the guest alone can renew must differ if that `is_strict`.
fn facts(args: &UniqueArgs, spec: &MachineSpec) -> Vec<Fact> {
    let fact = |name, command: &str, rule| Fact {
        name,
        command: command.to_owned(),
        rule,
    };
    let given = |is_given| {
        if is_given {
            Rule::Differs
        } else {
            Rule::DiffersIfThere
        }
    };
    let has = |is_it: fn(&DeviceSpec) -> bool| spec.devices().iter().any(is_it);
    let by_guest = if args.strict {
        Rule::Differs
    } else {
        Rule::Shown
    };
    let skip = GENERATION_ID_ADDRESS / 16;
    let generation = format!(
        "[ -e /sys/bus/acpi/devices/QEMUVGID:00 ] && dd if=/dev/mem bs=16 skip={skip} count=1 2>/dev/null | \
         od -An -tx1 | tr -d ' '"
    );
    vec![
        fact("generation id", &generation, Rule::Differs),
        fact(
            "getrandom",
            "head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '",
            Rule::Differs,
        ),
        fact(
            "mac",
            "cat /sys/class/net/*/address 2>/dev/null | grep -v ^00:00:00:00:00:00 | xargs",
            given(has(|device| device.net().is_some())),
        ),
        // As dmidecode reads it; /sys/class/dmi/id has what the kernel read when it booted.
        fact(
            "uuid",
            "dd if=/sys/firmware/dmi/tables/DMI bs=1 skip=8 count=16 2>/dev/null | od -An -tx1 | tr -d ' '",
            given(spec.identity().tells_guest()),
        ),
        fact(
            "vsock cid",
            &args.cid_command,
            given(has(|device| device.vsock().is_some())),
        ),
        fact("boot id", "cat /proc/sys/kernel/random/boot_id", by_guest),
        fact("machine id", "cat /etc/machine-id 2>/dev/null", by_guest),
        fact("hostname", "hostname", by_guest),
    ]
}
/// What one clone said.
#[derive(Debug, Default)]
struct Answers {
    facts: Vec<(String, String)>,
    /// How far its clock certainly is from the host's.
    clock_off: Option<Duration>,
}

impl Answers {
    fn of(&self, name: &str) -> Option<&str> {
        let found = self.facts.iter().find(|(known, _)| known == name);
        found
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    }
}

/// Starts two clones, asks and compares. An error where something is equal that must not be.
pub(super) fn run(
    args: &CloneArgs,
    spec: &MachineSpec,
    supervisor: &mut Supervisor,
) -> Result<u8, Failure> {
    let facts = facts(&args.unique, spec);
    let question = question(&args.unique, &facts);
    let within = Duration::from_secs(args.unique.answer_within.into());
    for _ in 0..CLONES {
        supervisor.start(&SerialPlan::Supervisor, &[]);
    }
    let answers = (0..CLONES)
        .map(|number| ask(&question, within, supervisor, number))
        .collect::<Result<Vec<_>, _>>();
    let stopped = supervisor.stop_all(STOP_GRACE);
    let answers = answers?;
    stopped.map_err(|error| Failure::of(&error))?;
    match answers.as_slice() {
        [one, other] => compare(
            &facts,
            one,
            other,
            Duration::from_millis(args.unique.clock_tolerance),
        ),
        _ => Err(Failure::new(exit::FAILED, "no two clones answered")),
    }
}

/// The question: one line for a shell. The clock comes first, and nothing before it takes time.
fn question(args: &UniqueArgs, facts: &[Fact]) -> String {
    let prefix = &args.shell_prefix;
    let mut line = format!("{prefix}p=pando; echo \"$p:clock=$(date +%s.%N)\"");
    if let Some(command) = &args.wait_for {
        line.push_str(&format!("; {command}"));
    }
    for fact in facts {
        line.push_str(&format!("; echo \"$p:{}=$({})\"", fact.name, fact.command));
    }
    line.push_str("; echo \"$p:end=\"\n");
    line
}

fn ask(
    question: &str,
    within: Duration,
    supervisor: &mut Supervisor,
    number: usize,
) -> Result<Answers, Failure> {
    let failed = |why: String| Failure::new(exit::FAILED, format!("clone {number}: {why}"));
    let (before, start) = (since_epoch(), Instant::now());
    let mut asked = false;
    let mut answers = Answers::default();
    while start.elapsed() < within {
        supervisor
            .wait(Duration::from_millis(50))
            .map_err(|error| Failure::of(&error))?;
        let Some(clone) = supervisor.clone_mut(number) else {
            break;
        };
        if let Some(ending) = &clone.ending {
            return Err(failed(match ending {
                Ending::Failed { message, .. } => message.clone(),
                _ => "it ended before it answered".to_owned(),
            }));
        }
        let Some(console) = clone.console.as_mut() else {
            continue;
        };
        if !asked {
            let sent = console.send(question.as_bytes());
            sent.map_err(|error| failed(chain(&error)))?;
            asked = true;
        }
        console.poll().map_err(|error| failed(chain(&error)))?;
        while let Some(line) = console.take_line() {
            let Some((name, value)) = answer(&line) else {
                continue;
            };
            match name {
                "end" => return Ok(answers),
                "clock" => answers.clock_off = clock_off(value, before, since_epoch()),
                _ => answers.facts.push((shown(name), shown(value))),
            }
        }
    }
    Err(failed(format!(
        "no answer within {} seconds: a root shell must read commands from its COM1 (ttyS0); see \
         --shell-prefix and docs/identity.md",
        within.as_secs()
    )))
}

/// Name and value, if a line has them.
fn answer(line: &str) -> Option<(&str, &str)> {
    let (_, rest) = line.split_once(MARK)?;
    let (name, value) = rest.split_once('=')?;
    Some((name, value.trim()))
}

/// What a guest said, as it can go to a terminal: nothing in it moves a cursor.
fn shown(text: &str) -> String {
    const MOST: usize = 128;
    let is_plain = |letter: &char| !letter.is_control();
    text.chars().filter(is_plain).take(MOST).collect()
}

fn since_epoch() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default()
}

/// By how much the time that a guest told is outside of the time in which it was asked. A guest whose
/// `date` knows no nanoseconds told a second.
fn clock_off(told: &str, before: Duration, after: Duration) -> Option<Duration> {
    let (seconds, nanos) = told.split_once('.').unwrap_or((told, ""));
    let earliest = Duration::from_secs(seconds.parse().ok()?);
    let (earliest, latest) = match nanos.parse::<u32>() {
        Ok(nanos) if nanos < 1_000_000_000 => {
            let exact = earliest.checked_add(Duration::from_nanos(nanos.into()))?;
            (exact, exact)
        }
        _ => (earliest, earliest.checked_add(Duration::from_secs(1))?),
    };
    let is_behind = before.saturating_sub(latest);
    let is_ahead = earliest.saturating_sub(after);
    Some(is_behind.max(is_ahead))
}

/// Whether what two clones said is as it must be, and in a word how it is.
fn judge(rule: Rule, one: Option<&str>, other: Option<&str>) -> (bool, &'static str) {
    match (rule, one, other) {
        (Rule::Differs, None, _) | (Rule::Differs, _, None) => (false, "NOT THERE"),
        (_, None, None) => (true, "not there"),
        (_, Some(one), Some(other)) if one != other => (true, "differs"),
        (Rule::Shown, ..) => (true, "equal"),
        _ => (false, "EQUAL"),
    }
}

fn compare(
    facts: &[Fact],
    one: &Answers,
    other: &Answers,
    tolerance: Duration,
) -> Result<u8, Failure> {
    let mut rows = table(&["of two clones", "is", "clone 0", "clone 1"]);
    let mut bad = Vec::new();
    for &Fact { name, rule, .. } in facts {
        let (one, other) = (one.of(name), other.of(name));
        let (is_good, word) = judge(rule, one, other);
        if !is_good {
            bad.push(format!("{name} ({})", word.to_lowercase()));
        }
        rows.add_row([name, word, one.unwrap_or("-"), other.unwrap_or("-")]);
    }
    let clocks = [one.clock_off, other.clock_off];
    let is_near = |off: &Option<Duration>| off.is_some_and(|off| off <= tolerance);
    let word = if clocks.iter().all(is_near) {
        "the host's"
    } else {
        bad.push("clock (not the host's)".to_owned());
        "NOT THE HOST'S"
    };
    let [one, other] = clocks.map(|off| {
        off.map_or_else(
            || "-".to_owned(),
            |off| format!("{} ms off", off.as_millis()),
        )
    });
    rows.add_row(["clock", word, &one, &other]);
    say!("{rows}");
    if bad.is_empty() {
        return Ok(exit::OK);
    }
    let text = format!("clones are not unique: {}", bad.join(", "));
    Err(Failure::new(exit::FAILED, text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{BackendSpec, CpuCount};

    #[test]
    fn what_a_guest_says_moves_no_cursor() {
        assert_eq!(shown("a\u{1b}[2J\u{9b}1mb\tc"), "a[2J1mbc");
        assert_eq!(shown(&"x".repeat(1000)).len(), 128);
    }

    #[test]
    fn the_echo_of_the_question_is_no_answer() {
        let args = UniqueArgs {
            check_unique: true,
            shell_prefix: "id ".to_owned(),
            clock_tolerance: 100,
            strict: false,
            answer_within: 60,
            wait_for: Some("sleep 1".to_owned()),
            cid_command: "cid".to_owned(),
        };
        let ram = BackendSpec::new("ram0", 64 << 20).unwrap();
        let spec = MachineSpec::new(CpuCount::ONE, vec![ram]).unwrap();
        let question = question(&args, &facts(&args, &spec));
        assert!(question.starts_with("id p=pando;") && answer(&question).is_none());
        assert!(question.contains("; sleep 1; echo \"$p:generation id="));
        assert_eq!(question.matches('\n').count(), 1);
        assert_eq!(answer("q1: pando:boot id=a=b "), Some(("boot id", "a=b")));
        assert_eq!(answer("# pando:end="), Some(("end", "")));
    }

    #[test]
    fn a_clock_is_off_by_what_asking_cannot_explain() {
        let ms = Duration::from_millis;
        let off = |told| clock_off(told, ms(10_000), ms(10_500));
        assert_eq!(off("10.200000000"), Some(ms(0)));
        assert_eq!(off("9.900000000"), Some(ms(100)));
        assert_eq!(off("10.750000000"), Some(ms(250)));
        assert_eq!(off("9"), Some(ms(0)));
        assert_eq!(off("8.%N"), Some(ms(1000)));
        assert_eq!(off("noon"), None);
    }

    #[test]
    fn what_must_differ_must_be_there() {
        let differs = |one, other| judge(Rule::Differs, one, other).0;
        assert!(differs(Some("a"), Some("b")));
        assert!(!differs(Some("a"), Some("a")) && !differs(None, None));
        assert!(judge(Rule::DiffersIfThere, None, None).0);
        assert!(!judge(Rule::DiffersIfThere, Some("a"), Some("a")).0);
        assert!(judge(Rule::Shown, Some("a"), Some("a")).0);
    }
}
