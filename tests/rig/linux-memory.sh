# shellcheck shell=dash
# Debian's kernel while memory comes and goes in a clone: a module (pc-dimm) by ACPI, and memory that grows and
# shrinks (virtio-mem), frozen with nothing plugged and plugged into a clone that runs. Functions of
# l1-lib.sh; `say SOCKET COMMAND` runs a command in a guest.

folder=/tmp/memory
mkdir -p "$folder/extra" /var/tmp
cd "$folder" || exit 1
ln -s /bin/pando qemu-system-x86_64

# What the guest has before its ready mark: drivers, and how it waits, for a minute.
cat >"$folder/extra/prepare" <<'PREPARE'
while read -r module; do insmod "/modules/$module.ko"; done </modules/order
cat >/bin/becomes <<'BECOMES'
#!/bin/sh
for try in $(seq 300); do eval "$1" && exit 0; sleep 0.2; done
exit 1
BECOMES
cat >/bin/total <<'TOTAL'
#!/bin/sh
# MemTotal in MiB.
awk '/MemTotal/{print int($2 / 1024)}' /proc/meminfo
TOTAL
cat >/bin/used <<'USED'
#!/bin/sh
# So many MiB filled, and read back.
mkdir -p /mnt && mount -t tmpfs -o size=90% none /mnt
dd if=/dev/urandom of=/tmp/seed bs=1M count=1 2>/dev/null
for number in $(seq "$1"); do cat /tmp/seed; done >/mnt/blob
[ "$(md5sum </mnt/blob)" = "$(for number in $(seq "$1"); do cat /tmp/seed; done | md5sum)" ]
USED
cat >/bin/freed <<'FREED'
#!/bin/sh
rm -f /mnt/blob; umount /mnt
FREED
chmod +x /bin/becomes /bin/total /bin/used /bin/freed
echo online_movable >/sys/devices/system/memory/auto_online_blocks
PREPARE
(cd "$folder/extra" && echo prepare | cpio -o -H newc 2>/dev/null) >"$folder/extra.cpio"
cat /rig/initrd "$folder/extra.cpio" >"$folder/initrd"

# start NAME OPTIONS...: a machine that speaks QMP at NAME.in and NAME.out, COM1 at NAME.com1.
start() {
    name=$1
    shift
    mkfifo "$name.in"
    ./qemu-system-x86_64 -nodefaults -nographic -qmp stdio -m 256M,slots=4,maxmem=2G \
        -serial "unix:$name.com1,server=on,wait=off" \
        -object memory-backend-ram,id=v0ram,size=256M \
        -device virtio-mem-pci,id=v0,memdev=v0ram,requested-size=0 "$@" <>"$name.in" >"$name.out" 2>&1 &
    tell "$name" qmp_capabilities
}

# tell NAME COMMAND [ARGUMENTS]: a QMP command, its arguments without braces.
tell() { echo "{\"execute\": \"$2\", \"arguments\": {$3}}" >"$1.in"; }

# memory HOW: RAM on the file `template`.
memory() { echo "memory-backend-file,id=pc.ram,mem-path=template,size=256M,$1"; }

# migrated NAME: true when its last save or load is complete.
migrated() {
    tell "$1" query-migrate
    sleep 0.2
    grep -q '"status": "completed"' "$1.out"
}

# resident PID: what a process has of the host's memory, in MiB.
resident() { awk '/^VmRSS/{print int($2 / 1024)}' "/proc/$1/status"; }

# refuses TEXT COMMAND ARGUMENTS: true when the clone's monitor answers a command with this text.
refuses() {
    refused_from=$(($(wc -l <c.out) + 1)) refused_text=$1
    tell c "$2" "$3"
    within 20 refused
}
refused() { tail -n "+$refused_from" c.out | grep '"error"' | grep -qF "$refused_text"; }

# request ID BYTES: so much of a device that grows and shrinks.
request() {
    tell c qom-set "\"path\": \"/machine/peripheral/$1\", \"property\": \"requested-size\", \"value\": $2"
}

# has_size ID BYTES: true when the guest has so much of a device.
has_size() {
    tell c query-memory-devices
    sleep 0.2
    tail -n 3 c.out | tr '{' '\n' | grep "\"id\": \"$1\"" | grep -q "\"size\": $2[,}]"
}

