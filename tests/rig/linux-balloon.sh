# shellcheck shell=dash
# Debian's kernel with a balloon: a template that gives memory away, a clone in which that is refused each time,
# and one whose memory goes back to the host (discard=zero). Then the same of free page reporting, in clones that
# are forks of a root that holds all there is, and in one whose pager is another process.
# Functions of l1-lib.sh; `say SOCKET COMMAND` runs a command in a guest.

folder=/tmp/balloon
mkdir -p "$folder/boot"
cd "$folder" || exit 1
ln -s /bin/pando qemu-system-x86_64
balloon=/machine/peripheral/b0

# The guest's drivers come before its ready mark.
cat >boot/prepare <<'PREPARE'
while read -r module; do insmod "/modules/$module.ko"; done </modules/order
mount -o remount,size=100% /tmp
dd if=/dev/urandom of=/tmp/blob bs=1M count=16 2>/dev/null
# Fills memory that is free but for some. When the file is gone the host has pages for memory that is free.
cat >/bin/fill <<'FILL'
#!/bin/sh
free_kib=$(awk '/MemFree/{print $2}' /proc/meminfo)
dd if=/dev/zero of=/tmp/filler bs=4096 count=$((free_kib / 4 - 6144)) 2>/dev/null
FILL
chmod +x /bin/fill
PREPARE
(cd boot && echo prepare | cpio -o -H newc 2>/dev/null) | cat /rig/initrd - >initrd

# start NAME PORT HOW OPTIONS...: a machine with its monitor at NAME.in and NAME.out, COM1 at NAME.com1,
# metrics at PORT, and its RAM on the file `template`.
start() {
    name=$1 port=$2 how=$3
    shift 3
    mkfifo "$name.in"
    ./qemu-system-x86_64 -nodefaults -nographic -monitor stdio -metrics "127.0.0.1:$port" \
        -serial "unix:$name.com1,server=on,wait=off" -machine q35,memory-backend=pc.ram -m 224M \
        -object "memory-backend-file,id=pc.ram,mem-path=template,size=224M,$how" \
        -device virtio-balloon-pci,id=b0,deflate-on-oom=on \
        "$@" <>"$name.in" >"$name.out" 2>"$name.err" &
    pid=$!
}

# tell NAME COMMAND: a line for a machine's monitor.
tell() { echo "$2" >"$1.in"; }

# answers NAME COMMAND TEXT: whether a machine's monitor says TEXT, asked again and again.
answers() {
    : >"$1.out"
    tell "$1" "$2"
    sleep 0.2
    grep -qa "$3" "$1.out"
}

# resident PID: KiB of the host's memory that a machine has.
resident() { awk '/^VmRSS/{print $2}' "/proc/$1/status"; }

# refused PORT SOURCE: how many discards were refused.
refused() {
    wget -q -O - "http://127.0.0.1:$1/metrics" |
        awk -v source="source=\"$2\"" '/^pando_discard_refused_total/ && index($0, source) {print $2}'
}

# reported PORT: true when reports of free pages were refused.
reported() { [ "$(refused "$1" free-page-reporting)" -gt 0 ]; }

make_template() {
    start t 9300 share=on -kernel /rig/vmlinuz -initrd initrd -append "console=ttyS0 quiet panic=-1"
    template=$pid
    check template-answers within 300 say t.com1 true || {
        cat t.out t.err
        return 1
    }
    check driver say t.com1 'grep -q 0x1045 /sys/bus/pci/devices/*/device && ls /sys/bus/virtio/drivers/virtio_balloon/virtio*'
    blob=$(say t.com1 "sha256sum </tmp/blob")
    say t.com1 "fill; rm /tmp/filler"
    full=$(stat -c %b template)
    tell t "balloon 160"
    check template-inflated within 60 answers t "info balloon" 'actual=160'
    # Half a kilobyte each: of 64 MiB most came from what was filled.
    between template-shrinks 100000 10000000 $((full - $(stat -c %b template)))
    same template-refuses-nothing 0 "$(refused 9300 balloon)"
    tell t "balloon 224"
    check template-deflated within 60 answers t "info balloon" 'actual=224'
    same template-blob "$blob" "$(say t.com1 "sha256sum </tmp/blob")"
    tell t stop
    tell t "migrate_set_capability x-ignore-shared on"
    tell t "migrate file:state"
    check saved within 60 answers t "info migrate" 'Migration status: completed' || cat t.out
    tell t quit
    wait "$template"
    same template-ends 0 $?
    chmod a-w template
}

