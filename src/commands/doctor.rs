//! `doctor`: what this build can do and what the machine has.

use anyhow::Result;

use crate::{bench::doctor::DoctorReport, cli::DoctorArgs};

pub(super) fn run(args: &DoctorArgs) -> Result<()> {
    let report = DoctorReport::new();
    super::show(args.print, &report, || report.text())
}
