# shellcheck shell=dash
# Debian's kernel while devices come and go, by its own ACPI hot-plug: in a machine that began without any, then
# in clones of it, in one of them fifty times. Functions of l1-lib.sh; `say SOCKET COMMAND` runs a command in a guest.

folder=/tmp/hotplug
mkdir -p "$folder/extra" /var/tmp
cd "$folder" || exit 1
ln -s /bin/pando qemu-system-x86_64

# What the guest has before its ready mark: drivers, and how it looks for devices. Both ways wait, and fail
# after a minute.
cat >"$folder/extra/prepare" <<'PREPARE'
while read -r module; do insmod "/modules/$module.ko"; done </modules/order
cat >/bin/becomes <<'BECOMES'
#!/bin/sh
for try in $(seq 300); do eval "$1" && exit 0; sleep 0.2; done
exit 1
BECOMES
cat >/bin/came <<'CAME'
#!/bin/sh
# The disk and entropy are there, and both work.
becomes '[ -b /dev/vda ] && grep -q virtio_rng /sys/class/misc/hw_random/rng_current' || exit 1
dd if=/dev/hwrng of=/tmp/random bs=4k count=4 2>/dev/null &&
    dd if=/tmp/random of=/dev/vda bs=4k oflag=direct conv=fsync 2>/dev/null &&
    dd if=/dev/vda of=/tmp/back bs=4k count=4 iflag=direct 2>/dev/null &&
    cmp /tmp/random /tmp/back
CAME
cat >/bin/went <<'WENT'
#!/bin/sh
becomes '[ ! -b /dev/vda ] && ! grep -q virtio_rng /sys/class/misc/hw_random/rng_available'
WENT
cat >/bin/has-vsock <<'VSOCK'
#!/bin/sh
ls /sys/bus/virtio/drivers/vmw_vsock_virtio_transport | grep -q '^virtio'
VSOCK
cat >/bin/log-is-clean <<'CLEAN'
#!/bin/sh
! dmesg | grep -E '[Ee]rror|[Ff]ail|WARN|Oops|BUG|Call Trace|hung task|blocked for|nobody cared|no space|AE_[A-Z]'
CLEAN
chmod +x /bin/becomes /bin/came /bin/went /bin/has-vsock /bin/log-is-clean
PREPARE
(cd "$folder/extra" && echo prepare | cpio -o -H newc 2>/dev/null) >"$folder/extra.cpio"
cat /rig/initrd "$folder/extra.cpio" >"$folder/initrd"
for name in disk over; do dd if=/dev/zero of="$folder/$name" bs=1M count=0 seek=16 2>/dev/null; done

# start NAME OPTIONS...: a machine that speaks QMP at NAME.in and NAME.out, COM1 at NAME.com1.
start() {
    name=$1
    shift
    mkfifo "$name.in"
    ./qemu-system-x86_64 -nodefaults -nographic -qmp stdio -m 192M \
        -serial "unix:$name.com1,server=on,wait=off" \
        -blockdev file,node-name=image,filename=disk "$@" <>"$name.in" >"$name.out" 2>&1 &
    tell "$name" qmp_capabilities
}

# tell NAME COMMAND [ARGUMENTS]: a QMP command, its arguments without braces.
tell() { echo "{\"execute\": \"$2\", \"arguments\": {$3}}" >"$1.in"; }

# memory HOW: RAM on the file `template`.
memory() { echo "memory-backend-file,id=pc.ram,mem-path=template,size=192M,$1"; }

plug() {
    tell "$1" device_add '"driver": "virtio-rng-pci", "id": "rng", "addr": "5"'
    tell "$1" device_add '"driver": "virtio-blk-pci", "id": "disk", "drive": "image", "addr": "1f"'
}

unplug() {
    tell "$1" device_del '"id": "rng"'
    tell "$1" device_del '"id": "disk"'
}

# device_count NAME: how many devices are gone.
device_count() { grep -c '"device": .*DEVICE_DELETED' "$1.out"; }

# deleted NAME COUNT: true when so many devices are gone.
deleted() { [ "$(device_count "$1")" -ge "$2" ]; }

# migrated NAME: true when its last save or load is complete.
migrated() {
    tell "$1" query-migrate
    sleep 0.2
    grep -q '"status": "completed"' "$1.out"
}

