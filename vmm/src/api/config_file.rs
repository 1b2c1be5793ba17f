//! Configuration files: VMs written down, in TOML or JSON.
//!
//! A file names VMs in the shape of the API's body, defaults for them, and other files to include. What is
//! wrong with it is told all at once and, for TOML, with the numbers of lines.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::de::{DeTable, DeValue};
use utoipa::ToSchema;

use super::disk_spec::DiskSpec;
use super::explain;
use super::spec::{ConsoleSpec, DEFAULT_COMMAND_LINE, HoleSpec, HugePagesSpec, SharingSpec, Size, VmSpec};
use crate::fleet::{self, FleetError, Uses};

/// How deep files may include each other.
const MAX_DEPTH: usize = 8;
/// Most VMs that one entry stands for.
const MAX_COUNT: u32 = 4096;

/// A configuration file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    /// Files whose VMs and defaults are taken first. Relative paths begin at the folder of this file.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub include: Vec<PathBuf>,
    /// What VMs of this file have where they do not say otherwise, and those of files included after it.
    #[serde(default)]
    pub defaults: VmEntry,
    /// The VMs.
    #[serde(default)]
    pub vms: Vec<VmEntry>,
}

/// One or several VMs, or what VMs have by default. In texts and paths `{index}` and `{name}` stand for
/// each VM's number and name; relative paths begin at the folder of the file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmEntry {
    /// The VM's name; with `count`, VMs are named NAME-0, NAME-1 and so on.
    pub name: Option<String>,
    /// How many such VMs there are.
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
    /// Memory.
    pub memory: Option<Size>,
    /// What the host backs memory with.
    pub hugepages: Option<HugePagesSpec>,
    /// Disks, in the order in which the guest finds them.
    pub disks: Option<Vec<DiskSpec>>,
    /// Where the console goes besides the backlog that is kept for clients.
    pub console: Option<ConsoleSpec>,
    /// How memory is shared.
    pub sharing: Option<SharingSpec>,
    /// The guests' memory hole, in which an agent of theirs may say what pages are for; it is on where
    /// nothing is said.
    pub memory_hole: Option<HoleSpec>,
    /// Whether the VM is started once it is made; it is where nothing is said.
    pub start: Option<bool>,
}

impl VmEntry {
    /// This entry, and what it leaves out from another.
    fn or(self, other: &Self) -> Self {
        macro_rules! each {
            ($($field:ident),+) => { Self { $($field: self.$field.or_else(|| other.$field.clone())),+ } };
        }
        each!(
            name,
            count,
            kernel,
            initrd,
            cmdline,
            memory,
            hugepages,
            disks,
            console,
            sharing,
            memory_hole,
            start
        )
    }

    /// The VM of this number.
    fn vm(&self, name: &str, kernel: &Path, index: u32, folder: &Path) -> VmSpec {
        let name = if self.count.is_some() { format!("{name}-{index}") } else { name.to_owned() };
        let text = |text: &str| expand(text, index, &name);
        let path = |path: &Path| match path.to_str() {
            Some(path) => folder.join(text(path)),
            None => folder.join(path),
        };
        let disk = |disk: &DiskSpec| DiskSpec { path: path(&disk.path), ..disk.clone() };
        let sharing = self.sharing.clone().unwrap_or_default();
        VmSpec {
            initrd: self.initrd.as_deref().map(path),
            cmdline: text(self.cmdline.as_deref().unwrap_or(DEFAULT_COMMAND_LINE)),
            memory: self.memory.unwrap_or_default(),
            hugepages: self.hugepages.unwrap_or_default(),
            disks: self.disks.iter().flatten().map(disk).collect(),
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
    // In one pass, so that a name that contains "{index}" would not be expanded again.
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

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The file.
    pub file: PathBuf,
    /// The line, counted from 1, where it is known.
    pub line: Option<usize>,
    /// What is wrong, and what to do.
    pub text: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}", self.text)
    }
}

/// Everything that is wrong with a configuration file and those it includes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistakes(pub Vec<Mistake>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().enumerate().try_for_each(|(number, mistake)| {
            let separator = if number == 0 { "" } else { "\n" };
            write!(f, "{separator}{mistake}")
        })
    }
}

