# Functions for scripts of the lab: `. ./helpers.sh`

export SAMEPAGE_SOCKET=/tmp/samepage.sock
# For Debian's kernels as guests.
CMDLINE='console=ttyS0 reboot=k panic=-1 quiet'
# How many seconds nothing may move while a script waits.
PATIENCE=300

# make_initrd FILE < SCRIPT: a file system in which a guest runs this script, and then resets.
make_initrd() {
    root=$(mktemp -d)
    mkdir -p "$root/bin" "$root/proc" "$root/sys" "$root/dev" "$root/tmp"
    cp /bin/busybox "$root/bin"
    {
        echo '#!/bin/busybox sh'
        echo '/bin/busybox --install -s /bin; export PATH=/bin HOME=/'
        echo 'mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp'
        echo 'echo "guest: Linux $(uname -r) is up"'
        cat
        echo 'sync; reboot -f'
    } > "$root/init"
    chmod +x "$root/init"
    (cd "$root" && find . | cpio -o -H newc) > "$1" 2> /dev/null
    rm -rf "$root"
}

# number NAME: the first number of this name in JSON.
number() {
    tr ',{' '\n\n' | sed -n "s/^ *\"$1\": *\([0-9]*\).*/\1/p" | head -n 1
}

# Pages of guests that use a frame which others had before them.
shared_pages() {
    pages=$(samepage sharing --json 2> /dev/null | number pages_sharing)
    echo "${pages:-0}"
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

# wait_for CONDITION: waits until a command succeeds, and shows what moves. Fails if samepage ends, or nothing moves.
wait_for() {
    last='' still=0
    until eval "$1"; do
        kill -0 "$samepage" 2> /dev/null || { echo "samepage has ended"; show_all; exit 1; }
        now=$(state)
        if [ "$now" != "$last" ]; then
            echo "$(cut -d. -f1 /proc/uptime) s:"
            echo "$now"
            last=$now still=0
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
        tail -n 30 "$log"
    done
    echo "--- the kernel"
    dmesg | tail -n 30
}
