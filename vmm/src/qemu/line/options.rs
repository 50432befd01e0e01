#![forbid(unsafe_code)]
//! Every option that Pando has, with what it does: the parser, `-help` and `docs/qemu.md` read this
//! table.

/// What an option is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Does {
    /// Shapes the machine or the program; says so itself in `help`.
    Something,
    /// Says what is so anyway: accepted, so that command lines need no change.
    AsItIs,
}

/// One option.
#[derive(Debug, Clone, Copy)]
pub struct OptionInfo {
    /// Without `-`.
    pub name: &'static str,
    /// What follows it, in the form of QEMU's manual; nothing for a switch.
    pub argument: Option<&'static str>,
    /// One line.
    pub help: &'static str,
    /// Whether it does anything.
    pub does: Does,
}

const fn with(name: &'static str, argument: &'static str, help: &'static str) -> OptionInfo {
    OptionInfo {
        name,
        argument: Some(argument),
        help,
        does: Does::Something,
    }
}

const fn switch(name: &'static str, help: &'static str) -> OptionInfo {
    OptionInfo {
        name,
        argument: None,
        help,
        does: Does::Something,
    }
}

const fn as_it_is(
    name: &'static str,
    argument: Option<&'static str>,
    help: &'static str,
) -> OptionInfo {
    OptionInfo {
        name,
        argument,
        help,
        does: Does::AsItIs,
    }
}

/// All options that are understood.
pub const OPTIONS: &[OptionInfo] = &[
    with(
        "machine",
        "[type=]q35[,memory-backend=ID][,accel=kvm]",
        "the machine: one kind, known as q35 (pc-q35-10.0) and microvm; memory-backend names its RAM",
    ),
    with("M", "...", "the same as -machine"),
    with("accel", "kvm", "KVM is the only accelerator"),
    switch("enable-kvm", "the same as -accel kvm"),
    with(
        "cpu",
        "host|max",
        "the guest's CPU: the host's, as far as KVM offers it",
    ),
    with(
        "smp",
        "[cpus=]N[,sockets=,cores=,threads=,maxcpus=N]",
        "number of vCPUs, 1 to 8",
    ),
    with(
        "m",
        "[size=]SIZE[,slots=N,maxmem=SIZE]",
        "RAM, and room for memory modules",
    ),
    with(
        "object",
        "memory-backend-file|-ram|-memfd,id=ID,size=SIZE[,...] | rng-random|rng-builtin,id=ID",
        "a memory backend: mem-path, share, readonly, rom, offset, align, prealloc, merge, dump, discard-data, and for a clone discard=zero; or the kernel's entropy",
    ),
    with(
        "numa",
        "node[,nodeid=N][,cpus=A-B][,memdev=ID] | dist,src=N,dst=N,val=N",
        "a NUMA node, or the distance of two",
    ),
    with(
        "device",
        "pc-dimm,id=ID,memdev=ID[,node=,slot=,addr=] | virtio-mem-pci,memdev=ID[,id=,requested-size=,block-size=,node=,prealloc=,memaddr=,addr=] | virtio-blk-pci,drive=ID[,id=,addr=,serial=] | virtio-net-pci[,netdev=ID,mac=,id=,addr=] | virtio-rng-pci[,rng=ID,id=,addr=] | virtio-serial-pci[,id=,addr=,max_ports=] | virtio-balloon-pci[,deflate-on-oom=,free-page-reporting=,id=,addr=] | virtconsole[,chardev=ID,name=,nr=,bus=] | virtserialport[,chardev=ID,name=,nr=,bus=] | vhost-vsock-pci,guest-cid=N[,id=,addr=,x-uds-path=PATH] | vhost-user-blk-pci,chardev=ID[,id=,addr=,num-queues=1] | pcie-root-port,id=ID | vmgenid[,guid=UUID|auto,id=]",
        "a memory module, memory that grows and shrinks, a disk, a network device, entropy from the host, a balloon, ports and connections to the host (Unix sockets), or a VM generation ID",
    ),
    with(
        "drive",
        "file=FILE,if=virtio|none[,id=,format=raw,readonly=,snapshot=]",
        "a raw image; a disk of its own with if=virtio; with snapshot=on what the guest writes ends with the process",
    ),
    with(
        "blockdev",
        "file,node-name=ID,filename=FILE[,read-only=] | raw,node-name=ID,file=ID",
        "a raw image for -device virtio-blk-pci,drive=ID",
    ),
    with(
        "netdev",
        "tap,id=ID,ifname=NAME,script=no,downscript=no[,vhost=off] | vhost-user,id=ID,chardev=ID",
        "a tap, which must exist, or another process, for -device virtio-net-pci,netdev=ID",
    ),
    with(
        "mem-prealloc",
        "",
        "take all memory at the start, as prealloc=on of each backend",
    ),
    with(
        "kernel",
        "FILE",
        "a bzImage or an ELF vmlinux; `embedded` is Pando's built-in guest",
    ),
    with("initrd", "FILE", "initial RAM disk"),
    with("append", "TEXT", "kernel command line"),
    with(
        "serial",
        "DEV",
        "where COM1 goes: stdio, null, none, pty, file:PATH, unix:..., tcp:..., chardev:ID; mon:... has a monitor there \
         too, behind Ctrl-A c",
    ),
    with(
        "chardev",
        "stdio|null|pty|file|socket,id=ID[,mux=on][,logfile=PATH[,logappend=on]][,...]",
        "one end of a port or monitor; with mux=on of several, one after the other by Ctrl-A c",
    ),
    with(
        "mon",
        "[chardev=]ID[,mode=control|readline][,pretty=on]",
        "a monitor on a -chardev",
    ),
    with("qmp", "DEV", "a QMP monitor"),
    with(
        "qmp-pretty",
        "DEV",
        "a QMP monitor that indents its answers",
    ),
    with("monitor", "DEV", "a monitor for people; none for none"),
    with(
        "incoming",
        "defer|file:PATH[,offset=N]|fd:N",
        "start from a saved state; defer waits for migrate-incoming",
    ),
    switch("S", "do not start the guest: wait for cont"),
    with("name", "NAME", "a name for query-name"),
    with(
        "uuid",
        "UUID",
        "the machine's UUID, which SMBIOS tells the guest",
    ),
    with(
        "smbios",
        "type=1[,manufacturer=,product=,version=,serial=,uuid=,sku=,family=]",
        "what SMBIOS tells the guest",
    ),
    switch(
        "nographic",
        "COM1 is this terminal, and a monitor behind Ctrl-A c",
    ),
    switch(
        "nodefaults",
        "no COM1 on this terminal unless -serial says so",
    ),
    with("display", "none", "there is no display"),
    switch("no-reboot", "end when the guest asks for a reset"),
    switch("no-shutdown", "stay, stopped, when the guest powers off"),
    switch("daemonize", "go to the background once everything is ready"),
    with("pidfile", "FILE", "write the process number there"),
    with("D", "FILE", "write the log there"),
    with(
        "d",
        "ITEM[,...]",
        "log these parts of Pando: qmp, migration, machine, pager, all",
    ),
    with("readconfig", "FILE", "read options from a file"),
    with(
        "global",
        "migration.CAPABILITY=on|off",
        "set a migration capability",
    ),
    with("msg", "timestamp=on|off", "time in front of messages"),
    switch(
        "print-machine",
        "print the machine as a machine file of Pando, and do not run it; QEMU has no such option",
    ),
    with(
        "metrics",
        "ADDRESS:PORT",
        "serve Prometheus metrics at http://ADDRESS:PORT/metrics; QEMU has no such option",
    ),
    switch("version", "say the version"),
    switch("help", "say this"),
    switch("h", "say this"),
    as_it_is(
        "no-user-config",
        None,
        "there is no user's configuration file",
    ),
    as_it_is("no-hpet", None, "there is no HPET"),
    as_it_is("only-migratable", None, "all devices can be saved"),
    as_it_is(
        "boot",
        Some("[menu=off][,strict=on|off]"),
        "the kernel is what boots",
    ),
    as_it_is(
        "rtc",
        Some("[base=utc][,clock=host][,driftfix=none]"),
        "the guest's clock is KVM's, which follows the host's",
    ),
    as_it_is(
        "overcommit",
        Some("[mem-lock=off][,cpu-pm=off]"),
        "guest memory is not locked, and idle vCPUs give their CPUs back",
    ),
    as_it_is("sandbox", Some("off"), "there is no filter of system calls"),
    as_it_is("vga", Some("none"), "there is no graphics card"),
    as_it_is(
        "net",
        Some("none"),
        "there is no network device but by -device",
    ),
    as_it_is(
        "nic",
        Some("none"),
        "there is no network device but by -device",
    ),
    as_it_is("parallel", Some("none"), "there is no parallel port"),
];

