//! Linux guests that boot, use a disk and share memory.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use samepage_agent::checksum::Fnv1a;
use samepage_agent::content;
use samepage_devices::disk::CachePolicy;
use samepage_machine::config::{RngSpec, VirtioBus};
use samepage_machine::vm::MAX_DISKS;
use samepage_machine::{DiskSpec, Hypervisor, Size, VmConfig, VmEnd};
use samepage_sharing::blocks::CacheSize;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::guests::{Guest, hypervisor, sharing};
use samepage_tests::harness::{self, Need};
use samepage_tests::program::{self, Running};
use samepage_tests::shared::wait_until;
use xtask::artifacts::{Artifacts, COMMAND_LINE, DISK_FILES, DiskFile};

fn main() -> ExitCode {
    harness::run_all(&[
        (
            "two_linux_vms_use_their_disks_are_merged_and_power_off",
            &[Need::Kvm, Need::LinuxGuest],
            use_disks_and_merge,
        ),
        (
            "a_second_linux_vm_reads_an_image_from_the_memory_of_the_first",
            &[Need::Kvm, Need::LinuxGuest],
            read_one_image,
        ),
        ("linux_is_asked_to_end_by_sigterm_and_keeps_what_it_wrote", &[Need::Kvm, Need::LinuxGuest], asked),
        ("linux_gets_random_bytes_of_the_host", &[Need::Kvm, Need::LinuxGuest], get_random_bytes),
        ("linux_sees_that_its_disk_has_grown", &[Need::Kvm, Need::LinuxGuest], see_growth),
    ])
}

/// The kernel divides memory into sections of 32 MiB.
const MEMORY: u64 = 64 << 20;
/// Number of identical pages that both guests fill.
const FILLED_PAGES: u64 = 2048;
/// Least number of pages that the guests should share: the filled pages, and most of a kernel's image.
const MERGED_PAGES: u64 = 4000;
const WRITTEN_BYTES: usize = 100_000;

/// A guest with its own image, and the content that it writes there.
struct LinuxGuest {
    guest: Guest,
    disk: PathBuf,
    seed: u64,
}

impl LinuxGuest {
    fn start(
        hypervisor: &Hypervisor,
        artifacts: &Artifacts,
        sharing: &Arc<Sharing>,
        dir: &Path,
        seed: u64,
    ) -> Self {
        let name = format!("linux{seed}");
        let disk = dir.join(&name);
        fs::copy(&artifacts.disk, &disk).expect("a copy of the disk image");
        let mut config = VmConfig::new(name, artifacts.kernel.clone().into());
        config.spec.initrd = Some(artifacts.initramfs.clone());
        let fill = FILLED_PAGES * 4;
        let small = file().name;
        // The rounds last longer than the engine needs for all identical pages.
        config.spec.cmdline = format!(
            "{COMMAND_LINE} agent=mount:/dev/vda:/mnt,sum:/mnt/{small},sum:/dev/vdb,write:/mnt/written:{WRITTEN_BYTES}:{seed},\
             sync,umount:/mnt,fill:{fill}K:7,verify:40:250,poweroff"
        );
        config.spec.memory = Size(MEMORY);
        // One guest's disks are on a PCI bus, and the other's have registers in memory.
        config.spec.bus = if seed.is_multiple_of(2) { VirtioBus::Pci } else { VirtioBus::Mmio };
        let common = artifacts.disk.clone();
        // With the kernel's page cache, disks report which blocks they read where.
        let data = DiskSpec { path: disk.clone(), id: Some("data".into()), ..DiskSpec::default() };
        let common =
            DiskSpec { path: common, readonly: true, id: Some("common".into()), ..DiskSpec::default() };
        config.spec.disks =
            [data, common].map(|disk| DiskSpec { cache: Some(CachePolicy::Buffered), ..disk }).into();
        config.sharing = Some(Arc::clone(sharing));
        Self { guest: Guest::start(hypervisor, config), disk, seed }
    }

