# shellcheck shell=dash
# Debian's kernel on a disk that another process serves (vhost-user): QEMU's storage daemon. Written, read,
# mounted and checked; through a save and a restore, and when the daemon is killed; plugged and unplugged. Then the same machine as a
# template, and what its clones cannot have. Functions of l1-lib.sh; `say SOCKET COMMAND` runs a command in a guest.

folder=/tmp/vhost
mkdir -p "$folder/extra" /var/tmp
cd "$folder" || exit 1
ln -s /bin/pando qemu-system-x86_64

cat >"$folder/extra/prepare" <<'PREPARE'
while read -r module; do insmod "/modules/$module.ko"; done </modules/order
cat >/bin/becomes <<'BECOMES'
#!/bin/sh
for try in $(seq 300); do eval "$1" && exit 0; sleep 0.2; done
exit 1
BECOMES
cat >/bin/writes <<'WRITES'
#!/bin/sh
# Writes the same again and again, until it is killed.
(while true; do dd if=/tmp/random of=/dev/vda bs=64k oflag=direct; done) >/dev/null 2>&1 </dev/null &
echo $! >/tmp/writer
WRITES
chmod +x /bin/becomes /bin/writes
PREPARE
(cd "$folder/extra" && echo prepare | cpio -o -H newc 2>/dev/null) >"$folder/extra.cpio"
cat /rig/initrd "$folder/extra.cpio" >"$folder/initrd"
dd if=/dev/zero of="$folder/image" bs=1M count=0 seek=16 2>/dev/null

# serve NAME: the daemon, until it is killed.
serve() {
    rm -f "$folder/socket"
    /rig/qemu-storage-daemon --blockdev file,node-name=disk,filename=image \
        --export vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=socket,writable=on >>daemon.log 2>&1 &
    daemon=$!
    # Its path is there before it listens: 00010000 is who does.
    check "$1" within 60 grep -q " 00010000 .*socket\$" /proc/net/unix
}

# start NAME OPTIONS...: a machine that speaks QMP at NAME.in and NAME.out, COM1 at NAME.com1.
start() {
    name=$1
    shift
    mkfifo "$name.in"
    ./qemu-system-x86_64 -nodefaults -nographic -qmp stdio -m 192M \
        -serial "unix:$name.com1,server=on,wait=off" \
        -chardev "socket,id=vu,path=$folder/socket" "$@" <>"$name.in" >"$name.out" 2>"$name.err" &
    tell "$name" qmp_capabilities
}

# tell NAME COMMAND [ARGUMENTS]: a QMP command, its arguments without braces.
tell() { echo "{\"execute\": \"$2\", \"arguments\": {$3}}" >"$1.in"; }

# memory HOW: RAM on the file `template`.
memory() { echo "memory-backend-file,id=pc.ram,mem-path=template,size=192M,$1"; }

# migrated NAME: true when its last save or load is complete.
migrated() {
    tell "$1" query-migrate
    sleep 0.2
    grep -q '"status": "completed"' "$1.out"
}

# running NAME: true when its monitor says so.
running() {
    : >"$1.out"
    tell "$1" query-status
    within 20 grep -q '"status": "running"' "$1.out"
}

serve daemon
start t -object "$(memory share=on)" -machine q35,memory-backend=pc.ram -smp 2 \
    -device vhost-user-blk-pci,chardev=vu,id=vb0,num-queues=1,addr=5 \
    -kernel /rig/vmlinuz -initrd "$folder/initrd" -append "console=ttyS0 quiet panic=-1"
template=$!
check answers within 300 say t.com1 true || {
    cat t.out t.err
    exit 1
}
check disk say t.com1 "becomes '[ -b /dev/vda ]'"
same sectors 32768 "$(say t.com1 'cat /sys/block/vda/size')"

# What the guest writes is in the image, and what it reads is that.
check written say t.com1 \
    'dd if=/dev/urandom of=/tmp/random bs=64k count=64 2>/dev/null && dd if=/tmp/random of=/dev/vda bs=64k oflag=direct conv=fsync 2>/dev/null'
sum=$(say t.com1 'sha256sum </tmp/random')
same image-has-it "$sum" "$(head -c 4194304 image | sha256sum)"
same read-back "$sum" "$(say t.com1 'dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | sha256sum')"

