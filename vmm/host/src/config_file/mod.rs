//! Configuration files: descriptions of VMs in TOML or JSON.
//!
//! A file contains VMs in the form of the API's body, defaults for them, and the names of other files to
//! include. All mistakes are reported together, with line numbers: invalid parts are skipped, and the rest is
//! checked.

mod check;
mod json;
mod mistakes;
mod read;
mod source;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use check::EntryPlaces;
pub use mistakes::{Mistake, Mistakes};
use read::{Entry, Read};
use samepage_spec::{
    BalloonSpec, CloudInitSpec, ConsoleSpec, Cpu, DEFAULT_COMMAND_LINE, DiskSpec, HugePages, MemoryHole,
    MemoryWeight, NetworkSpec, RngSpec, SharingSpec, Size, VirtioBus, VmSpec, VsockSpec,
    optional_memory_schema,
};
use source::Source;

use samepage_machine::config::Validated;

/// Limit for the depth of includes.
const MAX_DEPTH: usize = 8;
/// Upper limit for the VMs of one entry.
const MAX_COUNT: u32 = 4096;

/// A configuration file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    /// Files whose VMs and defaults come first. Relative paths begin at the folder of this file.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub include: Vec<PathBuf>,
    /// Defaults for the VMs of this file, and for those of files included after it.
    #[serde(default)]
    pub defaults: VmEntry,
    /// The VMs.
    #[serde(default)]
    pub vms: Vec<VmEntry>,
}

/// One or several VMs, or the defaults for VMs. In texts and paths, `{index}` and `{name}` are replaced by
/// each VM's number and name. Relative paths begin at the folder of the file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmEntry {
    /// The VM's name; with `count`, VMs are named NAME-0, NAME-1 and so on.
    pub name: Option<String>,
    /// The number of VMs.
    #[schema(minimum = 1, maximum = 4096)]
    pub count: Option<u32>,
    /// The kernel: a vmlinux (x86-64 ELF, with or without PVH entry) or a bzImage.
    #[schema(value_type = Option<String>)]
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk.
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: Option<String>,
    /// The size of the memory.
    #[schema(schema_with = optional_memory_schema)]
    pub memory: Option<Size>,
    /// The number of vCPUs. By default 1.
    #[schema(minimum = 1, maximum = 254)]
    pub vcpus: Option<u32>,
    /// Whether the guest sees each two vCPUs as the threads of one core. By default each is a core.
    pub smt: Option<bool>,
    /// The processor features that the guest is told of. By default the host's.
    pub cpu: Option<Cpu>,
    /// The host's pages for the memory.
    pub hugepages: Option<HugePages>,
    /// The host's NUMA node whose memory the VM prefers. By default the kernel chooses.
    #[schema(maximum = 1023)]
    pub host_numa_node: Option<u32>,
    /// The weight against other VMs when memory is short and VMs take turns: 1 to 10000.
    #[schema(value_type = Option<u32>, minimum = 1, maximum = 10000)]
    pub memory_weight: Option<MemoryWeight>,
    /// How virtio devices are attached.
    pub bus: Option<VirtioBus>,
    /// Disks, in the guest's order.
    #[schema(max_items = 24)]
    pub disks: Option<Vec<DiskSpec>>,
    /// What cloud-init in the guest is told, on a disk after the others.
    pub cloud_init: Option<CloudInitSpec>,
    /// Network devices, in the guest's order.
    #[schema(max_items = 4)]
    pub networks: Option<Vec<NetworkSpec>>,
    /// The device over which programs of guest and host talk without a network.
    pub vsock: Option<VsockSpec>,
    /// The device with random bytes of the host. By default a VM has one.
    pub rng: Option<RngSpec>,
    /// The device by which the guest gives memory back to the host. By default a VM has none.
    pub balloon: Option<BalloonSpec>,
    /// The file for console output, in addition to the backlog for clients.
    pub console: Option<ConsoleSpec>,
    /// How the memory is shared.
    pub sharing: Option<SharingSpec>,
    /// How an agent in the guest publishes page types. By default through a memory hole.
    pub memory_hole: Option<MemoryHole>,
    /// Whether the VM starts after its creation. By default it does.
    pub start: Option<bool>,
}

