//! The folders of `sharing/src` are layers: code uses only what lies in its own folder and in folders before it.

use std::fs;
use std::path::{Path, PathBuf};

/// The folders, from the ground up.
const LAYERS: [&str; 12] = [
    "numbers",
    "collections",
    "memory",
    "frames",
    "changes",
    "remote",
    "index",
    "policy",
    "blocks",
    "engine",
    "inspect",
    "service",
];

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    folders.iter().flat_map(|folder| self::files(folder)).chain(files).collect()
}

/// The layer that a file belongs to. `None` for `lib.rs`, which says what users of the crate see.
fn layer_of(file: &Path, source: &Path) -> Option<usize> {
    let name = file.strip_prefix(source).unwrap().components().next().unwrap().as_os_str();
    let name = name.to_str().unwrap().trim_end_matches(".rs");
    let layer = LAYERS.iter().position(|&layer| layer == name);
    assert!(layer.is_some() || name == "lib", "{} is in no layer", file.display());
    layer
}

/// The code of a file, without its tests and comments.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    let product = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    product.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// What a file uses of this crate: the first names of its paths.
fn used(code: &str) -> impl Iterator<Item = &str> {
    code.match_indices("crate::").filter_map(|(at, found)| {
        let is_path = !code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_');
        let rest = &code[at + found.len()..];
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        is_path.then(|| &rest[..end])
    })
}

#[test]
fn every_import_points_down_the_layers() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    let mut arrows = 0;
    for file in files(&source) {
        let is_test = file.file_stem().is_some_and(|stem| stem == "tests");
        let Some(own) = layer_of(&file, &source).filter(|_| !is_test) else { continue };
        for name in used(&code(&file)) {
            arrows += 1;
            match LAYERS.iter().position(|&layer| layer == name) {
                Some(layer) if layer <= own => {}
                Some(_) => wrong.push(format!("{} uses {name}", file.display())),
                None => wrong.push(format!("{} uses crate::{name}, which is no folder", file.display())),
            }
        }
    }
    assert!(wrong.is_empty(), "imports against the layers {LAYERS:?}:\n{}", wrong.join("\n"));
    assert!(arrows > 100, "only {arrows} imports were found: the test reads the wrong files");
}

#[test]
fn imports_are_found_in_code_and_not_in_comments() {
    let code = "use crate::memory::ram;\nlet page = crate::PAGE_SIZE; mycrate::other(); pub(crate) fn f() {}";
    assert_eq!(used(code).collect::<Vec<_>>(), ["memory", "PAGE_SIZE"]);
}

/// The folders of the half that only has numbers.
const NUMBERS_HALF: [&str; 7] = ["frames", "changes", "index", "policy", "blocks", "engine", "inspect"];

/// What that half may name of the folder `memory`: the trait with its plain data, contents that the engine owns, and
/// sizes. `calls` frees frames, `loss` tells that a VM has lost memory.
const PLAIN: [&str; 7] =
    ["guest", "content", "calls::MemoryCalls", "frame_view", "loss", "pagemap::Entry", "ram::"];

/// Files that put the two halves together in one process.
const JOINTS: [&str; 2] = ["engine/mod.rs", "frames/store/mod.rs"];

/// What a file uses of the folder `memory`: the rest of each path.
fn used_of_memory(code: &str) -> impl Iterator<Item = &str> {
    const PATH: &str = "crate::memory::";
    code.match_indices(PATH).map(|(at, _)| {
        let rest = &code[at + PATH.len()..];
        rest[..rest.find(';').unwrap_or(rest.len())].lines().next().unwrap_or_default()
    })
}

#[test]
fn the_half_that_has_numbers_reaches_guests_memory_through_the_trait_alone() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    let mut uses = 0;
    for folder in NUMBERS_HALF {
        for file in files(&source.join(folder)) {
            let name = file.strip_prefix(&source).unwrap().to_str().unwrap().to_owned();
            if file.file_stem().is_some_and(|stem| stem == "tests") || JOINTS.contains(&name.as_str()) {
                continue;
            }
            for used in used_of_memory(&code(&file)) {
                uses += 1;
                let is_plain = PLAIN.iter().any(|plain| used.starts_with(plain));
                // RAM is reached by address.
                if !is_plain || used.contains("Ram") {
                    wrong.push(format!("{name} uses memory::{used}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "past `memory::guest`:\n{}", wrong.join("\n"));
    assert!(uses > 20, "only {uses} uses were found: the test reads the wrong files");
}
