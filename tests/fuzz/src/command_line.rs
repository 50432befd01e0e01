#![forbid(unsafe_code)]
//! `pando qemu ARGS`, from words to a machine that cannot be wrong. Opens nothing: what names files
//! is not followed, and the file of `-readconfig` is what follows the option itself.

use pando_vmm::config::file::MachineFile;
use pando_vmm::qemu::line::{Wanted, arguments, choices, options, wanted};
use pando_vmm::spec::MachineSpec;
use serde_json::Value;

use crate::machine_file;

/// Between two words.
const SEPARATOR: char = '\0';
/// What QEMU did with command lines, recorded.
const CASES: &str = include_str!("../../fixtures/qemu-cases.json");

/// Takes an argument vector; words are kept apart by zeros.
pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let words: Vec<String> = text.split(SEPARATOR).map(str::to_owned).collect();
    let _ = read(&words);
}

fn read(words: &[String]) -> Option<()> {
    let arguments = arguments(words, &mut |path| Ok(path.to_owned()))
        .map_err(|error| error.lines())
        .ok()?;
    let _ = arguments.iter().find_map(choices::of);
    let wanted: Wanted = wanted::read(&arguments)
        .map_err(|error| error.lines())
        .ok()?;
    let parts = wanted.parts().map_err(|error| error.lines()).ok()?;
    let spec = MachineSpec::from_parts(parts)
        .map_err(|error| error.to_string())
        .ok()?;
    let _ = spec.layout().total_bytes();
    machine_file::print_and_read(&MachineFile::of(&spec, None, None), Some(&spec));
    Some(())
}

/// The recorded command lines, and one for each option.
pub fn seeds() -> Vec<Vec<u8>> {
    let cases: Value = serde_json::from_str(CASES).unwrap_or_default();
    let text = |word: &Value| word.as_str().unwrap_or_default().replace("$D", "d");
    let mut seeds: Vec<Vec<u8>> = cases["cases"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|case| case["args"].as_array())
        .map(|words| {
            let words: Vec<String> = words.iter().map(text).collect();
            words.join("\0").into_bytes()
        })
        .collect();
    seeds.extend(
        EXAMPLES
            .iter()
            .map(|example| example.replace(' ', "\0").into_bytes()),
    );
    seeds.push(CONFIG_FILE.as_bytes().to_vec());
    seeds.push(NODES_AS_JSON.as_bytes().to_vec());
    seeds
}

const EXAMPLES: &[&str] = &[
    "-M q35,accel=kvm,memory-backend=a -object memory-backend-ram,id=a,size=64M -m 64M",
    "-m size=64M,slots=2,maxmem=1G -object memory-backend-ram,id=d,size=128M -device pc-dimm,memdev=d,id=x,node=0",
    "-smp cpus=4,sockets=1,cores=2,threads=2,maxcpus=4 -cpu host -accel kvm -enable-kvm",
    "-smp 2 -m 128M -object memory-backend-ram,id=a,size=64M -object memory-backend-memfd,id=b,size=64M -numa node,nodeid=0,cpus=0,memdev=a -numa node,nodeid=1,cpus=1,memdev=b -numa dist,src=0,dst=1,val=30 -numa dist,src=1,dst=0,val=30",
    "-object memory-backend-file,id=a,mem-path=f,size=0x4000000,share=on,readonly=off,rom=auto,offset=4k,align=2M,prealloc=on,merge=off,dump=off,discard-data=on -machine memory-backend=a",
    "-name n,process=p,debug-threads=on -uuid 01234567-89ab-cdef-0123-456789abcdef -smbios type=1,manufacturer=m,product=p,serial=s",
    "-chardev socket,id=c,path=p,server=on,wait=off -mon chardev=c,mode=control,pretty=on -serial null",
    "-chardev file,id=c,path=p,append=on -serial chardev:c -qmp tcp:localhost:4444,server=on,wait=off -monitor pty",
    "-qmp-pretty unix:p,server=on,wait=off -monitor stdio -serial file:x -nodefaults -nographic -S",
    "-incoming file:state,offset=0x1000 -global migration.x-ignore-shared=true -only-migratable",
    "-incoming defer -daemonize -pidfile p -D log -d qmp,migration -no-reboot -no-shutdown -display none",
    "-kernel embedded -initrd i -append a -msg timestamp=off -print-machine -vga none -net none -nic none -parallel none",
    "-m 64M -chardev socket,id=c,path=p,server=on,wait=off -device virtio-serial-pci,id=s,max_ports=4 -device virtserialport,bus=s.0,chardev=c,name=n,nr=2 -device virtconsole",
    "-m 64M -object rng-random,id=r -device virtio-rng-pci,rng=r,addr=5 -device vhost-vsock-pci,guest-cid=3,id=v,x-uds-path=u -device vmgenid,guid=auto",
    "-h -version -machine help -cpu help -device help -object help -chardev help -d help",
];

const CONFIG_FILE: &str = "-readconfig\0[object \"a\"]\n qom-type = \"memory-backend-ram\"\n size = \"64M\"\n\n\
     [machine]\n memory-backend = \"a\"\n# end\n[memory]\n size = \"64M\"\n[smp-opts]\n cpus = \"2\"\n";

const NODES_AS_JSON: &str = "-object\0{\"qom-type\":\"memory-backend-file\",\"id\":\"a\",\"mem-path\":\"f\",\"size\":\
     67108864,\"share\":false,\"readonly\":true,\"rom\":\"off\"}\0-device\0{\"driver\":\"pc-dimm\",\"memdev\":\"a\"}\0\
     -incoming\0{\"channel-type\":\"main\",\"addr\":{\"transport\":\"file\",\"filename\":\"s\",\"offset\":0}}";

/// Options and properties.
pub fn words() -> Vec<String> {
    let names = options::OPTIONS
        .iter()
        .map(|option| format!("\0-{}\0", option.name));
    let values = options::OPTIONS
        .iter()
        .filter_map(|option| option.argument)
        .flat_map(|text| text.split(['[', ']', ',', '|', ' ']))
        .filter(|word| !word.is_empty())
        .map(|word| format!("{word},"));
    let sizes = [
        "1E",
        "16E",
        "0x",
        "1.5G",
        ",,",
        "18446744073709551615",
        "4K",
        "2M",
        "-1",
    ];
    names
        .chain(values)
        .chain(sizes.map(str::to_owned))
        .collect()
}
