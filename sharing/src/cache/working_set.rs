//! What a VM would gain from more memory.