# opened PID: how often a process has the image open.
opened() { for fd in /proc/"$1"/fd/*; do readlink "$fd"; done | grep -c "$folder/disk"; }

# no_errors NAME: every command was done.
no_errors() { ! grep '"error"' "$1.out"; }

# comes_and_goes NAME ROUNDS: a disk, entropy, a network device and a vsock device.
comes_and_goes() {
    round=0 gone_before=$(device_count "$1")
    tell "$1" netdev_add '"type": "tap", "id": "net", "ifname": "tap0", "script": "no", "downscript": "no"'
    while [ $round -lt "$2" ]; do
        round=$((round + 1))
        plug "$1"
        tell "$1" device_add "\"driver\": \"vhost-vsock-pci\", \"id\": \"vsock\", \"guest-cid\": $((round + 2)), \"x-uds-path\": \"$folder/vsock\""
        tell "$1" device_add '"driver": "virtio-net-pci", "id": "nic", "netdev": "net", "mac": "52:54:00:00:00:07"'
        say "$1.com1" "came && becomes has-vsock && becomes '[ -e /sys/class/net/eth0 ]' && ip link set eth0 up" || return 1
        unplug "$1"
        tell "$1" device_del '"id": "vsock"'
        tell "$1" device_del '"id": "nic"'
        say "$1.com1" "went && becomes '! has-vsock && [ ! -e /sys/class/net/eth0 ]'" || return 1
        within 60 deleted "$1" $((gone_before + round * 4)) || return 1
    done
    tell "$1" netdev_del '"id": "net"'
}

tunctl -t tap0 >/dev/null && ip link set tap0 up

start t -object "$(memory share=on)" -machine q35,memory-backend=pc.ram -smp 2 \
    -drive file=over,if=none,id=over,format=raw,snapshot=on \
    -kernel /rig/vmlinuz -initrd "$folder/initrd" -append "console=ttyS0 quiet panic=-1"
template=$!
check answers within 300 say t.com1 true || {
    cat t.out
    exit 1
}
same slots 31 "$(say t.com1 'ls /sys/bus/pci/slots | wc -l')"
say t.com1 'dmesg -c >/dev/null'
check few-times comes_and_goes t 3 || cat t.out
check clean-log say t.com1 log-is-clean
same no-device-left 0x060000 "$(say t.com1 'cat /sys/bus/pci/devices/*/class' | xargs)"
same file-is-closed 0 "$(opened $template)"

# What is written over a disk that was plugged is there after a reset, and no state is saved without it.
tell t device_add '"driver": "virtio-blk-pci", "id": "over", "drive": "over"'
same over-written Aspen "$(say t.com1 "becomes '[ -b /dev/vda ]'; echo Aspen | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null; head -c 5 /dev/vda")"
tell t migrate '"uri": "file:refused"'
check over-is-not-saved within 60 grep -q "disk 'over' has snapshot=on" t.out
tell t system_reset
check over-answers within 300 say t.com1 true
same over-is-kept Aspen "$(say t.com1 "becomes '[ -b /dev/vda ]'; head -c 5 /dev/vda")"
same over-image-is-as-it-was 0 "$(tr -d '\0' <over | wc -c)"
tell t device_del '"id": "over"'
check over-goes within 60 deleted t 13
say t.com1 'dmesg -c >/dev/null'

# A guest that empties a place by itself.
plug t
check came-again say t.com1 came
say t.com1 'echo 0 >/sys/bus/pci/slots/5/power' >/dev/null
check by-the-guest within 60 deleted t 14
check one-is-left say t.com1 '[ -b /dev/vda ]'
tell t device_del '"id": "disk"'
check and-the-other within 60 deleted t 15

# Frozen with entropy that its guest knows, and with a disk of which it has not heard.
tell t device_add '"driver": "virtio-rng-pci", "id": "rng", "addr": "5"'
check entropy say t.com1 "becomes 'grep -q virtio_rng /sys/class/misc/hw_random/rng_current'"
tell t stop
tell t device_add '"driver": "virtio-blk-pci", "id": "disk", "drive": "image", "addr": "1f"'
tell t migrate-set-capabilities '"capabilities": [{"capability": "x-ignore-shared", "state": true}]'
tell t migrate '"uri": "file:state"'
check saved within 60 migrated t || cat t.out
same template-errors 1 "$(grep -c '"error"' t.out)"
tell t quit
wait $template
same template-ends 0 $?
chmod a-w template

for clone in c1 c2; do
    start $clone -object "$(memory share=off,readonly=on,rom=off)" -smp 2 \
        -machine q35,memory-backend=pc.ram -device virtio-rng-pci,id=rng,addr=5 \
        -device virtio-blk-pci,id=disk,drive=image,addr=1f -incoming defer
    running=$!
    tell $clone migrate-set-capabilities \
        '"capabilities": [{"capability": "x-ignore-shared", "state": true}]'
    tell $clone migrate-incoming '"uri": "file:state"'
    check $clone-loaded within 60 migrated $clone || cat $clone.out
    tell $clone cont
    check $clone-hears-of-the-disk say $clone.com1 came
    unplug $clone
    check $clone-lets-go say $clone.com1 went
    check $clone-deleted within 60 deleted $clone 2
    if [ $clone = c1 ]; then
        check fifty-times comes_and_goes $clone 50 || cat $clone.out
        same no-vsock-is-left 0 "$(find "$folder" -name 'vsock*' | wc -l)"
    fi
    plug $clone
    check $clone-plugged say $clone.com1 came
    check $clone-clean-log say $clone.com1 log-is-clean
    check $clone-no-errors no_errors $clone
    tell $clone quit
    wait $running
    same $clone-ends 0 $?
done

# A template whose guest has taken out a device before the freeze: its clones have not got it.
echo 'echo 0 >/sys/bus/pci/slots/2/power' >>"$folder/extra/prepare"
(cd "$folder/extra" && echo prepare | cpio -o -H newc 2>/dev/null) >"$folder/extra.cpio"
cat /rig/initrd "$folder/extra.cpio" >"$folder/initrd"
check taken-out-create pando template create "$folder/without" --kernel /rig/vmlinuz \
    --initrd "$folder/initrd" --append "console=ttyS0 quiet panic=-1" --memory 192M \
    --disk "$folder/disk,id=first" --disk "$folder/disk,ro,id=second" \
    --ready serial:PANDO-READY --timeout 300
same taken-out-disks first.disk "$(cd "$folder/without" && echo *.disk)"
pando clone "$folder/without" --count 1 --serial "$folder/clones" >"$folder/clones.out" 2>&1 &
supervisor=$!
same taken-out-clone "0x060000 0x010000" \
    "$(say "$folder/clones/clone-0.sock" 'cat /sys/bus/pci/devices/*/class' | xargs)" ||
    cat "$folder/clones.out"
kill $supervisor
wait $supervisor
cd / || exit 1
rm -rf "$folder"
