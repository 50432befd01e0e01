# shellcheck shell=dash
# How fast a guest's disk and network are under Pando and under QEMU: one guest, one command line, one after the
# other, ${ROUNDS:-5} times each. What is measured is emulated twice, so only the ratio tells anything. Functions of
# l1-lib.sh. Run by hand, with both programs optimized, on a machine that does nothing else:
#   cargo build --release --locked -p pando-vmm
#   target/debug/rig --kernel 6.12 --script tests/rig/throughput.sh --limit 3000 \
#       --program target/release/pando=/bin/pando --program target/debug/say=/bin/say \
#       --program /usr/bin/qemu-system-x86_64=/usr/bin/qemu \
#       --file /usr/share/seabios/bios-256k.bin=/rig/firmware/bios-256k.bin \
#       --file /usr/share/qemu/linuxboot_dma.bin=/rig/firmware/linuxboot_dma.bin \
#       --file /usr/share/qemu/kvmvapic.bin=/rig/firmware/kvmvapic.bin \
#       --file /usr/lib/ipxe/qemu/efi-virtio.rom=/rig/firmware/efi-virtio.rom
# The files are of the Debian packages seabios, qemu-system-data and ipxe-qemu.

folder=/tmp/throughput rounds=${ROUNDS:-5}
mkdir -p "$folder/extra" /var/tmp
cd "$folder" || exit 1
ln -s /bin/pando qemu-system-x86_64

cat >extra/prepare <<'PREPARE'
while read -r module; do insmod "/modules/$module.ko"; done </modules/order
ip address add 10.9.0.2/24 dev eth0
ip link set eth0 up
httpd -p 7 -h /tmp
dd if=/dev/urandom of=/tmp/file bs=64k count=128 2>/dev/null
PREPARE
(cd extra && echo prepare | cpio -o -H newc 2>/dev/null) | cat /rig/initrd - >initrd
dd if=/dev/urandom of=disk bs=64k count=512 2>/dev/null
dd if=disk of=file bs=64k count=128 2>/dev/null
tunctl -t tap0 && ip address add 10.9.0.1/24 dev tap0 && ip link set tap0 up
httpd -p 8 -h "$folder"

# now: hundredths of a second.
now() { cut -d' ' -f1 /proc/uptime | tr -d .; }

# took COMMAND...: how long it takes.
took() {
    began=$(now)
    "$@" >/dev/null 2>&1 || echo "CHECK command FAIL $*"
    echo $(($(now) - began))
}

# round WHO PROGRAM: boots the guest and measures; a line for each thing: WHO THING HUNDREDTHS.
round() {
    rm -f com1
    $2 -machine q35 -accel kvm -cpu host -m 192M -nodefaults -nographic -kernel /rig/vmlinuz -initrd initrd \
        -append "console=ttyS0 quiet panic=-1 ipv6.disable=1 mitigations=off" \
        -drive file=disk,if=none,id=d,format=raw -device virtio-blk-pci,drive=d \
        -netdev tap,id=n,ifname=tap0,script=no,downscript=no -device virtio-net-pci,netdev=n,mac=52:54:00:00:00:07 \
        -serial unix:com1,server=on,wait=off >"$1.out" 2>&1 &
    machine=$!
    within 400 say com1 true || {
        cat "$1.out"
        echo "CHECK $1-answers FAIL"
    }
    echo "TOOK $1 read-64k $(took say com1 'dd if=/dev/vda of=/dev/null bs=64k count=512 iflag=direct')"
    echo "TOOK $1 write-64k $(took say com1 'dd if=/tmp/file of=/dev/vda bs=64k count=128 oflag=direct conv=notrunc,fsync')"
    echo "TOOK $1 read-4k $(took say com1 'dd if=/dev/vda of=/dev/null bs=4k count=1000 iflag=direct')"
    echo "TOOK $1 to-guest $(took say com1 'wget -q -O /dev/null http://10.9.0.1:8/file')"
    echo "TOOK $1 from-guest $(took wget -q -O /dev/null http://10.9.0.2:7/file)"
    echo "TOOK $1 nothing $(took say com1 true)"
    kill $machine
    wait $machine
}
for number in $(seq "$rounds"); do
    echo "round $number"
    round pando ./qemu-system-x86_64
    round qemu "/usr/bin/qemu -L /rig/firmware"
done
check throughput true