impl std::error::Error for Mistakes {}

/// The VMs of a configuration file. They are checked as far as that is possible without making them.
///
/// # Errors
/// Everything that is wrong.
pub fn load(path: &Path) -> Result<Vec<VmSpec>, Mistakes> {
    let mut loading = Loading::default();
    let mut defaults = VmEntry::default();
    loading.file(path, None, &mut defaults, 0);
    loading.check();
    if loading.mistakes.is_empty() { Ok(loading.vms) } else { Err(Mistakes(loading.mistakes)) }
}

/// A file that was read.
struct Source {
    path: PathBuf,
    text: String,
}

/// Where something is: a file's number, and a JSON pointer.
type Place = (usize, String);

#[derive(Default)]
struct Loading {
    sources: Vec<Source>,
    vms: Vec<VmSpec>,
    /// Where each VM comes from, by its name.
    places: HashMap<String, Place>,
    mistakes: Vec<Mistake>,
}

impl Loading {
    /// Takes a file in, with all that it includes.
    fn file(&mut self, path: &Path, included_from: Option<Place>, defaults: &mut VmEntry, depth: usize) {
        let text = match fs::read_to_string(path) {
            Ok(_) if depth > MAX_DEPTH => {
                let text = format!("files include each other more than {MAX_DEPTH} deep; is it a circle?");
                return self.mistake(included_from, path, text);
            }
            Ok(text) => text,
            Err(error) => {
                return self.mistake(included_from, path, format!("read {}: {error}", path.display()));
            }
        };
        let number = self.sources.len();
        self.sources.push(Source { path: path.to_owned(), text });
        let file = match self.sources[number].parse() {
            Ok(file) => file,
            Err(mistake) => return self.mistakes.push(mistake),
        };
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        for (index, include) in file.include.iter().enumerate() {
            let place = (number, format!("/include/{index}"));
            self.file(&folder.join(include), Some(place), defaults, depth + 1);
        }
        for (field, given) in
            [("name", file.defaults.name.is_some()), ("count", file.defaults.count.is_some())]
        {
            if given {
                let text = format!("{field} is each VM's own, and there is no default for it");
                self.mistake(Some((number, format!("/defaults/{field}"))), path, text);
            }
        }
        *defaults = file.defaults.or(defaults);
        for (index, entry) in file.vms.into_iter().enumerate() {
            self.entry((number, format!("/vms/{index}")), entry.or(defaults), &folder);
        }
    }

    fn entry(&mut self, place: Place, entry: VmEntry, folder: &Path) {
        let path = self.sources[place.0].path.clone();
        let (Some(name), Some(kernel)) = (&entry.name, &entry.kernel) else {
            let missing = if entry.name.is_none() { "name" } else { "kernel" };
            let text = format!("a VM needs a {missing}; give it, or one in [defaults] if all have the same");
            return self.mistake(Some(place), &path, text);
        };
        let count = entry.count.unwrap_or(1);
        if !(1..=MAX_COUNT).contains(&count) {
            let text = format!("count is {count}; use 1 to {MAX_COUNT}");
            return self.mistake(Some((place.0, place.1 + "/count")), &path, text);
        }
        for index in 0..count {
            let vm = entry.vm(name, kernel, index, folder);
            self.places.entry(vm.name.clone()).or_insert_with(|| place.clone());
            self.vms.push(vm);
        }
    }

    /// Checks the VMs by themselves and together.
    fn check(&mut self) {
        let mut sound = Vec::new();
        let mut wrong: Vec<(String, String, String)> = Vec::new();
        for vm in &self.vms {
            let config = vm.to_config();
            match (vm.check(), config.check()) {
                (Err((place, reason)), _) => wrong.push((vm.name.clone(), place, reason)),
                (_, Err(error)) => {
                    let place = explain::place(&error).unwrap_or_default().to_owned();
                    wrong.push((vm.name.clone(), place, error.to_string()));
                }
                _ => sound.push(Uses::of(&config)),
            }
        }
        if let Err(error) = fleet::check_together(sound) {
            let (vm, place) = match &error {
                FleetError::Config { vm, .. } => (vm, "/name"),
                FleetError::Disk { vm, .. } | FleetError::SharedDisk { second: vm, .. } => (vm, "/disks"),
                FleetError::SharedConsole { second, .. } => (second, "/console"),
                FleetError::Build { vm, .. } => (vm, ""),
                FleetError::Watch(_) => return,
            };
            wrong.push((vm.clone(), place.to_owned(), error.to_string()));
        }
        for (vm, place, text) in wrong {
            let Some((source, entry)) = self.places.get(&vm).cloned() else { continue };
            let path = self.sources[source].path.clone();
            let text = if text.contains(&vm) { text } else { format!("VM {vm}: {text}") };
            self.mistake(Some((source, entry + &place)), &path, text);
        }
    }

