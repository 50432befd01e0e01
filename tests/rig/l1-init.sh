#!/bin/busybox sh
# shellcheck shell=dash
# First program of the outer machine (L1): a kernel with KVM on emulated SVM, loopback and nothing else.
/bin/busybox mkdir -p /bin /sbin /usr/bin /usr/sbin /proc /sys /dev /tmp /run
/bin/busybox --install -s /bin
export PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME=/tmp TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs -o size=100% tmpfs /dev/shm
mount -t tmpfs -o size=100% tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null
# Kernel messages would tear the report lines apart; an oops still prints.
dmesg -n 1
ip link set lo up
for module in irqbypass ccp kvm kvm-amd tun; do
    if [ -f "/lib/modules/$module.ko" ]; then
        insmod "/lib/modules/$module.ko" || echo "CHECK l1-module-$module FAIL insmod"
    fi
done
# shellcheck source=tests/rig/l1-lib.sh
. /rig/lib.sh
echo "RIG up $(uname -r), $(nproc) cpus, $(awk '/MemTotal/{print int($2 / 1024)}' /proc/meminfo) MiB"
cd /tmp || exit 1
# shellcheck source=/dev/null
(. /rig/scenario.sh)
echo "RIG scenario exit $?"
if dmesg | grep -qE 'Oops:|kernel BUG at|unable to handle|general protection fault'; then
    dmesg | tail -n 60
    echo "CHECK l1-kernel FAIL it reported an oops, see the console log"
fi
echo "RIG done"
poweroff -f