/// Calls a macro with the names of all fields of [`VmEntry`].
macro_rules! with_fields {
    ($macro:ident) => {
        $macro!(
            name,
            count,
            kernel,
            initrd,
            cmdline,
            memory,
            vcpus,
            smt,
            cpu,
            hugepages,
            host_numa_node,
            memory_weight,
            bus,
            disks,
            cloud_init,
            networks,
            vsock,
            rng,
            balloon,
            console,
            sharing,
            memory_hole,
            start
        )
    };
}

impl VmEntry {
    /// Returns this entry, with missing fields from another entry.
    fn or(self, other: &Self) -> Self {
        macro_rules! each {
            ($($field:ident),+) => { Self { $($field: self.$field.or_else(|| other.$field.clone())),+ } };
        }
        with_fields!(each)
    }

    /// Returns the names of the present fields.
    fn fields(&self) -> impl Iterator<Item = &'static str> {
        macro_rules! each {
            ($($field:ident),+) => { [$(self.$field.is_some().then_some(stringify!($field))),+] };
        }
        with_fields!(each).into_iter().flatten()
    }

    /// Returns the VM with this number.
    fn vm(&self, name: &str, kernel: &Path, index: u32, folder: &Path) -> VmSpec {
        let name = if self.count.is_some() { format!("{name}-{index}") } else { name.to_owned() };
        let text = |text: &str| expand(text, index, &name);
        let path = |path: &Path| match path.to_str() {
            Some(path) => folder.join(text(path)),
            None => folder.join(path),
        };
        let disk = |disk: &DiskSpec| DiskSpec {
            path: path(&disk.path),
            backing: disk.backing.as_deref().map(path),
            ..disk.clone()
        };
        let network = |network: &NetworkSpec| network.for_vm(index, text);
        let vsock = |vsock: &VsockSpec| VsockSpec { uds: path(&vsock.uds), ..vsock.clone() };
        let sharing = self.sharing.clone().unwrap_or_default();
        VmSpec {
            initrd: self.initrd.as_deref().map(path),
            cmdline: text(self.cmdline.as_deref().unwrap_or(DEFAULT_COMMAND_LINE)),
            memory: self.memory.unwrap_or_default(),
            vcpus: self.vcpus.unwrap_or(1),
            smt: self.smt.unwrap_or(false),
            cpu: self.cpu.unwrap_or_default(),
            hugepages: self.hugepages.unwrap_or_default(),
            host_numa_node: self.host_numa_node,
            memory_weight: self.memory_weight.unwrap_or_default(),
            bus: self.bus.unwrap_or_default(),
            disks: self.disks.iter().flatten().map(disk).collect(),
            cloud_init: self.cloud_init.as_ref().map(|files| files.with_paths(path)),
            networks: self.networks.iter().flatten().map(network).collect(),
            vsock: self.vsock.as_ref().map(vsock),
            rng: self.rng.clone().unwrap_or_default(),
            balloon: self.balloon,
            console: ConsoleSpec {
                file: self.console.as_ref().and_then(|console| console.file.as_deref()).map(path),
            },
            sharing: SharingSpec { group: text(&sharing.group), ..sharing },
            memory_hole: self.memory_hole.unwrap_or_default(),
            start: Some(self.start.unwrap_or(true)),
            ..VmSpec::new(name.clone(), path(kernel))
        }
    }
}

/// Replaces `{index}` and `{name}`.
#[must_use]
pub fn expand(text: &str, index: u32, name: &str) -> String {
    // In one pass, so that "{index}" in a name is not expanded again.
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('{') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("{index}") {
            expanded.push_str(&index.to_string());
            rest = after;
        } else if let Some(after) = rest.strip_prefix("{name}") {
            expanded.push_str(name);
            rest = after;
        } else {
            expanded.push('{');
            rest = &rest[1..];
        }
    }
    expanded.push_str(rest);
    expanded
}

/// Returns the VMs of a configuration file, validated.
///
/// # Errors
/// Fails with all mistakes of the file and of those that it includes.
pub fn load(path: &Path) -> Result<Vec<Validated>, Mistakes> {
    let mut loading = Loading::default();
    loading.file(path, None, &mut Defaults::default(), 0);
    let vms = loading.check();
    if loading.mistakes.is_empty() { Ok(vms) } else { Err(collect(loading.mistakes)) }
}