# clone NAME PORT HOW: a clone that goes on.
clone() {
    start "$1" "$2" "share=off,readonly=on,rom=off$3" -incoming file:state
    check "$1-loaded" within 60 answers "$1" "info migrate" 'Migration status: completed' || cat "$1.out" "$1.err"
    tell "$1" cont
    same "$1-blob" "$blob" "$(say "$1.com1" "sha256sum </tmp/blob")"
}

# What a template has cannot be discarded: each page counts, nothing is freed, and the guest goes on.
refuses() {
    clone c1 9301 ""
    c1=$pid
    check c1-gate within 10 answers c1 "info memdev" 'discard: off for pc.ram'
    tell c1 "qom-set $balloon guest-stats-polling-interval 1"
    check c1-statistics within 60 answers c1 "qom-get $balloon guest-stats" '"stat-total-memory": [1-9][0-9]\{7,\},\{0,1\}'
    tell c1 "qom-set $balloon guest-stats-polling-interval 0"
    before=$(resident "$c1")
    tell c1 "balloon 160"
    check c1-inflated within 60 answers c1 "info balloon" 'actual=160'
    same c1-each-page-is-refused 16384 "$(refused 9301 balloon)"
    between c1-nothing-is-freed -2048 10000000 $(($(resident "$c1") - before))
    check c1-says-so grep -q 'Discarding RAM with readonly files is not supported' c1.err
    between c1-says-it-rarely 1 60 "$(grep -c 'Discarding RAM' c1.err)"
    same c1-intact "$blob" "$(say c1.com1 "sha256sum </tmp/blob")"
    tell c1 "balloon 224"
    check c1-deflated within 60 answers c1 "info balloon" 'actual=224'
    tell c1 quit
    wait "$c1"
}

# The same guest, whose memory goes back to the host.
discards() {
    clone c2 9302 ",discard=zero"
    c2=$pid
    check c2-gate within 10 answers c2 "info memdev" 'discard: zero for pc.ram'
    say c2.com1 "fill; rm /tmp/filler"
    before=$(resident "$c2")
    tell c2 "balloon 160"
    check c2-inflated within 60 answers c2 "info balloon" 'actual=160'
    between c2-memory-goes-back 49152 70000 $((before - $(resident "$c2")))
    same c2-refuses-nothing 0 "$(refused 9302 balloon)"
    same c2-intact "$blob" "$(say c2.com1 "sha256sum </tmp/blob")"
    tell c2 "balloon 224"
    check c2-deflated within 60 answers c2 "info balloon" 'actual=224'
    # What was given away is used again.
    say c2.com1 "dd if=/dev/urandom of=/tmp/more bs=1M count=48 2>/dev/null; sha256sum </tmp/more >/tmp/sum"
    check c2-memory-works say c2.com1 "sha256sum </tmp/more | cmp - /tmp/sum && rm /tmp/more"
    same c2-intact-again "$blob" "$(say c2.com1 "sha256sum </tmp/blob")"
    # A guest that has too little takes from the balloon by itself.
    tell c2 "balloon 128"
    check c2-inflated-far within 60 answers c2 "info balloon" 'actual=128'
    say c2.com1 "dd if=/dev/urandom of=/tmp/more bs=1M count=\$((\$(awk '/MemAvailable/{print \$2}' /proc/meminfo) / 1024 + 16)) 2>/dev/null; sha256sum </tmp/more >/tmp/sum"
    check c2-takes-from-it within 20 answers c2 "info balloon" 'actual=\(1[3-9][0-9]\|2[0-2][0-9]\)' || cat c2.out
    check c2-took-memory say c2.com1 "sha256sum </tmp/more | cmp - /tmp/sum && rm /tmp/more"
    same c2-intact-after-that "$blob" "$(say c2.com1 "sha256sum </tmp/blob")"
    tell c2 quit
    wait "$c2"
}