# saved_again: true when the clone says that a save is complete, after the load that it began with.
saved_again() {
    tell c query-migrate
    sleep 0.2
    tail -n 3 c.out | grep -q '"status": "completed"'
}

# moves_on: a clone with memory of which a part is plugged goes on in another process. Its RAM is in the state.
moves_on() {
    blob=$(say c.com1 "md5sum </mnt/blob")
    tell c stop
    tell c migrate-set-capabilities '"capabilities": [{"capability": "x-ignore-shared", "state": false}]'
    tell c migrate '"uri": "file:moved"'
    check moved-is-saved within 120 saved_again || cat c.out
    moved=$(($(stat -c %s moved) >> 20))
    between moved-is-what-is-used 100 350 $moved
    tell c quit
    wait $clone
    same errors-before-the-move 4 "$(grep -c '"error"' c.out)"
    mv c.out c.before
    rm -f c.in c.com1
    start c -object memory-backend-ram,id=pc.ram,size=256M -smp 2 -machine q35,memory-backend=pc.ram \
        -object memory-backend-ram,id=v1ram,size=512M -device virtio-mem-pci,id=v1,memdev=v1ram,requested-size=0 \
        -incoming defer
    clone=$!
    tell c migrate-incoming '"uri": "file:moved"'
    check moved-is-loaded within 120 migrated c || cat c.out
    rm moved
    check moved-has-its-memory within 20 has_size v1 268435456 || cat c.out
    tell c cont
    same moved-is-intact "$blob" "$(say c.com1 "md5sum </mnt/blob")"
    full=$(resident $clone)
    between moved-takes-no-more 0 $((moved + 64)) "$full"
}

start t -object "$(memory share=on)" -machine q35,memory-backend=pc.ram -smp 2 \
    -kernel /rig/vmlinuz -initrd "$folder/initrd" -append "console=ttyS0 quiet panic=-1"
template=$!
check answers within 300 say t.com1 true || {
    cat t.out
    exit 1
}
tell t stop
tell t migrate-set-capabilities '"capabilities": [{"capability": "x-ignore-shared", "state": true}]'
tell t migrate '"uri": "file:state"'
check saved within 60 migrated t || cat t.out
tell t quit
wait $template
same template-ends 0 $?
chmod a-w template

start c -object "$(memory share=off,readonly=on,rom=off)" -smp 2 \
    -machine q35,memory-backend=pc.ram -incoming defer
clone=$!
tell c migrate-set-capabilities '"capabilities": [{"capability": "x-ignore-shared", "state": true}]'
tell c migrate-incoming '"uri": "file:state"'
check loaded within 60 migrated c || cat c.out
tell c cont
check clone-answers within 60 say c.com1 true
before=$(say c.com1 total)

# What would discard a template's memory, or share it with another process.
tell c object-add '"qom-type": "memory-backend-file", "id": "again", "mem-path": "template", "size": 268435456, "readonly": true, "rom": "off"'
check refuses-growing-templates refuses 'Unexpected error discarding RAM: Operation not permitted' \
    device_add '"driver": "virtio-mem-pci", "id": "v2", "memdev": "again"'
tell c object-del '"id": "again"'
check refuses-release-ram refuses 'release-ram is not supported' \
    migrate-set-capabilities '"capabilities": [{"capability": "release-ram", "state": true}]'
check refuses-postcopy refuses 'Postcopy is not supported' \
    migrate-set-capabilities '"capabilities": [{"capability": "postcopy-ram", "state": true}]'
check refuses-multi-process refuses "device 'x-pci-proxy-dev' cannot be had" \
    device_add '"driver": "x-pci-proxy-dev", "id": "p0", "fd": "3"'
same refusals-of-discards 3 "$(grep -c 'Discarding RAM with readonly files is not supported' c.out)"

# A module.
tell c object-add '"qom-type": "memory-backend-ram", "id": "d0", "size": 268435456'
tell c device_add '"driver": "pc-dimm", "id": "dimm0", "memdev": "d0"'
check module-comes say c.com1 "becomes '[ \$(total) -ge $((before + 240)) ]'" || {
    say c.com1 'dmesg | tail -n 20'
    cat c.out
}
check module-is-used say c.com1 "used 100"
full=$(resident $clone)
say c.com1 freed
tell c device_del '"id": "dimm0"'
check module-goes within 60 grep -q '"device": "dimm0".*DEVICE_DELETED\|DEVICE_DELETED.*"device": "dimm0"' c.out || {
    say c.com1 'dmesg | tail -n 20'
    cat c.out
}
same module-gone "$before" "$(say c.com1 total)"
between module-is-the-hosts-again 0 $((full - 60)) "$(resident $clone)"
tell c object-del '"id": "d0"'