    /// Waits for the agent's line about a command, and returns its figures.
    fn wait_for(&self, command: &str) -> String {
        self.guest.console.wait_for(command, |line| {
            let said = line.strip_prefix("samepage-agent: ")?;
            assert!(!said.contains(" failed: "), "{line}");
            said.strip_prefix(command).map(str::to_owned)
        })
    }

    /// Waits for the machine's reset, and checks on the host what the guest has written to its disk.
    fn finish(self) {
        self.wait_for("verify ok");
        assert!(self.wait_for("done").ends_with(" failed=0"));
        assert_eq!(self.guest.vm.wait(), VmEnd::Reset);
        drop(self.guest);
        e2fsprogs("e2fsck", &["-f", "-n"], &self.disk);
        let written = e2fsprogs("debugfs", &["-R", "cat /written"], &self.disk);
        assert!(written == content::bytes(self.seed, WRITTEN_BYTES), "the file that the guest wrote differs");
        let kept = e2fsprogs("debugfs", &["-R", &format!("cat /{}", file().name)], &self.disk);
        assert!(kept == content::bytes(file().seed, file().bytes), "a file that the guest only read differs");
    }
}

/// Returns the file of the image that guests read.
fn file() -> &'static DiskFile {
    DISK_FILES.iter().find(|file| file.name == "small").expect("the image holds it")
}

/// Runs a tool on an image, and returns its output.
fn e2fsprogs(tool: &str, arguments: &[&str], image: &Path) -> Vec<u8> {
    let found = [Path::new("/usr/sbin"), Path::new("/sbin")].map(|dir| dir.join(tool));
    let program = found.into_iter().find(|path| path.exists()).unwrap_or_else(|| tool.into());
    let output = Command::new(program).args(arguments).arg(image).output();
    let output = output.unwrap_or_else(|error| panic!("{tool} of e2fsprogs cannot be run: {error}"));
    assert!(output.status.success(), "{tool}: {output:?}");
    output.stdout
}

/// Linux finds the entropy device behind as many disks as there can be, and two reads of it differ.
fn get_random_bytes() {
    let artifacts = Artifacts::locate().expect("the guests were there a moment ago");
    let mut config = VmConfig::new("random", artifacts.kernel.clone().into());
    config.spec.initrd = Some(artifacts.initramfs.clone());
    config.spec.memory = Size(MEMORY);
    config.spec.cmdline =
        format!("{COMMAND_LINE} agent=read:/dev/hwrng:5000,read:/dev/hwrng:5000,sum:/dev/vdh,poweroff");
    let disk = |_| DiskSpec { path: artifacts.disk.clone(), readonly: true, ..DiskSpec::default() };
    config.spec.disks = (0..MAX_DISKS).map(disk).collect();
    config.spec.rng = RngSpec::default();
    let guest = Guest::start(&hypervisor(), config);
    let sums = RefCell::new(Vec::new());
    guest.console.wait_for("random bytes", |line| {
        assert!(!line.contains(" failed: "), "{line}");
        let read = line.strip_prefix("samepage-agent: read ok path=/dev/hwrng bytes=5000 fnv1a=")?;
        sums.borrow_mut().extend(read.split(' ').next().map(str::to_owned));
        (sums.borrow().len() == 2).then_some(())
    });
    assert_ne!(sums.borrow()[0], sums.borrow()[1]);
    assert_eq!(guest.vm.wait(), VmEnd::Reset);
    let stats = guest.vm.rng_stats().expect("the VM has the device");
    assert!(stats.bytes.load(Relaxed) >= 10_000 && stats.errors.load(Relaxed) == 0, "{stats:?}");
}

