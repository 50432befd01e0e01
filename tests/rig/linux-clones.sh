# shellcheck shell=dash
# Debian's kernel under Pando: booted, frozen after its ready mark, cloned three times.
# Functions of l1-lib.sh; `say SOCKET COMMAND` runs a command in a guest.

# sock NUMBER: the serial port of a clone.
sock() { echo "$serials/clone-$1.sock"; }

# ask NUMBER COMMAND...: a command in a clone.
ask() {
    ask_sock=$(sock "$1")
    shift
    say "$ask_sock" "$*"
}

# children PID: how many processes it has started that still run.
children() {
    cat "/proc/$1"/task/*/children 2>/dev/null | wc -w
}

# fewer PID COUNT: true when it has fewer children than COUNT.
fewer() { [ "$(children "$1")" -lt "$2" ]; }

# after A B: true when the decimal number A is not less than B.
after() {
    awk -v a="$1" -v b="$2" 'BEGIN { exit !(a != "" && b != "" && a + 0 >= b + 0) }' && return
    echo "$1 s is not after $2 s"
    return 1
}

# ends_in NUMBER COMMAND NAME: a command that ends the clone, after its answer is out; the clone's
# process ends too.
ends_in() {
    ends_before=$(children "$supervisor")
    ask "$1" "(sleep 1; $2) >/dev/null 2>&1 &" >/dev/null
    check "$3" within 60 fewer "$supervisor" "$ends_before"
}

# identity FILES...: what must not change in files that are too large to be hashed here.
identity() { stat -c '%n %i %s %b %Y %a' "$@"; }

# linux_clones NAME MEMORY MIN_KIB FINGERPRINT [FLAG...]: the whole way with one memory size.
# The guest must see at least MIN_KIB; FINGERPRINT is a command that tells whether a RAM file changed.
linux_clones() {
    run=$1 memory=$2 min_kib=$3 fingerprint=$4
    shift 4
    folder=/tmp/$run template=/tmp/$run/template serials=/tmp/$run/serial
    mkdir -p "$folder"
    check "$run-create" pando template create "$template" --kernel /rig/vmlinuz --initrd /rig/initrd \
        --append "console=ttyS0 quiet panic=-1" --memory "$memory" --cpus 2 \
        --ready serial:PANDO-READY --timeout 300 "$@" || return 1
    check "$run-verify" pando template verify "$template" || return 1
    before=$($fingerprint "$template"/*.mem)

    pando clone "$template" --count 3 --serial "$serials" --json \
        >"$folder/clones.json" 2>"$folder/clones.err" &
    supervisor=$!
    for clone in 0 1 2; do
        check "$run-$clone-answers" ask $clone true || {
            cat "$folder/clones.err"
            kill "$supervisor"
            wait "$supervisor"
            cat "$folder/clones.json"
            return 1
        }
    done
    clones_are_the_template
    clones_are_apart
    clones_work
    clones_end
    same "$run-file-unchanged" "$before" "$($fingerprint "$template"/*.mem)"
    check "$run-verify-after" pando template verify "$template"
    rm -rf "$folder"
}

clones_are_the_template() {
    boot=$(ask 0 cat /proc/sys/kernel/random/boot_id)
    for clone in 0 1 2; do
        same "$run-$clone-cpus" 2 "$(ask $clone nproc)"
        # Frozen, not booted again: the same boot, and its clock goes on from the freeze.
        same "$run-$clone-boot" "$boot" "$(ask $clone cat /proc/sys/kernel/random/boot_id)"
        ready=$(ask $clone cat /tmp/ready-uptime)
        first=$(ask $clone "cut -d' ' -f1 /proc/uptime")
        second=$(ask $clone "sleep 1; cut -d' ' -f1 /proc/uptime")
        check "$run-$clone-uptime-continues" after "$first" "$ready"
        check "$run-$clone-uptime-goes-on" after "$second" "$(echo "$first" | awk '{print $1 + 0.9}')"
    done
    seen=$(ask 0 "awk '/MemTotal/{print \$2}' /proc/meminfo")
    check "$run-memory" test "$seen" -ge "$min_kib"
}

clones_are_apart() {
    for clone in 0 1 2; do
        ask $clone "hostname clone-$clone; echo $clone >/tmp/mine; touch /tmp/only-$clone" >/dev/null
    done
    for clone in 0 1 2; do
        same "$run-$clone-own-name" "clone-$clone" "$(ask $clone hostname)"
        same "$run-$clone-own-file" "$clone" "$(ask $clone cat /tmp/mine)"
        same "$run-$clone-no-other-file" "/tmp/only-$clone" "$(ask $clone 'echo /tmp/only-*')"
    done
}

clones_work() {
    for clone in 0 1 2; do
        # Fresh memory, template pages and both processors are used.
        check "$run-$clone-memory-holds" ask $clone \
            'dd if=/dev/urandom of=/tmp/blob bs=64k count=128 2>/dev/null && cp /tmp/blob /tmp/copy && cmp /tmp/blob /tmp/copy && sha256sum /bin/busybox'
        same "$run-$clone-both-cpus" "0 1" \
            "$(ask $clone "for mask in 1 2; do taskset \$mask sh -c 'cut -d\" \" -f39 /proc/self/stat'; done | xargs")"
        check "$run-$clone-kernel-content" ask $clone \
            "! dmesg | grep -E 'Oops|BUG|soft lockup|Call Trace|general protection|hung task'"
    done
    sums=$(for clone in 0 1 2; do ask $clone sha256sum /bin/busybox; done | sort -u)
    same "$run-template-content" "$(sha256sum </bin/busybox | cut -d' ' -f1)  /bin/busybox" "$sums"
}

clones_end() {
    ends_in 0 "poweroff -f" "$run-power-off-ends-a-clone"
    check "$run-others-go-on" ask 1 true
    ends_in 1 "reboot -f" "$run-reboot-ends-a-clone"
    same "$run-last-goes-on" clone-2 "$(ask 2 hostname)"
    ask 2 "(sleep 1; poweroff -f) >/dev/null 2>&1 &" >/dev/null
    within 60 gone "$supervisor" || kill "$supervisor"
    wait "$supervisor"
    status=$?
    same "$run-exit-status" 0 "$status"
    cat "$folder/clones.json" "$folder/clones.err"
    same "$run-clones-reported" 3 "$(grep -c '"clone":' "$folder/clones.json")"
}

# What L1 offers, and the embedded guest on it.
host_works() {
    check host-kvm test -c /dev/kvm
    check host-userfaultfd test -c /dev/userfaultfd
    check host-doctor pando doctor || return 1
    check host-demo pando demo --clones 2 --memory 64M
}

# forks_of_a_root: clones that share their root's memory, some started while others run, each doing
# work of its own.
forks_of_a_root() {
    folder=/tmp/forks template=/tmp/forks/template
    mkdir -p "$folder"
    check forks-create pando template create "$template" --kernel /rig/vmlinuz --initrd /rig/initrd \
        --append "console=ttyS0 quiet panic=-1" --memory 256M --cpus 2 \
        --ready serial:PANDO-READY --timeout 300 || return 1
    before=$(sha256sum "$template"/*.mem)
    for batch in 0 1; do
        pando clone "$template" --engine root --count 5 --serial "$folder/$batch" --json \
            >"$folder/$batch.json" 2>"$folder/$batch.err" &
        eval "forks_$batch=$!"
        for clone in 0 1 2 3 4; do
            check "forks-$batch-$clone-works" say "$folder/$batch/clone-$clone.sock" \
                "echo $batch-$clone >/tmp/mine; dd if=/dev/urandom of=/tmp/blob bs=64k count=32 2>/dev/null && cp /tmp/blob /tmp/copy && cmp /tmp/blob /tmp/copy && sha256sum /bin/busybox" ||
                cat "$folder/$batch.err"
        done
    done
    for batch in 0 1; do
        for clone in 0 1 2 3 4; do
            same "forks-$batch-$clone-own-file" "$batch-$clone" \
                "$(say "$folder/$batch/clone-$clone.sock" cat /tmp/mine)"
        done
        eval "supervisor=\$forks_$batch"
        kill "$supervisor"
        wait "$supervisor"
        same "forks-$batch-exit-status" 0 $?
        cat "$folder/$batch.err"
        grep '"message"' "$folder/$batch.json"
    done
    same forks-file-unchanged "$before" "$(sha256sum "$template"/*.mem)"
    rm -rf "$folder"
}

host_works
check host-demo-root pando demo --clones 2 --memory 64M --engine root
forks_of_a_root
linux_clones small 256M 200000 sha256sum
# Above the gap below 4 GiB; disk (here: memory) is only taken for what the guest writes.
linux_clones large 5G 4800000 identity --no-reserve
