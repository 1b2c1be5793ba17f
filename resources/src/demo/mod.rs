//! The demo guest from the host's view: its plan, its memory and its reports.
//!
//! These modules are compiled twice: into this crate, and into the guest itself (`demo-guest/src/main.rs`
//! includes this file). So host and guest cannot disagree about the place or the content of a page. The
//! modules use only `core` and allocate nothing.
//!
//! | module | content |
//! | --- | --- |
//! | [`plan`] | the guest's command line: what to fill, write, verify and break |
//! | [`layout`] | the arena's place in RAM and the class of each page |
//! | [`content`] | the expected content of every word of a page or a disk sector |
//! | [`client`] | a client of a disk with its own page cache: its blocks and its tables |
//! | [`zipf`], [`histogram`] | popularity of blocks; durations of requests |
//! | [`report`] | the lines that the guest prints on its serial port |

pub mod client;
pub mod content;
pub mod histogram;
pub mod layout;
pub mod plan;
pub mod report;
pub mod zipf;
