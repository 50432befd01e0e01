# shellcheck shell=dash
# Ten clones of one template with all devices: its root file system on a disk, a network, connections to the host,
# entropy and a document; frozen while it writes, makes durable and pings. Each clone goes on with its own.
# Functions of l1-lib.sh; `say SOCKET COMMAND` runs a command in a guest.

folder=/tmp/farm clones=10
mkdir -p "$folder/boot" "$folder/root" /var/tmp /run/netns
cd "$folder" || exit 1

# in_space NAME COMMAND...: a command in a network namespace.
in_space() {
    in_space_name=$1
    shift
    nsenter --net="/run/netns/$in_space_name" "$@"
}

# space NAME: a network namespace with a tap. The host is 10.9.0.1 in each, the guest 10.9.0.2.
space() {
    touch "/run/netns/$1"
    unshare -n mount --bind /proc/self/ns/net "/run/netns/$1" &&
        in_space "$1" tunctl -t tap0 &&
        in_space "$1" ip address add 10.9.0.1/24 dev tap0 &&
        in_space "$1" ip link set tap0 up
}
numbers=$(seq 0 $((clones - 1)))
spaces() {
    space t || return 1
    for number in $numbers; do space "n$number" || return 1; done
}
check spaces spaces || exit 1

# The boot archive only finds the root file system; its own /init goes on there.
cat >boot/prepare <<'PREPARE'
while read -r module; do insmod "/modules/$module.ko"; done </modules/order
mkdir /sysroot
mount -t ext4 /dev/vda /sysroot && exec switch_root /sysroot /init
PREPARE
(cd boot && echo prepare | cpio -o -H newc 2>/dev/null) | cat /rig/initrd - >initrd
(cd root && cpio -i </rig/initrd 2>/dev/null)
for file in /bin/vsock /rig/e2fsck $(find /lib /lib64 /usr/lib -name '*.so*' 2>/dev/null); do
    mkdir -p "root${file%/*}"
    cp -L "$file" "root$file"
done
cat >root/prepare <<'PREPARE'
cat >/bin/becomes <<'BECOMES'
#!/bin/sh
# Waits until a condition holds, and fails after two minutes.
for try in $(seq 240); do eval "$1" && exit 0; sleep 0.5; done
exit 1
BECOMES
cat >/bin/goes-on <<'GOES'
#!/bin/sh
# What was under way at the freeze: a file grows.
wc -c <"$1" >/tmp/old
becomes "[ \$(wc -c <$1) -gt \$(cat /tmp/old) ]"
GOES
cat >/bin/proof <<'PROOF'
#!/bin/sh
# All that is looked at in a clone: a word for each thing that is as it must be.
goes-on /rounds && echo writes
goes-on /tmp/pings && echo pings
touch /tmp/stop
becomes '[ -e /tmp/stopped ]' && echo stops
echo 3 >/proc/sys/vm/drop_caches
sha256sum -c /blob.sum >/dev/null && echo reads
dd if=/dev/hwrng bs=32 count=1 2>/dev/null | sha256sum >/mine && echo draws
cd /sys/bus/virtio/drivers/virtio_net && for d in virtio*; do echo "$d" >unbind; echo "$d" >bind; done
becomes '[ -e /sys/class/net/eth0 ]'
ip address add 10.9.0.2/24 dev eth0
ip link set eth0 up
becomes 'ping -c 1 -W 1 10.9.0.1 >/dev/null' && echo reaches
mount -o remount,ro / && /rig/e2fsck -fn /dev/vda >/tmp/fsck 2>&1 && echo clean
dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|Oops|BUG|Call Trace|hung task|blocked for' || echo quiet
PROOF
chmod +x /bin/becomes /bin/goes-on /bin/proof
ip link set lo up
ip address add 10.9.0.2/24 dev eth0
ip link set eth0 up
dd if=/dev/hwrng of=/blob bs=64k count=8 2>/dev/null
sha256sum /blob >/blob.sum
sync
(while [ ! -e /tmp/stop ]; do
    dd if=/blob of=/load bs=64k conv=fsync 2>/dev/null
    echo >>/rounds
    sleep 0.5
done; touch /tmp/stopped) &
(while [ ! -e /tmp/stop ]; do ping -c 1 -W 1 10.9.0.1 >/dev/null && echo >>/tmp/pings; sleep 0.5; done) &
vsock answer 52 </dev/null >/tmp/answer 2>&1 &
becomes '[ -s /rounds ] && [ -s /tmp/pings ]'
dmesg -c >/dev/null
PREPARE
make_image() { dd if=/dev/zero of=disk.img bs=1M count=0 seek=64 2>/dev/null && /rig/mke2fs -q -t ext4 -d root -F disk.img; }
check image make_image

check create pando template create "$folder/template" --kernel /rig/vmlinuz --initrd initrd \
    --append "console=ttyS0 quiet panic=-1 ipv6.disable=1" --memory 192M --disk disk.img,id=root --rng --document \
    --net tap=tap0,netns=t,id=nic --vsock 3 --console null,console --ready serial:PANDO-READY --timeout 300 || exit 1
before=$(sha256sum template/*.mem template/*.disk)

# hears_console CLONE: what the guest writes to its console comes out at the clone's own socket, and nobody else's.
hears_console() {
    say "serial/clone-$1.sock" "echo console-$1 >/dev/hvc0"
    [ "$(tr -d '\r' <"heard-$1" | sort -u)" = "console-$1" ]
}

pando clone "$folder/template" --engine root --count $clones --serial "$folder/serial" --vsock "$folder/vsock" \
    --console "$folder/serial" --net 'tap=tap0,netns=n%d' >clones.out 2>&1 &
supervisor=$!
for clone in $numbers; do
    same "$clone-goes-on" "writes pings stops reads draws reaches clean quiet" \
        "$(SAY_LIMIT=280 say "serial/clone-$clone.sock" proof | xargs)" || cat clones.out
    same "$clone-connects" "$((3 + clone)) hello" "$(vsock dial "vsock/clone-$clone.vsock" 52 hello)"
    vsock hear "serial/clone-$clone.console0-0.sock" >"heard-$clone" &
    hearer=$!
    check "$clone-console" within 60 hears_console "$clone" || cat "heard-$clone"
    kill $hearer
    check "$clone-is-reached" within 60 in_space "n$clone" ping -c 1 -W 1 10.9.0.2
done
each() { for clone in $numbers; do say "serial/clone-$clone.sock" "$1"; done; }
same addresses-differ $clones "$(each 'cat /sys/class/net/eth0/address' | sort -u | wc -l)"
same entropy-differs $clones "$(each 'cat /mine' | sort -u | wc -l)"
kill $supervisor
wait $supervisor
same exit-status 0 $? || cat clones.out
same files-unchanged "$before" "$(sha256sum template/*.mem template/*.disk)"
cd / || exit 1
rm -rf "$folder"
