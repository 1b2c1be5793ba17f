//! Text for people: names and sizes as typed, numbers, tables and pictures as shown.
//!
//! This crate only handles text. It does not access files, VMs or the network.

pub mod counted;
pub mod names;
pub mod picture;
pub mod size;
pub mod table;
pub mod units;
