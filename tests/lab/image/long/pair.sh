# Two Debian machines with systemd, two processors, a disk on an overlay, a network, sockets of the host and random
# numbers, one of them on PCI with several queues. They boot to their logins, work while they are merged, and verify their
# memory. ssh runs commands in them, streams go both ways, and the power button ends them.
set -eu
. ./helpers.sh
# systemd and cloud-init work for minutes without a word.
PATIENCE=400
# MiB that the host and each guest send to each other.
STREAM=${STREAM:-8}

# now WHAT...: says what comes, and when.
now() {
    echo "-- $(cut -d. -f1 /proc/uptime) s: $*"
}

# on VM COMMAND: has the shell of a guest run a command.
on() {
    case $1 in mmio) address=10.0.0.2 ;; pci) address=10.0.1.2 ;; esac
    shift
    ssh_to /tmp/key "$address" "$@"
}

# sum: of what is read.
sum() {
    sha256sum | cut -d' ' -f1
}

enter_image
in_debian ssh-keygen -q -t ed25519 -N '' -f /tmp/key
cat > /tmp/user-data << 'E1'
#cloud-config
disable_root: false
ssh_genkeytypes: [ed25519]
cloud_init_modules: [set_hostname, users-groups, ssh]
cloud_config_modules: []
cloud_final_modules: []
E1
for network in mmio=10.0.0.2 pci=10.0.1.2; do
    cat > "/tmp/network-${network%=*}" << E1
version: 2
ethernets:
  eth0: { addresses: [${network#*=}/24] }
E1
done
# systemd waits 90 s for a device unless it is told otherwise. That may be too short for an emulated machine.
cat > /tmp/vms.toml << 'E1'
[defaults]
kernel = "/root/debian/vmlinuz"
initrd = "/root/debian/initrd.img"
cmdline = """console=ttyS0 root=/dev/vda quiet mitigations=off net.ifnames=0 8250.nr_uarts=1 \
systemd.default_timeout_start_sec=7200 systemd.default_device_timeout_sec=7200"""
memory = "512M"
vcpus = 2
memory_hole = "port"
disks = [{ path = "{name}.qcow2", backing = "/dev/vda", create = true }]
networks = [{ tap = "tap-{name}" }]
vsock = { uds = "{name}.vsock" }
cloud_init = { user_data = "user-data", ssh_key = "key.pub", network_config = "network-{name}" }
console = { file = "{name}.log" }

[[vms]]
name = "mmio"

[[vms]]
name = "pci"
bus = "pci"
networks = [{ tap = "tap-pci", queues = 2 }]
E1

# What the guests do. Their consoles show it.
cat > work.sh << 'E1'
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
echo 'cd /usr && find lib/gcc/*/*/include lib/python3*/*.py -type f | LC_ALL=C sort | xargs md5sum | md5sum' > read.sh
in_debian sh < read.sh > read.sum

cd /tmp
in_debian ip tuntap add dev tap-pci mode tap multi_queue
samepage run --config vms.toml --socket "$SAMEPAGE_SOCKET" --sharing-cpu 20 --audit 2> /tmp/stderr &
samepage=$!
cd /root
wait_for 'ifconfig tap-mmio 10.0.0.1 netmask 255.255.255.0 && ifconfig tap-pci 10.0.1.1 netmask 255.255.255.0'
now "the guests boot, and cloud-init does its work"
wait_for "all_say \"No 'final' modules\""
LIMIT=120
for vm in mmio pci; do
    wait_for '[ "$(on $vm uname -n)" = $vm ]'
    now "ssh runs commands in $vm"
done
wait_for 'all_say "login:"'
unset LIMIT

now "they work"
for vm in mmio pci; do
    tar -c samepage-agent samepage-agent.service work.sh read.sh read.sum |
        on $vm 'tar -x -C /root && sh /root/work.sh > /dev/ttyS0 2>&1' &
done
wait_for 'all_say "guest: worked"'
now "they are merged"
wait_for '[ "$(shared_pages)" -ge 12000 ]'

head -c "${STREAM}m" /dev/urandom > /tmp/stream
sent=$(sum < /tmp/stream)
for vm in mmio pci; do
    case $vm in mmio) host=10.0.0.1 guest=10.0.0.2 ;; pci) host=10.0.1.1 guest=10.0.1.2 ;; esac
    ping -c 3 -W 60 $guest
    now "$vm receives $STREAM MiB, and sends them back"
    in_debian socat -u TCP-LISTEN:6000,reuseaddr CREATE:/tmp/received-$vm &
    receiver=$!
    on $vm 'socat -u TCP-LISTEN:6000 CREATE:/dev/shm/stream; sha256sum /dev/shm/stream' > /tmp/sum-$vm &
    sender=$!
    wait_for "in_debian socat -u OPEN:/tmp/stream TCP:$guest:6000"
    wait $sender
    now "$vm has received them"
    [ "$(cut -d' ' -f1 /tmp/sum-$vm)" = "$sent" ]
    on $vm "socat -u OPEN:/dev/shm/stream TCP:$host:6000; rm /dev/shm/stream"
    wait $receiver
    [ "$(sum < /tmp/received-$vm)" = "$sent" ]
    rm /tmp/received-$vm
    now "$vm has sent them; sockets are next"
    head -c 1m /tmp/stream > /tmp/words
    in_debian socat "UNIX-LISTEN:/tmp/$vm.vsock_6000" PIPE &
    on $vm 'head -c 1M /dev/urandom > /run/words; socat -t 60 - VSOCK-CONNECT:2:6000 < /run/words | cmp - /run/words && echo "the host echoes"'
    on $vm 'socat VSOCK-LISTEN:5000 PIPE' &
    wait_for "(echo CONNECT 5000; cat /tmp/words) | in_debian socat -t 60 - UNIX-CONNECT:/tmp/$vm.vsock > /tmp/echo && grep -q ^OK /tmp/echo"
    sed 1d /tmp/echo | cmp - /tmp/words
    now "$vm echoes"
done

now "they verify what was merged"
for vm in mmio pci; do
    goal=$(($(rounds "$vm") + 2))
    wait_for '[ "$(rounds "$vm")" -ge "$goal" ]'
done
samepage sharing
samepage stats
echo "what was saved by type of page:"
samepage report types

now "the power button of one is pressed; the other verifies its memory"
on mmio touch /run/leave
wait_for 'grep -q "guest: leaves" /tmp/mmio.log'
samepage stop mmio --timeout 3600
samepage show mmio | grep "powered off"
now "mmio is off"
goal=$(($(rounds pci) + 2))
wait_for '[ "$(rounds pci)" -ge "$goal" ]'
on pci touch /run/leave
wait_for 'grep -q "guest: leaves" /tmp/pci.log'
# The process ends with its last VM.
samepage stop pci --timeout 3600 || show_all
status=0
wait "$samepage" || status=$?
now "pci is off"
cat /tmp/stderr
[ "$status" = 0 ] || { echo "samepage ended with $status"; exit 1; }
for vm in mmio pci; do
    grep -q "VM $vm: the guest powered off" /tmp/stderr
done
[ "$(grep -c "audit of .* passed" /tmp/stderr)" = 2 ]
grep -E "guest: [^r]|virtio|rcu:" /tmp/mmio.log /tmp/pci.log
if grep -E "CORRUPT|FAILED" /tmp/*.log || grep "audit failed" /tmp/stderr; then
    exit 1
fi
