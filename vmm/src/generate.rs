//! Descriptions of the program for other programs: completions, manual pages, schemas.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::env::Shells;
use samepage_host::{config_file, schema};
use samepage_text::counted::counted;

use crate::cli::{Cli, ConfigCommand};

/// The variable with which a shell asks for completions.
const COMPLETE: &str = "COMPLETE";

/// Prints a script with which a shell asks this program for completions. So names of VMs are completed too.
pub(crate) fn completions(shell: clap_complete::Shell) -> anyhow::Result<ExitCode> {
    let (shells, name) = (Shells::builtins(), shell.to_string());
    let completer = shells.completer(&name).with_context(|| format!("complete commands in {name}"))?;
    let mut text = Vec::new();
    completer.write_registration(COMPLETE, "samepage", "samepage", "samepage", &mut text)?;
    print(&text)
}

/// Writes manual pages of all commands to a folder.
pub(crate) fn manual(folder: &Path) -> anyhow::Result<ExitCode> {
    std::fs::create_dir_all(folder).with_context(|| format!("create the folder {}", folder.display()))?;
    clap_mangen::generate_to(Cli::command(), folder)
        .with_context(|| format!("write manual pages to {}", folder.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Runs `samepage config`.
pub(crate) fn config(command: &ConfigCommand) -> anyhow::Result<ExitCode> {
    match command {
        ConfigCommand::Schema => print(schema::config_schema().as_bytes()),
        ConfigCommand::Check { file } => match config_file::load(file) {
            Ok(vms) => {
                let vms = counted(vms.len(), "VM");
                print(format!("{}: {vms}, no mistakes\n", file.display()).as_bytes())
            }
            Err(mistakes) => {
                // Each line names its file, as compilers do.
                let _ = writeln!(io::stderr(), "{mistakes}");
                Ok(ExitCode::FAILURE)
            }
        },
    }
}

fn print(text: &[u8]) -> anyhow::Result<ExitCode> {
    io::stdout().lock().write_all(text).context("write to standard output")?;
    Ok(ExitCode::SUCCESS)
}
