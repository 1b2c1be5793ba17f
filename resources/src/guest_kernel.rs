//! The Linux kernel of test guests, whose configuration and patches are in `resources/guest-kernel`.

/// The kernel parameters that test guests boot with, but for `agent=` and for devices. Why each
/// is there is told in `resources/guest-kernel/README.md`.
pub const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=k mitigations=off tsc=reliable lpj=9781696 \
    random.trust_cpu=off rodata=off clearcpuid=erms,fsrm,smap,smep,cx16,xsave,fsgsbase,umip,popcnt,pcid,invpcid,\
    rdrand,rdseed,clflushopt";
