//! From the PVH entry point to ring 3, and back into ring 0 for the two operations that need it: halting and
//! taking interrupts.
//!
//! The monitor enters in 32-bit protected mode without paging (`ebx` points to `hvm_start_info`: Xen,
//! docs/misc/pvh.pandoc). Ring 0 sets up only what is necessary to leave: page tables for the first 4 MiB, a
//! GDT, a TSS for the way back, and long mode. If ring 0 is interpreted, every instruction there is slow, and
//! some are missing. So ring 3 does the rest (the interrupt table and the other page tables); it may write
//! all memory and use all ports. The I/O bitmap of the TSS permits the ports, because a KVM that runs ring 3
//! natively loses the I/O privilege level. The code contains no SSE instruction.
//!
//! Other processors start in real mode, at the copy of the trampoline below 1 MiB, and take the same way to ring 3 with
//! the same tables. Each has a TSS and stacks of its own, by its number in the order of the starts. All TSS use one I/O
//! bitmap.

use core::arch::{asm, global_asm};

use crate::demo::plan::MOST_PROCESSORS;

/// Vector of the gate that halts until an interrupt, callable from ring 3. It is that of INT3, because a KVM
/// that runs ring 3 natively may turn INT with a vector into an invalid opcode.
pub(crate) const HALT_VECTOR: usize = 3;
/// Vector of the local APIC's timer.
pub(crate) const TIMER_VECTOR: usize = 0x50;
/// Vector that the local APIC raises when an interrupt disappears while it is taken.
pub(crate) const SPURIOUS_VECTOR: usize = 0xff;
/// Number of the processor's exceptions, which come first.
const EXCEPTIONS: usize = 32;
/// Distance between the entry points of two exceptions, in bytes.
const STUB_BYTES: u64 = 16;
const KERNEL_CODE: u64 = 0x08;