    fn mistake(&mut self, place: Option<Place>, path: &Path, text: String) {
        let mistake = match place {
            Some((source, pointer)) => {
                let source = &self.sources[source];
                Mistake { file: source.path.clone(), line: source.line_of(&pointer), text }
            }
            None => Mistake { file: path.to_owned(), line: None, text },
        };
        // VMs of one entry mostly have the same mistakes.
        if self.mistakes.iter().all(|told| (told.line, &told.file) != (mistake.line, &mistake.file)) {
            self.mistakes.push(mistake);
        }
    }
}

impl Source {
    fn is_json(&self) -> bool {
        self.path.extension().is_some_and(|extension| extension == "json")
    }

    fn parse(&self) -> Result<ConfigFile, Mistake> {
        let (line, text) = if self.is_json() {
            match serde_json::from_str(&self.text) {
                Ok(file) => return Ok(file),
                Err(error) => (Some(error.line()), error.to_string()),
            }
        } else {
            match toml::from_str(&self.text) {
                Ok(file) => return Ok(file),
                Err(error) => {
                    let error: toml::de::Error = error;
                    (error.span().map(|span| self.line_at(&span)), error.message().to_owned())
                }
            }
        };
        Err(Mistake { file: self.path.clone(), line, text })
    }

    fn line_at(&self, span: &Range<usize>) -> usize {
        1 + self.text.bytes().take(span.start).filter(|byte| *byte == b'\n').count()
    }

    /// The line of what a JSON pointer points to, or of what is nearest around it.
    fn line_of(&self, pointer: &str) -> Option<usize> {
        if self.is_json() {
            return None;
        }
        let table = DeTable::parse(&self.text).ok()?;
        let mut span = table.span();
        let mut value = DeValue::Table(table.into_inner());
        for part in pointer.split('/').filter(|part| !part.is_empty()) {
            let next = match value {
                DeValue::Table(mut table) => table.remove(part),
                DeValue::Array(array) => {
                    let index = part.parse::<usize>().ok()?;
                    array.into_iter().nth(index)
                }
                _ => None,
            };
            let Some(next) = next else { break };
            span = next.span();
            value = next.into_inner();
        }
        Some(self.line_at(&span))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::test_images::pvh_elf;

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
        let vms = load(&folder.write("vms.toml", text)).unwrap();
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
        assert_eq!(load(&folder.write("vms.json", json)).unwrap()[0].name, "a");
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
        assert_eq!(lines, [14, 4, 8, 11, 21], "{mistakes:?}");
        assert!(mistakes[0].1.contains("needs a kernel"), "{mistakes:?}");
        assert!(mistakes[2].1.contains("none"), "{mistakes:?}");
        let wrong = folder.mistakes("[[vms]]\nname = 'a'\nkernel = 'vmlinux'\ncpus = 2\n");
        assert_eq!(wrong[0].0, Some(4));
        assert!(wrong[0].1.contains("unknown field `cpus`"), "{wrong:?}");
        assert_eq!(folder.mistakes("vms = [\n")[0].0, Some(1));
        assert_eq!(folder.mistakes("include = ['vms.toml']\n").len(), 1);
        assert_eq!(folder.mistakes("\ninclude = ['none.toml']\n")[0].0, Some(2));
        let twice = "[defaults]\nkernel = 'vmlinux'\n[[vms]]\nname = 'a'\n[[vms]]\nname = 'a'\n";
        assert!(folder.mistakes(twice)[0].1.contains("two VMs are named a"));
    }
}
