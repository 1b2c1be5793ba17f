//! Where the control socket is, if the user does not say.
//!
//! Root and the service have a socket in a folder of the system. Other users have one in their runtime folder, which
//! only they can open (`XDG_RUNTIME_DIR`, XDG Base Directory Specification). A client of a user prefers the user's own
//! socket. It takes the system's socket only if the user has none.

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The variable that names another socket, for servers and clients.
pub const VARIABLE: &str = "SAMEPAGE_SOCKET";

/// The socket of root and of the service.
pub const SYSTEM: &str = "/run/samepage/samepage.sock";

/// The socket's name in a user's runtime folder.
const NAME: &str = "samepage.sock";

/// Access to the system's folder. The socket has permissions of its own.
const FOLDER_MODE: u32 = 0o755;

/// Who starts a program, and the folders that may be the user's runtime folder, best first.
#[derive(Clone, Debug)]
struct User {
    id: u32,
    folders: Vec<PathBuf>,
}

impl User {
    fn of_process() -> io::Result<Self> {
        // The kernel's files of a process belong to the user whose rights the process has.
        let id = fs::metadata("/proc/self")?.uid();
        Ok(Self::new(id, env::var_os("XDG_RUNTIME_DIR")))
    }

    fn new(id: u32, named: Option<OsString>) -> Self {
        let named = named.map(PathBuf::from).filter(|folder| folder.is_absolute());
        // Some ways to become a user do not set the variable, such as `su` and jobs of cron.
        let usual = PathBuf::from(format!("/run/user/{id}"));
        Self { id, folders: named.into_iter().chain([usual]).collect() }
    }

    /// Returns the user's own socket, if the user has a runtime folder. A folder of another user, which `su` may pass
    /// on, is none.
    fn own(&self) -> Option<PathBuf> {
        if self.id == 0 {
            return Some(SYSTEM.into());
        }
        let is_own = |folder: &&PathBuf| {
            fs::metadata(folder).is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == self.id)
        };
        self.folders.iter().find(is_own).map(|folder| folder.join(NAME))
    }
}

/// Returns the path for the socket of a server. Makes the system's folder if it is missing.
///
/// # Errors
/// Fails if there is no folder for the socket.
pub fn of_server() -> anyhow::Result<PathBuf> {
    if let Some(path) = env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let user = User::of_process()?;
    let Some(path) = user.own() else {
        let folders: Vec<_> = user.folders.iter().map(|folder| folder.display().to_string()).collect();
        anyhow::bail!(
            "choose a control socket: no runtime folder belongs to user {} (XDG_RUNTIME_DIR; tried {}); \
             name a path with --socket or {VARIABLE}",
            user.id,
            folders.join(" and ")
        );
    };
    if let (true, Some(folder)) = (path == Path::new(SYSTEM), path.parent()) {
        make(folder).map_err(|error| {
            anyhow::anyhow!(
                "make the folder {} for the control socket: {error}; name another path with --socket or {VARIABLE}",
                folder.display()
            )
        })?;
    }
    Ok(path)
}

/// Makes a folder that others may list. A folder that exists stays as it is.
fn make(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(FOLDER_MODE).create(folder) {
        // The umask may have taken permissions away.
        Ok(()) => fs::set_permissions(folder, Permissions::from_mode(FOLDER_MODE)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// The socket that a client of this user takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The socket.
    pub path: PathBuf,
    /// A further socket that does not exist either, if the socket does not exist.
    pub missing: Option<PathBuf>,
}

/// Returns the user's own socket if it exists, otherwise the system's socket.
///
/// The choice depends on existence alone. If a process was killed, its socket remains, and requests to it fail.
/// Otherwise such requests would reach VMs of somebody else.
#[must_use]
pub fn of_client() -> Choice {
    let own = User::of_process().ok().and_then(|user| user.own());
    choose(own, Path::new(SYSTEM))
}

fn choose(own: Option<PathBuf>, system: &Path) -> Choice {
    let exists = |path: &Path| path.symlink_metadata().is_ok();
    match own.filter(|own| own != system) {
        Some(own) if exists(&own) => Choice { path: own, missing: None },
        Some(own) if !exists(system) => Choice { path: own, missing: Some(system.to_owned()) },
        _ => Choice { path: system.to_owned(), missing: None },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(id: u32, folder: &Path) -> User {
        User::new(id, Some(folder.into()))
    }

    #[test]
    fn root_has_the_systems_socket_and_others_have_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let id = fs::metadata(folder.path()).unwrap().uid();
        assert_eq!(user(0, folder.path()).own().unwrap(), Path::new(SYSTEM));
        let theirs = User { id: id + 1, folders: vec![folder.path().to_owned()] };
        assert_eq!(theirs.own(), None);
        // A test may run as root, for which the rule of other users is wanted here.
        let own = User { id, folders: vec![folder.path().join("gone"), folder.path().to_owned()] };
        let expected = if id == 0 { PathBuf::from(SYSTEM) } else { folder.path().join(NAME) };
        assert_eq!(own.own().unwrap(), expected);
    }

    #[test]
    fn a_runtime_folder_is_absolute_and_has_a_usual_place() {
        let folders = |named: Option<&str>| User::new(7, named.map(OsString::from)).folders;
        for named in [None, Some("folder"), Some("")] {
            assert_eq!(folders(named), ["/run/user/7"].map(PathBuf::from), "{named:?}");
        }
        assert_eq!(folders(Some("/folder")), ["/folder", "/run/user/7"].map(PathBuf::from));
    }

    #[test]
    fn clients_prefer_their_users_socket_and_name_both_if_there_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let (own, system) = (folder.path().join("own"), folder.path().join("system"));
        let chosen = || choose(Some(own.clone()), &system);
        assert_eq!(chosen(), Choice { path: own.clone(), missing: Some(system.clone()) });
        fs::write(&system, "").unwrap();
        assert_eq!(chosen(), Choice { path: system.clone(), missing: None });
        fs::write(&own, "").unwrap();
        assert_eq!(chosen(), Choice { path: own.clone(), missing: None });
        for own in [None, Some(system.clone())] {
            assert_eq!(choose(own, &system), Choice { path: system.clone(), missing: None });
        }
    }

    #[test]
    fn the_systems_folder_is_made_once_and_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("samepage");
        let mode = || fs::metadata(&path).unwrap().mode() & 0o777;
        make(&path).unwrap();
        assert_eq!(mode(), FOLDER_MODE);
        fs::set_permissions(&path, Permissions::from_mode(0o750)).unwrap();
        make(&path).unwrap();
        assert_eq!(mode(), 0o750);
        assert!(make(&folder.path().join("none/samepage")).is_err());
    }
}
