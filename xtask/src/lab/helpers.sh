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
    echo "--- what samepage said"
    cat /tmp/stderr || true
    for log in /tmp/*.log; do
        name=$(basename "$log" .log)
        echo "--- $name"
        samepage show "$name" || true
        tail -n 60 "$log"
    done
    echo "--- what the guests' processors do"
    trace_guests || true
    echo "--- the kernel"
    dmesg | tail -n 30
}

# trace_guests: for what reasons each processor leaves its guest within two seconds, and where: how often, the thread, the
# reason and the instruction's address. Nothing for a processor that never leaves.
trace_guests() {
    folder=/sys/kernel/tracing
    [ -e $folder/events ] || mount -t tracefs trace $folder || return
    echo 1 > $folder/events/kvm/kvm_exit/enable
    sleep 2
    echo 0 > $folder/events/kvm/kvm_exit/enable
    sed -n 's/^ *\([^ ]*\) .* reason \([^ ]*\) rip \([^ ]*\).*/\1 \2 \3/p' $folder/trace | sort | uniq -c | sort -rn | head -n 20
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

# verify_merged PAGES NAME...: waits until the guests share that many pages, and have verified them twice since.
verify_merged() {
    pages=$1
    shift
    wait_for '[ "$(shared_pages)" -ge "$pages" ]'
    say "they verify what was merged"
    for vm in "$@"; do
        goal=$(($(rounds "$vm") + 2))
        wait_for '[ "$(rounds "$vm")" -ge "$goal" ]'
    done
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
# `samepage sharing` said in /tmp/sharing.json, and what `samepage stats` said in /tmp/stats.json.
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
    verify_merged "$pages" web-0 web-1
    samepage sharing --json > /tmp/sharing.json
    samepage stats --json > /tmp/stats.json
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

# copy_programs FOLDER PROGRAM...: copies programs of the Debian image into a folder below /tmp, with all libraries that
# they load.
copy_programs() {
    root=$1
    shift
    for program in "$@"; do
        echo "$program"
        in_debian ldd "$program" | grep -o '/[^ ]*'
    done | sort -u > /tmp/copied
    while read -r file; do
        mkdir -p "$root$(dirname "$file")"
        in_debian cp -L "$file" "$root$file"
    done < /tmp/copied
}

# say WHAT...: says what comes, and when.
say() {
    echo "-- $(cut -d. -f1 /proc/uptime) s: $*"
}

# sum: of what is read.
sum() {
    sha256sum | cut -d' ' -f1
}

# Two machines have taps: `mmio`, and `pci` with several queues. address_of NAME is the guest's, host_of NAME the host's.
address_of() {
    case $1 in mmio) echo 10.0.0.2 ;; pci) echo 10.0.1.2 ;; esac
}

host_of() {
    case $1 in mmio) echo 10.0.0.1 ;; pci) echo 10.0.1.1 ;; esac
}

# add_machine NAME: its part of a configuration file.
add_machine() {
    case $1 in
        mmio) printf '\n[[vms]]\nname = "mmio"\nnetworks = [{ tap = "tap-mmio" }]\n' ;;
        pci) printf '\n[[vms]]\nname = "pci"\nbus = "pci"\nnetworks = [{ tap = "tap-pci", queues = 2 }]\n' ;;
    esac
}

# run_vms NAME... < CONFIGURATION: runs the machines of a configuration file, whose names these are, and gives their taps
# addresses. Paths in the file are below /tmp.
run_vms() {
    cat > /tmp/vms.toml
    for vm in "$@"; do
        queues=
        [ "$vm" = mmio ] || queues=multi_queue
        in_debian ip tuntap add dev "tap-$vm" mode tap $queues
    done
    cd /tmp
    samepage run --config vms.toml --socket "$SAMEPAGE_SOCKET" --sharing-cpu 20 --audit 2> /tmp/stderr &
    samepage=$!
    cd /root
    for vm in "$@"; do
        wait_for "ifconfig tap-$vm $(host_of "$vm") netmask 255.255.255.0"
    done
}

