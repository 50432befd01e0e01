# shellcheck shell=dash
# Debian's kernel under Pando on two NUMA nodes and a memory module: what it sees of them, frozen and
# cloned. Functions of l1-lib.sh; `say SOCKET COMMAND` runs a command in a guest.

folder=/tmp/nodes template=/tmp/nodes/template
mkdir -p "$folder"
cat >"$folder/machine.toml" <<'MACHINE'
kernel = "/rig/vmlinuz"
initrd = "/rig/initrd"
append = "console=ttyS0 quiet panic=-1"
cpus = 2

[memory]
slots = 2
max = "1G"

[[backend]]
id = "m0"
size = "160M"

[[backend]]
id = "m1"
size = "128M"

[[backend]]
id = "d0"
size = "128M"

[[node]]
cpus = [0]
backend = "m0"

[[node]]
cpus = [1]
backend = "m1"

[[distance]]
from = 0
to = 1
distance = 33

[[dimm]]
id = "dimm0"
backend = "d0"
node = 1
MACHINE

# in_clone NUMBER COMMAND: a command in a clone.
in_clone() { say "$folder/$engine/clone-$1.sock" "$2"; }

# node_kib NODE: the RAM that the guest's kernel found in a node. Not MemTotal, which lacks what the
# kernel keeps for itself, and its image lies in either node (KASLR).
node_kib() {
    in_clone 0 "awk '/^Node/{node=\$2+0} /present/ && node==$1{pages+=\$2} END{print pages*4}' /proc/zoneinfo"
}

sees_nodes() {
    nodes=/sys/devices/system/node
    same "$engine-nodes-online" 0-1 "$(in_clone 0 "cat $nodes/online")"
    same "$engine-node0-cpus" 0 "$(in_clone 0 "cat $nodes/node0/cpulist")"
    same "$engine-node1-cpus" 1 "$(in_clone 0 "cat $nodes/node1/cpulist")"
    same "$engine-distances" "10 33 33 10" "$(in_clone 0 "cat $nodes/node*/distance" | xargs)"
    # Node 0 lacks the first page and the hole below 1 MiB: 163840 less some 400.
    between "$engine-node0-memory" 163000 163840 "$(node_kib 0)"
    between "$engine-node1-memory" 262144 262144 "$(node_kib 1)"
    # All of both but what the kernel keeps for itself.
    between "$engine-all-memory" 290000 425984 "$(in_clone 0 "awk '/MemTotal/{print \$2}' /proc/meminfo")"
    same "$engine-module-is-ram" 1 "$(in_clone 0 "grep -c '100000000-107ffffff : System RAM' /proc/iomem")"
    same "$engine-module-device" '\_SB_.M000' "$(in_clone 0 'cat /sys/bus/acpi/devices/PNP0C80:00/path')"
    check "$engine-kernel-content" in_clone 0 \
        "! dmesg | grep -E 'Oops|BUG|WARNING|Call Trace|not on the same node|SRAT.*(invalid|not used)'"
}

check nodes-create pando template create "$template" --machine "$folder/machine.toml" \
    --ready serial:PANDO-READY --timeout 300 || exit 1
before=$(sha256sum "$template"/*.mem)
same nodes-files 3 "$(echo "$before" | wc -l)"
for engine in copy root kernel; do
    pando clone "$template" --engine $engine --count 2 --serial "$folder/$engine" --json \
        >"$folder/$engine.json" 2>"$folder/$engine.err" &
    supervisor=$!
    check "$engine-answers" in_clone 0 true || cat "$folder/$engine.err"
    sees_nodes
    for clone in 0 1; do
        check "$engine-$clone-memory-holds" in_clone $clone \
            'dd if=/dev/urandom of=/tmp/blob bs=64k count=64 2>/dev/null && cp /tmp/blob /tmp/copy && cmp /tmp/blob /tmp/copy'
    done
    kill $supervisor
    wait $supervisor
    same "$engine-exit-status" 0 $? || cat "$folder/$engine.json" "$folder/$engine.err"
    same "$engine-files-unchanged" "$before" "$(sha256sum "$template"/*.mem)"
done
check nodes-verify pando template verify "$template"
