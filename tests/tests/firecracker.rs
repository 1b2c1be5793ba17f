//! Clients of Firecracker: unchanged clients by others, and special cases.

#[path = "firecracker/balloon.rs"]
mod balloon;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::Vm;
use fctools::vm::api::VmApi;
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{
    BalloonDevice, BootSource, MachineConfiguration, UpdateBalloonDevice, UpdateBalloonStatistics,
};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::id::VmmId;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{MovedResourceType, ResourceType};
use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::instance::Instance;
use firecracker_rs_sdk::models;
use rustix::process::Signal;
use samepage_client::socket::Client;
use samepage_resources::DEMO_GUEST;
use samepage_resources::demo::plan::{Crash, DiskPlan, Plan};
use samepage_tests::api::Host;
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::harness::{self, Need};
use samepage_tests::program::{self, Running};
use serde_json::{Value, json};
use tempfile::TempDir;
use xtask::artifacts::{Artifacts, COMMAND_LINE};

fn main() -> ExitCode {
    harness::run_all(&[
        ("firecracker_rs_sdk_boots_inspects_and_stops_a_vm", &[Need::Kvm], rs_sdk),
        ("fctools_boots_inspects_and_stops_a_vm", &[Need::Kvm], fctools),
        ("firecracker_python_boots_inspects_and_stops_a_vm", &[Need::Kvm, Need::Python], python),
        ("what_cannot_be_is_a_fault_and_leaves_the_rest", &[Need::Kvm], faults),
        ("a_file_configures_the_vm_and_the_process_ends_with_it", &[Need::Kvm], config_file),
        ("vms_of_one_host_share_and_end_with_their_processes", &[Need::Kvm], hosted),
        ("linux_hears_ctrl_alt_del", &[Need::Kvm, Need::LinuxGuest], linux),
    ])
}

/// Memory of each guest, in MiB.
const MEMORY_MIB: u64 = 64;

/// A folder with the program under Firecracker's name, and a guest.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // Without capitals, because a client takes the path of the socket for the name of a host.
        let name = format!("samepage-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let folder = tempfile::Builder::new().prefix(&name).rand_bytes(0).tempdir().expect("make a folder");
        symlink(program::path(), folder.path().join("firecracker")).expect("link the program");
        fs::write(folder.path().join("demo.elf"), DEMO_GUEST).expect("write the guest");
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns a command of the program under Firecracker's name.
    fn firecracker(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.path("firecracker"));
        command.args(arguments).current_dir(self.folder.path());
        command
    }

    /// Starts the program with a socket, and returns a client once the socket exists.
    fn serve(&self, socket: &str, arguments: &[&str]) -> (Running, Client) {
        let mut command = self.firecracker(&["--api-sock", socket]);
        command.args(arguments);
        let running = Running::start(command);
        (running, self.client(socket))
    }

    fn client(&self, socket: &str) -> Client {
        let client = Client::new(self.path(socket));
        let deadline = Instant::now() + TIME_LIMIT;
        while client.get::<Value>("/").is_err() {
            assert!(Instant::now() < deadline, "nobody answers at {socket}");
            // A new socket causes no event, so poll.
            thread::sleep(Duration::from_millis(10));
        }
        client
    }
}

/// A guest that continues until it is asked to finish.
fn endless(vm: u32) -> Plan {
    Plan { vm, rounds: 0, every_ms: 20, pages: Some(4096), ..Plan::default() }
}

/// Sends a request, and returns status and message.
fn ask(client: &Client, method: &str, path: &str, body: Value) -> (u16, Value) {
    let bytes = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    let answer = client.raw(method.parse().unwrap(), path, bytes);
    let answer = answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
    let said =
        if answer.body.is_empty() { Value::Null } else { serde_json::from_slice(&answer.body).unwrap() };
    (answer.status, said)
}

/// Sends a request that must succeed.
fn done(client: &Client, method: &str, path: &str, body: Value) {
    let answer = ask(client, method, path, body);
    assert_eq!(answer, (204, Value::Null), "{method} {path}");
}

