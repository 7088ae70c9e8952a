//! Reading hosts: `inspect`, `map`, `check`, `plan`, `capture`.

use std::io::Write as _;
use std::path::Path;

use serde::Serialize;
use torc_tuning::capture;
use torc_tuning::check::{self, Severity};
use torc_tuning::host::Host;
use torc_tuning::kernel::{Live, Tree};
use torc_tuning::plan::Plan;
use torc_tuning::render;

use super::{CaptureArgs, MapArgs, PlanArgs};
use crate::failure::Failure;

/// This machine, a directory, or an archive.
pub(super) fn read(root: Option<&Path>) -> Result<Host, Failure> {
    let host = match root {
        None => Host::read(&Live::machine(), "this machine"),
        Some(root) if root.is_dir() => Host::read(&Live::below(root), &root.display().to_string()),
        Some(root) => {
            let place = root.display();
            let bytes =
                std::fs::read(root).map_err(|error| Failure::new(format!("{place}: {error}")))?;
            let tree = Tree::from_archive(&bytes)
                .map_err(|error| Failure::new(format!("{place} is no captured host: {error}")))?;
            Host::read(&tree, &place.to_string())
        }
    };
    host.map_err(|error| Failure::new(error.to_string()))
}

pub(super) fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text =
        serde_json::to_string_pretty(value).map_err(|error| Failure::new(error.to_string()))?;
    show(&(text + "\n"))
}

/// Prints a whole screen. A reader that has seen enough (`| head`) is no failure.
pub(super) fn show(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

pub(super) fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<(), Failure> {
    std::fs::write(path, bytes)
        .map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

pub(super) fn inspect(root: Option<&Path>, json: bool) -> Result<(), Failure> {
    let host = read(root)?;
    if json {
        return print_json(&host);
    }
    show(&(render::host(&host) + "\n" + &render::map(&host, None)))
}

pub(super) fn map(root: Option<&Path>, args: &MapArgs) -> Result<(), Failure> {
    let host = read(root)?;
    let layout = Plan::of(&host, args.profile.into()).layout;
    match &args.svg {
        Some(path) => write(path, render::svg(&host, Some(&layout))),
        None => show(&render::map(&host, Some(&layout))),
    }
}

/// Fails when something is serious, so that scripts notice.
pub(super) fn check(root: Option<&Path>, json: bool) -> Result<(), Failure> {
    let findings = check::check(&read(root)?);
    if json {
        print_json(&findings)?;
    } else {
        show(&render::findings(&findings))?;
    }
    let serious = findings
        .iter()
        .filter(|finding| finding.severity == Severity::Serious)
        .count();
    match serious {
        0 => Ok(()),
        count => Err(Failure::new(format!("{count} serious findings"))),
    }
}

pub(super) fn plan(root: Option<&Path>, args: &PlanArgs) -> Result<(), Failure> {
    let host = read(root)?;
    let plan = Plan::of(&host, args.profile.into());
    if let Some(path) = &args.output {
        let text =
            serde_json::to_string_pretty(&plan).map_err(|error| Failure::new(error.to_string()))?;
        write(path, text)?;
    }
    if args.json {
        return print_json(&plan);
    }
    let map = render::map(&host, Some(&plan.layout));
    show(&(render::plan(&plan, args.all) + "\n" + &map))
}

pub(super) fn capture(args: &CaptureArgs) -> Result<(), Failure> {
    let tree = capture::capture(&Live::machine());
    let archive = tree
        .to_archive()
        .map_err(|error| Failure::new(error.to_string()))?;
    write(&args.output, &archive)?;
    println!(
        "{}: {} files, {} KiB",
        args.output.display(),
        tree.nodes().count(),
        archive.len() / 1024
    );
    Ok(())
}
