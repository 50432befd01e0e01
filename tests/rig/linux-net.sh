# shellcheck shell=dash
# Debian's kernel with its own virtio_net on taps, each clone's in a network namespace of its own: frozen while
# it pings, with clones that go on, that have addresses of their own, and into which devices are plugged.
# Functions of l1-lib.sh; `say SOCKET COMMAND` runs a command in a guest.

folder=/tmp/net
mkdir -p "$folder/extra" /var/tmp /run/netns
cd "$folder" || exit 1
ln -s /bin/pando qemu-system-x86_64

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
        in_space "$1" ip link set lo up &&
        in_space "$1" ip address add 10.9.0.1/24 dev tap0 &&
        in_space "$1" ip link set tap0 up
}
for name in t n0 n1; do check "space-$name" space $name || exit 1; done

# What the guest has before its ready mark.
cat >"$folder/extra/prepare" <<'PREPARE'
while read -r module; do insmod "/modules/$module.ko"; done </modules/order
cat >/bin/becomes <<'BECOMES'
#!/bin/sh
# Waits until a condition holds, and fails after a minute.
for try in $(seq 300); do eval "$1" && exit 0; sleep 0.2; done
exit 1
BECOMES
cat >/bin/up <<'UP'
#!/bin/sh
# The network device is there and works.
becomes '[ -e /sys/class/net/eth0 ]' || exit 1
ip address add 10.9.0.2/24 dev eth0
ip link set eth0 up
becomes 'ping -c 1 -W 1 10.9.0.1'
UP
cat >/bin/log-is-clean <<'CLEAN'
#!/bin/sh
! dmesg | grep -E '[Ee]rror|[Ff]ail|WARN|Oops|BUG|Call Trace|hung task|blocked for|nobody cared|no space|AE_[A-Z]|bad gso|too short'
CLEAN
chmod +x /bin/becomes /bin/up /bin/log-is-clean
ip link set lo up
PREPARE
cp "$folder/extra/prepare" "$folder/extra/without"
cat >>"$folder/extra/prepare" <<'PREPARE'
up >/dev/null
(while true; do ping -c 1 -W 1 10.9.0.1 >/dev/null && echo >>/tmp/pings; sleep 0.2; done) &
becomes '[ -s /tmp/pings ]'
dmesg -c >/dev/null
PREPARE
pack() { (cd "$folder/extra" && echo prepare | cpio -o -H newc 2>/dev/null) | cat /rig/initrd - >"$1"; }
pack "$folder/initrd"

check create pando template create "$folder/with" --kernel /rig/vmlinuz --initrd "$folder/initrd" \
    --append "console=ttyS0 quiet panic=-1 ipv6.disable=1" --memory 192M \
    --net tap=tap0,netns=t,id=nic --ready serial:PANDO-READY --timeout 300 || exit 1

# in_clone NUMBER COMMAND: a command in a clone.
in_clone() { say "$folder/$engine/clone-$1.sock" "$2"; }

# What a guest is told to do to see that it goes on with its ping.
# shellcheck disable=SC2016
goes_on='wc -l </tmp/pings >/tmp/old; becomes "[ \$(wc -l </tmp/pings) -gt \$(cat /tmp/old) ]"'
# shellcheck disable=SC2016
begin_anew='cd /sys/bus/virtio/drivers/virtio_net; for d in virtio*; do echo "$d" >unbind; echo "$d" >bind; done'

# Files both ways by TCP: segments that are too long for the wire are cut by nobody.
transfers() {
    dd if=/dev/urandom of="$folder/file" bs=64k count=32 2>/dev/null
    sum=$(sha256sum <"$folder/file")
    in_space "n$1" httpd -p 8 -h "$folder" || return 1
    [ "$(in_clone "$1" 'wget -q -O /tmp/file http://10.9.0.1:8/file; sha256sum </tmp/file')" = "$sum" ] || return 1
    in_clone "$1" 'httpd -p 7 -h /tmp' || return 1
    in_space "n$1" wget -q -O "$folder/back" http://10.9.0.2:7/file || return 1
    [ "$(sha256sum <"$folder/back")" = "$sum" ]
}

