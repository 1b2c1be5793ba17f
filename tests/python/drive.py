"""Drives a VM with firecracker-python: boots, inspects and stops it.

Arguments: the folder with a folder for the VM, as the package has it; the VM's name; the guest's kernel and
its command line.
"""

import os
import sys

from firecracker.api import Api
from firecracker.exceptions import APIError
from firecracker.process import ProcessManager

data, vm, kernel, command_line = sys.argv[1:]
manager = ProcessManager()
manager._config.data_path = data
api = Api(f"{data}/{vm}/firecracker.socket")


def state():
    return api.describe.get().json()["state"]


assert state() == "Not started"
assert api.version.get().json()["firecracker_version"].startswith("1.")
api.boot.put(kernel_image_path=kernel, boot_args=command_line)
api.machine_config.put(vcpu_count=1, mem_size_mib=64)
try:
    api.create_snapshot.put(snapshot_path=f"{data}/snapshot", mem_file_path=f"{data}/memory")
except APIError as error:
    assert "snapshots" in str(error), error
else:
    raise AssertionError("there are snapshots")
api.vsock.put(guest_cid=3, uds_path=f"{data}/vsock")
api.actions.put(action_type="InstanceStart")
assert state() == "Running" and os.path.exists(f"{data}/vsock")
api.vm.patch(state="Paused")
assert state() == "Paused"
api.vm.patch(state="Resumed")
assert api.vm_config.get().json()["boot-source"]["kernel_image_path"] == kernel
pid, _ = manager.get_pid(vm)
assert manager.is_running(vm) and pid in manager.get_pids()
assert manager.stop(vm)
