#!/bin/sh
# Builds a Debian image for samepage, with its kernel and its initial RAM disk:
#
#     resources/debian-image.sh FOLDER
#
# writes FOLDER/debian.qcow2, FOLDER/vmlinuz and FOLDER/initrd.img. The disk holds one ext4 file system without partitions
# (root=/dev/vda), with cloud-init and an ssh server. Nobody can log in until cloud-init is told a key.
#
# Root is not needed. Debian's packages mmdebstrap, e2fsprogs and qemu-utils are; without root also uidmap.
set -eu

usage() {
    cat <<'END'
usage: debian-image.sh [OPTIONS] FOLDER

  --suite NAME        Debian release [bookworm]
  --mirror URL        Debian mirror [http://deb.debian.org/debian]
  --kernel PACKAGE    package of the kernel [linux-image-cloud-amd64]
  --include PACKAGES  more packages, between commas
  --size SIZE         size of the disk [4G]
  --format FORMAT     qcow2 or raw [qcow2]
  --agent FILE        samepage's agent, which tells the host what pages are used for
END
}

fail() {
    echo "debian-image.sh: $*" >&2
    exit 1
}

suite=bookworm mirror=http://deb.debian.org/debian kernel=linux-image-cloud-amd64
include='' size=4G format=qcow2 agent='' folder=''
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --suite | --mirror | --kernel | --include | --size | --format | --agent)
            [ $# -gt 1 ] || fail "$1 needs a value"
            case $1 in
                --suite) suite=$2 ;; --mirror) mirror=$2 ;; --kernel) kernel=$2 ;; --include) include=$2 ;;
                --size) size=$2 ;; --format) format=$2 ;; --agent) agent=$2 ;;
            esac
            shift 2 ;;
        -*) fail "unknown option $1; see --help" ;;
        *) [ -z "$folder" ] || fail "one folder, please"; folder=$1; shift ;;
    esac
done
[ -n "$folder" ] || { usage >&2; exit 2; }
case $format in qcow2 | raw) ;; *) fail "the format is qcow2 or raw, and not $format" ;; esac
PATH=$PATH:/usr/sbin:/sbin
missing=''
for tool in mmdebstrap mke2fs qemu-img; do command -v $tool >/dev/null || missing="$missing $tool"; done
[ -z "$missing" ] || fail "missing:$missing; apt-get install mmdebstrap e2fsprogs qemu-utils"
[ -z "$agent" ] || [ -f "$agent" ] || fail "there is no agent $agent"

resources=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
work=$(mktemp -d "$folder/.build.XXXXXX")
# Files of the image belong to its own users, so the namespace has to remove them.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else unshare --map-root-user --map-auto "$@"; fi
}
trap 'as_root rm -rf "$work"' EXIT

mkdir "$work/files"
cat > "$work/files/fstab" <<'END'
LABEL=root / ext4 errors=remount-ro 0 1
END
cat > "$work/files/samepage.cfg" <<'END'
# The host has a disk with the label cidata; no other source is asked, so that a boot without it does not wait.
datasource_list: [NoCloud, None]
# The only locale that exists without the package locales.
locale: C.UTF-8
system_info:
  network:
    renderers: [networkd]
END
cat > "$work/files/no-network.conf" <<'END'
# A machine without a network has nothing to wait for.
[Unit]
ConditionPathExistsGlob=/sys/class/net/e*
END
wait=/etc/systemd/system/systemd-networkd-wait-online.service.d
set -- "--customize-hook=copy-in $work/files/fstab /etc" \
    "--customize-hook=copy-in $work/files/samepage.cfg /etc/cloud/cloud.cfg.d" \
    "--customize-hook=mkdir -p \"\$1\"$wait" "--customize-hook=copy-in $work/files/no-network.conf $wait" \
    '--customize-hook=chroot "$1" systemctl enable systemd-networkd' \
    '--customize-hook=rm -f "$1"/etc/ssh/ssh_host_*_key* "$1"/etc/hostname' \
    '--customize-hook=: > "$1/etc/machine-id"'
if [ -n "$agent" ]; then
    install -m 755 "$agent" "$work/files/samepage-agent"
    install -m 644 "$resources/samepage-agent.service" "$work/files/samepage-agent.service"
    set -- "$@" "--customize-hook=copy-in $work/files/samepage-agent /usr/local/bin" \
        "--customize-hook=copy-in $work/files/samepage-agent.service /etc/systemd/system" \
        '--customize-hook=chroot "$1" systemctl enable samepage-agent'
fi
packages=$kernel,systemd-sysv,udev,dbus,cloud-init,openssh-server,iproute2,iputils-ping,e2fsprogs,ca-certificates
mmdebstrap --variant=minbase --include="$packages${include:+,$include}" "$@" "$suite" "$work/root.tar" "$mirror"

# The file system is filled without mounting it.
as_root sh -eu -c '
    mkdir "$1/root"
    tar -x --numeric-owner --exclude="./dev/*" -f "$1/root.tar" -C "$1/root"
    cp "$1"/root/boot/vmlinuz-* "$1/vmlinuz"
    cp "$1"/root/boot/initrd.img-* "$1/initrd.img"
    mke2fs -q -t ext4 -L root -d "$1/root" "$1/disk" "$2"
' sh "$work" "$size"
chmod 644 "$work/vmlinuz" "$work/initrd.img"
if [ "$format" = qcow2 ]; then
    qemu-img convert -f raw -O qcow2 "$work/disk" "$work/disk.qcow2"
    mv "$work/disk.qcow2" "$folder/debian.qcow2"
else
    mv "$work/disk" "$folder/debian.img"
fi
mv "$work/vmlinuz" "$work/initrd.img" "$folder"
