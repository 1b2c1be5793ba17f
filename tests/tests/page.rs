//! The web page and the report in a browser without a window, and the access to the port.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::ExitCode;

use samepage_resources::demo::plan::Plan;
use samepage_tests::api::{Host, MEMORY};
use samepage_tests::browser::{page_after, width_on};
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::harness::{self, Need};
use samepage_tests::program::{Running, command};
use serde_json::{Value, json};

fn main() -> ExitCode {
    harness::run_all(&[
        ("the_page_shows_what_vms_share", &[Need::Kvm, Need::Browser], page),
        ("a_port_lets_in_who_may", &[Need::Kvm], port),
        ("a_run_is_reported_in_one_file", &[Need::Kvm], report),
        ("a_report_fits_on_a_phone_and_its_axis_is_as_long_as_the_run", &[Need::Kvm, Need::Browser], phone),
    ])
}

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// A guest that continues until it is asked to finish.
fn endless(vm: u32) -> Plan {
    Plan { vm, rounds: 0, every_ms: 20, pages: Some(4096), ..Plan::default() }
}

/// Starts a process with a port for browsers, and returns its address.
fn serve(more: &[&str]) -> (Host, String) {
    let host = Host::serve(&[&["--sharing-cpu", "100", "--http", "127.0.0.1:0"], more].concat());
    let line = host.running.stderr().wait_for_line("the web page is http://");
    let address = line.rsplit_once("http://").unwrap().1.trim_end_matches('/').to_owned();
    (host, address)
}

/// Starts two VMs that share memory.
fn start_two(host: &Host) {
    for (vm, name) in (0..).zip(["first-vm", "second-vm"]) {
        host.done("POST", "/vms", Some(&host.vm(name, &endless(vm), true)));
    }
    host.wait_for("/sharing/pairs", "two VMs that share", |pairs| pairs[0]["pages"].as_u64() > Some(0));
}

/// Asserts that the page shows the two VMs and their shared memory.
fn assert_shown(page: &str) {
    let (_, body) = page.split_once("<body").expect("a body");
    let (body, _) = body.split_once("<script").expect("scripts at the end");
    assert!(body.contains("data-ready=\"true\""), "{body}");
    for part in [
        ">first-vm</span></b>",
        ">second-vm</span></b>",
        ">Saved by sharing<",
        "MiB",
        "<canvas",
        "<path",
        "class=\"meter\"",
    ] {
        assert!(body.contains(part), "{part} is missing:\n{body}");
    }
    assert!(!body.contains("[object") && !body.contains("NaN") && !body.contains("undefined"), "{body}");
}

/// Returns the description of the map of a VM's memory. It is missing if the map is not drawn.
fn map_of<'a>(page: &'a str, vm: &str) -> &'a str {
    let begin = format!("aria-label=\"Memory of {vm}: ");
    let (before, words) = page.split_once(&begin).unwrap_or_else(|| panic!("no map of {vm}:\n{page}"));
    let (_, tag) = before.rsplit_once('<').unwrap();
    let (words, rest) = words.split_once('"').unwrap();
    let (rest, _) = rest.split_once('>').unwrap();
    // 4096 cells, in rows of 128.
    assert!(format!("{tag}{rest}").contains("width=\"128\""), "{tag}{words}{rest}");
    words
}

fn page() {
    let token = tempfile::NamedTempFile::new().unwrap();
    fs::set_permissions(token.path(), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(token.path(), TOKEN).unwrap();
    let (host, address) = serve(&["--http-token", &token.path().display().to_string()]);
    start_two(&host);
    let page = page_after(&format!("http://{address}/#token={TOKEN}"), 4000);
    assert_shown(&page);
    // With the token, a user can control VMs.
    assert_eq!(page.matches(">Pause</button>").count(), 2, "{page}");
    assert!(page.contains("class=\"status live\""), "{page}");
    for vm in ["first-vm", "second-vm"] {
        let map = map_of(&page, vm);
        assert!(map.contains(" % shared") && map.contains(" % private"), "{map}");
        assert!(!map.contains("NaN"), "{map}");
    }
    let page = page_after(&format!("http://{address}/"), 4000);
    assert!(page.contains("<dialog id=\"ask\" open") && !page.contains("first-vm"), "{page}");
    host.end().assert_code(0);
}

/// Returns status and body of the response to a request with these lines.
fn ask(address: &str, lines: &[&str], body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIME_LIMIT)).unwrap();
    let head = lines.join("\r\n");
    let request = format!("{head}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("{answer}")), answer)
}

