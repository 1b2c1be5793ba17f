#!/bin/busybox sh
# The first process of the lab's machine: prepares it, runs the script, says how it ended, and powers off.
/bin/busybox --install -s /bin
export PATH=/bin:/root HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /dev/net
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs shm /dev/shm
for module in /modules/*; do
    insmod "$module" || echo "lab: the module $module does not load"
done
ifconfig lo 127.0.0.1 up
[ -e /dev/kvm ] || echo "lab: there is no /dev/kvm"
echo "lab: Linux $(uname -r), $(nproc) processors, nested paging $(cat /sys/module/kvm_amd/parameters/npt)"
cd /root
sh ./script
echo "lab: exit $?"
sync
poweroff -f