#[rustfmt::skip]
global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18              /* name bytes, descriptor bytes, XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .quad pvh_entry

    /* Paging and long mode, with the page tables for the first 4 MiB. Changes EAX, ECX and EDX. */
    .macro long_mode
        movl $0x620, %eax       /* CR4: PAE, OSFXSR, OSXMMEXCPT */
        movl %eax, %cr4
        movl $page_map, %eax
        movl %eax, %cr3
        movl $0xc0000080, %ecx  /* EFER.LME */
        rdmsr
        orl $0x100, %eax
        wrmsr
        movl $0x80010033, %eax  /* CR0: PG, WP, NE, ET, MP, PE */
        movl %eax, %cr0
    .endm

    /* Segments of 64-bit code: a stack in ring 0, and data of ring 3. Changes EAX. */
    .macro segments
        movl $0x10, %eax
        movl %eax, %ss
        movl $0x1b, %eax
        movl %eax, %ds
        movl %eax, %es
        movl %eax, %fs
        movl %eax, %gs
    .endm

    .section .text.boot, "ax"
    .code32
    .globl pvh_entry
    pvh_entry:
        cld
        /* 0x67: present, writable, user, accessed, dirty; 0xe7: the same, and a 2 MiB page. */
        movl $(page_directory_pointers + 0x67), page_map
        movl $(boot_directory + 0x67), page_directory_pointers
        movl $0xe7, boot_directory
        movl $0x2000e7, boot_directory + 8
        long_mode
        /* RSP0; the I/O bitmap's place, and the byte of ones that must end it: all ports are permitted. */
        movl $kernel_stack_top, task_states + 4
        movw $(64 * 104), task_states + 102
        movb $0xff, io_bitmap + 8192
        /* The TSS descriptor's base is in pieces that no relocation can fill in. */
        movl $task_states, %eax
        movw %ax, task_state_descriptors + 2
        shrl $16, %eax
        movb %al, task_state_descriptors + 4
        lgdt gdt_pointer
        ljmpl $0x08, $1f

    .code64
    1:  segments
        movl $kernel_stack_top, %esp
        lidt idt_pointer
        movl $0x28, %eax
        ltr %ax
        movl %ebx, %edi
        pushq $0x1b             /* SS */
        pushq $(user_stack_top - 8)
        pushq $0x2              /* RFLAGS: interrupts off */
        pushq $0x23             /* CS */
        pushq $ring3_main
        iretq

    /* Another processor, in 32-bit mode with the trampoline's segments. */
    .code32
    processor_entry:
        movl $0x10, %eax
        movl %eax, %ds
        long_mode
        lgdt gdt_pointer
        ljmpl $0x08, $1f
    .code64
    1:  segments
        movl $1, %edi
        lock xaddl %edi, next_processor
        cmpl $64, %edi
        jb 3f
    2:  hlt                     /* one too many */
        jmp 2b
    3:  movl %edi, %eax
        shll $9, %eax
        leal kernel_stacks(%rax), %esp  /* the end of the stack before: the first is another's */
        lidt idt_pointer
        movl %edi, %eax
        shll $4, %eax
        addl $0x28, %eax
        ltr %ax
        movl %edi, %eax
        shll $13, %eax
        leal user_stacks - 8(%rax), %eax
        pushq $0x1b
        pushq %rax
        pushq $0x2
        pushq $0x23
        pushq $ring3_processor
        iretq

    /* Interrupts are taken here and nowhere else; one that is already pending wakes the halt as well, since
       STI holds it off for one more instruction. */
    .globl halt_gate
    halt_gate:
        sti
        hlt
        cli
        iretq

    /* Forget translations, after a change of the page tables. */
    .globl flush_gate
    flush_gate:
        movq %cr3, %rax
        movq %rax, %cr3
        iretq

    .globl timer_gate
    timer_gate:
        pushq %rax
        movl $0xfee000b0, %eax  /* end of interrupt */
        movl $0, (%rax)
        popq %rax
    .globl spurious_gate
    spurious_gate:
        iretq

    /* One entry point for each exception, that leaves vector and error code on the stack. */
    .balign 16
    .globl exception_gates
    exception_gates:
    .set vector, 0
    .rept 32
        .balign 16
        .if !((0x60227d00 >> vector) & 1)   /* those with an error code of the processor's */
        pushq $0
        .endif
        pushq $vector
        jmp exception
        .set vector, vector + 1
    .endr

    /* Go on in ring 3 at the function that reports the exception. */
    exception:
        popq %rdi
        popq %rsi
        movq (%rsp), %rdx
        movq %cr2, %rcx
        movq $ring3_fault, (%rsp)
        movq $0x23, 8(%rsp)
        movq $0x2, 16(%rsp)
        movq $(fault_stack_top - 8), 24(%rsp)
        movq $0x1b, 32(%rsp)
        iretq

    /* The first instructions of another processor, in real mode. They run at a copy of this code. */
    .section .text.boot, "ax"
    .code16
    .balign 16
    .globl trampoline
    trampoline:
        cli
        xorw %ax, %ax
        movw %ax, %ds
        lgdtl 0x8000 + trampoline_gdt_pointer - trampoline
        movl $0x11, %eax        /* CR0: ET, PE */
        movl %eax, %cr0
        ljmpl $0x08, $processor_entry
    .balign 8
    trampoline_gdt:
        .quad 0
        .quad 0x00cf9b000000ffff    /* 0x08: ring 0, 32-bit code */
        .quad 0x00cf93000000ffff    /* 0x10: ring 0, data */
    trampoline_gdt_pointer:
        .word 23
        .long 0x8000 + trampoline_gdt - trampoline
    .globl trampoline_end
    trampoline_end:
    .code64

    .section .data.boot, "aw"
    .balign 8
    .globl next_processor
    next_processor: .long 1
    .balign 8
    gdt:
        .quad 0
        .quad 0x00af9b000000ffff    /* 0x08: ring 0, 64-bit code */
        .quad 0x00cf93000000ffff    /* 0x10: ring 0, data */
        .quad 0x00cff3000000ffff    /* 0x18: ring 3, data */
        .quad 0x00affb000000ffff    /* 0x20: ring 3, 64-bit code */
    .globl task_state_descriptors
    task_state_descriptors:         /* 0x28; one for each processor */
        .quad 0x0000890000003a00    /* limit: 64 TSS of 104 bytes, 8192 of I/O bitmap and one that ends it */
        .quad 0
        .skip 16 * 63
    gdt_end:
    gdt_pointer:
        .word gdt_end - gdt - 1
        .quad gdt
    idt_pointer:
        .word 0xfff
        .quad interrupt_table

    .section .bss.boot, "aw", @nobits
    .balign 4096
    page_map: .skip 4096
    .globl page_directory_pointers
    page_directory_pointers: .skip 4096
    boot_directory: .skip 4096
    .globl low_directories
    low_directories: .skip 4 * 4096
    .globl interrupt_table
    interrupt_table: .skip 4096
    .skip 4                     /* so that RSP0 is aligned */
    .globl task_states
    task_states: .skip 64 * 104
    io_bitmap: .skip 8192 + 1
    .balign 16
    .skip 1024
    kernel_stack_top:
    .balign 16
    .skip 65536
    user_stack_top:
    .skip 8192
    fault_stack_top:
    .globl kernel_stacks
    kernel_stacks: .skip 64 * 512
    user_stacks: .skip 64 * 8192
    "#,
    options(att_syntax)
);

unsafe extern "C" {
    static halt_gate: [u8; 0];
    static flush_gate: [u8; 0];
    static timer_gate: [u8; 0];
    static spurious_gate: [u8; 0];
    static exception_gates: [u8; 0];
    static mut interrupt_table: [[u64; 2]; 256];
    static trampoline: [u8; 0];
    static trampoline_end: [u8; 0];
    static kernel_stacks: [u8; 0];
    static mut task_states: [[u32; TASK_STATE_BYTES / 4]; MOST_PROCESSORS as usize];
    static mut task_state_descriptors: [[u64; 2]; MOST_PROCESSORS as usize];
}

