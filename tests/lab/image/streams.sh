# Streams through taps and sockets of the host, to and from two guests that are merged meanwhile: `mmio`, and `pci` with
# several queues. Both receive the same stream, so that its pages are merged as well, and send it back.
set -eu
. ./helpers.sh
# MiB that each guest receives and sends.
STREAM=${STREAM:-64}
enter_image
copy_programs /tmp/programs /usr/bin/socat
# The kernel puts what it does not know on its command line into this script's environment: the addresses.
make_initrd /tmp/guest.cpio modules /tmp/programs/* << 'E'
PATH=$PATH:/usr/bin
ifconfig lo 127.0.0.1
ifconfig eth0 "$guest" netmask 255.255.255.0
echo "guest: $(nproc) processors, $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l) queues"
seq 1000000 > /tmp/alike
head -c 4m /dev/urandom > /tmp/own
md5sum /tmp/alike /tmp/own > /tmp/sums
socat VSOCK-LISTEN:5000 PIPE &
{
    round=0
    while :; do
        md5sum -c -s /tmp/sums || echo "guest: CORRUPT"
        round=$((round + 1))
        echo "guest: round $round"
        sleep 5
    done
} &
echo "guest: filled"
socat -u TCP-LISTEN:6000 CREATE:/tmp/stream
sha256sum /tmp/stream > /tmp/stream.sum
echo "guest: received $(cat /tmp/stream.sum)"
socat -u OPEN:/tmp/stream "TCP:$host:6000"
echo "guest: sent"
socat -t 60 - VSOCK-CONNECT:2:6000 < /tmp/own > /tmp/back
cmp /tmp/own /tmp/back && echo "guest: the host echoes 4 MiB"
read line
sha256sum -c -s /tmp/stream.sum || echo "guest: CORRUPT stream"
E
{
    printf '[defaults]\nkernel = "/root/vmlinuz-cloud"\ninitrd = "guest.cpio"\nmemory = "320M"\nvcpus = 2\n'
    printf 'vsock = { uds = "{name}.vsock" }\nconsole = { file = "{name}.log" }\n'
    for vm in mmio pci; do
        add_machine $vm
        echo "cmdline = \"$CMDLINE guest=$(address_of $vm) host=$(host_of $vm)\""
    done
} > /tmp/streams.toml
run_vms mmio pci < /tmp/streams.toml
say "the guests boot and fill their memory"
wait_for 'all_say "guest: filled"'
say "they are merged"
wait_for '[ "$(shared_pages)" -ge 3000 ]'

head -c "${STREAM}m" /dev/urandom > /tmp/stream
head -c 1m /tmp/stream > /tmp/words
sent=$(sum < /tmp/stream)
for vm in mmio pci; do
    ping -c 3 -W 60 "$(address_of $vm)"
    in_debian socat -u "TCP-LISTEN:6000,bind=$(host_of $vm)" CREATE:/tmp/received-$vm &
    in_debian socat UNIX-LISTEN:/tmp/$vm.vsock_6000 PIPE &
done
say "both receive $STREAM MiB"
for vm in mmio pci; do
    in_debian socat -u OPEN:/tmp/stream "TCP:$(address_of $vm):6000" &
done
wait_for 'all_say "guest: received"'
say "they have received the stream, and send it back"
all_say "guest: received $sent" || { echo "they received another one than $sent"; show_all; exit 1; }
wait_for 'all_say "guest: sent"'
for vm in mmio pci; do
    wait_for '[ "$(sum < /tmp/received-$vm)" = "$sent" ]'
    say "$vm has sent it back"
    rm /tmp/received-$vm
done
wait_for 'all_say "guest: the host echoes"'
for vm in mmio pci; do
    wait_for "echoes $vm"
    say "the host and $vm echo over sockets"
done
say "they share the stream"
verify_merged 12000 mmio pci
samepage sharing
leave
