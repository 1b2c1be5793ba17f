//! Compiles the demo guest.
//!
//! The guest is a freestanding program with a panic strategy, code model and linker script of its own, so
//! the compiler is called directly: no flag, profile or target of the host's build reaches it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let sources = Path::new("demo-guest");
    let script = sources.join("guest.ld");
    for path in [sources.join("src"), script.clone(), PathBuf::from("src/demo")] {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    println!("cargo:rerun-if-changed=build.rs");

    let image = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("demo-guest.elf");
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let status = Command::new(&rustc)
        .args(["--crate-name", "demo_guest", "--crate-type", "bin", "--edition", "2024"])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .args(["-C", "panic=abort", "-C", "opt-level=s", "-C", "lto=fat", "-C", "codegen-units=1"])
        .args(["-C", "relocation-model=static", "-C", "strip=symbols"])
        .args(["-C", "link-args=-nostartfiles -nostdlib -static -no-pie"])
        .args(["-C", "link-args=-Wl,--build-id=none -Wl,-z,max-page-size=4096"])
        .arg("-C")
        .arg(format!("link-arg=-Wl,-T,{}", script.display()))
        .arg("-o")
        .arg(&image)
        .arg(sources.join("src/main.rs"))
        .status()
        .unwrap_or_else(|error| panic!("starting {} to compile the demo guest: {error}", rustc.display()));
    assert!(status.success(), "compiling the demo guest failed ({status}): its errors are above");
}
