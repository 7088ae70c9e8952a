//! The log archive as a restore sees it: what there is, how far it brings a backup, and what nothing needs any more.
//!
//! Reads only; [`prune`] removes. Format page: `docs/formats/archive.md`.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use torc_engine::Mark;
use torc_engine::archive::SegmentId;
use torc_engine::archive::plan::{End, Plan, plan};
use torc_engine::archive::trailer::Trailer;
use torc_net::archive::ending::{ENDINGS, Ending};
use torc_net::archive::{TOPOLOGIES, lineage_dir, topology_name};
use torc_net::replay::Log;

use super::archive::{Manifest, StoreFiles, failed};
use super::moment::{Moment, Until};
use super::restore::restored_at;
use crate::failure::Failure;

const SECTOR_BYTES: usize = 4096;

/// A directory of archived logs.
pub struct LogArchive {
    dir: PathBuf,
}

/// An archived segment whose trailer is whole.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its file.
    pub path: PathBuf,
    /// What it says of itself.
    pub trailer: Trailer,
}

/// The logs of a node's stores in one layout of its data, from where they are replayed.
struct Stage {
    layout: u16,
    /// Each store's directory and mark.
    stores: Vec<(PathBuf, Mark)>,
    /// Where these logs end, if another layout followed.
    ending: Option<Ending>,
}

impl Stage {
    /// Whether a store's log ends with what is planned.
    fn has_ended(&self, store: usize, plan: &Plan) -> bool {
        let end = self.ending.as_ref().and_then(|found| found.ends.get(store));
        plan.end == End::Archive && end.is_some_and(|end| plan.last.sequence >= end.sequence)
    }
}

/// What the archive has of one store.
struct Planned {
    segments: Vec<Found>,
    plan: Plan,
    /// Why it goes no further, in words.
    limit: String,
}

/// How far a backup can be brought forward, or is to be.
#[derive(Clone, Debug)]
pub struct Reach {
    /// The moment.
    pub until: Moment,
    /// What is to be replayed, in order.
    pub logs: Vec<Log>,
    /// Bytes of those segments.
    pub bytes: u64,
    /// Why it goes no further, in words; empty when it is the moment that was asked for.
    pub limit: String,
}

/// What is not needed any more.
#[derive(Clone, Debug, Default)]
pub struct Unneeded {
    /// Files.
    pub files: Vec<PathBuf>,
    /// Their bytes.
    pub bytes: u64,
    /// Lives of the node's data from which there is no backup; what they have archived is kept.
    pub without_backup: Vec<String>,
}

