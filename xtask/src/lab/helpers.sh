# Functions for scripts of the lab: `. ./helpers.sh`

export SAMEPAGE_SOCKET=/tmp/samepage.sock
# For Debian's kernels as guests.
CMDLINE='console=ttyS0 reboot=k panic=-1 quiet'
# How many seconds nothing may move while a script waits.
PATIENCE=300

# make_initrd FILE [PATH...] < SCRIPT: a file system in which a guest runs this script, and then resets. It holds copies
# of the files and folders. If `modules` is one, the guest loads them.
make_initrd() {
    file=$1
    shift
    root=$(mktemp -d)
    mkdir -p "$root/bin" "$root/proc" "$root/sys" "$root/dev" "$root/tmp"
    cp /bin/busybox "$root/bin"
    [ $# = 0 ] || cp -r "$@" "$root"
    {
        echo '#!/bin/busybox sh'
        echo '/bin/busybox --install -s /bin; export PATH=/bin HOME=/'
        echo 'mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp'
        echo 'for module in /modules/*; do [ ! -e "$module" ] || insmod "$module"; done'
        echo 'echo "guest: Linux $(uname -r) is up"'
        cat
        echo 'sync; reboot -f'
    } > "$root/init"
    chmod +x "$root/init"
    (cd "$root" && find . | cpio -o -H newc) > "$file" 2> /dev/null
    rm -rf "$root"
}

# number NAME: the first number of this name in JSON.
number() {
    tr ',{' '\n\n' | sed -n "s/^ *\"$1\": *\([0-9]*\).*/\1/p" | head -n 1
}

# Pages of guests that use a frame which others had before them.
shared_pages() {
    count=$(samepage sharing --json 2> /dev/null | number pages_sharing)
    echo "${count:-0}"
}

# all_say TEXT: whether each guest has printed a text.
all_say() {
    for log in /tmp/*.log; do
        grep -q "$1" "$log" 2> /dev/null || return 1
    done
}

# The last line of each guest, and what they share: what changes while anything moves.
state() {
    for log in /tmp/*.log; do
        [ ! -s "$log" ] || echo "  $(basename "$log" .log): $(tail -n 1 "$log" | tr -d '\r')"
    done
    echo "  $(shared_pages) pages share"
}

# wait_for CONDITION: waits until a command succeeds, and shows what moves. Fails if samepage ends, if a guest says that
# it has failed, or if nothing moves. What comes and goes is no movement: a state counts once.
wait_for() {
    : > /tmp/states
    still=0
    until eval "$1"; do
        kill -0 "$samepage" 2> /dev/null || { echo "samepage has ended"; show_all; exit 1; }
        if grep -q "guest: FAILED" /tmp/*.log 2> /dev/null; then
            echo "a guest has failed"
            show_all
            exit 1
        fi
        now=$(state | tr '\n' '|')
        if ! grep -qxF -e "$now" /tmp/states; then
            echo "$now" >> /tmp/states
            echo "$(cut -d. -f1 /proc/uptime) s:|${now%|}" | tr '|' '\n'
            still=0
        fi
        still=$((still + 1))
        [ "$still" -lt "$PATIENCE" ] || { echo "nothing moved for $PATIENCE s"; show_all; exit 1; }
        sleep 1
    done
}

# All that is known of VMs that do not do what they should.
show_all() {
    samepage ps || true
    for log in /tmp/*.log; do
        name=$(basename "$log" .log)
        echo "--- $name"
        samepage show "$name" || true
        tail -n 60 "$log"
    done
    echo "--- the kernel"
    dmesg | tail -n 30
}

# filling_guest FILE: a guest that fills 1,680 pages as all such guests do and 1,000 pages with content of its own. Then
# it verifies them until a line on its console ends it.
filling_guest() {
    make_initrd "$1" << 'E'
echo "guest: $(nproc) processors"
echo "guest: VM generation ID of" $(ls /sys/bus/*/drivers/vmgenid 2> /dev/null | grep :)
# On machines with memory above 4 GiB, the zone Normal is there.
free_above() { sed -n '/zone *Normal/,/min/s/^ *pages free *//p' /proc/zoneinfo; }
before=$(free_above)
seq 1000000 > /tmp/alike
dd if=/dev/urandom of=/tmp/own bs=1M count=4 2> /dev/null
after=$(free_above)
echo "guest: $((${before:-0} - ${after:-0})) pages above 4 GiB"
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
}

# rounds NAME: how often a guest has verified its memory.
rounds() {
    grep -c "guest: round" "/tmp/$1.log" || true
}

# leave: tells all guests to leave, with a line on their consoles. Fails if a guest says that something is wrong, or an
# audit of `samepage run --audit` does.
leave() {
    echo "the guests are told to leave"
    for log in /tmp/*.log; do
        echo leave | samepage console "$(basename "$log" .log)" > /dev/null 2>&1
    done
    status=0
    wait "$samepage" || status=$?
    cat /tmp/stderr
    [ "$status" = 0 ] || { echo "samepage ended with $status"; exit 1; }
    grep -q "audit of .* passed" /tmp/stderr || { echo "there was no audit"; exit 1; }
    if grep CORRUPT /tmp/*.log || grep "audit failed" /tmp/stderr; then
        exit 1
    fi
}

# merge_pair KERNEL PAGES [OPTION...]: runs two such guests of MEMORY with these options of `samepage run`, until they
# share that many pages and have verified them. Fails if a guest finds a wrong page, or an audit fails. Leaves what
# `samepage sharing` said in /tmp/sharing.json.
merge_pair() {
    kernel=$1 pages=$2
    shift 2
    filling_guest /tmp/guest.cpio
    samepage run --kernel "$kernel" --initrd /tmp/guest.cpio --count 2 --name web --cmdline "$CMDLINE" \
        --memory "${MEMORY:-192M}" --console 'file=/tmp/{name}.log' --socket "$SAMEPAGE_SOCKET" --sharing-cpu 50 \
        --audit "$@" 2> /tmp/stderr &
    samepage=$!
    echo "the guests boot and fill their memory"
    wait_for 'all_say "guest: filled"'
    echo "their memory is merged"
    wait_for '[ "$(shared_pages)" -ge "$pages" ]'
    echo "they verify what was merged"
    for vm in web-0 web-1; do
        goal=$(($(rounds "$vm") + 2))
        wait_for '[ "$(rounds "$vm")" -ge "$goal" ]'
    done
    samepage sharing --json > /tmp/sharing.json
    samepage show web-0 --json > /tmp/web-0.json
    leave
}

# enter_image: prepares the Debian image for `in_debian`, which runs a program of the image in /tmp.
enter_image() {
    mkdir /debian
    mount -t ext4 -o ro /dev/vda /debian
    for place in dev proc sys tmp; do mount --bind "/$place" "/debian/$place"; done
}

in_debian() {
    chroot /debian /usr/bin/env -C /tmp PATH=/usr/sbin:/usr/bin HOME=/tmp "$@"
}

# ssh_to KEY ADDRESS [COMMAND]: the image's ssh, which does not ask whether it knows the guest. It ends after LIMIT
# seconds, so that a script that waits shows what moves.
ssh_to() {
    key=$1 guest=$2
    shift 2
    in_debian timeout "${LIMIT:-3600}" ssh -i "$key" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \
        -o ConnectTimeout=120 "root@$guest" "$@"
}
