# Guests with two processors and Debian's kernel for clouds: they are merged, and verify their memory.
set -eu
. ./helpers.sh
merge_pair vmlinuz-cloud 5000 --vcpus 2
for vm in web-0 web-1; do
    grep -q "guest: 2 processors" "/tmp/$vm.log"
done