# A file system: mounted, written, unmounted, and whole on the host's side.
check made /rig/mke2fs -q -t ext4 -F "$folder/image"
check file-system say t.com1 'mkdir /data && mount -t ext4 /dev/vda /data && cp /tmp/random /data/random && sync && umount /data && mount -t ext4 /dev/vda /data && cmp /tmp/random /data/random && umount /data'
check whole /rig/e2fsck -fn "$folder/image"
check written-again say t.com1 'dd if=/tmp/random of=/dev/vda bs=64k oflag=direct conv=fsync 2>/dev/null'

# Stopped while it writes, and it goes on.
say t.com1 writes
stopped_and_on() {
    tell t stop
    sleep 0.3
    tell t cont
    sleep 0.3
}
stopped_and_on
stopped_and_on
stopped_and_on
check goes-on running t

# Saved and restored on the same daemon. A request that came with the stop is done first.
tell t stop
tell t migrate-set-capabilities '"capabilities": [{"capability": "x-ignore-shared", "state": true}]'
tell t migrate '"uri": "file:state"'
check saved within 60 migrated t || cat t.out t.err
tell t quit
wait $template
same template-ends 0 $?
start r -object "$(memory share=on)" -machine q35,memory-backend=pc.ram -smp 2 \
    -device vhost-user-blk-pci,chardev=vu,id=vb0,num-queues=1,addr=5 -incoming defer
restored=$!
tell r migrate-set-capabilities '"capabilities": [{"capability": "x-ignore-shared", "state": true}]'
tell r migrate-incoming '"uri": "file:state"'
check restored within 60 migrated r || cat r.out r.err
tell r cont
# The guest still writes in its loop, always the same.
# shellcheck disable=SC2016
same restored-reads "$sum" "$(say r.com1 'kill $(cat /tmp/writer); sleep 1; dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | sha256sum')"

# The daemon is killed: the guest's disk is dead, its machine is not.
kill -9 "$daemon"
wait "$daemon"
check told within 60 grep -q "vhost-user backend at $folder/socket has closed its socket" r.err || cat r.err
check vm-goes-on running r
same guest-goes-on alive "$(say r.com1 'echo alive')"

# Another one serves it after the guest's own reset of the device.
serve daemon-again
check reset say r.com1 'cd /sys/bus/pci/drivers/virtio-pci; echo 0000:00:05.0 >unbind; echo 0000:00:05.0 >bind; becomes "[ -b /dev/vda ]"'
same serves-again "$sum" "$(say r.com1 'dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | sha256sum')"

# Unplugged: only so can clones be made. Plugged again, and out.
tell r device_del '"id": "vb0"'
check unplugged within 60 grep -q '"device": "vb0".*DEVICE_DELETED' r.out || cat r.out
check gone say r.com1 "becomes '[ ! -b /dev/vda ]'"
tell r device_add '"driver": "vhost-user-blk-pci", "id": "vb1", "chardev": "vu", "addr": "6"'
check plugged say r.com1 "becomes '[ -b /dev/vda ]'"
same plugged-reads "$sum" "$(say r.com1 'dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | sha256sum')"
tell r device_del '"id": "vb1"'
check out-again within 60 grep -q '"device": "vb1".*DEVICE_DELETED' r.out
tell r stop
tell r migrate-set-capabilities '"capabilities": [{"capability": "x-ignore-shared", "state": true}]'
: >r.out
tell r migrate '"uri": "file:frozen"'
check frozen within 60 migrated r || cat r.out r.err
tell r quit
wait $restored
same restored-ends 0 $?
chmod a-w template

# A clone with the device is refused, one without it runs.
clone() { echo "-object $(memory share=off,readonly=on,rom=off) -machine q35,memory-backend=pc.ram -smp 2"; }
# shellcheck disable=SC2046
start refused $(clone) -device vhost-user-blk-pci,chardev=vu,id=vb0 -incoming defer
wait $!
same clone-is-refused 1 $?
check clone-says-why grep -q "memory backend \"pc.ram\" is a clone's (share=off,readonly=on,rom=off)" refused.err ||
    cat refused.err
# shellcheck disable=SC2046
start c $(clone) -incoming defer
cloned=$!
tell c migrate-set-capabilities '"capabilities": [{"capability": "x-ignore-shared", "state": true}]'
tell c migrate-incoming '"uri": "file:frozen"'
check cloned within 60 migrated c || cat c.out c.err
tell c cont
same clone-answers alive "$(say c.com1 'echo alive')"
: >c.out
tell c device_add '"driver": "vhost-user-blk-pci", "id": "vb2", "chardev": "vu"'
check clone-is-plugged-none within 20 grep -q "is a clone's" c.out || cat c.out
tell c quit
wait $cloned
kill "$daemon"
wait "$daemon"
cd / || exit 1
rm -rf "$folder"
