//! Common parts of a process: signals, waiting for files, the terminal, log files, and messages to the user.

pub mod control_socket;
pub mod escape;
pub mod log_file;
pub mod poll;
pub mod signals;
pub mod tell;
pub mod terminal;
