//! Names files with memory in unsupported formats, with the command that converts them.

/// The first bytes, the name, and the advice.
const FORMATS: [(&[u8], &str, &str); 18] = [
    (b"KDUMP   ", "a kdump", AS_ELF),
    (b"makedumpfile", "a kdump in makedumpfile's flattened form", AS_ELF),
    (b"PAGEDU64", "a crash dump for Windows", AS_ELF),
    (b"PAGEDUMP", "a crash dump for Windows", AS_ELF),
    (b"LibvirtQemudSave", "a VM saved by libvirt", FROM_LIBVIRT),
    (b"LibvirtQemudPart", "a VM that libvirt did not finish saving", "save it again, or dump it"),
    (b"QEVM", "a migration stream of QEMU", "load it (`-incoming`), and dump it (`dump-guest-memory FILE`)"),
    (b"Xen saved domain", "a guest saved by Xen", FROM_XEN),
    (b"XenSavedDomain", "a guest saved by Xen", FROM_XEN),
    (b"LinuxGuestRecord", "a guest saved by Xen", FROM_XEN),
    (b"libvirt-xml", "a guest of Xen saved by libvirt", FROM_LIBVIRT),
    (b"\xd2\xbe\xd2\xbe", "a state of VMware", "name the .vmem file beside it, or convert it (`vmss2core`)"),
    (b"VirtualBox SavedState", "a state of VirtualBox", FROM_VIRTUALBOX),
    (b"\x1f\x8b", "compressed by gzip", "decompress it (`gunzip`)"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "decompress it (`unzstd`)"),
    (b"\xfd7zXZ", "compressed by xz", "decompress it (`unxz`)"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "decompress it (`unlz4`)"),
    (b"QFI\xfb", "a qcow2 disk image, not a memory image", "name a memory image"),
];

const AS_ELF: &str = "dump as ELF: `virsh dump --memory-only --format elf VM FILE`, or `dump-guest-memory FILE` \
                      of QEMU without -z, -l, -s and -w; for a crashed kernel, `makedumpfile -E /proc/vmcore FILE`";
const FROM_LIBVIRT: &str = "restore it and dump it: `virsh restore FILE --paused`, then \
                            `virsh dump --memory-only --format elf VM NEW-FILE`";
const FROM_XEN: &str = "restore it and dump it: `xl restore -p FILE`, then `xl dump-core VM NEW-FILE`";
const FROM_VIRTUALBOX: &str =
    "start the VM, and dump it: `VBoxManage debugvm VM dumpvmcore --filename=NEW-FILE`";

/// Number of bytes that suffice to recognise all formats.
pub(super) const HEAD: usize = 32;

/// Returns the name of a format with these first bytes, and the advice, or `None` for others.
pub(super) fn name(head: &[u8]) -> Option<(&'static str, &'static str)> {
    FORMATS.iter().find(|(magic, ..)| head.starts_with(magic)).map(|(_, what, help)| (*what, *help))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_format_is_told_by_what_is_read() {
        for (magic, what, help) in FORMATS {
            assert!(magic.len() <= HEAD, "{what}");
            assert_eq!(name(&[magic, b"rest"].concat()), Some((what, help)));
        }
        assert_eq!(name(b"anything else"), None);
    }
}