for engine in copy root kernel; do
    pando clone "$folder/with" --engine $engine --count 2 --serial "$folder/$engine" --net 'tap=tap0,netns=n%d' \
        >"$folder/$engine.out" 2>&1 &
    supervisor=$!
    for clone in 0 1; do
        check "$engine-$clone-answers" in_clone $clone true || cat "$folder/$engine.out"
        check "$engine-$clone-ping-goes-on" in_clone $clone "$goes_on"
        check "$engine-$clone-is-reached" within 30 in_space n$clone ping -c 1 -W 1 10.9.0.2
        same "$engine-$clone-link" 1 "$(in_clone $clone 'cat /sys/class/net/eth0/carrier')"
    done
    [ $engine != copy ] || check transfers transfers 0
    same "$engine-frozen-address" "$(in_clone 0 'cat /sys/class/net/eth0/address')" \
        "$(in_clone 1 'cat /sys/class/net/eth0/address')"
    for clone in 0 1; do
        in_clone $clone "$begin_anew" >/dev/null
        check "$engine-$clone-begins-anew" in_clone $clone up
        check "$engine-$clone-clean-log" in_clone $clone log-is-clean
    done
    differ "$engine-own-address" "$(in_clone 0 'cat /sys/class/net/eth0/address')" \
        "$(in_clone 1 'cat /sys/class/net/eth0/address')"
    kill $supervisor
    wait $supervisor
    same "$engine-exit-status" 0 $? || cat "$folder/$engine.out"
done

# A template without any, into whose clones one is plugged.
mv "$folder/extra/without" "$folder/extra/prepare"
pack "$folder/initrd"
check without-create pando template create "$folder/none" --kernel /rig/vmlinuz --initrd "$folder/initrd" \
    --append "console=ttyS0 quiet panic=-1 ipv6.disable=1" --memory 192M --pci \
    --ready serial:PANDO-READY --timeout 300 || exit 1
for engine in copy root kernel; do
    pando clone "$folder/none" --engine $engine --count 2 --serial "$folder/$engine" \
        --net 'tap=tap0,netns=n%d,mac=52:54:00:00:01:00,plug' >"$folder/$engine.out" 2>&1 &
    supervisor=$!
    for clone in 0 1; do
        check "$engine-$clone-plugged" in_clone $clone up || cat "$folder/$engine.out"
        same "$engine-$clone-plugged-address" "52:54:00:00:01:0$clone" \
            "$(in_clone $clone 'cat /sys/class/net/eth0/address')"
        check "$engine-$clone-plugged-is-reached" within 30 in_space n$clone ping -c 1 -W 1 10.9.0.2
    done
    kill $supervisor
    wait $supervisor
    same "$engine-plugged-exit-status" 0 $? || cat "$folder/$engine.out"
done

# Fifty times by QMP.
tell() { echo "{\"execute\": \"$1\", \"arguments\": {$2}}" >in; }
deleted() { [ "$(grep -c '"device": .*DEVICE_DELETED' out)" -ge "$1" ]; }
mkfifo in
in_space n0 ./qemu-system-x86_64 -nodefaults -nographic -qmp stdio -m 192M -serial unix:com1,server=on,wait=off \
    -netdev tap,id=n,ifname=tap0,script=no,downscript=no -kernel /rig/vmlinuz -initrd "$folder/initrd" \
    -append "console=ttyS0 quiet panic=-1 ipv6.disable=1" <>in >out 2>&1 &
machine=$!
tell qmp_capabilities
check qemu-answers within 300 say com1 true || {
    cat out
    exit 1
}
say com1 'dmesg -c >/dev/null'
comes_and_goes() {
    round=0
    while [ $round -lt 50 ]; do
        round=$((round + 1))
        tell device_add '"driver": "virtio-net-pci", "id": "nic", "netdev": "n"'
        say com1 up || return 1
        tell device_del '"id": "nic"'
        say com1 'becomes "[ ! -e /sys/class/net/eth0 ]"' || return 1
        within 60 deleted $round || return 1
    done
}
check fifty-times comes_and_goes || cat out
check fifty-times-clean-log say com1 log-is-clean
check fifty-times-no-errors sh -c '! grep "\"error\"" out'
tell quit
wait $machine
same qemu-ends 0 $?
cd / || exit 1
rm -rf "$folder"
