# shellcheck shell=dash
# By hand: many starts of three clones, with and without the pager, to find what fails rarely.
# rig --kernel 6.1 --memory 7168 --limit 600 --script tests/rig/soak.sh
memory=5G
rounds=12

pando template create /tmp/template --kernel /rig/vmlinuz --initrd /rig/initrd \
    --append "console=ttyS0 quiet panic=-1" --memory $memory --cpus 2 \
    --ready serial:PANDO-READY --timeout 300 --no-reserve || exit 1
for round in $(seq 1 $rounds); do
    for engine in copy kernel; do
        serials=/tmp/serial-$round-$engine
        pando clone /tmp/template --count 3 --engine $engine --json --serial "$serials" \
            >/tmp/clones.json 2>/tmp/clones.err &
        supervisor=$!
        for clone in 0 1 2; do
            check "soak-$round-$engine-$clone" say "$serials/clone-$clone.sock" \
                'dd if=/dev/zero of=/tmp/x bs=64k count=64 2>/dev/null; nproc'
        done
        kill "$supervisor"
        wait "$supervisor"
        grep '"message"' /tmp/clones.json
    done
done
