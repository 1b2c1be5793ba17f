# The memory hole over its port, with Debian's kernel, which permits no access to the memory itself: the agent's types
# arrive, agree with the kernel's, and what a guest frees comes back.
set -eu
. ./helpers.sh
make_initrd /tmp/guest.cpio modules samepage-agent << 'E1'
/samepage-agent --check && echo "guest: the types agree"
# By default a pass comes when the agent has rested for many times what the last one took.
/samepage-agent --publish --interval 5 &
dd if=/dev/urandom of=/tmp/own bs=1M count=64 2> /dev/null
echo "guest: holds 64 MiB"
read line
rm /tmp/own
echo "guest: freed 64 MiB"
read line
E1
samepage run --kernel vmlinuz-cloud --initrd /tmp/guest.cpio --name web --memory 256M --cmdline "$CMDLINE" \
    --memory-hole port --console 'file=/tmp/{name}.log' --socket "$SAMEPAGE_SOCKET" --sharing-cpu 50 --audit \
    2> /tmp/stderr &
samepage=$!
wait_for 'all_say "guest: holds"'
all_say "guest: the types agree" || { show_all; exit 1; }
private() { samepage stats --json | number pages_private; }
before=$(private)
echo "the guest has $before pages of its own; it frees 16,384"
# The client stays until the guest ends.
echo | samepage console web > /dev/null 2>&1 &
client=$!
wait_for '[ "$(private)" -lt $((before - 12000)) ]'
kill $client
echo "$(private) pages are left"
samepage report types || true
leave
