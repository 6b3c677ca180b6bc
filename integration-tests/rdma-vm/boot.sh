#!/bin/bash
# boot.sh DIR SECONDS WORK: boots what prepare.sh put into DIR, runs WORK/run.sh in a view of this host's files (all
# read-only but WORK), and exits with its code; 125 if the machine did not end in time, 126 if the guest died.
set -u
dir=$(realpath "$1") limit=$2 work=$(realpath "$3")
rm -f "$work/rc"
timeout -k 5 "$limit" qemu-system-x86_64 -nodefaults -no-user-config -machine q35 -accel tcg,thread=multi -cpu max \
    -smp "${SMP:-2}" -m "${MEM:-1024}" -display none -serial stdio -monitor none -no-reboot \
    -kernel "$dir/vmlinux" -initrd "$dir/initrd.gz" -append "console=ttyS0 quiet panic=-1 no_timer_check tsc=reliable clocksource=tsc work=$work" \
    -fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap \
    -device virtio-9p-pci,fsdev=host,mount_tag=host \
    -fsdev "local,id=work,path=$work,security_model=none" -device virtio-9p-pci,fsdev=work,mount_tag=work </dev/null
code=$?
if [ $code -ne 0 ]; then
    echo "the machine did not end well: $code" >&2
    exit 125
fi
exit "$(cat "$work/rc" 2>/dev/null || echo 126)"