fn use_disks_and_merge() {
    let artifacts = Artifacts::locate().expect("the guests were there a moment ago");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let hypervisor = hypervisor();
    let sharing = sharing(Settings { cpu_percent: 50.0, ..Settings::default() });
    let start = Instant::now();
    let guests = [21, 22].map(|seed| LinuxGuest::start(&hypervisor, &artifacts, &sharing, dir.path(), seed));
    guests.iter().for_each(|guest| drop(guest.wait_for("ready")));
    println!("ready after {:.1} s", start.elapsed().as_secs_f64());
    let sum = Fnv1a::of(&content::bytes(file().seed, file().bytes));
    for guest in &guests {
        let read = guest.wait_for("sum ok");
        assert!(read.contains(&format!(" bytes={} fnv1a={sum}", file().bytes)), "{read}, not {sum}");
    }
    guests.iter().for_each(|guest| drop(guest.wait_for("fill ok")));
    let filled = Instant::now();
    while sharing.statistics().pages_sharing < MERGED_PAGES {
        assert!(filled.elapsed() < TIME_LIMIT, "the guests are not merged: {:?}", sharing.statistics());
        // The engine's progress has no events, so poll.
        std::thread::sleep(Duration::from_millis(10));
    }
    println!("merged {:.1} s after they had filled their memory", filled.elapsed().as_secs_f64());
    for LinuxGuest { guest, .. } in &guests {
        let statistics = guest.vm.membership().unwrap().statistics().unwrap();
        assert!(statistics.pages_merged >= FILLED_PAGES, "{statistics:?}");
    }
    let read = sharing.statistics();
    assert!(read.hints > 0 && read.merges_hinted > 0, "what both guests read is not shared: {read:?}");
    println!("{} runs of pages were merged for {} hints of disks", read.merges_hinted, read.hints);
    let report = sharing.audit().expect("an audit");
    assert!(report.passed(), "{report:#?}");
    guests.into_iter().for_each(LinuxGuest::finish);
    let statistics = sharing.statistics();
    assert_eq!((statistics.frames, statistics.store_bytes), (0, 0), "{statistics:?}");
}

/// Starts a guest that reads the whole image and is then idle.
fn start_reader(
    hypervisor: &Hypervisor,
    artifacts: &Artifacts,
    sharing: &Arc<Sharing>,
    number: u64,
) -> Guest {
    let mut config = VmConfig::new(format!("reader{number}"), artifacts.kernel.clone().into());
    config.spec.initrd = Some(artifacts.initramfs.clone());
    // As in distributions: a page is cleared before a block is read into it.
    config.spec.cmdline =
        format!("{COMMAND_LINE} init_on_alloc=1 agent=sum:/dev/vda,fill:64K:{number},verify:1000000:250");
    config.spec.memory = Size(MEMORY);
    let image = artifacts.disk.clone();
    config.spec.disks =
        vec![DiskSpec { path: image, readonly: true, id: Some("image".into()), ..DiskSpec::default() }];
    config.sharing = Some(Arc::clone(sharing));
    Guest::start(hypervisor, config)
}

fn read_one_image() {
    let artifacts = Artifacts::locate().expect("the guests were there a moment ago");
    let blocks = fs::metadata(&artifacts.disk).expect("the image is there").len() / 4096;
    let image = fs::read(&artifacts.disk).expect("the image can be read");
    let hypervisor = hypervisor();
    let sharing = sharing(Settings { cpu_percent: 50.0, ..Settings::default() });
    let mut before = sharing.cache();
    let mut guests = Vec::new();
    for number in 0..2 {
        let guest = start_reader(&hypervisor, &artifacts, &sharing, number);
        let said = guest
            .console
            .wait_for("a checksum", |line| line.strip_prefix("samepage-agent: sum ").map(str::to_owned));
        assert!(said.contains(&format!(" fnv1a={}", Fnv1a::of(&image))), "{said}");
        guests.push(guest);
        let now = sharing.cache();
        let (fetched, from_guests) =
            (now.fetched - before.fetched, now.served_from_guests - before.served_from_guests);
        println!(
            "guest {number}: {fetched} blocks of {blocks} from the disk, {from_guests} from a guest: {now:?}"
        );
        if number == 0 {
            assert!(fetched >= blocks, "{now:?}");
        } else {
            assert!(fetched * 10 <= blocks, "{now:?}");
        }
        before = now;
    }
    let deadline = Instant::now() + TIME_LIMIT;
    // Copies become shared when they are idle. That causes no event, so poll.
    while sharing.statistics().pages_sharing < blocks * 9 / 10 {
        assert!(Instant::now() < deadline, "{:?} {:?}", sharing.statistics(), sharing.cache());
        std::thread::sleep(Duration::from_millis(10));
    }
    let cache = sharing.cache();
    assert!(cache.blocks_cached * 100 <= blocks, "blocks are with the host and with guests: {cache:?}");
    let report = sharing.audit().expect("an audit");
    assert!(report.passed(), "{report:#?}");
    drop(guests);
    let cache = sharing.cache();
    println!("the guests have gone: {cache:?}");
    assert!(cache.blocks_cached * 10 >= blocks * 9, "what they held stays with the host: {cache:?}");
    sharing.set_cache_size(CacheSize::Bytes(0));
    // Memory is freed in limited pieces.
    wait_until(&sharing, "the end of all frames", || {
        let statistics = sharing.statistics();
        (statistics.frames, statistics.store_bytes) == (0, 0)
    });
}

