# Guests with two processors and Debian's kernel for all machines: they are merged, and verify their memory. The driver of
# the VM generation ID, which the kernel for clouds of 6.1 lacks, finds its device.
set -eu
. ./helpers.sh
merge_pair vmlinuz 5000 --vcpus 2
for vm in web-0 web-1; do
    grep -q "guest: 2 processors" "/tmp/$vm.log"
    grep "guest: VM generation ID of .*:00" "/tmp/$vm.log"
done
