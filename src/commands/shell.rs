//! `completions` and `man`: what a shell and a reader need, made from the definitions of the command line.

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;

use crate::{
    cli::{Cli, CompletionsArgs, ManArgs},
    ui,
};

pub(super) fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "fastflux", &mut script);
    ui::data(String::from_utf8(script)?)
}

pub(super) fn man(args: &ManArgs) -> Result<()> {
    let mut command = Cli::command();
    command.build(); // gives subcommands their full names and the global flags
    if let Some(name) = &args.command {
        let named = command.find_subcommand(name).cloned();
        command = named.with_context(|| {
            format!("there is no command `{name}`\nhint: `fastflux --help` lists them")
        })?;
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    ui::data(String::from_utf8(page)?)
}
