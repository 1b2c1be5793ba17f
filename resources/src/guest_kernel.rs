//! The Linux kernel of test guests. Its configuration and patches are in `resources/guest-kernel`.

/// The kernel parameters of test guests, without `agent=` and the parameters of devices.
/// `resources/guest-kernel/README.md` explains each of them.
pub const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=k mitigations=off tsc=reliable lpj=9781696 \
    random.trust_cpu=off rodata=off clearcpuid=erms,fsrm,smap,smep,cx16,xsave,fsgsbase,umip,popcnt,pcid,invpcid,\
    rdrand,rdseed,clflushopt";
