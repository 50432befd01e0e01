#!/bin/busybox sh
# shellcheck shell=dash
# First program of the guest under test (L2): busybox, a ready mark, then commands from COM1.
#
# A request is one line, `ID COMMAND`. Every line that the command prints comes back as `ID: line`,
# and the end as `ID= STATUS`, so that kernel messages and older output cannot be mistaken for it. A last
# line without an end is a line all the same.
/bin/busybox mkdir -p /bin /proc /sys /dev /tmp
/bin/busybox --install -s /bin
export PATH=/bin HOME=/tmp TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo -onlcr
dmesg -n 1
# A scenario may add an archive with something to do before the ready mark.
# shellcheck source=/dev/null
[ ! -f /prepare ] || . /prepare
# What tells a boot that goes on from another one: the kernel chooses the id when it is first read.
cat /proc/sys/kernel/random/boot_id >/dev/null
cut -d' ' -f1 /proc/uptime >/tmp/ready-uptime
echo "guest $(uname -r) up $(cut -d' ' -f1 /proc/uptime) s, $(nproc) cpus"
echo PANDO-READY
while true; do
    if IFS=' ' read -r id command; then
        [ -n "$command" ] || continue
        {
            sh -c "$command"
            echo "status-of-command $?"
        } 2>&1 </dev/null | sed -e "s/^status-of-command /$id= /;t" \
            -e "s/^\(.*\)status-of-command \([0-9]*\)\$/$id: \1\n$id= \2/;t" -e "s/^/$id: /"
    else
        sleep 1
    fi
done
