# shellcheck shell=dash
# Debian's kernel with its own virtio drivers under Pando: entropy, disks, connections to the host and ports, a
# file system in use, a connection and a port open when the machine is frozen, and clones that go on with it,
# each on its own. Functions of l1-lib.sh; `say SOCKET COMMAND` runs a command in a guest; `vsock` is both ends
# of a connection, in the guest too, and whoever is at a port.

folder=/tmp/devices template=/tmp/devices/template
mkdir -p "$folder/extra" /var/tmp

# The program that speaks AF_VSOCK, with what it needs to run.
for file in /bin/vsock $(find /lib /lib64 /usr/lib -name libc.so.6 -o -name libgcc_s.so.1 -o -name 'ld-linux-x86-64.so.2' 2>/dev/null); do
    mkdir -p "$folder/extra${file%/*}"
    cp "$file" "$folder/extra$file"
done

# What the guest does before its ready mark: drivers, a file system of the disk that it writes, files on
# it, and a writer that never ends. The read-only disk has a file system of its own.
cat >"$folder/extra/prepare" <<'PREPARE'
while read -r module; do insmod "/modules/$module.ko"; done </modules/order
mkdir -p /data /rom
mount -t ext4 /dev/vda /data
mount -t ext4 -o ro,noload /dev/vdb /rom
dd if=/dev/hwrng of=/data/blob bs=64k count=8 2>/dev/null
sha256sum /data/blob >/data/blob.sum
sync
# The emulator is slow: between two rounds others get their turn. It is frozen in the middle of one.
(n=0; while [ ! -e /tmp/stop ]; do
    n=$((n + 1))
    dd if=/data/blob of=/data/load bs=64k conv=fsync 2>/dev/null
    echo $n >/data/rounds
    sleep 0.5
done; touch /tmp/stopped) &
until [ -s /data/rounds ]; do sleep 0.1; done
# A program that answers with the CID that it has, and one with a connection to the host that stays open.
if grep -q 0x1053 /sys/bus/pci/devices/*/device; then
    vsock answer 52 </dev/null >/tmp/answer 2>&1 &
    vsock hold 4000 </dev/null >/tmp/held 2>&1 &
    until grep -q connected /tmp/held; do sleep 0.1; done
fi
# A port: lines for whoever is there now, then an answer to each line, whoever comes and goes.
port=$(grep -lx org.aspen.rig /sys/class/virtio-ports/*/name 2>/dev/null)
if [ -n "$port" ]; then
    exec 3<>"/dev/$(basename "${port%/name}")"
    seq 5000 >&3
    (while :; do
        while read -r line <&3; do echo "$(cat /data/mine 2>/dev/null) $line" >&3; done
        sleep 0.2
    done) &
fi
PREPARE
(cd "$folder/extra" && find . | cpio -o -H newc 2>/dev/null) >"$folder/extra.cpio"
cat /rig/initrd "$folder/extra.cpio" >"$folder/initrd"

make_image() {
    dd if=/dev/zero of="$1" bs=1M count=0 seek="$2" 2>/dev/null && /rig/mke2fs -q -t ext4 -F "$1"
}
check devices-image make_image "$folder/disk.img" 64
check devices-rom-image make_image "$folder/rom.img" 16
images=$(sha256sum "$folder"/*.img)
vsock host "$folder/template.vsock_4000" &
answers=$!
vsock hear "$folder/template.port" >"$folder/heard" &
hears=$!

check devices-create pando template create "$template" --kernel /rig/vmlinuz --initrd "$folder/initrd" \
    --append "console=ttyS0 quiet panic=-1" --memory 256M --rng --vsock "3,uds=$folder/template.vsock" \
    --console "unix:$folder/template.port,name=org.aspen.rig" --console null,console \
    --disk "$folder/disk.img,serial=aspen" --disk "$folder/rom.img,ro" \
    --ready serial:PANDO-READY --timeout 300 || exit 1
same devices-originals-unchanged "$images" "$(sha256sum "$folder"/*.img)"
kill $answers
wait $hears
same devices-port-heard "$(seq 5000 | sha256sum)" "$(sha256sum <"$folder/heard")"
check devices-verify pando template verify "$template" || exit 1
before=$(sha256sum "$template"/*.mem "$template"/*.disk)
same devices-files 3 "$(echo "$before" | wc -l)"

# What ends the load, as a command for a guest.
stop_load='touch /tmp/stop; until [ -e /tmp/stopped ]; do sleep 0.2; done'

# in_clone NUMBER COMMAND: a command in a clone.
in_clone() { say "$folder/$engine/clone-$1.sock" "$2"; }

sees_devices() {
    same "$engine-functions" "0x060000 0x010000 0x010000 0x00ff00 0x078000 0x078000" \
        "$(in_clone 0 'cat /sys/bus/pci/devices/*/class' | xargs)"
    same "$engine-messages" 16 "$(in_clone 0 "grep -cE 'MSI.*virtio[0-9]' /proc/interrupts")"
    same "$engine-serial" aspen "$(in_clone 0 'xargs </sys/block/vda/serial')"
    same "$engine-read-only" "0 1" "$(in_clone 0 'cat /sys/block/vda/ro /sys/block/vdb/ro' | xargs)"
    same "$engine-entropy-source" virtio_rng.0 \
        "$(in_clone 0 'cat /sys/class/misc/hw_random/rng_current')"
}

