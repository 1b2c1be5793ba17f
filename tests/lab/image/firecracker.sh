# Firecracker's guide "Getting started": its calls of the API, its network, its ssh and its metadata, on a kernel of
# Debian's that finds its devices by ACPI and on PCI.
set -eu
. ./helpers.sh
enter_image
sudo() { "$@"; }
for program in curl ip; do
    eval "$program() { in_debian $program \"\$@\"; }"
done

mkdir /tmp/guide
cd /tmp/guide
# Instead of the downloads: a kernel under the name of Firecracker's, and a file system with an ssh server.
cp /root/debian/vmlinuz vmlinux-6.1
# Firecracker's kernel has its drivers built in. Debian's has them in an initial RAM file system, and this one is small
# enough for the 128 MiB that a guest has by default.
mkdir /tmp/modules
version=$(ls /debian/lib/modules)
for module in ext4 virtio_mmio virtio_pci virtio_blk virtio_net; do
    in_debian modprobe -S "$version" --show-depends $module
done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' > /tmp/needed
number=100
while read -r module; do
    number=$((number + 1))
    cp "/debian$module" "/tmp/modules/$number-$(basename "$module")"
done < /tmp/needed
make_initrd initrd.cpio /tmp/modules << 'E1'
for word in $(cat /proc/cmdline); do
    case $word in root=*) mkdir /new; mount -t ext4 "${word#root=}" /new ;; esac
done
mount --move /dev /new/dev
exec switch_root /new /sbin/init
E1
root=/tmp/squashfs-root
for folder in bin sbin dev proc sys run/sshd tmp etc/ssh root/.ssh; do mkdir -p "$root/$folder"; done
chmod 700 "$root/root" "$root/root/.ssh"
cp /bin/busybox "$root/bin"
for name in init getty reboot ip ifconfig sh; do ln -s /bin/busybox "$root/sbin/$name"; done
ln -s /bin/busybox "$root/bin/sh"
copy_programs "$root" /usr/sbin/sshd /usr/bin/curl
printf 'root:x:0:0::/root:/bin/sh\nsshd:x:100:100::/run/sshd:/bin/false\n' > "$root/etc/passwd"
printf 'PermitRootLogin yes\nUsePAM no\n' > "$root/etc/ssh/sshd_config"
in_debian ssh-keygen -q -t ed25519 -N '' -f "$root/etc/ssh/ssh_host_ed25519_key"
# As fcnet-setup.sh of Firecracker's images does, the guest takes its address from its MAC.
cat > "$root/etc/rc" << 'E1'
#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mkdir -p /dev/pts; mount -t devpts devpts /dev/pts
mount -t tmpfs run /run; mkdir /run/sshd
mac=$(cut -d: -f3-6 /sys/class/net/eth0/address | tr : ' ')
ifconfig eth0 "$(printf '%d.%d.%d.%d' $(for byte in $mac; do echo 0x$byte; done))" netmask 255.255.255.252
/usr/sbin/sshd
echo "guest: has $(ifconfig eth0 | sed -n 's/.*inet addr:\([0-9.]*\).*/\1/p') on $(ls /sys/bus/pci/devices | wc -l) PCI devices"
E1
chmod +x "$root/etc/rc"
printf '::sysinit:/etc/rc\nttyS0::respawn:/sbin/getty -L 115200 ttyS0 vt100\n::shutdown:/bin/umount -a -r\n' > "$root/etc/inittab"
in_debian ssh-keygen -q -f /tmp/debian.id_rsa -t rsa -N ""
cp /tmp/debian.id_rsa.pub "$root/root/.ssh/authorized_keys"
truncate -s 96M debian.ext4
in_debian mkfs.ext4 -q -d /tmp/squashfs-root -F /tmp/guide/debian.ext4

# From here on as printed, but for the NAT, which needs another network, and for two sleeps.
ln -s /bin/samepage firecracker
API_SOCKET="/tmp/firecracker.socket"
sudo rm -f $API_SOCKET
sudo ./firecracker --api-sock "${API_SOCKET}" --enable-pci > /tmp/guide.log 2> /tmp/stderr &
samepage=$!
wait_for '[ -S $API_SOCKET ]'

