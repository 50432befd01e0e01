# shellcheck shell=dash
# What tells clones of one template apart: the VM generation ID and random numbers, UUID, MAC, vsock CID, and
# what the guest renews by itself from its document (guest/vm-fork). Functions of l1-lib.sh; `say SOCKET
# COMMAND` runs a command in a guest.

folder=/tmp/identity
mkdir -p "$folder/extra/bin" "$folder/extra/etc/vm-fork.d"
# Debian's 6.1 has no driver for the generation ID: its guests know of their cloning by the document alone.
has_driver=no
case $(uname -r) in 6.1.*) ;; *) has_driver=yes ;; esac

# The guest's unit, and perl with what it needs to run.
cp /rig/vm-fork "$folder/extra/bin/vm-fork"
chmod +x "$folder/extra/bin/vm-fork"
for file in /usr/bin/perl $(find /lib /lib64 /usr/lib -name 'lib[mc].so.6' -o -name libcrypt.so.1 -o -name 'ld-linux-x86-64.so.2' 2>/dev/null); do
    mkdir -p "$folder/extra${file%/*}"
    cp "$file" "$folder/extra$file"
done
cat >"$folder/extra/prepare" <<'PREPARE'
while read -r module; do insmod "/modules/$module.ko"; done </modules/order
mkdir -p /run /etc
ln -s /usr/bin/perl /bin/perl
echo template >/etc/hostname
hostname template
cat >/bin/on-event <<'EVENT'
#!/bin/sh
# As guest/90-vm-fork.rules.
[ "$RESIZE$NEW_VMGENID" = 1 ] || exit 0
vm-fork >>/tmp/vm-fork.log 2>&1
EVENT
cat >/etc/vm-fork.d/50-payload <<'HOOK'
#!/bin/sh
cat "$1/opt/com.example/key" >/tmp/payload
HOOK
chmod +x /bin/on-event /etc/vm-fork.d/50-payload
uevent /bin/on-event &
PREPARE
(cd "$folder/extra" && find . | cpio -o -H newc 2>/dev/null) >"$folder/extra.cpio"
cat /rig/initrd "$folder/extra.cpio" >"$folder/initrd"
for clone in 0 1; do echo "payload of $clone" >"$folder/key-$clone"; done

# create NAME OPTIONS...: a template.
create() {
    created=$1
    shift
    pando template create "$folder/$created" --kernel /rig/vmlinuz --initrd "$folder/initrd" \
        --append "console=ttyS0 quiet panic=-1" --memory 256M --ready serial:PANDO-READY --timeout 300 "$@" >/dev/null
}

# in_clone NUMBER COMMAND: a command in a clone.
in_clone() { say "$folder/serial/clone-$1.sock" "$2"; }

# Where the 16 bytes are: the kernel has no file for them.
generation='dd if=/dev/mem bs=16 skip=61184 count=1 2>/dev/null | od -An -tx1'
is_renewed='until [ -e /run/vm-fork/done ]; do sleep 0.2; done'

# has_renewed NUMBER: what a clone of engine root has made of its document.
has_renewed() {
    # Emulated twice, perl is slow.
    check "root-$1-renewed" env SAY_LIMIT=240 say "$folder/serial/clone-$1.sock" "$is_renewed"
    same "root-$1-hostname" "clone-$1" "$(in_clone "$1" hostname)"
    same "root-$1-payload" "payload of $1" "$(in_clone "$1" 'cat /tmp/payload')"
    same "root-$1-is-told" "clone $1 $((3 + $1))" \
        "$(in_clone "$1" 'cd /run/vm-fork/document; cat role clone cid' | xargs)"
    same "root-$1-log" "" "$(in_clone "$1" 'cat /tmp/vm-fork.log')"
}

check identity-create create with --document --vsock 3 --net id=net0 || exit 1
check identity-verify pando template verify "$folder/with" || exit 1
before=$(sha256sum "$folder"/with/*.mem)

engines=root
[ $has_driver = no ] || engines="copy root kernel"
for engine in $engines; do
    rm -rf "$folder/serial"
    pando clone "$folder/with" --engine "$engine" --count 2 --serial "$folder/serial" \
        --document "opt/com.example/key=$folder/key-%d" >"$folder/out" 2>&1 &
    supervisor=$!
    check "$engine-answers" in_clone 0 true || cat "$folder/out"
    same "$engine-device" QEMUVGID "$(in_clone 0 'cat /sys/bus/acpi/devices/QEMUVGID:00/hid')"
    differ "$engine-generation" "$(in_clone 0 "$generation")" "$(in_clone 1 "$generation")"
    for clone in 0 1; do
        [ $has_driver = no ] || check "$engine-$clone-reseeded" in_clone $clone \
            "dmesg | grep 'crng reseeded due to virtual machine fork'"
        [ "$engine" != root ] || has_renewed $clone
    done
    differ "$engine-random" "$(in_clone 0 'head -c 16 /dev/urandom | od -An -tx1')" \
        "$(in_clone 1 'head -c 16 /dev/urandom | od -An -tx1')"
    kill "$supervisor"
    wait "$supervisor"
done
same identity-file-unchanged "$before" "$(sha256sum "$folder"/with/*.mem)"

# unique NAME TEMPLATE [FLAG...]: the program's own proof. The guest's shell wants a word in front of a
# command, and says it in front of each line of the answer.
unique() {
    unique_of=$1
    shift
    # The emulator's clocks drift: its time is not what is proven here.
    pando clone "$unique_of" --check-unique --shell-prefix 'u ' --clock-tolerance 2000 --answer-within 240 "$@"
}
check identity-unique unique "$folder/with" --strict --wait-for "$is_renewed"
check identity-unique-root unique "$folder/with" --engine root
check identity-without-create create without --vmgenid=false
unique "$folder/without" >"$folder/out" 2>&1
same identity-not-unique-status 1 $?
cat "$folder/out"
check identity-not-unique-says-which grep -q 'not unique: generation id (not there)' "$folder/out"