# A clone is reached at its own socket and says its own CID; it reaches the host; the connection that was open at
# the freeze is gone, and what listened goes on.
has_connections() {
    same "$engine-$1-vsock-cid" "$2 hello" "$(vsock dial "$folder/$engine/clone-$1.vsock" 52 hello)"
    vsock host "$folder/$engine/clone-$1.vsock_4000" &
    answers=$!
    within 20 test -S "$folder/$engine/clone-$1.vsock_4000"
    same "$engine-$1-vsock-host" "host from-$1" "$(in_clone "$1" "vsock call 4000 from-$1")"
    kill $answers
    # shellcheck disable=SC2016
    same "$engine-$1-vsock-nobody" 1 "$(in_clone "$1" 'vsock call 4001 x 2>/dev/null; echo $?')"
    # shellcheck disable=SC2016
    check "$engine-$1-vsock-reset" in_clone "$1" \
        'for try in $(seq 100); do grep -q "gone: ConnectionReset" /tmp/held && exit 0; sleep 0.2; done; cat /tmp/held; exit 1'
}

# What the guest writes to its console, to whoever is there by then.
hears_console() {
    in_clone "$1" "echo console-$1 >/dev/hvc0"
    grep -q "console-$1" "$folder/console"
}

# The clone's guest answers at its own socket, one program after the other, and its console is heard.
has_ports() {
    for what in answers answers-the-next; do
        same "$engine-$1-port-$what" "$engine-$1 $what" \
            "$(vsock tell "$folder/$engine/clone-$1.org.aspen.rig.sock" "$what")"
    done
    vsock hear "$folder/$engine/clone-$1.console0-0.sock" >"$folder/console" &
    hears=$!
    check "$engine-$1-console-heard" within 60 hears_console "$1"
    kill $hears
}

for engine in copy root kernel; do
    # The template's CID, unless another is asked for.
    first=3
    set --
    [ $engine != root ] || { first=100 && set -- --vsock-cid $first; }
    pando clone "$template" --engine $engine --count 2 --serial "$folder/$engine" --json \
        --vsock "$folder/$engine" --console "$folder/$engine" "$@" \
        >"$folder/$engine.json" 2>"$folder/$engine.err" &
    supervisor=$!
    check "$engine-answers" in_clone 0 true || cat "$folder/$engine.err"
    sees_devices
    for clone in 0 1; do
        # The load that ran at the freeze goes on: no request was lost.
        # shellcheck disable=SC2016
        check "$engine-$clone-load-goes-on" in_clone $clone \
            'cp /data/rounds /tmp/old; for try in $(seq 300); do cmp -s /data/rounds /tmp/old || exit 0; sleep 0.2; done; exit 1'
        check "$engine-$clone-data-whole" in_clone $clone \
            'echo 3 >/proc/sys/vm/drop_caches; sha256sum -c /data/blob.sum' || cat "$folder/$engine.err"
        in_clone $clone "echo $engine-$clone >/data/mine; touch /data/only-$clone; sync" >/dev/null
    done
    for clone in 0 1; do
        same "$engine-$clone-own-data" "$engine-$clone" \
            "$(in_clone $clone 'echo 3 >/proc/sys/vm/drop_caches; cat /data/mine')"
        same "$engine-$clone-no-other-data" "/data/only-$clone" "$(in_clone $clone 'echo /data/only-*')"
        check "$engine-$clone-disk-clean" in_clone $clone \
            "! dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|Oops|BUG|Call Trace|hung task|blocked for'"
    done
    has_connections 0 $first
    has_connections 1 $((first + 1))
    has_ports 0
    has_ports 1
    one=$(in_clone 0 'dd if=/dev/hwrng bs=32 count=1 2>/dev/null | sha256sum')
    differ "$engine-entropy-differs" "$one" \
        "$(in_clone 1 'dd if=/dev/hwrng bs=32 count=1 2>/dev/null | sha256sum')"
    # Unmounted and mounted again: the file system needs no recovery, and the data is on the disk.
    check "$engine-remounts" in_clone 1 "$stop_load; umount /data && dmesg -c >/dev/null && mount -t ext4 /dev/vda /data && sha256sum -c /data/blob.sum && ! dmesg | grep recover"
    kill $supervisor
    wait $supervisor
    same "$engine-exit-status" 0 $? || cat "$folder/$engine.json" "$folder/$engine.err"
    same "$engine-files-unchanged" "$before" "$(sha256sum "$template"/*.mem "$template"/*.disk)"
done

# A machine of its own writes its image: what it leaves is a clean file system, discards made holes.
pando run --kernel /rig/vmlinuz --initrd "$folder/initrd" --append "console=ttyS0 quiet panic=-1" \
    --memory 256M --rng --disk "$folder/disk.img" --disk "$folder/rom.img,ro" \
    --serial "unix:$folder/run.sock" >"$folder/run.out" 2>&1 &
machine=$!
check run-answers within 240 say "$folder/run.sock" true || cat "$folder/run.out"
check run-image-is-taken sh -c "! pando run --kernel /rig/vmlinuz --disk $folder/disk.img --serial null 2>$folder/busy.err && grep 'in use by another machine' $folder/busy.err"
check run-writes say "$folder/run.sock" \
    "$stop_load; rm -f /data/load; fstrim -v /data; echo kept >/data/kept; umount /data"
say "$folder/run.sock" "(sleep 1; poweroff -f) >/dev/null 2>&1 &" >/dev/null
check run-ends within 60 gone $machine || kill $machine
wait $machine
check run-file-system-is-clean /rig/e2fsck -fn "$folder/disk.img"
same run-read-only-image-unchanged "$(echo "$images" | grep rom.img)" "$(sha256sum "$folder/rom.img")"
rm -rf "$folder"