fn configure(client: &Client, plan: &Plan) {
    let source = json!({ "kernel_image_path": "demo.elf", "boot_args": plan.to_string() });
    done(client, "PUT", "/boot-source", source);
    done(client, "PUT", "/machine-config", json!({ "vcpu_count": 2, "mem_size_mib": MEMORY_MIB }));
}

fn act(client: &Client, action: &str) {
    done(client, "PUT", "/actions", json!({ "action_type": action }));
}

fn wait_for_text(file: &Path, text: &str) {
    let deadline = Instant::now() + TIME_LIMIT;
    loop {
        let content = fs::read_to_string(file).unwrap_or_default();
        if content.contains(text) {
            return;
        }
        assert!(Instant::now() < deadline, "{text} did not come; there is:\n{content}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Returns the state of the VM according to the SDK.
fn state(instance: &mut Instance) -> String {
    format!("{:?}", instance.describe_instance().unwrap().state)
}

fn rs_sdk() {
    let place = Place::new();
    fs::write(place.path("disk.img"), vec![0; 1 << 20]).unwrap();
    let mut option = FirecrackerOption::new(place.path("firecracker"));
    fs::write(place.path("log"), "").unwrap();
    option
        .api_sock(place.path("socket"))
        .id("rs-sdk")
        .log_path(Some(place.path("log")))
        .no_seccomp()
        .stdin("/dev/null")
        .stdout(place.path("console"));
    let mut instance = option.build().unwrap();
    instance.start_vmm().unwrap();
    assert_eq!(instance.get_firecracker_version().unwrap().firecracker_version.split('.').count(), 3);
    assert_eq!(state(&mut instance), "NotStarted");
    let machine = models::MachineConfiguration {
        cpu_template: None,
        smt: Some(false),
        mem_size_mib: 64,
        track_dirty_pages: Some(false),
        vcpu_count: 2,
        huge_pages: Some(models::HugePageOption::None),
    };
    instance.put_machine_configuration(&machine).unwrap();
    let machine = models::MachineConfiguration { vcpu_count: 33, ..machine };
    assert!(instance.put_machine_configuration(&machine).is_err());
    assert_eq!(instance.get_machine_configuration().unwrap().vcpu_count, 2);
    instance
        .put_guest_boot_source(&models::BootSource {
            boot_args: Some(endless(0).to_string()),
            initrd_path: None,
            kernel_image_path: place.path("demo.elf"),
        })
        .unwrap();
    instance
        .put_guest_drive_by_id(&models::Drive {
            drive_id: "data".into(),
            partuuid: None,
            is_root_device: false,
            cache_type: Some(models::CacheType::WriteBack),
            is_read_only: false,
            path_on_host: place.path("disk.img"),
            // The package misspells the fields of a rate limiter.
            rate_limiter: None,
            io_engine: Some(models::IoEngine::Sync),
            socket: None,
        })
        .unwrap();
    let network = models::NetworkInterface {
        guest_mac: None,
        host_dev_name: "tap0".into(),
        iface_id: "eth-0".into(),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    };
    assert!(instance.put_guest_network_interface_by_id(&network).is_err());
    instance.start().unwrap();
    wait_for_text(&place.path("console"), "round=2");
    assert_eq!(state(&mut instance), "Running");
    instance.pause().unwrap();
    assert_eq!(state(&mut instance), "Paused");
    instance.resume().unwrap();
    let change = models::PartialDrive { drive_id: "data".into(), path_on_host: None, rate_limiter: None };
    instance.patch_guest_drive_by_id(&change).unwrap();
    let whole = instance.get_export_vm_config().unwrap();
    assert_eq!(whole.boot_source.unwrap().kernel_image_path, place.path("demo.elf"));
    instance.stop().unwrap();
    // The guest verifies all of its memory before it ends.
    wait_for_text(&place.path("console"), "corrupt=0");
    let log = place.path("log");
    wait_for_text(&log, "the process ends with 0");
    assert!(fs::read_to_string(log).unwrap().contains("PUT /actions: 204"));
}

fn fctools() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let place = Place::new();
        let program = place.path("firecracker");
        let mut resources =
            ResourceSystem::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
        let moved = ResourceType::Moved(MovedResourceType::Copied);
        let kernel = resources.create_resource(place.path("demo.elf"), moved).unwrap();
        let data = VmConfigurationData {
            boot_source: BootSource {
                kernel_image: kernel,
                boot_args: Some(endless(0).to_string()),
                initrd: None,
            },
            drives: Vec::new(),
            pmem_devices: Vec::new(),
            machine_configuration: MachineConfiguration {
                vcpu_count: 1,
                mem_size_mib: MEMORY_MIB as usize,
                smt: None,
                track_dirty_pages: None,
                huge_pages: None,
            },
            cpu_template: None,
            network_interfaces: Vec::new(),
            balloon_device: Some(BalloonDevice {
                amount_mib: 2,
                deflate_on_oom: false,
                stats_polling_interval_s: Some(1),
                free_page_reporting: None,
            }),
            vsock_device: None,
            logger_system: None,
            metrics_system: None,
            memory_hotplug_configuration: None,
            mmds_configuration: None,
            entropy_device: None,
        };
        let arguments = VmmArguments::new(VmmApiSocket::Enabled(place.path("socket")));
        let executor = UnrestrictedVmmExecutor::new(arguments).id(VmmId::new("fctools").unwrap());
        let installation = VmmInstallation::new(program.clone(), program.clone(), program);
        let configuration = VmConfiguration::New { init_method: InitMethod::ViaApiCalls, data };
        let mut vm = Vm::prepare(executor, resources, installation, configuration).await.unwrap();
        vm.start(TIME_LIMIT).await.unwrap();
        assert_eq!(vm.get_info().await.unwrap().id, "fctools");
        assert_eq!(vm.get_machine_configuration().await.unwrap().mem_size_mib, MEMORY_MIB as usize);
        vm.pause().await.unwrap();
        assert!(vm.get_info().await.unwrap().is_paused);
        vm.resume().await.unwrap();
        assert!(!vm.get_info().await.unwrap().is_paused);
        vm.flush_metrics().await.unwrap();
        vm.update_balloon_device(UpdateBalloonDevice { amount_mib: 3 }).await.unwrap();
        assert_eq!(vm.get_balloon_device().await.unwrap().amount_mib, 3);
        assert_eq!(vm.get_balloon_statistics().await.unwrap().target_mib, 3);
        let seldom = UpdateBalloonStatistics { stats_polling_interval_s: 60 };
        vm.update_balloon_statistics(seldom).await.unwrap();
        let ask = VmShutdownAction {
            method: VmShutdownMethod::CtrlAltDel,
            timeout: Some(TIME_LIMIT),
            graceful: true,
        };
        let outcome = vm.shutdown([ask]).await.unwrap();
        assert!(outcome.is_fully_graceful(), "{outcome:?}");
        vm.cleanup().await.unwrap();
    });
}

