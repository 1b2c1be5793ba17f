//! What a process does around its work: it catches signals, waits for files, has a terminal, opens its logs
//! again, and tells its user what happens.

pub mod escape;
pub mod log_file;
pub mod poll;
pub mod signals;
pub mod tell;
pub mod terminal;
