//! Compiles the demo guest.
//!
//! The guest is a freestanding program with its own panic strategy, code model and linker script. So the
//! build calls the compiler directly, without flags, profile or target of the host's build. The only crate
//! that the guest uses, the layout of the memory hole, is compiled in the same way.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let sources = Path::new("demo-guest");
    let script = sources.join("guest.ld");
    let layout = Path::new("../memory-hole/src");
    for path in [sources.join("src"), script.clone(), PathBuf::from("src/demo"), layout.to_owned()] {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    println!("cargo:rerun-if-changed=build.rs");

    let folder = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let library = folder.join("libsamepage_hole.rlib");
    compile("samepage_hole", "rlib", &layout.join("lib.rs"), &library, &[]);
    let used = format!("samepage_hole={}", library.display());
    let script = format!("link-arg=-Wl,-T,{}", script.display());
    let options = [
        "--extern",
        &used,
        "-C",
        "lto=fat",
        "-C",
        "strip=symbols",
        "-C",
        "link-args=-nostartfiles -nostdlib -static -no-pie",
        "-C",
        "link-args=-Wl,--build-id=none -Wl,-z,max-page-size=4096",
        "-C",
        &script,
    ];
    compile("demo_guest", "bin", &sources.join("src/main.rs"), &folder.join("demo-guest.elf"), &options);
}

/// Compiles a crate for the guest.
fn compile(name: &str, kind: &str, source: &Path, output: &Path, options: &[&str]) {
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let status = Command::new(&rustc)
        .args(["--crate-name", name, "--crate-type", kind, "--edition", "2024"])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .args(["-C", "panic=abort", "-C", "opt-level=s", "-C", "codegen-units=1"])
        .args(["-C", "relocation-model=static"])
        .args(options)
        .arg("-o")
        .arg(output)
        .arg(source)
        .status()
        .unwrap_or_else(|error| {
            panic!("starting {} to compile {name} for the guest: {error}", rustc.display())
        });
    assert!(status.success(), "compiling {name} for the guest failed ({status}): its errors are above");
}
