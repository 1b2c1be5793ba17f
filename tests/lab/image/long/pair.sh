# Two Debian machines with systemd, two processors, a disk on an overlay, a network and random numbers, one of them on
# PCI. They boot to their logins, work while they are merged, and verify their memory. ssh runs commands in them, and
# the power button ends them.
set -eu
. ./helpers.sh
# systemd and cloud-init work for minutes without a word.
PATIENCE=580

enter_image
# on VM COMMAND: has the shell of a guest run a command.
on() {
    case $1 in mmio) address=10.0.0.2 ;; pci) address=10.0.1.2 ;; esac
    shift
    ssh_to /tmp/key "$address" "$@"
}

# power_off VM: presses the power button, and fails if the guest ends in another way.
power_off() {
    samepage stop "$1" --timeout 3600
    samepage show "$1" > /tmp/shown
    grep -q "powered off" /tmp/shown || { cat /tmp/shown /tmp/stderr; tail -n 60 "/tmp/$1.log"; exit 1; }
}

in_debian ssh-keygen -q -t ed25519 -N '' -f /tmp/key
cat > /tmp/user-data << 'E1'
#cloud-config
disable_root: false
ssh_genkeytypes: [ed25519]
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
cat > /tmp/vms.toml << 'E1'
[defaults]
kernel = "/root/debian/vmlinuz"
initrd = "/root/debian/initrd.img"
cmdline = "console=ttyS0 root=/dev/vda quiet net.ifnames=0 8250.nr_uarts=1 systemd.default_timeout_start_sec=7200"
memory = "512M"
vcpus = 2
memory_hole = "port"
disks = [{ path = "{name}.qcow2", backing = "/dev/vda", create = true }]
networks = [{ tap = "tap-{name}" }]
cloud_init = { user_data = "user-data", ssh_key = "key.pub", network_config = "network-{name}" }
console = { file = "{name}.log" }

[[vms]]
name = "mmio"

[[vms]]
name = "pci"
bus = "pci"
E1

# What the guests do. Their consoles show it.
cat > work.sh << 'E1'
set -eu
trap '[ $? = 0 ] || echo "guest: FAILED"' EXIT
echo "guest: $(nproc) processors, random numbers of $(cat /sys/class/misc/hw_random/rng_current)"
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
cp -r /usr/include/linux package/usr
dpkg-deb -Zgzip --build package package.deb > /dev/null
dpkg-deb -x package.deb unpacked
diff -r package/usr unpacked/usr
echo "guest: unpacked a package of $(stat -c %s package.deb) bytes"
verify

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
for level in 0 1 2; do
    gcc -O$level -o primes-$level primes.c
    [ "$(./primes-$level)" = 78498 ]
    echo "guest: compiled with -O$level"
done
verify

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
# The image's files, as their names and sums.
echo 'cd /usr && find include lib/python3 lib/gcc -name "*.[hcop]*" ! -name "*.pyc" -type f | LC_ALL=C sort | xargs md5sum | md5sum' > read.sh
in_debian sh < read.sh > read.sum

cd /tmp
samepage run --config vms.toml --socket "$SAMEPAGE_SOCKET" --sharing-cpu 20 --audit 2> /tmp/stderr &
samepage=$!
cd /root
wait_for 'ifconfig tap-mmio 10.0.0.1 netmask 255.255.255.0 && ifconfig tap-pci 10.0.1.1 netmask 255.255.255.0'
echo "the guests boot, and cloud-init does its work"
wait_for "all_say \"No 'final' modules\""
LIMIT=120
for vm in mmio pci; do
    wait_for '[ "$(on $vm uname -n)" = $vm ]'
    echo "ssh runs commands in $vm"
    # systemd waits 90 s for the terminal before it offers a login. That may be too short for an emulated machine.
    wait_for 'on $vm systemctl start --no-block serial-getty@ttyS0'
done
wait_for 'all_say "login:"'
unset LIMIT

echo "they work"
for vm in mmio pci; do
    tar -c samepage-agent samepage-agent.service work.sh read.sh read.sum |
        on $vm 'tar -x -C /root && sh /root/work.sh > /dev/ttyS0 2>&1' &
done
wait_for 'all_say "guest: worked"'
wait_for '[ "$(shared_pages)" -ge 20000 ]'
echo "they verify what was merged"
for vm in mmio pci; do
    goal=$(($(rounds "$vm") + 2))
    wait_for '[ "$(rounds "$vm")" -ge "$goal" ]'
done
samepage sharing
samepage stats
echo "what was saved by type of page:"
samepage report types

echo "the power button of one is pressed; the other verifies its memory"
on mmio touch /run/leave
wait_for 'grep -q "guest: leaves" /tmp/mmio.log'
power_off mmio
goal=$(($(rounds pci) + 2))
wait_for '[ "$(rounds pci)" -ge "$goal" ]'
on pci touch /run/leave
wait_for 'grep -q "guest: leaves" /tmp/pci.log'
power_off pci
status=0
wait "$samepage" || status=$?
cat /tmp/stderr
[ "$status" = 0 ] || { echo "samepage ended with $status"; exit 1; }
[ "$(grep -c "audit of .* passed" /tmp/stderr)" = 2 ]
grep "guest: [^r]" /tmp/mmio.log /tmp/pci.log
if grep -E "CORRUPT|FAILED" /tmp/*.log || grep "audit failed" /tmp/stderr; then
    exit 1
fi