impl LogArchive {
    /// The archive in `dir`, as `archive.dir` says.
    pub fn at(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    fn lineage(&self, manifest: &Manifest) -> Result<PathBuf, Failure> {
        let odd = |what| Failure::new(format!("backup {}: its {what} is malformed", manifest.id));
        let node = u128::from_str_radix(&manifest.node, 16).map_err(|_| odd("node"))?;
        let lineage = u64::from_str_radix(&manifest.lineage, 16).map_err(|_| odd("lineage"))?;
        Ok(self.dir.join(lineage_dir(node, lineage)))
    }

    /// The segments of a store in order, and what is wrong with those that cannot be used.
    pub fn segments(&self, dir: &Path) -> Result<(Vec<Found>, Vec<String>), Failure> {
        let (mut found, mut odd) = (Vec::new(), Vec::new());
        for name in names(dir)? {
            let Some(id) = SegmentId::from_name(&name) else {
                continue;
            };
            let path = dir.join(name);
            match trailer(&path) {
                Ok(Ok(trailer)) if trailer.segment == id => found.push(Found { path, trailer }),
                Ok(Ok(_)) => odd.push(format!("{}: another segment's content", path.display())),
                Ok(Err(damage)) => odd.push(format!("{}: {damage}", path.display())),
                Err(error) => odd.push(format!("{}: {error}", path.display())),
            }
        }
        found.sort_by_key(|found| found.trailer.segment);
        Ok((found, odd))
    }

    /// How a backup is brought to a moment.
    ///
    /// Fails with the reason when it cannot be.
    pub fn reach(&self, manifest: &Manifest, until: Until) -> Result<Reach, Failure> {
        let Until::Moment(moment) = until else {
            let reach = self.furthest(manifest)?;
            return self.reach(manifest, Until::Moment(reach.until));
        };
        let mut reach = Reach {
            until: moment,
            logs: Vec::new(),
            bytes: 0,
            limit: String::new(),
        };
        if moment.0 < manifest.cut_stamp {
            return Err(Failure::new(format!(
                "{moment} is before backup {} was cut ({}): a backup is brought forward, never back; take an older one",
                manifest.id,
                Moment(manifest.cut_stamp)
            )));
        }
        if moment.0 == manifest.cut_stamp {
            return Ok(reach);
        }
        for stage in self.stages(manifest)? {
            let mut is_reached = true;
            for (index, (_, mark)) in stage.stores.iter().enumerate() {
                let found = self.planned(manifest, &stage, index, moment.0)?;
                let Planned { segments, plan, .. } = &found;
                if plan.end != End::Reached && !stage.has_ended(index, plan) {
                    return Err(Failure::new(found.limit));
                }
                is_reached &= plan.end == End::Reached;
                let used = plan.segments.iter().map(|index| &segments[*index]);
                reach.bytes += used
                    .clone()
                    .map(|found| found.trailer.body_bytes)
                    .sum::<u64>();
                reach.logs.push(Log {
                    mark: *mark,
                    segments: used.map(|found| found.path.clone()).collect(),
                });
            }
            if is_reached {
                return Ok(reach);
            }
        }
        unreachable!("the last layout's logs have not ended")
    }

    /// The latest moment to which a backup can be brought.
    pub fn furthest(&self, manifest: &Manifest) -> Result<Reach, Failure> {
        let mut furthest = (manifest.cut_stamp, String::new());
        for stage in self.stages(manifest)? {
            let mut least: Option<(u64, String)> = None;
            let mut has_ended = true;
            for index in 0..stage.stores.len() {
                let Planned { plan, limit, .. } =
                    self.planned(manifest, &stage, index, u64::MAX)?;
                has_ended &= stage.has_ended(index, &plan);
                if least
                    .as_ref()
                    .is_none_or(|(least, _)| plan.reach_us < *least)
                {
                    least = Some((plan.reach_us, limit));
                }
            }
            if let Some((reach_us, limit)) = least {
                furthest = (furthest.0.max(reach_us), limit);
            }
            if !has_ended {
                break;
            }
        }
        Ok(Reach {
            until: Moment(furthest.0),
            logs: Vec::new(),
            bytes: 0,
            limit: furthest.1,
        })
    }

    /// The layouts of the node's data from a backup on, as far as the archive leads from one to the next.
    fn stages(&self, manifest: &Manifest) -> Result<Vec<Stage>, Failure> {
        let lineage = self.lineage(manifest)?;
        let marks = manifest.stores.iter().map(|store| {
            let mark = mark_of(manifest, store)?;
            Ok((lineage.join(&store.dir), mark))
        });
        let mut stage = Stage {
            layout: manifest.layout,
            stores: marks.collect::<Result<_, Failure>>()?,
            ending: ending(&lineage, manifest.layout)?,
        };
        let mut stages = Vec::new();
        while let Some(ending) = &stage.ending {
            let next = ending.next();
            let dirs = next.shards().map(|shard| lineage.join(next.dir(shard)));
            let following = Stage {
                layout: next.number,
                stores: dirs.zip(ending.begins.iter().copied()).collect(),
                ending: self::ending(&lineage, next.number)?,
            };
            stages.push(std::mem::replace(&mut stage, following));
        }
        stages.push(stage);
        Ok(stages)
    }

    /// What is planned of the segments of a store, and what is in the way.
    fn planned(
        &self,
        manifest: &Manifest,
        stage: &Stage,
        store: usize,
        until_us: u64,
    ) -> Result<Planned, Failure> {
        let (dir, mark) = &stage.stores[store];
        let (segments, odd) = self.segments(dir)?;
        let trailers: Vec<Trailer> = segments.iter().map(|found| found.trailer).collect();
        let plan = plan(&trailers, *mark, until_us);
        let mut limit = match plan.end {
            End::Reached => String::new(),
            End::Archive if plan.reach_us == 0 => format!(
                "{}: nothing was archived since backup {}",
                dir.display(),
                manifest.id
            ),
            End::Archive => format!(
                "{}: the archive ends at {}",
                dir.display(),
                Moment(plan.reach_us)
            ),
            End::Gap { from, to, behind } => format!(
                "{}: frames {from} to {to} of the log are missing before {}; what can be reached ends at {}",
                dir.display(),
                name_of(&segments[behind].path),
                Moment(plan.reach_us.max(manifest.cut_stamp))
            ),
        };
        if !limit.is_empty() && !odd.is_empty() {
            limit.push_str(&format!("; not usable: {}", odd.join(", ")));
        }
        if !limit.is_empty()
            && !stage.has_ended(store, &plan)
            && self.is_followed(manifest, stage.layout)?
        {
            limit.push_str(
                "; shards.count was changed after that, and the archive lacks the end of the log before the change: \
                 later moments need a backup from after it (take one after each such change)",
            );
        }
        Ok(Planned {
            segments,
            plan,
            limit,
        })
    }

    /// When the node's data began another life after that of a backup, by a restore, if any of it is in the archive.
    pub fn restored_since(&self, manifest: &Manifest) -> Result<Option<Moment>, Failure> {
        let own = self.lineage(manifest)?;
        let mut lineages = names(own.parent().unwrap_or(&self.dir))?;
        // Named by when it began, so names sort by age.
        lineages.retain(|name| name.len() == 16 && *name > manifest.lineage);
        let next = lineages.first().map(|name| u64::from_str_radix(name, 16));
        Ok(next.and_then(Result::ok).map(restored_at))
    }

    /// Whether anything was archived in a later layout of the node's data.
    fn is_followed(&self, manifest: &Manifest, layout: u16) -> Result<bool, Failure> {
        let names = names(&self.lineage(manifest)?)?;
        let mut layouts = names.iter().filter_map(|name| {
            let (_, number) = name.strip_prefix("shard-")?.split_once('.')?;
            number.parse::<u16>().ok()
        });
        Ok(layouts.any(|later| later > layout))
    }

    /// Reads every segment through that one of `backups` may need, and adds what is wrong to `damaged`: files that are damaged,
    /// and frames that are missing though there are later ones. Returns the number of segments.
    pub fn verify(&self, backups: &[Manifest], damaged: &mut Vec<String>) -> Result<u64, Failure> {
        let mut stores = BTreeSet::new();
        for manifest in backups {
            for stage in self.stages(manifest)? {
                for (index, (dir, _)) in stage.stores.iter().enumerate() {
                    let Planned { plan, limit, .. } =
                        self.planned(manifest, &stage, index, u64::MAX)?;
                    if matches!(plan.end, End::Gap { .. }) {
                        damaged.push(limit);
                    }
                    stores.insert(dir.clone());
                }
            }
        }
        let mut count = 0;
        for dir in stores {
            let (segments, odd) = self.segments(&dir)?;
            damaged.extend(odd);
            for found in segments {
                count += 1;
                let file = fs::read(&found.path).map_err(|error| failed(&found.path, &error))?;
                if let Err(damage) = Trailer::open(&file) {
                    damaged.push(format!("{}: {damage}", found.path.display()));
                }
            }
        }
        Ok(count)
    }

    /// The node's topology at a moment, as a copy of its file: that of the backup if none came since.
    pub fn topology(&self, manifest: &Manifest, until: Moment) -> Result<Option<Vec<u8>>, Failure> {
        let dir = self.lineage(manifest)?.join(TOPOLOGIES);
        let known = names(&dir)?.into_iter().filter_map(|name| {
            let (since, epoch) = topology_name(&name)?;
            (since <= until.0).then_some((epoch, name))
        });
        let Some((_, name)) = known.max() else {
            return Ok(None);
        };
        let path = dir.join(name);
        fs::read(&path)
            .map(Some)
            .map_err(|error| failed(&path, &error))
    }

    /// What none of `backups`, which are all of one node, needs any more.
    pub fn unneeded(&self, backups: &[Manifest]) -> Result<Unneeded, Failure> {
        let mut unneeded = Unneeded::default();
        let Some(node) = backups.first().map(|manifest| manifest.node.clone()) else {
            return Err(Failure::new(
                "without a backup, every segment may be needed",
            ));
        };
        let dir = self.dir.join(&node);
        for lineage in names(&dir)? {
            let oldest = backups
                .iter()
                .filter(|manifest| manifest.lineage == lineage)
                .min_by_key(|manifest| manifest.cut_stamp);
            match oldest {
                Some(oldest) => self.older(&dir.join(&lineage), oldest, &mut unneeded)?,
                None => unneeded.without_backup.push(lineage),
            }
        }
        Ok(unneeded)
    }

    /// What of a lineage is older than its oldest backup.
    fn older(&self, dir: &Path, oldest: &Manifest, unneeded: &mut Unneeded) -> Result<(), Failure> {
        for name in names(dir)? {
            let (segments, _) = self.segments(&dir.join(&name))?;
            let store = oldest.stores.iter().find(|store| store.dir == name);
            let mark = store.map(|store| mark_of(oldest, store)).transpose()?;
            for found in segments {
                let trailer = &found.trailer;
                let is_older = match mark {
                    Some(mark) => trailer.last < mark.sequence,
                    None => trailer.origin.layout < oldest.layout,
                };
                if is_older {
                    unneeded.bytes += trailer.body_bytes + 4096;
                    unneeded.files.push(found.path);
                }
            }
        }
        let endings = dir.join(ENDINGS);
        let older = names(&endings)?.into_iter().filter(|name| {
            let layout = name.parse::<u16>();
            layout.is_ok_and(|layout| layout < oldest.layout)
        });
        unneeded.files.extend(older.map(|name| endings.join(name)));
        let topologies = dir.join(TOPOLOGIES);
        let mut known: Vec<(u64, String)> = names(&topologies)?
            .into_iter()
            .filter_map(|name| Some((topology_name(&name)?.0, name)))
            .filter(|(since, _)| *since <= oldest.cut_stamp)
            .collect();
        known.sort();
        // The newest of them is the one at the backup.
        known.pop();
        let older = known.into_iter().map(|(_, name)| topologies.join(name));
        unneeded.files.extend(older);
        Ok(())
    }
}

/// Where the logs of a layout end, if the archive says so.
fn ending(lineage: &Path, layout: u16) -> Result<Option<Ending>, Failure> {
    let path = lineage.join(ENDINGS).join(Ending::name(layout));
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(&path, &error)),
    };
    let ending = Ending::decode(&text).map_err(|reason| failed(&path, &reason))?;
    if ending.layout.number != layout {
        return Err(failed(&path, &"it tells the end of another layout"));
    }
    Ok(Some(ending))
}