# run_debian NAME...: runs Debian machines with two processors, a disk on an overlay, a network, sockets of the host and
# random numbers. Waits until they offer their logins, and ssh enters them. Each of cloud-init's four steps takes such a
# machine a minute and more, so their initial RAM disk writes the address, the name and the keys instead.
run_debian() {
    in_debian ssh-keygen -q -t ed25519 -N '' -f /tmp/key
    mkdir -p /tmp/extra/scripts/init-bottom
    in_debian ssh-keygen -q -t ed25519 -N '' -f /tmp/extra/ssh_host_ed25519_key
    cp /tmp/key.pub /bin/busybox /tmp/extra
    cat > /tmp/extra/scripts/init-bottom/host << 'E'
#!/busybox sh
/busybox mkdir -p "$rootmnt/root/.ssh" "$rootmnt/etc/systemd/system.conf.d"
/busybox cp /key.pub "$rootmnt/root/.ssh/authorized_keys"
/busybox chmod -R go= "$rootmnt/root/.ssh"
/busybox cp -p /ssh_host_ed25519_key /ssh_host_ed25519_key.pub "$rootmnt/etc/ssh"
echo "$name" > "$rootmnt/etc/hostname"
: > "$rootmnt/etc/cloud/cloud-init.disabled"
/busybox sed 's/-//g' /proc/sys/kernel/random/uuid > "$rootmnt/etc/machine-id"
# systemd waits 90 s for a terminal, and offers no login there if it comes later: too short for an emulated machine.
printf '[Manager]\nDefaultTimeoutStartSec=2h\nDefaultDeviceTimeoutSec=2h\n' > "$rootmnt/etc/systemd/system.conf.d/lab.conf"
printf '[Match]\nName=eth0\n[Network]\nAddress=%s/24\n' "$address" > "$rootmnt/etc/systemd/network/eth0.network"
E
    # The last of these lines is all that the image's own file has.
    printf '/scripts/init-bottom/host\n/scripts/init-bottom/udev "$@"\n' > /tmp/extra/scripts/init-bottom/ORDER
    chmod +x /tmp/extra/scripts/init-bottom/host
    (cd /tmp/extra && find . | cpio -o -H newc | gzip -1) 2> /dev/null | cat debian/initrd.img - > /tmp/initrd.img
    words='console=ttyS0 root=/dev/vda rw quiet mitigations=off net.ifnames=0 8250.nr_uarts=1'
    words="$words systemd.show_status=1 systemd.mask=e2scrub_reap.service"
    cat > /tmp/debian.toml << 'E'
[defaults]
kernel = "/root/debian/vmlinuz"
initrd = "initrd.img"
memory = "512M"
vcpus = 2
memory_hole = "port"
disks = [{ path = "{name}.qcow2", backing = "/dev/vda", create = true }]
vsock = { uds = "{name}.vsock" }
console = { file = "{name}.log" }
E
    for vm in "$@"; do
        add_machine "$vm"
        echo "cmdline = \"$words name=$vm address=$(address_of "$vm")\""
    done >> /tmp/debian.toml
    run_vms "$@" < /tmp/debian.toml
    say "the guests boot"
    wait_for 'all_say "login:"'
    say "they offer their logins"
    LIMIT=120
    for vm in "$@"; do
        wait_for '[ "$(on "$vm" uname -n)" = "$vm" ]'
        say "ssh enters $vm"
    done
    unset LIMIT
}

# on NAME COMMAND: has the shell of such a machine run a command.
on() {
    entered=$1
    shift
    ssh_to /tmp/key "$(address_of "$entered")" "$@"
}

# echoes NAME: whether a guest that listens at port 5000 sends back the 1 MiB in /tmp/words.
echoes() {
    (echo CONNECT 5000; cat /tmp/words) |
        in_debian timeout 300 socat -t 60 - "UNIX-CONNECT:/tmp/$1.vsock" > /tmp/echo &&
        head -n 1 /tmp/echo | grep -q ^OK && sed 1d /tmp/echo | cmp - /tmp/words
}

# power_off NAME...: presses the power buttons of all machines, one after the other. Fails if one does not power off, or if
# the process does not end well with its last machine.
power_off() {
    for vm in "$@"; do
        say "the power button of $vm is pressed"
        samepage stop "$vm" --timeout 3600 || show_all
    done
    status=0
    wait "$samepage" || status=$?
    say "all are off"
    cat /tmp/stderr
    [ "$status" = 0 ] || { echo "samepage ended with $status"; exit 1; }
    for vm in "$@"; do
        grep -q "VM $vm: the guest powered off" /tmp/stderr
    done
    [ "$(grep -c "audit of .* passed" /tmp/stderr)" = $# ]
    if grep -E "CORRUPT|FAILED" /tmp/*.log || grep "audit failed" /tmp/stderr; then
        exit 1
    fi
}
