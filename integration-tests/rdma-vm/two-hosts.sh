#!/bin/bash
# Two "hosts" a and b with two soft-RoCE NICs each, as the ends of two veth pairs in the guest's one network namespace:
# soft-RoCE of this kernel receives only there. Traffic between them must not take the short way over lo.
set -euo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
# One READ of 1 MiB is hundreds of packets at once.
sysctl -q -w net.core.netdev_max_backlog=65536
ip link set lo up
for rail in 0 1; do
    ip link add "a$rail" type veth peer name "b$rail"
    for host in a b; do
        nic=$host$rail
        sysctl -q -w "net.ipv4.conf.$nic.accept_local=1" "net.ipv4.conf.$nic.rp_filter=0" \
            "net.ipv4.conf.$nic.arp_ignore=1"
        ip link set "$nic" mtu 9000
    done
    ip addr add "10.9.$rail.1/24" dev "a$rail"
    ip addr add "10.9.$rail.2/24" dev "b$rail"
    ip link set "a$rail" up
    ip link set "b$rail" up
done
sysctl -q -w net.ipv4.conf.all.rp_filter=0
ip rule add pref 1000 lookup local
ip rule del pref 0
table=100
for nic in a0 a1 b0 b1; do
    ip rule add pref $table oif $nic lookup $table
    ip route add "10.9.${nic#?}.0/24" dev $nic table $table
    rdma link add "rxe_$nic" type rxe netdev $nic
    table=$((table + 1))
done