/// Returns all mistakes, ordered by file and line. A mistake that several VMs have in common appears once.
fn collect(mut found: Vec<Found>) -> Mistakes {
    found.sort_by_key(|found| (found.source, found.mistake.line));
    let mistakes = found.into_iter().map(|Found { mut mistake, more, .. }| {
        match more {
            0 => {}
            1 => mistake.text.push_str(" (and so for 1 more VM)"),
            more => mistake.text.push_str(&format!(" (and so for {more} more VMs)")),
        }
        mistake
    });
    Mistakes(mistakes.collect())
}

/// A place: the number of a file, and a JSON pointer.
type Place = (usize, String);

/// A VM of a file, without its invalid parts.
#[derive(Debug)]
struct Planned {
    spec: VmSpec,
    /// The number of the entry.
    entry: usize,
    /// Whether the name is missing. That has been reported, like a missing kernel.
    is_unnamed: bool,
    has_no_kernel: bool,
}

/// The defaults for VMs.
#[derive(Clone, Debug, Default)]
struct Defaults {
    entry: Entry,
    /// The source of each field.
    fields: Vec<(&'static str, Place)>,
}

/// A mistake, with its place.
#[derive(Debug)]
struct Found {
    source: usize,
    pointer: String,
    /// The text without the parts that differ between the VMs of an entry.
    shape: String,
    mistake: Mistake,
    /// Number of further VMs with the same mistake.
    more: usize,
}

#[derive(Debug, Default)]
struct Loading {
    sources: Vec<Source>,
    entries: Vec<EntryPlaces>,
    vms: Vec<Planned>,
    mistakes: Vec<Found>,
}

impl Loading {
    /// Reads a file and all files that it includes.
    fn file(&mut self, path: &Path, included_from: Option<Place>, defaults: &mut Defaults, depth: usize) {
        let text = match fs::read_to_string(path) {
            Ok(_) if depth > MAX_DEPTH => Err(format!(
                "includes are nested more than {MAX_DEPTH} levels deep; do files include each other?"
            )),
            Ok(text) => Ok(text),
            Err(error) => Err(format!("read {}: {error}", path.display())),
        };
        let text = match (text, included_from) {
            (Ok(text), _) => text,
            (Err(text), Some(place)) => return self.mistake(&place, None, text),
            (Err(text), None) => {
                let mistake = Mistake { file: path.to_owned(), line: None, text };
                return self.found(0, String::new(), None, mistake);
            }
        };
        let number = self.sources.len();
        let (source, value, wrong) = Source::parse(path, &text);
        self.sources.push(source);
        // If parsing failed, there may be no value.
        let readable = wrong.is_empty() || !value.is_null();
        for mistake in wrong {
            self.found(number, String::new(), None, mistake);
        }
        if !readable {
            return;
        }
        let Read { include, defaults: own, vms, faults } = read::read(value);
        for (pointer, text) in &faults {
            self.mistake(&(number, pointer.clone()), None, text.clone());
        }
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        for (index, include) in include {
            let place = (number, format!("/include/{index}"));
            self.file(&folder.join(include), Some(place), defaults, depth + 1);
        }
        for field in own.vm.fields().filter(|field| matches!(*field, "name" | "count")) {
            let text = format!("{field} has no default, because each VM has its own");
            self.mistake(&(number, format!("/defaults/{field}")), None, text);
        }
        defaults.take(own, number);
        for (index, entry) in vms {
            self.entry((number, format!("/vms/{index}")), entry, defaults, &faults, &folder);
        }
    }