/// The page of the trampoline's copy. Nothing else lies there once the monitor's data has been read.
pub(crate) const TRAMPOLINE_PAGE: u8 = 8;
const TASK_STATE_BYTES: usize = 104;
const KERNEL_STACK_BYTES: u64 = 512;
/// The assembly has these numbers as literals.
const _: () = assert!(MOST_PROCESSORS == 64 && TRAMPOLINE_PAGE as usize * 4096 == 0x8000);

/// Makes all ready for the starts of other processors.
///
/// # Safety
/// To be called once, when low memory is mapped and nothing in it is needed any more.
pub(crate) unsafe fn prepare_processors() {
    let first_bitmap = MOST_PROCESSORS as usize * TASK_STATE_BYTES;
    for number in 1..MOST_PROCESSORS as usize {
        let stack = (&raw const kernel_stacks).addr() as u64 + number as u64 * KERNEL_STACK_BYTES;
        let bitmap = first_bitmap - number * TASK_STATE_BYTES;
        // SAFETY: the number is in bounds, and no processor uses these entries yet.
        unsafe {
            let state = &raw mut task_states[number];
            // RSP0 is at byte 4, and the bitmap's place at byte 102.
            (&raw mut (*state)[1]).write_volatile(stack as u32);
            (&raw mut (*state)[25]).write_volatile((bitmap as u32) << 16);
            let base = state.addr() as u64;
            let limit = (bitmap + 8192) as u64;
            let low = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
            (&raw mut task_state_descriptors[number]).write_volatile([low, base >> 32]);
        }
    }
    let bytes = (&raw const trampoline_end).addr() - (&raw const trampoline).addr();
    let copy = core::ptr::with_exposed_provenance_mut::<u8>(usize::from(TRAMPOLINE_PAGE) * 4096);
    // SAFETY: the trampoline is code of this program, and the caller vouches for its place.
    unsafe { core::ptr::copy_nonoverlapping((&raw const trampoline).cast::<u8>(), copy, bytes) };
}

/// Fills the interrupt table, which ring 0 has already loaded.
///
/// # Safety
/// Nothing else may access the table meanwhile. To be called before anything can raise an interrupt.
pub(crate) unsafe fn install_gates() {
    let exceptions = (&raw const exception_gates).addr() as u64;
    // SAFETY: passed on from the caller.
    unsafe {
        for vector in 0..EXCEPTIONS {
            install_gate(vector, exceptions + vector as u64 * STUB_BYTES, 0);
        }
        install_gate(HALT_VECTOR, (&raw const halt_gate).addr() as u64, 3);
        install_gate(TIMER_VECTOR, (&raw const timer_gate).addr() as u64, 0);
        install_gate(SPURIOUS_VECTOR, (&raw const spurious_gate).addr() as u64, 0);
    }
}

/// Enters ring 0 to make the processor drop all translations.
///
/// # Safety
/// As for [`install_gates`], which must have been called.
pub(crate) unsafe fn flush_translations() {
    // SAFETY: the gate changes only `rax`, and the page tables map the used memory as before. The caller
    // guarantees the rest. Nothing halts before the vector is again that of halting.
    unsafe {
        install_gate(HALT_VECTOR, (&raw const flush_gate).addr() as u64, 3);
        asm!("int3", out("rax") _, options(nostack));
        install_gate(HALT_VECTOR, (&raw const halt_gate).addr() as u64, 3);
    }
}

/// Initial control words of the floating-point units: all exceptions masked.
const MXCSR: u32 = 0x1f80;

/// Brings the floating-point units of this processor into their initial state.
///
/// # Safety
/// To be called before any code that uses them.
pub(crate) unsafe fn set_up_floating_point() {
    // SAFETY: the units exist in every 64-bit processor.
    unsafe { asm!("fninit", "ldmxcsr [{}]", in(reg) &MXCSR, options(nostack)) };
}

/// Fills one entry of the interrupt table, for callers from `ring` on inwards.
///
/// # Safety
/// As for [`install_gates`]; the vector is below 256.
unsafe fn install_gate(vector: usize, handler: u64, ring: u64) {
    let present_interrupt_gate = 0x8e00 | ring << 13;
    let low =
        handler & 0xffff | KERNEL_CODE << 16 | present_interrupt_gate << 32 | (handler >> 16 & 0xffff) << 48;
    // SAFETY: passed on from the caller.
    unsafe { (&raw mut interrupt_table[vector]).write_volatile([low, handler >> 32]) };
}

/// Empties the interrupt table, so that neither the next exception nor the following double fault can be
/// delivered.
///
/// # Safety
/// As for [`install_gates`].
pub(crate) unsafe fn remove_gates() {
    // SAFETY: the caller guarantees that nothing else accesses the table.
    unsafe { (&raw mut interrupt_table).write_volatile([[0; 2]; 256]) };
}
