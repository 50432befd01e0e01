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

# node_kib NODE: memory of a node as the guest has it.
node_kib() { in_clone 0 "awk '/MemTotal/{print \$4}' /sys/devices/system/node/node$1/meminfo"; }

sees_nodes() {
    nodes=/sys/devices/system/node
    same "$engine-nodes-online" 0-1 "$(in_clone 0 "cat $nodes/online")"
    same "$engine-node0-cpus" 0 "$(in_clone 0 "cat $nodes/node0/cpulist")"
    same "$engine-node1-cpus" 1 "$(in_clone 0 "cat $nodes/node1/cpulist")"
    same "$engine-distances" "10 33 33 10" "$(in_clone 0 "cat $nodes/node*/distance" | xargs)"
    # All but what the kernel keeps for itself: its image, somewhere, and 64 MiB for devices that reach
    # 32 bits only.
    check "$engine-node0-memory" test "$(node_kib 0)" -ge 60000
    check "$engine-node1-memory" test "$(node_kib 1)" -ge 180000
    check "$engine-all-memory" test "$(($(node_kib 0) + $(node_kib 1)))" -ge 290000
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