    fn entry(
        &mut self,
        place: Place,
        entry: Entry,
        defaults: &Defaults,
        faults: &[read::Fault],
        folder: &Path,
    ) {
        let own = |field| (field, (place.0, format!("{}/{field}", place.1)));
        let mut fields: Vec<_> = entry.vm.fields().map(own).collect();
        fields.extend(defaults.fields.iter().cloned());
        let disks = if entry.vm.disks.is_some() { entry.disks } else { defaults.entry.disks.clone() };
        self.entries.push(EntryPlaces { entry: place.clone(), fields, disks });
        let vm = entry.vm.or(&defaults.entry.vm);
        for (field, given) in [("name", vm.name.is_some()), ("kernel", vm.kernel.is_some())] {
            // An invalid value has already been reported.
            let is_reported = faults.iter().any(|(fault, _)| {
                *fault == format!("{}/{field}", place.1) || *fault == format!("/defaults/{field}")
            });
            if !given && !is_reported {
                let help =
                    if field == "name" { "give it one" } else { "give it, or one in [defaults] for all" };
                self.mistake(&place, None, format!("a VM needs a {field}; {help}"));
            }
        }
        let mut count = vm.count.unwrap_or(1);
        if !(1..=MAX_COUNT).contains(&count) {
            let text = format!("count is {count}; use 1 to {MAX_COUNT}");
            self.mistake(&(place.0, place.1.clone() + "/count"), None, text);
            count = 1;
        }
        // A VM without a name is checked too, under a name that no VM can have.
        let unnamed = format!("without a name ({})", self.entries.len());
        for index in 0..count {
            let name = vm.name.as_deref().unwrap_or(&unnamed);
            let kernel = vm.kernel.as_deref().unwrap_or(Path::new(""));
            self.vms.push(Planned {
                spec: vm.vm(name, kernel, index, folder),
                entry: self.entries.len() - 1,
                is_unnamed: vm.name.is_none(),
                has_no_kernel: vm.kernel.is_none(),
            });
        }
    }

    /// Records a mistake at a place, and its VM if there is one.
    fn mistake(&mut self, place: &Place, vm: Option<&str>, text: String) {
        let (source, pointer) = place;
        let file = &self.sources[*source];
        let mistake = Mistake { file: file.path.clone(), line: file.line_of(pointer), text };
        self.found(*source, pointer.clone(), vm, mistake);
    }

    fn found(&mut self, source: usize, pointer: String, vm: Option<&str>, mistake: Mistake) {
        let plain = |text: String| text.chars().filter(|c| !c.is_ascii_digit()).collect::<String>();
        let shape = vm.map_or_else(|| mistake.text.clone(), |vm| plain(mistake.text.replace(vm, "")));
        let same =
            |found: &&mut Found| (found.source, &found.pointer, &found.shape) == (source, &pointer, &shape);
        match self.mistakes.iter_mut().find(same).filter(|_| vm.is_some()) {
            Some(found) => found.more += 1,
            None => self.mistakes.push(Found { source, pointer, shape, mistake, more: 0 }),
        }
    }
}

impl Defaults {
    /// Adds the defaults of another file, which take precedence.
    fn take(&mut self, own: Entry, source: usize) {
        let mut fields: Vec<_> =
            own.vm.fields().map(|field| (field, (source, format!("/defaults/{field}")))).collect();
        fields.append(&mut self.fields);
        self.fields = fields;
        if own.vm.disks.is_some() {
            self.entry.disks = own.disks;
        }
        self.entry.vm = own.vm.or(&self.entry.vm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use samepage_machine::boot::test_images::pvh_elf;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            let folder = Self(tempfile::tempdir().unwrap());
            fs::write(folder.0.path().join("vmlinux"), pvh_elf(b"\xf4")).unwrap();
            folder
        }

        fn write(&self, name: &str, text: &str) -> PathBuf {
            let path = self.0.path().join(name);
            fs::write(&path, text).unwrap();
            path
        }

        fn mistakes(&self, text: &str) -> Vec<(Option<usize>, String)> {
            let Mistakes(mistakes) = load(&self.write("vms.toml", text)).unwrap_err();
            mistakes.into_iter().map(|mistake| (mistake.line, mistake.text)).collect()
        }
    }

    #[test]
    fn templates_are_replaced_once() {
        assert_eq!(expand("{name}/{index}.img", 3, "vm-3"), "vm-3/3.img");
        assert_eq!(expand("{name}", 1, "{index}"), "{index}");
        assert_eq!(expand("a{b}{{index}}{", 7, "n"), "a{b}{7}{");
    }

