//! `samepage analyze` on images and processes with known contents.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use quick_xml::Reader;
use quick_xml::events::Event;
use samepage_sharing::PAGE_SIZE;
use samepage_tests::program::{Finished, Running, command};
use serde_json::Value;
use tempfile::TempDir;

const PAGE: u64 = PAGE_SIZE as u64;
const MIB: u64 = 1 << 20;
/// The variable that turns `a_process_with_known_memory` into a process with known memory.
const BE_A_PROCESS: &str = "SAMEPAGE_TESTS_KNOWN_MEMORY";

fn page(content: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    page[8..16].copy_from_slice(&content.to_le_bytes());
    page
}

fn memory(contents: impl IntoIterator<Item = u64>) -> Vec<u8> {
    contents.into_iter().flat_map(page).collect()
}

/// Returns an ELF core with one segment for each address, in QEMU's form.
fn core(segments: &[(u64, Vec<u8>)]) -> Vec<u8> {
    let mut file = vec![0; 64];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    // ET_CORE of EM_X86_64, with program headers of 56 bytes after this header.
    file[16..20].copy_from_slice(&[4, 0, 62, 0]);
    file[32] = 64;
    file[54] = 56;
    file[56] = segments.len() as u8;
    let mut offset = 64 + 56 * segments.len() as u64;
    for (address, memory) in segments {
        let length = memory.len() as u64;
        file.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        for word in [offset, *address, *address, length, length, 0] {
            file.extend(word.to_le_bytes());
        }
        offset += length;
    }
    segments.iter().for_each(|(_, memory)| file.extend(memory));
    file
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).expect("write an image");
        path
    }
}

fn analyze(arguments: &[&str], files: &[&Path]) -> Finished {
    let mut command = command(["analyze"]);
    command.args(arguments).args(files);
    Running::start(command).wait()
}

fn json(arguments: &[&str], files: &[&Path]) -> Value {
    let finished = analyze(&[&["--json"], arguments].concat(), files);
    finished.assert_code(0);
    serde_json::from_str(&finished.stdout).expect("JSON")
}

/// Returns the error message: one line that names the cause, without a result.
fn refusal(arguments: &[&str], files: &[&Path]) -> String {
    let finished = analyze(arguments, files);
    finished.assert_code(1);
    assert_eq!(finished.stdout, "");
    assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
    finished.stderr
}

fn assert_counts(of: &Value, expected: &[(&str, u64)]) {
    for (name, count) in expected {
        assert_eq!(of[name].as_u64(), Some(*count), "{name} in {of:#}");
    }
}

#[test]
fn two_like_images_save_one_of_them() {
    let folder = Folder::new();
    let content = memory((0..10).chain(1000..1600));
    let (one, two) = (folder.file("one.raw", &content), folder.file("two.raw", &content));
    let result = json(&[], &[&one, &two]);

    assert_eq!(result["inputs"][0]["kind"], "raw");
    assert_eq!(result["inputs"][1]["path"], two.to_str().expect("a name in UTF-8"));
    assert_counts(
        &result["images"][0],
        &[("pages", 610), ("zero", 1), ("between", 609), ("within", 0), ("unique", 0)],
    );
    assert_counts(&result["total"], &[("pages", 1220), ("zero", 2), ("between", 1218), ("untouched", 0)]);
    assert_counts(&result["saved"], &[("zero", 2), ("within", 0), ("between", 609)]);
    assert_counts(
        &result,
        &[("page_bytes", PAGE), ("frames", 609), ("saved_pages", 611), ("saved_bytes", 611 * PAGE)],
    );
    assert_counts(&result["runs"], &[("runs", 2), ("pages", 1218), ("mappings", 4)]);
    assert_counts(
        &result["runs"]["buckets"][4],
        &[("from_pages", 512), ("runs", 2), ("pages", 1218), ("mappings", 4)],
    );
    assert_eq!(result["runs"]["buckets"][4]["to_pages"], Value::Null);
    let budgets = result["budgets"].as_array().expect("budgets");
    assert_counts(budgets.last().expect("one for all runs"), &[("mappings", 4), ("saved_pages", 609)]);
    assert!(result["seconds"].is_f64());
}

