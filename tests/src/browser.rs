//! A browser without a window: returns a page's state after some time.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use crate::program::Running;

/// The reason for skipping a test without a browser.
pub const MISSING: &str = "needs Chromium (Debian's package chromium)";

/// Returns the browser's program, if there is one.
pub fn program() -> Option<&'static Path> {
    static PROGRAM: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
        let folders = env::var_os("PATH").unwrap_or_default();
        let places = env::split_paths(&folders).flat_map(|folder| {
            ["chromium", "chromium-browser", "google-chrome"].map(|name| folder.join(name))
        });
        places.into_iter().find(|place| place.is_file())
    });
    PROGRAM.as_deref()
}

/// Returns the width of a page in a file on a screen of this width in pixels, scrolled or not, and its
/// elements.
///
/// # Panics
/// Panics if there is no browser, or if it does not end.
#[must_use]
pub fn width_on(file: &Path, pixels: u32) -> (u32, String) {
    // A window cannot be as narrow as a phone, but a frame in it can.
    let folder = tempfile::tempdir().expect("make a folder");
    let wrapper = folder.path().join("wrapper.html");
    let html = format!(
        "<!DOCTYPE html><body><iframe id=\"page\" src=\"file://{}\" style=\"width:{pixels}px;height:4000px;border:0\">\
         </iframe><script>page.onload = () => {{ const all = page.contentDocument.documentElement; \
         document.body.dataset.width = all.scrollWidth; document.body.append(all.outerHTML); }};</script>",
        file.display()
    );
    std::fs::write(&wrapper, html).expect("write a page");
    let page = page_after(&format!("file://{}", wrapper.display()), 3000);
    let (_, width) = page.split_once("data-width=\"").unwrap_or_else(|| panic!("no width:\n{page}"));
    let width = width.split('"').next().and_then(|width| width.parse().ok());
    (width.expect("a number"), page)
}

/// Opens a page, and returns its elements as text after this time in milliseconds. The time is virtual: it
/// passes at once while nothing happens.
///
/// # Panics
/// Panics if there is no browser, or if it does not end.
#[must_use]
pub fn page_after(url: &str, milliseconds: u32) -> String {
    let profile = tempfile::tempdir().expect("make a folder");
    let mut browser = Command::new(program().expect(MISSING));
    browser
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args(["--disable-dev-shm-usage", "--window-size=1280,2000", "--dump-dom"])
        .arg("--allow-file-access-from-files")
        .arg(format!("--virtual-time-budget={milliseconds}"))
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(url);
    let finished = Running::start(browser).wait();
    finished.assert_code(0);
    finished.stdout
}
