//! Checks that the documents name only existing files, folders and headings.

use std::fs;
use std::path::{Path, PathBuf};

use xtask::project_root;

/// Returns all documents of the project.
fn documents() -> Vec<PathBuf> {
    let root = project_root();
    let folders = [root.clone(), root.join("docs"), root.join("docs/decisions")];
    let files = folders.iter().flat_map(|folder| fs::read_dir(folder).expect("a folder of documents"));
    let paths = files.map(|file| file.expect("an entry of a folder").path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("reading {}: {error}", path.display()))
}

/// Returns the targets of links: the texts between `](` and `)`.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target)
}

/// Returns the words in code style that name a file or folder below one of the folders with code.
fn paths(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().filter(|line| !line.starts_with("    "));
    let words = lines.flat_map(|line| line.split('`').skip(1).step_by(2));
    words.filter(|word| {
        let folders = [
            "bench/",
            "devices/",
            "docs/",
            "guest-agent/",
            "memory-hole/",
            "resources/",
            "sharing/",
            "tests/",
        ];
        let starts = folders.iter().chain(&["vmm/", "xtask/", ".github/", ".ci/"]);
        starts.clone().any(|start| word.starts_with(start)) && !word.contains([' ', '*', '{'])
    })
}

/// Returns the name that links use for a heading.
fn anchor(heading: &str) -> String {
    let letters = heading.trim_start_matches('#').trim().to_lowercase();
    let letters =
        letters.chars().filter(|letter| letter.is_alphanumeric() || matches!(letter, ' ' | '-' | '_'));
    letters.map(|letter| if letter == ' ' { '-' } else { letter }).collect()
}

#[test]
fn links_lead_to_files_and_headings_that_exist() {
    let mut wrong = Vec::new();
    let mut checked = 0;
    for document in documents() {
        let text = read(&document);
        for target in links(&text).filter(|target| !target.contains("://")) {
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let folder = document.parent().expect("a document is in a folder");
            let path = if file.is_empty() { document.clone() } else { folder.join(file) };
            let exists = path.exists()
                && (heading.is_empty()
                    || read(&path).lines().any(|line| line.starts_with('#') && anchor(line) == heading));
            if !exists {
                wrong.push(format!("{}: {target}", document.display()));
            }
            checked += 1;
        }
    }
    assert!(wrong.is_empty(), "links that lead nowhere:\n{}", wrong.join("\n"));
    assert!(checked > 50, "only {checked} links were found");
}

#[test]
fn files_that_are_named_exist() {
    let root = project_root();
    let mut wrong = Vec::new();
    let mut checked = 0;
    for document in documents() {
        for path in paths(&read(&document)) {
            if !root.join(path).exists() {
                wrong.push(format!("{}: {path}", document.display()));
            }
            checked += 1;
        }
    }
    assert!(wrong.is_empty(), "files that do not exist:\n{}", wrong.join("\n"));
    assert!(checked > 80, "only {checked} files are named");
}

#[test]
fn anchors_are_those_of_hosted_documents() {
    assert_eq!(
        anchor("## What groups can tell from each other's cache"),
        "what-groups-can-tell-from-each-others-cache"
    );
    assert_eq!(anchor("# A `--stats` file"), "a---stats-file");
}
