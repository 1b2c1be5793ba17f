//! The page that shows VMs and their shared memory, live in a browser or as a report in one file.
//!
//! The page is plain HTML, CSS and JavaScript, embedded without changes. `format.js` formats numbers and
//! makes elements, `charts.js` draws, `page.js` shows frames (the state at one moment), and `live.js` gets
//! frames from the API.

use std::fmt::Write;

use serde::Serialize;

/// A file for browsers.
#[derive(Debug)]
pub struct Asset {
    /// The path on the server.
    pub path: &'static str,
    /// The media type.
    pub media_type: &'static str,
    /// The text.
    pub content: &'static str,
    /// Whether this is the page itself, which other pages may link to.
    pub is_page: bool,
}

const PAGE: &str = include_str!("index.html");
const STYLE: &str = include_str!("style.css");
const FORMAT: &str = include_str!("format.js");
const CHARTS: &str = include_str!("charts.js");
const SHOW: &str = include_str!("page.js");
const LIVE: &str = include_str!("live.js");
const ICON: &str = include_str!("icon.svg");

const SCRIPT_TYPE: &str = "text/javascript; charset=utf-8";

static ASSETS: [Asset; 7] = [
    Asset { path: "/", media_type: "text/html; charset=utf-8", content: PAGE, is_page: true },
    part("/style.css", "text/css; charset=utf-8", STYLE),
    part("/format.js", SCRIPT_TYPE, FORMAT),
    part("/charts.js", SCRIPT_TYPE, CHARTS),
    part("/page.js", SCRIPT_TYPE, SHOW),
    part("/live.js", SCRIPT_TYPE, LIVE),
    part("/icon.svg", "image/svg+xml", ICON),
];

const fn part(path: &'static str, media_type: &'static str, content: &'static str) -> Asset {
    Asset { path, media_type, content, is_page: false }
}

/// Returns the file at a path, if there is one.
#[must_use]
pub fn asset(path: &str) -> Option<&'static Asset> {
    ASSETS.iter().find(|asset| asset.path == path)
}

/// Returns the page with `data` as a single file that needs no other files.
///
/// # Errors
/// Fails if the data cannot be serialised as JSON.
pub fn alone(title: &str, data: &impl Serialize) -> serde_json::Result<String> {
    // The data cannot end the element that contains it.
    let data = serde_json::to_string(data)?.replace('<', "\\u003c");
    let mut scripts = String::new();
    for script in [FORMAT, CHARTS, SHOW] {
        // Writing to a string does not fail.
        let _ = writeln!(scripts, "<script>\n{script}</script>");
    }
    let head = format!(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; \
         style-src 'unsafe-inline'; img-src data:\">\n<title>{}</title>\n<style>\n{STYLE}</style>",
        escape(title)
    );
    let (before, rest) = PAGE.split_once("<!-- head -->").unwrap_or((PAGE, ""));
    let (_, rest) = rest.split_once("<!-- /head -->").unwrap_or(("", rest));
    let (body, rest) = rest.split_once("<!-- scripts -->").unwrap_or((rest, ""));
    let (_, after) = rest.split_once("<!-- /scripts -->").unwrap_or(("", rest));
    Ok(format!(
        "{before}{head}{body}<script type=\"application/json\" id=\"data\">{data}</script>\n{scripts}{after}"
    ))
}

/// Returns text escaped for HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_of_pages_have_the_names_that_they_have_elsewhere() {
        for page_type in samepage_hole::PageType::ALL {
            assert!(SHOW.contains(&format!("{}: ", page_type.name())), "{page_type:?} has no colour");
        }
        assert!(!SHOW.contains("page cache"));
        let docs = [include_str!("../../../docs/api.md"), include_str!("../../../docs/memory-hole.md")];
        for page_type in samepage_hole::PageType::ALL {
            assert!(
                docs.iter().all(|text| text.contains(&format!("`{}`", page_type.name()))),
                "{page_type:?}"
            );
        }
    }

    #[test]
    fn the_page_asks_for_what_there_is_and_nothing_else() {
        let parts = PAGE.split(['"', '\'']).filter(|part| part.ends_with(".js") || part.ends_with(".css"));
        let parts: Vec<_> = parts.collect();
        assert_eq!(parts.len(), 5, "{parts:?}");
        assert!(parts.iter().all(|part| asset(&format!("/{part}")).is_some()), "{parts:?}");
        for asset in &ASSETS {
            let foreign = asset.content.replace("http://www.w3.org/2000/svg", "");
            assert!(!foreign.contains("http://") && !foreign.contains("https://"), "{}", asset.path);
        }
    }

    #[test]
    fn a_file_alone_needs_nothing_and_its_data_cannot_break_it() {
        let page = alone("a & <b>", &"</script><script>alert(1)</script><!--").unwrap();
        assert!(page.contains("<title>a &amp; &lt;b></title>"), "{page}");
        assert!(!page.contains("alert(1)</script>") && page.contains("\\u003c/script>"));
        assert!(!page.contains("src=\"") && !page.contains("href=\"style"), "{page}");
        assert_eq!(page.matches("<script").count(), 4);
        assert!(page.trim_end().ends_with("</html>"));
    }
}
