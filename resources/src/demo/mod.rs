//! The demo guest as its host sees it: what it is told, what it holds, and what it says.
//!
//! These modules are compiled twice: into this crate, and into the guest itself (`demo-guest/src/main.rs`
//! includes this file), so that host and guest can't disagree about where a page lies or what is in it.
//! They use `core` alone and allocate nothing.
//!
//! | module | holds |
//! | --- | --- |
//! | [`plan`] | the guest's command line: what to fill, write, verify and break |
//! | [`layout`] | where in RAM the arena lies and which class each of its pages has |
//! | [`content`] | what every word of a page or a disk sector must be |
//! | [`client`] | a client of a disk, with a page cache of its own: which blocks it uses, where its tables lie |
//! | [`zipf`], [`histogram`] | how popular blocks are; how long requests take |
//! | [`report`] | the lines that the guest prints on its serial port |

pub mod client;
pub mod content;
pub mod histogram;
pub mod layout;
pub mod plan;
pub mod report;
pub mod zipf;