TAP_DEV="tap0"
TAP_IP="172.16.0.1"
MASK_SHORT="/30"
sudo ip link del "$TAP_DEV" 2> /dev/null || true
sudo ip tuntap add dev "$TAP_DEV" mode tap
sudo ip addr add "${TAP_IP}${MASK_SHORT}" dev "$TAP_DEV"
sudo ip link set dev "$TAP_DEV" up
sudo sh -c "echo 1 > /proc/sys/net/ipv4/ip_forward"

LOGFILE="./firecracker.log"
sudo curl -X PUT --unix-socket "${API_SOCKET}" \
    --data "{
        \"log_path\": \"${LOGFILE}\",
        \"level\": \"Debug\",
        \"show_level\": true,
        \"show_log_origin\": true
    }" \
    "http://localhost/logger"

KERNEL="./$(ls vmlinux* | tail -1)"
KERNEL_BOOT_ARGS="console=ttyS0 reboot=k panic=1"
sudo curl -X PUT --unix-socket "${API_SOCKET}" \
    --data "{
        \"kernel_image_path\": \"${KERNEL}\",
        \"initrd_path\": \"./initrd.cpio\",
        \"boot_args\": \"${KERNEL_BOOT_ARGS}\"
    }" \
    "http://localhost/boot-source"

ROOTFS="./$(ls *.ext4 | tail -1)"
sudo curl -X PUT --unix-socket "${API_SOCKET}" \
    --data "{
        \"drive_id\": \"rootfs\",
        \"path_on_host\": \"${ROOTFS}\",
        \"is_root_device\": true,
        \"is_read_only\": false
    }" \
    "http://localhost/drives/rootfs"

FC_MAC="06:00:AC:10:00:02"
sudo curl -X PUT --unix-socket "${API_SOCKET}" \
    --data "{
        \"iface_id\": \"net1\",
        \"guest_mac\": \"$FC_MAC\",
        \"host_dev_name\": \"$TAP_DEV\"
    }" \
    "http://localhost/network-interfaces/net1"

# Metadata, as in Firecracker's page about these.
sudo curl -X PUT --unix-socket "${API_SOCKET}" \
    --data '{
        "network_interfaces": ["net1"],
        "version": "V2"
    }' \
    "http://localhost/mmds/config"
sudo curl -X PUT --unix-socket "${API_SOCKET}" \
    --data '{
        "latest": { "meta-data": { "ami-id": "ami-12345678", "reservation-id": "r-fea54097" } }
    }' \
    "http://localhost/mmds"

sudo curl -X PUT --unix-socket "${API_SOCKET}" \
    --data "{
        \"action_type\": \"InstanceStart\"
    }" \
    "http://localhost/actions"

wait_for 'all_say "guest: has 172.16.0.2"'
KEY_NAME=/tmp/debian.id_rsa
wait_for 'ssh_to $KEY_NAME 172.16.0.2 "ip route add default via 172.16.0.1 dev eth0"'
ssh_to $KEY_NAME 172.16.0.2 "echo 'nameserver 8.8.8.8' > /etc/resolv.conf"
ssh_to $KEY_NAME 172.16.0.2 "echo 'options single-request-reopen' >> /etc/resolv.conf"
ssh_to $KEY_NAME 172.16.0.2 "ip route add 169.254.169.254 dev eth0"
ssh_to $KEY_NAME 172.16.0.2 'TOKEN=$(curl -s -X PUT "http://169.254.169.254/latest/api/token" \
    -H "X-metadata-token-ttl-seconds: 21600"); curl -s -H "X-metadata-token: $TOKEN" \
    "http://169.254.169.254/latest/meta-data/ami-id"' > /tmp/metadata
echo "the guest's metadata: $(cat /tmp/metadata)"
grep -q '^ami-12345678' /tmp/metadata
ssh_to $KEY_NAME 172.16.0.2 "ip route; cat /etc/resolv.conf; uname -r; free; reboot"
status=0
wait "$samepage" || status=$?
cat /tmp/stderr firecracker.log
grep "guest: " /tmp/guide.log
[ "$status" = 0 ] || { echo "the process ended with $status"; exit 1; }