fn see_growth() {
    let artifacts = Artifacts::locate().expect("the guests were there a moment ago");
    let image = tempfile::NamedTempFile::new().expect("a temporary file");
    image.as_file().set_len(1 << 20).expect("an image");
    let mut config = VmConfig::new("grower".to_owned(), artifacts.kernel.clone().into());
    config.spec.initrd = Some(artifacts.initramfs.clone());
    config.spec.cmdline =
        format!("{COMMAND_LINE} loglevel=6 agent=sum:/dev/vda,fill:64K:1,verify:1000000:250");
    config.spec.memory = Size(MEMORY);
    config.spec.disks =
        vec![DiskSpec { path: image.path().to_owned(), id: Some("disk".into()), ..DiskSpec::default() }];
    let guest = Guest::start(&hypervisor(), config);
    guest.console.wait_for("a checksum", |line| line.strip_prefix("samepage-agent: sum ").map(drop));
    image.as_file().set_len(3 << 20).expect("a larger image");
    let disk = &guest.vm.disks()[0];
    assert_eq!(disk.size.refresh().expect("the image is still there"), 3 << 20);
    let told =
        guest.console.wait_for("the new size", |line| Some(line.split_once("new size: ")?.1.to_owned()));
    assert!(told.starts_with("6144 512-byte logical blocks"), "{told}");
}

/// Bytes that only the guest's page cache holds when the process is asked to end.
const UNSYNCED_BYTES: usize = 1 << 20;

fn asked() {
    let artifacts = Artifacts::locate().expect("the guests were there a moment ago");
    let dir = tempfile::tempdir().expect("a folder");
    let disk = dir.path().join("disk");
    fs::copy(&artifacts.disk, &disk).expect("a copy of the disk image");
    let cmdline =
        format!("{COMMAND_LINE} agent=mount:/dev/vda:/mnt,write:/mnt/written:{UNSYNCED_BYTES}:9,idle");
    let mut run = program::command(["run", "--memory=64M", "--stop-timeout=600", "--cmdline", &cmdline]);
    run.arg("--kernel").arg(&artifacts.kernel).arg("--initrd").arg(&artifacts.initramfs);
    run.arg(format!("--disk=path={}", disk.display()));
    let running = Running::start(run);
    running.stdout().wait_for_line("samepage-agent: idle");
    running.signal(Signal::TERM);
    let end = running.wait();
    end.assert_code(0);
    assert!(end.stderr.contains("asked vm to end; waiting for up to 600 s"), "{}", end.stderr);
    assert!(end.stderr.contains("VM vm: the guest reset the machine"), "{}", end.stderr);
    let written = e2fsprogs("debugfs", &["-R", "cat /written"], &disk);
    assert!(written == content::bytes(9, UNSYNCED_BYTES), "{} bytes got to the disk", written.len());
}
