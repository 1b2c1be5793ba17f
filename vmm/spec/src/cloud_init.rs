//! What cloud-init in a guest is told at its first boot.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The files of a disk for cloud-init (its data source NoCloud). The guest gets it read-only, after its other disks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CloudInitSpec {
    /// A file with the user data: users, packages, commands and so on. By default there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub user_data: Option<PathBuf>,
    /// A file with the meta data. By default they are the VM's name, and the keys of `ssh_key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub meta_data: Option<PathBuf>,
    /// A file with the configuration of the network. By default the guest decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub network_config: Option<PathBuf>,
    /// A file with public keys, one a line. Their owners may log in over ssh as the image's default user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub ssh_key: Option<PathBuf>,
}

impl CloudInitSpec {
    /// Returns all paths.
    pub fn paths(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let Self { user_data, meta_data, network_config, ssh_key } = self;
        [user_data, meta_data, network_config, ssh_key].into_iter().flatten()
    }

    /// Returns a copy with other paths.
    #[must_use]
    pub fn with_paths(&self, change: impl Fn(&std::path::Path) -> PathBuf) -> Self {
        let mut copy = self.clone();
        copy.paths().for_each(|path| *path = change(path));
        copy
    }
}