make_template || exit 1
before_clones=$(stat -c '%i %s %b %Y' template)
refuses
discards
same template-unchanged "$before_clones" "$(stat -c '%i %s %b %Y' template)"

# value PORT SERIES: a metric.
value() { wget -q -O - "http://127.0.0.1:$1/metrics" | awk -v series="$2" 'index($0, series) == 1 {print $2}'; }

# private_bytes PORT: what clones have written of their memory.
private_bytes() { value "$1" 'pando_clone_memory_bytes{template="reports",class="private_dirty"}'; }

# over PORT MIB, under PORT MIB: whether that is more, or less.
over() { [ "$(private_bytes "$1")" -gt $(($2 << 20)) ]; }
under() { [ "$(private_bytes "$1")" -lt $(($2 << 20)) ]; }

total_kib="awk '/MemTotal/{print \$2}' /proc/meminfo"

engine=root
# fork NAME PORT OPTIONS...: a clone, by the engine of the moment: a fork of a root.
fork() {
    name=$1 port=$2
    shift 2
    pando clone reports --engine "$engine" --pager shared --serial "$name" --metrics "127.0.0.1:$port" --json "$@" \
        >"$name.json" 2>"$name.err" &
    supervisor=$!
    check "$name-answers" within 120 say "$name/clone-0.sock" true || cat "$name.err"
}

# pager_of SUPERVISOR: the pager process, which has pages to bring and no vCPU.
pager_of() {
    for process in /proc/[0-9]*; do
        grep -q "^PPid:[[:space:]]*$1\$" "$process/status" 2>/dev/null || continue
        names=$(cat "$process"/task/*/comm)
        if echo "$names" | grep -q pager && ! echo "$names" | grep -q vcpu; then
            echo "${process#/proc/}"
        fi
    done
}

# restarted PORT: true when a pager was lost.
restarted() { [ "$(value "$1" pando_pager_restarts_total)" -ge 1 ]; }

end_fork() {
    same "$1-intact" "$reports_blob" "$(say "$1/clone-0.sock" "sha256sum </tmp/blob")"
    kill "$supervisor"
    wait "$supervisor"
}

check reports-create pando template create reports --kernel /rig/vmlinuz --initrd initrd \
    --append "console=ttyS0 quiet panic=-1" --memory 224M --balloon=free-page-reporting \
    --ready serial:PANDO-READY --timeout 300 || exit 1
before_forks=$(sha256sum reports/*.mem)
fork plain 9303
reports_blob=$(say plain/clone-0.sock "sha256sum </tmp/blob")
all_kib=$(say plain/clone-0.sock "$total_kib")
say plain/clone-0.sock "fill; rm /tmp/filler"
check plain-reports-are-refused within 60 reported 9303
check plain-says-so grep -q 'Discarding RAM with readonly files is not supported' plain.err
end_fork plain

fork zero 9304 --discard zero
say zero/clone-0.sock fill
check zero-memory-is-taken within 60 over 9304 64
say zero/clone-0.sock rm /tmp/filler
check zero-reports-go-back within 60 under 9304 48
same zero-refuses-nothing 0 "$(refused 9304 free-page-reporting)"
end_fork zero

# The host asks each clone for memory. A guest's pages are in pieces then: nothing is said of reports.
fork less 9305 --discard zero --inflate 64M
less() { [ $((all_kib - $(say "$1/clone-0.sock" "$total_kib"))) -eq 65536 ]; }
check less-is-inflated within 60 less less
same less-refuses-nothing 0 "$(refused 9305 balloon)"
end_fork less

# The same where every page is copied.
engine=copy
fork copied 9306 --discard zero --inflate 64M
check copied-is-inflated within 60 less copied
same copied-refuses-nothing 0 "$(refused 9306 balloon)"
# Another pager takes over, and what was given back is used again.
pager=$(pager_of "$supervisor")
check copied-pager-is-there [ -n "$pager" ]
kill -9 "$pager"
check copied-pager-is-replaced within 60 restarted 9306
say copied/clone-0.sock fill
same copied-memory-works 0 "$(say copied/clone-0.sock "tr -d '\\0' </tmp/filler | wc -c")"
say copied/clone-0.sock rm /tmp/filler
end_fork copied
same reports-unchanged "$before_forks" "$(sha256sum reports/*.mem)"