# A module on a file that is only read: what Linux writes there stays in the clone.
dd if=/dev/urandom of=given bs=1M count=1 2>/dev/null
dd if=/dev/zero of=given bs=1M count=0 seek=128 2>/dev/null
chmod a-w given
given=$(stat -c '%b %Y %a' given) given_sum=$(head -c 1048576 given | sha256sum)
tell c object-add '"qom-type": "memory-backend-file", "id": "d1", "mem-path": "given", "size": 134217728, "share": false, "readonly": true, "rom": "off"'
tell c device_add '"driver": "pc-dimm", "id": "dimm1", "memdev": "d1"'
check given-module-comes say c.com1 "becomes '[ \$(total) -ge $((before + 120)) ]'" || cat c.out
check given-module-is-used say c.com1 "used 40"
say c.com1 freed
tell c device_del '"id": "dimm1"'
check given-module-goes within 60 grep -q '"device": "dimm1".*DEVICE_DELETED\|DEVICE_DELETED.*"device": "dimm1"' c.out || cat c.out
same given-is-as-it-was "$given $given_sum" "$(stat -c '%b %Y %a' given) $(head -c 1048576 given | sha256sum)"
tell c object-del '"id": "d1"'

# Memory that was frozen with nothing plugged.
request v0 134217728
check frozen-grows within 60 has_size v0 134217728 || cat c.out
request v0 0
check frozen-shrinks within 60 has_size v0 0 || cat c.out

# Memory that is plugged into a clone.
tell c object-add '"qom-type": "memory-backend-ram", "id": "v1ram", "size": 536870912'
tell c device_add '"driver": "virtio-mem-pci", "id": "v1", "memdev": "v1ram"'
request v1 268435456
check grows within 60 has_size v1 268435456 || {
    say c.com1 'dmesg | tail -n 20'
    cat c.out
}
check grown-is-seen say c.com1 "becomes '[ \$(total) -ge $((before + 240)) ]'"
check grown-is-used say c.com1 "used 100"
full=$(resident $clone)
moves_on
tell c device_del '"id": "v1"'
check grown-does-not-go within 10 grep -q 'cannot get unplugged while some of its memory is still plugged' c.out
say c.com1 freed
request v1 0
check shrinks within 60 has_size v1 0 || cat c.out
between shrunk-is-the-hosts-again 0 $((full - 60)) "$(resident $clone)"
check told-of-sizes grep -q MEMORY_DEVICE_SIZE_CHANGE c.out
tell c device_del '"id": "v1"'
check device-goes within 60 grep -q '"device": "v1".*DEVICE_DELETED\|DEVICE_DELETED.*"device": "v1"' c.out || cat c.out
tell c x-query-discards
check device-requires-nothing within 20 sh -c 'tail -n 1 c.out | grep -q "\"coordinated\": true, \"device\": \"v0\"" && ! tail -n 1 c.out | grep -q "\"device\": \"v1\""' || tail -n 1 c.out
tell c object-del '"id": "v1ram"'
check own-memory-is-intact say c.com1 "used 40"

# A balloon that comes to a guest that runs, and whose size is told.
tell c device_add '"driver": "virtio-balloon-pci", "id": "b0"'
check balloon-comes say c.com1 "becomes '[ -e /sys/bus/virtio/drivers/virtio_balloon/virtio* ]'"
tell c balloon '"value": 201326592'
check balloon-is-told within 60 grep -q 'BALLOON_CHANGE.*201326592\|201326592.*BALLOON_CHANGE' c.out || tail -n 5 c.out
tell c balloon '"value": 268435456'
check balloon-is-told-again within 60 grep -q 'BALLOON_CHANGE.*268435456\|268435456.*BALLOON_CHANGE' c.out || tail -n 5 c.out
same errors 1 "$(grep -c '"error"' c.out)"
tell c quit
wait $clone
same clone-ends 0 $?
cd / || exit 1
rm -rf "$folder"