#[test]
fn one_image_has_duplicates_within_it() {
    let folder = Folder::new();
    let image = folder.file("vm.raw", &memory([7, 8, 7, 0, 8, 9, 7]));
    let result = json(&[], &[&image]);
    assert_counts(
        &result["total"],
        &[("pages", 7), ("zero", 1), ("within", 5), ("between", 0), ("unique", 1)],
    );
    assert_counts(&result["saved"], &[("zero", 1), ("within", 3), ("between", 0)]);
    // 7 and 8 have frames 0 and 1: 7 8, 7, 8, 7.
    assert_counts(&result["runs"], &[("runs", 4), ("pages", 5)]);
}

#[test]
fn holes_are_untouched_memory() {
    let folder = Folder::new();
    let path = folder.path("sparse.raw");
    let file = File::create(&path).expect("make an image");
    file.set_len(1 << 40).expect("room for names of bytes");
    file.write_all_at(&memory(1..=256), 1 << 30).expect("write 1 MiB");
    let result = json(&[], &[&path]);
    assert_counts(&result["total"], &[("pages", 1 << 28), ("unique", 256)]);
    let untouched = result["total"]["untouched"].as_u64().expect("a count");
    assert!(untouched > (1 << 28) - 1024, "{result:#}");
}

#[test]
fn a_core_and_a_raw_image_of_the_same_memory_are_alike() {
    let folder = Folder::new();
    let (low, high) = (memory(0..160), memory(500..900));
    let raw = folder.file("vm.raw", &[low.clone(), high.clone()].concat());
    let core = folder.file("vm.core", &core(&[(0, low), (1 << 32, high)]));
    let result = json(&[], &[&raw, &core]);
    assert_eq!(result["inputs"][1]["kind"], "core");
    assert_counts(&result["total"], &[("pages", 1120), ("zero", 2), ("between", 1118)]);
    // A gap between addresses in the core ends a run.
    assert_counts(&result["runs"], &[("runs", 3)]);
}

#[test]
fn memory_of_lime_is_like_the_same_memory_elsewhere() {
    let folder = Folder::new();
    let (low, high) = (memory(1..161), memory(500..900));
    let range = |first: u64, memory: &[u8]| {
        let mut range = b"EMiL\x01\0\0\0".to_vec();
        let last = first + memory.len() as u64 - 1;
        [first, last, 0].iter().for_each(|word| range.extend(word.to_le_bytes()));
        [&range, memory].concat()
    };
    let raw = folder.file("vm.raw", &[low.clone(), high.clone()].concat());
    let lime = folder.file("vm.lime", &[range(0x1000, &low), range(1 << 32, &high)].concat());
    let result = json(&[], &[&raw, &lime]);
    assert_eq!(result["inputs"][1]["kind"], "lime");
    assert_counts(&result["total"], &[("pages", 1120), ("between", 1120)]);
    let cut = folder.file("cut.lime", &range(0, &low)[..4096]);
    assert!(refusal(&[], &[&cut]).contains("truncated"));
}

#[test]
fn one_file_that_is_named_twice_is_told() {
    let folder = Folder::new();
    let image = folder.file("vm.raw", &memory(1..11));
    let copy = folder.file("copy.raw", &memory(1..11));
    let link = folder.path("link.raw");
    std::os::unix::fs::symlink(&image, &link).expect("make a link");
    let finished = analyze(&["--json"], &[&image, &copy, &link]);
    finished.assert_code(0);
    let told = format!("samepage: {} is the same as {}: ", link.display(), image.display());
    assert!(finished.stderr.starts_with(&told), "{}", finished.stderr);
    assert_eq!(finished.stderr.lines().count(), 1, "{}", finished.stderr);
    let result: Value = serde_json::from_str(&finished.stdout).expect("JSON");
    assert_eq!(result["inputs"][2]["same_as"], image.to_str().expect("a name in UTF-8"));
    assert_eq!(result["inputs"][1].get("same_as"), None);
}

