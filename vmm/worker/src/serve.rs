//! A worker: a process that holds VMs for another one, which manages them.
//!
//! One thread receives requests. What may take time has a thread of its own for each request. Another thread watches
//! the VMs' ends and consoles. The process ends with the connection, and its VMs with it.

mod outbox;
mod watch;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;
use samepage_machine::config::{ConsoleConfig, Elsewhere, VmConfig};
use samepage_machine::hypervisor::Hypervisor;
use samepage_machine::vm::Vm;
use samepage_sharing::pagemap::Pagemap;
use samepage_sharing::remote::serve::{Server, Vms};

use crate::machine::{DeviceError, Machine};
use crate::messages::{Answer, Build, GroupNumber, Order, Request, Target, Told, VmNumber};
use crate::report::DeviceReport;
use crate::wire;
use outbox::{ConsoleCopy, Outbox};
use watch::Watch;

/// Stack of a thread that carries out a request, in bytes.
const STACK_BYTES: usize = 256 << 10;

/// What all threads of a worker have in common.
struct Worker {
    hypervisor: Hypervisor,
    pagemap: Pagemap,
    outbox: Arc<Outbox>,
    watch: Watch,
    groups: Mutex<HashMap<GroupNumber, Arc<Vms>>>,
    vms: Mutex<HashMap<VmNumber, Arc<Vm>>>,
}

