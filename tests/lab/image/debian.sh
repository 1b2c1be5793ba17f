# A Debian image boots on an overlay, does what cloud-init is told, and powers off when the button is pressed.
#
#     resources/debian-image.sh --format raw image
#     mkdir debian && mv image/vmlinuz image/initrd.img debian
#     cargo xtask lab --script tests/lab/image/debian.sh --disk image/debian.img debian
set -eu
. ./helpers.sh

cat > /tmp/user-data << 'E'
#cloud-config
ssh_genkeytypes: [ed25519]
cloud_init_modules: [set_hostname, users-groups, ssh]
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts-user, final-message]
runcmd:
  - [sh, -c, 'echo "guest: $(hostname) has $(wc -l < /home/debian/.ssh/authorized_keys) key" > /dev/ttyS0']
E
echo "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGk2ZzVhM2VhM2VhM2VhM2VhM2VhM2VhM2VhM2Vh somebody@host" > /tmp/key.pub
samepage serve 2> /tmp/stderr &
samepage=$!
wait_for 'samepage ps > /dev/null 2>&1'
samepage create web --kernel debian/vmlinuz --initrd debian/initrd.img --memory 768M \
    --cmdline 'console=ttyS0 root=/dev/vda' --console 'file=/tmp/{name}.log' \
    --disk 'path=/tmp/{name}.qcow2,backing=/dev/vda,create' \
    --cloud-init user-data=/tmp/user-data,ssh-key=/tmp/key.pub
echo "the guest boots, and cloud-init does its work"
wait_for 'all_say "guest: web has 1 key"'
# systemd says nothing more once there is a prompt to log in, and that is there soon or late: it waits for its terminal.
wait_for 'all_say "Cloud-init .* finished"'
echo "the power button is pressed"
samepage stop web --timeout 3600
samepage show web
samepage show web | grep -q "powered off"
