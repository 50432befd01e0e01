# shellcheck shell=dash
# Debian's kernel through QEMU's own command lines: a template by `stop` and `migrate`, two clones at
# once, who the machine says it is, its power button. Functions of l1-lib.sh; `say SOCKET COMMAND`
# runs a command in a guest.

folder=/tmp/qemu
mkdir -p "$folder"
cd "$folder" || exit 1
ln -s /bin/pando qemu-system-x86_64
uuid=8a1b7f0e-32a5-4f4b-9c7e-0123456789ab

# start NAME OPTIONS...: a machine with its monitor at NAME.in and NAME.out, COM1 at NAME.com1.
start() {
    name=$1
    shift
    mkfifo "$name.in"
    ./qemu-system-x86_64 -nodefaults -nographic -monitor stdio -m 192M \
        -serial "unix:$name.com1,server=on,wait=off" "$@" <>"$name.in" >"$name.out" 2>&1 &
}

# tell NAME COMMAND: a line for a machine's monitor.
tell() { echo "$2" >"$1.in"; }

# memory HOW: RAM on the file `template`.
memory() { echo "memory-backend-file,id=pc.ram,mem-path=template,size=192M,$1"; }

# migrated NAME: true when its last save or load is complete.
migrated() {
    tell "$1" "info migrate"
    sleep 0.2
    grep -q 'Migration status: completed' "$1.out"
}

make_template() {
    start t -object "$(memory share=on)" -machine q35,memory-backend=pc.ram -smp 2 -uuid "$uuid" \
        -smbios type=1,serial=ASPEN -kernel /rig/vmlinuz -initrd /rig/initrd \
        -append "console=ttyS0 quiet panic=-1"
    template=$!
    check template-answers within 300 say t.com1 true || {
        cat t.out
        return 1
    }
    same cpus 2 "$(say t.com1 nproc)"
    same uuid "$uuid" "$(say t.com1 cat /sys/class/dmi/id/product_uuid)"
    same serial ASPEN "$(say t.com1 cat /sys/class/dmi/id/product_serial)"
    presses=$(say t.com1 "awk '/ACPI:Ged/{print \$2 + \$3}' /proc/interrupts")
    tell t system_powerdown
    check power-button within 30 pressed "$presses"
    say t.com1 "echo TEMPLATE >/tmp/mark"
    tell t stop
    tell t "migrate_set_capability x-ignore-shared on"
    tell t "migrate file:state"
    check saved within 60 migrated t || cat t.out
    tell t quit
    wait "$template"
    same template-ends 0 $?
    chmod a-w template
}

# pressed BEFORE: true when the guest had more interrupts of its power button than BEFORE.
pressed() {
    now=$(say t.com1 "awk '/ACPI:Ged/{print \$2 + \$3}' /proc/interrupts")
    [ -n "$now" ] && [ "$now" -gt "$1" ]
}

run_clones() {
    before=$(stat -c '%i %s %b %Y' template)
    for clone in c1 c2; do
        start $clone -object "$(memory share=off,readonly=on,rom=off)" -smp 2 \
            -machine q35,memory-backend=pc.ram -incoming defer
        tell $clone "migrate_set_capability x-ignore-shared on"
        tell $clone "migrate_incoming file:state"
        check $clone-loaded within 60 migrated $clone || cat $clone.out
        tell $clone cont
        same $clone-mark TEMPLATE "$(say $clone.com1 cat /tmp/mark)"
    done
    say c1.com1 "echo CLONE-1 >/tmp/mark"
    same apart TEMPLATE "$(say c2.com1 cat /tmp/mark)"
    same own CLONE-1 "$(say c1.com1 cat /tmp/mark)"
    check work say c2.com1 "dd if=/dev/urandom of=/tmp/blob bs=1M count=16 && md5sum /tmp/blob"
    tell c1 quit
    tell c2 quit
    wait
    same file-unchanged "$before" "$(stat -c '%i %s %b %Y' template)"
}

make_template && run_clones