/// Holds VMs until the managing process is gone, which is at the other end of standard input.
///
/// # Errors
/// Fails if the host lacks KVM, or if standard input is no connection.
pub fn main() -> io::Result<()> {
    // Whoever looks for the user of a file sees this name. Without it, another name is no harm.
    let _ = rustix::thread::set_name(c"samepage");
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let (sender, mut receiver) = wire::split(socket)?;
    let outbox = Outbox::start(sender)?;
    let worker = Arc::new(Worker {
        hypervisor: Hypervisor::open().map_err(io::Error::other)?,
        pagemap: Pagemap::open()?,
        watch: Watch::start(&outbox)?,
        outbox,
        groups: Mutex::default(),
        vms: Mutex::default(),
    });
    loop {
        let (request, with) = match receiver.receive::<Request>() {
            Ok(received) => received,
            // The managing process is gone.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        };
        worker.take(request, with);
    }
}

impl Worker {
    fn take(self: &Arc<Self>, request: Request, with: Option<OwnedFd>) {
        let is_quick = matches!(
            request.order,
            Order::Start | Order::Stop | Order::Fail(_) | Order::Look | Order::HoleNews
        );
        if is_quick {
            return self.carry_out(request, with);
        }
        let (worker, number) = (Arc::clone(self), request.number);
        let spawned = thread::Builder::new()
            .name("request".into())
            .stack_size(STACK_BYTES)
            .spawn(move || worker.carry_out(request, with));
        if let Err(error) = spawned {
            let text =
                format!("start a thread: {error}; raise the limits on processes (ulimit -u, pids.max)");
            self.outbox.send(&Told::Reply { number, answer: Answer::Failed(text) });
        }
    }

    fn carry_out(&self, request: Request, with: Option<OwnedFd>) {
        let Request { number, vm, order } = request;
        let (answer, hole) = match order {
            Order::Build(build) => self.build(vm, *build),
            order => self.answer(vm, order, with).map(|answer| (answer, None)),
        }
        .unwrap_or_else(|reason| (Answer::Failed(reason), None));
        let hole = hole.as_ref().map(|hole| hole.as_fd());
        self.outbox.send_with(&Told::Reply { number, answer }, hole);
    }

    fn answer(&self, number: VmNumber, order: Order, with: Option<OwnedFd>) -> Result<Answer, String> {
        match order {
            Order::Connect(group) => return self.connect(group, with),
            Order::Free => {
                let vm = self.vms.lock().remove(&number);
                if let Some(vm) = vm {
                    self.watch.forget(number, &vm);
                    // A request that looks at it ends soon.
                    drop(vm);
                }
                self.outbox.close(number);
                return Ok(Answer::Done);
            }
            _ => {}
        }
        let vm = self.vms.lock().get(&number).cloned().ok_or("the worker has no such VM")?;
        Ok(match order {
            // Carried out above.
            Order::Connect(_) | Order::Build(_) | Order::Free => Answer::Done,
            Order::HoleNews => {
                vm.tell_hole_news();
                Answer::Done
            }
            Order::Start => {
                vm.start();
                Answer::Done
            }
            Order::Pause => {
                vm.pause();
                Answer::Done
            }
            Order::Stop => {
                vm.handle().request_stop();
                Answer::Done
            }
            Order::Fail(reason) => {
                vm.fail(reason);
                Answer::Done
            }
            Order::PressCtrlAltDel => Answer::Truth(vm.press_ctrl_alt_del()),
            Order::AskToEnd => Answer::Truth(vm.ask_to_end()),
            Order::AskAgain => {
                vm.ask_again();
                Answer::Done
            }
            Order::ReopenConsole => {
                vm.reopen_console().map_err(|error| error.to_string())?;
                Answer::Done
            }
            Order::Type(bytes) => Answer::Taken(vm.serial_input(&bytes)),
            Order::Look => Answer::Looked {
                cpu_nanoseconds: u64::try_from(vm.cpu_time().as_nanos()).unwrap_or(u64::MAX),
                devices: DeviceReport::of(&vm),
            },
            Order::Change { id, change } => match vm.change_device(&id, change) {
                Ok(()) => Answer::Done,
                Err(DeviceError::Missing) => Answer::NoDevice,
                Err(DeviceError::Refused(reason)) => Answer::Failed(reason),
            },
            Order::Touched => {
                let runs =
                    vm.touched(&self.pagemap).map_err(|error| format!("read the page map: {error}"))?;
                Answer::Runs(runs.into_iter().map(|run| (run.start, run.end)).collect())
            }
        })
    }

    /// Answers the engine of a group from now on.
    fn connect(&self, group: GroupNumber, with: Option<OwnedFd>) -> Result<Answer, String> {
        let socket = with.ok_or("no connection came with the request")?;
        let server = Server::accept(socket).map_err(|error| error.to_string())?;
        self.groups.lock().insert(group, server.vms());
        thread::Builder::new()
            .name("engine".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if let Err(error) = server.run() {
                    samepage_process::tell::tell(format_args!(
                        "the sharing engine asked senselessly: {error}"
                    ));
                }
            })
            .map_err(|error| format!("start a thread: {error}"))?;
        Ok(Answer::Done)
    }

    /// Returns the file of the machine's memory hole as well.
    fn build(&self, number: VmNumber, build: Build) -> Result<(Answer, Option<Arc<OwnedFd>>), String> {
        let Build { spec, console, group } = build;
        let vms = match group {
            Some(group) => Some(self.groups.lock().get(&group).cloned().ok_or("the group is not connected")?),
            None => None,
        };
        let target = match console {
            Target::Nowhere => ConsoleConfig::Off,
            Target::Stdio => ConsoleConfig::Stdio,
            Target::PrefixedStdio => ConsoleConfig::PrefixedStdio,
            Target::File(path) => ConsoleConfig::File(path),
        };
        let copy = Box::new(ConsoleCopy::new(&self.outbox, number));
        let console = ConsoleConfig::Copied { to: Box::new(target), copy };
        let elsewhere = vms.map(|vms| {
            let outbox = Arc::clone(&self.outbox);
            Elsewhere { vms, ring: Arc::new(move || outbox.send(&Told::Bell { vm: number })) }
        });
        let config = VmConfig { console, elsewhere, ..VmConfig::from(spec) };
        let vm = Vm::build(config, &self.hypervisor).map_err(|error| error.to_string())?;
        let outbox = Arc::clone(&self.outbox);
        vm.observe_disk_errors(Arc::new(move |disk, message| {
            let (disk, message) = (disk.to_owned(), message.to_owned());
            outbox.send(&Told::DiskError { vm: number, disk, message });
        }));
        let vm = Arc::new(vm);
        let (index, notices, hole) = (vm.index(), Machine::notices(&*vm), vm.hole_file().cloned());
        self.watch.add(number, &vm).map_err(|error| format!("watch the VM: {error}"))?;
        self.vms.lock().insert(number, vm);
        Ok((Answer::Built { index, notices }, hole))
    }
}
