# Two guests with Debian's kernel for clouds: they are merged, verify their memory meanwhile, and pass an audit.
set -eu
. ./helpers.sh

# The guests fill memory: 1,680 pages that are alike in both, and 1,000 pages of their own. Then they verify it until a
# line on the console ends them.
make_initrd guest.cpio << 'E'
seq 1000000 > /tmp/alike
dd if=/dev/urandom of=/tmp/own bs=1M count=4 2> /dev/null
md5sum /tmp/alike /tmp/own > /tmp/sums
echo "guest: filled"
round=0
while ! read -t 5 line; do
    round=$((round + 1))
    md5sum -c -s /tmp/sums || { echo "guest: CORRUPT"; md5sum -c /tmp/sums; }
    echo "guest: round $round"
done
echo "guest: leaves after $round rounds"
E

samepage run --kernel vmlinuz-cloud --initrd guest.cpio --count 2 --name web --memory 192M --cmdline "$CMDLINE" \
    --console 'file=/tmp/{name}.log' --socket "$SAMEPAGE_SOCKET" --sharing-cpu 50 --audit 2> /tmp/stderr &
samepage=$!

echo "the guests boot and fill their memory"
wait_for 'all_say "guest: filled"'
echo "their memory is merged"
wait_for '[ "$(shared_pages)" -ge 9000 ]'
echo "they verify what was merged"
rounds() { grep -c "guest: round" "/tmp/$1.log" || true; }
for vm in web-0 web-1; do
    goal=$(($(rounds "$vm") + 2))
    wait_for '[ "$(rounds "$vm")" -ge "$goal" ]'
done
echo "they are told to leave"
for vm in web-0 web-1; do
    echo leave | samepage console "$vm" > /dev/null
done
status=0
wait "$samepage" || status=$?
cat /tmp/stderr
[ "$status" = 0 ]
grep -q "audit of .* passed" /tmp/stderr
if grep CORRUPT /tmp/web-*.log || grep "audit failed" /tmp/stderr; then
    exit 1
fi
