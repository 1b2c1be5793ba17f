# Disks of guests with Debian's kernel for clouds: they read one image through the cache, and write images of their own
# while their memory is merged. The machine's ACPI tables are all that tells them of the disks.
set -eu
. ./helpers.sh

seq 2000000 > /tmp/base.img
truncate -s 16M /tmp/base.img
base=$(md5sum < /tmp/base.img | cut -d' ' -f1)
for vm in 0 1; do truncate -s 8M "/tmp/own-$vm.img"; done

make_initrd /tmp/guest.cpio modules << 'E1'
sum() { dd if="$1" bs=128k 2> /dev/null | md5sum | cut -d' ' -f1; }
echo "guest: base $(sum /dev/vda)"
for round in 1 2 3; do
    (cat /proc/sys/kernel/random/uuid; seq 1000000) | head -c 4m > /tmp/content
    dd if=/tmp/content of=/dev/vdb bs=64k conv=fsync 2> /dev/null
    echo 3 > /proc/sys/vm/drop_caches
    [ "$(head -c 4m /dev/vdb | md5sum)" = "$(md5sum < /tmp/content)" ] || echo "guest: CORRUPT own disk"
    echo "guest: round $round base $(sum /dev/vda)"
done
echo "guest: own $(md5sum < /tmp/content | cut -d' ' -f1)"
while ! read -t 5 line; do :; done
E1
samepage run --kernel vmlinuz-cloud --initrd /tmp/guest.cpio --count 2 --name web --memory 192M --cmdline "$CMDLINE" \
    --disk path=/tmp/base.img,readonly --disk 'path=/tmp/own-{index}.img' --console 'file=/tmp/{name}.log' \
    --socket "$SAMEPAGE_SOCKET" --sharing-cpu 50 --audit 2> /tmp/stderr &
samepage=$!
wait_for 'all_say "guest: own"'
# What one guest reads of the image the other is given.
cache=$(samepage cache --json)
echo "$cache"
samepage sharing
leave
for vm in 0 1; do
    [ "$(grep -c "base $base" "/tmp/web-$vm.log")" = 4 ] || { echo "web-$vm read something else"; exit 1; }
    grep -q "own $(head -c 4m "/tmp/own-$vm.img" | md5sum | cut -d' ' -f1)" "/tmp/web-$vm.log"
done
[ "$(echo "$cache" | number served_from_guests)" -gt 0 ]