/// The option of a name.
pub fn find(name: &str) -> Option<&'static OptionInfo> {
    OPTIONS.iter().find(|option| option.name == name)
}

impl OptionInfo {
    /// Whether something must follow it.
    pub fn takes_argument(&self) -> bool {
        self.argument.is_some_and(|argument| !argument.is_empty())
    }
}

/// The text of `-help`.
pub fn help(program: &str) -> String {
    let mut text = format!(
        "{program}: the QEMU options of VM templating, on Pando\n\
         usage: {program} [options]\n\n"
    );
    for option in OPTIONS {
        let typed = match option.argument {
            Some(argument) if option.takes_argument() => format!("-{} {argument}", option.name),
            _ => format!("-{}", option.name),
        };
        text.push_str(&format!("{typed}\n                {}\n", option.help));
    }
    text.push_str(
        "\nAn option of QEMU that Pando does not have is refused by name. docs/qemu.md has all of them,\n\
         the monitor's commands and every difference.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::line::refused;

    #[test]
    fn no_option_is_there_twice_or_both_taken_and_refused() {
        for (at, option) in OPTIONS.iter().enumerate() {
            assert!(
                OPTIONS[at + 1..]
                    .iter()
                    .all(|other| other.name != option.name)
            );
            assert!(refused::option(option.name).is_none(), "{}", option.name);
        }
    }

    #[test]
    fn help_names_every_option() {
        let help = help("pando qemu");
        for option in OPTIONS {
            assert!(
                help.contains(&format!("-{}", option.name)),
                "{}",
                option.name
            );
        }
    }
}
