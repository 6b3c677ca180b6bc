#!/bin/bash
# prepare.sh DIR: puts into DIR what boot.sh needs: an unpacked Debian kernel with soft-RoCE (rdma_rxe) and a small
# initial file system with the modules. Needs root and apt (Debian 12). About 100 MB of packages.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
dir=$(realpath -m "${1:?usage: prepare.sh DIR}")
mkdir -p "$dir/download"
if [ -s "$dir/vmlinux" ] && [ -s "$dir/initrd.gz" ]; then exit 0; fi

apt-get install -y -qq --no-install-recommends qemu-system-x86 seabios rdma-core ibverbs-utils ibverbs-providers \
    perftest busybox-static cpio kmod iproute2 binutils >/dev/null
# The "cloud" kernels have neither rdma_rxe nor 9p.
package=$(apt-cache depends linux-image-amd64 | awk '/Depends:/ { print $2; exit }')
version=${package#linux-image-}
(cd "$dir/download" && apt-get download -qq "$package")
dpkg -x "$dir"/download/"$package"_*.deb "$dir/kernel"
depmod -b "$dir/kernel" "$version"
python3 "$here/extract-kernel.py" "$dir/kernel/boot/vmlinuz-$version" "$dir/vmlinux"

root=$dir/initrd
rm -rf "$root"
mkdir -p "$root"/{bin,proc,sys,dev,modules,host}
cp /bin/busybox "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
# crc32_generic is asked for by name and is no dependency of rdma_rxe.
for module in virtio_pci 9pnet_virtio 9p veth crc32_generic sch_netem rdma_rxe; do
    modprobe -d "$dir/kernel" -S "$version" --show-depends "$module" | awk '{ print $2 }'
done | awk '!seen[$0]++' | while read -r file; do
    cp "$file" "$root/modules/"
    strip --strip-debug "$root/modules/$(basename "$file")"
    basename "$file" >>"$root/modules/order"
done
install -m 755 "$here/init" "$root/init"
(cd "$root" && find . -print0 | cpio --null -o -H newc --quiet | gzip -1) >"$dir/initrd.gz.new"
mv "$dir/initrd.gz.new" "$dir/initrd.gz"
