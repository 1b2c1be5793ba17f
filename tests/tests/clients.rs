//! Uses of the API's description and metrics by other programs: generated clients in two languages, and
//! Prometheus' checker.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::process::{Command, ExitCode, Stdio};

use samepage_resources::demo::plan::Plan;
use samepage_tests::api::Host;
use samepage_tests::harness::{self, Need};
use samepage_tests::program::{Finished, Running};
use tempfile::TempDir;

fn main() -> ExitCode {
    harness::run_all(&[
        ("a_client_in_python_is_generated_and_its_types_are_right", &[Need::Python], python),
        ("a_client_in_typescript_is_generated_and_compiles", &[Need::Node], typescript),
        ("promtool_is_content_with_the_metrics", &[Need::Kvm, Need::Promtool], metrics),
    ])
}

/// Returns a folder with the description of the API.
fn described() -> TempDir {
    let folder = tempfile::tempdir().expect("make a folder");
    let description = samepage_api::openapi().to_json().expect("the description is JSON");
    fs::write(folder.path().join("openapi.json"), description).expect("write the description");
    folder
}

fn done(folder: &TempDir, mut command: Command) -> Finished {
    command.current_dir(folder.path());
    let finished = Running::start(command).wait();
    finished.assert_code(0);
    finished
}

/// A program that uses the client.
const PYTHON: &str = "\
from client import AuthenticatedClient
from client.api.vms import act_on_vm, create_vm, list_vms
from client.models import Action, ActionRequest, Problem, VmSpec


def names(token: str) -> list[str]:
    client = AuthenticatedClient(base_url='http://127.0.0.1:8080', token=token)
    create_vm.sync(client=client, body=VmSpec(name='web', kernel='/srv/vmlinux', memory='512M'))
    act_on_vm.sync('web', client=client, body=ActionRequest(action=Action.START))
    vms = list_vms.sync(client=client)
    if vms is None or isinstance(vms, Problem):
        return []
    return [vm.name for vm in vms]
";

fn python() {
    let folder = described();
    let environment = xtask::python::find().expect("a cache").expect("the harness has found it");
    // Formatting does not matter here, and the generator does not know OpenMetrics.
    let options = "post_hooks: []\ncontent_type_overrides:\n  application/openmetrics-text: text/plain\n";
    fs::write(folder.path().join("options.yaml"), options).expect("write options");
    let mut generate = environment.program("openapi-python-client");
    generate.args(["generate", "--path", "openapi.json", "--output-path", "client", "--meta", "none"]);
    generate.args(["--config", "options.yaml"]);
    let generated = done(&folder, generate);
    let said = format!("{}{}", generated.stdout, generated.stderr);
    // The generator omits what it does not understand.
    assert!(!said.to_lowercase().contains("warning") && !said.contains("Unable"), "{said}");
    fs::write(folder.path().join("use.py"), PYTHON).expect("write a program");
    let mut check = environment.python();
    check.args(["-m", "mypy", "--strict", "--no-incremental", "client", "use.py"]);
    done(&folder, check);
    let mut import = environment.python();
    import.args(["-c", "import use"]);
    done(&folder, import);
}

/// The same program in another language.
const TYPESCRIPT: &str = "\
import createClient from 'openapi-fetch';
import type { components, paths } from './client';

type Vm = components['schemas']['VmSummary'];

export async function vms(token: string): Promise<Vm[]> {
  const headers = { Authorization: `Bearer ${token}` };
  const client = createClient<paths>({ baseUrl: 'http://127.0.0.1:8080', headers });
  await client.POST('/vms', { body: { name: 'web', kernel: '/srv/vmlinux', memory: '512M' } });
  await client.POST('/vms/{vm}/actions', { params: { path: { vm: 'web' } }, body: { action: 'start' } });
  const { data, error } = await client.GET('/vms');
  if (error) throw new Error(error.detail);
  return data;
}
";

fn typescript() {
    let folder = described();
    let modules = xtask::node::find().expect("a cache").expect("the harness has found it");
    symlink(modules.folder(), folder.path().join("node_modules")).expect("link the packages");
    fs::write(folder.path().join("package.json"), "{\"type\": \"module\"}").expect("write a package");
    let mut generate = modules.program("openapi-typescript/bin/cli.js");
    // Fields with a default are optional.
    generate.args(["openapi.json", "--default-non-nullable=false", "--output", "client.ts"]);
    done(&folder, generate);
    fs::write(folder.path().join("use.ts"), TYPESCRIPT.replace("'./client'", "'./client.js'"))
        .expect("write a program");
    let mut compile = modules.program("typescript/bin/tsc");
    compile.args([
        "--strict",
        "--target",
        "es2022",
        "--module",
        "nodenext",
        "--outDir",
        "out",
        "use.ts",
        "client.ts",
    ]);
    done(&folder, compile);
    assert!(
        fs::read_to_string(folder.path().join("out/use.js"))
            .expect("a program")
            .contains("/vms/{vm}/actions")
    );
}

fn metrics() {
    let host = Host::serve(&["--sharing-cpu", "100"]);
    let plan = Plan { rounds: 0, every_ms: 20, pages: Some(1024), ..Plan::default() };
    let mut body = host.vm("a", &plan, true);
    let disk = host.folder.path().join("disk");
    fs::write(&disk, vec![0; 1 << 20]).expect("write an image");
    body["disks"] = serde_json::json!([{ "path": disk }]);
    host.done("POST", "/vms", Some(&body));
    host.wait_for("/sharing", "frames", |sharing| sharing["statistics"]["pages_scanned"] != 0);
    let text = prometheus(&host);
    assert!(text.contains("samepage_vm_disk_read") || text.contains("samepage_disk_read"), "{text}");

    let mut check = Command::new(xtask::promtool::find().expect("the harness has found it"));
    check.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut check = check.spawn().expect("start promtool");
    let mut stdin = check.stdin.take().expect("a pipe");
    stdin.write_all(text.as_bytes()).expect("pass the metrics on");
    drop(stdin);
    let checked = check.wait_with_output().expect("wait for promtool");
    let said = [checked.stdout, checked.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(checked.status.success() && said.trim().is_empty(), "{}: {said}\n{text}", checked.status);
    host.end().assert_code(0);
}

/// Returns the metrics in Prometheus' own format.
fn prometheus(host: &Host) -> String {
    let request = "GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: text/plain\r\nConnection: close\r\n\r\n";
    let answer = host.raw(request.as_bytes(), false);
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/plain"), "{head}");
    body.to_owned()
}
