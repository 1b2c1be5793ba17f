//! The folders of `sharing/src` are layers: code uses only what lies in its own folder and in folders before it.

use std::fs;
use std::path::{Path, PathBuf};

/// The folders, from the ground up.
const LAYERS: [&str; 10] = [
    "numbers",
    "collections",
    "memory",
    "changes",
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
