use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use torc_env::{AlignedBuf, Disk, Env, File, OpenMode, SECTOR_BYTES, ShardId};
use torc_sim::{Cuts, DiskOptions, Options, SimEnv, Simulation, at_every_power_cut};

fn sector(byte: u8) -> AlignedBuf {
    AlignedBuf::copy_of(&[byte; SECTOR_BYTES])
}

async fn first_byte(env: &SimEnv, path: &str) -> Option<u8> {
    let file = env
        .disk()
        .open(Path::new(path), OpenMode::Read)
        .await
        .ok()?;
    let (count, buf) = file.read_at(0, sector(0)).await;
    (count.ok()? > 0).then(|| buf[0])
}

#[test]
fn what_is_written_is_read_back() {
    torc_sim::run(1, async |env| {
        let disk = env.disk();
        disk.create_dir(Path::new("a/b")).await.unwrap();
        let path = Path::new("a/b/file");
        let file = disk.open(path, OpenMode::CreateNew).await.unwrap();
        file.write_at(4096, sector(7)).await.0.unwrap();
        file.sync().await.unwrap();
        assert_eq!(file.len().await.unwrap(), 8192);
        let (count, buf) = file.read_at(0, AlignedBuf::zeroed(3 * SECTOR_BYTES)).await;
        assert_eq!(count.unwrap(), 8192);
        assert_eq!((buf[4095], buf[4096]), (0, 7));
        let names = disk.list(Path::new("a")).await.unwrap();
        assert!(names[0].is_dir && names[0].name == "b");
        assert!(disk.open(path, OpenMode::CreateNew).await.is_err());
        assert!(
            disk.open(Path::new("a/none"), OpenMode::Read)
                .await
                .is_err()
        );
    });
}

#[test]
#[should_panic(expected = "within a sector")]
fn a_misaligned_write_panics() {
    torc_sim::run(1, async |env| {
        let file = env.disk().open(Path::new("f"), OpenMode::CreateNew).await;
        let (_result, _buf) = file.unwrap().write_at(512, sector(1)).await;
    });
}

/// Replaces a file's content by the book: a new file, synced, renamed, its directory synced.
async fn replace(env: &SimEnv, byte: u8) {
    let disk = env.disk();
    let new = disk.open(Path::new("new"), OpenMode::CreateNew).await;
    let new = new.unwrap();
    new.write_at(0, sector(byte)).await.0.unwrap();
    new.sync().await.unwrap();
    let (from, to) = (Path::new("new"), Path::new("current"));
    disk.rename(from, to).await.unwrap();
    disk.sync_dir(Path::new("")).await.unwrap();
}

#[test]
fn a_replaced_file_survives_every_power_cut() {
    let cuts = Cuts {
        variants: 20,
        ..Cuts::default()
    };
    let images = at_every_power_cut(
        &cuts,
        async |env, acked: Rc<RefCell<Vec<u8>>>| {
            for byte in 1..4 {
                replace(&env, byte).await;
                acked.borrow_mut().push(byte);
            }
        },
        async |env, acked| {
            let found = first_byte(&env, "current").await.unwrap_or(0);
            let acked = acked.borrow().last().copied().unwrap_or(0);
            assert!(found == acked || found == acked + 1, "{found}, {acked}");
        },
    );
    assert_eq!(images, 3 * 5 * 20 + 1);
}

#[test]
fn without_the_sync_some_power_cut_loses_the_content() {
    let found = Rc::new(RefCell::new(Vec::new()));
    let seen = found.clone();
    at_every_power_cut(
        &Cuts::default(),
        async |env, _: Rc<RefCell<()>>| {
            let file = env.disk().open(Path::new("f"), OpenMode::CreateNew).await;
            file.unwrap().write_at(0, sector(1)).await.0.unwrap();
            env.disk().sync_dir(Path::new("")).await.unwrap();
        },
        move |env, _| {
            let seen = seen.clone();
            async move {
                let byte = first_byte(&env, "f").await;
                seen.borrow_mut().push(byte);
            }
        },
    );
    let found = found.borrow();
    assert!(found.contains(&None) && found.contains(&Some(1)));
}

#[test]
fn a_durable_write_needs_no_sync() {
    let simulation = Simulation::new(3, Options::default());
    let host = simulation.add_host(1);
    let run = simulation.run_on(host, ShardId(0), async |env| {
        let disk = env.disk();
        let mode = OpenMode::CreateNewDurable;
        let file = disk.open(Path::new("f"), mode).await.unwrap();
        disk.sync_dir(Path::new("")).await.unwrap();
        file.write_at(0, sector(5)).await.0.unwrap();
    });
    run.unwrap();
    assert!(simulation.disk_is_settled(host));
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    let byte = simulation.run_on(host, ShardId(0), async |env| first_byte(&env, "f").await);
    assert_eq!(byte, Some(Some(5)));
}

#[test]
fn disk_faults_come_as_their_errors() {
    let simulation = Simulation::new(3, Options::default());
    let host = simulation.add_host(1);
    let disk = |read, write, sync, capacity_bytes| DiskOptions {
        read_error: read,
        write_error: write,
        sync_error: sync,
        capacity_bytes,
        ..DiskOptions::default()
    };
    let run = |knobs: DiskOptions| {
        simulation.set_disk(host, knobs);
        simulation.run_on(host, ShardId(0), async |env| {
            let path = Path::new("f");
            let created = env.disk().open(path, OpenMode::CreateNew).await;
            let file = match created {
                Ok(file) => file,
                Err(_) => env.disk().open(path, OpenMode::Write).await.unwrap(),
            };
            let length = file.len().await.unwrap();
            let write = file.write_at(length, sector(1)).await.0;
            let sync = file.sync().await;
            let read = file.read_at(0, sector(0)).await.0;
            (write.map_err(|e| e.kind()), sync.is_ok(), read.is_ok())
        })
    };
    let full = std::io::ErrorKind::StorageFull;
    let (write, sync, read) = run(disk(1.0, 0.0, 0.0, 1 << 20)).unwrap();
    assert!(write.is_ok() && sync && !read);
    let (write, sync, read) = run(disk(0.0, 1.0, 0.0, 1 << 20)).unwrap();
    assert!(write.is_err() && write != Err(full) && sync && read);
    let (write, sync, _) = run(disk(0.0, 0.0, 1.0, 1 << 20)).unwrap();
    assert!(write.is_ok() && !sync);
    let (write, ..) = run(disk(0.0, 0.0, 0.0, 4096)).unwrap();
    assert_eq!(write, Err(full));
}