fn port() {
    let (host, address) = serve(&[]);
    host.done("POST", "/vms", Some(&host.vm("a", &endless(0), true)));
    let own = format!("Host: {address}");
    let (status, page) = ask(&address, &["GET / HTTP/1.1", &own], "");
    assert_eq!(status, 200);
    assert!(page.contains("content-security-policy: default-src 'none'"), "{page}");
    let (status, vms) = ask(&address, &["GET /vms HTTP/1.1", &own], "");
    assert!(status == 200 && vms.contains("\"name\":\"a\"") && vms.contains("nosniff"), "{vms}");
    // Watching is allowed, and nothing else.
    let kill = json!({ "action": "kill" }).to_string();
    let post = ["POST /vms/a/actions HTTP/1.1", &own, "Content-Type: application/json"];
    let (status, refused) = ask(&address, &post, &kill);
    assert!(status == 403 && refused.contains("urn:samepage:problem:forbidden"), "{refused}");
    assert_eq!(ask(&address, &["DELETE /vms/a HTTP/1.1", &own], "").0, 403);
    assert_eq!(ask(&address, &["GET /vms/a/console HTTP/1.1", &own], "").0, 403);
    // Names that DNS can resolve to this address, and pages of other origins.
    assert_eq!(ask(&address, &["GET /vms HTTP/1.1", "Host: evil.example"], "").0, 403);
    assert_eq!(ask(&address, &["GET /vms HTTP/1.1", &own, "Origin: http://evil.example"], "").0, 403);
    assert_eq!(ask(&address, &["GET /nothing HTTP/1.1", &own], "").0, 404);
    assert_eq!(host.done("GET", "/vms/a", None)["state"], "running");
    host.end().assert_code(0);

    let refused = |arguments: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let mut serve = command(["serve", "--socket", "socket"]);
        serve.args(arguments).current_dir(folder.path());
        let finished = Running::start(serve).wait();
        finished.assert_code(1);
        finished.stderr
    };
    assert!(refused(&["--http", "0.0.0.0:0"]).contains("--http-token"));
    assert!(refused(&["--http", "127.0.0.1:0", "--http-token", "/nonexistent"]).contains("read the token"));
}

/// Asserts that a file is complete and needs no other files.
fn assert_alone(file: &Path) {
    let text = fs::read_to_string(file).unwrap();
    assert!(text.starts_with("<!DOCTYPE html>") && text.trim_end().ends_with("</html>"));
    assert!(!text.contains("src=\"") && !text.contains("<link"), "{}", file.display());
    let (_, data) = text.split_once("id=\"data\">").unwrap();
    let data: Value = serde_json::from_str(data.split_once("</script>").unwrap().0).unwrap();
    let vms = data["state"]["vms"].as_array().unwrap();
    assert_eq!(vms.len(), 2, "{vms:?}");
    assert!(vms.iter().all(|vm| vm["resident"].as_u64() > Some(0) && vm["memory"] == MEMORY), "{vms:?}");
    assert!(data["state"]["pairs"][0]["pages"].as_u64() > Some(0), "{}", data["state"]);
    assert!(!data["frames"].as_array().unwrap().is_empty());
    let maps = data["maps"].as_object().unwrap();
    if file.file_name().unwrap() == "live.html" {
        assert_eq!(maps.len(), 2);
        assert!(maps.values().all(|map| map["cells"].as_array().unwrap().len() == 2048), "{maps:?}");
    } else {
        assert!(maps.is_empty());
    }
    if samepage_tests::browser::program().is_some() {
        let page = page_after(&format!("file://{}", file.display()), 1000);
        assert_shown(&page);
    }
}

fn phone() {
    let host = Host::serve(&["--sharing-cpu", "100"]);
    // The names differ in the part that a narrow screen cuts off.
    let name = |vm: u32| format!("production-eu-central-database-primary-node-{vm}-blue");
    for vm in 0..3 {
        host.done("POST", "/vms", Some(&host.vm(&name(vm), &endless(vm), true)));
    }
    host.wait_for("/sharing/pairs", "VMs that share", |pairs| pairs[0]["pages"].as_u64() > Some(0));
    let file = host.folder.path().join("report.html");
    let mut report = command(["report", "--seconds", "5", "--output"]);
    report.arg(&file).env("SAMEPAGE_SOCKET", host.socket());
    Running::start(report).wait().assert_code(0);
    for pixels in [320, 375, 800] {
        let (width, page) = width_on(&file, pixels);
        assert!(width <= pixels, "the report is {width} pixels wide on a screen of {pixels}");
        // The ticks of the axes, in seconds: as far as the samples reach, and not beyond the time of
        // observation.
        let texts =
            page.split("&lt;/text&gt;").filter_map(|text| text.rsplit_once("&gt;")?.1.strip_suffix(" s"));
        let marks: Vec<u32> = texts.filter_map(|text| text.parse().ok()).collect();
        let last = marks.iter().max().unwrap_or_else(|| panic!("no marks:\n{page}"));
        assert!((1..=6).contains(last), "{marks:?}");
        for vm in 0..3 {
            // The part of a name that is never cut off.
            let end = format!("-node-{vm}-blue&lt;/span&gt;");
            assert!(page.contains(&end), "{end} is missing:\n{page}");
        }
    }
    host.end().assert_code(0);
}

fn report() {
    let folder = tempfile::tempdir().unwrap();
    let stats = folder.path().join("stats.jsonl");
    let host = Host::serve(&["--sharing-cpu", "100", "--stats", &stats.display().to_string()]);
    start_two(&host);
    let write = |arguments: &[&str], name: &str| {
        let file = folder.path().join(name);
        let mut report = command(["report", "--output"]);
        report.arg(&file).args(arguments).env("SAMEPAGE_SOCKET", host.socket());
        Running::start(report).wait().assert_code(0);
        file
    };
    assert_alone(&write(&["--seconds", "2"], "live.html"));
    // The file gets a line each second. The last lines have the two VMs.
    assert_alone(&write(&["--stats", &stats.display().to_string()], "stats.html"));
    host.end().assert_code(0);
    fs::write(&stats, "no statistics\n").unwrap();
    let mut wrong = command(["report", "--output", "x.html", "--stats"]);
    wrong.arg(&stats).current_dir(folder.path());
    let finished = Running::start(wrong).wait();
    finished.assert_code(1);
    assert!(finished.stderr.contains("line 1 was not written by --stats"), "{}", finished.stderr);
    assert!(!folder.path().join("x.html").exists());
}