fn python() {
    let place = Place::new();
    let folder = place.path("py");
    fs::create_dir(&folder).unwrap();
    let (vm, _) = place.serve("py/firecracker.socket", &["--id", "py"]);
    fs::write(folder.join("firecracker.pid"), vm.pid().as_raw_nonzero().to_string()).unwrap();
    let environment = xtask::python::find().expect("a cache").expect("the harness has found it");
    let mut script = environment.python();
    script.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/python/drive.py")).arg(place.folder.path());
    script.arg("py").arg(place.path("demo.elf")).arg(endless(0).to_string());
    let script = Running::start(script);
    // For the package, a process has ended only after its parent has waited for it.
    let vm = thread::spawn(|| vm.wait());
    script.wait().assert_code(0);
    vm.join().expect("the VM's process has ended").assert_code(0);
}

fn faults() {
    let place = Place::new();
    let version = Running::start(place.firecracker(&["--version"])).wait();
    version.assert_code(0);
    assert!(version.stdout.starts_with("Firecracker v1."), "{}", version.stdout);
    Running::start(place.firecracker(&["--nothing"])).wait().assert_code(153);
    Running::start(place.firecracker(&["--level", "Loud"])).wait().assert_code(152);
    let refused = Running::start(place.firecracker(&["--metadata", "file"])).wait();
    refused.assert_code(152);
    assert!(refused.stderr.contains("read file"), "{}", refused.stderr);
    assert!(!refused.stderr.contains("Usage"), "{}", refused.stderr);

    let (running, client) = place.serve("socket", &["--id", "a", "--metrics-path", "metrics"]);
    let fault = |method: &str, path: &str, body: Value, part: &str| {
        let (status, said) = ask(&client, method, path, body);
        let message = said["fault_message"].as_str().unwrap_or_default();
        assert!(status == 400 && message.contains(part), "{method} {path}: {status} {said}");
    };
    let start = json!({ "action_type": "InstanceStart" });
    fault("PUT", "/actions", start.clone(), "without kernel");
    fault("PATCH", "/vm", json!({ "state": "Paused" }), "before starting");
    fault("PUT", "/actions", json!({ "action_type": "SendCtrlAltDel" }), "before starting");
    fault("PUT", "/actions", json!({ "action_type": "FlushMetrics" }), "before starting");
    assert_eq!(fs::read_to_string(place.path("metrics")).unwrap(), "");
    fault("PUT", "/actions", json!({ "action_type": "Explode" }), "Explode");
    fault("PUT", "/boot-source", json!({ "kernel_image_path": "none" }), "none cannot be opened");
    fault("PUT", "/boot-source", json!({}), "kernel_image_path");
    fault("PUT", "/boot-source", Value::Null, "Empty PUT");
    let machine = |change: Value| {
        let mut machine = json!({ "vcpu_count": 1, "mem_size_mib": 64 });
        machine.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        machine
    };
    fault("PUT", "/machine-config", machine(json!({ "vcpu_count": 33 })), "vcpu_count");
    fault("PUT", "/machine-config", machine(json!({ "vcpu_count": 0 })), "vcpu_count");
    fault("PUT", "/machine-config", machine(json!({ "vcpu_count": 3, "smt": true })), "whole cores");
    fault("PUT", "/machine-config", machine(json!({ "cpu_template": "T2" })), "CPU templates");
    fault("PUT", "/machine-config", machine(json!({ "huge_pages": "2M" })), "hugetlbfs");
    fault("PUT", "/machine-config", machine(json!({ "mem_size_mib": 0 })), "memory size");
    fault("PUT", "/machine-config", machine(json!({ "mem_size_mib": u64::MAX })), "memory size");
    fault("PUT", "/machine-config", machine(json!({ "colour": "red" })), "colour");
    fault("PATCH", "/machine-config", json!({}), "empty");
    let drive = |change: Value| {
        let mut drive = json!({ "drive_id": "d", "is_root_device": true, "path_on_host": "demo.elf" });
        drive.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        drive
    };
    fault("PUT", "/drives/x", drive(json!({})), "does not match");
    fault("PUT", "/drives/d", drive(json!({ "socket": "s" })), "vhost-user");
    fault("PUT", "/drives/d", drive(json!({ "path_on_host": "none" })), "cannot be opened");
    fault("PUT", "/drives/d", drive(json!({ "path_on_host": null })), "path_on_host");
    fault("PUT", "/drives/a-b", drive(json!({ "drive_id": "a-b" })), "alphanumeric");
    fault("DELETE", "/drives/d", Value::Null, "unplug");
    for missing in ["/snapshot/create", "/snapshot/load", "/cpu-config", "/pmem/p", "/hotplug/memory"] {
        fault("PUT", missing, json!({}), "samepage has no");
    }
    fault("GET", "/balloon", Value::Null, "No balloon device found");
    fault("PUT", "/balloon", json!({ "amount_mib": 1 }), "deflate_on_oom");
    fault("PATCH", "/balloon", json!({ "amount_mib": 1 }), "before starting");
    let mmds = |networks: Value| json!({ "version": "V2", "network_interfaces": networks });
    fault("PUT", "/mmds/config", mmds(json!([])), "is empty");
    fault("PUT", "/mmds/config", mmds(json!(["eth0"])), "does not correspond");
    let elsewhere = json!({ "network_interfaces": ["eth0"], "ipv4_address": "169.254.0.1" });
    fault("PUT", "/mmds/config", elsewhere, "not link local");
    fault("PUT", "/mmds/config", json!({ "version": "V3", "network_interfaces": [] }), "V3");
    fault("PATCH", "/mmds", json!({ "a": 1 }), "not initialized");
    assert_eq!(ask(&client, "GET", "/mmds", Value::Null), (200, Value::Null));
    done(&client, "PUT", "/mmds", json!({ "a": 1, "b": { "c": 2 } }));
    done(&client, "PATCH", "/mmds", json!({ "a": null, "b": { "d": 3 } }));
    assert_eq!(ask(&client, "GET", "/mmds", Value::Null), (200, json!({ "b": { "c": 2, "d": 3 } })));
    let (status, said) = ask(&client, "PATCH", "/mmds", json!({ "e": "x".repeat(51_190) }));
    assert_eq!(status, 413, "{said}");
    fault("GET", "/nothing", Value::Null, "GET /nothing");
    let (status, said) = ask(&client, "PUT", "/logger", json!({ "level": "x".repeat(60_000) }));
    assert_eq!(status, 413, "{said}");

    configure(&client, &endless(0));
    let balloon = json!({ "amount_mib": 1, "deflate_on_oom": true, "free_page_hinting": true });
    done(&client, "PUT", "/balloon", balloon);
    fs::write(place.path("disk.img"), vec![0; 1 << 20]).unwrap();
    let root = json!({ "path_on_host": "disk.img", "is_read_only": true });
    done(&client, "PUT", "/drives/d", drive(root));
    fault("PUT", "/drives/e", drive(json!({ "drive_id": "e" })), "root");
    // Two drives may use one image only for reading, whatever its path.
    symlink("disk.img", place.path("link.img")).unwrap();
    let second = |read_only| {
        drive(
            json!({ "drive_id": "e", "is_root_device": false, "path_on_host": "link.img", "is_read_only": read_only }),
        )
    };
    fault("PUT", "/drives/e", second(false), "link.img is also the image of drive d");
    done(&client, "PUT", "/drives/e", second(true));
    let (status, whole) = ask(&client, "GET", "/vm/config", Value::Null);
    assert_eq!((status, &whole["drives"][0]["drive_id"]), (200, &json!("d")));
    assert_eq!(whole["machine-config"]["mem_size_mib"], MEMORY_MIB);
    act(&client, "InstanceStart");
    running.stdout().wait_for_line("round=1 ");
    fault("PUT", "/actions", start, "after starting");
    fault("PUT", "/machine-config", machine(json!({})), "after starting");
    let change = |change: Value| {
        let mut drive = json!({ "drive_id": "d" });
        drive.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        drive
    };
    fault("PATCH", "/drives/x", json!({ "drive_id": "x" }), "no drive x");
    fault("PATCH", "/drives/d", change(json!({ "path_on_host": "other" })), "exchange");
    // The request with the same path means that the image has another size.
    let image = fs::File::options().write(true).open(place.path("disk.img")).unwrap();
    image.set_len(2 << 20).unwrap();
    done(&client, "PATCH", "/drives/d", change(json!({ "path_on_host": "disk.img" })));
    image.set_len(777).unwrap();
    fault("PATCH", "/drives/d", change(json!({ "path_on_host": "disk.img" })), "its size of 777 bytes");
    let limiter = json!({ "rate_limiter": { "ops": { "size": 100, "refill_time": 1000 } } });
    done(&client, "PATCH", "/drives/d", change(limiter));
    balloon::change(&client, &fault);
    act(&client, "FlushMetrics");
    let metrics: Value = serde_json::from_str(&fs::read_to_string(place.path("metrics")).unwrap()).unwrap();
    assert!(metrics["block_d"]["read_count"].is_u64() && metrics["utc_timestamp_ms"].is_u64(), "{metrics}");
    done(&client, "PATCH", "/vm", json!({ "state": "Paused" }));
    done(&client, "PATCH", "/vm", json!({ "state": "Resumed" }));
    running.signal(Signal::TERM);
    running.wait().assert_code(0);
    assert!(!place.path("socket").exists());
}

