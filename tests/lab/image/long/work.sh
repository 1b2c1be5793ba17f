# Two Debian machines with systemd and two processors, one of them on PCI, work while they are merged: they unpack a
# package, compile, and read files of their image. They verify their memory with checksums, and the power button ends one
# after the other. What was saved is printed by type of page.
set -eu
. ./helpers.sh
enter_image

# What the guests do. Their consoles show it.
cat > /tmp/work.sh << 'E1'
set -eu
trap '[ $? = 0 ] || echo "guest: FAILED"' EXIT
echo "guest: $(nproc) processors, random numbers of $(cat /sys/class/misc/hw_random/rng_current)"
echo "guest: the network has $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l) queues:" $(ethtool -l eth0 | grep Combined)
grep virtio /proc/interrupts
cd /root
install -m 755 samepage-agent /usr/local/bin
install -m 644 samepage-agent.service /etc/systemd/system
systemctl enable --now samepage-agent
seq 1000000 > /dev/shm/alike
head -c 4M /dev/urandom > /dev/shm/own
md5sum /dev/shm/alike /dev/shm/own > /dev/shm/sums
round=0
verify() {
    round=$((round + 1))
    md5sum -c --quiet /dev/shm/sums || echo "guest: CORRUPT"
    echo "guest: round $round"
}
echo "guest: filled"

mkdir -p package/DEBIAN package/usr
printf 'Package: headers\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: headers\n' > package/DEBIAN/control
cp -r /usr/include/linux/netfilter package/usr
dpkg-deb -Zgzip --build package package.deb > /dev/null
dpkg-deb -x package.deb unpacked
diff -r package/usr unpacked/usr
echo "guest: unpacked a package of $(stat -c %s package.deb) bytes"

cat > primes.c << 'C'
#include <stdio.h>
#include <stdlib.h>
int main(void) {
    enum { limit = 1000000 };
    char *composite = calloc(limit + 1, 1);
    int count = 0;
    for (long i = 2; i <= limit; i++) {
        count += !composite[i];
        for (long j = i * i; j <= limit && !composite[i]; j += i) composite[j] = 1;
    }
    printf("%d\n", count);
}
C
gcc -O1 -o primes primes.c
[ "$(./primes)" = 78498 ]
echo "guest: compiled"

[ "$(sh ./read.sh)" = "$(cat read.sum)" ] || echo "guest: CORRUPT files"
echo "guest: read the files of the image"
verify
echo "guest: worked"
while [ ! -e /run/leave ]; do
    verify
    sleep 1
done
echo "guest: leaves after $round rounds"
E1
# Some of the image's files, as their names and sums.
echo 'cd /usr && find lib/gcc/*/*/include lib/python3*/*.py -type f | LC_ALL=C sort | xargs md5sum | md5sum' > /tmp/read.sh
in_debian sh < /tmp/read.sh > /tmp/read.sum

run_debian mmio pci
say "they work"
cp samepage-agent samepage-agent.service /tmp
for vm in mmio pci; do
    tar -c -C /tmp samepage-agent samepage-agent.service work.sh read.sh read.sum |
        on $vm 'tar -x -C /root && sh /root/work.sh > /dev/ttyS0 2>&1' &
done
wait_for 'all_say "guest: worked"'
say "they are merged"
verify_merged 12000 mmio pci
samepage sharing
samepage stats
echo "what was saved by type of page:"
samepage report types

for vm in mmio pci; do
    on $vm touch /run/leave
    wait_for "grep -q 'guest: leaves' /tmp/$vm.log"
done
grep -E "guest: [^r]|virtio|rcu:" /tmp/mmio.log /tmp/pci.log
power_off mmio pci