/// Where the log of a store of a backup was cut.
fn mark_of(manifest: &Manifest, store: &StoreFiles) -> Result<Mark, Failure> {
    let log = store.log.as_ref().ok_or_else(|| {
        Failure::new(format!(
            "backup {} does not say where the log was cut: it was taken by an earlier version, and cannot be brought \
             forward",
            manifest.id
        ))
    })?;
    let hash = u64::from_str_radix(&log.hash, 16);
    let hash = hash.map_err(|error| {
        Failure::new(format!(
            "backup {}: hash of the log's cut: {error}",
            manifest.id
        ))
    })?;
    Ok(Mark {
        sequence: log.sequence,
        hash,
    })
}

/// Removes files. A crash in between leaves some of them, which the next run finds again.
pub fn prune(unneeded: &Unneeded) -> Result<(), Failure> {
    for path in &unneeded.files {
        fs::remove_file(path).map_err(|error| failed(path, &error))?;
    }
    Ok(())
}

/// The names in a directory, sorted; none when there is no such directory.
fn names(dir: &Path) -> Result<Vec<String>, Failure> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(dir, &error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| failed(dir, &error))?;
        names.extend(entry.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Reads a segment's trailer alone.
fn trailer(path: &Path) -> io::Result<Result<Trailer, torc_engine::archive::trailer::Damage>> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut sector = vec![0; SECTOR_BYTES];
    let back = i64::try_from(SECTOR_BYTES).map_err(io::Error::other)?;
    if len < u64::try_from(SECTOR_BYTES).unwrap_or(u64::MAX) {
        return Ok(Trailer::decode(&[], len));
    }
    file.seek(SeekFrom::End(-back))?;
    file.read_exact(&mut sector)?;
    Ok(Trailer::decode(&sector, len))
}