/// Writes a configuration file with the demo guest.
fn write_config(place: &Place, plan: &Plan, more: &Value) {
    let mut config = json!({
        "boot-source": { "kernel_image_path": "demo.elf", "boot_args": plan.to_string() },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
        "network-interfaces": [],
        "balloon": null,
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    fs::write(place.path("vm.json"), config.to_string()).unwrap();
}

fn config_file() {
    let place = Place::new();
    let arguments = ["--no-api", "--config-file", "vm.json", "--id", "a"];
    let finished = |plan: &Plan, more: Value| {
        write_config(&place, plan, &more);
        Running::start(place.firecracker(&arguments)).wait()
    };
    let brief = Plan { rounds: 2, every_ms: 0, ..endless(0) };
    let end = finished(&brief, json!({}));
    end.assert_code(0);
    assert!(end.stdout.contains("corrupt=0"), "{}", end.stdout);
    // The serial port goes to a file, and the guest finds its disk.
    fs::write(place.path("disk.img"), vec![0; 1 << 20]).unwrap();
    let disk = DiskPlan::new(samepage_machine::x86::layout::MMIO_START);
    let with_disk = Plan { disk: Some(disk), ..brief.clone() };
    let end = finished(
        &with_disk,
        json!({
            "serial": { "serial_out_path": "console" },
            "drives": [{ "drive_id": "root", "is_root_device": true, "path_on_host": "disk.img" }],
        }),
    );
    end.assert_code(0);
    let console = fs::read_to_string(place.path("console")).unwrap();
    assert!(console.contains("disk") && console.contains("corrupt=0"), "{console}");

    let end = finished(&Plan { crash: Some(Crash::Triple), ..brief.clone() }, json!({}));
    end.assert_code(1);
    assert!(end.stderr.contains("triple fault"), "{}", end.stderr);
    let end = finished(&brief, json!({ "vsock": { "guest_cid": 2, "uds_path": "v" } }));
    end.assert_code(152);
    assert!(end.stderr.contains("vsock: The vsock device is invalid: 2 is no"), "{}", end.stderr);
    let balloon = |mib| json!({ "balloon": { "amount_mib": mib, "deflate_on_oom": true } });
    finished(&brief, balloon(MEMORY_MIB)).assert_code(0);
    let end = finished(&brief, balloon(MEMORY_MIB + 1));
    end.assert_code(152);
    assert!(end.stderr.contains("a balloon of 68157440 bytes"), "{}", end.stderr);
    let end = finished(&brief, json!({ "machine-config": { "vcpu_count": 40, "mem_size_mib": 64 } }));
    end.assert_code(152);
    assert!(end.stderr.contains("machine-config: 40 vCPUs"), "{}", end.stderr);
    fs::write(place.path("vm.json"), "{").unwrap();
    Running::start(place.firecracker(&arguments)).wait().assert_code(152);

    // Standard input is that of the console, as in a shell.
    write_config(&place, &endless(0), &json!({}));
    let mut running = Running::start(place.firecracker(&arguments));
    running.stdout().wait_for_line("round=1 ");
    running.write(b"q");
    running.wait().assert_code(0);
}

fn hosted() {
    let host = Host::serve(&["--sharing-cpu", "100"]);
    let socket = host.socket();
    let place = Place::new();
    let start = |vm: u32| {
        let id = format!("fc-{vm}");
        let (running, client) =
            place.serve(&id, &["--id", &id, "--host", socket.to_str().expect("a path of ASCII")]);
        configure(&client, &endless(vm));
        act(&client, "InstanceStart");
        running.stdout().wait_for_line("round=1 ");
        (running, client)
    };
    let (mut first, first_client) = start(0);
    let (second, second_client) = start(1);
    let (third, _) = start(2);
    // The VMs share memory in their host's process.
    host.wait_for("/sharing", "sharing", |sharing| sharing["statistics"]["pages_sharing"] != 0);
    assert_eq!(host.done("GET", "/vms", None).as_array().unwrap().len(), 3);
    assert_eq!(ask(&first_client, "GET", "/", Value::Null).1["state"], "Running");
    done(&first_client, "PATCH", "/vm", json!({ "state": "Paused" }));
    assert_eq!(ask(&first_client, "GET", "/", Value::Null).1["state"], "Paused");
    assert_eq!(host.done("GET", "/vms/fc-0", None)["state"], "paused");
    done(&first_client, "PATCH", "/vm", json!({ "state": "Resumed" }));

    // A name can be used only once.
    let (other, other_client) = place.serve("other", &["--id", "fc-0", "--host", socket.to_str().unwrap()]);
    configure(&other_client, &endless(0));
    let (status, said) = ask(&other_client, "PUT", "/actions", json!({ "action_type": "InstanceStart" }));
    assert!(status == 400 && said["fault_message"].as_str().unwrap().contains("fc-0"), "{said}");
    other.signal(Signal::TERM);
    other.wait().assert_code(0);

    // Input reaches the guest, and the guest's end ends its process.
    first.write(b"q");
    let end = first.wait();
    end.assert_code(0);
    assert!(end.stdout.contains("corrupt=0"), "{}", end.stdout);
    act(&second_client, "SendCtrlAltDel");
    second.wait().assert_code(0);
    // Killing a process ends its VM.
    third.signal(Signal::KILL);
    let _ = third.wait();
    host.wait_for("/vms", "the end of all VMs", |vms| vms == &json!([]));
    assert_eq!(host.vm_threads(), 0);

    let (fourth, _) = start(3);
    fourth.signal(Signal::TERM);
    fourth.wait().assert_code(0);
    assert_eq!(host.done("GET", "/vms", None), json!([]));
    // The processes notice the host's end. A host with enough time asks its guests to end, and may end before
    // or after them. This host has no time.
    let (fifth, _) = start(4);
    host.running.signal(Signal::KILL);
    fifth.wait().assert_code(1);
    let _ = host.running.wait();
    let nobody = place.firecracker(&["--api-sock", "s", "--host", "/nonexistent/socket"]);
    let nobody = Running::start(nobody).wait();
    nobody.assert_code(1);
    assert!(nobody.stderr.contains("samepage serve"), "{}", nobody.stderr);
}

fn linux() {
    let artifacts = Artifacts::locate().expect("the harness has found them");
    let place = Place::new();
    let (running, client) = place.serve("socket", &["--id", "linux"]);
    let source = json!({
        "kernel_image_path": artifacts.kernel,
        "initrd_path": artifacts.initramfs,
        "boot_args": format!("{COMMAND_LINE} agent=idle"),
    });
    done(&client, "PUT", "/boot-source", source);
    done(&client, "PUT", "/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB }));
    act(&client, "InstanceStart");
    running.stdout().wait_for_line("samepage-agent: idle");
    act(&client, "SendCtrlAltDel");
    let end = running.wait();
    end.assert_code(0);
    assert!(end.stdout.contains("reboot: Restarting system"), "{}", end.stdout);
}