#[test]
fn raw_memory_may_begin_with_a_program() {
    let folder = Folder::new();
    let mut content = memory(1..5);
    content[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
    let image = folder.file("pmemsave.raw", &content);
    assert!(refusal(&[], &[&image]).contains("--format raw"));
    let result = json(&["--format", "raw"], &[&image]);
    assert_counts(&result["total"], &[("pages", 4), ("unique", 4)]);
    assert!(refusal(&["--format", "lime"], &[&image]).contains("LiME"));
}

#[test]
fn what_is_no_image_is_refused_by_name() {
    let folder = Folder::new();
    let good = core(&[(0, memory(0..4)), (MIB, memory(0..4))]);
    let refused = [
        ("empty", vec![], "empty"),
        ("odd.raw", vec![1; 5000], "5000 bytes"),
        ("cut.core", good[..good.len() - 1].to_vec(), "truncated"),
        ("headers.core", good[..100].to_vec(), "truncated"),
        ("start.core", good[..6].to_vec(), "truncated"),
        ("no.core", [&good[..16], &[2], &good[17..]].concat(), "core"),
        ("x.gz", b"\x1f\x8b\x08".to_vec(), "gzip"),
        ("vm.save", b"LibvirtQemudSave\x02\0\0\0".to_vec(), "virsh restore"),
        ("vm.kdump", [&b"makedumpfile"[..], &[0; 4084]].concat(), "--format elf"),
        ("xen.save", b"Xen saved domain, xl format\n".to_vec(), "xl dump-core"),
    ];
    for (name, content, what) in refused {
        let said = refusal(&[], &[&folder.file(name, &content)]);
        assert!(said.contains(name) && said.contains(what), "{name}: {said}");
    }
    assert!(refusal(&[], &[folder.0.path()]).contains("a directory"));
    assert!(refusal(&[], &[&folder.path("missing.raw")]).contains("missing.raw"));
    // One invalid file keeps the others from being read at all.
    let good = folder.file("good.core", &good);
    assert!(refusal(&[], &[&good, &folder.path("missing.raw")]).contains("missing.raw"));
}

#[test]
fn wrong_usage_is_told() {
    for arguments in
        [&[][..], &["--pid", "0"], &["--range", "1000-2000", "x"], &["--pid", "1", "--range", "5-1"]]
    {
        analyze(arguments, &[]).assert_code(2);
    }
    assert!(refusal(&["--pid", "4294967295"], &[]).contains("4294967295"));
}

#[test]
fn the_table_has_units_and_the_picture_is_xml() {
    let folder = Folder::new();
    let one = folder.file("one & <only>.raw", &memory(0..2000));
    let two = folder.file("two.raw", &memory(1000..3000));
    let picture = folder.path("picture.svg");
    let svg = ["--svg", picture.to_str().expect("a name in UTF-8")];
    let finished = analyze(&svg, &[&one, &two]);
    finished.assert_code(0);
    for part in ["7.8 MiB", "1,000", "3.9 MiB", "512 and more", "100.0 %", "between VMs"] {
        assert!(finished.stdout.contains(part), "{part} in\n{}", finished.stdout);
    }
    assert_eq!(finished.stderr, "", "short work reports no progress");

    let text = fs::read_to_string(&picture).expect("a picture");
    let mut reader = Reader::from_str(&text);
    let mut elements = 0;
    loop {
        match reader.read_event().expect("well-formed XML") {
            Event::Eof => break,
            Event::Start(element) | Event::Empty(element) => {
                elements += 1;
                for attribute in element.attributes() {
                    attribute.expect("well-formed attributes");
                }
            }
            _ => {}
        }
    }
    assert!(elements > 40, "{text}");
    assert!(text.contains("prefers-color-scheme: dark"));
    assert!(text.contains("mappings") && text.contains("MiB"));

    let said = refusal(&["--svg", "/no/such/folder/picture.svg"], &[&two]);
    assert!(said.contains("/no/such/folder/picture.svg"), "{said}");
}

/// Not a test: the test below starts this, as a process with known memory.
#[test]
fn a_process_with_known_memory() {
    if std::env::var_os(BE_A_PROCESS).is_none() {
        return;
    }
    let mut memory = vec![0_u8; 64 << 20];
    let first = memory.as_ptr().addr().next_multiple_of(PAGE_SIZE) - memory.as_ptr().addr();
    let start = memory.as_ptr().addr() + first;
    // Two identical runs of 100 pages, a single page, and untouched memory.
    for (at, content) in (0..100).chain(1000..1100).zip((1..=100).chain(1..=100)).chain([(5000, 7777)]) {
        memory[first + at * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(&page(content));
    }
    println!("\nmemory at {:x}-{:x}", start, start + (32 << 20));
    io::stdout().flush().expect("tell the test");
    // Wait until the test is done.
    let _ = io::stdin().read_line(&mut String::new());
    drop(memory);
}

/// Returns the number of present pages in a range of another process, `START-END` in hexadecimal.
fn present_pages(pid: &str, range: &str) -> usize {
    let address = |text| usize::from_str_radix(text, 16).expect("an address");
    let (start, end) = range.split_once('-').expect("a range");
    let (start, end) = (address(start), address(end));
    let pagemap = fs::File::open(format!("/proc/{pid}/pagemap")).expect("the child's page map");
    let mut entries = vec![0; (end - start) / 4096 * 8];
    pagemap.read_exact_at(&mut entries, (start / 4096 * 8) as u64).expect("entries of the page map");
    // Bit 63 of an entry says that the page is present.
    entries.as_chunks::<8>().0.iter().filter(|entry| u64::from_ne_bytes(**entry) >> 63 == 1).count()
}

#[test]
fn a_process_is_read_and_not_touched() {
    let mut child = Command::new(std::env::current_exe().expect("find this test"));
    child.args(["--exact", "a_process_with_known_memory", "--nocapture"]).env(BE_A_PROCESS, "1");
    let child = Running::start(child);
    let line = child.stdout().wait_for_line("memory at ");
    let range = line.split_once("memory at ").expect("an address").1.trim();
    let pid = child.pid().as_raw_nonzero().to_string();
    let resident = || present_pages(&pid, range);

    let before = resident();
    let result = json(&["--pid", &pid, "--range", range], &[]);
    assert_eq!(resident(), before);
    assert_counts(&result["total"], &[("pages", 8192), ("within", 200), ("unique", 1), ("unread", 0)]);
    assert_counts(&result["saved"], &[("within", 100)]);
    assert_counts(&result["runs"], &[("runs", 2), ("pages", 200)]);
    let input = &result["inputs"][0];
    assert_eq!(
        (input["kind"].as_str(), input["mappings"][0]["range"].as_str()),
        (Some("process"), Some(range))
    );

    // The range is found automatically, and two readings are identical.
    let result = json(&["--pid", &pid, "--pid", &pid], &[]);
    assert_counts(&result["saved"], &[("within", 200)]);
    // The kernel may have joined the memory with a few pages of another kind.
    let between = result["saved"]["between"].as_u64().expect("a count");
    assert!((101..200).contains(&between), "{result:#}");
    assert_eq!(result["inputs"][0]["mappings"].as_array().map(Vec::len), Some(1), "{result:#}");
    assert!(refusal(&["--pid", &pid, "--min-mapping", "1T"], &[]).contains("--range"));
    assert!(refusal(&["--pid", &pid, "--range", "1000-2000"], &[]).contains("1000-2000"));
}
