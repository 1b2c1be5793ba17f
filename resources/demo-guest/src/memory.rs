//! The memory functions that compiled code calls by name.
//!
//! Each consists of string instructions in assembly, because the compiler would turn a loop into a call of
//! the function itself.

use core::arch::asm;

/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller guarantees both ranges. The direction flag is clear in Rust code.
    unsafe {
        asm!("rep movsb", inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _,
             options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= bytes {
        // SAFETY: no byte is overwritten before it is read when copying upwards.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: the caller guarantees both ranges. The direction flag is clear again afterwards. `bytes` is not
    // 0 here, so the last bytes exist.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") bytes => _, inout("rdi") to.add(bytes - 1) => _,
             inout("rsi") from.add(bytes - 1) => _, options(nostack));
    }
    to
}

/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller guarantees the range. The direction flag is clear in Rust code.
    unsafe {
        asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") to => _, in("al") byte as u8,
             options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
    let (last_a, last_b): (u32, u32);
    // SAFETY: the caller guarantees both ranges. The direction flag is clear in Rust code. Comparing two
    // equal registers first makes empty ranges compare as equal.
    unsafe {
        asm!("xor {a:e}, {a:e}", "xor {b:e}, {b:e}", "cmp {a:e}, {b:e}", "repe cmpsb", "je 2f",
             "movzx {a:e}, byte ptr [rsi - 1]", "movzx {b:e}, byte ptr [rdi - 1]", "2:",
             inout("rcx") bytes => _, inout("rsi") a => _, inout("rdi") b => _,
             a = out(reg) last_a, b = out(reg) last_b, options(nostack, readonly));
    }
    last_a as i32 - last_b as i32
}

/// # Safety
/// As `bcmp` of POSIX.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
    // SAFETY: guaranteed by the caller.
    unsafe { memcmp(a, b, bytes) }
}