    #[test]
    fn vms_have_defaults_and_numbers_and_paths_begin_at_the_file() {
        let folder = Folder::new();
        folder.write("d0", "x");
        folder.write("d1", "x");
        folder.write("common.toml", "[defaults]\nkernel = 'vmlinux'\nmemory = '64M'\n");
        let text = "include = ['common.toml']\n[defaults]\ncmdline = 'host={name}'\n\
                    [[vms]]\nname = 'web'\ncount = 2\ndisks = [{ path = 'd{index}' }]\n\
                    [[vms]]\nname = 'db'\nmemory = 4194304\nstart = false\n";
        let vms: Vec<_> =
            load(&folder.write("vms.toml", text)).unwrap().into_iter().map(Validated::into_spec).collect();
        let names: Vec<_> = vms.iter().map(|vm| (vm.name.as_str(), vm.cmdline.as_str())).collect();
        assert_eq!(names, [("web-0", "host=web-0"), ("web-1", "host=web-1"), ("db", "host=db")]);
        assert_eq!(vms[1].disks[0].path, folder.0.path().join("d1"));
        assert_eq!(vms[2].kernel, folder.0.path().join("vmlinux"));
        assert_eq!((vms[0].memory.0, vms[2].memory.0, vms[2].start), (64 << 20, 4 << 20, Some(false)));
    }

    #[test]
    fn json_has_the_same_shape() {
        let folder = Folder::new();
        let json =
            r#"{"defaults": {"kernel": "vmlinux"}, "vms": [{"name": "a", "sharing": {"mode": "zero"}}]}"#;
        assert_eq!(load(&folder.write("vms.json", json)).unwrap()[0].spec().name, "a");
        let Mistakes(mistakes) = load(&folder.write("vms.json", "{\n\"vms\": 3}")).unwrap_err();
        assert_eq!(mistakes[0].line, Some(2));
    }

    #[test]
    fn mistakes_are_told_with_their_lines_and_all_at_once() {
        let folder = Folder::new();
        let text = "[[vms]]\nname = 'a'\nkernel = 'vmlinux'\nmemory = '1000'\n\n\
                    [[vms]]\nname = 'b'\nkernel = 'none'\n\n\
                    [[vms]]\nname = 'c d'\nkernel = 'vmlinux'\n\n\
                    [[vms]]\nname = 'e'\n\n\
                    [[vms]]\nname = 'f'\nkernel = 'vmlinux'\ndisks = [{ path = 'vmlinux' },\n{ path = 'x', queues = 0 }]\n";
        let mistakes = folder.mistakes(text);
        let lines: Vec<_> = mistakes.iter().map(|(line, _)| line.unwrap()).collect();
        assert_eq!(lines, [4, 8, 11, 14, 21, 21], "{mistakes:?}");
        assert!(mistakes[1].1.contains("none"), "{mistakes:?}");
        assert!(mistakes[3].1.contains("needs a kernel"), "{mistakes:?}");
        assert!(mistakes[4].1.contains("0 queues") && mistakes[5].1.contains("No such file"), "{mistakes:?}");
        let wrong = folder.mistakes("[[vms]]\nname = 'a'\nkernel = 'vmlinux'\ncpus = 2\n");
        assert_eq!(wrong[0].0, Some(4));
        assert!(wrong[0].1.contains("unknown field `cpus`"), "{wrong:?}");
        assert_eq!(folder.mistakes("vms = [\n")[0].0, Some(1));
        assert_eq!(folder.mistakes("include = ['vms.toml']\n").len(), 1);
        assert_eq!(folder.mistakes("\ninclude = ['none.toml']\n")[0].0, Some(2));
        let twice = "[defaults]\nkernel = 'vmlinux'\n[[vms]]\nname = 'a'\n[[vms]]\nname = 'a'\n";
        assert!(folder.mistakes(twice)[0].1.contains("two VMs are named a"));
    }

