# A Debian machine with systemd, two processors, a disk on an overlay, a network with several queues, sockets of the host
# and random numbers, on PCI. It boots to its login, ssh runs commands in it, its sockets carry what is sent, and the power
# button ends it.
set -eu
. ./helpers.sh
enter_image
run_debian pci

cat > /tmp/look << 'E'
echo "guest: $(nproc) processors, random numbers of $(cat /sys/class/misc/hw_random/rng_current)"
echo "guest: the network has $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l) queues:" $(ethtool -l eth0 | grep Combined)
grep virtio /proc/interrupts
findmnt /
E
on pci sh < /tmp/look > /tmp/seen
cat /tmp/seen
grep -q "2 processors, random numbers of virtio_rng" /tmp/seen
grep -q "the network has 2 queues" /tmp/seen

say "sockets carry 1 MiB"
head -c 1m /dev/urandom > /tmp/words
in_debian socat UNIX-LISTEN:/tmp/pci.vsock_6000 PIPE &
on pci 'head -c 1M /dev/urandom > /run/words; socat -t 60 - VSOCK-CONNECT:2:6000 < /run/words | cmp - /run/words && echo "the host echoes"'
on pci 'systemd-run --quiet socat VSOCK-LISTEN:5000 PIPE'
wait_for 'echoes pci'
say "the guest echoes"
power_off pci
