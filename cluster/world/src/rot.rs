//! Bits that turn on a disk, in files that nobody writes: tables, blobs, and frames of the log. Now and then a table or
//! blob loses its end.
//!
//! Left alone is what a store cannot do without, and cannot tell (`docs/formats`): the manifest, and the last frames of
//! the log, which look like those that were never finished.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use torc_env::SECTOR_BYTES;
use torc_sim::{HostId, Rng, Simulation};

/// One in so many tables and blobs is cut short.
const CUTS: f64 = 0.2;

/// Lets one bit of a host's disk read wrong until its sector is written again, or cuts a file short; which one follows
/// from `draw`. Nothing, when there is nothing at rest yet.
pub(crate) fn strike(simulation: &Simulation, host: HostId, draw: u64) {
    let rng = &mut Rng::stream(draw, "rot");
    let is_log = rng.chance(0.3);
    let at_rest = if is_log {
        frames(simulation, host)
    } else {
        files(simulation, host)
    };
    if at_rest.is_empty() {
        return;
    }
    let (path, first, bytes) = rng.pick(&at_rest);
    let (offset, mask) = (first + rng.below(*bytes), 1 << rng.below(8));
    if !is_log && rng.chance(CUTS) && simulation.cut_short(host, path, offset) {
        simulation.note(format_args!(
            "host {} loses the end of {} from {offset} on",
            host.0,
            path.display()
        ));
        return;
    }
    simulation.note(format_args!(
        "host {} rots in {} at {offset}, {mask:#04x}",
        host.0,
        path.display()
    ));
    assert!(
        simulation.flip_bits(host, path, offset, mask),
        "it is there"
    );
}

/// A part of a file: from where on, how long.
type Part = (PathBuf, u64, u64);

/// Tables and blobs.
fn files(simulation: &Simulation, host: HostId) -> Vec<Part> {
    let files = simulation.files(host).into_iter();
    let files = files.filter(|(path, bytes)| {
        let is_data = path.extension().and_then(OsStr::to_str);
        *bytes > 0 && is_data.is_some_and(|name| name == "table" || name == "blob")
    });
    files.map(|(path, bytes)| (path, 0, bytes)).collect()
}

/// First sectors of those frames of the log that are missed when they cannot be read.
fn frames(simulation: &Simulation, host: HostId) -> Vec<Part> {
    let segments = simulation.files(host).into_iter();
    let segments = segments.filter(|(path, _)| path.extension().is_some_and(|name| name == "wal"));
    let mut found = Vec::new();
    for (path, _) in segments {
        let content = simulation.content(host, &path).unwrap_or_default();
        let frames = frames_of(&path, &content);
        // What the newest frames say that is known to be durable themselves.
        let known = frames.iter().map(|frame| frame.durable_through).max();
        let durable = frames.iter().filter(|frame| Some(frame.sequence) <= known);
        let confirmed = durable.map(|frame| frame.durable_through).max();
        let recognised = frames
            .iter()
            .filter(|frame| Some(frame.sequence) <= confirmed);
        found.extend(recognised.map(|frame| (path.clone(), frame.at, sector_bytes())));
    }
    found
}

/// A frame as `docs/formats/wal.md` has it.
struct Frame {
    at: u64,
    sequence: u64,
    durable_through: u64,
}

fn frames_of(path: &Path, content: &[u8]) -> Vec<Frame> {
    let name = path.file_stem().and_then(OsStr::to_str);
    let segment = name.and_then(|name| u64::from_str_radix(name, 16).ok());
    let sectors = content.chunks(SECTOR_BYTES).zip(0_u64..);
    let frame = |(sector, index): (&[u8], u64)| {
        let number = |at: usize| {
            let bytes = sector.get(at..)?.first_chunk::<8>()?;
            Some(u64::from_le_bytes(*bytes))
        };
        if !sector.starts_with(b"TWAL") || number(8) != segment {
            return None;
        }
        Some(Frame {
            at: index * sector_bytes(),
            sequence: number(16)?,
            durable_through: number(32)?,
        })
    };
    sectors.filter_map(frame).collect()
}

fn sector_bytes() -> u64 {
    u64::try_from(SECTOR_BYTES).expect("a sector is small")
}

#[cfg(test)]
mod tests {
    use torc_env::{AlignedBuf, Disk as _, Env as _, File as _, OpenMode, ShardId};
    use torc_sim::Options;

    use super::*;

    #[test]
    fn some_tables_lose_their_end_and_more_turn_a_bit() {
        let path = Path::new("1.table");
        let written = vec![7; SECTOR_BYTES];
        let (mut cut, mut turned) = (0, 0);
        for draw in 0..100 {
            let simulation = Simulation::new(draw, Options::default());
            let host = simulation.add_host(1);
            let env = simulation.env(host, ShardId(0));
            let sector = AlignedBuf::copy_of(&written);
            let write = async move {
                let file = env.disk().open(path, OpenMode::CreateNew).await.unwrap();
                file.write_at(0, sector).await.0.unwrap();
                file.sync().await.unwrap();
            };
            simulation.run(write).unwrap();
            strike(&simulation, host, draw);
            let found = simulation.content(host, path).unwrap();
            cut += u32::from(found.len() < written.len());
            turned += u32::from(found.len() == written.len() && found != written);
        }
        assert!(cut > 5 && turned > cut, "{cut} cut, {turned} turned");
    }

    #[test]
    fn the_frames_of_a_segment_are_found_and_leavings_of_another_are_not() {
        let frame = |segment: u64, sequence: u64| {
            let mut sector = vec![0; SECTOR_BYTES];
            sector[..4].copy_from_slice(b"TWAL");
            sector[8..16].copy_from_slice(&segment.to_le_bytes());
            sector[16..24].copy_from_slice(&sequence.to_le_bytes());
            sector[32..40].copy_from_slice(&(sequence - 1).to_le_bytes());
            sector
        };
        let content = [frame(7, 1), vec![0; SECTOR_BYTES], frame(7, 2), frame(6, 3)].concat();
        let frames = frames_of(Path::new("wal/0000000000000007.wal"), &content);
        let found: Vec<_> = frames
            .iter()
            .map(|frame| (frame.at, frame.sequence, frame.durable_through))
            .collect();
        assert_eq!(found, [(0, 1, 0), (2 * sector_bytes(), 2, 1)]);
    }
}
