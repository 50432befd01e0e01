# shellcheck shell=dash
# Debian's kernel through QEMU's own command lines: a template by `stop` and `migrate`, two clones at
# once, who the machine says it is, its power button; then the same on two vNUMA nodes and a memory
# module. Functions of l1-lib.sh; `say SOCKET COMMAND`
# runs a command in a guest.

folder=/tmp/qemu
mkdir -p "$folder"
cd "$folder" || exit 1
ln -s /bin/pando qemu-system-x86_64
uuid=8a1b7f0e-32a5-4f4b-9c7e-0123456789ab

# start NAME OPTIONS...: a machine with its monitor at NAME.in and NAME.out, COM1 at NAME.com1.
start() {
    name=$1
    shift
    mkfifo "$name.in"
    ./qemu-system-x86_64 -nodefaults -nographic -monitor stdio \
        -serial "unix:$name.com1,server=on,wait=off" "$@" <>"$name.in" >"$name.out" 2>&1 &
}

# tell NAME COMMAND: a line for a machine's monitor.
tell() { echo "$2" >"$1.in"; }

# memory HOW: RAM on the file `template`.
memory() {
    echo "-m 192M -object memory-backend-file,id=pc.ram,mem-path=template,size=192M,$1
        -machine q35,memory-backend=pc.ram"
}

# nodes HOW: RAM of two nodes and a module on three files.
nodes() {
    echo "-machine q35 -m 288M,slots=2,maxmem=1G
        -object memory-backend-file,id=m0,mem-path=node0,size=160M,$1
        -object memory-backend-file,id=m1,mem-path=node1,size=128M,$1
        -numa node,nodeid=0,cpus=0,memdev=m0 -numa node,nodeid=1,cpus=1,memdev=m1
        -numa dist,src=0,dst=1,val=33
        -object memory-backend-file,id=d0,mem-path=module,size=128M,$1
        -device pc-dimm,id=dimm0,memdev=d0,node=1"
}

# facts COM1: the nodes that a guest sees, and the RAM of the second in KiB, its module's included.
facts() {
    online=$(say "$1" "cat /sys/devices/system/node/online")
    ram=$(say "$1" "awk '/^Node/{node=\$2+0} /present/ && node==1{pages+=\$2} END{print pages*4}' /proc/zoneinfo")
    echo "$online $ram"
}

# migrated NAME: true when its last save or load is complete.
migrated() {
    tell "$1" "info migrate"
    sleep 0.2
    grep -q 'Migration status: completed' "$1.out"
}

make_template() {
    # shellcheck disable=SC2046 # words
    start t $(memory share=on) -smp 2 -uuid "$uuid" \
        -smbios type=1,serial=ASPEN -kernel /rig/vmlinuz -initrd /rig/initrd \
        -append "console=ttyS0 quiet panic=-1"
    template=$!
    check template-answers within 300 say t.com1 true || {
        cat t.out
        return 1
    }
    same cpus 2 "$(say t.com1 nproc)"
    same uuid "$uuid" "$(say t.com1 cat /sys/class/dmi/id/product_uuid)"
    same serial ASPEN "$(say t.com1 cat /sys/class/dmi/id/product_serial)"
    presses=$(say t.com1 "$presses_so_far")
    tell t system_powerdown
    check power-button within 30 pressed "$presses"
    say t.com1 "echo TEMPLATE >/tmp/mark"
    tell t stop
    tell t "migrate_set_capability x-ignore-shared on"
    tell t "migrate file:state"
    check saved within 60 migrated t || cat t.out
    tell t quit
    wait "$template"
    same template-ends 0 $?
    chmod a-w template
}

# Devices that come and go have a line of the same name.
presses_so_far="awk '/ACPI:Ged/{presses += \$2 + \$3} END{print presses}' /proc/interrupts"

# pressed BEFORE: true when the guest had more interrupts of its power button than BEFORE.
pressed() {
    now=$(say t.com1 "$presses_so_far")
    [ -n "$now" ] && [ "$now" -gt "$1" ]
}

run_clones() {
    before=$(stat -c '%i %s %b %Y' template)
    for clone in c1 c2; do
        # shellcheck disable=SC2046 # words
        start $clone $(memory share=off,readonly=on,rom=off) -smp 2 -incoming defer
        tell $clone "migrate_set_capability x-ignore-shared on"
        tell $clone "migrate_incoming file:state"
        check $clone-loaded within 60 migrated $clone || cat $clone.out
        tell $clone cont
        same $clone-mark TEMPLATE "$(say $clone.com1 cat /tmp/mark)"
    done
    say c1.com1 "echo CLONE-1 >/tmp/mark"
    same apart TEMPLATE "$(say c2.com1 cat /tmp/mark)"
    same own CLONE-1 "$(say c1.com1 cat /tmp/mark)"
    check work say c2.com1 "dd if=/dev/urandom of=/tmp/blob bs=1M count=16 && md5sum /tmp/blob"
    tell c1 quit
    tell c2 quit
    wait
    same file-unchanged "$before" "$(stat -c '%i %s %b %Y' template)"
}

make_nodes_template() {
    # shellcheck disable=SC2046 # words
    start n $(nodes share=on) -smp 2 -kernel /rig/vmlinuz -initrd /rig/initrd \
        -append "console=ttyS0 quiet panic=-1"
    template=$!
    check nodes-template-answers within 300 say n.com1 true || {
        cat n.out
        return 1
    }
    same nodes-seen "0-1 262144" "$(facts n.com1)"
    say n.com1 "dd if=/dev/urandom of=/tmp/blob bs=1M count=40"
    blob=$(say n.com1 "md5sum </tmp/blob")
    tell n stop
    tell n "migrate_set_capability x-ignore-shared on"
    tell n "migrate file:nodes-state"
    check nodes-saved within 60 migrated n || cat n.out
    tell n quit
    wait "$template"
    same nodes-template-ends 0 $?
    chmod a-w node0 node1 module
}

run_nodes_clones() {
    before=$(stat -c '%i %s %b %Y' node0 node1 module)
    for clone in n1 n2; do
        # shellcheck disable=SC2046 # words
        start $clone $(nodes share=off,readonly=on,rom=off) -smp 2 -incoming file:nodes-state
        check $clone-loaded within 60 migrated $clone || cat $clone.out
        tell $clone cont
        same $clone-nodes "0-1 262144" "$(facts $clone.com1)"
        same $clone-blob "$blob" "$(say $clone.com1 "md5sum </tmp/blob")"
    done
    tell n1 quit
    tell n2 quit
    wait
    same nodes-files-unchanged "$before" "$(stat -c '%i %s %b %Y' node0 node1 module)"
}

make_template && run_clones
make_nodes_template && run_nodes_clones