    #[test]
    fn no_mistake_hides_another() {
        let folder = Folder::new();
        let text = "colour = 'red'\ninclude = ['none.toml', 7]\n[defaults]\nkernel = 'vmlinux'\nmemory = 'much'\n\
                    [[vms]]\nname = 'a'\ncpus = 2\nmemory = 1000\ninitrd = 'none'\nsharing = { group = 'b c', way = 1 }\n\
                    console = { file = 'none/log' }\n\
                    disks = [{ readonly = true }, { path = 'gone', id = 'x y' }, { path = '.' },\n\
                    { path = 'vmlinux', id = 'q', limits = { iops = 0, rate = 0 } }, { path = 'vmlinux', id = 'q' }]\n\
                    [[vms]]\nmemory = 4097\n\
                    [[vms]]\nname = 'b'\ncount = 0\n[[vms]]\nname = 'a'\n";
        let mistakes = folder.mistakes(text);
        let wanted = [
            (1, "unknown field `colour`"),
            (2, "none.toml"),
            (2, "invalid type: integer `7`"),
            (5, "unknown unit"),
            (8, "unknown field `cpus`"),
            (9, "VM a: 1000 bytes of memory"),
            (10, "initrd"),
            (11, "unknown field `way`"),
            (11, "\"b c\""),
            (12, "make the folder"),
            (13, "missing field `path`"),
            (13, "\"x y\""),
            (13, "gone: No such file"),
            (13, "it is a directory"),
            (14, "0 bytes a second"),
            (14, "0 requests a second"),
            (14, "two disks are named q"),
            (14, "by both as readonly"),
            (15, "needs a name"),
            (16, "4097 bytes"),
            (19, "count is 0"),
            (21, "two VMs are named a"),
        ];
        for (line, part) in wanted {
            let found = mistakes.iter().filter(|(at, text)| *at == Some(line) && text.contains(part)).count();
            assert_eq!(found, 1, "line {line}: {part}: {mistakes:#?}");
        }
        assert_eq!(mistakes.len(), wanted.len(), "{mistakes:#?}");
    }

    #[test]
    fn what_vms_of_an_entry_have_in_common_is_told_once_where_it_comes_from() {
        let folder = Folder::new();
        folder.write(
            "common.toml",
            "[defaults]\nkernel = 'vmlinux'\ndisks = [{ path = 7 },\n{ path = 'd{index}' }]\n",
        );
        let text = "include = ['common.toml']\n[[vms]]\nname = 'web'\ncount = 4\n";
        let Mistakes(mistakes) = load(&folder.write("vms.toml", text)).unwrap_err();
        assert_eq!(mistakes.len(), 2, "{mistakes:?}");
        let missing = &mistakes[1];
        assert!(missing.file.ends_with("common.toml"), "{missing}");
        assert_eq!(missing.line, Some(4), "{missing}");
        assert!(
            missing.text.contains("d0") && missing.text.ends_with("(and so for 3 more VMs)"),
            "{missing}"
        );
        let shared = "[[vms]]\nname = 'web'\ncount = 2\nkernel = 'vmlinux'\ndisks = [{ path = 'vmlinux' }]\n";
        let mistakes = folder.mistakes(shared);
        assert_eq!(mistakes[0].0, Some(5));
        assert!(
            mistakes[0].1.contains("{index}") && mistakes[0].1.contains("VM web-0 and by VM web-1"),
            "{mistakes:?}"
        );
    }

    #[test]
    fn mistakes_in_json_and_in_syntax_have_lines() {
        let folder = Folder::new();
        let json = "{\n\"vms\": [\n{\"name\": \"a\", \"kernel\": \"vmlinux\",\n\"memory\": \"x\"},\n{\"name\": 1,\n\
                    \"kernel\": \"none\",\n\"kernel\": \"none\"}]}";
        let Mistakes(mistakes) = load(&folder.write("vms.json", json)).unwrap_err();
        let lines: Vec<_> = mistakes.iter().map(|mistake| mistake.line.unwrap()).collect();
        assert_eq!(lines, [4, 5, 7, 7], "{mistakes:?}");
        // Of TOML what can be read is checked.
        let mistakes = folder.mistakes(
            "[defaults]\nkernel = \n[[vms]]\nname = 'a'\nmemory = '1'\nx = 99999999999999999999\n[[vms]\n",
        );
        assert!(mistakes.iter().any(|(line, _)| *line == Some(2)), "{mistakes:?}");
        assert!(mistakes.iter().any(|(_, text)| text.contains("1 bytes of memory")), "{mistakes:?}");
    }
}
