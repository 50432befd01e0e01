# shellcheck shell=dash
# What tells clones of one template apart: the VM generation ID, and random numbers. Functions of
# l1-lib.sh; `say SOCKET COMMAND` runs a command in a guest.

folder=/tmp/identity
mkdir -p "$folder"

# in_clone NUMBER COMMAND: a command in a clone.
in_clone() { say "$folder/serial/clone-$1.sock" "$2"; }

# Where the 16 bytes are: the kernel has no file for them.
generation='dd if=/dev/mem bs=16 skip=61184 count=1 2>/dev/null | od -An -tx1'

pando template create "$folder/with" --kernel /rig/vmlinuz --initrd /rig/initrd \
    --append "console=ttyS0 quiet panic=-1" --memory 256M --ready serial:PANDO-READY --timeout 300 >/dev/null
check identity-verify pando template verify "$folder/with" || exit 1
before=$(sha256sum "$folder"/with/*.mem)

for engine in copy root kernel; do
    rm -rf "$folder/serial"
    pando clone "$folder/with" --engine $engine --count 2 --serial "$folder/serial" >"$folder/out" 2>&1 &
    supervisor=$!
    check "$engine-answers" in_clone 0 true || cat "$folder/out"
    same "$engine-device" QEMUVGID "$(in_clone 0 'cat /sys/bus/acpi/devices/QEMUVGID:00/hid')"
    differ "$engine-generation" "$(in_clone 0 "$generation")" "$(in_clone 1 "$generation")"
    for clone in 0 1; do
        check "$engine-$clone-reseeded" in_clone $clone \
            "dmesg | grep 'crng reseeded due to virtual machine fork'"
    done
    differ "$engine-random" "$(in_clone 0 'head -c 16 /dev/urandom | od -An -tx1')" \
        "$(in_clone 1 'head -c 16 /dev/urandom | od -An -tx1')"
    # The kernel keeps it: the same boot.
    same "$engine-boot" "$(in_clone 0 'cat /proc/sys/kernel/random/boot_id')" \
        "$(in_clone 1 'cat /proc/sys/kernel/random/boot_id')"
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
    pando clone "$unique_of" --check-unique --shell-prefix 'u ' --clock-tolerance 2000 "$@"
}
check identity-unique unique "$folder/with"
check identity-unique-root unique "$folder/with" --engine root
pando template create "$folder/without" --kernel /rig/vmlinuz --initrd /rig/initrd --vmgenid=false \
    --append "console=ttyS0 quiet panic=-1" --memory 256M --ready serial:PANDO-READY --timeout 300 >/dev/null
unique "$folder/without" >"$folder/out" 2>&1
same identity-not-unique-status 1 $?
cat "$folder/out"
check identity-not-unique-says-which grep -q 'not unique: generation id (not there)' "$folder/out"
